r"""The negative entropy without a reference policy, `Omega(p) = (1/beta) sum p log p`.

Its robust set is `{ sum exp(beta dr) <= 1 }`, and the worst case `(1/beta) log p <= 0` *raises* every reward; against a
uniform prior everything moves by `log(A)/beta` and both signs appear [Eysenbach and Levine 2022].
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import pytrees
from robustreg.regularisers import conjugates, masks, parameters
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.divergences import Scales, deformed_exp, kl_divergence
from robustreg.regularisers.families import KL, BoundKL, kl
from robustreg.regularisers.regulariser import counting
from robustreg.regularisers.separable import Separable


@pytrees.dataclass
class BoundEntropy(BoundKL):
    """`Omega(p) = (1/beta) sum p log p`: KL against the counting measure; `log_prior` is 0, or minus infinity."""

    has_reference = False

    beta: Array
    log_prior: Array
    reduce: pytrees.Reducers = pytrees.reducers()

    def maximiser(self, q: Array) -> tuple[Array, Array]:
        """Compute them as against the uniform distribution, which has the mass of a policy, and a constant."""
        logs = float(np.log(q.shape[self.reduce.axis]))
        value, policy = conjugates.kl_maximiser(q, self.beta, self.log_prior - logs, self.reduce)
        return value + logs / self.beta, policy

    def value(self, policy: Array) -> Array:
        """Compute `(1/beta) sum p log p`, `[...]`."""
        # The counting measure has another mass than a policy: no extension to other measures applies.
        return kl_divergence(policy, self.log_prior, self.reduce) / self.beta

    def marginal(self, log_policy: Array) -> Array:
        """Compute `(1 + log p)/beta`, `[A, ...]`."""
        logs = jnp.where(jnp.isneginf(self.log_prior), 0, log_policy)
        return (1 + logs) / self.reduce.over(self.beta)

    def conjugate_tangent(self, policy: Array, q: Array, dq: Array | None, change: Any) -> Array:
        """Compute the change of the conjugate, `[...]`: that of this value, not of a divergence's."""
        return Bound.conjugate_tangent(self, policy, q, dq, change)

    def value_error(self, policy: Array) -> Array:
        """Bound the rounding of `value`, `[...]`."""
        return Bound.value_error(self, policy)

    def noise(self, scales: Scales) -> Array:
        """Bound the rounding of the conjugate."""
        return scales.logs * scales.temperature


@pytrees.dataclass
class Entropy(KL):
    """`Omega(p) = (1/beta) sum p log p`: KL against the counting measure. Build it with `entropy`."""

    has_reference = False

    def _bound(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> Bound:
        return BoundEntropy(beta, log_prior)

    def _rearrange(self, place: Any, dtype: Any, n_actions: int, last: bool = False) -> Any:
        return KL._rearrange(counting(self, dtype, n_actions), place, dtype, n_actions, last)


class Tsallis(Separable):
    """`Omega(p) = (1/beta) (sum p^q - 1)/(q - 1)`, the negative Tsallis entropy. Build it with `tsallis`."""

    has_reference = False

    order: Array

    def generator(self, ratio: Array) -> Array:
        """Compute `t eps_{q-1}(log t)`, elementwise, without a singularity at q = 1."""
        inside = ratio > 0
        tilted = deformed_exp(jnp.log(jnp.where(inside, ratio, 1)), self.order - 1)
        return jnp.where(inside, ratio * tilted, 0)

    def slope(self, log_ratio: Array) -> Array:
        """Compute `eps_{q-1}(L) + e^{(q-1) L}`, elementwise."""
        h = self.order - 1
        some = jnp.where(jnp.isneginf(log_ratio), 0, log_ratio)
        end = jnp.where(h > 0, -1 / jnp.where(h > 0, h, 1), -jnp.inf)
        return jnp.where(jnp.isneginf(log_ratio), end, deformed_exp(some, h) + jnp.exp(h * some))

    def _rearrange(self, place: Any, dtype: Any, n_actions: int, last: bool = False) -> Any:
        return Separable._rearrange(counting(self, dtype, n_actions), place, dtype, n_actions, last)


def tsallis(
    order: ArrayLike, beta: ArrayLike, *, state_scale: ArrayLike | None = None, available: ArrayLike | None = None
) -> Tsallis:
    """Make the regulariser that is the negative Tsallis entropy without a reference, `(1/beta) (sum p^q - 1)/(q - 1)`.

    Args:
        order: q, `[*B]`, positive: 1 is Shannon's entropy, 2 sparse policies [Lee, Choi and Oh 2018]. With more than
            1, bad actions get probability exactly 0.
        beta: inverse strength in 1/reward units, `[*B]`, positive and finite; larger is weaker.
        state_scale: `[*B, S]`, multiplies beta per state.
        available: which actions there are, as in `entropy`.

    Returns:
        A regulariser whose policies are those of `alpha(order, beta A^(order - 1) / order)` with a uniform prior, and
        whose values differ by a constant per step that is played, as those of `entropy` do from `kl`.

    Raises:
        TypeError, ValueError: an order or beta out of range; a mask that is none.
    """
    reg = Tsallis.create(beta, state_scale=state_scale, order=parameters.strength("order", order))
    return reg if available is None else masks.restricted(reg, available)


def entropy(beta: ArrayLike, *, state_scale: ArrayLike | None = None, available: ArrayLike | None = None) -> Entropy:
    """Entropy regulariser without a reference policy, `Omega(p) = -H(p)/beta`.

    Args:
        beta: inverse strength in 1/reward units, `[*B]`, positive and finite; larger is weaker.
        state_scale: `[*B, S]`, multiplies beta per state.
        available: which actions there are, `[A]`, `[S, A]` or `[*B, S, A]` booleans; None: all. The others are never
            played. (An MDP with a mask of its own needs none here.)

    Returns:
        A regulariser for `solve`, `worst_case`, `slack` and the rest, in which the "worst case" of a policy raises
        every reward. Every step that is played earns up to `log(A)/beta` more than under `kl` with a uniform prior.
        Where no episode ends (and state_scale is None and all actions are available), that is `log(A)/(beta (1-g))` in
        every state, and policies are the same. Where episodes end, it is worth something to play on: policies differ,
        and states in which nothing more happens, such as the goals of a grid world, are worth `log(A)/(beta (1-g))`.

    Raises:
        TypeError, ValueError: a beta or scale out of range; a mask that is none, or leaves a state without action.
    """
    strength = kl(beta, state_scale=state_scale)
    plain = Entropy(strength.beta, None, strength.state_scale)
    return plain if available is None else masks.restricted(plain, available)
