"""Frozen dataclasses that are pytrees, and the two layouts that an array can have.

Every object of the library (an MDP, a regulariser, a solver's options, a solution) is a frozen dataclass whose
fields are pytree leaves, unless declared `static()`: those are part of the compiled program.

**Layouts.** The public layout is batch first: `[*B, S]` and `[*B, S, A]`. The kernels work *actions first, lanes
last*: `[A, S, *B]`. A reduction over actions then runs over the leading axis and everything else is elementwise
over contiguous memory, and a scalar per lane broadcasts against any array with no reshaping, because NumPy aligns
trailing axes. One soft backup of a 500-state, 8-action MDP with 8 successors costs 46 us this way against 165 us
with `[S, A, K]` gathers reduced over their last axis (one CPU core, float64).
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from robustreg._core import discrete as _discrete
from robustreg._core import loops

_T = TypeVar("_T")


def static(write: Callable[[Any], Any] | None = None, read: Callable[[Any], Any] | None = None, **options: Any) -> Any:
    """Declare a field that is metadata of the compiled program instead of a leaf (must be hashable).

    With `repr=False` it is not shown. `write` makes JSON of a value that is not None, `read` makes the value again:
    programs that take the class and are serialised (`jax.export`) hold its metadata.
    """
    return dataclasses.field(metadata={"static": True, "write": write, "read": read}, **options)


def discrete(kind: type, **options: Any) -> Any:
    """Declare a field of whole numbers (`int`) or truth values (`bool`) that is a leaf of floating numbers.

    See `robustreg._core.discrete`. An instance with a true static field `raw` has it as a leaf as it is.
    """
    return dataclasses.field(metadata={"discrete": kind}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static, discrete, dataclasses.field))
def dataclass(cls: type[_T]) -> type[_T]:
    """Make `cls` a frozen dataclass and register it as a pytree.

    Instances compare and hash by identity: leaves are arrays, for which neither `==` nor `hash` gives a truth.
    Classes without leaves (options of solvers) should use `options`, which compares by value.
    """
    return _register(dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls))


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def options(cls: type[_T]) -> type[_T]:
    """Make `cls` a frozen dataclass of plain Python values, hashable by value: a static argument of `jax.jit`."""
    return dataclasses.dataclass(frozen=True)(cls)


def _register(cls: type[_T]) -> type[_T]:
    """Not `jax.tree_util.register_dataclass`: its treedefs compare equal for different classes with as many fields (JAX
    0.10 to 0.12), so that a cache of compiled programs now and then takes one class for another. Here the class is part
    of what is compared."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # decorated one line above
    data = tuple(f.name for f in fields if not f.metadata.get("static", False))
    meta = tuple(f.name for f in fields if f.metadata.get("static", False))
    kinds = tuple(f.metadata.get("discrete") for f in fields if f.name in data)

    def flatten(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        leaves = tuple(getattr(x, n) for n in data)
        if any(kinds) and not x.raw:
            leaves = _discrete.as_leaves(leaves, kinds)
        return leaves, (cls, *(getattr(x, n) for n in meta))

    def flatten_with_keys(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        leaves, static = flatten(x)
        return tuple((jax.tree_util.GetAttrKey(n), leaf) for n, leaf in zip(data, leaves)), static

    def unflatten(static: tuple[Any, ...], leaves: Any) -> Any:
        if any(kinds):
            leaves = _discrete.from_leaves(leaves, kinds)
        return cls(**dict(zip(data, leaves)), **dict(zip(meta, static[1:])))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    _register_for_export(cls)
    if cls.__repr__ is object.__repr__:
        cls.__repr__ = _summary
    return cls


def _register_for_export(cls: type) -> None:
    """Tell `jax.export` how the metadata of a class is written into a serialised program and read from it."""
    fields = [f for f in dataclasses.fields(cls) if f.metadata.get("static", False)]

    def converted(values: Any, way: str) -> list[Any]:
        ways = [f.metadata[way] for f in fields]
        return [x if x is None or to is None else to(x) for x, to in zip(values, ways)]

    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"robustreg.{cls.__qualname__}",
        serialize_auxdata=lambda static: json.dumps(converted(static[1:], "write")).encode(),
        deserialize_auxdata=lambda text: (cls, *converted(json.loads(text), "read")),
    )


def _summary(self: Any) -> str:
    """`Name(field=dtype[shape], ...)`: shapes are what one wants to see of a batch of arrays."""

    def show(value: Any) -> str:
        if isinstance(value, (jax.Array, Tracer)):
            return f"{value.dtype}{list(value.shape)}"
        return repr(value)

    shown = (f"{f.name}={show(getattr(self, f.name))}" for f in dataclasses.fields(self) if f.repr)
    return f"{type(self).__name__}({', '.join(shown)})"


def given(tangent: Any) -> Any:
    """Return a tangent as a rule with `symbolic_zeros=True` receives it, or None where the argument does not change."""
    zero = is_symbolic_zero(tangent) or jnp.result_type(tangent) == jax.dtypes.float0
    return None if zero else tangent


def is_symbolic_zero(x: Any) -> bool:
    """Tell whether `x` is the placeholder of a zero tangent, which is a leaf."""
    return isinstance(x, SymbolicZero)


def given_or_zero(tangent: Any, primal: Any) -> Any:
    """Return a tangent that `jax.jvp` accepts, leaf by leaf."""

    def fill(t: Any, x: Any) -> Any:
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        zero = jnp.zeros_like(x) if floating else np.zeros(jnp.shape(x), jax.dtypes.float0)
        return zero if given(t) is None else t

    return jax.tree.map(fill, tangent, primal, is_leaf=is_symbolic_zero)


def gate(t: Array, lost: Array) -> Array:
    """Pass a tangent on where it is known, NaN where it is lost; a linear map, to be put into rules of derivatives.

    Args:
        t: a tangent, or whatever else is linear in one.
        lost: bool, broadcastable to `t`: entries whose derivative does not exist or was not found.

    Returns:
        `where(lost, nan, t)`. Backwards a cotangent of exactly 0 stays 0, so that what nobody asks for poisons nothing,
        and any other becomes NaN where it meets an entry that is lost. Differentiable in `t`, to any order.
    """
    lost = lax.stop_gradient(jnp.broadcast_to(lost, t.shape))

    def forwards(_: Any, x: Array) -> Array:
        return jnp.where(lost, jnp.nan, x)

    def backwards(_: Any, ct: Array) -> Array:
        return jnp.where(lost & (ct != 0), jnp.nan, ct)

    # The identity as a linear system: the one primitive whose two directions can be given separately.
    return lax.custom_linear_solve(lambda x: x, t, forwards, transpose_solve=backwards)


def more_than(limit: int, shape: tuple[Any, ...]) -> bool:
    """Tell whether an array has more entries than that; True in a program exported for any number of lanes."""
    count = math.prod(shape)
    return jax.export.is_symbolic_dim(count) or count > limit


def lanes_last(x: Array, batch_ndim: int, core_ndim: int) -> Array:
    """Turn `[*b, *core]` into `[*reversed(core), *b]` with `b` padded on its left to `batch_ndim` axes.

    `core_ndim` 2 is `(S, A)`, 1 is `(S,)`, 0 a scalar per lane. Padding keeps every leaf aligned with every other
    when batch axes follow instead of lead.
    """
    batch = x.ndim - core_ndim
    core = tuple(range(x.ndim - 1, batch - 1, -1))
    x = jnp.transpose(x, (*core, *range(batch)))
    return x.reshape(x.shape[:core_ndim] + (1,) * (batch_ndim - batch) + x.shape[core_ndim:])


def batch_first(x: Array, core_ndim: int) -> Array:
    """Inverse of `lanes_last`: `[*reversed(core), *B]` to `[*B, *core]`."""
    return jnp.transpose(x, (*range(core_ndim, x.ndim), *range(core_ndim - 1, -1, -1)))


def shared_by(lost: Array, sizes: tuple[int, ...]) -> Array:
    """Tell of `lost [*B]` whether all lanes are that share a leaf whose lanes' axes have these `sizes`: `[*b]`."""
    return jnp.all(lost, axis=tuple(i for i, n in enumerate(sizes) if n == 1), keepdims=True)


def put_in_lanes(x: Array, lost: Array, value: float) -> Array:
    """Put a number into the lanes `lost [*B]` of a leaf; into one that lanes share only if all of them are lost."""
    core = x.ndim - lost.ndim
    where = shared_by(lost, x.shape[core:])
    return jnp.where(where.reshape((1,) * core + where.shape), jnp.asarray(value, x.dtype), x)


def pick_lanes(x: Array, index: tuple[Array, ...]) -> Array:
    """Lanes of an array that ends in `len(index)` lanes' axes, as one last axis: of size 1 where all lanes share x."""
    sizes = x.shape[x.ndim - len(index) :]
    if all(n == 1 for n in sizes):
        return x.reshape(x.shape[: x.ndim - len(index)] + (1,))
    return x[(..., *(i if n > 1 else jnp.zeros_like(i) for i, n in zip(index, sizes)))]


def materialised(x: Array) -> Array:
    """Hold `x` as one array in memory, so that all who read it read the same bits.

    The compiler evaluates an expression anew in every kernel that reads it, and two evaluations may round differently
    (one with a fused multiply-add): a maximum is then none of the numbers that it was taken of.
    """
    if jax.__version_info__ >= (0, 11, 2) or not x.size:
        return lax.optimization_barrier(x)
    # The CPU compilers of JAX 0.10.0 to 0.11.0 drop the barrier before they look for kernels. A loop they keep: here
    # one of no turns, of which they do not know that it has none.
    first = x[(slice(0, 1),) * x.ndim].reshape(())
    none = jnp.isnan(first) & (first == first)

    def in_loop(x: Array) -> Array:
        def wanted(state: tuple[Array, Array]) -> Array:
            again, _ = state
            return again

        def turn(state: tuple[Array, Array]) -> tuple[Array, Array]:
            again, x = state
            return ~again, -x

        _, same = loops.while_loop(wanted, turn, (none, x))
        return same

    return lax.platform_dependent(x, cpu=in_loop, default=lax.optimization_barrier)


# XLA's CPU compiler hands sums and maxima with 1,024 results or more to a library (JAX 0.10.1 to 0.12 at least) that
# takes 10 to 40 times as long as the loop which it replaces, and which no longer fuses with what is summed. It knows a
# reduction by its operation alone, so that the same operation written in another way is left to the compiler.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def total(x: Array, axis: int = 0) -> Array:
    """Sum over `axis`. Differentiable, but what is linear in a tangent, to be transposed, needs `plain_sum`."""
    return lax.reduce(x, np.zeros((), x.dtype), lambda a, b: a - (-b), (axis,))


@total.defjvp
def _total_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return total(primals[0], axis), jnp.sum(tangents[0], axis=axis)


def plain_sum(x: Array) -> Array:
    """Sum over the leading axis, for tangents: has a transpose."""
    return jnp.sum(x, axis=0)


def largest(x: Array, axis: int = 0) -> Array:
    """Find `jnp.max(x, axis)`, without a derivative."""
    return lax.reduce(x, np.asarray(-np.inf, x.dtype), lambda a, b: -lax.min(-a, -b), (axis,))


def _by_rows(add: Callable[[Array, Array], Array], whole: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A reduction over the leading axis in terms that XLA's partitioner knows. Few entries are written out: then it is
    no reduction at all, and the library above has no hand in it."""

    def reduce(x: Array) -> Array:
        return functools.reduce(add, list(x)) if 0 < x.shape[0] <= 8 else whole(x)

    return reduce


class Reducers(NamedTuple):
    """How a kernel sums and takes maxima over actions, and which axis they are on: the leading or the last one.

    A kernel that is written in these terms serves both layouts. Shapes in its docstrings are those with actions
    leading, `[A, ...]`; with actions last they read `[..., A]`.
    """

    total: Callable[[Array], Array]
    largest: Callable[[Array], Array]
    axis: int = 0

    def over(self, x: Array) -> Array:
        """Compute `[...]` with an axis of 1 for actions."""
        return jnp.expand_dims(x, self.axis)

    def plain_sum(self, x: Array) -> Array:
        """Sum over actions, for tangents: has a transpose."""
        return jnp.sum(x, axis=self.axis)

    def without_actions(self, x: Array) -> tuple[int, ...]:
        """Shape `[...]` of an array over actions."""
        return x.shape[1:] if self.axis == 0 else x.shape[:-1]


# Those of `solve`, of whose lanes there are many. XLA's partitioner knows a reduction by its operation too, and refuses
# what it does not know where the actions are sharded over devices: what users call with arrays of their own takes ROWS.
LANES = Reducers(total, largest)
ROWS = Reducers(_by_rows(jnp.add, plain_sum), _by_rows(jnp.maximum, lambda x: jnp.max(x, axis=0)))
# The user's own layout, actions on the contiguous last axis: plain reductions are what the compiler fuses there.
LAST = Reducers(lambda x: jnp.sum(x, axis=-1), lambda x: jnp.max(x, axis=-1), -1)
_REDUCERS = {"lanes": LANES, "rows": ROWS, "last": LAST}


def reducers() -> Any:
    """Return a static field that holds one of the three `Reducers`, `LANES` by default."""
    return static(
        write=lambda reduce: next(name for name, known in _REDUCERS.items() if known is reduce),
        read=_REDUCERS.__getitem__,
        default=LANES,
        repr=False,
    )
