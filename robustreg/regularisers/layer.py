r"""The maximiser of alpha regularisers on arrays with actions last, for one-step problems by the row.

The definition, the unknown and its bracket are those of `conjugates`, which serves the solver: the log-ratio `l` of the
best action, Newton's method on the power mean `M(y) = (sum p)^h` in `y = e^{hl}`. Here every turn is a pass over an
array that may not fit a cache, so that turns are what is saved.

**Start.** For alpha <= 2 the normaliser is at least the mean of the values under the prior, hence with
`m = E_p0[gap]`

    l  <=  min( log(1/p0_best),  lam_h(m) ),

and M is convex (alpha > 1) or concave in y: Newton's method descends from there to the root and never passes it, in 3
to 5 turns (from `log(1/p0_best)` alone: 5 to 8). For alpha > 2 it starts at 0, and bisection guards it.

**Stop.** The policy takes one more Newton step, in policy space, when it is normalised. It leaves of `F = log sum p` a
relative error of `(1 - h)/2 (F/(rho E_p[1/rho]))^2`, hence in p at most `(1 + |h|) F^2 / (2 E_p[1/rho])` for h < 0, and
actions on the edge of the support, of probability `p0 F^{1/h}`. So F is small enough at a fraction of
`u^{max(h, 1/2)}`. Rounding may keep it from getting there: a turn that gains less than a half where F is no more than
the sum of its rounding is the last one. No row waits for bisection to find out that it has settled.

**Powers.** `p = p0 e^l rho^{1/h}` with `rho = 1 - h gap e^{-hl}`. The prior's exponential, at the level of the start,
is taken once. Where one alpha serves all rows and `1/h` is 1, 2 or -2 (alpha = 2, 1.5, .5) the power is a product, and
where `|h|` is no less than a quarter, it is one logarithm and one exponential. Nearer to KL, where that logarithm loses
digits, and where a factor overflows, everything is formed in the exponent.

**Sums.** A turn needs the sums of p and of `p/rho`. They are one reduction of two operands: the compiler fuses it with
what is summed, and nothing is written to memory (a sum alone it hands to a library: 4 times as long on a CPU).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import loops, pytrees
from robustreg.regularisers.conjugates import (
    Rows,
    curvature,
    gaps,
    is_one_number,
    normalised,
    ratios,
    unless_tiny,
)
from robustreg.regularisers.divergences import deformed_exp, deformed_log, divergence_terms, missing
from robustreg.regularisers.levels import moved, resolution

# Of the loop: bisection alone would need about 60 turns in float64.
_MAX_TURNS = 80

# Powers 1/h that are products.
_POWERS = (1, 2, -2)

# Least |h| at which log(1 + h x)/h may be taken of the rounded sum.
_FAR = 0.25

LAST = pytrees.LAST

# p and p/rho at a level, put through a function of the two.
Evaluate = Callable[[Array, Callable[[Array, Array], tuple[Array, ...]]], tuple[Array, ...]]


class State(NamedTuple):
    """Of the search: a level, a bracket around the root, the last `|F|`, what is done, `[...]`; turns."""

    level: Array
    low: Array
    high: Array
    last: Array
    done: Array
    count: Array


def alpha_maximiser(q: Array, beta: Array, log_prior: Array, alpha: Array) -> tuple[Array, Array]:
    """Conjugate of `D_alpha/beta` and its maximiser, as `conjugates.alpha_maximiser`, with actions last.

    Args:
        q: `[..., A]`; entries of masked actions are never looked at.
        beta, alpha: broadcastable to `[...]`.
        log_prior: broadcastable to `[..., A]`.

    Returns:
        `[...]` and `[..., A]`.
    """
    best, gap = gaps(q, beta, log_prior, LAST)
    order, alpha = alpha, jnp.broadcast_to(alpha, best.shape)
    uniform = is_one_number(log_prior, LAST)
    log_prior = log_prior if uniform else jnp.broadcast_to(log_prior, q.shape)
    prior = jnp.exp(log_prior)
    mass = jnp.broadcast_to(gap.shape[-1] * prior[..., 0], best.shape) if uniform else LAST.total(prior)
    rows = Rows(gap, log_prior, prior, mass, alpha, alpha - 1)
    start, high = _bracket(rows, LAST.total(prior * gap) / mass)
    evaluate = _evaluation(rows, start, order - 1)
    end = _search(rows, start, high, evaluate)
    value = best - _loss(end.level, rows) / beta
    (policy,) = evaluate(end.level, lambda p, _: (p,))
    # (Another array out of the branches is another in memory; this is a product of what is there.)
    weight = curvature(policy, ratios(end.level, gap, rows.h, LAST)[1])
    # (Summed with more care than a turn's: one after the other, 128,000 numbers lose three digits.)
    sums = LAST.total(policy), LAST.total(weight)
    resolved = jnp.maximum(_noise(rows, end.level), resolution(gap.dtype))
    return value, normalised(policy, weight, sums, (end.low, end.high), rows, resolved, LAST)


def _loss(level: Array, rows: Rows) -> Array:
    """`conjugates.loss` in few sums, `[...]`: every one of them writes what it adds up to memory."""
    ratio = ratios(level, rows.gap, rows.h, LAST)[0]
    policy = jnp.exp(rows.log_prior + ratio)
    terms = jnp.where(policy == 0, 0, policy * rows.gap)
    terms = terms + divergence_terms(policy, rows.prior, rows.alpha[..., None], ratio)
    # (What is missing is summed before it is multiplied by what may be 1e24.)
    short = LAST.total(missing(policy, rows.prior, ratio))
    return unless_tiny(LAST.total(terms) + short * deformed_exp(level, rows.h), rows, LAST)


def _evaluation(rows: Rows, start: Array, h: Array) -> Evaluate:
    """The evaluation of p and p/rho by the cheapest form that will do; `h` is `alpha - 1` as it was given.

    Which form a row gets depends on no other row: its answer is the same to the bit, whatever stands beside it.
    """
    peak = rows.log_prior + start[..., None]
    scale = jnp.exp(peak)
    steepest = jnp.abs(rows.h) * LAST.largest(rows.gap) * jnp.exp(-rows.h * start)
    most = 0.1 * float(jnp.finfo(scale.dtype).max)
    plain = (LAST.largest(peak) < math.log(most)) & (steepest < most) & (jnp.abs(rows.h) >= _FAR)
    # Beyond alpha = 2 slopes have no bound, and the value wants the very bits of the policy whose sum was sought.
    plain = plain & (rows.h <= 1)

    def by_power(level: Array, then: Callable[..., tuple[Array, ...]], k: int | None) -> tuple[Array, ...]:
        half = jnp.exp(-0.5 * rows.h * level)[..., None]  # as in `ratios`, which the value is computed by
        rho = jnp.maximum(1 - rows.h[..., None] * (rows.gap * half * half), 0)
        return then(*_power(scale * jnp.exp(level - start)[..., None], rho, k, rows.h[..., None]))

    def in_the_exponent(level: Array, then: Callable[..., tuple[Array, ...]]) -> tuple[Array, ...]:
        ratio, rho = ratios(level, rows.gap, rows.h, LAST)
        policy = jnp.exp(rows.log_prior + ratio)
        return then(policy, curvature(policy, rho))

    powers, which = (None, *_POWERS) if h.size == 1 else (None,), jnp.asarray(0, jnp.int32)
    for i, k in enumerate(powers[1:]):
        which = jnp.where(h.reshape(()) * k == 1, i + 1, which)

    which = jnp.where(jnp.all(plain), which, which + len(powers))

    def evaluate(level: Array, then: Callable[..., tuple[Array, ...]]) -> tuple[Array, ...]:
        def mixed(level: Array, k: int | None) -> tuple[Array, ...]:
            slow, fast = in_the_exponent(level, then), by_power(level, then, k)
            own = plain if slow[0].ndim == plain.ndim else plain[..., None]
            return tuple(jnp.where(own, x, y) for x, y in zip(fast, slow))

        forms = [lambda level, k=k: by_power(level, then, k) for k in powers]
        return lax.switch(which, [*forms, *(lambda level, k=k: mixed(level, k) for k in powers)], level)

    return evaluate


def _power(factor: Array, rho: Array, k: int | None, h: Array) -> tuple[Array, Array]:
    """`factor rho^(1/h)`, and that over rho; 0 where rho is 0. k is `1/h` where that is a whole number."""
    if k == 1:
        return factor * rho, jnp.where(rho > 0, factor, 0)
    if k == 2:
        weight = factor * rho
        return weight * rho, weight
    if k == -2:
        policy = factor / (rho * rho)
        return policy, policy / rho
    # (Not p as a product of rho and p/rho: that one may underflow where p does not.)
    safe = jnp.where(rho > 0, rho, 1)
    policy = jnp.where(rho > 0, factor * jnp.exp(jnp.log(safe) / h), 0)
    return policy, policy / safe


def _sums(x: Array, y: Array) -> tuple[Array, Array]:
    """Sums over actions of two arrays in one pass."""
    zero = jnp.zeros((), x.dtype)
    total, other = lax.reduce((x, y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (x.ndim - 1,))
    return total, other


def _bracket(rows: Rows, mean: Array) -> tuple[Array, Array]:
    """Where Newton's method starts, and an upper bound of the root, `[...]` each (0 is a lower bound).

    Args:
        rows: the problem.
        mean: of the gaps under the prior, `[...]`.
    """
    # All actions together keep the sum at or above that of a best one alone, so l <= log(mass/its prior).
    top = LAST.largest(jnp.where(rows.gap == 0, rows.log_prior, -jnp.inf))
    high = jnp.maximum(jnp.log(rows.mass) - jnp.where(jnp.isneginf(top), 0, top), 0)
    near = deformed_log(mean, rows.h)
    return jnp.where(rows.h > 1, 0, jnp.where(near < high, near, high)), high


def _search(rows: Rows, start: Array, high: Array, evaluate: Evaluate) -> State:
    """Find the level `l` with `sum p = mass`: Newton, kept inside a bracket by bisection."""
    # A NaN gap can never settle: leave it to come out as NaN instead of holding up the others.
    hopeless = jnp.any(jnp.isnan(rows.gap), axis=-1)
    zero, infinite = jnp.zeros_like(start), jnp.full_like(start, jnp.inf)
    state = State(start, zero, high, infinite, hopeless, jnp.asarray(0, jnp.int32))

    def unfinished(state: State) -> Array:
        return (~jnp.all(state.done) & (state.count < _MAX_TURNS)) | (state.count == 0)

    return loops.while_loop(unfinished, lambda state: _advance(state, evaluate(state.level, _sums), rows), state, rows)


def _advance(state: State, sums: tuple[Array, ...], rows: Rows) -> State:
    """One turn: settle the rows that are done, move the others. Settled ones stay where they were evaluated."""
    unit, h, level = float(jnp.finfo(rows.gap.dtype).eps), rows.h, state.level
    total, width = sums
    excess = jnp.log(total / rows.mass)
    spread = width / total  # E_p[1/rho]
    new = moved(level, excess, spread, state.low, state.high, state.last, h)
    noise = _noise(rows, level)
    squared = 0.25 * jnp.sqrt(jnp.minimum(spread, 1) / (1 + jnp.abs(h)))
    enough = jnp.where(h > 1, 2 * unit, squared * unit ** jnp.clip(h, 0.5, 1))
    enough = jnp.minimum(enough, 0.5 * resolution(level.dtype))
    stuck = new.slow | new.outside | (jnp.abs(new.level - level) <= 2 * unit * level)
    close = (jnp.abs(excess) <= enough) | (stuck & (jnp.abs(excess) <= noise))
    exhausted = new.high - new.low <= 2 * unit * new.high
    # The lower of two sides that are far apart: no mass is above 1 there, and the dual function close.
    retreat = exhausted & (excess > resolution(rows.gap.dtype)) & (level != new.low)
    done = state.done | ((close | exhausted) & ~retreat)
    level = jnp.where(done, level, jnp.where(retreat, new.low, new.level))
    last = jnp.where(new.slow, jnp.inf, jnp.abs(excess))
    return State(level, new.low, new.high, last, done, state.count + 1)


def _noise(rows: Rows, level: Array) -> Array:
    """Tell what `F = log sum p` may consist of by rounding alone, `[...]`: of a sum of A numbers, of exponents."""
    return float(jnp.finfo(level.dtype).eps) * (16 + 2 * rows.gap.shape[-1] ** 0.5 + 2 * jnp.abs(level))
