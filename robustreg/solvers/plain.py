"""Operators without a regulariser: the value of one policy, and the plain maximum.

Both are Bellman operators whose conjugate is trivial, so that the loop of `solve`, its certificates and its derivatives
serve them like any regulariser: they are siblings of `bound`'s families, on the side of the kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import pytrees
from robustreg.problems.mdps import MDP
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.regulariser import Regulariser


@pytrees.dataclass
class FixedPolicy(Bound):
    """The affine operator of one policy as a bound regulariser: `Omega*(q) = <p, q> - cost`."""

    policy: Array
    cost: Array
    beta: Array
    log_prior: Array

    def maximiser(self, q: Array) -> tuple[Array, Array]:
        return jnp.sum(self.policy * self._where_taken(q), axis=0) - self.cost, self.policy

    def guess(self, q: Array) -> Array:
        return self.maximiser(q)[0]

    def excess(self, q: Array, th: Array) -> Array:
        # An average by known weights: what is hardly ever done hardly counts.
        return jnp.sum(self.policy * jnp.abs(self._where_taken(q) - th[None]), axis=0)

    def largest_weight(self, reward: Array, gap: Array) -> Array:
        return jnp.broadcast_to(self.policy, jnp.broadcast_shapes(self.policy.shape, gap.shape))

    def _where_taken(self, q: Array) -> Array:
        """q with 0 in the place of what is infinite at actions never taken."""
        return jnp.where((self.policy == 0) & ~jnp.isfinite(q), 0, q)

    def conjugate_tangent(self, policy: Array, q: Array, dq: Array | None, change: "FixedPolicy") -> Array:
        dp, dcost = pytrees.given(change.policy), pytrees.given(change.cost)
        total = jnp.zeros(q.shape[1:], q.dtype) if dcost is None else -dcost
        if dq is not None:
            total = total + jnp.sum(policy * jnp.where(policy == 0, 0, dq), axis=0)
        return total if dp is None else total + jnp.sum(dp * self._where_taken(q), axis=0)

    def policy_tangent(self, policy: Array, dq: Array | None, change: "FixedPolicy") -> Array:
        dp = pytrees.given(change.policy)
        return jnp.zeros_like(policy) if dp is None else dp


@pytrees.dataclass
class HardMax(Bound):
    """The maximum as a bound regulariser: `Omega*(q) = max q`, whose subgradient is the first best action."""

    has_reference = False

    beta: Array
    log_prior: Array

    def value(self, policy: Array) -> Array:
        """Return 0, `[...]`."""
        return jnp.zeros(policy.shape[1:], policy.dtype)

    def marginal(self, log_policy: Array) -> Array:
        return jnp.zeros_like(log_policy)

    def maximiser(self, q: Array) -> tuple[Array, Array]:
        q = jnp.where(jnp.isneginf(self.log_prior), -jnp.inf, q)
        return jnp.max(q, axis=0), jnp.moveaxis(jax.nn.one_hot(jnp.argmax(q, axis=0), q.shape[0], dtype=q.dtype), -1, 0)

    def guess(self, q: Array) -> Array:
        return self.maximiser(q)[0]

    def largest_weight(self, reward: Array, gap: Array) -> Array:
        return jnp.where(gap > 0, 0, jnp.ones_like(gap))

    def conjugate_tangent(self, policy: Array, q: Array, dq: Array | None, change: "HardMax") -> Array:
        zero = jnp.zeros(q.shape[1:], q.dtype)
        return zero if dq is None else jnp.sum(policy * jnp.where(policy == 0, 0, dq), axis=0)

    def policy_tangent(self, policy: Array, dq: Array | None, change: "HardMax") -> Array:
        return jnp.zeros_like(policy)


@pytrees.dataclass
class NoRegulariser(Regulariser):
    """Stands for "no regulariser": binds to no cost at all, an infinite beta in the rounding bound."""

    has_reference = False

    beta: Array
    log_prior: Array | None = None
    state_scale: Array | None = None

    @property
    def _scalars(self) -> tuple[str, ...]:
        return ()

    def _bound(self, beta: Array, log_prior: Array, place: object, dtype: object) -> HardMax:
        return HardMax(beta, log_prior)


def no_regulariser(mdp: MDP) -> NoRegulariser:
    """Return what stands for "no regulariser" with an MDP."""
    return NoRegulariser(jnp.asarray(jnp.finfo(mdp.dtype).max, mdp.dtype))


def regulariser_or_none(mdp: Any, reg: Any) -> Any:
    """Read an argument for which None is the plain maximum."""
    return no_regulariser(mdp) if reg is None and isinstance(mdp, MDP) else reg
