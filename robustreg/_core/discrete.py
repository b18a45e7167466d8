"""Whole numbers and truth values that are leaves of floating numbers.

`jax.grad` takes floating leaves only, and optimisers add to every leaf. An MDP has leaves that are neither to be
differentiated nor to be changed: successor lists hold numbers of states, masks hold truth values. As static metadata
they would compile a program for every MDP. So they are floating numbers wherever JAX looks at leaves, and what they are
wherever the library does: a pytree is flattened to floats, and rebuilt from floats by rounding. Their gradient is 0.

The pairs of arrays are remembered for as long as the first of them lives: nothing is converted twice, and a tree that
went through `jax.tree.map` unchanged holds the very array that it held before.
"""

import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

_EXACT = 2**24  # of single precision: whole numbers up to here are told apart
_SINGLE = np.dtype(np.float32)

_floats: dict[int, Array] = {}
_originals: dict[int, Any] = {}


def as_leaves(leaves: tuple[Any, ...], kinds: tuple[type | None, ...]) -> tuple[Any, ...]:
    """Turn the leaves of some kind into floating numbers, of the precision of the first floating leaf beside them."""
    beside = (getattr(x, "dtype", None) for x in leaves)
    dtype = next((d for d in beside if d is not None and _is_floating(d)), _SINGLE)
    # Of what JAX has at present: a float64 leaf may have been made where that was more.
    dtype = jax.dtypes.canonicalize_dtype(dtype if dtype.itemsize >= 4 else _SINGLE)
    return tuple(x if kind is None else _as_float(x, dtype) for x, kind in zip(leaves, kinds))


def from_leaves(leaves: Any, kinds: tuple[type | None, ...]) -> tuple[Any, ...]:
    """Turn the leaves of some kind back into what they are."""
    return tuple(x if kind is None else _from_float(x, kind) for x, kind in zip(leaves, kinds))


@functools.cache
def _is_floating(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _is_array(x: Any) -> bool:
    """Whether a leaf has numbers: axes for `jax.vmap`, shardings, `True` of a mask and the like are left alone."""
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _as_float(x: Any, dtype: Any) -> Any:
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        known = _floats.get(id(x))
        if known is not None and known.dtype == dtype:
            return known
    if not _is_array(x) or x.dtype.kind not in "iub":
        return x
    if x.dtype.kind != "b" and x.size >= _EXACT and dtype.itemsize < 8:
        return x  # there may be more states than numbers; differentiating takes allow_int=True then
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype)
    if isinstance(x, Tracer) or not isinstance(x, jax.Array):
        return x.astype(dtype)
    # Not traced, where a caller is: what is remembered has to outlive the trace.
    with jax.ensure_compile_time_eval():
        floats = x.astype(dtype)
    _remember(_floats, x, floats)
    _remember(_originals, floats, weakref.ref(x))
    return floats


def _remember(memory: dict[int, Any], x: Array, what: Any) -> None:
    if id(x) not in memory:
        weakref.finalize(x, memory.pop, id(x), None)
    memory[id(x)] = what


def _from_float(x: Any, kind: type) -> Any:
    if not _is_array(x) or not _is_floating(x.dtype):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, bool if kind is bool else np.int32)
    if isinstance(x, np.ndarray):
        return _rounded(x, kind, np)
    if isinstance(x, Tracer):
        return _rounded(x, kind, jnp)
    original = _originals.get(id(x), lambda: None)()
    if original is not None:
        return original
    with jax.ensure_compile_time_eval():
        return _rounded(x, kind, jnp)


def _rounded(x: Any, kind: type, xp: Any) -> Any:
    return x > 0.5 if kind is bool else xp.rint(x).astype(np.int32)
