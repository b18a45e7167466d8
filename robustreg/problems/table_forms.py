"""The forms in which people have a table of transitions, all read into the same columns.

* rows `(state, action, successor, probability, reward[, done])`, or dicts with these names; a generator will do;
* a data frame, a structured array or a dict of columns, whose columns are found by name;
* the path of a CSV file with these columns;
* dicts of dicts, `table[state][action] = [(probability, successor, reward[, done]), ...]` as in Gymnasium, the
  innermost list also as `{successor: (probability, reward[, done])}`, or a lone tuple;
* the same in one dict, `table[state, action] = [...]`.
"""

import csv
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

ROLES = ("state", "action", "successor", "probability", "reward", "done")
_OPTIONAL = ("done",)
_ALIASES = {
    "state": ("state", "s", "from", "source", "from_state", "state_from", "current_state"),
    "action": ("action", "a", "act"),
    "successor": ("successor", "next_state", "next", "s'", "sp", "s_next", "s1", "to", "to_state", "target"),
    "probability": ("probability", "prob", "p", "transition_probability", "chance", "weight"),
    "reward": ("reward", "r", "rew"),
    "done": ("done", "terminated", "terminal", "end", "ends", "is_terminal"),
}
_TRUE, _FALSE = ("true", "yes", "y", "t", "1", "1.0"), ("false", "no", "n", "f", "0", "0.0", "", "nan", "none")
_EXPECTED = "(state, action, successor, probability, reward[, done])"


class Columns(NamedTuple):
    """A table of transitions by columns, one entry per row each.

    Attributes:
        state, action, successor: names; a successor is None where a row that ends the episode gives none.
        probability, reward: numbers, in double precision.
        done: whether the episode ends with the row.
        place: says where a row stands, for messages.
        states, actions: names that are known apart from the rows, in their order.
    """

    state: list[Any]
    action: list[Any]
    successor: list[Any]
    probability: np.ndarray
    reward: np.ndarray
    done: np.ndarray
    place: Callable[[int], str]
    states: Sequence[Any] = ()
    actions: Sequence[Any] = ()


def read(table: Any, columns: Mapping[str, str] | None) -> Columns:
    """Read a table in any of the forms above.

    Args:
        table: it.
        columns: which name a column has, by role, where it is not found by itself.

    Raises:
        TypeError: what is no table.
        ValueError: a column that is missing, a row that is no row; names the first.
    """
    if columns is not None and (unknown := [role for role in columns if role not in ROLES]):
        raise ValueError(f"columns names {unknown[0]!r}; the columns are {', '.join(ROLES)}")
    if isinstance(table, (str, os.PathLike)):
        return _csv(table, columns)
    if isinstance(table, Mapping):
        return _mapping(table, columns)
    names = getattr(getattr(table, "dtype", None), "names", None)
    if names:
        return _by_column({name: table[name].tolist() for name in names}, columns, _row)
    if hasattr(table, "columns"):
        return _by_column({str(name): _listed(table[name]) for name in table.columns}, columns, _row)
    if isinstance(table, np.ndarray):
        table = table.tolist()
    if not isinstance(table, Iterable):
        raise TypeError(f"a table is rows {_EXPECTED}, dicts, a data frame or the path of a CSV file; got {table!r}")
    rows = list(table)
    if rows and all(_is_choices(row) for row in rows):
        return nested_table(rows, "table", (3, 4))
    return _rows(rows, columns, _row)


def _is_choices(row: Any) -> bool:
    """Whether an entry of a table is the actions of a state, rather than a row: a name is no list and no dict."""
    if isinstance(row, Mapping):
        return _is_actions(row)
    return isinstance(row, (list, tuple)) and all(isinstance(part, (Mapping, list)) for part in row)


def _row(i: int) -> str:
    return f"row {i}"


def _listed(column: Any) -> list[Any]:
    return column.tolist() if hasattr(column, "tolist") else column.to_list()


# ---- rows and columns


def _rows(rows: list[Any], columns: Mapping[str, str] | None, place: Callable[[int], str]) -> Columns:
    if not rows:
        raise ValueError("the table has no rows")
    if all(isinstance(row, Mapping) for row in rows):
        found: dict[str, list[Any]] = {str(name): [row.get(name) for row in rows] for name in rows[0]}
        return _by_column(found, columns, place)
    for i, row in enumerate(rows):
        if isinstance(row, (str, bytes, Mapping)) or not isinstance(row, Sequence) or len(row) not in (5, 6):
            raise ValueError(f"{place(i)} is {row!r}; expected {_EXPECTED}")
    by_role = {role: [row[k] for row in rows] for k, role in enumerate(ROLES[:5])}
    return _checked({**by_role, "done": [len(row) > 5 and row[5] for row in rows]}, place)


def _by_column(found: Mapping[str, list[Any]], columns: Mapping[str, str] | None, place: Any) -> Columns:
    """Columns by their names, those given or the usual ones, whatever their case."""
    lower = {name.strip().lower().replace(" ", "_"): name for name in found}
    taken: dict[str, list[Any]] = {}
    for role in ROLES:
        if role in (columns or {}):
            name = (columns or {})[role]
            if name not in found:
                raise ValueError(f"the table has no column {name!r} for the {role}; it has: {', '.join(found)}")
        else:
            name = next((lower[alias] for alias in _ALIASES[role] if alias in lower), None)
        if name is not None:
            taken[role] = found[name]
        elif role not in _OPTIONAL:
            usual = ", ".join(_ALIASES[role][:4])
            raise ValueError(
                f"the table has no column for the {role} (one of {usual}, ...); it has: {', '.join(found)}; "
                f'rename one, or pass columns={{"{role}": NAME}}'
            )
    lengths = {len(column) for column in taken.values()}
    if len(lengths) > 1:
        raise ValueError(f"the table's columns have different lengths: {sorted(lengths)}")
    if lengths == {0}:
        raise ValueError("the table has no rows")
    return _checked({"done": [False] * len(taken["state"]), **taken}, place)


def _checked(taken: Mapping[str, list[Any]], place: Callable[[int], str]) -> Columns:
    """Columns whose entries are what they should be; refuses the first that is not."""
    names = {role: _names(role, taken[role], place) for role in ROLES[:3]}
    numbers = {role: _numbers(role, taken[role], place) for role in ("probability", "reward")}
    done = np.array([_truth(x, i, place) for i, x in enumerate(taken["done"])], bool)
    for i, successor in enumerate(names["successor"]):
        for role in ("state", "action"):
            if _missing(names[role][i]):
                raise ValueError(f"{place(i)} has no {role}")
        if _missing(successor):
            if not done[i]:
                raise ValueError(f"{place(i)} has no successor; only a row with done may leave it out")
            names["successor"][i] = None
    return Columns(
        state=names["state"],
        action=names["action"],
        successor=names["successor"],
        probability=numbers["probability"],
        reward=numbers["reward"],
        done=done,
        place=place,
    )


def _names(role: str, column: list[Any], place: Callable[[int], str]) -> list[Any]:
    """Names of one column; whole numbers that came as floats, as they do from arrays, are whole again."""
    found = [x.item() if isinstance(x, np.generic) else x for x in column]
    for i, name in enumerate(found):
        try:
            hash(name)
        except TypeError:
            raise ValueError(f"{place(i)} has the {role} {name!r}; a name must be hashable, as text is") from None
    if all(isinstance(x, float) and (x != x or abs(x) < 2**53 and x == int(x)) for x in found):
        found = [x if _missing(x) else int(x) for x in found]
    return found


def _missing(name: Any) -> bool:
    """Whether there is no name: None, NaN or pandas' NA, or no text."""
    return name is None or name == "" or type(name).__name__ == "NAType" or (isinstance(name, float) and name != name)


def _numbers(role: str, column: list[Any], place: Callable[[int], str]) -> np.ndarray:
    found = np.empty(len(column))
    for i, x in enumerate(column):
        try:
            found[i] = float(x)
        except (TypeError, ValueError):
            order = f"; the order of a row is {_EXPECTED}" if role == "probability" else ""
            raise ValueError(f"{place(i)} has the {role} {x!r}; expected a number{order}") from None
    if role == "probability":
        bad = np.flatnonzero(~((found >= 0) & (found <= 1 + 1e-6)))
        rule = "a probability lies between 0 and 1; the order of a row is " + _EXPECTED
    else:
        bad, rule = np.flatnonzero(~np.isfinite(found)), "rewards must be finite; leave out what cannot be done"
    if bad.size:
        raise ValueError(f"{place(int(bad[0]))} has the {role} {found[bad[0]]:g}; {rule}")
    return found


def _truth(x: Any, i: int, place: Callable[[int], str]) -> bool:
    if x is None or (isinstance(x, float) and x != x):
        return False
    if isinstance(x, (bool, np.bool_)) or (isinstance(x, (int, float)) and x in (0, 1)):
        return bool(x)
    text = str(x).strip().lower()
    if text not in _TRUE + _FALSE:
        raise ValueError(f"{place(i)} has done {x!r}; expected true or false")
    return text in _TRUE


def _csv(path: str | os.PathLike, columns: Mapping[str, str] | None) -> Columns:
    """A CSV file, with a line of names or without; names that are all whole numbers are numbers."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        sample = file.read(4096)
        file.seek(0)
        separator = max(",;\t", key=sample.split("\n", 1)[0].count)
        reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if any(map(str.strip, line))]
    if not lines:
        raise ValueError(f"{path} has no rows")
    header = lines[0][1]
    named = columns is not None or not _is_number(header[3] if len(header) in (5, 6) else "")
    body = lines[named:]
    width = len(header)
    wrong = next((n for n, line in body if len(line) != width), None)
    if wrong is not None:
        raise ValueError(f"{path}, line {wrong} has another number of columns than line {lines[0][0]}, {width}")

    def place(i: int) -> str:
        return f"{path}, line {body[i][0]}"

    if not named:
        return _whole(_rows([line for _, line in body], None, place))
    by_name = {name: [line[k] for _, line in body] for k, name in enumerate(header)}
    try:
        return _whole(_by_column(by_name, columns, place))
    except ValueError as error:
        raise ValueError(str(error).replace("the table has", f"{path} has", 1)) from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole(read: Columns) -> Columns:
    """Names that are all written as whole numbers, as such."""

    def whole(*columns: list[Any]) -> list[list[Any]]:
        texts = [x for column in columns for x in column if x is not None]
        if not all(x.isascii() and x.isdigit() and str(int(x)) == x for x in texts):
            return list(columns)
        return [[x if x is None else int(x) for x in column] for column in columns]

    state, successor = whole(read.state, read.successor)
    return read._replace(state=state, successor=successor, action=whole(read.action)[0])


# ---- dicts


def _mapping(table: Mapping[Any, Any], columns: Mapping[str, str] | None) -> Columns:
    """A dict of columns, of states, or of (state, action) pairs."""
    if columns is not None or all(isinstance(key, str) for key in table) and _is_columns(table):
        return _by_column({str(name): _listed(np.asarray(x, object)) for name, x in table.items()}, columns, _row)
    pairs = table and all(isinstance(key, tuple) and len(key) == 2 for key in table)
    if pairs and not any(isinstance(x, Mapping) and _is_actions(x) for x in table.values()):
        nested: dict[Any, dict[Any, Any]] = {}
        for (state, action), outcomes in table.items():
            nested.setdefault(state, {})[action] = outcomes
        table = nested
    return nested_table(table, "table", (3, 4))


def _is_columns(table: Mapping[Any, Any]) -> bool:
    known = {name.strip().lower().replace(" ", "_") for name in table}
    needed = (role for role in ROLES if role not in _OPTIONAL)
    return all(known & set(_ALIASES[role]) for role in needed) and not any(
        isinstance(x, Mapping) for x in table.values()
    )


def _is_actions(x: Mapping[Any, Any]) -> bool:
    """Whether a dict holds outcomes by action, rather than numbers by successor."""
    return all(isinstance(part, (Mapping, list)) for part in x.values())


def nested_table(table: Any, name: str, lengths: tuple[int, ...]) -> Columns:
    """Read `table[state][action] = [(probability, successor, reward[, done]), ...]`, dicts or lists at each level.

    Args:
        table: it; an action that is not there, or has no outcomes, is not available.
        name: what messages call it.
        lengths: how many entries an outcome may have.

    Raises:
        ValueError: something else in the place of an outcome; names the first.
    """
    rows: list[tuple[Any, ...]] = []
    places: list[str] = []
    actions: dict[Hashable, None] = {}
    for state, choices in _items(table):
        if not isinstance(choices, (Mapping, Sequence)) or isinstance(choices, (str, bytes)):
            raise ValueError(f"{name}[{state!r}] is {choices!r}; expected its actions, {{action: outcomes}}")
        for action, outcomes in _items(choices):
            actions[action] = None
            where = f"{name}[{state!r}][{action!r}]"
            for outcome in _outcomes(outcomes):
                rows.append((state, action, *_outcome(outcome, where, lengths)))
                places.append(where)
    by_role = {role: [row[k] for row in rows] for k, role in enumerate(ROLES)}
    read = _checked(by_role, places.__getitem__)
    return read._replace(states=[state for state, _ in _items(table)], actions=list(actions))


def _items(x: Any) -> Iterable[tuple[Any, Any]]:
    return x.items() if isinstance(x, Mapping) else enumerate(x)


def _outcomes(x: Any) -> Iterable[Any]:
    """Tell what an action may lead to, as a list of tuples."""
    if isinstance(x, Mapping):
        return [(p[0], s, *p[1:]) if isinstance(p, (tuple, list)) else (p, s, 0.0) for s, p in x.items()]
    return [x] if isinstance(x, tuple) and x and isinstance(x[0], (int, float)) else x


def _outcome(item: Any, where: str, lengths: tuple[int, ...]) -> tuple[Any, ...]:
    """Successor, probability, reward and done."""
    optional = 3 in lengths
    try:
        if len(item) not in lengths:
            raise TypeError
        probability, successor, reward = item[:3]
        probability, reward = float(probability), float(reward)
    except (TypeError, ValueError):
        form = f"(probability, successor, reward{'[, done]' if optional else ', terminated'})"
        raise ValueError(f"{where} holds {item!r}; expected {form}") from None
    return successor, probability, reward, item[3] if len(item) > 3 else False
