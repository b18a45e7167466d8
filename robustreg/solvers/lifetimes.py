"""How long episodes last at most, where nothing but their end bounds them: at a discount of 1.

**The bound.** A number per state with `w >= 1 + P_a w` for every action a that may be taken bounds the expected steps
of an episode under every policy: by induction `w >= 1 + P + ... + P^n 1 + P^{n+1} w` along any of them. It exists
exactly where every policy is proper (in a closed set that never ends, the average of w over its visits would have to be
larger than itself), so that finite numbers with this property prove at once that all episodes end *and* that

    |T U - T V|  <=  max_a P_a |U - V|  <=  (1 - 1/max w) |U - V|      in the norm  max_s |V(s)|/w(s):

T is a contraction without any discount, and has one fixed point [Bertsekas and Tsitsiklis 1991, prop. 2.2].

**Finding it** is the plain control problem of whoever wants to stay as long as possible, solved by policy iteration:
`w <- (I - P_a)^{-1} 1` for the actions a that look longest. How w was found does not matter. What is believed is the
margin `m = min_s (w - max_a P_a w)` of the numbers as they are, less rounding: where it is at least 1/2, `w/m` is a
bound. One policy's own steps (`of_chain`) are checked likewise, by `m = min_s (w - P_pi w)`.

Each round costs a backup and one linear system: BiCGSTAB first; what it leaves is eliminated up to 2,048 states, and
swept beyond. A few rounds do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import loops, pytrees
from robustreg.problems import episodes
from robustreg.problems.transitions import Transitions
from robustreg.solvers import elimination, krylov, ranges
from robustreg.solvers.chains import Chain

# The margin that is enough, rounds of policy iteration, and caps on the steps of a system and on sweeps.
_MARGIN, _ROUNDS, _STEPS, _SWEEPS = 0.5, 100, 500, 100_000


def rounding(terms: float, w: Array) -> Array:
    """Bound what rounding does to `P w`, a sum of some terms, `[*b]`."""
    return terms * float(jnp.finfo(w.dtype).eps) * jnp.max(jnp.abs(w), axis=0)


def believed(w: Array, ahead: Array, terms: float) -> tuple[Array, Array]:
    """Read off what numbers prove.

    Args:
        w: `[S, *b]`.
        ahead: the most of them that one expects after a step, `[S, *b]`.
        terms: summands of an expectation.

    Returns:
        The margin, `[*b]`, and whether it proves anything.
    """
    margin = jnp.min(w - ahead, axis=0) - rounding(terms + 4, w)
    return margin, jnp.isfinite(margin) & (margin >= _MARGIN) & jnp.all(w > 0, axis=0)


def of_chain(chain: Chain, active: Array, terms: float) -> tuple[Array, Array]:
    """Bound the expected steps of one policy's episodes.

    Args:
        chain: its discount 1 where it matters.
        active: lanes that are wanted, `[*B]`.
        terms: summands of an expectation.

    Returns:
        `w >= 1 + P_pi w`, `[S, *B]`, and where it was found, `[*B]`; 1 in the other lanes.
    """
    active = jnp.broadcast_to(active, chain.exit_rate.shape[1:])
    ones = jnp.ones_like(chain.exit_rate)
    n, dtype = ones.shape[0], ones.dtype
    # A residual of a thousandth of a step in the largest entry, or of what this precision has.
    close = max(1e-3, 10 * float(jnp.finfo(dtype).eps)) / n**0.5
    reduction = jnp.where(active, close, 1).astype(dtype)
    idle = elimination.idle_steps(n, _STEPS)

    def apply(x: Array) -> Array:
        return lax.optimization_barrier(chain.apply(x))

    w = krylov.bicgstab(apply, ones, ones[0], reduction, _STEPS, idle)
    todo = active & ~believed(w, apply(w), terms)[1]
    w = (_eliminated if n <= elimination.STATES else _swept)(chain, apply, ones, w, todo)
    margin, found = believed(w, apply(w), terms)
    found = found & active
    return jnp.where(found[None], w / jnp.where(found, margin, 1)[None], 1), found


def _eliminated(chain: Chain, apply: Callable[[Array], Array], ones: Array, w: Array, todo: Array) -> Array:
    """The steps of the lanes in `todo` by elimination, one lane after the other; infinite where no end is reached."""
    one = jnp.ones(ones.shape[:1], w.dtype)

    def take(w: Array, lane: Array, alone: Any) -> Array:
        found = elimination.solve(alone.matrix()[0], alone.exit_rate[:, 0], one[:, None])
        return w.at[:, lane].set(found[:, 0])

    return elimination.lane_by_lane(take, w.reshape(one.shape[0], -1), chain, todo).reshape(ones.shape)


def _swept(chain: Chain, apply: Callable[[Array], Array], ones: Array, w: Array, todo: Array) -> Array:
    """Add up steps until what a sweep adds is less than half a step, in the lanes in `todo`."""

    def sweep(w: Array, done: Array) -> tuple[Array, Array]:
        new = ones + apply(w)
        return jnp.where(done[None], w, new), done | ~(jnp.max(new - w, axis=0) > 0.25)

    return loops.until_done(sweep, jnp.where(todo[None], ones, w), ~todo, _SWEEPS, chain)


def of_all(given: ranges.Given, horizon: Array) -> tuple[Array, Array, Array]:
    """Bound the expected steps of every policy's episodes, or else of one policy's, where the discount is 1.

    Args:
        given: the problem.
        horizon: what is known of the other lanes, `[*b]`.

    Returns:
        The bound, `[*b]`, infinite where there is none; where there is one, `[*b]`: where every policy is proper, or
        there is a discount; and in the other lanes `w >= 1 + P_pi w` of the reference policy, `[S, *b]`, infinite where
        it is not proper either.
    """
    transitions, regulariser, reward, exit_rate, discount, complement = given
    shapes = exit_rate.shape[2:], regulariser.log_prior.shape[2:], transitions._lane_axes(discount.ndim), horizon.shape
    own = jnp.broadcast_shapes(*shapes)
    discount, complement, horizon = (jnp.broadcast_to(x, own) for x in (discount, complement, horizon))

    def chain_of(policy: Array) -> Chain:
        rate = pytrees.total(policy * exit_rate)
        kernel, policy, backwards = transitions._induced(policy)
        return Chain(kernel, policy, discount, rate, jnp.full_like(discount, jnp.inf), backwards, True)

    active, terms = (discount == 1) & (complement == 0), transitions.fan_out + reward.shape[0]
    ends = jnp.broadcast_to(exit_rate > 0, (*reward.shape[:2], *own))
    prior, dtype = regulariser.log_prior, discount.dtype
    found, proved, steps = _longest(transitions, prior, ends, active, chain_of, terms, dtype)
    return jnp.where(active, found, horizon), proved | ~active, steps


def _longest(
    transitions: Transitions,
    log_prior: Array,
    ends: Array,
    active: Array,
    chain_of: Callable[[Array], Chain],
    terms: float,
    dtype: Any,
) -> tuple[Array, Array, Array]:
    """Do that in the lanes that are wanted.

    Args:
        transitions: bound, of lanes `[*b]`.
        log_prior: logarithm of the reference, `[A, S, *b]`, broadcastable: actions of prior 0 are not taken.
        ends: actions after which the episode may end, `[A, S, *b]`.
        active: lanes that are wanted, those with a discount of 1, `[*b]`.
        chain_of: the chain of a policy `[A, S, *b]`.
        terms: summands of an expectation.
        dtype: to compute in.
    """
    shape = ends.shape[1:]
    log_prior = jnp.broadcast_to(log_prior, ends.shape)
    allowed, prior = ~jnp.isneginf(log_prior), jax.nn.softmax(log_prior, axis=0)
    endless = active & jnp.any(episodes.stays(transitions, allowed, ends, dtype), axis=0)

    def turn(state: tuple[Array, ...], done: Array) -> tuple[tuple[Array, ...], Array]:
        w, bound, found = state
        ahead = jnp.where(allowed, transitions._expect(w), -jnp.inf)
        margin, enough = believed(w, jnp.max(ahead, axis=0), terms)
        enough = enough & ~done & ~endless
        bound = jnp.where(enough, jnp.max(w, axis=0) / jnp.where(enough, margin, 1), bound)
        left = ~done & ~enough
        longest = jax.nn.one_hot(jnp.argmax(ahead, axis=0), ahead.shape[0], axis=0, dtype=dtype)
        new, solved = of_chain(chain_of(jnp.where(endless, prior, longest)), left, terms)
        new = jnp.where(solved[None], new, jnp.where((left & endless)[None], jnp.inf, w))
        return (new, bound, found | enough), ~(left & solved & ~endless)

    none, infinite = jnp.zeros(active.shape, bool), jnp.full(active.shape, jnp.inf, dtype)
    start = (jnp.ones(shape, dtype), infinite, none)
    w, bound, found = loops.until_done(turn, start, ~active, _ROUNDS, (transitions, log_prior, ends))
    return bound, found, jnp.where((active & ~found)[None], jnp.where(endless[None], w, jnp.inf), 1)
