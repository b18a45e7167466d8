"""MDPs in the text format of Cassandra's solvers (`.mdp`, also `.MDP`, `.pomdp` without observations).

    discount: 0.95                     states and actions by name or by number; `*` stands for all of them
    values: reward                     or cost, which is then the negative of a reward
    states: cool warm off              or how many
    actions: slow fast                 or how many
    start: cool                        a name, S probabilities or `uniform`; `start include:` and `exclude:` some
    T: fast : cool : warm 0.5          one number; S of a row after `T: a : s`; S x S after `T: a`; what is said later
    T: slow identity                   holds. `identity` and `uniform` stand for their matrix or row
    R: fast : cool : * 2.0             reward of an action, a state and its successor, in the same forms

Observations make a POMDP, which is refused with the line.
"""

import dataclasses
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robustreg._core.names import Names, listed
from robustreg.problems.mdps import MDP
from robustreg.problems.prism import lines_of
from robustreg.problems.table_forms import Columns
from robustreg.problems.tables import assemble

_WORDS = ("discount", "values", "states", "actions", "observations", "start", "T", "R", "O")
_AFTER = ("names, or how many there are", "one word")
_MOST = 10**8  # entries of T


class Word(NamedTuple):
    """A word of a file, and its line."""

    text: str
    line: int


def from_cassandra(path: str | os.PathLike, discount: Any = None, *, initial: Any = None) -> MDP:
    """Build an MDP from a file in Cassandra's format.

    Args:
        path: of the file.
        discount: `[*B]`, in [0, 1); None: the one of the file.
        initial: as in `from_table`; None: the start of the file, or all states alike where it has none.

    Returns:
        An MDP with the `names` of the file. All actions are available in all states.

    Raises:
        ValueError: a file that is no MDP (observations), a word or number that cannot be; names the line.
        OSError: a file that cannot be read.
    """
    return _Reader(Path(path)).mdp(discount, initial)


class _Reader:
    """The words of a file, from the first to the last, and what they have said so far."""

    def __init__(self, path: Path):
        self.path = path
        self.words = [Word(w, line.number) for line in lines_of(path) for w in re.findall(r":|[^\s:]+", line.text)]
        self.at = 0
        self.discount: float | None = None
        self.sign = 1.0
        self.names: dict[str, list[Hashable]] = {}
        self.start: np.ndarray | None = None
        self.tables: dict[str, np.ndarray] = {}
        self.lines = np.zeros(0)
        while self.at < len(self.words):
            self._statement()

    def error(self, line: int, message: str) -> ValueError:
        return ValueError(f"{self.path}, line {line}: {message}")

    def next(self, expected: str) -> Word:
        if self.at >= len(self.words):
            raise ValueError(f"{self.path} ends where {expected} should stand")
        self.at += 1
        return self.words[self.at - 1]

    def peek(self, ahead: int = 0) -> str:
        return self.words[self.at + ahead].text if self.at + ahead < len(self.words) else ""

    def _statement(self) -> None:
        word = self.next("a statement")
        if word.text not in _WORDS:
            raise self.error(word.line, f"{word.text!r} begins no statement; expected one of: {', '.join(_WORDS[:-1])}")
        if word.text in ("observations", "O"):
            raise self.error(
                word.line,
                f"{word.text!r} is about observations: this is a POMDP, whose states are observed in part. An MDP is "
                "solved here; take these statements out only if the state is seen",
            )
        which = self.next("':'").text if word.text == "start" and self.peek() in ("include", "exclude") else ""
        colon = self.next("':'")
        if colon.text != ":":
            raise self.error(colon.line, f"{colon.text!r} stands where ':' should, after {word.text!r}")
        if word.text in ("T", "R"):
            self._table(word)
        elif word.text == "start":
            self._start(word, which)
        else:
            self._preamble(word)

    def _items(self) -> list[Word]:
        """Words up to the next statement."""
        items = []
        while self.at < len(self.words) and not self._begins():
            items.append(self.next("a word"))
        return items

    def _begins(self) -> bool:
        starts = self.peek() == "start" and self.peek(1) in ("include", "exclude")
        return self.peek(1) == ":" or starts

    def _preamble(self, word: Word) -> None:
        items = self._items()
        single = word.text in ("discount", "values")
        if not items or (single and len(items) > 1):
            raise self.error(word.line, f"{word.text!r} is followed by {len(items)} words; expected {_AFTER[single]}")
        if word.text == "discount":
            self.discount = self._number(items[0])
        elif word.text == "values":
            if items[0].text not in ("reward", "cost"):
                raise self.error(items[0].line, f"values are {items[0].text!r}; expected reward or cost")
            self.sign = 1.0 if items[0].text == "reward" else -1.0
        elif len(items) == 1 and items[0].text.isdigit() and int(items[0].text) > 0:
            self.names[word.text] = list(range(int(items[0].text)))
        else:
            self.names[word.text] = [item.text for item in items]

    def _number(self, word: Word) -> float:
        try:
            number = float(word.text)
        except ValueError:
            raise self.error(word.line, f"{word.text!r} stands where a number should") from None
        if not np.isfinite(number):
            raise self.error(word.line, f"{word.text} is no finite number")
        return number

    def _which(self, kind: str, word: Word) -> Any:
        """The number of a state or action, or all of them, as an index that keeps its axis."""
        names = self.names.get(kind)
        if names is None:
            raise self.error(word.line, f"the {kind} have to be given before this line")
        if word.text == "*":
            return slice(None)
        if word.text in names:
            number = names.index(word.text)
        elif word.text.isdigit() and int(word.text) < len(names):
            number = int(word.text)
        else:
            raise self.error(word.line, f"{word.text!r} is none of the {kind}: {listed(names)}")
        return slice(number, number + 1)

    def _start(self, word: Word, which: str) -> None:
        items, n = self._items(), len(self.names.get("states", ()))
        if not items or not n:
            raise self.error(word.line, "start says nothing, or stands before the states")
        if which:
            start = np.full(n, float(which == "exclude"))
            for item in items:
                start[self._which("states", item)] = float(which == "include")
        elif items[0].text == "uniform":
            start = np.ones(n)
        elif len(items) == 1 and n > 1:
            start = np.zeros(n)
            start[self._which("states", items[0])] = 1.0
        else:
            start = np.array([self._number(item) for item in items])
            if len(start) != n or abs(start.sum() - 1) > 1e-6 or (start < 0).any():
                got = f"{len(start)} numbers that sum to {start.sum():.6g}"
                raise self.error(word.line, f"start has {got}; expected {n} probabilities, a state or uniform")
        if start.sum() == 0:
            raise self.error(word.line, "start excludes every state")
        self.start = start / start.sum()

    def _table(self, word: Word) -> None:
        """One statement about T or R: up to three references, then a number, a row or a matrix."""
        shape = self._shape(word)
        first = self.next("an action")
        index = [self._which("actions", first)]
        while self.peek() == ":":
            self.next("':'")
            reference = self.next("a state")
            if len(index) == 3:
                if word.text == "T" or reference.text != "*":
                    raise self.error(reference.line, f"{reference.text!r} is an observation: this is a POMDP")
                continue
            index.append(self._which("states", reference))
        table = self.tables.setdefault(word.text, np.zeros(shape))
        table[tuple(index)] = self._block(word, 3 - len(index), shape[-1])
        if word.text == "T":
            self.lines[tuple(index)] = first.line

    def _shape(self, word: Word) -> tuple[int, int, int]:
        n, k = (len(self.names.get(kind, ())) for kind in ("states", "actions"))
        if not n or not k:
            raise self.error(word.line, f"states and actions have to be given before {word.text}")
        if n * n * k > _MOST:
            raise self.error(word.line, f"{n} x {n} x {k} entries are too many to write out; build rr.mdp from lists")
        if not self.lines.size:
            self.lines = np.zeros((k, n, n), np.int32)
        return k, n, n

    def _block(self, word: Word, axes: int, n: int) -> np.ndarray:
        """Numbers along the last `axes` axes of a table."""
        keyword = self.peek()
        if keyword in ("uniform", "identity") and word.text == "T" and axes > (keyword == "identity"):
            self.next("a number")
            return np.eye(n) if keyword == "identity" else np.full((n,) * axes, 1 / n)
        numbers = []
        for _ in range(n**axes):
            item = self.next("a number")
            number = self._number(item)
            if word.text == "T" and not 0 <= number <= 1 + 1e-6:
                raise self.error(item.line, f"{item.text} is no probability")
            numbers.append(number)
        return np.reshape(numbers, (n,) * axes)

    def mdp(self, discount: Any, initial: Any) -> MDP:
        """Tell what the file says, as an MDP."""
        states, actions = self.names.get("states"), self.names.get("actions")
        if states is None or actions is None or "T" not in self.tables:
            raise ValueError(f"{self.path} gives no states, no actions or no transitions T")
        discount = self.discount if discount is None else discount
        if discount is None:
            raise ValueError(f"{self.path} gives no discount; pass one")
        P = self.tables["T"].swapaxes(0, 1)
        empty = np.argwhere(P.sum(-1) == 0)
        if len(empty):
            s, a = empty[0]
            raise ValueError(f"{self.path} gives no transitions of action {actions[a]!r} in state {states[s]!r}")
        s, a, t = np.nonzero(P)
        reward = np.zeros_like(self.tables["T"]) if "R" not in self.tables else self.sign * self.tables["R"]
        read = Columns(
            state=[states[i] for i in s],
            action=[actions[i] for i in a],
            successor=[states[i] for i in t],
            probability=P[s, a, t],
            reward=reward[a, s, t],
            done=np.zeros(len(s), bool),
            place=lambda i: f"{self.path}, line {self.lines[a[i], s[i], t[i]]}",
        )
        names = Names(states, actions)
        of_state, of_action = ({name: i for i, name in enumerate(x)} for x in (states, actions))
        m = assemble(read, of_state, of_action, discount, self.start if initial is None else initial)
        return dataclasses.replace(m, names=names)
