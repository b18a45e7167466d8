"""TOML files to objects, through explicit registries.

A configuration has three tables or four. `kind` picks a constructor from a registry below, and every other key is an
argument of that constructor: the allowed keys are read from its signature, so that nothing here repeats them.

```toml
[problem]                      # the MDP
kind = "gymnasium"
id = "FrozenLake-v1"
discount = 0.99
kwargs = { map_name = "8x8" }  # for gymnasium.make
# Or kind = "table" with the path of a CSV file, "file" (of robustreg.save), "prism" (.tra) or "cassandra" (.mdp).

[regulariser]
kind = "kl"
beta = 30.0

[solver]                       # optional
kind = "auto"
tol = 1e-8                     # certified error of the value; without it, what the precision supports
max_steps = 10_000

[ambiguity]                    # optional: uncertain transitions; the arguments of `TransitionBall`
radius = 0.01
p = 2.0                        # the norm; `inf` is a number in TOML
rectangular = "sa"             # or "s"
form = "exact"                 # or "kappa", "r2"
```

`robustreg sweep` wants one more table, the grid over leaves of the problem:

```toml
[sweep]
beta = { from = 0.1, to = 300.0, count = 256, spacing = "log" }  # or spacing = "linear"
alpha = [0.5, 1.0, 2.0]                                          # or the values themselves
outputs = ["objective", "nominal_return", "gap", "steps", "status"]
chunk = 16                                                       # optional: lanes solved together
zipped = false                                                   # optional: pair values instead of combining them
```

Whatever is wrong with a file is a `ConfigError` that names the file, the table, the key, and what is allowed.
"""

import dataclasses
import functools
import inspect
import operator
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from robustreg.cli import problem_kinds
from robustreg.cli.problem_kinds import PROBLEMS
from robustreg.problems.problem import Problem
from robustreg.regularisers import balls, entropies, families
from robustreg.solvers import ambiguity, methods, plain
from robustreg.solvers.ambiguity import TransitionBall


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the remedy."""


# Values of one axis of a grid: a thousand times as many as anybody has asked for, and still no burden in memory.
_MOST = 10_000_000


@dataclasses.dataclass(frozen=True)
class Job:
    """A configuration, built: everything that `robustreg.solve` is given."""

    problem: Problem
    regulariser: Any
    solver: Any
    tol: float | None
    max_steps: int | None
    table: Mapping[str, Any]
    ambiguity: TransitionBall | None = None


@dataclasses.dataclass(frozen=True)
class SweepJob:
    """A configuration with a [sweep] table, built: what `robustreg.sweep` is given."""

    job: Job
    grid: Mapping[str, np.ndarray]
    options: Mapping[str, Any]


def _numeric(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of arrays, given the numbers and lists of TOML."""

    @functools.wraps(factory)
    def build(**arguments: Any) -> Any:
        arrays = {name: _numbers(value) for name, value in arguments.items()}
        for name, array in arrays.items():
            if array is None:
                raise ValueError(f"{name} is {_brief(arguments[name])}; expected a number or a list of numbers")
        return factory(**arrays)

    return build


def _norm_ball(radius: Any, p: float = 2.0, radius_per_state: Any = None) -> Any:
    """The ball of reward perturbations."""
    arrays = {"radius": radius} | ({} if radius_per_state is None else {"radius_per_state": radius_per_state})
    return _numeric(functools.partial(balls.norm_ball, p=p))(**arrays)


def _sum(parts: Any) -> Any:
    """The sum of regularisers, each a table with its kind."""
    if not isinstance(parts, list) or len(parts) < 2 or not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            'parts is a list of two tables or more: [{ kind = "kl", beta = 5.0 }, { kind = "alpha", ... }]'
        )
    return functools.reduce(
        operator.add, (construct(REGULARISERS, part, f"parts[{i}]") for i, part in enumerate(parts))
    )


def _none() -> None:
    """No regulariser: the plain maximum."""


REGULARISERS: dict[str, Callable[..., Any]] = {
    "kl": _numeric(families.kl),
    "alpha": _numeric(families.alpha),
    "entropy": _numeric(entropies.entropy),
    "tsallis": _numeric(entropies.tsallis),
    "norm_ball": _norm_ball,
    "sum": _sum,
    "none": _none,
}


def _transition_ball(
    radius: Any,
    p: Any = 2.0,
    rectangular: str = "s",
    form: str = "kappa",
    per_state: Any = None,
    per_pair: Any = None,
) -> TransitionBall:
    """Noise in the transitions."""
    given = {"radius": radius, "per_state": per_state, "per_pair": per_pair}
    arrays = {name: x for name, x in given.items() if x is not None}
    return _numeric(functools.partial(TransitionBall, p=p, rectangular=rectangular, form=form))(**arrays)


def _auto() -> None:
    """The solver that suits the problem."""


SOLVERS: dict[str, Callable[..., Any]] = {
    "auto": _auto,
    "value_iteration": methods.ValueIteration,
    "modified_policy_iteration": methods.ModifiedPolicyIteration,
    "newton": methods.Newton,
    "anderson": methods.Anderson,
}


def load(path: str | Path) -> Job:
    """Read a configuration and build what it describes, in the precision that JAX is set to.

    Raises:
        ConfigError: the file cannot be read, or something in it is not allowed.
    """
    return build(read(path), str(path))


def read(path: str | Path) -> dict[str, Any]:
    """Read the tables of a file."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text in UTF-8 ({error.reason}): save it in that encoding") from error
    except ValueError as error:  # no TOML, a number of thousands of digits, a path with a zero byte
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: lists or tables are nested too deeply; write them flat") from error
    refuse_huge(table, str(path))
    problem = table.get("problem")
    if isinstance(problem, dict) and isinstance(problem.get("path"), str):
        problem["path"] = problem_kinds.from_its_folder(problem["path"], Path(path))
    return table


def other_command(table: Mapping[str, Any]) -> str:
    """Say which command reads tables like these, as the end of a message; nothing where none does."""
    names = [name for name in ("sweep", "figure", "example") if name in table]
    names += ["solve"] if {"problem", "regulariser"} <= set(table) else []
    return f"; `robustreg {names[0]}` reads such files" if names else ""


def refuse_huge(x: Any, where: str) -> None:
    """Refuse a whole number beyond 64 bits, wherever in a file it is: no array could hold it."""
    if isinstance(x, dict | list):
        for key, part in x.items() if isinstance(x, dict) else enumerate(x):
            refuse_huge(part, f"{where}: {key}" if isinstance(x, dict) else where)
    elif type(x) is int and not -(2**63) <= x < 2**63:
        raise ConfigError(f"{where} is a whole number of {x.bit_length()} bits; expected at most 64: write it as 1e20")


def load_sweep(path: str | Path) -> SweepJob:
    """Load a configuration with a [sweep] table, whose problem may be a batch of MDPs.

    Raises:
        ConfigError: the file cannot be read, or something in it is not allowed.
    """
    table, where = read(path), f"{path}: [sweep]"
    section = table.pop("sweep", None)
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: no [sweep] table{other_command(table)}")
    job = build(table, str(path), batch=True)
    options = {key: section.pop(key) for key in ("outputs", "chunk", "zipped") if key in section}
    if not isinstance(options.get("zipped", False), bool):
        raise ConfigError(f"{where} zipped is {options['zipped']!r}; expected true or false")
    if type(options.get("chunk", 1)) is not int or options.get("chunk", 1) < 1:
        raise ConfigError(f"{where} chunk is {options['chunk']!r}; expected a positive whole number")
    listed = options.get("outputs", [])
    if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
        raise ConfigError(f"{where} outputs is {listed!r}; expected a list of names")
    return SweepJob(job, {name: values(x, f"{where} {name}") for name, x in section.items()}, options)


def values(x: Any, where: str) -> np.ndarray:
    """Grid values: a list, or a range."""
    if isinstance(x, list):
        if (array := _numbers(x)) is None:
            raise ConfigError(f"{where} is {_brief(x)}; expected numbers, equally many in every row")
        return array
    if not isinstance(x, dict):
        raise ConfigError(f"{where} is {x!r}; expected a list, or a table with from, to, count and spacing")
    refuse_unknown(x, ("from", "to", "count", "spacing"), where)
    spacing, ends = x.get("spacing"), [x.get(key) for key in ("from", "to", "count")]
    low, high, count = cast("tuple[float, float, int]", ends)  # as is checked at once
    if not all(type(end) in (int, float) and abs(end) < float("inf") for end in (low, high)) or type(count) is not int:
        raise ConfigError(f"{where} needs numbers from and to, and a whole number count")
    if spacing not in ("log", "linear") or not 1 <= count <= _MOST or (spacing == "log" and min(low, high) <= 0):
        kinds = f'spacing "log" (from and to positive) or "linear", and a count from 1 to {_MOST:,}'
        raise ConfigError(f"{where} needs {kinds}")
    return np.geomspace(low, high, count) if spacing == "log" else np.linspace(low, high, count)


def _numbers(x: Any) -> np.ndarray | None:
    """A number or a list of numbers, equally many in every row, as floats; None for anything else."""
    try:
        array = np.asarray(x)
    except ValueError:  # rows of unequal length
        return None
    return None if array.dtype.kind not in "iuf" or _has_bool(x) else array.astype(float)


def _has_bool(x: Any) -> bool:
    """Whether a nested list holds a truth value, which NumPy would take for a number beside others."""
    return any(map(_has_bool, x)) if isinstance(x, list) else isinstance(x, bool)


def _brief(x: Any) -> str:
    """A value of a file, in a message."""
    text = repr(x)
    return text if len(text) <= 80 else f"{text[:77]}..."


def build(table: Mapping[str, Any], source: str = "configuration", batch: bool = False) -> Job:
    """Build what parsed tables describe; `source` names them in errors; `batch` allows many MDPs.

    Raises:
        ConfigError: something in the tables is not allowed.
    """
    for other in ("sweep", "figure", "example"):
        if other in table:
            raise ConfigError(
                f"{source}: has a [{other}] table, hence is for `robustreg {other}`; remove it for a solve"
            )
    refuse_unknown(table, ("problem", "regulariser", "solver", "ambiguity"), source)
    for name in ("problem", "regulariser"):
        if name not in table:
            raise ConfigError(f"{source}: no [{name}] table")
    for name, section in table.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{source}: {name} is {section!r}; expected a table [{name}]")
    options = {"kind": "auto", **table.get("solver", {})}
    limits = {key: options.pop(key, None) for key in ("tol", "max_steps")}
    _check_limits(limits, f"{source}: [solver]")
    problem = problem_of(table["problem"], source)
    own = construct(REGULARISERS, table["regulariser"], f"{source}: [regulariser]")
    regulariser: Any = plain.regulariser_or_none(problem.mdp, own)
    solver = construct(SOLVERS, options, f"{source}: [solver]", extra=tuple(limits))
    if not batch and (problem.mdp.batch_shape or regulariser.batch_shape):
        raise ConfigError(f"{source}: describes a batch of problems; `solve` takes one: give scalars")
    m = problem.mdp
    try:
        jax.eval_shape(regulariser.argmax, jax.ShapeDtypeStruct((m.n_states, m.n_actions), m.dtype))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: [regulariser] does not fit the problem: {error}") from error
    ball = _ambiguity(table.get("ambiguity"), problem, f"{source}: [ambiguity]")
    return Job(problem, regulariser, solver, limits["tol"], limits["max_steps"], table, ball)


def _ambiguity(section: Mapping[str, Any] | None, problem: Problem, where: str) -> TransitionBall | None:
    """Build what an [ambiguity] table describes, and see that it fits the problem."""
    if section is None:
        return None
    if "kind" in section:
        raise ConfigError(f"{where} unknown key 'kind': there is one kind, a ball around every row; see form")
    ball = construct({"ball": _transition_ball}, {"kind": "ball", **section}, where)
    try:
        ball = ambiguity.checked(ball, problem.mdp)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} {str(error).removeprefix('ambiguity: ')}") from error
    if ball.batch_shape:
        raise ConfigError(f"{where} describes a batch of sets; give a number (or radii in the grid of a [sweep])")
    return ball


def problem_of(section: Mapping[str, Any], source: str) -> Problem:
    """Build what a [problem] table describes."""
    problem = construct(PROBLEMS, section, f"{source}: [problem]")
    return problem if isinstance(problem, Problem) else Problem(problem, section["kind"].replace("_", " "))


def construct(
    registry: Mapping[str, Callable],
    section: Mapping[str, Any],
    where: str,
    extra: tuple[str, ...] = (),
    supplied: Mapping[str, Any] | None = None,
) -> Any:
    """Call the constructor that `kind` names with the other keys.

    `extra` are allowed keys used elsewhere, `supplied` are arguments that do not come from the section.
    """
    supplied = supplied or {}
    arguments = dict(section)
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str) or kind not in registry:
        given = "no kind" if kind is None else f"unknown kind {kind!r}"
        raise ConfigError(f"{where} {given}; allowed: {', '.join(sorted(registry))}")
    constructor = registry[kind]
    # The precision is the caller's choice for all tables together, not a property of the problem.
    accepted = inspect.signature(constructor).parameters
    parameters = {n: p for n, p in accepted.items() if n not in ("dtype", *supplied)}
    refuse_unknown(arguments, (*parameters, *extra), f"{where} kind {kind!r}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise ConfigError(f"{where} kind {kind!r} needs {', '.join(missing)}")
    try:
        for name, value in arguments.items():
            if name in parameters:
                _check_plain(name, value, parameters[name])
        return constructor(**arguments, **supplied)
    except (TypeError, ValueError, OverflowError, OSError) as error:
        raise ConfigError(f"{where} kind {kind!r}: {error}") from error


def _check_plain(name: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuse TOML's strings where numbers are wanted, and truth values, which NumPy takes for 0 and 1."""
    annotation = parameter.annotation
    wanted = {int: "a whole number", float: "a number"}.get(annotation)
    fits = type(value) is int or (annotation is float and type(value) is float)
    if wanted and not fits:
        raise ValueError(f"{name} is {value!r}; expected {wanted}")
    if _has_bool(value) and type(parameter.default) is not bool:
        raise ValueError(f"{name} is {_brief(value)}; expected numbers, not true and false")


def refuse_unknown(given: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    """Refuse the first key that is not allowed, listing those that are."""
    for key in given:
        if key not in allowed:
            listed = ", ".join(sorted(set(allowed))) or "no keys"
            raise ConfigError(f"{where} unknown key {key!r}; allowed: {listed}")


def _check_limits(limits: Mapping[str, Any], where: str) -> None:
    """Out-of-range limits are refused here: inside a solve they would be a wrong result, not an error."""
    tol, steps = limits["tol"], limits["max_steps"]
    if tol is not None and not (type(tol) in (int, float) and 0 < tol < float("inf")):
        raise ConfigError(f"{where} tol is {tol!r}; expected a positive number")
    if steps is not None and not (type(steps) is int and steps > 0):
        raise ConfigError(f"{where} max_steps is {steps!r}; expected a positive whole number")
