"""Kinds of problems that a configuration can name: generators, environments of Gymnasium, and files."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robustreg import archive
from robustreg.problems import generators
from robustreg.problems.cassandra import from_cassandra
from robustreg.problems.gymnasium import from_gymnasium
from robustreg.problems.mdps import MDP
from robustreg.problems.prism import from_prism
from robustreg.problems.problem import Problem
from robustreg.problems.tables import from_table


def saved(path: str) -> MDP:
    """Read an MDP that `robustreg.save` wrote."""
    m = archive.load(_checked(path))
    if not isinstance(m, MDP):
        raise ValueError(f"{path} holds a {type(m).__name__}, not an MDP; save the problem itself")
    return m


def table(path: str, discount: float, initial: Any = None, columns: Any = None, normalise: Any = False) -> MDP:
    """Read a CSV file; see `from_table`."""
    return from_table(_checked(path), discount, initial=initial, columns=columns, normalise=normalise is True)


def prism(
    path: str, discount: float, rewards: Any = None, labels: Any = None, states: Any = None, ends: Any = ()
) -> MDP:
    """Read explicit files of PRISM; see `from_prism`. Further files are from the folder of the first."""
    folder = Path(_checked(path)).parent
    several = [rewards] if isinstance(rewards, str) else rewards
    others = [None if x is None else folder / x for x in (labels, states)]
    found = None if several is None else [folder / x for x in several]
    return from_prism(path, discount, rewards=found, labels=others[0], states=others[1], ends=ends)


def cassandra(path: str, discount: Any = None, initial: Any = None) -> MDP:
    """Read a file in Cassandra's format; see `from_cassandra`."""
    return from_cassandra(_checked(path), discount, initial=initial)


def _checked(path: Any) -> str:
    if not isinstance(path, str):
        raise ValueError(f"path is {path!r}; expected text")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    return path


def from_its_folder(path: str, source: Path) -> str:
    """Make a path of a configuration absolute: from the folder of that file, or the working one if only that has it.

    (A result keeps its configuration, and finds the file again from anywhere.)
    """
    places = [folder / path for folder in (source.parent, Path())]
    return str(next((place for place in places if place.exists()), places[0]).absolute())


# ---- kinds with pictures of their own


def _gymnasium(id: str, discount: float, kwargs: Mapping[str, Any] | None = None) -> Problem:
    """A tabular Gymnasium environment: `gymnasium.make(id, **kwargs)`."""
    try:
        import gymnasium
    except ImportError as error:
        raise ValueError('needs Gymnasium: pip install "robustreg[gym]"') from error
    try:
        environment: Any = gymnasium.make(id, **(kwargs or {})).unwrapped
    except Exception as error:  # an environment given wrong arguments raises whatever it likes
        raise ValueError(f"gymnasium.make refused: {type(error).__name__}: {error}") from error
    m = from_gymnasium(environment, discount=discount)
    options = ", ".join(f"{key} {value}" for key, value in (kwargs or {}).items())
    title = f"{id} ({options})" if options else id
    return Problem(m, title, _marks(environment), _ACTIONS.get(id.split("-")[0], ()))


# Gymnasium documents what its actions do, but no environment says it in a form that a program can read.
_ACTIONS = {
    "Taxi": ("south", "north", "east", "west", "pick up", "drop off"),
    "FrozenLake": ("← left", "↓ down", "→ right", "↑ up"),
    "CliffWalking": ("↑ up", "→ right", "↓ down", "← left"),
}
_MOVES = ("↑ up", "→ right", "↓ down", "← left")  # of `problems.MOVES`
_LETTERS = {"S": "start", "H": "hole", "G": "goal"}


def _marks(environment: Any) -> dict[str, tuple[int, ...]]:
    """The remarkable cells of those toy-text environments whose states are cells in row-major order."""
    drawn, cliff = getattr(environment, "desc", None), getattr(environment, "_cliff", None)
    if drawn is not None and np.size(drawn) == environment.observation_space.n:  # FrozenLake, but not Taxi
        letters = np.asarray(drawn).astype(str)
        found = {name: np.flatnonzero(letters == letter) for letter, name in _LETTERS.items()}
    elif cliff is not None:  # CliffWalking starts and ends in the corners of its last row
        corners = cliff.size - cliff.shape[1], cliff.size - 1
        found = {"start": corners[:1], "cliff": np.flatnonzero(cliff), "goal": corners[1:]}
    else:
        found = {}
    return {name: tuple(int(s) for s in states) for name, states in found.items() if len(states)}


def _named(m: MDP, path: str) -> Problem:
    """A problem that came from a file, with its own names."""
    return Problem(m, Path(path).stem, actions=() if m.names is None else tuple(map(str, m.names.actions)))


def _from_file(read: Callable[..., MDP]) -> Callable[..., Problem]:
    """The constructor of a problem that `read(path, ...)` reads."""

    @functools.wraps(read)
    def build(**arguments: Any) -> Problem:
        return _named(read(**arguments), arguments["path"])

    return build


@functools.wraps(generators.grid_world)
def _grid_world(cells: Any, **arguments: Any) -> Problem:
    return Problem(generators.grid_world(cells, **arguments), "grid world", generators.grid_marks(cells), _MOVES)


@functools.wraps(generators.slippery_grid)
def _slippery_grid(**arguments: Any) -> Problem:
    m = generators.slippery_grid(**arguments)
    drawing = inspect.signature(generators.slippery_cells).parameters
    cells = generators.slippery_cells(**{key: value for key, value in arguments.items() if key in drawing})
    return Problem(m, "slippery grid", generators.grid_marks(cells), _MOVES)


PROBLEMS: dict[str, Callable[..., Any]] = {
    "gymnasium": _gymnasium,
    "bandit": generators.bandit,
    "grid_world": _grid_world,
    "slippery_grid": _slippery_grid,
    "chain": generators.chain,
    "ring": generators.ring,
    "garnet": generators.garnet,
    "garnets": generators.garnets,
    "file": _from_file(saved),
    "table": _from_file(table),
    "prism": _from_file(prism),
    "cassandra": _from_file(cassandra),
}
