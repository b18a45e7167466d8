"""The families of regularisers `D_alpha[p0 : p]/beta`: KL and alpha, and the factories that check their arguments."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import pytrees
from robustreg.regularisers import conjugates, divergences, layer, log_policies, parameters, tangents, worst_cases
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.regulariser import Regulariser


class BoundDivergence(Bound):
    """Hold what the regularisers `D_alpha/beta` have in common: all follows from the order alpha."""

    @property
    def order(self) -> Array:
        """Alpha, 1 for KL, broadcastable to `[...]`."""
        return jnp.ones_like(self.beta)

    def value(self, policy: Array) -> Array:
        """Compute `D_alpha[p0 : p]/beta`, `[...]`."""
        return divergences.alpha_divergence(policy, self.log_prior, self.order, self.reduce) / self.beta

    def marginal(self, log_policy: Array) -> Array:
        """Compute `eps_h(L)/beta`, `[A, ...]`, with `L = log(p/p0)`, counted as 0 on masked actions."""
        ratio = jnp.where(jnp.isneginf(self.log_prior), 0, log_policy - self.log_prior)
        return divergences.deformed_exp(ratio, self.reduce.over(self.order - 1)) / self.reduce.over(self.beta)

    def needs_every_action(self) -> Array:
        """Tell where alpha is 0 or less."""
        return self.order <= 0

    def value_error(self, policy: Array) -> Array:
        """Bound the rounding of `value`, `[...]`."""
        return divergences.rounding(policy, self.log_prior, self.order) / self.beta

    def conjugate_tangent(self, policy: Array, q: Array, dq: Array | None, change: Any) -> Array:
        """Compute the change of the conjugate, `[...]`; see `tangents`."""
        change = self._change(dq, change)
        return tangents.conjugate_tangent(policy, self.log_prior, self.order, self.beta, change, self.reduce)

    def policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        """Compute the change of the maximiser, `[A, ...]`; see `tangents`."""
        change = self._change(dq, change)
        return tangents.policy_tangent(policy, self.log_prior, self.order, self.beta, change, self.reduce)

    def curvature(self, policy: Array) -> Array:
        """Compute `w = p0^{alpha-1} p^{2-alpha}`, `[A, ...]`; 0 off the support."""
        on, order = policy > 0, self.reduce.over(self.order)
        prior = jnp.where(jnp.isneginf(self.log_prior), 0, self.log_prior)
        return jnp.where(on, jnp.exp(prior + (2 - order) * (jnp.log(jnp.where(on, policy, 1)) - prior)), 0)

    def policy_change(self, dq: Array) -> Array:
        """Bound the change of the maximiser, `[*B]`."""
        return conjugates.policy_change(dq, self.beta, self.log_prior, self.order)

    def largest_weight(self, reward: Array, gap: Array) -> Array:
        """Bound the probability of an action, `[A, ...]`."""
        return conjugates.largest_weight(reward, gap, self.beta, self.log_prior, self.order)

    @staticmethod
    def _change(dq: Array | None, change: Any) -> tangents.Change:
        """A direction in q and in the regulariser's own leaves."""
        order = pytrees.given(change.alpha) if isinstance(change, BoundAlpha) else None
        return tangents.Change(dq, pytrees.given(change.beta), pytrees.given(change.log_prior), order)


@pytrees.dataclass
class BoundKL(BoundDivergence):
    """`Omega(p) = KL(p : p0)/beta`; leaves as in `Bound`."""

    beta: Array
    log_prior: Array
    reduce: pytrees.Reducers = pytrees.reducers()

    def maximiser(self, q: Array) -> tuple[Array, Array]:
        """Compute the conjugate, a log-sum-exp, and its softmax."""
        return conjugates.kl_maximiser(q, self.beta, self.log_prior, self.reduce)

    def noise(self, scales: divergences.Scales) -> Array:
        """Bound the rounding of the conjugate."""
        return conjugates.kl_noise(scales, self.beta)

    def policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        """Compute the change of the maximiser, `[A, ...]`."""
        if self.reduce is not pytrees.LAST:
            return super().policy_tangent(policy, dq, change)
        return tangents.kl_policy_tangent(policy, self.log_prior, self.beta, self._change(dq, change), self.reduce)

    def log_policy(self, policy: Array, q: Array) -> Array:
        """Compute the logarithm of the maximiser, `[A, ...]`."""
        return log_policies.of_maximiser(policy, q, self.beta, self.log_prior, None, self.reduce)

    def worst_case(self, policy: Array, action: Array | None = None) -> Array:
        """Compute `log(p/p0)/beta`, `[A, ...]`."""
        gradient = worst_cases.from_policy(policy, self.log_prior, None, self.reduce, action)
        return worst_cases.over(gradient, self.reduce.over(self.beta))

    def worst_case_of_logs(self, log_policy: Array, action: Array | None = None) -> Array:
        """Compute it from log-probabilities."""
        gradient = worst_cases.from_log_policy(log_policy, self.log_prior, None, self.reduce, action)
        return worst_cases.over(gradient, self.reduce.over(self.beta))


@pytrees.dataclass
class BoundAlpha(BoundDivergence):
    """`Omega(p) = D_alpha[p0 : p]/beta`; leaves as in `Bound`, `alpha` like `beta`."""

    alpha: Array
    beta: Array
    log_prior: Array
    reduce: pytrees.Reducers = pytrees.reducers()

    @property
    def order(self) -> Array:
        """Alpha."""
        return self.alpha

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the leaves without actions."""
        return self.beta.shape, self.alpha.shape

    def maximiser(self, q: Array) -> tuple[Array, Array]:
        """Compute the conjugate by its root, and the maximiser."""
        if self.reduce is pytrees.LAST:
            return layer.alpha_maximiser(q, self.beta, self.log_prior, self.alpha)
        return conjugates.alpha_maximiser(q, self.beta, self.log_prior, self.alpha, self.reduce)

    def noise(self, scales: divergences.Scales) -> Array:
        """Bound the rounding of the conjugate."""
        return conjugates.alpha_noise(scales, self.beta, self.alpha)

    def log_policy(self, policy: Array, q: Array) -> Array:
        """Compute the logarithm of the maximiser, `[A, ...]`."""
        return log_policies.of_maximiser(policy, q, self.beta, self.log_prior, self.alpha, self.reduce)

    def worst_case(self, policy: Array, action: Array | None = None) -> Array:
        """Compute `(eps_h(L) - h D)/beta`, `[A, ...]`."""
        gradient = worst_cases.from_policy(policy, self.log_prior, self.alpha, self.reduce, action)
        return worst_cases.over(gradient, self.reduce.over(self.beta))

    def worst_case_of_logs(self, log_policy: Array, action: Array | None = None) -> Array:
        """Compute it from log-probabilities."""
        gradient = worst_cases.from_log_policy(log_policy, self.log_prior, self.alpha, self.reduce, action)
        return worst_cases.over(gradient, self.reduce.over(self.beta))


class Divergence(Regulariser):
    """Hold what KL and alpha have in common."""

    @property
    def order(self) -> Array:
        """Alpha, 1 for KL, `[*B]`."""
        return jnp.ones_like(self.beta)


@pytrees.dataclass
class KL(Divergence):
    """`Omega(p) = KL(p : p0)/beta`. Build it with `kl`, which validates; leaves as in the base class."""

    beta: Array
    log_prior: Array | None = None
    state_scale: Array | None = None

    def _bound(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> Bound:
        return BoundKL(beta, log_prior)


@pytrees.dataclass
class Alpha(Divergence):
    """`Omega(p) = D_alpha[p0 : p]/beta`. Build it with `alpha`, which validates.

    Attributes:
        alpha: `[*B]`.
        beta, log_prior, state_scale: as in `Regulariser`.
        alpha_per_state: added to alpha, `[*B, S]`, or None.
    """

    alpha: Array
    beta: Array
    log_prior: Array | None = None
    state_scale: Array | None = None
    alpha_per_state: Array | None = None

    @property
    def order(self) -> Array:
        """Alpha, `[*B]`, without what is added per state."""
        return self.alpha

    @property
    def _scalars(self) -> tuple[str, ...]:
        return "alpha", "beta"

    def _bound(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> Bound:
        order = place(self.alpha.astype(dtype)[..., None], 1)
        if self.alpha_per_state is not None:
            order = order + place(self.alpha_per_state.astype(dtype), 1)
        return BoundAlpha(order, beta, log_prior)


def kl(
    beta: ArrayLike,
    prior: ArrayLike | None = None,
    log_prior: ArrayLike | None = None,
    *,
    state_scale: ArrayLike | None = None,
) -> KL:
    """KL regulariser `KL(p : p0)/beta` (entropy regularisation up to a constant for a uniform prior).

    Args:
        beta: inverse strength in 1/reward units, `[*B]`, positive and finite; larger is weaker. (The soft minimum,
            `log sum p0 exp(-beta q)/(-beta)`, of who fears the action rather than chooses it, is the same turned
            round: `-reg.conjugate(-q)` with policy `reg.argmax(-q)`, and over many steps `-rr.solve(m, reg).value` for
            an `m` with the reward negated.)
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
    alpha_per_state: ArrayLike | None = None,
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
        alpha_per_state: `[*B, S]`, added to alpha per state.

    Returns:
        An `Alpha`, whose arguments are pytree leaves.

    Raises:
        ValueError: a value out of range, naming the first offender; a prior that does not sum to 1, within 1e-6
            (float32), 1e-10 (float64) or 4 units of a dtype of 16 bits; axes that do not broadcast or can be read in
            two ways. Inside `jax.jit` values cannot be looked at: rows of a prior that miss 1 by more than 1e-3 (or
            those 4 units) and rows that mask every action become NaN there.
    """
    common = _common(beta, prior, log_prior, state_scale)
    return _fitting(Alpha(parameters.order(alpha), *common, parameters.order_per_state(alpha_per_state)))


def _common(beta: Any, prior: Any, log_prior: Any, state_scale: Any) -> tuple[Array, Array | None, Array | None]:
    """Check the leaves that every regulariser has."""
    logs = parameters.strength("beta", beta), parameters.log_prior(prior, log_prior)
    return *logs, parameters.state_scale(state_scale)


def _fitting(reg: Any) -> Any:
    """The regulariser, if the axes of its leaves fit each other."""
    _ = reg._leaves.batch, reg._leaves.states
    return reg
