r"""Sums of regularisers: `kl(b) + alpha(2, b)` (chi-PO's), several references at once.

    Omega(p) = sum_i Omega_i(p)

is what an adversary may do who has several budgets at once: its robust set holds every `dr_1 + dr_2 + ...` of
perturbations in the sets of the parts [Rockafellar 1970, cor. 16.4.1], and the worst case is the sum of theirs.
The parts are sums over actions, and so is the whole: marginals add up, and `marginals` finds the policy. An action is
masked where any part masks it.

Parts that share one reference are 0 there together, and the sum has that reference. References that differ leave no
policy for free: robust sets need not hold 0 then, nor grow with the strengths.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import pytrees
from robustreg.regularisers import marginals
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.divergences import Scales


@pytrees.dataclass
class BoundSum(Bound):
    """A sum of bound regularisers.

    Attributes:
        parts: the summands.
        has_reference: whether they share their reference.
    """

    parts: tuple[Bound, ...]
    has_reference: bool = pytrees.static()

    @property
    def reduce(self) -> pytrees.Reducers:  # type: ignore[override]
        """How they sum over actions."""
        return self.parts[0].reduce

    @property
    def beta(self) -> Array:  # type: ignore[override]
        """Inverse strength of all together."""
        return 1 / functools.reduce(jnp.add, (1 / part.beta for part in self.parts))

    @property
    def log_prior(self) -> Array:  # type: ignore[override]
        """The shared reference, or the normalised geometric mean of several; minus infinity where any part masks."""
        if self.has_reference:
            return self.parts[0].log_prior
        logs = functools.reduce(jnp.add, (part.log_prior for part in self.parts)) / len(self.parts)
        return logs if logs.shape[self.reduce.axis] == 1 else jax.nn.log_softmax(logs, axis=self.reduce.axis)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the leaves without actions."""
        return tuple(shape for part in self.parts for shape in part.shapes)

    def value(self, policy: Array) -> Array:
        """Compute the sum of the costs, `[...]`."""
        return functools.reduce(jnp.add, (part.value(policy) for part in self.parts))

    def marginal(self, log_policy: Array) -> Array:
        """Compute the sum of the marginals, `[A, ...]`."""
        return functools.reduce(jnp.add, (part.marginal(log_policy) for part in self.parts))

    def maximiser(self, q: Array) -> tuple[Array, Array]:
        """Compute the conjugate and its maximiser; see `marginals`."""
        return marginals.maximiser(self, q)

    def worst_case(self, policy: Array, action: Array | None = None) -> Array:
        """Compute the sum of the worst cases, `[A, ...]`."""
        return functools.reduce(jnp.add, (part.worst_case(policy, action) for part in self.parts))

    def worst_case_of_logs(self, log_policy: Array, action: Array | None = None) -> Array:
        """Compute the sum of the worst cases from log-probabilities, `[A, ...]`."""
        return functools.reduce(jnp.add, (part.worst_case_of_logs(log_policy, action) for part in self.parts))

    def needs_every_action(self) -> Array:
        """Tell whether any part does."""
        return functools.reduce(jnp.logical_or, (part.needs_every_action() for part in self.parts))

    def noise(self, scales: Scales) -> Array:
        """Bound the rounding of the conjugate: that of the search, and of each cost."""
        own = functools.reduce(jnp.add, (part.noise(scales) for part in self.parts))
        return marginals.noise(scales, len(self.parts)) + own

    def value_error(self, policy: Array) -> Array:
        """Bound the rounding of `value`, `[...]`."""
        return functools.reduce(jnp.add, (part.value_error(policy) for part in self.parts))

    def scaled(self, t: Array) -> "BoundSum":
        """Return the same at `t` times every beta."""
        return BoundSum(tuple(part.scaled(t) for part in self.parts), self.has_reference)

    def with_reduce(self, reduce: pytrees.Reducers) -> "BoundSum":
        """Return the same with actions where `reduce` has them."""
        return BoundSum(tuple(part.with_reduce(reduce) for part in self.parts), self.has_reference)
