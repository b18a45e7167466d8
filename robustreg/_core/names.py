"""Names of states and actions: kept beside an MDP, where results are read.

Names are metadata of the compiled program, not arrays: they pass through `jax.jit` and `jax.tree.map` as they are. Two
MDPs whose names differ are of different types to JAX, so that a function of the caller's, jitted over MDPs, compiles
once for each set of names. `solve` and its like take the names off first and do not.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from robustreg._core import checks

_JSON = (str, int, float, bool, type(None))


class Names:
    """Names of the states and actions of an MDP, in the order of its axes.

    Attributes:
        states: of every state, `S` of them.
        actions: of every action, `A` of them.
        ends: numbers of the states that were given no actions: an episode is over there.
    """

    __slots__ = ("states", "actions", "ends", "_hash", "_numbers")

    def __init__(self, states: Iterable[Hashable], actions: Iterable[Hashable], ends: Iterable[int] = ()):
        self.states, self.actions, self.ends = tuple(states), tuple(actions), frozenset(ends)
        # Hashed once: JAX hashes the metadata of every argument at every call.
        self._hash = hash((self.states, self.actions, self.ends))
        self._numbers = tuple({name: i for i, name in enumerate(x)} for x in (self.states, self.actions))
        for kind, names, numbers in zip(("states", "actions"), (self.states, self.actions), self._numbers):
            if len(numbers) < len(names):
                twice = next(name for i, name in enumerate(names) if numbers[name] != i)
                raise ValueError(f"two {kind} are called {twice!r}; give each a name of its own")

    def state(self, name: Hashable) -> int:
        """Return the number of a state, its index along axes of S."""
        return self._number("state", 0, name)

    def action(self, name: Hashable) -> int:
        """Return the number of an action, its index along axes of A."""
        return self._number("action", 1, name)

    def _number(self, kind: str, axis: int, name: Hashable) -> int:
        return number_of(kind, name, self._numbers[axis])

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Names) or self._hash != other._hash:
            return False
        return (self.states, self.actions, self.ends) == (other.states, other.actions, other.ends)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Names({len(self.states)} states, {len(self.actions)} actions)"

    def __reduce__(self) -> tuple[Any, ...]:
        # A hash of strings holds in one process only: another one has to make its own.
        return Names, (self.states, self.actions, tuple(self.ends))

    def to_json(self) -> dict[str, Any]:
        """Return the names as values of JSON; tuples become lists.

        Raises:
            TypeError: a name that JSON does not know.
        """
        return {
            "states": [_jsonable(name) for name in self.states],
            "actions": [_jsonable(name) for name in self.actions],
            "ends": sorted(self.ends),
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Names":
        """Rebuild the names that `to_json` returned."""
        return cls(map(_hashable, found["states"]), map(_hashable, found["actions"]), found["ends"])


def _jsonable(name: Any) -> Any:
    if isinstance(name, tuple):
        return [_jsonable(part) for part in name]
    if isinstance(name, np.generic):
        name = name.item()
    if not isinstance(name, _JSON):
        raise TypeError(f"cannot save the name {name!r} of type {type(name).__name__}; name it with text or a number")
    return name


def _hashable(name: Any) -> Hashable:
    return tuple(_hashable(part) for part in name) if isinstance(name, list) else name


def listed(names: Iterable[Hashable], most: int = 8) -> str:
    """Write the first few names for a message."""
    shown = [repr(name) for _, name in zip(range(most + 1), names)]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


def by_name(names: Names | None, available: Any, shape: tuple[int, int], x: Any) -> dict[Any, Any]:
    """Label an array of an MDP; see `MDP.by_name`."""
    n_states, n_actions = shape
    values = np.asarray(x)
    states: Any = range(n_states) if names is None else names.states
    actions: Any = range(n_actions) if names is None else names.actions
    if values.shape == (n_states,):
        return dict(zip(states, values.tolist()))
    if values.shape != shape:
        raise ValueError(
            f"by_name labels an array [S] = [{n_states}] or [S, A] = [{n_states}, {n_actions}], got shape "
            f"{list(values.shape)}; of a batch, pick a lane first"
        )
    if available is not None and np.ndim(available) > 2:
        raise ValueError("the mask of this MDP has batch axes: pick a lane first, by jax.tree.map or indexing")
    there = np.ones(shape, bool) if available is None else np.asarray(available)
    ends = frozenset() if names is None else names.ends
    return {
        state: {} if s in ends else {actions[a]: float(values[s, a]) for a in range(n_actions) if there[s, a]}
        for s, state in enumerate(states)
    }


def number_of(kind: str, name: Any, numbers: dict[Any, int]) -> int:
    """Look a name up, or refuse it with those that there are."""
    try:
        return numbers[name]
    except (KeyError, TypeError):
        raise ValueError(f"no {kind} is called {name!r}; there are: {listed(numbers)}") from None


def distribution(initial: Any, states: dict[Any, int]) -> Any:
    """Read where episodes start: the name of a state, probabilities by name, or an array `[S]` as it is.

    Raises:
        ValueError: a name that no state has.
    """
    if initial is None or checks.is_traced(initial):
        return initial
    try:
        known = getattr(initial, "ndim", 0) == 0 and initial in states
    except TypeError:  # a list, or a tuple that holds one
        known = False
    if known or isinstance(initial, (str, bytes)):
        initial = {initial: 1.0}
    if not isinstance(initial, dict):
        return initial
    start = np.zeros(len(states))
    for name, probability in initial.items():
        start[number_of("state", name, states)] += float(probability)
    return start
