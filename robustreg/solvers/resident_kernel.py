"""The CUDA kernel of `robustreg.solvers.resident`: its text for the sizes at hand, a function of arrays, and its test.

The kernel is compiled for the number of states, actions and successors, so that what a thread holds of them is in
registers. It lies in `solvers/cuda` in five parts: conjugates of one state, certificate, Krylov solver, rows and
chains, and the loop. A block of threads solves a lane; thread t holds states t, t + threads, ... of every vector, and
only the vector that is gathered from is in shared memory.
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

from robustreg.solvers import ffi, nvrtc

# States of a thread, and weights that it keeps in registers; registers of a multiprocessor, and of a thread.
OWN, KEPT, REGISTERS, EACH = 4, 40, 65536, 128
# Entries of a dense row that a thread keeps in registers (HELD in rows.cu).
_HELD = 64
_FILES = ("conjugates.cu", "certificate.cu", "krylov.cu", "rows.cu", "solve.cu")
_warned: list[str] = []
TABLES = ("near", "probabilities", "reward", "leave", "prior", "beta")


class Sizes(NamedTuple):
    """Hold what a kernel is compiled for.

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
        places = 2 ** math.ceil(math.log2(self.states if self.dense else self.states / OWN))
        return max(32, self.copies * max(places, 4))

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor has registers for."""
        return REGISTERS // (EACH * self.threads)

    @property
    def shared(self) -> int:
        """Bytes of shared memory for what registers do not hold of dense rows."""
        return 4 * self.threads * max(self.states - _HELD, 0) if self.dense else 0

    def source(self) -> str:
        """Write the kernel's text for these sizes."""
        own = -(-self.states * self.copies // self.threads)
        numbers = {name.upper(): int(value) for name, value in self._asdict().items() if not isinstance(value, float)}
        numbers |= {"THREADS": self.threads, "BLOCKS": self.blocks, "COPIES": self.copies}
        numbers |= {"KEPT": int(own * self.entries <= KEPT)}
        texts = {"TERMS": self.terms, "FORCING": self.forcing, "LOG_ACTIONS": math.log(self.actions)}
        lines = [f"#define {name} {value}" for name, value in numbers.items()]
        lines += [f"#define {name} {value:.9e}f" for name, value in texts.items()]
        folder = resources.files("robustreg.solvers") / "cuda"
        lines += ["#define DEVICE __device__ __forceinline__", *((folder / name).read_text() for name in _FILES)]
        return "\n".join(lines)


class Carrier(Protocol):
    """Where kernels run: `platform` in the words of `lax.platform_dependent`, `target` in those of `jax.ffi`."""

    @property
    def platform(self) -> str: ...

    @property
    def target(self) -> str: ...

    def kernel(self, sizes: Sizes) -> ffi.Launch:
        """Return a kernel for these sizes."""
        ...


class _Cuda:
    platform, target = "cuda", "CUDA"

    def kernel(self, sizes: Sizes) -> ffi.Launch:
        return nvrtc.Kernel(sizes.source(), "solve", sizes.threads, sizes.shared)


@functools.cache
def cuda() -> Carrier | None:
    """CUDA devices of this process, if there are any."""
    try:
        return _Cuda() if jax.local_devices(backend="cuda") else None
    except RuntimeError:
        return None


def carrier() -> Carrier | None:
    """Tell where kernels run in this process; None: nowhere, or nobody asked for them."""
    return cuda() if os.environ.get("ROBUSTREG_KERNEL") == "1" else None


@functools.cache
def function(sizes: Sizes, place: Carrier) -> Callable[..., Sequence[Array]]:
    """Wrap the kernel as a function of tables `[M, ...]`, numbers `[n, 14]`, integers `[n, 9]`, starts `[n, S]`.

    Batch axes of `jax.vmap` become more lanes of one launch, and more rows of the tables that have them.
    """
    # A program that comes back from a cache on disk finds the same kernel by this name.
    target = f"robustreg_{hashlib.sha256(sizes.source().encode()).hexdigest()[:16]}"
    ffi.register(target, place.target, place.kernel(sizes))

    @custom_vmap
    def run(*args: Array) -> Sequence[Array]:
        n = args[-1].shape[0]
        floats = [jax.ShapeDtypeStruct(s, np.float32) for s in ((n, sizes.states), (n,), (n,), (n,))]
        integers = [jax.ShapeDtypeStruct((n,), np.int32)] * 3
        return jax.ffi.ffi_call(target, floats + integers, vmap_method="sequential")(*args)

    @run.def_vmap
    def _(size: int, batched: Any, *args: Array) -> tuple[list[Array], list[bool]]:
        tables, lanes, own = args[: len(TABLES)], args[len(TABLES) :], batched[: len(TABLES)]
        lanes = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(lanes, batched[len(TABLES) :])]
        # Element i of the batch has the tables' rows from i M on.
        steps = np.array([x.shape[1] if b else 0 for x, b in zip(tables, own)] + [0] * 3, np.int32)
        lanes[1] = lanes[1] + jnp.arange(size, dtype=jnp.int32)[:, None, None] * jnp.asarray(steps)[None, None]
        tables = [x.reshape(-1, *x.shape[2:]) if b else x for x, b in zip(tables, own)]
        found = run(*tables, *(x.reshape(-1, *x.shape[2:]) for x in lanes))
        return [x.reshape(size, -1, *x.shape[1:]) for x in found], [True] * len(found)

    return run


@functools.cache
def works(sizes: Sizes, place: Carrier) -> bool:
    """Tell whether the kernel solves a problem of these sizes as it is solved here; warns if it does not."""
    try:
        error = _error_of_test(sizes, place)
    except Exception as failure:  # whatever it is, the loop can do without the kernel
        error = f"{type(failure).__name__}: {failure}"
    if error:
        _warn(error)
    return not error


def _warn(error: str) -> None:
    """Say so, once in a process."""
    if not _warned:
        _warned.append(error)
        text = f"robustreg solves without its CUDA kernel, which failed its test: {error[:2000]}"
        warnings.warn(text, stacklevel=2)


def _error_of_test(sizes: Sizes, place: Carrier) -> str:
    """Tell what is wrong with the kernel's answers to two lanes of a random problem, "" if nothing."""
    arguments, value = trial(sizes)
    with jax.ensure_compile_time_eval():
        device = jax.local_devices(backend=place.platform)[0]
        found = jax.jit(function(sizes, place))(*jax.device_put(arguments, device))
        h, c, half_width, _, _, status, _ = (np.asarray(x) for x in found)
    error = np.abs(h.astype(float) + c[:, None] - value).max(axis=1)
    right = (status == 0).all() and (error <= half_width).all() and (half_width <= 1.01e-4).all()
    return "" if right else f"status {status}, errors {error}, certified {half_width}"


def trial(sizes: Sizes) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
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
