r"""The maximiser of alpha regularisers on arrays with actions last, for one-step problems by the row.

The definition, the unknown and its bracket are those of `conjugates`, which serves the solver: the log-ratio `l` of the
best action, Newton's method on the power mean `M(y) = (sum p)^h` in `y = e^{hl}`. Here every turn is a pass over an
array that may not fit a cache, so that turns are what is saved.

**Start.** For alpha <= 2 the normaliser is at least the mean of the values under the prior, hence with
`m = E_p0[gap]`

    l  <=  min( log(1/p0_best),  lam_h(m) ),

and M is convex (alpha > 1) or concave in y: Newton's method descends from there to the root and never passes it. For
alpha from 1 to 2 it starts at what two moments say: if `z = y - h gap` were normal with the variance `h^2 V`, and `1/h`
were 2, then `1 = E z^{1/h} = (mean^2 + (1/h - 1) h^2 V)^{1/(2h)}`, which is also right to second order for small V, and

    y  =  h m + sqrt(1 - (1 - h) h V),      lam_h(m - (1 - h) V / (1 + sqrt(1 - (1 - h) h V)))  as a level,

with the root at least .3. Typically `|log sum p|` is .05 to .15 there, where it is .3 to .8 at Jensen's bound; from
below the root the next step leads above it. For alpha > 2 it starts at 0, and bisection guards it.

**Stop.** The policy takes one more Newton step, in policy space, when it is normalised. It leaves of `F = log sum p` a
relative error of `(1 - h)/2 (F/(rho E_p[1/rho]))^2`, hence in p at most `(1 + |h|) F^2 / (2 E_p[1/rho])` for h < 0, and
actions on the edge of the support, of probability `p0 F^{1/h}`. So F is small enough at `u^h`, and at a fraction of
`u^{1/2}`. A step from F to about `F^2` is believed where that is enough: the row waits for the pass that writes the
policy, whose sums show it (and go on where it was too good a hope: for alpha = 2, M is made of straight lines, and a
step may end in front of the next corner). Rounding may keep F from getting there: a turn that gains less than a half
where F is no more than the sum of its rounding is the last one. No row waits for bisection to find out that it has
settled.

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
    Moments,
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

# Of the loop: bisection alone would need about 60 turns in float64, and rows may begin it at different times.
_MAX_TURNS = 160

# The least mean of `y - h gap` that moments are believed about, in units of its value without a spread.
_LEAST_ROOT = 0.3

# Powers 1/h that are products.
_POWERS = (1, 2, -2)

# Least |h| at which log(1 + h x)/h may be taken of the rounded sum.
_FAR = 0.25

LAST = pytrees.LAST

# p and p/rho at a level, put through a function of the two.
Evaluate = Callable[[Array, Callable[[Array, Array], tuple[Array, ...]]], tuple[Array, ...]]


class State(NamedTuple):
    """Of the search: a level, a bracket around the root, the last `|F|`, what is done or near, `[...]`; turns."""

    level: Array
    low: Array
    high: Array
    last: Array
    done: Array
    near: Array
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
    moments = _moments(rows)
    start, high = _bracket(rows, moments)
    end, policy = _search(rows, start, high, _evaluation(rows, start, order - 1))
    return best - _loss(end.level, rows, moments) / beta, policy


def _loss(level: Array, rows: Rows, moments: Moments) -> Array:
    """`conjugates.loss` by one sum, `[...]`: every sum writes what it adds up to memory."""
    ratio = ratios(level, rows.gap, rows.h, LAST)[0]
    policy = jnp.exp(rows.log_prior + ratio)
    terms = jnp.where(policy == 0, 0, policy * rows.gap)
    terms = terms + divergence_terms(policy, rows.prior, rows.alpha[..., None], ratio)
    short = missing(policy, rows.prior, ratio) * deformed_exp(level, rows.h)[..., None]
    # (Written as one array, or the compiler for CPUs writes what it is the sum of.)
    return unless_tiny(LAST.total(pytrees.materialised(terms + short)), rows, moments, LAST)


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


def _moments(rows: Rows) -> Moments:
    """Compute the mean and the variance of the gaps under the prior."""
    gap = rows.gap
    if is_one_number(rows.log_prior, LAST):
        mean, square = (LAST.total(x) / gap.shape[-1] for x in (gap, gap * gap))
    else:
        weighted = rows.prior * gap
        mean, square = (total / rows.mass for total in _sums(weighted, weighted * gap))
    # (The difference is NaN where squares overflow.)
    return Moments(mean, jnp.where(square > mean * mean, square - mean * mean, 0))


def _bracket(rows: Rows, moments: Moments) -> tuple[Array, Array]:
    """Where Newton's method starts, and an upper bound of the root, `[...]` each (0 is a lower bound)."""
    # All actions together keep the sum at or above that of a best one alone, so l <= log(mass/its prior).
    if is_one_number(rows.log_prior, LAST):
        top = rows.log_prior[..., 0]
    else:
        top = LAST.largest(jnp.where(rows.gap == 0, rows.log_prior, -jnp.inf))
    high = jnp.maximum(jnp.log(rows.mass) - jnp.where(jnp.isneginf(top), 0, top), 0)
    h = jnp.clip(rows.h, 0, 1)
    root = jnp.sqrt(jnp.maximum(1 - (1 - h) * h * moments.variance, _LEAST_ROOT**2))
    lower = jnp.minimum((1 - h) * moments.variance / (1 + root), (1 - _LEAST_ROOT) / jnp.where(h > 0, h, 1))
    near = deformed_log(moments.mean - jnp.where(h > 0, lower, 0), rows.h)
    return jnp.where((rows.h > 1) | (near <= 0), 0, jnp.where(near < high, near, high)), high


def _search(rows: Rows, start: Array, high: Array, evaluate: Evaluate) -> tuple[State, Array]:
    """Find the level `l` with `sum p = mass` and the policy there, `[..., A]`: Newton, kept by bisection."""
    # A NaN gap can never settle: leave it to come out as NaN instead of holding up the others. (Gaps are not negative;
    # a maximum may lose a NaN on a CPU.)
    hopeless = jnp.isnan(LAST.total(rows.gap))
    zero, infinite = jnp.zeros_like(start), jnp.full_like(start, jnp.inf)
    state = State(start, zero, high, infinite, hopeless, hopeless, jnp.asarray(0, jnp.int32))

    def moving(state: State) -> Array:
        return ~jnp.all(state.done | state.near) & (state.count < _MAX_TURNS)

    def turn(state: State) -> State:
        return _advance(state, evaluate(state.level, _sums), rows)

    def unfinished(found: tuple[State, Array]) -> Array:
        state, _ = found
        return (~jnp.all(state.done) & (state.count < _MAX_TURNS)) | (state.count == 0)

    def attempt(found: tuple[State, Array]) -> tuple[State, Array]:
        state = loops.while_loop(moving, turn, found[0], rows)
        (raw,) = evaluate(state.level, lambda p, _: (p,))
        # (Another array out of the branches is another in memory; this is a product of what is there.)
        weight = curvature(raw, ratios(state.level, rows.gap, rows.h, LAST)[1])
        # (Summed with more care than in a turn: one after the other, 128,000 numbers lose three digits.)
        sums = LAST.total(raw), LAST.total(weight)
        state = _advance(state, sums, rows, final=True)
        resolved = jnp.maximum(_noise(rows, state.level), resolution(raw.dtype))
        return state, normalised(raw, weight, sums, (state.low, state.high), rows, resolved, LAST)

    return loops.while_loop(unfinished, attempt, (state, jnp.zeros_like(rows.gap)), rows)


def _advance(state: State, sums: tuple[Array, ...], rows: Rows, final: bool = False) -> State:
    """One turn: settle the rows that are done, move the others. Settled ones stay where they were evaluated.

    A row that is near, after whose step `F` will be small enough, waits where it steps to for the `final` evaluation.
    """
    unit, h, level = float(jnp.finfo(rows.gap.dtype).eps), rows.h, state.level
    total, width = sums
    excess = jnp.log(total / rows.mass)
    spread = width / total  # E_p[1/rho]
    new = moved(level, excess, spread, state.low, state.high, state.last, h)
    # What the level rounds to is 1/rho times as much of the mass.
    noise = _noise(rows, level) + jnp.where(h > 1, 0, 2 * unit * level * spread)
    squared = 0.25 * jnp.sqrt(unit * jnp.minimum(spread, 1) / (1 + jnp.abs(h)))
    enough = jnp.where(h > 1, 2 * unit, jnp.minimum(squared, unit ** jnp.clip(h, 0.5, 1)))
    enough = jnp.minimum(enough, 0.5 * resolution(level.dtype))
    newton = ~(new.slow | new.outside)
    stuck = ~newton | (jnp.abs(new.level - level) <= 2 * unit * level)
    close = (jnp.abs(excess) <= enough) | (stuck & (jnp.abs(excess) <= noise))
    close = close | (state.near & (jnp.abs(excess) <= noise / 4))
    exhausted = new.high - new.low <= 2 * unit * new.high
    # The lower of two sides that are far apart: no mass is above 1 there, and the dual function close.
    retreat = exhausted & (excess > resolution(rows.gap.dtype)) & (level != new.low)
    still = state.done | (state.near & (not final))
    done = state.done | (~still & (close | exhausted) & ~retreat)
    level = jnp.where(done | still, level, jnp.where(retreat, new.low, new.level))
    near = still | (newton & ~retreat & (h <= 1) & (excess * excess <= enough))
    low, high = jnp.where(still, state.low, new.low), jnp.where(still, state.high, new.high)
    last = jnp.where(still, state.last, jnp.where(new.slow, jnp.inf, jnp.abs(excess)))
    return State(level, low, high, last, done, near, state.count + 1)


def _noise(rows: Rows, level: Array) -> Array:
    """Tell what `F = log sum p` may consist of by rounding alone, `[...]`: of a sum of A numbers, of exponents."""
    return float(jnp.finfo(level.dtype).eps) * (16 + 2 * rows.gap.shape[-1] ** 0.5 + 2 * jnp.abs(level))
