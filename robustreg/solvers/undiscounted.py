r"""Discounts of 1: the plain sum of what an episode earns, and what can be proved of it.

**Every policy ends.** Then `lifetimes` finds `w >= 1 + P_a w` for all actions that are available and not masked, and
everything is as with a discount, with `max w` in the place of 1/(1-g) (see `bellman`).

**Only some policies end.** V* is then the best value among those whose episodes end with probability 1, which is the
best of all where going on forever is worth minus infinity: where every step costs something, bumping into a wall costs
too much in the end. (A walk that costs nothing forever is not looked at: it never arrives at what it is worth.) Two
facts prove bounds, whatever the numbers came from:

* *above*: from `T U <= U` follows `U >= V*`. For a policy pi, `U >= T U >= T_pi U >= ... >= T_pi^n U`, which is what pi
  earns in n steps, plus `P_pi^n U`; and that goes to 0 where episodes end with probability 1.
* *below*: from `T_pi L >= L` for a policy with a finite `w >= 1 + P_pi w` follows `L <= V_pi <= V*`.

So where a solve has found V, with the residual `|T V - V| <= x`, rounding included, and the steps w of its policy,

    U = V + 4 x w        has   T U <= V + x + 4 x P_pi' w,    pi' the policy at U; it is close to pi, and `T U <= U` is
                         tested, by one more backup, with its rounding;
    L = V - 4 x w        has   T_pi L >= V - x - 4 x P_pi w  >=  V - 4 x w = L.

The episodes of the reference policy have to end. Its steps w0 stand for the horizon until the proof, and the search
begins below what it earns: `V = m w0` with `m <= 0` the least that it expects to earn in a step, for which `T V >= V`.
Newton's method from there, with exact linear systems, stays among the policies that end: one that stays somewhere and
has `T_pi V >= V` would earn nothing less than 0 there [Bertsekas and Tsitsiklis 1991, prop. 2.3].
Where either fails there is no answer: the lane is NONFINITE_INPUT where no policy that ends was found, and STAGNATED,
between infinite bounds, where the test of U fails (a state in which it pays to stay forever, such as one with a
positive reward and a wall, has no V*).

**Cost.** One linear system before the loop, another one and two backups after it; none where every policy ends.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import loops
from robustreg.solvers import bellman, lifetimes
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.solution import Status
from robustreg.solvers.tolerance import Tolerance

# z = _ROOM x w: x for the residual, the rest for the policy that changes on the way to V + z, and for rounding.
_ROOM = 4
# What the loop is asked for: this share of the tolerance, for the room and for rounding that counts several times.
_SHARE = 1 / 32


def pending(problem: BoundProblem) -> Array | None:
    """Tell in which lanes some policy need not end, `[*B]`; None where no discount is 1."""
    if problem.proved is None:
        return None
    return jnp.broadcast_to(problem.valid & ~problem.proved, problem.batch)


def own_horizon(problem: BoundProblem, policy: Array) -> tuple[BoundProblem, Array | None]:
    """Put the steps of one policy in the place of those of all, in the lanes where these have no bound.

    Args:
        problem: the lanes.
        policy: `[A, S, *B]`.

    Returns:
        The problem, `proved` where that policy is proper; and `w >= 1 + P_pi w`, `[S, *B]`, 1 in all other lanes (None
        where no discount is 1).
    """
    wanted = pending(problem)
    if wanted is None:
        return problem, None
    fixed, policy = lax.stop_gradient((problem, jnp.broadcast_to(policy, policy.shape[:2] + problem.batch)))

    def find() -> tuple[Array, Array]:
        terms = fixed.transitions.fan_out + fixed.reward.shape[0]
        return lifetimes.of_chain(bellman.chain(fixed, policy), wanted, terms)

    def none() -> tuple[Array, Array]:
        return jnp.ones(policy.shape[1:], policy.dtype), jnp.zeros(problem.batch, bool)

    w, found = loops.cond(jnp.any(wanted), find, none, (fixed, policy))
    steps = jnp.where(found, jnp.max(w, axis=0), problem.horizon)
    valid, proved = jnp.broadcast_to(problem.valid, problem.batch), ~wanted | found
    # Rows that miss their sum by more than this horizon forgives; see `ranges.validity`.
    off = jnp.where(problem.deviation > 0, problem.deviation * steps, 0)
    valid = valid & ~(wanted & (off > 0.5))
    return dataclasses.replace(problem, horizon=steps, proved=proved, valid=valid), w


def begin(problem: BoundProblem, h: Array, chosen: bool) -> tuple[BoundProblem, Array, Array | None]:
    """Prepare lanes in which some policy need not end for the loop.

    Args:
        problem: the lanes.
        h: where to start, `[S, *B]`.
        chosen: whether by the caller's wish. If not, those lanes start below the value of the reference policy.

    Returns:
        The problem with the steps of the reference policy for a horizon, a start, and those lanes, `[*B]`.
    """
    wanted = pending(problem)
    if wanted is None or problem.steps is None or problem.proved is None:
        return problem, h, None
    fixed = lax.stop_gradient(problem)
    w = lax.stop_gradient(jnp.broadcast_to(problem.steps, h.shape))
    most = jnp.max(w, axis=0)
    ends = wanted & jnp.isfinite(most)
    if not chosen:
        prior = jax.nn.softmax(
            jnp.broadcast_to(fixed.regulariser.log_prior, fixed.reward.shape[:2] + problem.batch), axis=0
        )
        # Rewards of masked actions may be anything.
        earned = jnp.sum(jnp.where(prior > 0, prior * fixed.reward, 0), axis=0)
        least = jnp.minimum(jnp.min(earned, axis=0), 0)
        h = jnp.where(wanted[None], jnp.where(ends[None], least[None] * jnp.where(ends[None], w, 1), 0), h)
    proved = jnp.broadcast_to(problem.proved, problem.batch) | ends
    return dataclasses.replace(problem, horizon=jnp.where(ends, most, problem.horizon), proved=proved), h, wanted


def above(problem: BoundProblem, h: Array, c: Array, z: Array) -> Array:
    """Test whether `U = h + c + z` has `T U <= U`, rounding included, `[*B]`: then U is above V*.

    Args:
        problem: the lanes, with the operator T.
        h, z: `[S, *B]`.
        c: `[*B]`.
    """
    up = h + z
    th, _, q = bellman.backup(problem, up, c)
    short = dataclasses.replace(problem, horizon=jnp.ones_like(problem.horizon))
    noise = bellman.rounding(short, jnp.max(jnp.abs(up), axis=0), c, bellman.cost(problem, th, q))
    noise = noise + problem.discount * problem.deviation * (jnp.max(jnp.abs(up), axis=0) + jnp.abs(c))
    unit = float(jnp.finfo(problem.dtype).eps)
    return jnp.all(th + noise[None] <= up - unit * jnp.abs(up), axis=0)


def asked(wanted: Array | None, tol: Tolerance) -> Tolerance:
    """Return the tolerances to ask the loop for, `[*B]`: smaller ones in the lanes that are yet to be proved."""
    return tol if wanted is None else Tolerance(jnp.where(wanted, _SHARE * tol.value, tol.value), tol.given)


def settle(
    problem: BoundProblem, wanted: Array | None, h: Array, c: Array, half_width: Array
) -> tuple[BoundProblem, Array, Array]:
    """Prove, after the loop, what the values of the lanes are worth in which some policy need not end.

    Args:
        problem: the lanes.
        wanted: which of them, `[*B]`; None: no discount is 1.
        h, c, half_width: what the loop found, `[S, *B]` and `[*B]`.

    Returns:
        The problem with the steps of the policy at that value for a horizon; the half-width, `[*B]`: infinite where
        nothing is proved; and the lanes whose policy need not end, `[*B]`.
    """
    if wanted is None:
        return problem, half_width, jnp.zeros(problem.batch, bool)
    fixed = lax.stop_gradient(problem)
    assert fixed.proved is not None
    open_again = dataclasses.replace(fixed, proved=jnp.broadcast_to(fixed.proved, problem.batch) & ~wanted)
    safe_h, safe_c = (jnp.where(wanted & jnp.isfinite(half_width), x, 0) for x in (h, c))

    def prove() -> tuple[Array, Array, Array]:
        th, policy, q = bellman.backup(fixed, safe_h, safe_c)
        own, w = own_horizon(open_again, policy)
        assert w is not None and own.proved is not None
        z = allowance(fixed, safe_h, safe_c, th, q)[None] * w
        width = jnp.max(z, axis=0) * (1 + 8 * float(jnp.finfo(problem.dtype).eps))
        proved = own.proved & above(fixed, safe_h, safe_c, z) & jnp.isfinite(half_width)
        width = jnp.where(proved, width, jnp.inf)
        horizon = jnp.where(wanted, own.horizon, fixed.horizon)
        return horizon, jnp.where(wanted, width, half_width), wanted & ~own.proved

    def nothing() -> tuple[Array, Array, Array]:
        return jnp.broadcast_to(fixed.horizon, problem.batch), half_width, jnp.zeros(problem.batch, bool)

    horizon, half_width, lost = loops.cond(jnp.any(wanted), prove, nothing, (fixed, h, c, half_width, wanted))
    return dataclasses.replace(problem, horizon=horizon), half_width, lost


def allowance(problem: BoundProblem, h: Array, c: Array, th: Array, q: Array) -> Array:
    """Bound the residual at `V = h + c`, rounding included, and allow `_ROOM` times as much, `[*B]`."""
    low, high = bellman.extremes(th - h, True)
    short = dataclasses.replace(problem, horizon=jnp.ones_like(problem.horizon))
    size = jnp.max(jnp.abs(h), axis=0)
    noise = bellman.rounding(short, size, c, bellman.cost(problem, th, q))
    # What rows that miss their sum by x are off by in a step.
    noise = noise + problem.discount * problem.deviation * (size + jnp.abs(c))
    return _ROOM * (jnp.maximum(-low, high) + noise)


def verdict(status: Array, wanted: Array | None, lost: Array, half_width: Array, tol: Tolerance) -> Array:
    """Give the lanes in which some policy need not end the status that their proof allows, `[*B]`."""
    if wanted is None:
        return status
    fine = jnp.isfinite(half_width) & (~tol.given | (half_width <= tol.value))
    ran = status < int(Status.NONFINITE_INPUT)
    kept = jnp.where(fine & tol.given, int(Status.CONVERGED), status)
    kept = jnp.where(~fine & (status == int(Status.CONVERGED)), int(Status.STAGNATED), kept)
    return jnp.where(wanted & ran, jnp.where(lost, int(Status.NONFINITE_INPUT), kept), status).astype(status.dtype)
