"""Solves that stay on the chip: on a CUDA device, one kernel runs the whole certified solve of a lane in one block.

The loop of `solve` returns to the device's memory, and to the host, at every product with a policy's chain, and all
lanes wait for the slowest. The kernel in `solvers/cuda` keeps the vectors of one lane in registers and shared memory
from the first backup to the last, and stops every lane by itself. It is Newton's method with the same Krylov solver,
stopping rule, status and certificate, formula by formula; the first proposal is some plain sweeps, which are counted as
steps. So a lane ends with a value as certain as the loop's, not with the same digits: both lie in their intervals.

`find` tells from static facts whether a problem is eligible, and everything else is left to the loop: float32, KL and
alpha-divergences, `Newton` with Krylov solves, successor lists or dense kernels of at most 128 states, at most 16
actions and 16 successors, 2,048 states. The kernel is compiled for the sizes at hand by the NVRTC that `jax[cuda12]`
brings (about a second, once per process and sizes), and checked against a small problem before it is used; where that
fails, the loop takes over with one warning.

It has been compared with the loop emulated on a CPU, and compiled for GPUs, but has not run on one yet: so it is used
only where `ROBUSTREG_KERNEL=1` is set in the environment. That is read when a solve is traced: set it before the first
one. A program that `jax.export` is to carry to other machines has to be traced without it: a kernel that is compiled
here is not part of it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from robustreg.problems.dense import Dense
from robustreg.problems.successors import BoundSuccessors
from robustreg.regularisers.families import BoundAlpha, BoundKL
from robustreg.solvers import bellman, first_sweeps, methods, resident_kernel
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.resident_kernel import Carrier, Sizes
from robustreg.solvers.tolerance import Tolerance

_STATES, _DENSE_STATES, _ACTIONS, _SLOTS = 2048, 128, 16, 16
# Plain sweeps before the first Newton step by the square root of the number of states, where the solver leaves it open.
SWEEPS = 2


class Found(NamedTuple):
    """Answers of a kernel, lanes last.

    Attributes:
        h, c: the value `h + c`, `[S, *B]` and `[*B]`.
        half_width: its certified half-width, `[*B]`.
        noise: rounding bound of the last step, `[*B]`.
        steps, status: backups and `Status`, `[*B]`.
        products: with a policy's chain, `[*B]`.
    """

    h: Array
    c: Array
    half_width: Array
    noise: Array
    steps: Array
    status: Array
    products: Array


Engine = Callable[[BoundProblem, Tolerance, Array, Array], Found]


def find(problem: BoundProblem, solver: Any) -> tuple[str, Engine] | None:
    """Find the kernel for a problem.

    Args:
        problem: the lanes; only its structure is looked at.
        solver: how it is to be solved.

    Returns:
        the platform on which the kernel runs, in the words of `lax.platform_dependent`, and a function of the problem,
        the tolerance `[*B]`, the cap on steps and a start `[S, *B]`; None where the problem is not eligible, there is
        no such platform, or the kernel failed its test.
    """
    place = resident_kernel.carrier()
    sizes = None if place is None else _eligible(problem, solver)
    if place is None or sizes is None or not resident_kernel.works(sizes, place):
        return None
    return place.platform, functools.partial(_solve, sizes, place, solver)


def _eligible(problem: BoundProblem, solver: Any) -> Sizes | None:
    reg, rows, (n_actions, n_states) = problem.regulariser, problem.transitions, problem.reward.shape[:2]
    if problem.proved is not None or problem.ball is not None:  # of which the kernel knows nothing
        return None
    if type(reg) not in (BoundKL, BoundAlpha) or type(solver) is not methods.Newton or solver.linear != "krylov":
        return None
    if (
        problem.averaged
        or problem.dtype != np.float32
        or math.prod(problem.batch) == 0
        or n_actions > _ACTIONS
        or n_states > _STATES
    ):
        return None
    if type(reg) is BoundAlpha and reg.alpha.shape[0] > 1:
        return None
    dense = isinstance(rows, Dense) and n_states <= _DENSE_STATES
    if not dense and not (isinstance(rows, BoundSuccessors) and rows.fan_out <= _SLOTS):
        return None
    sizes = Sizes(
        states=n_states,
        actions=n_actions,
        entries=entries(problem),
        slots=rows.fan_out,
        joint=entries(problem) == rows.fan_out,
        dense=dense,
        terms=float(4 + (rows.fan_out if problem.strict else min(rows.fan_out, 4 * rows.fan_out**0.5))),
        ends=problem.ends,
        alpha=type(reg) is BoundAlpha,
        state_prior=reg.log_prior.shape[1] > 1,
        state_beta=reg.beta.shape[0] > 1,
        inner_steps=solver.inner_steps,
        forcing=float(solver.forcing),
    )
    return sizes if sizes.blocks else None


def entries(problem: BoundProblem) -> int:
    """Successors of a state: those of all its actions one after the other, or those that its actions share."""
    rows = problem.transitions
    own = isinstance(rows, BoundSuccessors) and rows.indices.shape[1] == problem.reward.shape[0]
    return rows.fan_out * (problem.reward.shape[0] if own else 1)


def _solve(
    sizes: Sizes,
    place: Carrier,
    solver: methods.Newton,
    problem: BoundProblem,
    tol: Tolerance,
    limit: Array,
    h: Array,
) -> Found:
    """Lay a problem out for the kernel, run it, and lay its answers out like the loop's."""
    batch, n = problem.batch, math.prod(problem.batch)
    tables = _tables(sizes, problem)
    rows = [_rows_of_lanes(x.shape[x.ndim - len(batch) :], batch) for x, _ in tables]
    # (See `first_sweeps`. Their number is even: two share a turn.)
    most = round(SWEEPS * sizes.states**0.5) if solver.sweeps is None else solver.sweeps
    sweeps = _each(first_sweeps.of_lanes(problem, most, limit - 1), batch) // 2 * 2
    limits = jnp.minimum(jnp.minimum(limit, 2**30), solver.max_steps + sweeps).astype(jnp.int32)
    valid = _each(bellman.sound(problem), batch).astype(jnp.int32)
    integers = jnp.stack([*rows, limits, sweeps, valid], axis=-1)
    start = jnp.moveaxis(h.reshape(sizes.states, n), 0, 1)
    found = resident_kernel.function(sizes, place)(*(x for _, x in tables), _numbers(problem, tol), integers, start)
    value = jnp.moveaxis(found[0], 0, 1).reshape(sizes.states, *batch)
    return Found(value, *(x.reshape(batch) for x in found[1:]))


def _each(x: Array, batch: tuple[int, ...]) -> Array:
    """One number per lane, `[n]`."""
    return jnp.broadcast_to(x, batch).ravel()


def _numbers(problem: BoundProblem, tol: Tolerance) -> Array:
    """The numbers of each lane, `[n, 14]`, in the order of `Numbers` in certificate.cu."""
    reg, known = problem.regulariser, problem.magnitudes
    order = reg.alpha[0] - 1 if type(reg) is BoundAlpha else jnp.zeros((), problem.dtype)
    columns = (
        reg.beta[0],
        problem.discount,
        problem.complement,
        problem.horizon,
        bellman.ratio(problem),
        problem.deviation,
        jnp.where(tol.given, tol.value, -1),  # one number in the kernel: none is negative there
        known.reward,
        known.charged,
        known.limit,
        known.temperature,
        known.log_prior,
        jnp.max(reg.beta, axis=0),
        order,
    )
    return jnp.stack([_each(x, problem.batch) for x in columns], axis=-1)


def _rows_of_lanes(own: tuple[int, ...], batch: tuple[int, ...]) -> Array:
    """Row of a table with lanes' axes `own` that belongs to each lane of `batch`, `[n]`."""
    lane, row = jnp.arange(math.prod(batch), dtype=jnp.int32), jnp.zeros(math.prod(batch), jnp.int32)
    if math.prod(own) == 1:
        return row
    for axis, size in enumerate(own):
        if size > 1:
            place = lane // math.prod(batch[axis + 1 :]) % batch[axis]
            row = row + place * math.prod(own[axis + 1 :])
    return row


def _tables(sizes: Sizes, problem: BoundProblem) -> list[tuple[Array, Array]]:
    """The tables in the order of `TABLES`: each with its lanes' axes last, and as rows `[M, ...]` for the kernel."""
    reg, kernel, axes = problem.regulariser, problem.transitions, len(problem.batch)
    none = jnp.zeros((1,) * (1 + axes), problem.dtype)
    shape = (sizes.actions, sizes.states)

    def rows(x: Array) -> tuple[Array, Array]:
        """Lanes first, as one axis."""
        core = x.ndim - axes
        first = jnp.moveaxis(x, range(core), range(axes, x.ndim))
        return x, first.reshape(-1, *x.shape[:core])

    def whole(x: Array) -> Array:
        return jnp.broadcast_to(x, shape + x.shape[2:])

    if isinstance(kernel, Dense):
        near = none.astype(jnp.int32)
        p = jnp.moveaxis(kernel.probabilities, (-3, -2, -1), (0, 1, 2))
    else:
        assert isinstance(kernel, BoundSuccessors)
        near = jnp.swapaxes(kernel.indices, 0, 1).reshape(sizes.entries, sizes.states).astype(jnp.int32)
        near = near.reshape(near.shape + (1,) * axes)
        p = jnp.swapaxes(kernel.probabilities, 0, 1)
    exit_rate = whole(problem.exit_rate) if sizes.ends else none
    beta = reg.beta if sizes.state_beta else none
    return [rows(x) for x in (near, p, whole(problem.reward), exit_rate, reg.log_prior, beta)]
