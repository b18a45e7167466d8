"""Arrays in the containers that people have them in, converted once at the door.

Data frames (pandas, polars), labelled arrays (xarray), tensors (torch), and sparse matrices (SciPy, pydata, JAX's BCOO
and BCSR) are told by what they can do, so that none of these libraries is imported here. What comes out is a NumPy
array, a JAX array or tracer as it was, or per action a matrix with `tocoo`, all that successor lists are made from.

**Labels.** A data frame says which state a row belongs to. Rows and columns of transitions that name the same states in
another order are put in the order of the first frame's rows: by position, they would be another problem.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustreg._core import checks
from robustreg._core.names import Names

_PLAIN = (str, bytes, bool, int, float, complex, np.generic)


class Matrix(NamedTuple):
    """The entries of a sparse matrix, in the few words of SciPy that are used here; repeated ones add up."""

    row: np.ndarray
    col: np.ndarray
    data: np.ndarray
    shape: tuple[int, int]

    def tocoo(self) -> "Matrix":
        """Return the matrix, which is in that format."""
        return self


class Kernel(NamedTuple):
    """Transitions as they came, out of their containers.

    Attributes:
        data: an array, or a list with one matrix per action.
        per_action: whether it came as matrices of one action each, so that its axes need not be told.
        states, actions: names that the containers carried; None where they carried none.
    """

    data: Any
    per_action: bool = False
    states: tuple[Hashable, ...] | None = None
    actions: tuple[Hashable, ...] | None = None

    def names(self, n_states: int, n_actions: int) -> Names | None:
        """Return the names, with numbers for what has none; None where nothing has."""
        if self.states is None and self.actions is None:
            return None
        return Names(self.states or range(n_states), self.actions or range(n_actions))


def is_sparse(x: Any) -> bool:
    """Tell whether `x` is a sparse matrix with `tocoo`, as those of SciPy are (and `Matrix` here)."""
    return hasattr(x, "tocoo")


def _is_jax_sparse(x: Any) -> bool:
    return type(x).__module__.startswith("jax.experimental.sparse")


def _lists_entries(x: Any) -> bool:
    """Whether `x` is a sparse array of JAX or pydata, of any number of axes."""
    return _is_jax_sparse(x) or hasattr(x, "coords") and hasattr(x, "todense")


def plain(name: str, x: Any, states: Sequence[Hashable] | None = None) -> Any:
    """Convert what holds an array in a form of its own.

    Args:
        name: of the argument, for messages.
        x: anything; lists and tuples are looked through.
        states: names of the states; a data frame whose rows carry the same names is put in that order.

    Returns:
        A NumPy array for data frames, labelled arrays and tensors; a `Matrix` for a sparse matrix of JAX or pydata; an
        array or tracer for one of them that is traced or has other than two axes; anything else as it is.

    Raises:
        ValueError: a masked array that hides entries; rows that name a state twice or lack one.
    """
    if x is None or isinstance(x, (*_PLAIN, jax.Array)) or type(x) is np.ndarray:
        return x
    if isinstance(x, (list, tuple)) and not hasattr(x, "tocoo"):
        if all(isinstance(part, _PLAIN) for part in x):
            return x
        return [plain(f"{name}[{i}]", part, states) for i, part in enumerate(x)]
    if isinstance(x, np.ma.MaskedArray):
        if np.ma.is_masked(x):
            raise ValueError(f"{name} is a masked array, and what it hides has no number; pass x.filled(number)")
        return np.asarray(x)
    if _lists_entries(x):
        return _sparse(x)
    if is_sparse(x):
        return x
    if hasattr(x, "columns") or hasattr(x, "index") and hasattr(x, "to_numpy"):
        return _frame(name, x, states)
    return _dense(x)


def _dense(x: Any) -> Any:
    """The numbers of a tensor, of a labelled array, or of whatever NumPy can read; else `x` itself."""
    if hasattr(x, "detach"):  # torch: off the tape, off the device, out of the types that NumPy lacks
        x = x.detach().cpu()
        x = x.to_dense() if str(getattr(x, "layout", "torch.strided")) != "torch.strided" else x
        return np.asarray(x.float() if "bfloat16" in str(x.dtype) else x)
    if hasattr(x, "dims") and hasattr(x, "values"):
        return np.asarray(x.values)
    return np.asarray(x) if hasattr(x, "__array__") else x


def _frame(name: str, x: Any, states: Sequence[Hashable] | None) -> Any:
    """The numbers of a data frame or series, rows (and columns that name states too) in the order of the states."""
    rows = _labels(x, "index")
    if rows is None:
        return np.asarray(x.to_numpy() if hasattr(x, "to_numpy") else x)
    columns = _labels(x, "columns")
    values = np.asarray(x.to_numpy())
    order = rows if states is None or set(states) != set(rows) else tuple(states)
    if len(set(rows)) < len(rows):
        twice = next(label for i, label in enumerate(rows) if label in rows[:i])
        raise ValueError(f"{name} has two rows called {twice!r}; add them up, or give each a name of its own")
    if order != rows:
        values = values[[rows.index(label) for label in order]]
    if columns is not None and columns != order and set(columns) == set(order) and len(columns) == len(order):
        values = values[:, [columns.index(label) for label in order]]
    return values


def _labels(x: Any, axis: str) -> tuple[Hashable, ...] | None:
    """Labels along an axis of a data frame, None where it has none."""
    found = getattr(x, axis, None)
    return None if found is None or callable(found) else tuple(np.asarray(found, object).tolist())


def named_rows(x: Any) -> tuple[Hashable, ...] | None:
    """Return the labels of a data frame's rows, None where they are no more than their numbers."""
    rows = _labels(x, "index") if hasattr(x, "columns") else None
    return None if rows is None or rows == tuple(range(len(rows))) else rows


def _entries(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates `[axes, n]` and numbers `[n]` of a sparse array of JAX or pydata."""
    if hasattr(x, "coords"):
        return np.asarray(x.coords), np.asarray(x.data)
    from jax.experimental import sparse

    x = x.to_bcoo() if hasattr(x, "to_bcoo") else x
    if not isinstance(x, sparse.BCOO):
        x = sparse.BCOO.fromdense(x.todense())
    x = sparse.bcoo_update_layout(x, n_batch=0, n_dense=0)
    where, data = np.asarray(x.indices).T, np.asarray(x.data)
    # Lists of entries are padded with places outside of the array.
    inside = (where < np.array(x.shape)[:, None]).all(0)
    return where[:, inside], data[inside]


def _sparse(x: Any) -> Any:
    if x.ndim != 2 or checks.is_traced(x):
        return x.todense()
    (row, col), data = _entries(x)
    return Matrix(row, col, data, x.shape)


def transitions(x: Any, layout: str | None) -> Kernel:
    """Take transitions out of their containers.

    Args:
        x: what `mdp` is given: an array, one matrix per action in a list or a dict by name of the action, or a kernel.
        layout: "sas", "ass" or None.

    Raises:
        ValueError: matrices of actions that name different states.
    """
    actions = None
    if hasattr(x, "probabilities"):
        return Kernel(dataclasses.replace(x, probabilities=plain("transitions.probabilities", x.probabilities)))
    if isinstance(x, Mapping):
        if not x:
            raise ValueError("transitions is empty; expected a matrix [S, S] for each action")
        actions, x = tuple(x), list(x.values())
    if _lists_entries(x) and getattr(x, "ndim", 0) == 3 and not checks.is_traced(x):
        return _of_three_axes(x, layout)
    frames = [part for part in x if named_rows(part) is not None] if isinstance(x, (list, tuple)) else []
    states = named_rows(frames[0]) if frames else None
    for frame in frames:
        if set(named_rows(frame) or ()) != set(states or ()):
            raise ValueError("transitions name other states in one matrix than in the first; give all the same rows")
    sparse = isinstance(x, (list, tuple)) and any(_lists_entries(part) or is_sparse(part) for part in x)
    data = plain("transitions", x, states)
    if actions is None and not sparse:
        return Kernel(data, layout == "ass", states)
    if any(is_sparse(part) for part in data):
        return Kernel(data, True, states, actions)
    return Kernel(jnp.stack(data) if checks.is_traced(data) else np.stack(data), True, states, actions)


def _of_three_axes(x: Any, layout: str | None) -> Kernel:
    """A sparse array of three axes as one matrix per action; as it is where its axes cannot be told from its shape."""
    first, middle, last = x.shape
    axis = 1 if layout == "sas" or (layout is None and first == last != middle) else 0
    if first == middle == last and layout is None or x.shape[2] != x.shape[1 - axis]:
        return Kernel(x.todense())
    where, data = _entries(x)
    row = where[1 - axis]
    mine = [where[axis] == a for a in range(x.shape[axis])]
    return Kernel([Matrix(row[m], where[2][m], data[m], (last, last)) for m in mine], True)


def dense_matrix(x: Any) -> Any:
    """Write out a sparse matrix; anything else as it is."""
    if not is_sparse(x):
        return x
    coo = x.tocoo()
    full = np.zeros(coo.shape, np.result_type(coo.data.dtype, np.float32))
    np.add.at(full, (coo.row, coo.col), coo.data)
    return full


def looked_up(x: Any, indices: np.ndarray) -> np.ndarray:
    """Read a matrix at some columns of every row.

    Args:
        x: sparse or dense, `[S, S]`.
        indices: `[S, K]`.

    Returns:
        `[S, K]` in double precision, 0 where a sparse matrix has no entry.
    """
    if not is_sparse(x):
        return np.take_along_axis(np.asarray(x, np.float64), indices, -1)
    coo = x.tocoo()
    n = coo.shape[1]
    keys, inverse = np.unique(np.asarray(coo.row, np.int64) * n + coo.col, return_inverse=True)
    summed = np.bincount(inverse.reshape(-1), weights=np.asarray(coo.data, np.float64), minlength=keys.size)
    wanted = np.arange(len(indices), dtype=np.int64)[:, None] * n + indices
    if not keys.size:
        return np.zeros(wanted.shape)
    at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[at] == wanted, summed[at], 0.0)


def as_array(name: str, x: Any) -> Any:
    """Write out what `plain` left sparse, per action stacked to `[A, S, S]`; else `x` itself.

    Raises:
        ValueError: a list of matrices of different shapes.
    """
    if is_sparse(x):
        return dense_matrix(x)
    if not isinstance(x, list) or not any(is_sparse(part) for part in x):
        return x
    parts = [dense_matrix(part) for part in x]
    if len({np.shape(part) for part in parts}) > 1:
        shapes = ", ".join(str(list(np.shape(part))) for part in parts)
        raise ValueError(f"{name} is a list of matrices of shapes {shapes}; give one [S, S] per action")
    return jnp.stack(parts) if checks.is_traced(parts) else np.stack([np.asarray(part) for part in parts])


def by_action(x: Mapping[Any, Any], actions: tuple[Hashable, ...] | None) -> Any:
    """Put what is given by name of the action in the order of the transitions' actions.

    Args:
        x: `[S]` or `[S, S]` by name.
        actions: names of the transitions' actions.

    Returns:
        A list of matrices, or `[S, A]`.

    Raises:
        ValueError: transitions that name no actions, or others.
    """
    if actions is None or set(actions) != set(x):
        known = "transitions give none: pass them as a dict too" if actions is None else f"transitions have {actions}"
        raise ValueError(f"reward is given by name of the action, {tuple(x)}, but {known}")
    parts = [x[action] for action in actions]
    return np.stack([np.asarray(part) for part in parts], -1) if all(np.ndim(p) == 1 for p in parts) else parts
