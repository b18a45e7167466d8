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

**Powers.** `p = p0 e^l rho^{1/h}` with `rho = 1 - h gap e^{-hl}`. Where one alpha serves all rows and `1/h` is 1, 2 or
-2 (alpha = 2, 1.5, .5) the power is a product; the prior's exponential, at the start's level, is taken once. Where that
one may overflow, and for any other alpha, it is formed in the exponent.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from robustreg import _tree
from robustreg.conjugates import Rows, curvature, gaps, loss, normalised, ratios, resolution
from robustreg.divergences import eps, lam

# Of the loop: bisection alone would need about 60 turns in float64.
_MAX_TURNS = 80

# Powers 1/h that are products, by branch of a `switch`; the last branch is any other.
_POWERS = (1, 2, -2)

LAST = _tree.LAST


class Turn(NamedTuple):
    """What one evaluation at a level gives: `p` and `w = p/rho`, `[..., A]`, and their sums, `[...]`."""

    policy: Array
    weight: Array
    total: Array
    curvature: Array


class State(NamedTuple):
    """Of the search: a level and a bracket around the root, the last `|F|`, who is done, `[...]`; turns; their last."""

    level: Array
    low: Array
    high: Array
    last: Array
    done: Array
    count: Array
    turn: Turn


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
    order = alpha
    log_prior, alpha = jnp.broadcast_to(log_prior, q.shape), jnp.broadcast_to(alpha, best.shape)
    prior = jnp.exp(log_prior)
    rows = Rows(gap, log_prior, prior, LAST.total(prior), alpha, alpha - 1)
    end = search(rows, _powers(rows, order))
    ratio = ratios(end.level, gap, rows.h, LAST)[0]
    value = best - loss(jnp.exp(log_prior + ratio), ratio, end.level, rows, LAST) / beta
    policy, weight, *sums = end.turn
    resolved = jnp.maximum(_noise(rows, end.level), resolution(gap.dtype))
    return value, normalised(policy, weight, (sums[0], sums[1]), (end.low, end.high), rows, resolved, LAST)


def _powers(rows: Rows, alpha: Array) -> Callable[[Array], Turn]:
    """The evaluation at a level, by products where they will do."""
    start = bracket(rows)[0]
    general = lambda level: _in_the_exponent(rows, level)  # noqa: E731
    if alpha.size > 1:
        return general
    # p0 e^l in one factor that is computed once, and a small one.
    scale = jnp.exp(rows.log_prior + start[..., None])
    safe = jnp.max(rows.log_prior + start[..., None]) < 0.9 * math.log(float(jnp.finfo(scale.dtype).max))
    power = 1 / (alpha.reshape(()) - 1)
    which = sum(jnp.where(power == k, i - len(_POWERS), 0) for i, k in enumerate(_POWERS)) + len(_POWERS)
    which = jnp.where(safe, which, len(_POWERS)).astype(jnp.int32)
    branches = [lambda level, k=k: _product(rows, scale, level - start, level, k) for k in _POWERS]
    return lambda level: lax.switch(which, [*branches, general], level)


def _product(rows: Rows, scale: Array, shift: Array, level: Array, k: int) -> Turn:
    rho = jnp.maximum(1 - rows.gap * (rows.h * jnp.exp(-rows.h * level))[..., None], 0)
    factor = scale * jnp.exp(shift)[..., None]
    if k == 1:
        weight = jnp.where(rho > 0, factor, 0)
        policy = factor * rho
    elif k == 2:
        weight = factor * rho
        policy = weight * rho
    else:
        policy = factor / (rho * rho)
        weight = policy / rho
    return _summed(policy, weight)


def _in_the_exponent(rows: Rows, level: Array) -> Turn:
    ratio, rho = ratios(level, rows.gap, rows.h, LAST)
    policy = jnp.exp(rows.log_prior + ratio)
    return _summed(policy, curvature(policy, rho))


def _summed(policy: Array, weight: Array) -> Turn:
    policy, weight = lax.optimization_barrier((policy, weight))
    return Turn(policy, weight, LAST.total(policy), LAST.total(weight))


def bracket(rows: Rows) -> tuple[Array, Array]:
    """Where Newton's method starts, and an upper bound of the root, `[...]` each (0 is a lower bound)."""
    at_best = jnp.where((rows.gap == 0) & ~jnp.isneginf(rows.log_prior), rows.log_prior, -jnp.inf)
    # All actions together keep the sum at or above that of the best ones alone, so l <= log(mass/their priors).
    top = LAST.largest(at_best)
    top = jnp.where(jnp.isneginf(top), 0, top)
    best_prior = top + jnp.log(LAST.total(jnp.exp(at_best - top[..., None])))
    high = jnp.maximum(jnp.log(rows.mass) - best_prior, 0)
    mean = LAST.total(rows.prior * rows.gap) / rows.mass
    near = lam(mean, rows.h)
    start = jnp.where(rows.h > 1, 0, jnp.where(near < high, near, high))
    return start, high


def search(rows: Rows, evaluate: Callable[[Array], Turn]) -> State:
    """Find the level `l` with `sum p = mass`: Newton, kept inside a bracket by bisection."""
    start, high = bracket(rows)
    # A NaN gap can never settle: leave it to come out as NaN instead of holding up the others.
    hopeless = jnp.any(jnp.isnan(rows.gap), axis=-1)
    zero, infinite = jnp.zeros_like(start), jnp.full_like(start, jnp.inf)
    blank = Turn(jnp.zeros_like(rows.gap), jnp.zeros_like(rows.gap), zero, zero)
    state = State(start, zero, high, infinite, hopeless, jnp.asarray(0, jnp.int32), blank)

    def unfinished(state: State) -> Array:
        return (~jnp.all(state.done) & (state.count < _MAX_TURNS)) | (state.count == 0)

    return lax.while_loop(unfinished, lambda state: _advance(state, evaluate(state.level), rows), state)


def _advance(state: State, turn: Turn, rows: Rows) -> State:
    """One turn: settle the rows that are done, move the others. Settled ones stay where they were evaluated."""
    unit, h, level = float(jnp.finfo(rows.gap.dtype).eps), rows.h, state.level
    excess = jnp.log(turn.total / rows.mass)
    low, high = jnp.where(excess < 0, level, state.low), jnp.where(excess > 0, level, state.high)
    spread = turn.curvature / turn.total  # E_p[1/rho]
    newton = level + lam(eps(-excess, h) / spread, h)
    slow = jnp.abs(excess) > 0.5 * state.last
    outside = ~((newton > low) & (newton < high))
    # Next to the prior the root is 0 to rounding, and so is the first step: not to be bisected for.
    at_prior = (newton <= 0) & (low == 0) & ~slow
    new = jnp.where(outside | slow, jnp.where(at_prior, 0, 0.5 * (low + high)), newton)
    noise = _noise(rows, level)
    squared = 0.25 * jnp.sqrt(jnp.minimum(spread, 1) / (1 + jnp.abs(h)))
    enough = jnp.where(h > 1, 2 * unit, squared * unit ** jnp.clip(h, 0.5, 1))
    enough = jnp.minimum(enough, 0.5 * resolution(level.dtype))
    stuck = slow | outside | (jnp.abs(newton - level) <= 2 * unit * level)
    close = (jnp.abs(excess) <= enough) | (stuck & (jnp.abs(excess) <= noise))
    exhausted = high - low <= 2 * unit * high
    # The lower of two sides that are far apart: no mass is above 1 there, and the dual function close.
    retreat = exhausted & (excess > resolution(rows.gap.dtype)) & (level != low)
    done = state.done | ((close | exhausted) & ~retreat)
    level = jnp.where(done, level, jnp.where(retreat, low, new))
    last = jnp.where(slow, jnp.inf, jnp.abs(excess))
    return State(level, low, high, last, done, state.count + 1, turn)


def _noise(rows: Rows, level: Array) -> Array:
    """What `F = log sum p` may consist of by rounding alone, `[...]`: of a sum of A numbers, of exponents."""
    return float(jnp.finfo(level.dtype).eps) * (16 + 2 * rows.gap.shape[-1] ** 0.5 + 2 * jnp.abs(level))
