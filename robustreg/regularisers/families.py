"""The families of regularisers `D_alpha[p0 : p]/beta`: KL and alpha, and the factories that check their arguments."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import forks, pytrees
from robustreg.regularisers import conjugates, divergences, layer, log_policies, parameters, tangents, worst_cases
from robustreg.regularisers.regulariser import Regulariser


class _Divergence(Regulariser):
    """Hold what the regularisers `D_alpha/beta` have in common."""

    @property
    def _order(self) -> Array:
        """Alpha, 1 for KL."""
        return getattr(self, "alpha", jnp.ones_like(self.beta))

    def _value(self, policy: Array) -> Array:
        return divergences.alpha_divergence(policy, self._prior, self._order, self.reduce) / self.beta

    def _value_error(self, policy: Array) -> Array:
        return divergences.rounding(policy, self._prior, self._order) / self.beta

    def _conjugate_tangent(self, policy: Array, q: Array, dq: Array | None, change: Any) -> Array:
        change = self._change(dq, change)
        return tangents.conjugate_tangent(policy, self._prior, self._order, self.beta, change, self.reduce)

    def _policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        change = self._change(dq, change)
        return tangents.policy_tangent(policy, self._prior, self._order, self.beta, change, self.reduce)

    def _policy_change(self, dq: Array) -> Array:
        return conjugates.policy_change(dq, self.beta, self._prior, self._order)

    def _largest_weight(self, reward: Array, gap: Array) -> Array:
        return conjugates.largest_weight(reward, gap, self.beta, self._prior, self._order)


@pytrees.dataclass
class KL(_Divergence):
    """`Omega(p) = KL(p : p0)/beta`. Build it with `kl`, which validates; leaves as in the module docstring."""

    beta: Array
    log_prior: Array | None = None
    state_scale: Array | None = None
    reduce: pytrees.Reducers = pytrees.reducers()

    def _rebuild(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> "KL":
        return KL(beta, log_prior)

    def _noise(self, scales: divergences.Scales) -> Array:
        return conjugates.kl_noise(scales, self.beta)

    def _maximiser(self, q: Array) -> tuple[Array, Array]:
        return conjugates.kl_maximiser(q, self.beta, self._prior, self.reduce)

    def _policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        if self.reduce is not pytrees.LAST:
            return super()._policy_tangent(policy, dq, change)
        return tangents.kl_policy_tangent(policy, self._prior, self.beta, self._change(dq, change), self.reduce)

    def _log_policy(self, policy: Array, q: Array) -> Array:
        return log_policies.of_maximiser(policy, q, self.beta, self._prior, None, self.reduce)

    def _worst_case(self, policy: Array, action: Array | None = None) -> Array:
        gradient = worst_cases.from_policy(policy, self._prior, None, self.reduce, action)
        return worst_cases.over(gradient, self.reduce.over(self.beta))

    def _worst_case_of_logs(self, log_policy: Array, action: Array | None = None) -> Array:
        gradient = worst_cases.from_log_policy(log_policy, self._prior, None, self.reduce, action)
        return worst_cases.over(gradient, self.reduce.over(self.beta))


@pytrees.dataclass
class Alpha(_Divergence):
    """`Omega(p) = D_alpha[p0 : p]/beta`. Build it with `alpha`, which validates; leaves as in the module docstring."""

    alpha: Array
    beta: Array
    log_prior: Array | None = None
    state_scale: Array | None = None
    reduce: pytrees.Reducers = pytrees.reducers()

    def _rebuild(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> "Alpha":
        return Alpha(place(self.alpha.astype(dtype)[..., None], 1), beta, log_prior)

    def _noise(self, scales: divergences.Scales) -> Array:
        return conjugates.alpha_noise(scales, self.beta, self.alpha)

    def _maximiser(self, q: Array) -> tuple[Array, Array]:
        if self.reduce is pytrees.LAST:
            return layer.alpha_maximiser(q, self.beta, self._prior, self.alpha)
        return conjugates.alpha_maximiser(q, self.beta, self._prior, self.alpha, self.reduce)

    def _log_policy(self, policy: Array, q: Array) -> Array:
        return log_policies.of_maximiser(policy, q, self.beta, self._prior, self.alpha, self.reduce)

    def _worst_case(self, policy: Array, action: Array | None = None) -> Array:
        gradient = worst_cases.from_policy(policy, self._prior, self.alpha, self.reduce, action)
        return worst_cases.over(gradient, self.reduce.over(self.beta))

    def _worst_case_of_logs(self, log_policy: Array, action: Array | None = None) -> Array:
        gradient = worst_cases.from_log_policy(log_policy, self._prior, self.alpha, self.reduce, action)
        return worst_cases.over(gradient, self.reduce.over(self.beta))


def kl(
    beta: ArrayLike,
    prior: ArrayLike | None = None,
    log_prior: ArrayLike | None = None,
    *,
    state_scale: ArrayLike | None = None,
) -> KL:
    """KL regulariser `KL(p : p0)/beta` (entropy regularisation up to a constant for a uniform prior).

    Args:
        beta: inverse strength in 1/reward units, `[*B]`, positive and finite; larger is weaker.
        prior: reference policy p0, `[A]`, `[S, A]` or `[*B, S, A]`; None is uniform. 0 masks an action. What its sum
            misses of 1 by rounding is divided out.
        log_prior: its logarithm or logits instead of it, normalised here; minus infinity masks an action. Give at most
            one of the two.
        state_scale: `[*B, S]`, multiplies beta per state.

    Returns:
        A `KL`, whose arguments are pytree leaves.

    Raises:
        ValueError: a value out of range, naming the first offender; a prior that does not sum to 1, within 1e-6
            (float32), 1e-10 (float64) or 4 units of a dtype of 16 bits; axes that do not broadcast or can be read in
            two ways. Inside `jax.jit` values cannot be looked at: rows of a prior that miss 1 by more than 1e-3 (or
            those 4 units) and rows that mask every action become NaN there.
    """
    return _fitting(KL(*_common(beta, prior, log_prior, state_scale)))


def alpha(
    alpha: ArrayLike,
    beta: ArrayLike,
    prior: ArrayLike | None = None,
    log_prior: ArrayLike | None = None,
    *,
    state_scale: ArrayLike | None = None,
) -> Alpha:
    """Alpha-divergence regulariser `D_alpha[p0 : p]/beta` [Cichocki and Amari 2010].

    alpha = 1 is KL, 0 reverse KL, 1/2 four squared Hellinger distances, 2 half of Pearson's chi-squared (sparsemax).
    For alpha > 1 bad actions get probability exactly 0.

    Args:
        alpha: any real number, `[*B]`.
        beta: inverse strength in 1/reward units, `[*B]`, positive and finite; larger is weaker.
        prior: reference policy p0, `[A]`, `[S, A]` or `[*B, S, A]`; None is uniform. 0 masks an action. What its sum
            misses of 1 by rounding is divided out.
        log_prior: its logarithm or logits instead of it, normalised here; minus infinity masks an action. Give at most
            one of the two.
        state_scale: `[*B, S]`, multiplies beta per state.

    Returns:
        An `Alpha`, whose arguments are pytree leaves.

    Raises:
        ValueError: a value out of range, naming the first offender; a prior that does not sum to 1, within 1e-6
            (float32), 1e-10 (float64) or 4 units of a dtype of 16 bits; axes that do not broadcast or can be read in
            two ways. Inside `jax.jit` values cannot be looked at: rows of a prior that miss 1 by more than 1e-3 (or
            those 4 units) and rows that mask every action become NaN there.
    """
    return _fitting(Alpha(parameters.order(alpha), *_common(beta, prior, log_prior, state_scale)))


def _common(beta: Any, prior: Any, log_prior: Any, state_scale: Any) -> tuple[Array, Array | None, Array | None]:
    """Check the leaves that every regulariser has."""
    forks.refuse()
    logs = parameters.strength("beta", beta), parameters.log_prior(prior, log_prior)
    return *logs, parameters.state_scale(state_scale)


def _fitting(reg: Any) -> Any:
    """The regulariser, if the axes of its leaves fit each other."""
    _ = reg._leaves.batch, reg._leaves.states
    return reg
