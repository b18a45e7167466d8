"""What the numbers of a problem say before it is solved: are they in range, and how far will rounding go?

Leaves that were traced, or came by the class itself, have passed no factory. So each solve measures, once and inside
the compiled program: whether rows of P sum to `1 - termination` (`validity`), how long episodes last (`horizon`), and
how large the summands of a backup are (`magnitudes`). All are functions of what `bound_problem.bind` has laid out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import loops
from robustreg.problems.transitions import Transitions
from robustreg.regularisers.bound import Bound

# Share of a row of P, or of a prior, that may be missing: what is further off is no probability.
_MISSING = 1e-3
# Discounts above 1 - this are worth a look at how soon episodes end, of at most so many sweeps.
_LONG, _SWEEPS = 1e-3, 1024
# A reward this many times as large as the best ones of all states may be that of an action nobody takes.
_WILD = 16


class Given(NamedTuple):
    """Hold the arrays of a problem as `bound_problem.bind` lays them out: the first fields of a `BoundProblem`."""

    transitions: Transitions
    regulariser: Bound
    reward: Array
    exit_rate: Array
    discount: Array
    complement: Array


class Magnitudes(NamedTuple):
    """Bound what the rounding of a backup grows with and no iteration changes, `[*b]` each.

    Attributes:
        reward: largest |r|.
        charged: the same where an action counts by the largest probability that a policy may give it, while V is within
            `limit`.
        limit: on `max |h|` (plus |c| if episodes end).
        temperature: largest 1/beta.
        log_prior: largest |log p0|.
    """

    reward: Array
    charged: Array
    limit: Array
    temperature: Array
    log_prior: Array


def magnitudes(regulariser: Bound, reward: Array, horizon: Array) -> Magnitudes:
    """Measure what `rounding` grows with and no iteration changes."""
    masked = jnp.isneginf(regulariser.log_prior)
    size = jnp.where(masked, 0, jnp.abs(reward))
    largest = jnp.max(size, axis=(0, 1))
    top = jnp.max(jnp.abs(jnp.max(jnp.where(masked, -jnp.inf, reward), axis=0)), axis=0)
    limit = jnp.broadcast_to(2 * horizon * top, jnp.broadcast_shapes(horizon.shape, largest.shape))

    def charge() -> Array:
        """Compute `max_s sum_a w_a |r_a|`, w_a the most that a policy gives to a while `max |h|` is in the limit.

        Then the best reward's action is better than a by `gap / beta` at least, whatever the successors are worth.
        """
        gap = jnp.max(jnp.where(masked, -jnp.inf, reward), axis=0)[None] - reward - 2 * limit[None, None]
        # Less what rounding may move either by.
        gap = gap - 16 * float(jnp.finfo(reward.dtype).eps) * (size + top[None, None])
        weight = regulariser.largest_weight(jnp.where(masked, 0, reward), jnp.maximum(gap, 0))
        weighed = jnp.sum(jnp.where(size == 0, 0, weight * size), axis=0)
        return jnp.max(jnp.minimum(weighed, jnp.max(size, axis=0)), axis=0)

    plain = jnp.broadcast_to(largest, jax.eval_shape(charge).shape)
    charged = loops.cond(jnp.any(largest > _WILD * top), charge, lambda: plain, (regulariser, reward, horizon))
    return Magnitudes(
        largest,
        jnp.minimum(charged, plain),
        limit,
        1 / jnp.min(regulariser.beta, axis=0),
        -jnp.min(jnp.where(masked, 0, regulariser.log_prior), axis=(0, 1)),
    )


def validity(given: Given, ends: bool, horizon: Array | None = None, contracts: bool = True) -> tuple[Array, Array]:
    """Tell how far rows of P miss `1 - termination` beyond rounding, and whether numbers are in range, `[*b]`.

    A discount of 1 is in range where a `horizon` is given, a bound on the steps of an episode, and where the operator
    need not contract.
    """
    transitions, regulariser, reward, exit_rate, discount, complement = given
    masked = jnp.isneginf(regulariser.log_prior)
    total, size = transitions._row_sums(discount.ndim, reward.dtype)
    # g (1 - termination) is what the exit rate leaves of 1; where g = 0 rows do not matter.
    safe = jnp.where(discount > 0, discount, 1)
    target = (
        jnp.where((discount > 0)[None, None], (1 - exit_rate) / safe[None, None], 1)
        if ends
        else jnp.ones_like(exit_rate)
    )
    missing = jnp.maximum(jnp.abs(total - target), size - target)
    missing = jnp.where(masked | (discount == 0)[None, None], 0, missing)
    deviation = jnp.max(missing, axis=(0, 1))
    # Each probability is rounded, and so are their sum and the target.
    unit = 0.5 * float(jnp.finfo(reward.dtype).eps)
    allowed = (4 + min(transitions.fan_out, 4 * transitions.fan_out**0.5)) * unit + (4 * unit / safe if ends else 0)
    deviation = jnp.where(deviation <= allowed, 0, deviation)
    if contracts:
        discounted, close_enough = (discount < 1) & (complement > 0), discount * deviation <= 0.5 * complement
    else:
        discounted, close_enough = (discount <= 1) & (complement >= 0), jnp.ones_like(discount, bool)
    if horizon is not None:
        undiscounted = (discount == 1) & (complement == 0)
        discounted = discounted | undiscounted
        # (A horizon that nobody knows yet is infinite: rows that are not off by anything are good enough for it.)
        off = jnp.where(deviation > 0, deviation * horizon, 0)
        close_enough = jnp.where(undiscounted, off <= 0.5, close_enough)
    valid = (discount >= 0) & discounted & jnp.all(regulariser.beta > 0, axis=0)
    valid = valid & (deviation <= _MISSING) & close_enough
    if ends:
        close = (exit_rate >= (1 - 1e-5) * complement[None, None]) & (exit_rate <= 1 + 1e-5)
        valid = valid & jnp.all(close | masked, axis=(0, 1))
    if regulariser.has_reference:
        mass = jnp.sum(jnp.exp(regulariser.log_prior), axis=0)
        valid = valid & jnp.all(jnp.abs(mass - 1) <= _MISSING, axis=0)
    return deviation, valid


def horizon(given: Given) -> Array:
    """Bound the discounted steps of any episode, `[*b]`: by `max w` with `w >= 1 + g P_a w`, or by 1/(1-g).

    Sweeps `w <- 1 + g max_a P_a w` from w = 1 count the steps of longer and longer episodes. Where one raises w by at
    most x < 1, `w/(1-x)` is such a bound. Only for discounts so close to 1 that it is worth the sweeps, and as long as
    they may come to less than half of 1/(1-g). (For a discount of 1 see `lifetimes`.)
    """
    transitions, discount, complement = given.transitions, given.discount, given.complement
    masked = jnp.isneginf(given.regulariser.log_prior)
    own = jnp.broadcast_shapes(transitions._lane_axes(discount.ndim), discount.shape, masked.shape[2:])
    discount, complement = jnp.broadcast_to(discount, own), jnp.broadcast_to(complement, own)
    plain = 1 / complement

    def sweep(state: tuple[Array, Array], done: Array) -> tuple[tuple[Array, Array], Array]:
        w, bound = state
        ahead = 1 + discount[None, None] * transitions._expect(w)
        new = jnp.maximum(jnp.max(jnp.where(masked, 1, ahead), axis=0), w)
        rise = jnp.max(new - w, axis=0)
        # (The last factor is for rounding: some units for every sweep.)
        found = jnp.max(w, axis=0) / jnp.maximum(1 - rise, 0.5) * (1 + 1e-3)
        bound = jnp.where(~done & (rise <= 0.5), found, bound)
        return (new, bound), done | (rise <= 0.5) | ~(jnp.max(new, axis=0) < 0.5 * plain)

    start = (jnp.ones((transitions.n_states, *own), discount.dtype), plain)
    worth = (complement < _LONG) & (complement > 0)
    _, bound = loops.until_done(sweep, start, ~worth, _SWEEPS, (transitions, masked))
    return jnp.minimum(bound, plain)
