r"""Finite horizons: T steps, and then it is over.

**Problem.** From time t on there are T - t steps left, and whoever is left in state s after the last of them gets
`terminal(s)`. The best value is a recursion, not a fixed point: with the operator of `bellman`,

    V_T = terminal,        V_t = T V_{t+1} = Omega*(r_t + g P V_{t+1}),        pi_t = grad Omega*(r_t + g P V_{t+1}),

and it needs no contraction: the discount may be 1. Everything that holds of one step holds of each: `Delta_t = Q_t -
V_t` is the worst case of `pi_t`, the policy is worth `V_0` in the perturbed rewards `r_t - Delta_t`, and so is every
other on its support. Rewards, and all other numbers, may depend on t (see `solve_horizon`).

**Cost.** T backups in one `lax.scan`, compiled once whatever T's numbers; memory of T policies, which are the answer,
and for a gradient a few times that. Derivatives are those of the recursion, step by step (`implicit.step`).

**Bounds.** There is no residual: what separates the numbers from the truth is rounding alone. Values are carried as
`V = h + c`, so that it is that of the small h. Let `W_t` be the sum of the two numbers that stand for V_t. T is
monotone and moves by at most `g x` if V moves by x, hence

    |W_t - V_t|  <=  |W_t - T W_{t+1}| + |T W_{t+1} - T V_{t+1}|  <=  delta_t + g max_s |W_{t+1} - V_{t+1}|,

where `delta_t` is the error of one backup (`bellman.rounding_of_step`) and of moving the midrange of h to c. The latter
is done by a number that c has taken up exactly (`(c + m) - c`), so that it errs by rounding of h and m, not of c. The
rounding of `c e` stands apart, as in `bellman`: it is a multiple of `u |c| e(s,a)`, and along every trajectory the
discounted exit rates add up to at most 1, so that over all the steps left it costs that multiple of `u max |c|` once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from robustreg._core import checks, extremes, loops, pytrees
from robustreg.problems import arguments
from robustreg.problems.mdps import MDP
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import bellman, bound_problem, implicit, loop, plain, readings
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.solution import Answer, Status


@pytrees.dataclass
class Horizon(Answer):
    """Solution of a problem of T steps, batch axes leading, then time.

    Attributes:
        value: best value with T - t steps to go, `[*B, T+1, S]`, in reward units; `value[..., T, :]` is `terminal`.
        policy: what to do at time t, `[*B, T, S, A]`.
        perturbation: the adversary's worst case against it, `Q_t - V_t`, `[*B, T, S, A]`: the perturbed reward is
            `reward - perturbation`. 0 on masked actions.
        lower, upper: certified bounds on the value, `[*B, T+1, S]`: rounding.
        objective: `<initial, value[0]>`, `[*B]`.
        status: `Status` codes, `[*B]` int32: CONVERGED, NONFINITE_INPUT or NONFINITE (all else is NaN then).
    """

    value: Array
    policy: Array
    perturbation: Array
    lower: Array
    upper: Array
    objective: Array
    status: Array

    @property
    def gap(self) -> Array:
        """Certified uncertainty, the largest `upper - lower` of any time and state, `[*B]`."""
        return extremes.largest(self.upper - self.lower, (-2, -1))

    def _failure(self, code: Status, lane: tuple[int, ...]) -> str:
        return f"(horizon {self.policy.shape[-3]}): {code.advise(self.value.dtype, False)}"


def solve_horizon(
    mdp: MDP,
    reg: Regulariser | None,
    horizon: int,
    terminal: ArrayLike | None = None,
    *,
    discount: ArrayLike | None = None,
    varying: bool | None = None,
    checkpoint: bool = False,
) -> Horizon:
    """Solve a regularised MDP over a fixed number of steps, backwards from the last.

    Args:
        mdp: from `robustreg.mdp` or a generator.
        reg: from `robustreg.kl` or its like; None is the plain maximum.
        horizon: T, the number of steps, at least 1; part of the compiled program.
        terminal: value after the last step, `[*B, S]`; None: 0. (Episodes that end before do without.)
        discount: in place of the MDP's own, `[*B]`, in [0, 1], of which 1 is allowed here.
        varying: whether numbers depend on time. If True, the last batch axis of every leaf of `mdp` and `reg`, and of
            `discount`, is time: batch axes are `[*B, T]`, and broadcast as such. A reward `[T, S, A]` then goes with
            betas `[K, 1]` (K lanes) or `[T]` (a beta for each step); `terminal` and the answer have `[*B]` alone. If
            False, all batch axes are lanes. None: a reward `[T, S, A]` varies in time if nothing else has batch axes,
            everything else is lanes; refused where a reward's last batch axis has length T and something else has
            batch axes too. (A batch of exactly T rewards that are lanes needs False.)
        checkpoint: whether a gradient computes every step anew instead of keeping what it was made of: less memory, and
            one more forward pass.

    Returns:
        A `Horizon`. Where `status` is CONVERGED, `lower <= V_t <= upper`. Its floating outputs are differentiable in
        every leaf of `mdp` and `reg`, in `terminal` and in `discount`, in both modes.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or shape, a `discount` out of range, or axes that can be read
            in two ways.
    """
    own: Any = plain.regulariser_or_none(mdp, reg)
    loop.check_arguments(mdp, own, None, None)
    n_steps = checks.count("horizon", horizon)
    checkpoint = checks.flag("checkpoint", checkpoint)
    mdp = mdp if discount is None else _with_discount(mdp, discount)
    if terminal is not None:
        terminal = checks.operand("terminal", terminal, mdp.dtype)
        checks.expect_shape("terminal", np.shape(terminal), (mdp.n_states,), "S", "one value per state")
    lanes = readings.shape_of(terminal, 1)
    varying = _varies(mdp, own, n_steps, lanes, varying)
    if not varying:
        readings.refuse_states_as_lanes(mdp, own, lanes)
    with jax.debug_infs(False):
        return _solve_horizon(mdp._with_sparsity(), own, terminal, n_steps, varying, checkpoint)


def _with_discount(mdp: MDP, discount: Any) -> MDP:
    """An MDP of another discount, which may be 1."""
    g = checks.number("discount", discount)
    if not checks.is_traced(g):
        checks.refuse("discount", g, ~((g >= 0) & (g <= 1)), (), "it must lie in [0, 1]")
    g, rest = (arguments.cast(x, mdp.dtype) for x in (g, 1 - g))
    return dataclasses.replace(mdp, discount=g, complement=rest)


def _varies(mdp: MDP, reg: Regulariser, n_steps: int, lanes: tuple[int, ...], varying: bool | None) -> bool:
    """Whether the last batch axis is time; refuses what cannot be told, and what does not fit."""
    reward = mdp.reward.shape[:-2]
    others = {
        "transitions": mdp.transitions.batch_shape,
        "discount": mdp.discount.shape,
        "termination": () if mdp.termination is None else mdp.termination.shape[:-2],
        "available": () if mdp.available is None else mdp.available.shape[:-2],
        "initial": mdp.initial.shape[:-1],
        "regulariser": reg.batch_shape,
    }
    if varying is None:
        if reward[-1:] != (n_steps,):
            return False
        with_lanes = [name for name, shape in {**others, "terminal": lanes}.items() if shape]
        if reward == (n_steps,) and not with_lanes:
            return True
        shown = f"reward has batch axes {list(reward)}"
        shown += f", and so has {with_lanes[0]}" if with_lanes else ""
        raise ValueError(
            f"{shown}, and there are {n_steps} steps: that reads in two ways. For a reward of each step pass "
            "varying=True; the last batch axis of everything is then time, so that lanes of something that does not "
            "vary want an axis of 1 after theirs (beta[:, None]). For rewards that are lanes pass varying=False"
        )
    if not checks.flag("varying", varying):
        return False
    for name, shape in {"reward": reward, **others}.items():
        allowed = (1,) if name == "initial" else (1, n_steps)
        if shape and shape[-1] not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ValueError(
                f"{name} has batch axes {list(shape)}; with varying=True the last of them is time, of length {wanted}: "
                "give lanes an axis of 1 after theirs"
            )
    return True


@functools.partial(jax.jit, static_argnames=("n_steps", "varying", "checkpoint"))
def _solve_horizon(
    mdp: MDP, reg: Regulariser, terminal: Array | None, n_steps: int, varying: bool, checkpoint: bool
) -> Horizon:
    lanes = readings.shape_of(terminal, 1)
    problem = bound_problem.bind(mdp, reg, *([(*lanes, 1), (n_steps,)] if varying else [lanes]), steps=n_steps)
    batch = problem.batch[: len(problem.batch) - varying]
    terminal = jnp.zeros((mdp.n_states,), mdp.dtype) if terminal is None else terminal
    last = pytrees.lanes_last(jnp.broadcast_to(terminal, batch + terminal.shape[-1:]), len(batch), 1)
    initial = pytrees.lanes_last(mdp.initial, len(problem.batch), 1)
    initial = initial[..., 0] if varying else initial

    bad = _broken(lax.stop_gradient(problem))
    bad = (jnp.any(bad, axis=-1) if varying else bad) | ~jnp.all(jnp.isfinite(lax.stop_gradient(last)), axis=0)
    harmless = implicit.harmless(
        lax.stop_gradient(problem), jnp.broadcast_to(bad[..., None], problem.batch) if varying else bad
    )
    problem = jax.tree.map(_in_place, problem, harmless)
    last = _in_place(last, jnp.where(bad[None], 0, last))

    moving, at_step = _by_step(problem, batch) if varying else ([], lambda rows: problem)
    start = _start(last)
    body: Any = functools.partial(_backwards, at_step)
    body = jax.checkpoint(body, prevent_cse=False) if checkpoint else body
    end, steps = loops.scan(body, start, moving, problem, length=n_steps, reverse=True)
    lost = bad | end.lost
    status = jnp.where(bad, int(Status.NONFINITE_INPUT), jnp.where(lost, int(Status.NONFINITE), 0)).astype(jnp.int32)

    def public(x: Array) -> Array:
        """Put `[time, S, *B]` or `[time, A, S, *B]` into the public layout, NaN where it is lost."""
        core = x.ndim - len(batch)
        places = (-2, -1) if core == 2 else (-3, -1, -2)
        return jnp.moveaxis(implicit.mark(x, lost), range(core), places)

    value = jnp.concatenate([steps.value, last[None]])
    width = jnp.concatenate([steps.half_width, _half_width(start, last)[None]])[:, None]
    return Horizon(
        value=public(value),
        policy=public(steps.policy),
        perturbation=public(steps.perturbation),
        lower=public(value - width),
        upper=public(value + width),
        objective=implicit.mark(jnp.sum(initial * value[0], axis=0), lost),
        status=status,
    )


def _broken(problem: BoundProblem) -> Array:
    """Lanes, and steps, with a number out of range or not finite, `[*B]`."""
    masked = jnp.isneginf(problem.regulariser.log_prior)
    bad = jnp.any(~jnp.isfinite(jnp.where(masked, 0, problem.reward)), axis=(0, 1))
    bad = bad | ~bellman.sound(problem)
    for leaf in jax.tree.leaves(problem.regulariser):
        core = leaf.ndim - len(problem.batch)
        bad = bad | jnp.any(jnp.isnan(leaf), axis=tuple(range(core)))
    return bad


@jax.custom_jvp
def _in_place(x: Array, y: Array) -> Array:
    """y, with the derivatives of x: what is asked of a lane that is lost must find the NaN on its way back."""
    return y


_in_place.defjvps(lambda dx, out, x, y: dx, None)


def _by_step(
    problem: BoundProblem, batch: tuple[int, ...]
) -> tuple[list[Array], Callable[[list[Array]], BoundProblem]]:
    """Split a problem with lanes `[*batch, T]`: what changes from step to step, time first, and a maker of one step.

    Only those arrays go through the scan, whose gradients it then stacks; all else is the same array in every step.
    """
    leaves = {
        f.name: getattr(problem, f.name) for f in dataclasses.fields(problem) if not f.metadata.get("static", False)
    }
    kernel = leaves.pop("transitions")

    def through(change: Callable[[Array, int], Array]) -> BoundProblem:
        changed = jax.tree.map(lambda x: change(x, x.ndim - 1), leaves)
        return dataclasses.replace(problem, transitions=kernel._by_lane(change), batch=batch, **changed)

    moving: list[Array] = []

    def collect(x: Array, axis: int) -> Array:
        if x.shape[axis] > 1:
            moving.append(jnp.moveaxis(x, axis, 0))
        return x

    def at_step(rows: list[Array]) -> BoundProblem:
        left = iter(rows)
        return through(lambda x, axis: next(left) if x.shape[axis] > 1 else jnp.squeeze(x, axis))

    through(collect)
    return moving, at_step


@pytrees.dataclass
class State:
    """Where the recursion stands, going backwards.

    Attributes:
        h, c: the value `h + c`, `[S, *B]` and `[*B]`.
        error: bound on its error but for that of `c e`, `[*B]`.
        reach: largest |c| so far, `[*B]`.
        lost: lanes that were not finite at some step, `[*B]`.
    """

    h: Array
    c: Array
    error: Array
    reach: Array
    lost: Array


@pytrees.dataclass
class Row:
    """Hold what is kept of a step: value `[S, *B]`, its half-width `[*B]`, policy and perturbation `[A, S, *B]`."""

    value: Array
    half_width: Array
    policy: Array
    perturbation: Array


def _unit(x: Array) -> float:
    return 0.5 * float(jnp.finfo(x.dtype).eps)


def _moved(h: Array, c: Array) -> tuple[Array, Array, Array]:
    """Move the midrange of h to c, which leaves the value, and bound what that rounds, `[*B]`."""
    # (A constant for derivatives: those of V are all in h.)
    middle = lax.stop_gradient(0.5 * (jnp.min(h, axis=0) + jnp.max(h, axis=0)))
    total = c + middle
    # What c took up: exact if it is the larger of the two, else to rounding of `middle`.
    h = h - (total - c)[None]
    return h, total, 2 * _unit(h) * (jnp.abs(middle) + jnp.max(jnp.abs(lax.stop_gradient(h)), axis=0))


def _start(last: Array) -> State:
    """The state after the last step; its value is known to rounding."""
    zero = jnp.zeros_like(last[0])
    h, c, error = _moved(last, zero)
    return State(h, c, 2 * error, jnp.abs(c), zero > 0)


def _half_width(state: State, value: Array) -> Array:
    """Half-width of the interval around `value = h + c`, which is formed with an error of its own, `[*B]`."""
    state, value = lax.stop_gradient((state, value))
    unit = _unit(value)
    return (1 + 8 * unit) * (state.error + 6 * unit * state.reach) + 4 * unit * jnp.max(jnp.abs(value), axis=0)


def _backwards(at_step: Callable[[list[Array]], BoundProblem], state: State, rows: list[Array]) -> tuple[State, Row]:
    """Take one step back in time."""
    problem = at_step(rows)
    th, policy, q = implicit.step(problem, state.h, state.c)
    h, c, moving = _moved(th, state.c)
    lost = ~jnp.all(jnp.isfinite(h + c[None]), axis=0)
    h, c = _in_place(h, jnp.where(lost[None], 0, h)), jnp.where(lost, 0, c)
    masked = jnp.isneginf(problem.regulariser.log_prior)
    error = lax.stop_gradient(_error(problem, state, th, q)) + moving
    new = State(h, c, error, jnp.maximum(state.reach, jnp.abs(lax.stop_gradient(c))), state.lost | lost)
    value = h + c[None]
    return new, Row(value, _half_width(new, value), policy, jnp.where(masked, 0, q - th[None]))


def _error(problem: BoundProblem, state: State, th: Array, q: Array) -> Array:
    """Bound the error of `T V` but for that of `c e`: one backup's own, and what is handed on, `[*B]`."""
    size = jnp.max(jnp.abs(state.h), axis=0)
    own = _unit(th) * bellman.rounding_of_step(problem, size, state.c, bellman.cost(problem, th, q))
    # Rows that miss `1 - termination` change T by that share of V, and let errors grow by as much.
    missing = problem.discount * problem.deviation
    return own + 2 * missing * (size + jnp.abs(state.c)) + (problem.discount + 2 * missing) * state.error
