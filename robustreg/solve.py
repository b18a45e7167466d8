"""The one loop, and `solve`.

Each turn evaluates the backup once, reads the certificate off its residual, stops the lanes whose certified error is
small enough, and lets the solver propose the next value for the others. A stopped lane is frozen: nothing that happens
in another lane changes a bit of it. The loop itself carries values only; policy, perturbation and the final bounds
come from one more backup at the value that is returned.

**Stopping.** With the half-width `w = g/(1-g) span(d)/2` and the rounding bound `u` of `bellman.rounding`, a lane
stops when `w + u <= tol`, and returns the midpoint of its interval, so that `max_s |value - V*| <= tol`. (If episodes
end, constants are no null direction of the residual: `w = g/(1-g) max|d|` then, around `T V`.) Without a
`tol` it stops at `w <= u`: as tight as the precision supports within a factor of two. A lane whose `w` is far below
`u` but whose `u` exceeds `tol`, or whose `w` has not improved for `_PATIENCE` steps, has STAGNATED and returns its
best value, with the bounds that do hold.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from robustreg import _tree, bellman, solvers
from robustreg.mdp import MDP
from robustreg.regularisers import Regulariser
from robustreg.solution import Solution, Status
from robustreg.solvers import Solver

_RUNNING = -1
_PATIENCE = 60


def solve(
    mdp: MDP,
    reg: Regulariser,
    solver: Solver | None = None,
    *,
    tol: ArrayLike | None = None,
    max_steps: int | Array | None = None,
    init: ArrayLike | None = None,
) -> Solution:
    """Solve a regularised MDP, which is the minimax game against its adversary, with a certificate.

    Any leaf of `mdp` and `reg` may carry leading batch axes; they broadcast as in NumPy, and every combination is a
    lane `[*B]`. Compiled once per shapes, dtype and solver: beta, alpha, discount and tol are data.

    Args:
        mdp: from `robustreg.mdp` or a generator.
        reg: from `robustreg.kl` or `robustreg.alpha`.
        solver: None chooses one; see `robustreg.solvers`.
        tol: certified bound on `max_s |value - V*|` in reward units, `[*B]` or a number; None: as tight as the
            precision supports (the rounding bound is then at least half of the certified error).
        max_steps: cap on backups; None: the solver's own.
        init: value to start from, `[*B, S]`; never differentiated.

    Returns:
        A `Solution`. Where `status` is CONVERGED, `lower <= V* <= upper` with `upper - lower <= 2 tol`.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or shape. Failures of lanes are no exceptions; see `status`
            and `raise_if_failed`.
    """
    _check_arguments(mdp, reg, solver, tol)
    dtype = mdp.dtype
    # A negative tol stands for None: whether there is one is data as well.
    tol = jnp.asarray(-1 if tol is None else tol, dtype)
    init = None if init is None else jnp.asarray(init, dtype)
    if init is not None and (init.ndim == 0 or init.shape[-1] != mdp.n_states):
        raise ValueError(f"init must be [*B, S] with S = {mdp.n_states}, got shape {init.shape}")
    limit = jnp.asarray(np.iinfo(np.int32).max if max_steps is None else max_steps, jnp.int32)
    return _solve(mdp, reg, solver, tol, limit, init)


def _check_arguments(mdp: MDP, reg: Regulariser, solver: Solver | None, tol: ArrayLike | None) -> None:
    if not isinstance(mdp, MDP):
        raise TypeError(f"the first argument must be an MDP (see robustreg.mdp), got {type(mdp).__name__}")
    if not isinstance(reg, Regulariser):
        raise TypeError(f"the second argument must be a regulariser (see robustreg.kl), got {type(reg).__name__}")
    if solver is not None and not hasattr(solver, "propose"):
        raise TypeError(f"solver must be an instance such as robustreg.Newton(), got {solver!r}")
    if isinstance(solver, type):
        raise TypeError(f"solver must be an instance: write {solver.__name__}()")
    if isinstance(tol, (int, float)) and not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}; None asks for what the precision supports")


@functools.partial(jax.jit, static_argnames="solver")
def _solve(mdp: MDP, reg: Regulariser, solver: Solver | None, tol: Array, limit: Array, init: Array | None) -> Solution:
    others = (tol.shape,) if init is None else (tol.shape, init.shape[:-1])
    problem = bellman.lanes(mdp, reg, *others)
    batch = problem.batch
    tol = jnp.broadcast_to(tol, batch)
    h = (
        jnp.zeros(batch + (mdp.n_states,), mdp.dtype)
        if init is None
        else jnp.broadcast_to(init, batch + init.shape[-1:])
    )
    solver = solvers.automatic(problem) if solver is None else solver
    result = iterate(problem, solver, tol, limit, _tree.lanes_last(h, len(batch), 1))
    return _finish(problem, result, _tree.lanes_last(mdp.initial, len(batch), 1), tol)


@_tree.dataclass
class Loop:
    """State of the loop: value `V = h + c`, its best predecessor, and the books of each lane.

    Attributes:
        h, c: iterate, `[S, *B]`, `[*B]`. When a lane has stopped, its answer.
        best_h, best_c, best: the midpoint value with the smallest half-width met, and that half-width.
        stalled: steps since `best` improved, `[*B]`.
        steps: backups, `[*B]`.
        status: `Status` or running.
        half_width: certified half-width of the answer with rounding, `[*B]`; infinite unless converged.
        memory: the solver's.
    """

    h: Array
    c: Array
    best_h: Array
    best_c: Array
    best: Array
    stalled: Array
    steps: Array
    status: Array
    half_width: Array
    memory: object


def iterate(problem: bellman.Lanes, solver: Solver, tol: Array, limit: Array, h: Array) -> Loop:
    """Run a solver until every lane has stopped.

    Args:
        problem: the lanes.
        solver: its proposals.
        tol: certified half-width asked for, `[*B]`; negative: as tight as the precision supports.
        limit: cap on steps; the solver's own applies as well.
        h: start, `[S, *B]`. Lanes whose input is not `bellman.sound` stop before the first step.
    """
    batch, dtype = problem.batch, problem.dtype
    limit = jnp.minimum(limit, solver.max_steps)
    zero, infinite = jnp.zeros(batch, dtype), jnp.full(batch, jnp.inf, dtype)
    count = jnp.zeros(batch, jnp.int32)
    sound = bellman.sound(problem) & jnp.all(jnp.isfinite(h), axis=0)
    status = jnp.where(sound, _RUNNING, int(Status.NONFINITE_INPUT)).astype(jnp.int32)
    start = Loop(h, zero, h, zero, infinite, count, count, status, infinite, solver.init(h))

    def running(state: Loop) -> Array:
        return jnp.any(state.status == _RUNNING)

    return lax.while_loop(running, functools.partial(_turn, problem, solver, tol, limit), start)


def _turn(problem: bellman.Lanes, solver: Solver, tol: Array, limit: Array, state: Loop) -> Loop:
    """One backup, one look at the certificate, one proposal."""
    th, policy, q = bellman.backup(problem, state.h, state.c)
    d, c, width = _centre(problem, th - state.h, state.c)
    noise = bellman.rounding(problem, state.h, state.c, bellman.cost(problem, th, q))
    goal = jnp.where(tol < 0, noise, tol - noise)
    improved = width < state.best
    stalled = jnp.where(improved, 0, state.stalled + 1)
    status = _verdict(width, noise, goal, stalled, state.steps + 1 >= limit)

    step = solvers.Step(
        h=state.h,
        c=c,
        residual=d,
        chain=bellman.chain(problem, policy),
        half_width=width,
        goal=goal,
        complement=problem.complement,
        count=state.steps,
    )
    correction, memory = solver.propose(step, state.memory)
    next_h, next_c = _recentre(state.h + correction, c)

    best_h = jnp.where(improved[None], state.h + d, state.best_h)
    best_c = jnp.where(improved, c, state.best_c)
    stopped = status != _RUNNING
    new = Loop(
        h=jnp.where(stopped[None], best_h, next_h),
        c=jnp.where(stopped, best_c, next_c),
        best_h=best_h,
        best_c=best_c,
        best=jnp.where(improved, width, state.best),
        stalled=stalled,
        steps=state.steps + 1,
        status=status,
        half_width=jnp.where(status == int(Status.CONVERGED), width + noise, jnp.inf),
        memory=memory,
    )
    return _keep(state.status != _RUNNING, state, new)


def _verdict(width: Array, noise: Array, goal: Array, stalled: Array, exhausted: Array) -> Array:
    """Status of each lane after a look at its certificate."""
    status = jnp.where(exhausted, int(Status.MAX_STEPS), _RUNNING)
    hopeless = (width <= 0.25 * noise) | (stalled >= _PATIENCE)
    status = jnp.where(hopeless, int(Status.STAGNATED), status)
    status = jnp.where(width <= goal, int(Status.CONVERGED), status)
    return jnp.where(jnp.isfinite(width + noise), status, int(Status.NONFINITE)).astype(jnp.int32)


def _centre(problem: bellman.Lanes, d: Array, c: Array) -> tuple[Array, Array, Array]:
    """Residual, offset and half-width of the error of `T V = h + d + offset`.

    If no episode ends, moving V by m/(1-g) with m the midrange of d leaves the policy alone and centres d: the
    offset takes it in full, and `T V` is then the midpoint of the certified interval.
    """
    low, high = bellman.extremes(d, problem.ends)
    ratio = problem.discount / problem.complement
    if problem.ends:
        return d, c, ratio * jnp.maximum(-low, high)
    middle = 0.5 * (low + high)
    return d - middle[None], c + middle / problem.complement, ratio * 0.5 * (high - low)


def _recentre(h: Array, c: Array) -> tuple[Array, Array]:
    """The same value with the midrange of h moved to c: rounding grows with the size of h."""
    middle = 0.5 * (jnp.max(h, axis=0) + jnp.min(h, axis=0))
    return h - middle[None], c + middle


def _keep(frozen: Array, old: Loop, new: Loop) -> Loop:
    """Old leaves where a lane is frozen; every leaf ends in the lanes' axes."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(frozen.reshape((1,) * (b.ndim - frozen.ndim) + frozen.shape), a, b)

    return jax.tree.map(choose, old, new)


def _finish(problem: bellman.Lanes, loop: Loop, initial: Array, tol: Array) -> Solution:
    """One more backup at each lane's answer: policy, perturbation, and a second certificate to meet the first."""
    # NaN in gives NaN out, everywhere: a lost lane must not look like an answer.
    h = jnp.where((loop.status >= int(Status.NONFINITE_INPUT))[None], jnp.nan, loop.h)
    th, policy, q = bellman.backup(problem, h, loop.c)
    value = h + loop.c[None]
    lower, upper = bellman.value_bounds(problem, h, loop.c, th, bellman.cost(problem, th, q))
    # Both intervals hold. Neither is to exclude the value that is returned, which may lie anywhere in the first.
    lower = jnp.minimum(jnp.maximum(lower, value - loop.half_width[None]), value)
    upper = jnp.maximum(jnp.minimum(upper, value + loop.half_width[None]), value)
    masked = jnp.isneginf(problem.regulariser._prior)
    perturbation = jnp.where(masked, 0, q - th[None])
    return Solution(
        value=_tree.batch_first(value, 1),
        q=_tree.batch_first(q + loop.c[None, None], 2),
        policy=_tree.batch_first(policy, 2),
        perturbation=_tree.batch_first(perturbation, 2),
        lower=_tree.batch_first(lower, 1),
        upper=_tree.batch_first(upper, 1),
        objective=jnp.sum(initial * value, axis=0),
        status=loop.status,
        steps=loop.steps,
        tol=jnp.where(tol < 0, loop.half_width, tol),
    )
