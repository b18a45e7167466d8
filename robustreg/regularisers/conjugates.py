r"""Conjugates of the divergences, and their maximisers: actions on the leading axis.

**The conjugate.** `max_p <p, q> - D[p0 : p]/beta` is attained at `p = p0 exp_alpha(beta (q - psi))`, with the scalar
`psi` that normalises `p` [Brekelmans et al. 2022]. In floating point every choice of unknown loses digits somewhere:
`psi` for large `beta`, `1 + h beta (max q - psi)` near alpha = 1, `beta (max q - psi)` for small priors and alpha < 1.
The *log-ratio of the best action* loses none. With `gap = beta (max q - q) >= 0` and `l = log(p/p0)` at `gap = 0`,

    log(p_a/p0_a) = l + lam_h(-gap_a e^{-h l}),      find l in [0, -log p0_best] with sum_a p_a = 1.

The power mean `M = (sum p)^h` of `1 + h beta (q - psi)` is homogeneous of degree one, hence nearly linear in
`y = e^{h l}`; Newton's method on `M = 1` in the variable `y` reads, in terms of `l` and `F = log sum p`,

    l <- l + lam_h( eps_h(-F) / E_p[1/rho] ),        rho_a = 1 - h gap_a e^{-h l},

is exact in one step for KL, monotone from the far end of the bracket for alpha <= 2, and is safeguarded by bisection
for the vertical tangents that alpha > 2 has at the edge of the support. (Derivatives: see `tangents`.)
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import loops, pytrees
from robustreg.regularisers.divergences import (
    Scales,
    alpha_divergence_at,
    deformed_exp,
    deformed_log,
    missing,
    weighted,
)
from robustreg.regularisers.levels import moved, resolution

# Cap on root-finding steps: 3 to 9 are typical; bisection alone would need about 60 (float64).
_MAX_ROOT_STEPS = 80

# Gaps below which the logarithm of KL's mean weight is that of a number known to be close to 1.
_NEAR = 0.125

# Of `alpha_noise`: errors met are below 2 (alpha from -10 to 10, priors to 1e-12, beta * range to 1e8).
_ALPHA_NOISE = 4.0


def kl_maximiser(
    q: Array, beta: Array, log_prior: Array, reduce: pytrees.Reducers = pytrees.LANES
) -> tuple[Array, Array]:
    """Conjugate of `KL/beta` and its maximiser.

    Args:
        q: `[A, ...]`; entries of masked actions are never looked at, they may be infinite or NaN.
        beta: broadcastable to `[...]`, positive.
        log_prior: broadcastable to `[A, ...]`.
        reduce: sums and maxima over actions.

    Returns:
        `(1/beta) log sum p0 exp(beta q)`, `[...]`, and `p0 exp(beta (q - that))`, `[A, ...]`.
    """
    # (Two evaluations of a gap that round differently do no harm here.)
    best = reduce.largest(jnp.where(jnp.isneginf(log_prior), -jnp.inf, q))

    def apart() -> Array:
        # (The mask is found again, not handed into a branch: it would be written to memory for that.)
        return jnp.where(jnp.isneginf(log_prior), 0, reduce.over(beta) * (reduce.over(best) - q))

    gap = apart()
    # Relative to the largest weight, not to that of the best action: its prior alone may underflow.
    exponent = log_prior - gap
    top = jnp.squeeze(log_prior, reduce.axis) if is_one_number(log_prior, reduce) else reduce.largest(exponent)
    weight = jnp.exp(exponent - reduce.over(top))
    total = reduce.total(weight)
    plain = top + jnp.log(total)

    def careful() -> Array:
        # (Evaluated again in a row-major layout: handed over, the gaps would be written to memory in every call.)
        again = apart() if reduce is pytrees.LAST else gap
        near = reduce.largest(again) < _NEAR
        return jnp.where(near, _near_level(again, log_prior, reduce), plain)

    # Gaps below `_NEAR` have a level above `-_NEAR`. In a solve it matters where that is so in all states of a lane: a
    # state whose actions are worth the same always is.
    maybe = plain > -1.1 * _NEAR
    maybe = jnp.all(maybe, axis=0) if reduce is pytrees.LANES and plain.ndim else maybe
    level = loops.cond(jnp.any(maybe), careful, lambda: plain)
    return best + level / beta, weight / reduce.over(total)


def is_one_number(log_prior: Array, reduce: pytrees.Reducers) -> bool:
    """Tell whether one number stands for the prior of every action, as in a row-major layout without a prior."""
    return reduce is pytrees.LAST and log_prior.shape[reduce.axis] == 1


def kl_noise(scales: Scales, beta: Array) -> Array:
    """Bound on the rounding of `kl_maximiser`'s value, in units of u and of rewards, `[*b]`; `beta` is `[S or 1, *b]`.

    A logarithm of numbers that err by u, unless every state is near its prior: then of numbers close to 1.
    """
    near = scales.reach * jnp.max(beta, axis=0) < 0.5 * _NEAR
    return scales.logs * jnp.where(near, 2 * scales.cost, scales.temperature)


def _near_level(gap: Array, log_prior: Array, reduce: pytrees.Reducers) -> Array:
    """`log sum p0 e^-gap` to relative precision for gaps below `_NEAR`, from a mean of `e^-gap - 1`.

    The series costs a fifth of `expm1`, in the innermost loop of every solve.
    """
    small = jnp.minimum(gap, _NEAR)
    series = jnp.zeros_like(small)
    for k in range(6 if gap.dtype.itemsize <= 4 else 10, 0, -1):
        series = series * small + (-1) ** k / math.factorial(k)
    # The barrier keeps the exponential of a prior, often one for all states, out of the loop over them.
    prior = lax.optimization_barrier(jnp.exp(log_prior))
    return jnp.log1p(reduce.total(prior * small * series))


def gaps(q: Array, beta: Array, log_prior: Array, reduce: pytrees.Reducers) -> tuple[Array, Array]:
    """Compute `max q` over allowed actions, `[...]`, and `beta (max q - q)`, 0 on the others, `[A, ...]`.

    The smallest gap is exactly 0: what is left of it by rounding is subtracted from all, for `exp(-h l)` would magnify
    it.
    """
    masked = jnp.isneginf(log_prior)
    best = reduce.largest(jnp.where(masked, -jnp.inf, q))
    gap = pytrees.materialised(jnp.where(masked, 0, reduce.over(beta) * (reduce.over(best) - q)))
    least = -reduce.largest(jnp.where(masked, -jnp.inf, -gap))
    return best - least / beta, pytrees.materialised(jnp.where(masked, 0, gap - reduce.over(least)))


def alpha_maximiser(
    q: Array, beta: Array, log_prior: Array, alpha: Array, reduce: pytrees.Reducers = pytrees.LANES
) -> tuple[Array, Array]:
    """Conjugate of `D_alpha/beta` over normalised policies, and its maximiser. Shapes as in `kl_maximiser`.

    The value is the dual function `psi + (conjugate over all measures)(q - psi)` at the root psi that was found, for
    which `sum p` is `m`,

        best - (<p, gap> + D[p0 : p] + (1 - m) eps_h(l))/beta,

    an upper bound on the conjugate whatever psi, which errs by the square of psi's error only.
    """
    best, gap = gaps(q, beta, log_prior, reduce)
    h = alpha - 1
    # A stored prior sums to 1 to rounding only: so does what is compared with it, and no more is lost.
    prior = lax.optimization_barrier(jnp.exp(log_prior))
    rows = Rows(gap, log_prior, prior, reduce.total(prior), alpha, h)
    level, low, high = _root(gap, log_prior, rows.h, rows.mass, reduce)
    ratio, rho = ratios(level, gap, rows.h, reduce)
    raw = jnp.exp(log_prior + ratio)
    return best - loss(raw, ratio, level, rows, reduce) / beta, _normalise(raw, rho, (low, high), rows, reduce)


class Rows(NamedTuple):
    """Hold what the root is sought for.

    Attributes:
        gap: `beta (max q - q)`, `[A, ...]`, 0 on masked actions.
        log_prior, prior: `[A, ...]`.
        mass: of the prior, `[...]`.
        alpha, h: the order and `alpha - 1`, `[...]`.
    """

    gap: Array
    log_prior: Array
    prior: Array
    mass: Array
    alpha: Array
    h: Array


class Moments(NamedTuple):
    """Mean and variance of the gaps under the prior, `[...]` each."""

    mean: Array
    variance: Array


def loss(raw: Array, ratio: Array, level: Array, rows: Rows, reduce: pytrees.Reducers) -> Array:
    """Compute `beta (max q - Omega*)` from the dual function at a level; `raw` is `p0 e^ratio` there, `[A, ...]`."""
    gap, log_prior, prior, mass, alpha, h = rows
    short = reduce.total(missing(raw, prior, ratio))
    price = alpha_divergence_at(raw, log_prior, alpha, ratio, reduce)
    total = weighted(raw, gap, reduce.total) + price + short * deformed_exp(level, h)
    mean = reduce.total(prior * gap) / mass
    moments = Moments(mean, reduce.total(prior * (gap - reduce.over(mean)) ** 2) / mass)
    return unless_tiny(total, rows, moments, reduce)


def unless_tiny(total: Array, rows: Rows, moments: Moments, reduce: pytrees.Reducers) -> Array:
    """Divide a loss `total` by the mass of the prior; where gaps are small, take that of two moments, `[...]`."""
    # A root near 0 is known to u, and the dual function to its square, which may be more than the gaps.
    tiny = reduce.largest(rows.gap) * (1 + jnp.abs(rows.h)) < _tiny(rows.gap.dtype)
    return jnp.where(tiny, moments.mean - 0.5 * moments.variance, total / rows.mass)


def _tiny(dtype: np.dtype) -> float:
    """Gaps times `1 + |h|` below which `Omega*` is that of two moments: a third one is of relative size `gap^2`."""
    return 0.25 * float(jnp.finfo(dtype).eps) ** 0.5


def alpha_noise(scales: Scales, beta: Array, alpha: Array) -> Array:
    """Bound on the rounding of `alpha_maximiser`'s value, in units of u and of rewards, `[*b]`.

    Every term of the dual function is at most a multiple of what the regulariser takes off, and errs by its exponents,
    `|alpha L|, |h L| <= log(1 + |alpha h| beta cost) + |log p0|`. The root errs by u, and the value by its square.
    """
    order = jnp.max(jnp.abs(alpha), axis=0)
    powers = jnp.log1p(order * (order + 1) * jnp.max(beta, axis=0) * scales.cost)
    tiny = scales.reach * jnp.max(beta, axis=0) * (2 + order) < 0.5 * _tiny(scales.cost.dtype)
    root = jnp.where(tiny, 0, 512 * scales.unit * scales.temperature)
    return _ALPHA_NOISE * (scales.logs + scales.log_prior + powers) * scales.cost + root


def ratios(level: Array, gap: Array, h: Array, reduce: pytrees.Reducers = pytrees.LANES) -> tuple[Array, Array]:
    """Compute `log(p/p0)` and `rho` of every action for a log-ratio `level` of the best one.

    For h < 0 and small priors `e^{-h l}` overflows; there `log(p/p0)` has the limit `log(-h gap)/h`, free of `l`.
    """
    # The factor by halves: where gaps come close to the largest number, e^-hl is below the smallest.
    half = reduce.over(jnp.exp(-0.5 * h * level))
    # (Compared with 0 alone, the gaps would be compared before a loop, and the truth of it kept in memory.)
    scaled = jnp.where(gap <= jnp.minimum(half, 0), 0, gap * half * half)
    h = reduce.over(h)
    x = -h * scaled
    rho = jnp.maximum(1 + x, 0)
    near = reduce.over(level) + deformed_log(-scaled, h)
    overflow = jnp.isposinf(x)
    far = jnp.log(jnp.where(overflow, -h * gap, 1)) / jnp.where(overflow, h, 1)
    return jnp.where(overflow, far, near), rho


def policy_change(dq: Array, beta: Array, log_prior: Array, alpha: Array) -> Array:
    """Bound the change x of the maximiser in the 1-norm where no action value changes by more than `dq`, `[*B]`.

    The derivative of the maximiser is `beta (diag w - w w^T / W)`, of norm at most `beta W`, `w = p0^{alpha-1}
    p^{2-alpha}`. W is at most 1 for alpha from 1 to 2 [Hoelder], and at most `p0^{alpha-1}` of the least p0 below.
    Above, with `h = alpha - 1`, `(u^h - v^h)(u - v) >= 2^{1-h} |u - v|^alpha` and Hoelder's inequality give
    `2^{1-h} x^alpha / h <= beta <dq, dp> <= beta dq x`, hence a root: `x <= (h 2^{h-1} beta dq)^{1/h}`.

    Args:
        dq: `[*B]`.
        beta, alpha: `[1 or S, *b]`.
        log_prior: `[A, 1 or S, *b]`.
    """
    least = jnp.min(jnp.where(jnp.isneginf(log_prior), 0, log_prior), axis=0)
    h, moved = alpha - 1, beta * dq[None]
    steep = h > 1
    order = jnp.where(steep, h, 1)
    root = (order * 2 ** (order - 1) * moved) ** (1 / order)
    change = jnp.where(steep, root, moved * jnp.exp(jnp.minimum(h, 0) * least))
    return jnp.minimum(jnp.max(jnp.where(jnp.isnan(change), 2, change), axis=0), 2)


def largest_weight(reward: Array, gap: Array, beta: Array, log_prior: Array, alpha: Array) -> Array:
    """Bound the probability of actions that are worth less than the one of the largest reward, `[A, ...]`.

    The better one has at most probability 1, hence a log-ratio of at most `-log p0`; that of an action which is worth
    less by `gap` follows from it.

    Args:
        reward: `[A, ...]`, whose largest allowed entry tells the better action.
        gap: by how much less, `[A, ...]`, in reward units.
        beta, log_prior, alpha: as in `kl_maximiser`.
    """
    masked = jnp.isneginf(log_prior)
    best = jnp.max(jnp.where(masked, -jnp.inf, reward), axis=0)
    known = jnp.max(jnp.where(masked | (reward < best[None]), -jnp.inf, log_prior), axis=0)
    ratio = ratios(-known, beta[None] * gap, alpha - 1)[0]
    return jnp.where(masked, 0, jnp.minimum(jnp.exp(log_prior + ratio), 1))


def _normalise(raw: Array, rho: Array, bracket: tuple[Array, Array], rows: Rows, reduce: pytrees.Reducers) -> Array:
    """The policy that sums to 1 next to a `raw` one of `ratios` at the root, which does to the root's precision.

    Args:
        raw, rho: `[A, ...]`.
        bracket: the root's, `[...]` each.
        rows: the problem.
        reduce: sums over actions.
    """
    weight = curvature(raw, rho)
    totals = reduce.total(raw), reduce.total(weight)
    return normalised(raw, weight, totals, bracket, rows, resolution(raw.dtype), reduce)


def normalised(
    raw: Array,
    weight: Array,
    totals: tuple[Array, Array],
    bracket: tuple[Array, Array],
    rows: Rows,
    resolved: float | Array,
    reduce: pytrees.Reducers,
) -> Array:
    """Normalise likewise from the `weight = raw/rho` of `curvature` and the sums over actions of both, `totals`.

    Rows whose sum misses the prior's by a logarithm of more than `resolved` get a mixture of the bracket's two sides.
    """
    # One Newton step in policy space. Plain renormalisation would move mass onto actions in proportion to p, whereas
    # the error of the root moves it in proportion to the curvature w = dp/d(psi): at alpha = 5 an action on the edge
    # of the support then leaves a value error of 3e-8.
    total, width = totals
    policy = jnp.maximum(raw + reduce.over((rows.mass - total) / width) * weight, 0)
    policy = policy / reduce.over(reduce.total(policy))
    unresolved = ~reduce.over(jnp.abs(jnp.log(total / rows.mass)) <= resolved)

    def bridge() -> Array:
        return jnp.where(unresolved, _between(*bracket, rows, reduce), policy)

    return loops.cond(jnp.any(unresolved), bridge, lambda: policy)


def _between(low: Array, high: Array, rows: Rows, reduce: pytrees.Reducers) -> Array:
    """Mixture, summing to 1, of the two sides of a bracket that holds no further number.

    For alpha > 2 an action on the edge of the support can take on all its mass between two neighbouring levels.
    """
    below, above = (jnp.exp(rows.log_prior + ratios(x, rows.gap, rows.h, reduce)[0]) for x in (low, high))
    short, jump = rows.mass - reduce.total(below), reduce.total(above - below)
    share = jnp.clip(short / jnp.where(jump > 0, jump, 1), 0, 1)
    mixed = below + reduce.over(share) * (above - below)
    return mixed / reduce.over(reduce.total(mixed))


def curvature(policy: Array, rho: Array) -> Array:
    """Compute `w = p/rho`, proportional to `p0^{alpha-1} p^{2-alpha}`; 0 off the support."""
    inside = (rho > 0) & (policy > 0)
    return jnp.where(inside, policy / jnp.where(inside, rho, 1), 0)


class _Search(NamedTuple):
    """For the level: the place, its bracket, and how far the mass was off at the last one, `[...]` each."""

    level: Array
    low: Array
    high: Array
    last: Array


def _root(gap: Array, log_prior: Array, h: Array, mass: Array, reduce: pytrees.Reducers) -> tuple[Array, Array, Array]:
    """The level `l` with `sum p = mass` and a bracket around it, `[...]` each: Newton, kept inside by bisection."""
    at_best = jnp.where((gap == 0) & ~jnp.isneginf(log_prior), log_prior, -jnp.inf)
    # All actions together keep the sum at or above that of the best ones alone, so l <= log(mass/their priors).
    top = reduce.largest(at_best)
    top = jnp.where(jnp.isneginf(top), 0, top)
    best_prior = top + jnp.log(reduce.total(jnp.exp(at_best - reduce.over(top))))
    high = jnp.broadcast_to(jnp.maximum(jnp.log(mass) - best_prior, 0), reduce.without_actions(gap))
    low, h = jnp.zeros_like(high), jnp.broadcast_to(h, high.shape)

    def measure(level: Array) -> tuple[Array, Array]:
        ratio, rho = ratios(level, gap, h, reduce)
        policy = jnp.exp(log_prior + ratio)
        total = reduce.total(policy)
        return jnp.log(total / mass), reduce.total(curvature(policy, rho)) / total

    # Both monotone regimes start at the far end of the bracket; for alpha > 2 the near end is the monotone one.
    start = jnp.where(h > 1, low, high)
    # A NaN gap can never settle: leave it to come out as NaN instead of holding up the others.
    hopeless = jnp.any(jnp.isnan(gap), axis=reduce.axis)
    search = _Search(start, low, high, jnp.full_like(start, jnp.inf))
    turn = functools.partial(_turn, measure, h)
    found = loops.until_done(turn, search, hopeless, _MAX_ROOT_STEPS, (gap, log_prior, mass))
    return found.level, found.low, found.high


def _turn(measure: Callable[[Array], tuple[Array, Array]], h: Array, s: _Search, done: Array) -> tuple[_Search, Array]:
    """Take one step for the level; `measure` gives the logarithm of the mass, over what it should be, and its slope."""
    unit = jnp.finfo(s.level.dtype).eps
    excess, slope = measure(s.level)
    new = moved(s.level, excess, slope, s.low, s.high, s.last, h)
    close = (jnp.abs(excess) <= 2 * unit) | (new.slow & (jnp.abs(excess) <= 64 * unit))
    exhausted = new.high - new.low <= 2 * unit * new.high
    # The lower of two sides that are far apart: no mass is above 1 there, and the dual function close.
    end = jnp.where(exhausted & (excess > resolution(s.level.dtype)), new.low, s.level)
    level = jnp.where(done, s.level, jnp.where(close | exhausted, end, new.level))
    last = jnp.where(new.slow, jnp.inf, jnp.abs(excess))
    return _Search(level, new.low, new.high, last), done | close | exhausted
