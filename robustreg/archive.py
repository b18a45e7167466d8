"""Files: an object of the library as a NumPy archive.

One array per leaf under its dotted name (`value`, `transitions.probabilities`), for any program to read, and a JSON
text under `header`.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustreg._core import checks
from robustreg._core.files import write_whole
from robustreg._core.npz import ArchiveError, Arrays, opened
from robustreg.adversary.certificates import Certificate
from robustreg.adversary.guarantees import Guarantee
from robustreg.game.minimax import Game
from robustreg.problems.dense import Dense
from robustreg.problems.matrix_free import MatrixFree
from robustreg.problems.mdps import MDP
from robustreg.problems.successors import Successors
from robustreg.regularisers.balls import NormBall
from robustreg.regularisers.entropies import Entropy
from robustreg.regularisers.families import KL, Alpha
from robustreg.regularisers.regulariser import Sum
from robustreg.regularisers.separable import FAMILIES
from robustreg.solvers.ambiguity import TransitionBall
from robustreg.solvers.average import Average
from robustreg.solvers.horizon import Horizon
from robustreg.solvers.joint import OccupancySolution
from robustreg.solvers.solution import Solution

_KINDS = (MDP, Solution, Dense, Successors, KL, Alpha, Entropy, Certificate, Guarantee, Game)
_KINDS = (*_KINDS, Sum, NormBall, TransitionBall, Horizon, Average, OccupancySolution)
_CLASSES = {cls.__name__: cls for cls in _KINDS}


def save(path: str | os.PathLike, obj: Any, header: Mapping[str, Any] | None = None) -> Path:
    """Write a problem, a regulariser or an answer of the library to a NumPy archive.

    The file appears whole or not at all: it is written under another name in the same folder first.

    Args:
        path: of the file; `.npz` is appended where it is missing.
        obj: an `MDP` or its transitions, a regulariser, or an answer of `solve`, `solve_horizon`, `solve_average`,
            `solve_occupancy`, `certify`, `guarantee`, `solve_game`.
        header: more to keep in the JSON header (`read_header` gives it back), JSON values only.

    Returns:
        The path written.

    Raises:
        TypeError: for an object that is not of these classes, holds tracers, or has `MatrixFree` transitions.
    """
    if type(obj) not in _classes().values():
        raise TypeError(
            f"cannot save {type(obj).__name__}; pass one of: {', '.join(_CLASSES)}, or a Separable of your own"
        )
    path = Path(path)
    path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
    arrays: dict[str, np.ndarray] = {}
    ours = {"format_version": 1, "object": _flatten(obj, "", arrays)}
    versions = {"jax": jax.__version__, "numpy": np.__version__}
    default = {"versions": versions, "dtype": str(checks.working_dtype(obj))}
    text = json.dumps({**default, **(header or {}), "robustreg": ours}, default=_jsonable)
    content: Any = {"header": np.array(text), **arrays}  # names of arrays, not options of savez
    write_whole(path, lambda file: np.savez(file, **content))
    return path


def load(path: str | os.PathLike) -> Any:
    """Read back what `save` wrote: the same class, dtypes as stored (float64 becomes float32 without x64).

    Nothing is allocated for what a file merely claims to hold, and no Python object is read from it.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is not one of `save`, is damaged, or claims to hold what it does not.
    """
    with _archive(path) as archive:
        tree = _header(archive, path)["robustreg"]["object"]
        try:
            return _rebuild(tree, archive)
        except ArchiveError:
            raise
        except Exception as error:  # a header that was edited may describe anything
            raise ValueError(f"{path}: its array 'header' describes no object of robustreg: {error}") from error


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """Read what was given to `save` as `header`, with `versions` and `dtype` where it did not hold them.

    Raises:
        ValueError: if the file is not one of `save`.
    """
    with _archive(path) as archive:
        header = _header(archive, path)
    return {key: value for key, value in header.items() if key != "robustreg"}


def _classes() -> dict[str, type]:
    """The classes that files hold by name; those of users as far as they are defined by now."""
    return FAMILIES | _CLASSES


def _archive(path: str | os.PathLike) -> contextlib.AbstractContextManager[Arrays]:
    """A NumPy archive, named as `save` names it."""
    path = Path(path)
    return opened(path if path.exists() or path.suffix == ".npz" else path.with_name(path.name + ".npz"))


def _header(archive: Arrays, path: Any) -> dict[str, Any]:
    try:
        header = json.loads(str(archive.read("header"))) if "header" in archive else {}
        known = header["robustreg"]["format_version"] == 1
    except ArchiveError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
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
        if checks.is_traced(obj):
            raise TypeError("save needs values, so it cannot run inside jit, vmap or grad; call it on the result")
        arrays[prefix] = np.asarray(obj)
        return {"array": prefix}
    if isinstance(obj, tuple):
        return {"items": [_flatten(item, f"{prefix}.{i}".lstrip("."), arrays) for i, item in enumerate(obj)]}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        static = field.metadata.get("static", False)
        name = f"{prefix}.{field.name}".lstrip(".")
        if static and value is not None and field.metadata["write"]:
            value = field.metadata["write"](value)
        fields[field.name] = {"static": value} if static else _flatten(value, name, arrays)
    return {"class": type(obj).__name__, "fields": fields}


def _rebuild(tree: Any, archive: Arrays) -> Any:
    if tree is None:
        return None
    if "array" in tree:
        return jnp.asarray(archive.read(tree["array"]))
    if "items" in tree:
        return tuple(_rebuild(item, archive) for item in tree["items"])
    if tree["class"] not in _classes():
        raise ArchiveError(f"a file with a {tree['class']!r}, which is not defined here: import its class first")
    kind: Any = _classes()[tree["class"]]
    fields = {}
    for field in dataclasses.fields(kind):
        part = tree["fields"].get(field.name)
        if field.metadata.get("static", False) and part:
            # (Once names had a tag of their own.)
            value, read = part.get("static", part.get("names")), field.metadata["read"]
            fields[field.name] = read(value) if read and value is not None else value
        elif field.name in tree["fields"]:
            fields[field.name] = _rebuild(part, archive)
    if kind is Solution and "log_policy" not in fields:
        fields["log_policy"] = _logarithm(fields["policy"])
    if kind is Certificate and "storage" not in fields:  # written when nobody asked: no allowance then
        fields["storage"] = jnp.zeros_like(fields["rounding"])
    return kind(**fields)


def _logarithm(policy: jax.Array) -> jax.Array:
    """`Solution.log_policy` for a file that was written without it: NaN where the policy may have underflowed."""
    return jnp.where(policy > 0, jnp.log(jnp.where(policy > 0, policy, 1)), jnp.nan)


def _jsonable(value: Any) -> Any:
    """NumPy and JAX numbers as Python's, dates and paths as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
