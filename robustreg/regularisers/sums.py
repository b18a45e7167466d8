r"""Sums of regularisers: `kl(b) + alpha(2, b)` (chi-PO's), several references at once.

    Omega(p) = sum_i Omega_i(p)

is what an adversary may do who has several budgets at once: its robust set holds every `dr_1 + dr_2 + ...` of
perturbations in the sets of the parts [Rockafellar 1970, cor. 16.4.1], and the worst case is the sum of theirs.
The parts are sums over actions, and so is the whole: marginals add up, and `marginals` finds the policy. An action is
masked where any part masks it.

**A norm among the parts** (`norms`) is none, but the least of sums over actions, `radius ||p||_q = min_s phi(p, s)`,
convex in both (`least`). So the conjugate is `max_s` of that of the other parts and `phi(., s)`, and its best s, where
`||p||_q = s`, is found by the secant method: a third search around the two of `marginals`.

Parts that share one reference are 0 there together, and the sum has that reference. References that differ leave no
policy for free: robust sets need not hold 0 then, nor grow with the strengths.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import pytrees, roots
from robustreg.regularisers import marginals
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.divergences import Scales
from robustreg.regularisers.least import Least


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

    @property
    def roughness(self) -> Array:
        """The largest of the parts'."""
        return functools.reduce(jnp.maximum, (part.roughness for part in self.parts))

    def rate(self, log_policy: Array) -> Array:
        """Compute the sum of the marginals' rates, `[A, ...]`."""
        return functools.reduce(jnp.add, (part.rate(log_policy) for part in self.parts))

    @property
    def _least(self) -> Least | None:
        """The summand that is no sum over actions, if there is one."""
        return next((part for part in self.parts if isinstance(part, Least) and part.searched), None)

    @property
    def _others(self) -> tuple[Bound, ...]:
        """The summands without it."""
        return tuple(part for part in self.parts if part is not self._least)

    def maximiser(self, q: Array) -> tuple[Array, Array]:
        """Compute the conjugate and its maximiser; see `marginals`, and above for a norm among the parts."""
        return marginals.maximiser(self, q) if self._least is None else _with_least(self, self._least, q)

    def policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        """Compute the change of the maximiser, `[A, ...]`."""
        least, reduce = self._least, self.reduce
        if least is None:
            return super().policy_tangent(policy, dq, change)
        w, z = self.yields(policy), self._forces(policy, dq, change)
        c, b = least.bend(policy)
        left = 1 - c * reduce.plain_sum(b * b * w)

        def solved(v: Array) -> Array:
            """Solve `(1/w - c b b^T) x = v` [Sherman and Morrison 1950]."""
            return w * (v + b * reduce.over(c * reduce.plain_sum(b * w * v) / left))

        t, ones = solved(z), solved(jnp.ones_like(policy))
        return t - ones * reduce.over(reduce.plain_sum(t) / reduce.plain_sum(ones))

    def yields(self, policy: Array) -> Array:
        """Compute `dp/dm`, `[A, ...]`, with a part that is no sum over actions at a fixed s (see `least`)."""
        least = self._least
        if least is None:
            return super().yields(policy)
        return BoundSum((*self._others, least.at(least.best(policy))), False).yields(policy)

    def _forces(self, policy: Array, dq: Array | None, change: Any) -> Array:
        """Compute `dq - d_leaves m` where one part is no sum over actions, `[A, ...]`.

        Its marginals depend on all of the policy, also on which actions are not played.
        """
        least, on = self._least, policy != 0
        others = BoundSum(self._others, False)
        moved = BoundSum(tuple(c for c, part in zip(change.parts, self.parts) if part is not least), False)
        own = next(c for c, part in zip(change.parts, self.parts) if part is least)
        assert least is not None
        z = others.forces(policy, dq, moved) if others.parts else jnp.where(on, 0 if dq is None else dq, 0)
        return z - jnp.where(on, least._explicit(own, lambda part: part.slopes(policy)), 0)

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


def _with_least(whole: BoundSum, least: Least, q: Array) -> tuple[Array, Array]:
    """The conjugate and maximiser of a sum with such a part in it."""

    reduce = whole.reduce

    def measure(log_s: Array, near: marginals.Found) -> tuple[Array, marginals.Found]:
        found = marginals.search(BoundSum((*whole._others, least.at(log_s)), False), q, near)
        return least.beyond(found.policy, log_s), found

    def keep(done: Array, old: marginals.Found, new: marginals.Found) -> marginals.Found:
        return jax.tree.map(lambda a, b: jnp.where(done if b.ndim == done.ndim else reduce.over(done), a, b), old, new)

    close, start = 4 * float(jnp.finfo(q.dtype).eps), marginals.nothing(q, reduce)
    found = roots.secant(
        measure,
        *least.bracket(q),
        slope=least.growth,
        close=close,
        turns=60,
        carried=start,
        keep=keep,
        like=(whole, q),
    ).carried
    return found.value, found.policy
