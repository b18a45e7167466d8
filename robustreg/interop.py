"""MDPs from elsewhere, and files.

* Gymnasium's toy-text environments carry their model as `P[s][a]`, a list of `(probability, successor,
  reward, terminated)`. Two things make a naive reading wrong: a successor may be listed several times, and
  `terminated` means that nothing follows, whatever the model says of the successor (ignored, Taxi is worth
  835 instead of 6.33).
* SciPy sparse matrices go straight into `mdp`, one per action; `from_scipy` gives the `Successors` alone.
* `save` and `load` keep an object of the library as a NumPy archive: one array per leaf under its dotted name
  (`value`, `transitions.probabilities`), for any program to read, and a JSON text under `header`.
"""

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustreg import _host, table_input
from robustreg._files import write_whole
from robustreg.baselines import Entropy
from robustreg.mdp import MDP
from robustreg.names import Names
from robustreg.regularisers import KL, Alpha
from robustreg.solution import Solution
from robustreg.successors import Successors
from robustreg.transitions import Dense, MatrixFree

# ---- Gymnasium


def from_gymnasium(env: Any, discount: Any = 0.99, *, initial: Any = None) -> MDP:
    """The MDP of a tabular Gymnasium environment.

    Args:
        env: an environment whose `env.unwrapped` has the model `P` (FrozenLake, Taxi, CliffWalking), the name
            of one, or the table itself, `P[s][a] = [(probability, successor, reward, terminated), ...]`. States and
            actions may have names instead of numbers, and actions may be missing: see `from_table`.
        discount: `[*B]`.
        initial: distribution of the initial state; None takes the environment's `initial_state_distrib`, or the `isd`
            of gym's older `DiscreteEnv` (uniform where there is neither).

    Returns:
        An MDP with successor lists. S is that of the environment; transitions with `terminated` add to
        `termination` and not to the successors, and their reward counts.

    Raises:
        TypeError: if `env` has no table of transitions.
        ValueError: if the table is inconsistent; names the first offender.
        ImportError: if a name is given and Gymnasium is not installed.
    """
    if isinstance(env, str):
        env = _make(env)
    inner: Any = env if isinstance(env, (Mapping, Sequence)) else getattr(env, "unwrapped", env)
    table = inner if isinstance(inner, (Mapping, Sequence)) else getattr(inner, "P", None)
    if table is None:
        raise TypeError(
            f"{type(inner).__name__} has no table of transitions P; only tabular environments (FrozenLake, "
            "Taxi, CliffWalking) publish one: for others build rr.mdp(...) yourself"
        )
    if initial is None:
        initial = _first_states(inner)
    if not table_input.is_numbered(table):
        return table_input.from_table(table, discount, initial=initial)
    m = table_input.assemble(*table_input.numbered_table(table, _n_states(inner, table)), discount, initial)
    return dataclasses.replace(m, grid=_grid(inner, m.n_states))


def _first_states(env: Any) -> Any:
    """Where episodes start: Gymnasium's name for it, or `isd` of gym's `DiscreteEnv`; None where neither is there."""
    found = (getattr(env, name, None) for name in ("initial_state_distrib", "isd"))
    return next((x for x in found if x is not None), None)


def _make(name: str) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError('from_gymnasium needs Gymnasium for a name: pip install "robustreg[gym]"') from error
    return gymnasium.make(name)


def _n_states(env: Any, table: Any) -> int:
    n = int(getattr(getattr(env, "observation_space", None), "n", getattr(env, "nS", len(table))))
    if n != len(table):
        raise ValueError(f"P lists {len(table)} states, observation_space {n}; give every state its actions")
    return n


def _grid(env: Any, n_states: int) -> tuple[int, int] | None:
    """The grid where states are its cells: FrozenLake says nrow and ncol, CliffWalking shape."""
    shape = getattr(env, "shape", None) or (getattr(env, "nrow", 0), getattr(env, "ncol", 0))
    fits = len(shape) == 2 and shape[0] * shape[1] == n_states
    return (int(shape[0]), int(shape[1])) if fits else None


# ---- SciPy


def from_scipy(matrices: Sequence[Any]) -> Successors:
    """Successor lists from sparse matrices, repeated entries accumulated.

    Args:
        matrices: one SciPy sparse `[S, S]` per action, matrices (`csr_matrix`) or arrays (`csr_array`) of any
            format.

    Returns:
        `Successors` with K the largest number of successors, unchecked: `mdp` checks it, or takes the list.
    """
    indices, probabilities = _host.pack_sparse(matrices)
    dtype = _host.working_dtype(list(matrices))
    return Successors(jnp.asarray(indices), jnp.asarray(probabilities.astype(dtype)))


# ---- files

_CLASSES = {cls.__name__: cls for cls in (MDP, Solution, Dense, Successors, KL, Alpha, Entropy)}


def save(path: str | os.PathLike, obj: Any, header: Mapping[str, Any] | None = None) -> Path:
    """Write an `MDP`, a `Solution` or a regulariser to a NumPy archive.

    The file appears whole or not at all: it is written under another name in the same folder first.

    Args:
        path: of the file; `.npz` is appended where it is missing.
        obj: what to write.
        header: more to keep in the JSON header (`read_header` gives it back), JSON values only.

    Returns:
        The path written.

    Raises:
        TypeError: for an object that is not of these classes, holds tracers, or has `MatrixFree` transitions.
    """
    if type(obj).__name__ not in _CLASSES:
        raise TypeError(f"cannot save {type(obj).__name__}; pass one of: {', '.join(_CLASSES)}")
    path = Path(path)
    path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
    arrays: dict[str, np.ndarray] = {}
    ours = {"format_version": 1, "object": _flatten(obj, "", arrays)}
    versions = {"jax": jax.__version__, "numpy": np.__version__}
    default = {"versions": versions, "dtype": str(_host.working_dtype(obj))}
    text = json.dumps({**default, **(header or {}), "robustreg": ours}, default=_jsonable)
    content: Any = {"header": np.array(text), **arrays}  # names of arrays, not options of savez
    write_whole(path, lambda file: np.savez(file, **content))
    return path


def load(path: str | os.PathLike) -> Any:
    """Read back what `save` wrote: the same class, dtypes as stored (float64 becomes float32 without x64).

    Raises:
        ValueError: if the file is not one of `save`.
    """
    with _archive(path) as archive:
        return _rebuild(_header(archive, path)["robustreg"]["object"], archive)


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """What was given to `save` as `header`, with `versions` and `dtype` where it did not hold them.

    Raises:
        ValueError: if the file is not one of `save`.
    """
    with _archive(path) as archive:
        header = _header(archive, path)
    return {key: value for key, value in header.items() if key != "robustreg"}


def _archive(path: str | os.PathLike) -> Any:
    """A NumPy archive, named as `save` names it; anything else is a `ValueError` that names the file."""
    path = Path(path)
    path = path if path.exists() or path.suffix == ".npz" else path.with_name(path.name + ".npz")
    if path.exists() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} was not written by robustreg.save: it is no NumPy archive, or an incomplete one")
    return np.load(path, allow_pickle=False)


def _header(archive: Any, path: Any) -> dict[str, Any]:
    try:
        header = json.loads(str(archive["header"]))
        known = header["robustreg"]["format_version"] == 1
    except (KeyError, IndexError, TypeError, ValueError):
        known, header = False, {}
    if not known:
        raise ValueError(f"{path} was not written by this version of robustreg.save; see its array 'header'")
    return header


def _flatten(obj: Any, prefix: str, arrays: dict[str, np.ndarray]) -> Any:
    """Put the leaves into `arrays` under dotted names; the rest as JSON."""
    if isinstance(obj, MatrixFree):
        raise TypeError("MatrixFree transitions are code, which a file cannot hold; save rr.Successors or rr.Dense")
    if obj is None:
        return None
    if isinstance(obj, (jax.Array, np.ndarray, np.generic)):
        if _host.is_traced(obj):
            raise TypeError("save needs values, so it cannot run inside jit, vmap or grad; call it on the result")
        arrays[prefix] = np.asarray(obj)
        return {"array": prefix}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        static = field.metadata.get("static", False)
        if isinstance(value, Names):
            fields[field.name] = {"names": value.to_json()}
            continue
        name = f"{prefix}.{field.name}".lstrip(".")
        fields[field.name] = {"static": value} if static else _flatten(value, name, arrays)
    return {"class": type(obj).__name__, "fields": fields}


def _rebuild(tree: Any, archive: Any) -> Any:
    if tree is None:
        return None
    if "array" in tree:
        return jnp.asarray(archive[tree["array"]])
    if "names" in tree:
        return Names.from_json(tree["names"])
    if "static" in tree:
        value = tree["static"]
        return tuple(value) if isinstance(value, list) else value
    fields = {name: _rebuild(part, archive) for name, part in tree["fields"].items()}
    return _CLASSES[tree["class"]](**fields)


def _jsonable(value: Any) -> Any:
    """NumPy and JAX numbers as Python's, dates and paths as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
