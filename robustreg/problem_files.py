"""Files that hold a problem, as a configuration names them: by a path, and arguments that TOML can express."""

from pathlib import Path
from typing import Any

from robustreg import archive
from robustreg.cassandra_files import from_cassandra
from robustreg.mdp import MDP
from robustreg.prism_files import from_prism
from robustreg.table_input import from_table


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
