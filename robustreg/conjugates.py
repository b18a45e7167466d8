r"""Conjugates of the divergences, their maximisers, and the derivatives of both: actions on the leading axis.

**The conjugate.** `max_p <p, q> - D[p0 : p]/beta` is attained at `p = p0 exp_alpha(beta (q - psi))`, with the scalar
`psi` that normalises `p` [Brekelmans et al. 2022]. In floating point every choice of unknown loses digits somewhere:
`psi` for large `beta`, `1 + h beta (max q - psi)` near alpha = 1, `beta (max q - psi)` for small priors and alpha < 1.
The *log-ratio of the best action* loses none. With `gap = beta (max q - q) >= 0` and `l = log(p/p0)` at `gap = 0`,

    log(p_a/p0_a) = l + lam_h(-gap_a e^{-h l}),      find l in [0, -log p0_best] with sum_a p_a = 1.

The power mean `M = (sum p)^h` of `1 + h beta (q - psi)` is homogeneous of degree one, hence nearly linear in
`y = e^{h l}`; Newton's method on `M = 1` in the variable `y` reads, in terms of `l` and `F = log sum p`,

    l <- l + lam_h( eps_h(-F) / E_p[1/rho] ),        rho_a = 1 - h gap_a e^{-h l},

is exact in one step for KL, monotone from the far end of the bracket for alpha <= 2, and is safeguarded by bisection
for the vertical tangents that alpha > 2 has at the edge of the support.

**Derivatives** never pass through the root finding. With `w = p e^{-h L} = p0^{alpha-1} p^{2-alpha}` on the support
and 0 off it, `W = sum w`, and every change of `q`, `beta`, `alpha` and `log p0` at once,

    d Omega*  =  <p, dq> + (D/beta^2) dbeta - (dD/dalpha dalpha + dD/dp0 dp0)/beta,
    d p       =  t - w (sum t)/W,      t = p dlog p0 + w (beta dq + eps_h(L) dbeta/beta - deps_h(L)/dh dalpha).

The first line is the envelope theorem, the second the derivative of `log p = log p0 + lam_h(beta (q - psi))` with
`d psi` eliminated by normalisation. Both are differentiable again. At an action on the edge of the support (alpha > 1)
they are one-sided derivatives: of the action's staying at probability 0.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from robustreg import _tree
from robustreg.divergences import (
    alpha_divergence,
    alpha_divergence_at,
    divergence_tangent,
    eps,
    eps_slope,
    lam,
    log_ratio,
    weighted,
)

# Cap on root-finding steps: 3 to 9 are typical; bisection alone would need about 60 (float64).
_MAX_ROOT_STEPS = 80


def kl_maximiser(q: Array, beta: Array, log_prior: Array, reduce: _tree.Reducers = _tree.LANES) -> tuple[Array, Array]:
    """Conjugate of `KL/beta` and its maximiser.

    Args:
        q: `[A, ...]`; entries of masked actions are never looked at, they may be infinite or NaN.
        beta: broadcastable to `[...]`, positive.
        log_prior: broadcastable to `[A, ...]`.
        reduce: sums and maxima over actions.

    Returns:
        `(1/beta) log sum p0 exp(beta q)`, `[...]`, and `p0 exp(beta (q - that))`, `[A, ...]`.
    """
    masked = jnp.isneginf(log_prior)
    best = reduce.largest(jnp.where(masked, -jnp.inf, q))
    gap = jnp.where(masked, 0, beta[None] * (best[None] - q))
    # Relative to the largest weight, not to that of the best action: its prior alone may underflow.
    exponent = log_prior - gap
    top = reduce.largest(exponent)
    weight = jnp.exp(exponent - top[None])
    total = reduce.total(weight)
    return best + (top + jnp.log(total)) / beta, weight / total[None]


def alpha_maximiser(
    q: Array, beta: Array, log_prior: Array, alpha: Array, reduce: _tree.Reducers = _tree.LANES
) -> tuple[Array, Array]:
    """Conjugate of `D_alpha/beta` over normalised policies, and its maximiser. Shapes as in `kl_maximiser`.

    The value is `<p, q> - D/beta` at the policy found. It errs by the square of the policy's error only, and is a
    lower bound on the conjugate whatever the policy.
    """
    masked = jnp.isneginf(log_prior)
    best = reduce.largest(jnp.where(masked, -jnp.inf, q))
    gap = jnp.where(masked, 0, beta[None] * (best[None] - q))
    policy, ratio = _normalise(gap, log_prior, alpha - 1, reduce)
    divergence = alpha_divergence_at(policy, log_prior, alpha, ratio, reduce)
    return best - (weighted(policy, gap, reduce.total) + divergence) / beta, policy


def _ratios(level: Array, gap: Array, h: Array) -> tuple[Array, Array]:
    """`log(p/p0)` and `rho` of every action for a log-ratio `level` of the best one.

    For h < 0 and small priors `e^{-h l}` overflows; there `log(p/p0)` has the limit `log(-h gap)/h`, free of `l`.
    """
    scaled = jnp.where(gap == 0, 0, gap * jnp.exp(-h * level)[None])
    h = h[None]
    x = -h * scaled
    rho = jnp.maximum(1 + x, 0)
    near = level[None] + lam(-scaled, h)
    overflow = jnp.isposinf(x)
    far = jnp.log(jnp.where(overflow, -h * gap, 1)) / jnp.where(overflow, h, 1)
    return jnp.where(overflow, far, near), rho


def _normalise(gap: Array, log_prior: Array, h: Array, reduce: _tree.Reducers) -> tuple[Array, Array]:
    """The policy whose log-ratios are those of `_ratios` and whose sum is 1, and those log-ratios.

    Args:
        gap: `beta (max q - q)`, `[A, ...]`, 0 on masked actions.
        log_prior: `[A, ...]`.
        h: `alpha - 1`, `[...]`.
    """
    level, low, high = _root(gap, log_prior, h, reduce)
    ratio, rho = _ratios(level, gap, h)
    raw = jnp.exp(log_prior + ratio)
    # One Newton step in policy space. Plain renormalisation would move mass onto actions in proportion to p, whereas
    # the error of the root moves it in proportion to the curvature w = dp/d(psi): at alpha = 5 an action on the edge
    # of the support then leaves a value error of 3e-8.
    curvature = _curvature(raw, rho)
    missing = (1 - reduce.total(raw)) / reduce.total(curvature)
    policy = jnp.maximum(raw + missing[None] * curvature, 0)
    policy = policy / reduce.total(policy)[None]
    moved = (policy > 0) & (raw > 0)
    correction = jnp.log(jnp.where(moved, policy, 1)) - jnp.log(jnp.where(moved, raw, 1))
    unresolved = ~(jnp.abs(jnp.log(reduce.total(raw))) <= jnp.finfo(gap.dtype).eps ** 0.6)[None]

    def bridge() -> tuple[Array, Array]:
        mixed = _between(low, high, gap, log_prior, h, reduce)
        best = jnp.where(unresolved, mixed, policy)
        return best, jnp.where(unresolved, log_ratio(best, log_prior), ratio + correction)

    return lax.cond(jnp.any(unresolved), bridge, lambda: (policy, ratio + correction))


def _between(low: Array, high: Array, gap: Array, log_prior: Array, h: Array, reduce: _tree.Reducers) -> Array:
    """Mixture, summing to 1, of the two sides of a bracket that holds no further number.

    For alpha > 2 an action on the edge of the support can take on all its mass between two neighbouring levels.
    """
    below, above = (jnp.exp(log_prior + _ratios(level, gap, h)[0]) for level in (low, high))
    missing, jump = 1 - reduce.total(below), reduce.total(above - below)
    share = jnp.clip(missing / jnp.where(jump > 0, jump, 1), 0, 1)
    mixed = below + share[None] * (above - below)
    return mixed / reduce.total(mixed)[None]


def _curvature(policy: Array, rho: Array) -> Array:
    """`w = p/rho`, proportional to `p0^{alpha-1} p^{2-alpha}`; 0 off the support."""
    inside = (rho > 0) & (policy > 0)
    return jnp.where(inside, policy / jnp.where(inside, rho, 1), 0)


def _root(gap: Array, log_prior: Array, h: Array, reduce: _tree.Reducers) -> tuple[Array, Array, Array]:
    """The level `l` with `sum p = 1`, and a bracket around it, `[...]` each: Newton, kept inside by bisection."""
    unit = jnp.finfo(gap.dtype).eps
    at_best = jnp.where((gap == 0) & ~jnp.isneginf(log_prior), log_prior, -jnp.inf)
    # All actions together keep the sum at or above that of the best ones alone, so l <= -log(sum of their priors).
    top = reduce.largest(at_best)
    top = jnp.where(jnp.isneginf(top), 0, top)
    best_prior = top + jnp.log(reduce.total(jnp.exp(at_best - top[None])))
    # Compiled into what made q, its maximum and the gaps can come from two evaluations of q that round differently
    # (one with a fused multiply-add). No gap is then exactly 0: any prior bounds that of the best from below.
    least = jnp.min(jnp.where(jnp.isneginf(log_prior), 0, log_prior), axis=0)
    best_prior = jnp.where(jnp.isneginf(best_prior), least, best_prior)
    high = jnp.broadcast_to(jnp.maximum(-best_prior, 0), gap.shape[1:])
    low = jnp.zeros_like(high)

    def measure(level: Array) -> tuple[Array, Array]:
        ratio, rho = _ratios(level, gap, h)
        policy = jnp.exp(log_prior + ratio)
        total = reduce.total(policy)
        return jnp.log(total), reduce.total(_curvature(policy, rho)) / total

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        level, low, high, last, done, count = state
        excess, slope = measure(level)
        low = jnp.where(excess < 0, level, low)
        high = jnp.where(excess > 0, level, high)
        newton = level + lam(eps(-excess, h) / slope, h)
        slow = jnp.abs(excess) > 0.5 * last
        outside = ~((newton > low) & (newton < high))
        new = jnp.where(outside | slow, 0.5 * (low + high), newton)
        settled = (jnp.abs(excess) <= 2 * unit) | (slow & (jnp.abs(excess) <= 64 * unit))
        settled = settled | (high - low <= 2 * unit * high)
        level = jnp.where(done | settled, level, new)
        return level, low, high, jnp.where(slow, jnp.inf, jnp.abs(excess)), done | settled, count + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        return ~jnp.all(state[4]) & (state[5] < _MAX_ROOT_STEPS)

    # Both monotone regimes start at the far end of the bracket; for alpha > 2 the near end is the monotone one.
    h = jnp.broadcast_to(h, high.shape)
    start = jnp.where(h > 1, low, high)
    infinite = jnp.full_like(start, jnp.inf)
    # A NaN gap can never settle: leave it to come out as NaN instead of holding up the others.
    hopeless = jnp.any(jnp.isnan(gap), axis=0)
    state = (start, low, high, infinite, hopeless, jnp.asarray(0, jnp.int32))
    level, low, high, *_ = lax.while_loop(unfinished, step, state)
    return level, low, high


class Change(NamedTuple):
    """A direction in the arguments of a conjugate, in their shapes; None for what does not change."""

    q: Array | None
    beta: Array | None
    log_prior: Array | None
    alpha: Array | None = None


def conjugate_tangent(
    policy: Array,
    log_prior: Array,
    alpha: Array,
    beta: Array,
    change: Change,
    reduce: _tree.Reducers = _tree.LANES,
) -> Array:
    """Change of the conjugate of `D_alpha/beta` at its maximiser `policy`, `[...]`."""
    dq, dbeta, dlog_prior, dalpha = change
    total = -divergence_tangent(policy, log_prior, alpha, None, dlog_prior, dalpha, reduce) / beta
    if dq is not None:
        total = total + weighted(policy, dq, _tree.plain_sum)
    if dbeta is not None:
        total = total + alpha_divergence(policy, log_prior, alpha, reduce) * dbeta / beta**2
    return total


def policy_tangent(policy: Array, log_prior: Array, alpha: Array, beta: Array, change: Change) -> Array:
    """Change of the maximiser `policy`, `[A, ...]`."""
    dq, dbeta, dlog_prior, dalpha = change
    h = (alpha - 1)[None]
    on = policy != 0  # a policy of NaN has a derivative of NaN
    logs = jnp.log(jnp.where(on, policy, 1))
    ratio = jnp.where(on, logs - jnp.where(on, log_prior, 0), 0)
    # For alpha > 2 the weight of an action is infinite where it enters the support: beyond this cap it has all of it.
    cap = 0.4 * math.log(float(jnp.finfo(policy.dtype).max))
    w = jnp.where(on, jnp.exp(jnp.minimum(logs - h * ratio, cap)), 0)
    z = jnp.zeros_like(policy)
    if dq is not None:
        z = z + beta[None] * jnp.where(on, dq, 0)
    if dbeta is not None:
        z = z + eps(ratio, h) * (dbeta / beta)[None]
    if dalpha is not None:
        z = z - eps_slope(ratio, h) * dalpha[None]
    # A constant in z cancels. Taken relative to the action of largest weight, it does so before rounding.
    heaviest = jnp.argmax(w, axis=0)[None] == jnp.arange(w.shape[0]).reshape((-1,) + (1,) * (w.ndim - 1))
    z = z - jnp.sum(jnp.where(heaviest, z, 0), axis=0, keepdims=True)
    t = w * z
    if dlog_prior is not None:
        t = t + policy * jnp.where(on, dlog_prior, 0)
    return t - w * (jnp.sum(t, axis=0, keepdims=True) / jnp.sum(w, axis=0, keepdims=True))
