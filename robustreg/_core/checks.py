"""Checks and conversions that factories make on the host, in double precision, before anything is traced.

A check names its first offender and the remedy. A tracer (inside `jax.jit`, `vmap`, `grad`) has a shape and a
dtype but no value: shapes are checked always, values only where they exist.
"""

import contextlib
import functools
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from robustreg._core import forks

_T = TypeVar("_T")

# Files of a container's share of the processor, in the older layout: microseconds, and of how many.
_CGROUP_1 = [("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")]


def cores() -> int:
    """Count the processor cores that this process may use: of its affinity, and of its control group (containers)."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for quota, period in (("/sys/fs/cgroup/cpu.max", None), *_CGROUP_1):
        with contextlib.suppress(OSError, ValueError):
            words = Path(quota).read_text().split()
            words = words if period is None else [*words, Path(period).read_text()]
            if float(words[0]) > 0:  # "max" and -1 are no limit
                allowed = min(allowed, float(words[0]) / float(words[1]))
            break
    return max(1, int(allowed))


def is_traced(*values: Any) -> bool:
    """Tell whether any array among `values` (pytrees) is a tracer."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def number(name: str, value: Any) -> Any:
    """Read a number: tracers as they are, containers of tracers stacked, all else as a float64 NumPy array.

    Raises:
        TypeError: if `value` is not numeric.
        ValueError: if it is a ragged nested sequence.
    """
    forks.refuse()
    if isinstance(value, Tracer):
        return value
    if is_traced(value):
        return jnp.asarray(value)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is a ragged nested sequence; pass an array with one length per axis") from error
    if not _is_real(array.dtype):
        raise TypeError(f"{name} has dtype {array.dtype}; pass an array of real numbers")
    return array.astype(np.float64)


def working_dtype(*values: Any) -> np.dtype:
    """Return the floating dtype that inputs ask for, at least float32, as JAX is configured to hold it.

    Arrays with axes decide, scalars and Python lists only follow (a list of floats beside a float32 array
    does not promote it); with no floating array at all, JAX's default. float64 becomes float32 without x64.
    """
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(values) if getattr(leaf, "ndim", 0) > 0}
    floating = [d for d in dtypes if _is_floating(d)]
    narrow = bool(floating) and all(d.itemsize <= 4 for d in floating)
    return np.dtype(np.float32) if narrow else np.dtype(jax.dtypes.canonicalize_dtype(np.float64))


def canonical(tree: _T, dtype: np.dtype | None = None) -> _T:
    """Cast floating arrays to the precision in which JAX computes at present.

    A float64 array that was made under `jax.enable_x64()` keeps its dtype outside, where arithmetic is that of
    float32: an epsilon taken from its dtype would be wrong by nine digits.

    Args:
        tree: any pytree; leaves may be tracers. Leaves that are no floating arrays stay as they are.
        dtype: of all floating arrays; None: float64 becomes float32 where JAX has no float64, all else stays.

    Returns:
        The same tree; the very same object where there is nothing to cast.
    """
    forks.refuse()
    leaves, structure = jax.tree.flatten(tree)
    # Of few dtypes, hence quick: nearly always there is nothing to do.
    found = {leaf.dtype for leaf in leaves if hasattr(leaf, "dtype")}
    wanted = {d: jax.dtypes.canonicalize_dtype(d) if dtype is None else dtype for d in found if _is_floating(d)}
    if all(d == new for d, new in wanted.items()):
        return tree
    return jax.tree.unflatten(structure, [_cast(leaf, wanted) for leaf in leaves])


def operand(name: str, x: Any, dtype: Any) -> Any:
    """Read an argument of a compiled program in the dtype it takes; names it where it is none, as `array` does.

    Numbers stay with NumPy: to put one on a device takes 50 us, which is what a small solve takes as well.
    """
    numbers = isinstance(x, np.generic | np.ndarray) and _is_real(x.dtype)
    if numbers or (isinstance(x, int | float) and abs(x) < 2**63):
        return np.asarray(x, dtype)
    return array(name, x, dtype)


def array(name: str, value: Any, dtype: Any = None) -> jax.Array:
    """Convert an argument to a JAX array of real numbers, in `dtype` or its own, in the byte order of this machine.

    Raises:
        TypeError, ValueError: if it is none; the message says which argument, and what it is instead.
    """
    forks.refuse()
    try:
        if isinstance(value, np.ndarray) and not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
        known = isinstance(value, jax.Array | np.ndarray)
        # (Older releases of JAX only warn of text.)
        if not known and any(isinstance(leaf, str | bytes) for leaf in jax.tree.leaves(value)):
            raise TypeError("text")
        x = value if known else jnp.asarray(value)
        if not _is_real(x.dtype):
            raise TypeError(f"dtype {x.dtype}")
        return jnp.asarray(x, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        why = str(error).split("\n")[0][:100]
        raise kind(f"{name} must be an array of real numbers, got {type(value).__name__} ({why})") from error


@functools.cache
def _is_real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def flag(name: str, value: Any) -> bool:
    """Read a truth value; what merely has one is a mistake, such as a number in the place of another argument."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return bool(value)


def check_tol(tol: Any, default: str) -> None:
    """Refuse a tolerance that is no positive number; `default` says what None means. No check on a tracer."""
    if tol is None or is_traced(tol):
        return
    values = number("tol", tol)
    if np.asarray(tol).dtype.kind == "b":
        raise TypeError(f"tol must be a number, got {tol}")
    if not values.size or not np.all((values > 0) & (values < np.inf)):
        raise ValueError(f"tol must be positive and finite, got {tol}; {default}")


@functools.cache
def _is_floating(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _cast(x: Any, wanted: dict[Any, Any]) -> Any:
    """A leaf in the dtype that is wanted in the place of its own."""
    old = getattr(x, "dtype", None)
    new: Any = wanted.get(old, old)
    return x if new == old else jax.lax.convert_element_type(x, new)


def tolerance(value: Any) -> tuple[float, str]:
    """Say by how much probabilities may miss their sum, and in words: 1e-10 for float64 data, 1e-6 below.

    Data without a dtype (lists) and integers were made in double precision.
    """
    dtypes = [np.dtype(leaf.dtype) for leaf in jax.tree.leaves(value) if hasattr(leaf, "dtype")]
    coarse = [d for d in dtypes if jnp.issubdtype(d, jnp.floating) and d.itemsize < 8]
    return (1e-6, f"tolerance 1e-6 for {coarse[0]}") if coarse else (1e-10, "tolerance 1e-10 for float64")


def show(x: Any, unlike: Any = 0.0) -> str:
    """Write a number with enough digits to see by how much it differs from `unlike`, and no more."""
    x, allowed = float(x), 0.01 * abs(float(x) - float(unlike))
    shown = (f"{x:.{digits}g}" for digits in range(4, 17))
    return next((text for text in shown if abs(float(text) - x) <= allowed), repr(x))


def place(name: str, index: tuple[int, ...], axes: tuple[str, ...]) -> str:
    """Write `name[lane=2, s=3, a=1]`: leading axes beyond the named ones are batch lanes."""
    lanes = index[: len(index) - len(axes)]
    lane = [f"lane={lanes[0] if len(lanes) == 1 else lanes}"] if lanes else []
    named = [f"{axis}={i}" for axis, i in zip(axes, index[len(lanes) :], strict=True)]
    return f"{name}[{', '.join(lane + named)}]" if index else name


def first(bad: np.ndarray) -> tuple[int, ...] | None:
    """Index of the first true entry, or None."""
    if not bad.any():
        return None
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))


def refuse(name: str, x: Any, bad: Any, axes: tuple[str, ...], rule: str) -> None:
    """Raise a `ValueError` on the first entry of `x` that is `bad`; `rule` says what holds and what to do."""
    index = first(bad)
    if index is not None:
        raise ValueError(f"{place(name, index, axes)} is {show(x[index], 1.0)}; {rule}")


def require(name: str, x: Any, good: Callable[[Any], Any], rule: str) -> None:
    """Refuse the first number that is not `good`; no check on a tracer."""
    values = number(name, x)
    if not is_traced(values):
        refuse(name, values, ~good(values), (), rule)


def refuse_improper(name: str, x: Any, axes: tuple[str, ...]) -> None:
    """Refuse the first entry of `x` that is no probability; no check on a tracer."""
    if not is_traced(x):
        refuse(name, x, ~np.isfinite(x), axes, "probabilities must be finite; find what produced it upstream")
        refuse(name, x, x < 0, axes, "probabilities must not be negative; clip or correct the data")


def check_rows(sums: np.ndarray, target: Any, ends: bool, margin: tuple[float, str], normalise: bool) -> None:
    """Refuse the first row of P whose sum misses `target = 1 - termination` (or, rescaling, is 0)."""
    sums, target = np.broadcast_arrays(sums, target)
    close = np.abs(sums - target) <= margin[0]
    index = first((sums <= 0) & ~close if normalise else ~close)
    if index is None:
        return
    row, end = (place(name, index, ("s", "a")) for name in ("transitions", "termination"))
    wanted = f"{show(target[index])} = 1 - {end}" if ends else "1"
    message = f"{row} sum to {show(sums[index], target[index])}, not {wanted} ({margin[1]}); "
    missing = "if the state has no such action, pass available=[S, A] with False there"
    if normalise:
        rule = "a row without successors cannot be normalised: give it one, or termination 1"
        raise ValueError(f"{message}{rule}; {missing}")
    if sums[index] == 0:
        raise ValueError(f"{message}{missing}; if the episode ends there, termination 1")
    message += "renormalise, or pass normalise=True"
    if sums[index] < 1 and not ends:
        message += "; if the episode ends with the rest of the probability, pass termination=1 - P.sum(-1)"
    raise ValueError(message)


def expect_shape(name: str, shape: tuple[int, ...], core: tuple[int, ...], letters: str, remedy: str = "") -> None:
    """Refuse a shape that does not end in `core` (`letters` names it); leading axes are batch axes."""
    if len(shape) < len(core) or tuple(shape[len(shape) - len(core) :]) != core:
        wanted = ", ".join(map(str, core))
        hint = f"; {remedy}" if remedy else ""
        raise ValueError(f"{name} has shape {tuple(shape)}; expected [*B, {letters}] = [*B, {wanted}]{hint}")


def layout_of(p: Any, layout: str | None) -> str:
    """Find the layout of `p`, given or evident; refuses one that does not fit and one that cannot be told."""
    if p.ndim < 3 or 0 in p.shape:
        raise ValueError(
            f'transitions has shape {p.shape}; expected [S, A, S], or [A, S, S] with layout="ass", none empty'
        )
    x, y, z = p.shape[-3:]
    fits = {"sas": x == z, "ass": y == z}
    if layout is None and x == y == z > 1 and (is_traced(p) or (p != p.swapaxes(-3, -2)).any()):
        raise ValueError(
            f"transitions has shape {p.shape} with S == A, which does not tell [S, A, S] from [A, S, S]; "
            'pass layout="sas" or layout="ass"'
        )
    layout = layout or "sas"
    if fits[layout]:
        return layout
    other = "ass" if layout == "sas" else "sas"
    if fits[other]:
        letters = {"sas": "[S, A, S]", "ass": "[A, S, S]"}
        raise ValueError(f'transitions has shape {p.shape}, which only fits {letters[other]}; pass layout="{other}"')
    raise ValueError(f"transitions has shape {p.shape}; expected [S, A, S], one row of S probabilities per (s, a)")


def check_policy(policy: Any, core: tuple[int, ...], letters: str) -> None:
    """Refuse a policy of another shape, and a concrete one that is no distribution over actions."""
    expect_shape("policy", policy.shape, core, letters, "one distribution over actions per state")
    if is_traced(policy):
        return
    p = np.asarray(policy, np.float64)
    axes = ("s", "a")[2 - len(core) :]
    refuse("policy", p, p < 0, axes, "probabilities must not be negative")
    total = p.sum(-1)
    margin = 1e-4 if policy.dtype.itemsize <= 4 else 1e-8
    rule = f"a policy sums to 1 over actions (tolerance {margin:g}): divide it by its sum"
    refuse("policy", total, np.abs(total - 1) > margin, axes[:-1], rule)


def check_weights(name: str, weights: Any, n_states: int) -> None:
    """Refuse weights that are not one per state, and concrete ones that are negative or not finite."""
    expect_shape(name, weights.shape, (n_states,), "S", "one per state")
    if not is_traced(weights):
        w = np.asarray(weights, np.float64)
        refuse(name, w, ~((w >= 0) & (w < np.inf)), ("s",), f"{name} are finite and not negative")


def expect_type(value: Any, kind: type, position: str, source: str) -> None:
    """Refuse an argument of another class (of any, in a process that cannot compute: see `forks`)."""
    forks.refuse()
    if not isinstance(value, kind):
        article = "an" if kind.__name__ == "MDP" else "a"
        name = kind.__name__ if kind.__name__[1].isupper() else kind.__name__.lower()
        raise TypeError(f"the {position} must be {article} {name} (see robustreg.{source}), got {type(value).__name__}")


def check_batches(axes: dict[str, tuple[int, ...]]) -> None:
    """Refuse batch axes (given per argument) that do not broadcast."""
    try:
        jnp.broadcast_shapes(*axes.values())
    except ValueError:
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in axes.items() if shape)
        raise ValueError(
            f"batch axes do not broadcast: {shown}; give each the same leading axes, or insert axes of size 1"
        ) from None


def pack_successors(
    row: np.ndarray, successor: np.ndarray, probability: np.ndarray, n_states: int, n_actions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Padded successor lists from entries in any order; repeated successors of a row are accumulated.

    Args:
        row: `s * A + a` of each entry.
        successor: its successor state.
        probability: its probability.
        n_states: S.
        n_actions: A.

    Returns:
        indices int32 and probabilities float64, `[S, A, K]`: successors ascending, then padding with 0.
    """
    present = probability != 0
    row, successor, probability = row[present], successor[present], probability[present]
    keys, inverse = np.unique(row.astype(np.int64) * n_states + successor, return_inverse=True)
    summed = np.bincount(inverse.reshape(-1), weights=probability, minlength=keys.size)
    row, successor = keys // n_states, keys % n_states
    counts = np.bincount(row, minlength=n_states * n_actions)
    slot = np.arange(keys.size) - (np.cumsum(counts) - counts)[row]
    shape = (n_states * n_actions, max(1, int(counts.max(initial=0))))
    indices, probabilities = np.zeros(shape, np.int32), np.zeros(shape)
    indices[row, slot], probabilities[row, slot] = successor, summed
    return indices.reshape(n_states, n_actions, -1), probabilities.reshape(n_states, n_actions, -1)


def pack_sparse(matrices: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Padded successor lists from one SciPy sparse `[S, S]` per action; only `tocoo` and `shape` are used."""
    n_states = next(matrix.shape[0] for matrix in matrices if hasattr(matrix, "tocoo"))
    entries = []
    for a, matrix in enumerate(matrices):
        if not hasattr(matrix, "tocoo") or matrix.shape != (n_states, n_states):
            got = f"transitions[{a}] is {type(matrix).__name__} of shape {np.shape(matrix)}"
            raise ValueError(f"{got}; pass one sparse [S, S] = [{n_states}, {n_states}] per action")
        coo = matrix.tocoo()
        data = number(f"transitions[{a}]", coo.data)
        entries.append((coo.row.astype(np.int64) * len(matrices) + a, coo.col, data))
    row, successor, probability = (np.concatenate(part) for part in zip(*entries))
    return pack_successors(row, successor, probability, n_states, len(matrices))


def count(name: str, value: Any, least: int = 1) -> int:
    """Read an integer of some size, whatever integer type it came in."""
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, the same for all lanes, got {value!r}") from None
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if found < least:
        raise ValueError(f"{name} must be at least {least}, got {found}")
    return found
