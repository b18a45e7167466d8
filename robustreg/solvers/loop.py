"""The one loop, and `solve`.

Each turn evaluates the backup once, reads the certificate off its residual, stops the lanes whose certified error is
small enough, and lets the solver propose the next value for the others. A stopped lane is frozen: nothing that happens
in another lane changes a bit of it. On a CPU many lanes are solved a group after the other (see `lane_groups`). The
loop itself carries values only; policy and perturbation come from one more backup at the value that is returned.

**Stopping.** With the half-width `w = g/(1-g) span(d)/2` and the rounding bound `u` of `bellman.rounding`, a lane
stops when `w + u <= tol`, and returns the midpoint of its interval, so that `max_s |value - V*| <= tol`. (If episodes
end, constants are no null direction of the residual: `w = g/(1-g) max|d|` then, around `T V`.) Without a
`tol` it stops at `w <= u`: as tight as the precision supports within a factor of two (and STAGNATED, if the interval is
then still wider than half of the value). A lane whose `w` is far below
`u` but whose `u` exceeds `tol`, or whose `w + u` has not improved for `_PATIENCE` steps, has STAGNATED and returns its
best value. Whatever the status, `lower` and `upper` are the returned value with `w + u` on either side.

**On a GPU** a turn of a loop waits for the host, some 27 us. The flag
`--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL` in `XLA_FLAGS` takes two thirds of that off (JAX 0.11.2 on an
H200: a batched solve 7.3 -> 5.2 ms), but has made a gradient 35 times slower, whose graph was built anew at every call:
measure with it before you keep it. Nothing here sets it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from robustreg._core import checks, loops, pytrees
from robustreg.problems.mdps import MDP
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import ambiguity as balls
from robustreg.solvers import (
    answers,
    bellman,
    first_sweeps,
    lane_groups,
    linear,
    methods,
    plain,
    readings,
    resident,
    undiscounted,
)
from robustreg.solvers.ambiguity import TransitionBall
from robustreg.solvers.bound_problem import BoundProblem, bind
from robustreg.solvers.methods import Solver
from robustreg.solvers.solution import Guess, Solution, Status
from robustreg.solvers.tolerance import Tolerance

_RUNNING = -1
_PATIENCE = 60


def solve(
    mdp: MDP,
    reg: Regulariser | None,
    solver: Solver | None = None,
    *,
    tol: ArrayLike | None = None,
    max_steps: int | Array | None = None,
    init: ArrayLike | Solution | Guess | None = None,
    adjoint_error: ArrayLike | None = None,
    strict: bool = False,
    ambiguity: TransitionBall | None = None,
    visits: bool = False,
) -> Solution:
    """Solve a regularised MDP, which is the minimax game against its adversary, with a certificate.

    Any leaf of `mdp` and `reg` may carry leading batch axes; they broadcast as in NumPy, and every combination is a
    lane `[*B]`. Compiled once per shapes, dtype and solver: beta, alpha, discount and tol are data.

    Args:
        mdp: from `robustreg.mdp` or a generator.
        reg: from `robustreg.kl`, `robustreg.alpha` and their like, or a sum of such; None is the plain maximum, whose
            policy takes one best action.
        solver: None chooses one; see `robustreg.solvers`.
        tol: certified bound on `max_s |value - V*|` in reward units, `[*B]` or a number; None: as tight as the
            precision supports (the rounding bound is then at least half of the certified error).
        max_steps: cap on backups; None: the solver's own.
        init: value to start from, `[*B, S]`, or a whole `Solution`, whose visits, where it has any, are started from as
            well, or what `Solution.extrapolated` guesses; never differentiated.
        adjoint_error: zeros `[*B]` that do nothing, except that their gradient is a bound on the relative error (in
            the 1-norm) of the occupancy that the backward pass solved for, that of a policy which is not optimal yet
            included: a check of a gradient from inside jit. Infinite where the linear system was not solved.
        strict: whether rounding is bounded for the worst case. By default the roundings of a sum of more than 16
            successors count by four times the square root of their number, a bound that random errors meet with a
            probability close to 1; strictly, by their number, which makes dense problems' bounds wider.
        ambiguity: noise in the transitions against which the policy is to be best as well, a `TransitionBall`; None is
            none. The value is then the robust one, `perturbation` what reward and transitions take off together.
        visits: whether to return `Solution.visits` too: for a training loop, in which the next solve begins at this one
            (`init=`). Visits are what the backward pass of `objective` solves for, and few steps lead there from those
            of similar parameters. An `init` that has them asks for them.

    Returns:
        A `Solution`. Where `status` is CONVERGED, `lower <= V* <= upper` with `upper - lower <= 2 tol`.
        Its floating outputs are differentiable in every leaf of `mdp` and `reg`, in both modes and to any order (see
        `solvers.implicit`); in a lane with status NONFINITE or NONFINITE_INPUT gradients are NaN. What is not used of
        a failed lane spoils no gradient of the others (`Solution.where_converged`).

    Raises:
        TypeError, ValueError: arguments of the wrong kind or shape. Failures of lanes are no exceptions; see `status`
            and `raise_if_failed`.
    """
    reg = plain.regulariser_or_none(mdp, reg)
    check_arguments(mdp, reg, solver, tol)
    dtype, max_steps = mdp.dtype, read_steps(max_steps)
    asked = Tolerance.read(tol, dtype)
    init, visited = (init.value, init.visits) if isinstance(init, (Solution, Guess)) else (init, None)
    start = None if init is None else checks.operand("init", init, dtype)
    if visited is not None:
        visited = checks.operand("init.visits", visited, dtype)
        checks.expect_shape("init.visits", visited.shape, (mdp.n_states,), "S")
    wanted = checks.flag("visits", visits) or visited is not None
    readings.refuse_states_as_lanes(mdp, reg, asked.shape, readings.shape_of(start, 1))
    if start is not None and (start.ndim == 0 or start.shape[-1] != mdp.n_states):
        raise ValueError(f"init must be [*B, S] with S = {mdp.n_states}, got shape {start.shape}")
    limit = checks.operand("max_steps", max_steps, np.int32)
    probe = None if adjoint_error is None else checks.operand("adjoint_error", adjoint_error, dtype)
    strict = checks.flag("strict", strict)
    ball = None if ambiguity is None else balls.checked(ambiguity, mdp)
    # The logarithm of an action never played is minus infinity: no fault, for whoever looks for infinities.
    with jax.debug_infs(False):
        found = mdp._with_sparsity(), reg, solver, asked, limit, start, probe, ball, visited
        return _solve(*found, strict=strict, visits=wanted)


def check_arguments(mdp: MDP, reg: Regulariser | None, solver: Solver | None, tol: ArrayLike | None) -> None:
    """Refuse arguments that are none, before anything is traced."""
    checks.expect_type(mdp, MDP, "first argument", "mdp")
    checks.expect_type(reg, Regulariser, "second argument", "kl")
    if solver is not None and not hasattr(solver, "propose"):
        raise TypeError(f"solver must be an instance such as robustreg.Newton(), got {solver!r}")
    if isinstance(solver, type):
        raise TypeError(f"solver must be an instance: write {solver.__name__}()")
    checks.check_tol(tol, "None asks for what the precision supports")


def read_steps(max_steps: int | Array | None) -> int | Array:
    """Read a cap on steps; None is none."""
    largest = np.iinfo(np.int32).max
    if max_steps is None:
        return largest
    if isinstance(max_steps, Tracer):
        return max_steps
    return min(checks.count("max_steps", max_steps), largest)


@functools.partial(jax.jit, static_argnames=("solver", "strict", "visits"))
def _solve(
    mdp: MDP,
    reg: Regulariser,
    solver: Solver | None,
    tol: Tolerance,
    limit: Array,
    init: Array | None,
    probe: Array | None = None,
    ball: TransitionBall | None = None,
    visited: Array | None = None,
    strict: bool = False,
    visits: bool = False,
) -> Solution:
    others = ((tol.value, 0), (init, 1), (probe, 0), (visited, 1))
    shapes = [x.shape[: x.ndim - core] for x, core in others if x is not None]
    problem = bind(mdp, reg, *shapes, strict=strict, ambiguity=ball)
    batch = problem.batch
    tol = tol.broadcast(batch)
    init, visited = (
        None if x is None else pytrees.lanes_last(jnp.broadcast_to(x, batch + x.shape[-1:]), len(batch), 1)
        for x in (init, visited)
    )
    start = bellman.of_one_step(problem) if init is None else init
    problem, start, wanted = undiscounted.begin(problem, start, init is not None)
    solver, goal = methods.chosen(solver, warm=init is not None), undiscounted.asked(wanted, tol)
    loop = lax.stop_gradient(iterate(lax.stop_gradient(problem), solver, goal, limit, lax.stop_gradient(start)))
    problem, half_width, lost = undiscounted.settle(problem, wanted, loop.h, loop.c, loop.half_width)
    status = undiscounted.verdict(loop.status, wanted, lost, half_width, tol)
    stopped = answers.Stopped(loop.h, loop.c, half_width, status, loop.steps)
    probe = None if probe is None else jnp.broadcast_to(probe, batch)
    method = linear.Method(direct=getattr(solver, "linear", None) == "direct")
    initial = pytrees.lanes_last(mdp.initial, len(batch), 1)
    return answers.finish(problem, stopped, initial, tol, probe, method, visited, visits)


@pytrees.dataclass
class Loop:
    """State of the loop: value `V = h + c`, its best predecessor, and the books of each lane.

    Attributes:
        h, c: iterate, `[S, *B]`, `[*B]`. When a lane has stopped, its answer.
        size: bound on `max_s |h|` while the lane runs, `[*B]`.
        noise: rounding bound of the last step, `[*B]`.
        best_h, best_c: the midpoint value with the smallest certified half-width met.
        half_width: that half-width, rounding bound included, `[*B]`: `|best_h + best_c - V*| <= half_width`.
        stalled: steps since it improved, `[*B]`.
        steps: backups, `[*B]`.
        status: `Status` or running.
        memory: the solver's.
    """

    h: Array
    c: Array
    size: Array
    noise: Array
    best_h: Array
    best_c: Array
    half_width: Array
    stalled: Array
    steps: Array
    status: Array
    memory: object


def iterate(problem: BoundProblem, solver: Solver, tol: Tolerance, limit: Array, h: Array) -> Loop:
    """Run a solver until every lane has stopped.

    Args:
        problem: the lanes.
        solver: its proposals.
        tol: certified half-width asked for, `[*B]`.
        limit: cap on steps; the solver's own applies as well.
        h: start, `[S, *B]`.
    """

    def run(problem: BoundProblem, tol: Tolerance, h: Array) -> Loop:
        return dataclasses.replace(_iterate(problem, solver, tol, limit, h), memory=())

    def loop(problem: BoundProblem, tol: Tolerance, h: Array) -> Loop:
        return lane_groups.in_groups(run, problem, tol, h)

    problem, tol, limit, h = loops.alike((problem, tol, limit, h))
    found = resident.find(problem, solver)
    if found is None:
        return loop(problem, tol, h)
    platform, engine = found

    def kernel(problem: BoundProblem, tol: Tolerance, h: Array) -> Loop:
        x = engine(problem, tol, limit, h)
        size, count = jnp.zeros_like(x.half_width), jnp.zeros_like(x.steps)
        return Loop(x.h, x.c, size, x.noise, x.h, x.c, x.half_width, count, x.steps, x.status, ())

    return lax.platform_dependent(problem, tol, h, **{platform: kernel}, default=loop)


def _iterate(problem: BoundProblem, solver: Solver, tol: Tolerance, limit: Array, h: Array) -> Loop:
    batch, dtype = problem.batch, problem.dtype
    # A caller's jit may close over the MDP. Its arrays are then constants, which the compiler moves into the loop and
    # lays out anew at every turn: three times slower on a grid of 1,024 states. A start of zeros is one as well, which
    # it spends seconds to fold where there are thousands of lanes.
    problem, h = lax.optimization_barrier((problem, h))
    h, swept = first_sweeps.swept(problem, solver, limit, h)
    limit = jnp.minimum(limit - swept, solver.max_steps)
    zero, infinite = jnp.zeros(batch, dtype), jnp.full(batch, jnp.inf, dtype)
    count = jnp.zeros(batch, jnp.int32)
    status = jnp.where(bellman.sound(problem), _RUNNING, int(Status.NONFINITE_INPUT)).astype(jnp.int32)
    h, c, size = _recentre(h, zero)
    start = Loop(h, c, size, infinite, h, c, infinite, count, count, status, solver.init(h))

    def running(state: Loop) -> Array:
        return jnp.any(state.status == _RUNNING)

    end = loops.while_loop(running, functools.partial(_turn, problem, solver, tol, limit), start)
    return dataclasses.replace(end, steps=end.steps + swept)


class _Look(NamedTuple):
    """Hold what a turn sees of V = h + c.

    Attributes:
        residual: `T V - V` about its middle, `[S, *B]`.
        c: offset with which `h + residual + c` is the midpoint of the interval that the residual proves: what a lane
            that stops in this turn returns, and the value that the solver corrects.
        size: `max |residual|`, `[*B]`.
        width, noise: half-width of that interval in exact arithmetic, and what rounding may add to it, `[*B]`.
        goal: the half-width that is left for the residual once rounding has had its share of the tolerance, `[*B]`.
        chain: of the policy that is best at V.
        steady: whether the rounding bound has settled, `[*B]`.
    """

    residual: Array
    c: Array
    size: Array
    width: Array
    noise: Array
    goal: Array
    chain: bellman.Chain
    steady: Array


def _look(problem: BoundProblem, tol: Tolerance, state: Loop) -> _Look:
    """Evaluate the backup and its certificate: V* is within `width + noise` of `h + residual + c`."""
    worst = bellman.worst_transitions(problem, state.h, state.c)
    th, policy, left = bellman.backup(problem, state.h, state.c, worst)
    d, shift, size, width = _centre(problem, th - state.h)
    unit = 0.5 * float(jnp.finfo(problem.dtype).eps)
    # The shift is a quotient and a sum; c itself is in the rounding bound already.
    noise = bellman.rounding(problem, state.size, state.c, bellman.cost(problem, th, left)) + 4 * unit * jnp.abs(shift)
    noise = noise + bellman.deviation_cost(problem, state.size + jnp.abs(state.c) + jnp.abs(shift) + width)
    # The bound of a start far away says nothing about the next step's.
    steady, c = noise >= 0.5 * state.noise, state.c + shift
    if problem.averaged:
        # Where a policy's chain falls apart, its bias is without bound, and the next policy is another one.
        scale = jnp.maximum(jnp.abs(c), problem.magnitudes.charged)
        steady = steady & (noise <= float(jnp.finfo(problem.dtype).eps) ** (1 / 3) * scale)
    goal = jnp.where(tol.given, tol.value - noise, noise)
    return _Look(d, c, size, width, noise, goal, bellman.chain(problem, policy, worst), steady)


def _turn(problem: BoundProblem, solver: Solver, tol: Tolerance, limit: Array, state: Loop) -> Loop:
    """Take one step: a backup, a look at its certificate, a proposal."""
    look = _look(problem, tol, state)
    half_width = look.width + look.noise
    improved = half_width < state.half_width
    stalled = jnp.where(improved, 0, state.stalled + 1)
    status = _verdict(look.width, look.noise, tol, stalled, look.steady, state.steps, limit)

    step = methods.Step(
        h=state.h,
        c=look.c,
        residual=look.residual,
        size=look.size,
        chain=look.chain,
        half_width=look.width,
        goal=look.goal,
        count=state.steps,
    )
    # The solver corrects V by M d, where M is its approximation of (I - K)^{-1} (see `bellman`).
    correction, memory = solver.propose(step, state.memory)
    next_h, next_c, size = _recentre(state.h + correction, look.c)

    # Solvers may propose worse values than they had (Newton's far from V*): what is returned is the best one met.
    best_h = jnp.where(improved[None], state.h + look.residual, state.best_h)
    best_c = jnp.where(improved, look.c, state.best_c)
    stopped = status != _RUNNING
    new = Loop(
        h=jnp.where(stopped[None], best_h, next_h),
        c=jnp.where(stopped, best_c, next_c),
        size=size,
        noise=look.noise,
        best_h=best_h,
        best_c=best_c,
        half_width=jnp.where(improved, half_width, state.half_width),
        stalled=stalled,
        steps=state.steps + 1,
        status=status,
        memory=memory,
    )
    # A lane that had stopped before this turn keeps every bit, whatever was computed for it meanwhile.
    return freeze(state.status != _RUNNING, state, new)


def _verdict(
    width: Array, noise: Array, tol: Tolerance, stalled: Array, steady: Array, steps: Array, limit: Array
) -> Array:
    """Status of each lane after a look at its certificate, `steps` backups before this one."""
    status = jnp.where(steps + 1 >= limit, int(Status.MAX_STEPS), _RUNNING)
    hopeless = (steady & (width <= 0.25 * noise)) | (stalled >= _PATIENCE)
    status = jnp.where(hopeless, int(Status.STAGNATED), status)
    reached = jnp.where(tol.given, width <= tol.value - noise, steady & (width <= noise))
    status = jnp.where(reached, int(Status.CONVERGED), status)
    # A lane whose very first backup is not finite had an input that is not.
    broken = jnp.where(steps == 0, int(Status.NONFINITE_INPUT), int(Status.NONFINITE))
    return jnp.where(jnp.isfinite(width + noise), status, broken).astype(jnp.int32)


def _centre(problem: BoundProblem, d: Array) -> tuple[Array, Array, Array, Array]:
    """Residual, shift of the offset, `max |residual|` and half-width of the error of `T V = h + d + offset`.

    If no episode ends, moving V by m/(1-g) with m the midrange of d leaves the policy alone and centres d: the
    offset takes it in full, and `T V` is then the midpoint of the certified interval.
    """
    low, high = bellman.extremes(d, problem.ends)
    # The half-width itself is a difference, a quotient and two products.
    ratio = (1 + 4 * float(jnp.finfo(problem.dtype).eps)) * bellman.ratio(problem)
    if problem.ends:
        largest = jnp.maximum(-low, high)
        return d, jnp.zeros_like(largest), largest, ratio * largest
    middle, largest = 0.5 * (low + high), 0.5 * (high - low)
    return d - middle[None], middle / problem.complement, largest, ratio * largest


def _recentre(h: Array, c: Array) -> tuple[Array, Array, Array]:
    """Return the same value with the midrange of h moved to c, and `max |h|` then: rounding grows with it."""
    low, high = jnp.min(h, axis=0), jnp.max(h, axis=0)
    middle = 0.5 * (low + high)
    return h - middle[None], c + middle, 0.5 * (high - low)


def freeze(frozen: Array, old: Any, new: Any) -> Any:
    """Old leaves where a lane is frozen; every leaf ends in the lanes' axes."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(frozen.reshape((1,) * (b.ndim - frozen.ndim) + frozen.shape), a, b)

    return jax.tree.map(choose, old, new)
