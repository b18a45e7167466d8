"""Solves that stay on the chip: on a CUDA device, one kernel runs the whole certified solve of a lane in one block.

The loop of `solve` returns to the device's memory, and to the host, at every product with a policy's chain, and all
lanes wait for the slowest. The kernel in `robustreg/cuda` keeps the vectors of one lane in registers and shared memory
from the first backup to the last, and stops every lane by itself. It is Newton's method with the same Krylov solver,
stopping rule, status and certificate, formula by formula; the first proposal is some plain sweeps, which are counted as
steps. So a lane ends with a value as certain as the loop's, not with the same digits: both lie in their intervals.

`find` tells from static facts whether a problem is eligible, and everything else is left to the loop: float32, KL and
alpha-divergences, `Newton` with Krylov solves, successor lists or dense kernels of at most 128 states, at most 16
actions and 16 successors, 2,048 states. The kernel is compiled for the sizes at hand by the NVRTC that `jax[cuda12]`
brings (about a second, once per process and sizes), and checked against a small problem before it is used; where that
fails, the loop takes over with one warning.

`ROBUSTREG_KERNEL=0` in the environment leaves everything to the loop. It is read when a solve is traced: set it before
the first one. A program that `jax.export` is to carry to other machines has to be traced so: a kernel that is compiled
here is not part of it.
"""

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap

from robustreg import _ffi, _nvrtc, bellman, solvers
from robustreg.regularisers import KL, Alpha
from robustreg.successors import BoundSuccessors
from robustreg.transitions import Dense

_STATES, _DENSE_STATES, _ACTIONS, _SLOTS = 2048, 128, 16, 16
# States of a thread, and weights that it keeps in registers; registers of a multiprocessor, and of a thread.
_OWN, _KEPT, _REGISTERS, _EACH = 4, 40, 65536, 128
# Plain sweeps before the first Newton step, by the square root of the number of states, and by the horizon.
_SWEEPS, _SWEEPS_OF_HORIZON = 2, 2
_FILES = ("conjugates.cu", "certificate.cu", "krylov.cu", "rows.cu", "solve.cu")
_TABLES = ("near", "probabilities", "reward", "leave", "prior", "beta")


class Sizes(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        states, actions: S and A.
        entries, slots: successors of a state and of an action.
        joint: whether the actions of a state share its list of successors.
        dense: whether every state is a successor, in order.
        terms: roundings that count of one expectation, see `bellman.rounding`.
        ends: whether episodes end.
        alpha: whether the divergence has an order.
        state_prior, state_beta: whether states have their own.
        inner_steps, forcing: of `Newton`.
    """

    states: int
    actions: int
    entries: int
    slots: int
    joint: bool
    dense: bool
    terms: float
    ends: bool
    alpha: bool
    state_prior: bool
    state_beta: bool
    inner_steps: int
    forcing: float

    @property
    def copies(self) -> int:
        """Threads that share a state: one per action of a dense row."""
        return 2 ** math.ceil(math.log2(self.actions)) if self.dense else 1

    @property
    def threads(self) -> int:
        """Threads of a block: a power of two."""
        places = 2 ** math.ceil(math.log2(self.states if self.dense else self.states / _OWN))
        return max(32, self.copies * max(places, 4))

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor has registers for."""
        each = _EACH if not self.dense or self.states <= _DENSE_STATES // 2 else 2 * _EACH
        return _REGISTERS // (each * self.threads)

    def source(self) -> str:
        """The kernel's text for these sizes."""
        own = -(-self.states * self.copies // self.threads)
        numbers = {name.upper(): int(value) for name, value in self._asdict().items() if not isinstance(value, float)}
        numbers |= {"THREADS": self.threads, "BLOCKS": self.blocks, "COPIES": self.copies}
        numbers |= {"KEPT": int(own * self.entries <= _KEPT)}
        texts = {"TERMS": self.terms, "FORCING": self.forcing, "LOG_ACTIONS": math.log(self.actions)}
        lines = [f"#define {name} {value}" for name, value in numbers.items()]
        lines += [f"#define {name} {value:.9e}f" for name, value in texts.items()]
        folder = resources.files("robustreg") / "cuda"
        lines += ["#define DEVICE __device__ __forceinline__", *((folder / name).read_text() for name in _FILES)]
        return "\n".join(lines)


class Carrier(Protocol):
    """Where kernels run: `platform` in the words of `lax.platform_dependent`, `target` in those of `jax.ffi`."""

    @property
    def platform(self) -> str: ...

    @property
    def target(self) -> str: ...

    def kernel(self, sizes: Sizes) -> _ffi.Launch:
        """A kernel for these sizes."""
        ...


class _Cuda:
    platform, target = "cuda", "CUDA"

    def kernel(self, sizes: Sizes) -> _ffi.Launch:
        return _nvrtc.Kernel(sizes.source(), "solve", sizes.threads)


@functools.cache
def _cuda() -> Carrier | None:
    try:
        return _Cuda() if jax.local_devices(backend="cuda") else None
    except RuntimeError:
        return None


def carrier() -> Carrier | None:
    """Where kernels run in this process; None: nowhere."""
    return None if os.environ.get("ROBUSTREG_KERNEL") == "0" else _cuda()


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


Engine = Callable[[bellman.Lanes, Array, Array, Array], Found]


def find(problem: bellman.Lanes, solver: Any) -> tuple[str, Engine] | None:
    """Find the kernel for a problem.

    Args:
        problem: the lanes; only its structure is looked at.
        solver: how it is to be solved.

    Returns:
        the platform on which the kernel runs, in the words of `lax.platform_dependent`, and a function of the problem,
        `tol [*B]`, the cap on steps and a start `[S, *B]`; None where the problem is not eligible, there is no such
        platform, or the kernel failed its test.
    """
    place = carrier()
    sizes = None if place is None else _eligible(problem, solver)
    if place is None or sizes is None or not _tested(sizes, place):
        return None
    return place.platform, functools.partial(_solve, sizes, place, solver)


def _eligible(problem: bellman.Lanes, solver: Any) -> Sizes | None:
    reg, rows, (n_actions, n_states) = problem.regulariser, problem.transitions, problem.reward.shape[:2]
    if type(reg) not in (KL, Alpha) or type(solver) is not solvers.Newton or solver.linear != "krylov":
        return None
    if problem.dtype != np.float32 or math.prod(problem.batch) == 0 or n_actions > _ACTIONS or n_states > _STATES:
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
        alpha=type(reg) is Alpha,
        state_prior=reg._prior.shape[1] > 1,
        state_beta=reg.beta.shape[0] > 1,
        inner_steps=solver.inner_steps,
        forcing=float(solver.forcing),
    )
    return sizes if sizes.blocks else None


def entries(problem: bellman.Lanes) -> int:
    """Successors of a state: those of all its actions one after the other, or those that its actions share."""
    rows = problem.transitions
    own = isinstance(rows, BoundSuccessors) and rows.indices.shape[1] == problem.reward.shape[0]
    return rows.fan_out * (problem.reward.shape[0] if own else 1)


def _solve(
    sizes: Sizes, place: Carrier, solver: solvers.Newton, problem: bellman.Lanes, tol: Array, limit: Array, h: Array
) -> Found:
    """Lay a problem out for the kernel, run it, and lay its answers out like the loop's."""
    batch, n = problem.batch, math.prod(problem.batch)
    tables = _tables(sizes, problem)
    rows = [_rows_of_lanes(x.shape[x.ndim - len(batch) :], batch) for x, _ in tables]
    # Plain sweeps cost less than products and bring a policy worth evaluating, unless episodes are over before.
    sweeps = jnp.minimum(
        round(_SWEEPS * sizes.states**0.5), jnp.ceil(_SWEEPS_OF_HORIZON * _each(problem.horizon, batch))
    ).astype(jnp.int32)
    limits = jnp.minimum(jnp.minimum(limit, 2**30), solver.max_steps + sweeps).astype(jnp.int32)
    sweeps = jnp.clip(sweeps, 0, jnp.maximum(limits - 2, 0))
    valid = _each(bellman.sound(problem), batch).astype(jnp.int32)
    integers = jnp.stack([*rows, limits, sweeps, valid], axis=-1)
    start = jnp.moveaxis(h.reshape(sizes.states, n), 0, 1)
    found = _launch(sizes, place)(*(x for _, x in tables), _numbers(problem, tol), integers, start)
    value = jnp.moveaxis(found[0], 0, 1).reshape(sizes.states, *batch)
    return Found(value, *(x.reshape(batch) for x in found[1:]))


def _each(x: Array, batch: tuple[int, ...]) -> Array:
    """One number per lane, `[n]`."""
    return jnp.broadcast_to(x, batch).ravel()


def _numbers(problem: bellman.Lanes, tol: Array) -> Array:
    """The numbers of each lane, `[n, 14]`, in the order of `Numbers` in certificate.cu."""
    reg, known = problem.regulariser, problem.magnitudes
    order = reg.alpha[0] - 1 if type(reg) is Alpha else jnp.zeros((), problem.dtype)
    columns = (
        reg.beta[0],
        problem.discount,
        problem.complement,
        problem.horizon,
        bellman.ratio(problem),
        problem.deviation,
        tol,
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


def _tables(sizes: Sizes, problem: bellman.Lanes) -> list[tuple[Array, Array]]:
    """The tables in the order of `_TABLES`: each with its lanes' axes last, and as rows `[M, ...]` for the kernel."""
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
    leave = whole(problem.leave) if sizes.ends else none
    beta = reg.beta if sizes.state_beta else none
    return [rows(x) for x in (near, p, whole(problem.reward), leave, reg._prior, beta)]


@functools.cache
def _launch(sizes: Sizes, place: Carrier) -> Callable[..., Sequence[Array]]:
    """The kernel as a function of tables `[M, ...]`, numbers `[n, 14]`, integers `[n, 9]` and starts `[n, S]`.

    Batch axes of `jax.vmap` become more lanes of one launch, and more rows of the tables that have them.
    """
    # A program that comes back from a cache on disk finds the same kernel by this name.
    target = f"robustreg_{hashlib.sha256(sizes.source().encode()).hexdigest()[:16]}"
    _ffi.register(target, place.target, place.kernel(sizes))

    @custom_vmap
    def run(*args: Array) -> Sequence[Array]:
        n = args[-1].shape[0]
        floats = [jax.ShapeDtypeStruct(s, np.float32) for s in ((n, sizes.states), (n,), (n,), (n,))]
        integers = [jax.ShapeDtypeStruct((n,), np.int32)] * 3
        return jax.ffi.ffi_call(target, floats + integers, vmap_method="sequential")(*args)

    @run.def_vmap
    def _(size: int, batched: Any, *args: Array) -> tuple[list[Array], list[bool]]:
        tables, lanes, own = args[: len(_TABLES)], args[len(_TABLES) :], batched[: len(_TABLES)]
        lanes = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(lanes, batched[len(_TABLES) :])]
        # Element i of the batch has the tables' rows from i M on.
        steps = np.array([x.shape[1] if b else 0 for x, b in zip(tables, own)] + [0] * 3, np.int32)
        lanes[1] = lanes[1] + jnp.arange(size, dtype=jnp.int32)[:, None, None] * jnp.asarray(steps)[None, None]
        tables = [x.reshape(-1, *x.shape[2:]) if b else x for x, b in zip(tables, own)]
        found = run(*tables, *(x.reshape(-1, *x.shape[2:]) for x in lanes))
        return [x.reshape(size, -1, *x.shape[1:]) for x in found], [True] * len(found)

    return run


@functools.cache
def _tested(sizes: Sizes, place: Carrier) -> bool:
    """Whether the kernel solves a problem of these sizes that is solved here as well; warns if it does not."""
    try:
        error = _error_of_test(sizes, place)
    except Exception as failure:  # whatever it is, the loop can do without the kernel
        error = f"{type(failure).__name__}: {failure}"
    if error:
        _warn(error)
    return not error


@functools.cache
def _warn(error: str) -> None:
    warnings.warn(f"robustreg solves without its CUDA kernel, which failed its test: {error[:2000]}", stacklevel=2)


def _error_of_test(sizes: Sizes, place: Carrier) -> str:
    """What is wrong with the kernel's answers to two lanes of a random problem, "" if nothing."""
    arguments, value = _test_problem(sizes)
    with jax.ensure_compile_time_eval():
        device = jax.local_devices(backend=place.platform)[0]
        found = jax.jit(_launch(sizes, place))(*jax.device_put(arguments, device))
        h, c, half_width, _, _, status, _ = (np.asarray(x) for x in found)
    error = np.abs(h.astype(float) + c[:, None] - value).max(axis=1)
    right = (status == 0).all() and (error <= half_width).all() and (half_width <= 1.01e-4).all()
    return "" if right else f"status {status}, errors {error}, certified {half_width}"


def _test_problem(sizes: Sizes) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Arguments of a kernel for two lanes of a random problem, and the values `[2, S]`."""
    rng, s, a = np.random.default_rng(0), sizes.states, sizes.actions
    near = (np.arange(s) + np.arange(sizes.entries)[:, None] ** 2) % s
    if sizes.dense:
        near = np.broadcast_to(np.arange(s)[:, None], (s, s))
    p = rng.random((a, sizes.slots, s)) + 0.1
    p = (p / p.sum(1, keepdims=True)).astype(np.float32)
    reward, betas = rng.random((a, s)).astype(np.float32), np.array([0.5, 8], np.float32)
    value = np.zeros((2, s))
    for _ in range(60):  # at a discount of one half
        q = reward + 0.5 * np.sum(p * value[:, near].reshape(2, -1, sizes.slots, s), axis=2)
        value = np.log(np.mean(np.exp(betas[:, None, None] * q), axis=1)) / betas[:, None]
    floats = (
        (p.transpose(2, 0, 1) if sizes.dense else p)[None],
        reward[None],
        np.full((1, a, s), 0.5),
        np.full((1, a, s if sizes.state_prior else 1), -math.log(a)),
        np.broadcast_to(betas[:, None], (2, s)),
        [[b, 0.5, 0.5, 2, 1, 0, 1e-4, 1, 1, 100, 1 / b, math.log(a), b, 0] for b in betas],
    )
    integers = np.asarray([[0, 0, 0, 0, 0, i * sizes.state_beta, 200, 4, 1] for i in range(2)], np.int32)
    tables = (near[None], *floats)
    whole = [np.ascontiguousarray(x, np.int32 if i == 0 else np.float32) for i, x in enumerate(tables)]
    return (*whole, integers, np.zeros((2, s), np.float32)), value
