"""MDPs from tables of named states and actions.

States and actions may be called anything hashable. They are numbered in the order in which they are first met, states
with rows of their own before those that are only led to; names that are exactly the numbers 0 to n - 1 keep them.

* A state lacks the actions of which it has no row: they are masked (`available`), and no policy plays them.
* A state without any row, that is only led to, is an end: nothing follows and it is worth 0. (An MDP has an action in
  every state; there it is the first one, which does nothing and ends the episode.)
* Rows of the same state, action and successor add up; the reward is their average by probability.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from robustreg._core import checks
from robustreg._core.names import Names, distribution
from robustreg.problems import table_forms
from robustreg.problems.mdps import MDP, mdp
from robustreg.problems.successors import Successors
from robustreg.problems.table_forms import Columns

_TOLERANCE = 1e-10


def from_table(
    table: Any,
    discount: Any = 0.99,
    *,
    initial: Any = None,
    columns: Mapping[str, str] | None = None,
    normalise: bool = False,
) -> MDP:
    """Build an MDP from a table of transitions between named states.

    Args:
        table: rows `(state, action, successor, probability, reward[, done])`; a data frame, dict of columns or path of
            a CSV file with columns of these or similar names; or dicts of dicts,
            `table[state][action] = [(probability, successor, reward[, done]), ...]` (`table_forms` has all).
            Rewards are in units of your own, and `done` says that nothing follows.
        discount: `[*B]`, in [0, 1), or 1 as `mdp` takes it.
        initial: the name of a state, `{name: probability}`, or `[S]`; None is uniform over all states.
        columns: which name a column has where it is not found by itself: `{"successor": "where to"}`.
        normalise: divide the probabilities of every state and action by their sum, however far it is from 1.

    Returns:
        An MDP with successor lists, whose `names` say which number a state and an action has, and whose `by_name`
        labels results. Missing actions are masked; states without actions are ends, of value 0.

    Raises:
        TypeError: what is no table.
        ValueError: a column that is missing, a row that is wrong, probabilities that do not sum to 1; names the first.
        OSError: a file that cannot be read.
    """
    read = table_forms.read(table, columns)
    states, actions, ends = _numbered(read)
    m = assemble(read, states, actions, discount, initial, normalise)
    return dataclasses.replace(m, names=Names(states, actions, ends))


def _numbered(read: Columns) -> tuple[dict[Hashable, int], dict[Hashable, int], list[int]]:
    """Numbers of all states and actions by name, and of the states that have no action."""
    acting = dict.fromkeys(read.state)
    led_to = [name for name in read.successor if name is not None]
    states = _numbers([*read.states, *acting, *led_to])
    texts = {str(name).strip(): name for name in acting}
    for i, name in enumerate(read.successor):
        other = texts.get(str(name).strip(), name)
        if name is not None and other != name and name not in acting:
            kinds = f"{type(name).__name__} and {type(other).__name__}"
            raise ValueError(
                f"{read.place(i)} leads to {name!r}, but there is a state {other!r} ({kinds}): make the two names one"
            )
    ends = [number for name, number in states.items() if name not in acting]
    if not acting:
        raise ValueError("no state of the table has an action")
    return states, _numbers([*read.actions, *read.action]), ends


def _numbers(names: Iterable[Hashable]) -> dict[Hashable, int]:
    """Number names as they come, but for those that are the numbers 0 to n - 1 themselves."""
    found: Any = list(dict.fromkeys(names))
    if all(type(name) is int for name in found) and set(found) == set(range(len(found))):
        found = range(len(found))
    return {name: i for i, name in enumerate(found)}


def assemble(
    read: Columns,
    states: Mapping[Hashable, int],
    actions: Mapping[Hashable, int],
    discount: Any,
    initial: Any,
    normalise: bool = False,
) -> MDP:
    """Build the MDP of a table whose states and actions are numbered.

    Args:
        read: the table.
        states, actions: numbers by name, 0 to S - 1 and 0 to A - 1.
        discount, initial, normalise: see `from_table`.

    Raises:
        ValueError: probabilities that do not sum to 1; names the state and action.
    """
    shape = n_states, n_actions = len(states), len(actions)
    state = np.array([states[name] for name in read.state], np.int64)
    action = np.array([actions[name] for name in read.action], np.int64)
    successor = np.array([0 if name is None else states[name] for name in read.successor], np.int64)
    row = state * n_actions + action

    def per_row(weights: np.ndarray) -> np.ndarray:
        return np.bincount(row, weights=weights, minlength=n_states * n_actions)

    there = per_row(np.ones(len(row))) > 0
    total = per_row(read.probability)
    _check_sums(read, row, total, there, normalise)
    # To rounding: a sum of .1 ten times over is 1 as well.
    probability = read.probability / total[row]
    ends = per_row(probability * read.done).reshape(shape)
    packed: Any = checks.pack_successors(row[~read.done], successor[~read.done], probability[~read.done], *shape)
    available = there.reshape(shape)
    over = ~available.any(-1)
    available[over, 0] = True
    ends[over, 0] = 1.0
    reward = per_row(probability * read.reward).reshape(shape)
    initial = distribution(initial, dict(states))
    return mdp(Successors(*packed), reward, discount, initial, ends, available=available)


def _check_sums(read: Columns, row: np.ndarray, total: np.ndarray, there: np.ndarray, normalise: bool) -> None:
    """Refuse the first state and action, in the order of the table, whose probabilities do not sum to 1."""
    bad = there & ((total <= 0) if normalise else (np.abs(total - 1) > _TOLERANCE))
    first = checks.first(bad[row])
    if first is None:
        return
    i = first[0]
    rows = np.flatnonzero(row == row[i])
    places = list(dict.fromkeys(read.place(int(k)) for k in rows))
    listed = ", ".join(places[:4]) + (", ..." if len(places) > 4 else "")
    message = (
        f"probabilities of state {read.state[i]!r} and action {read.action[i]!r} ({listed}) sum to "
        f"{checks.show(total[row[i]], 1.0)}, not 1 (tolerance {_TOLERANCE:g})"
    )
    if normalise:
        raise ValueError(f"{message}; nothing can be divided by that: leave the action out if the state has none such")
    message += "; correct them, or pass normalise=True"
    if total[row[i]] < 1:
        message += "; if the episode ends with the rest, give that a row with done"
    raise ValueError(message + _twice(read, rows))


def _twice(read: Columns, rows: np.ndarray) -> str:
    """Tell what to say of two rows that lead to the same state, which may be one that was listed twice."""
    seen: dict[Any, int] = {}
    for i in map(int, rows):
        key = (read.successor[i], bool(read.done[i]))
        j = seen.setdefault(key, i)
        if j == i:
            continue
        rewards = f"rewards {read.reward[j]:g} and {read.reward[i]:g}"
        same = "the same reward" if read.reward[i] == read.reward[j] else f"contradictory {rewards}"
        one = read.place(i) == read.place(j)
        places = f"{read.place(j)} leads twice" if one else f"{read.place(j)} and {read.place(i)} both lead"
        return (
            f"; {places} to {read.successor[i]!r}, with {same}: if that is one transition, keep one of the "
            "two; if it is two chances, their probabilities add up and the reward is their average by probability"
        )
    return ""


def numbered_table(table: Any, n_states: int) -> tuple[Columns, dict[Hashable, int], dict[Hashable, int]]:
    """Read Gymnasium's `P[s][a]`, whose states are 0 to S - 1 and whose actions are counted from 0.

    Args:
        table: dicts or lists; actions may be missing, or have no outcomes.
        n_states: S.

    Returns:
        The columns, and numbers of states and actions by name, which are the numbers themselves.

    Raises:
        ValueError: a state that is missing or led to but not there; names the first.
    """
    if isinstance(table, Mapping):
        for s in range(n_states):
            if s not in table:
                raise ValueError(f"P has no entry {s}; states and actions are numbered from 0, or see rr.from_table")
        table = {s: table[s] for s in range(n_states)}
    read = table_forms.nested_table(table, "P", (4,))
    for i, successor in enumerate(read.successor):
        fits = isinstance(successor, (int, float)) and 0 <= successor < n_states and successor == int(successor)
        if not fits:
            raise ValueError(f"{read.place(i)} leads to state {successor}; states are 0..{n_states - 1}")
    for action in read.actions:
        if not isinstance(action, (int, np.integer)) or action < 0:
            raise ValueError(f"P has an action {action!r}; actions are numbered from 0, or see rr.from_table")
    count = max(map(int, read.actions), default=-1) + 1
    if not read.state:
        raise ValueError("P has no states, or none of their actions; expected P[s][a] = [(probability, ...), ...]")
    return read, {s: s for s in range(n_states)}, {a: a for a in range(count)}


def is_numbered(table: Any) -> bool:
    """Tell whether all states of a table `P[s][a]` are numbers."""
    return not isinstance(table, Mapping) or all(isinstance(s, (int, np.integer)) for s in table)
