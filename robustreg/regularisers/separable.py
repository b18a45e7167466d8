r"""Regularisers of your own: an f-divergence from its generator.

    Omega(p) = (1/beta) sum_a p0_a f(p_a/p0_a),        f convex

is Csiszar's divergence of p from p0 over beta. One function defines a regulariser with everything that the library
does: solvers, worst case, robust set, certificate, gradients to any order, sweeps over beta and files.

    class JensenShannon(rr.Separable):
        def generator(self, ratio):
            return xlogy(ratio, ratio) - (1 + ratio) * jnp.log((1 + ratio) / 2)

    reg = JensenShannon.create(beta=5.0, prior=p0)

Constants and multiples of `ratio - 1` in f change nothing. The slope `f'(p/p0)` comes from f by automatic
differentiation; where f' is known in terms of `log(p/p0)`, override `slope` with it, which keeps digits of
probabilities that underflow. A parameter of the family is a field of the class (`order: Array`), one number per lane.

**What f must do**: be convex and finite for every ratio above 0, differentiable there but for kinks (that of the total
variation, `abs(ratio - 1)`, say), and evaluate to a few units of rounding of the numbers it is made of. f(0) may be
infinite (then every allowed action is played), and so may the slope at 0 (then every allowed action has a positive
probability). The search for the policy is in `marginals`.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import pytrees
from robustreg.regularisers import axes, marginals, parameters
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.divergences import Scales, weighted
from robustreg.regularisers.regulariser import Regulariser

# Classes of users by name, for files.
FAMILIES: dict[str, type] = {}
_COMMON = ("beta", "log_prior", "state_scale")


class Separable(Regulariser):
    """Base class for an f-divergence over beta; give `generator`, and make instances by `create`.

    Attributes:
        beta, log_prior, state_scale: as in every regulariser.
    """

    beta: Array
    log_prior: Array | None = None
    state_scale: Array | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Fields of the subclass come last and need no default: `create` gives all of them by name.
        cls.__annotations__ = {
            "beta": Array,
            "log_prior": Array | None,
            "state_scale": Array | None,
            **cls.__dict__.get("__annotations__", {}),
        }
        for name in cls.__annotations__:
            if name not in ("beta", *cls.__dict__):
                setattr(cls, name, None)
        pytrees.dataclass(cls)
        FAMILIES[cls.__name__] = cls

    def generator(self, ratio: Array) -> Array:
        """Compute the convex `f(p/p0)`, elementwise."""
        raise TypeError(f"{type(self).__name__} does not define generator(self, ratio)")

    def slope(self, log_ratio: Array) -> Array:
        """Compute `f'(p/p0)` from `log(p/p0)`, elementwise; minus infinity is a probability of 0."""
        ratio = jnp.exp(log_ratio)
        return jax.jvp(self.generator, (ratio,), (jnp.ones_like(ratio),))[1]

    @classmethod
    def create(
        cls,
        beta: ArrayLike,
        prior: ArrayLike | None = None,
        log_prior: ArrayLike | None = None,
        *,
        state_scale: ArrayLike | None = None,
        **own: ArrayLike,
    ) -> Self:
        """Make a regulariser of checked arguments.

        Args:
            beta, prior, log_prior, state_scale: as in `robustreg.kl`.
            **own: parameters of the family by name, `[*B]` each.

        Raises:
            TypeError: a parameter that the family has not, or one of its own that is missing.
            ValueError: as `robustreg.kl`.
        """
        wanted = sorted(field.name for field in dataclasses.fields(cls) if field.name not in _COMMON)  # type: ignore
        if sorted(own) != wanted:
            raise TypeError(f"{cls.__name__}.create takes the parameters {wanted} of its own, got {sorted(own)}")
        leaves = {
            "beta": parameters.strength("beta", beta),
            "log_prior": parameters.log_prior(prior, log_prior),
            "state_scale": parameters.state_scale(state_scale),
        }
        reg = cls(**leaves, **{name: parameters.number(name, x) for name, x in own.items()})  # type: ignore[call-arg]
        _ = reg._leaves.batch, reg._leaves.states
        return reg

    @property
    def _own(self) -> dict[str, Array]:
        """Parameters of the family."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in _COMMON]  # type: ignore
        return {name: getattr(self, name) for name in names}

    @property
    def _scalars(self) -> tuple[str, ...]:
        return "beta", *self._own

    @property
    def _leaves(self) -> axes.Leaves:
        shapes = [x.shape for x in self._own.values()]
        own = jnp.broadcast_shapes(*shapes) if shapes else None
        return super()._leaves._replace(alpha=own)

    def _bound(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> "BoundSeparable":
        own = {name: place(x.astype(dtype)[..., None], 1) for name, x in self._own.items()}
        family: Any = self  # of a class that is a dataclass, as all subclasses are
        family = dataclasses.replace(family, beta=None, log_prior=None, state_scale=None, **own)
        return BoundSeparable(family, beta, log_prior)


@pytrees.dataclass
class BoundSeparable(Bound):
    """An f-divergence over beta.

    Attributes:
        family: the user's, with nothing but its own parameters, broadcastable to `[...]`.
        beta, log_prior, reduce: as in `Bound`.
    """

    family: Separable
    beta: Array
    log_prior: Array
    reduce: pytrees.Reducers = pytrees.reducers()

    @property
    def has_reference(self) -> bool:  # type: ignore[override]
        """Whether the cost is that of leaving a distribution."""
        return self.family.has_reference

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the leaves without actions."""
        return (self.beta.shape, *(x.shape for x in self.family._own.values()))

    @property
    def _over(self) -> Separable:
        """The family with an axis of 1 for actions."""
        return jax.tree.map(self.reduce.over, self.family)

    def _at_one(self, like: Array) -> tuple[Array, Array]:
        """`f(1)` and `f'(1)`, with an axis of 1 for actions; 0 without a reference."""
        one = jnp.ones((1,) * like.ndim, like.dtype)
        if not self.family.has_reference:
            return 0 * one, 0 * one
        return self._over.generator(one), self._over.slope(0 * one)

    def _terms(self, policy: Array) -> Array:
        """`p0 (f(t) - f(1) - f'(1) (t - 1))`, `[A, ...]`, with `t = p/p0`; 0 on masked actions."""
        masked = jnp.isneginf(self.log_prior)
        logs = jnp.where(masked, 0, self.log_prior)
        f, at_one, slope = self._over.generator, *self._at_one(policy)
        on = policy > 0
        ratio = jnp.where(on, policy * jnp.exp(-logs), 1)
        # The derivative of f at 0 may be infinite, and is of no interest: nothing moves an action away from there.
        cost = jnp.where(on, f(ratio), f(jnp.zeros_like(ratio))) - at_one - slope * (jnp.where(on, ratio, 0) - 1)
        return jnp.where(masked | jnp.isnan(policy), jnp.where(masked, 0, policy), jnp.exp(logs) * cost)

    def value(self, policy: Array) -> Array:
        """Compute `(1/beta) sum p0 f(p/p0)`, `[...]`."""
        escaped = jnp.any((policy > 0) & jnp.isneginf(self.log_prior), axis=self.reduce.axis)
        return jnp.where(escaped, jnp.inf, self.reduce.total(self._terms(policy)) / self.beta)

    def marginal(self, log_policy: Array) -> Array:
        """Compute `(f'(p/p0) - f'(1))/beta`, `[A, ...]`."""
        ratio = jnp.where(jnp.isneginf(self.log_prior), 0, log_policy - self.log_prior)
        return (self._over.slope(ratio) - self._at_one(log_policy)[1]) / self.reduce.over(self.beta)

    def maximiser(self, q: Array) -> tuple[Array, Array]:
        """Compute the conjugate and its maximiser; see `marginals`."""
        return marginals.maximiser(self, q)

    def needs_every_action(self) -> Array:
        """Tell whether f(0) is infinite."""
        return ~jnp.isfinite(
            jnp.squeeze(self._over.generator(jnp.zeros_like(self.reduce.over(self.beta))), self.reduce.axis)
        )

    def noise(self, scales: Scales) -> Array:
        """Bound the rounding of the conjugate."""
        return marginals.noise(scales)

    def value_error(self, policy: Array) -> Array:
        """Bound the rounding of `value`, and how far normalising the policy moves it, `[...]`."""
        n, unit = policy.shape[self.reduce.axis], 0.5 * float(jnp.finfo(policy.dtype).eps)
        taken = (policy > 0) & ~jnp.isneginf(self.log_prior)
        slopes = jnp.where(taken, self.marginal(jnp.log(jnp.where(taken, policy, 1))), 0)
        tilt = weighted(policy, jnp.abs(slopes) * (2 + jnp.abs(jnp.where(taken, self.log_prior, 0))), self.reduce.total)
        size = (
            self.reduce.total(jnp.abs(self._terms(policy))) / self.beta
            + (4 + 2 * jnp.abs(jnp.squeeze(self._at_one(policy)[1], self.reduce.axis))) / self.beta
        )
        moved = jnp.abs(self.reduce.total(policy) - 1) + n * unit
        return unit * (8 + min(n, 4 * n**0.5)) * (size + tilt) + moved * tilt
