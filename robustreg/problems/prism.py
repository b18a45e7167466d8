"""MDPs that the model checker PRISM wrote: its explicit files of transitions, rewards, labels and states.

    model.tra    "states choices transitions", then a line "state choice successor probability [action]" each
    model.srew   "states entries", then "state reward": earned by every step from that state (also model.rew)
    model.trew   "states choices entries", then "state choice successor reward" (also model.rew)
    model.lab    0="init" 1="goal", then "state: label label ..."
    model.sta    (x,y), then "state:(1,2)": values of the variables, which become the states' names

A Markov chain (`states transitions`, lines without a choice) is an MDP of one action. What is no finite MDP in discrete
time is refused with the line: observations, intervals, parameters, rates.
"""

import dataclasses
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robustreg._core.names import Names, listed
from robustreg.problems.mdps import MDP
from robustreg.problems.table_forms import Columns
from robustreg.problems.tables import assemble

_REWARDS = (".srew", ".trew", ".rew")


class Line(NamedTuple):
    """A line of a file that says something, and where it is."""

    path: Path
    number: int
    text: str

    def error(self, message: str) -> ValueError:
        """Return the error that names this line."""
        return ValueError(f"{self.path}, line {self.number}: {message}")

    def whole(self, word: str, what: str, below: int | None = None) -> int:
        """Read a whole number, from 0 to `below` - 1."""
        if not (word.isascii() and word.isdigit()):
            raise self.error(f"{what} is {word!r}; expected a whole number")
        if below is not None and int(word) >= below:
            raise self.error(f"{what} is {word}, but there are {below}, from 0")
        return int(word)

    def real(self, word: str, what: str) -> float:
        """Read a finite number; fractions are numbers too."""
        if word.startswith("["):
            raise self.error(f"{what} is an interval, {word}; an MDP has a single one")
        try:
            number = float(Fraction(word)) if "/" in word else float(word)
        except (ValueError, ZeroDivisionError):
            raise self.error(f"{what} is {word!r}; expected a number (a parameter has to be given one)") from None
        if not np.isfinite(number):
            raise self.error(f"{what} is {word}; expected a finite number")
        return number


def from_prism(
    path: str | os.PathLike,
    discount: Any = 0.99,
    *,
    rewards: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    labels: str | os.PathLike | None = None,
    states: str | os.PathLike | None = None,
    ends: str | Sequence[str] = (),
    initial: Any = None,
    normalise: bool = False,
) -> MDP:
    """Build an MDP from the explicit files of PRISM (`prism model.nm -exportmodel model.all`).

    Args:
        path: the file of transitions, `model.tra`.
        discount: `[*B]`, in [0, 1), or 1 as `mdp` takes it; PRISM has none.
        rewards: files of rewards, which add up; None: `.srew`, `.trew` and `.rew` of the same name that are there.
        labels: the file of labels; None: `.lab` of the same name, if there.
        states: the file of states; None: `.sta` of the same name, if there.
        ends: labels of states in which the episode is over: nothing follows, and their value is 0.
        initial: as in `from_table`; None: the states labelled "init" alike, or all where there are no labels.
        normalise: divide probabilities by their sum, where the file has too few digits.

    Returns:
        An MDP with `names`: states by their variables or numbers, actions by their labels or the number of the choice.
        Choices that a state has not got are masked; a state without choices is an end.

    Raises:
        ValueError: a file that is no finite MDP in discrete time; names the line.
        OSError: a file that cannot be read.
    """
    path = Path(path)
    model = _transitions(path)
    found = _beside(path, _REWARDS) if rewards is None else _several(rewards)
    reward = sum((_rewards(Path(file), model) for file in found), np.zeros(len(model.state)))
    (lab,), (sta,) = ([x] if x else _beside(path, (s,))[:1] or [None] for x, s in ((labels, ".lab"), (states, ".sta")))
    by_label = {} if lab is None else _labels(Path(lab), model.n_states)
    over = _ending(by_label, ends, path)
    names = list(range(model.n_states)) if sta is None else _states(Path(sta), model.n_states)
    read, of_action = _columns(model, reward, names, over)
    if initial is None and by_label.get("init"):
        initial = np.bincount(sorted(by_label["init"]), minlength=model.n_states) / len(by_label["init"])
    of_state = {name: s for s, name in enumerate(names)}
    m = assemble(read, of_state, of_action, discount, initial, normalise)
    without = set(of_state.values()) - {of_state[name] for name in read.state}
    return dataclasses.replace(m, names=Names(names, of_action, without))


def _columns(
    model: "Model", reward: np.ndarray, names: Sequence[Hashable], over: set[int]
) -> tuple[Columns, dict[Any, int]]:
    """The transitions out of states that are not over, and numbers of the actions by name."""
    kept = [i for i, s in enumerate(model.state) if s not in over]
    labels = _action_names(model)
    if labels is None:
        actions: list[Any] = [model.choice[i] for i in kept]
        of_action = {a: a for a in range(max(actions, default=-1) + 1)}
    else:
        actions = [labels[model.state[i], model.choice[i]] for i in kept]
        of_action = {name: a for a, name in enumerate(dict.fromkeys(actions))}
    if not of_action:
        raise ValueError(f"{model.path}: no state has a choice, so that there is nothing to decide")
    read = Columns(
        state=[names[model.state[i]] for i in kept],
        action=actions,
        successor=[names[model.successor[i]] for i in kept],
        probability=model.probability[kept],
        reward=reward[kept],
        done=np.zeros(len(kept), bool),
        place=lambda k: f"{model.path}, line {model.lines[kept[k]].number}",
    )
    return read, of_action


class Model(NamedTuple):
    """The transitions of a file, one entry per line each; `choice` is 0 in a chain."""

    path: Path
    n_states: int
    state: list[int]
    choice: list[int]
    successor: list[int]
    probability: np.ndarray
    label: list[str]
    lines: list[Line]
    chain: bool


def lines_of(path: Path) -> Iterator[Line]:
    """Yield the lines of a text file that hold more than a comment."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, text in enumerate(file, 1):
            text = text.split("#", 1)[0].strip()
            if text:
                yield Line(path, number, text)


def _several(x: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str | os.PathLike]:
    return [x] if isinstance(x, (str, os.PathLike)) else list(x)


def _beside(path: Path, suffixes: Iterable[str]) -> list[str | os.PathLike]:
    return [file for suffix in suffixes if (file := path.with_suffix(suffix)).exists()]


def _header(lines: Iterator[Line], path: Path) -> tuple[Line, list[int]]:
    head = next(lines, None)
    if head is None:
        raise ValueError(f"{path} is empty")
    return head, [head.whole(word, "a number of the first line") for word in head.text.split()]


def _transitions(path: Path) -> Model:
    lines = lines_of(path)
    head, counts = _header(lines, path)
    if len(counts) == 4:
        raise head.error("four numbers: the states of this model are observed in part (POMDP), which no MDP is")
    if len(counts) not in (2, 3) or counts[0] < 1:
        raise head.error("expected the numbers of states, choices and transitions")
    chain, n = len(counts) == 2, counts[0]
    form = "state successor probability" if chain else "state choice successor probability [action]"
    body, rows, labels = list(lines), [], []
    for line in body:
        words = line.text.split()
        if len(words) not in ((3, 4) if chain else (4, 5)):
            raise line.error(f"expected {form}, got {line.text!r}")
        words = [words[0], "0", *words[1:]] if chain else words
        probability = line.real(words[3], "the probability")
        if not 0 <= probability <= 1 + 1e-6:
            rates = "; a rate of a model in continuous time? Export its uniformised chain" if probability > 1 else ""
            raise line.error(f"{words[3]} is no probability{rates}")
        state, successor = (line.whole(words[k], "a state", n) for k in (0, 2))
        rows.append((state, line.whole(words[1], "the choice"), successor, probability))
        labels.append(words[4] if len(words) > 4 else "")
    if len(body) != counts[-1]:
        raise head.error(f"announces {counts[-1]} transitions, but {len(body)} follow: the file is not whole")
    state, choice, successor, probability = ([row[k] for row in rows] for k in range(4))
    model = Model(path, n, state, choice, successor, np.array(probability, float), labels, body, chain)
    if chain:
        _refuse_rates(model)
    return model


def _refuse_rates(model: Model) -> None:
    """Rates may all be below 1, but then they do not sum to it."""
    total = np.bincount(model.state, weights=model.probability, minlength=model.n_states)
    for i, s in enumerate(model.state):
        if abs(total[s] - 1) > 1e-4:
            raise model.lines[i].error(
                f"the numbers of state {s} sum to {total[s]:.6g}, not 1; rates of a model in continuous time? Export "
                "its uniformised chain"
            )


def _rewards(path: Path, model: Model) -> np.ndarray:
    """Tell what every transition earns, by a file of rewards of states or of transitions."""
    lines = lines_of(path)
    head, counts = _header(lines, path)
    width = {2: 2, 3: 4}.get(len(counts), 0)
    if model.chain and len(counts) == 2:
        width = 0  # of states or of transitions: the lines will tell
    if counts[0] != model.n_states:
        raise head.error(f"is about {counts[0]} states, the transitions about {model.n_states}")
    where = {key: i for i, key in enumerate(zip(model.state, model.choice, model.successor))}
    earned, state = np.zeros(len(model.state)), np.array(model.state, int)
    for line in lines:
        words = line.text.split()
        fits = len(words) == width if width else len(words) in (2, 3)
        if not fits:
            raise line.error(f"expected a state and its reward, or a transition and its reward, got {line.text!r}")
        reward, s = line.real(words[-1], "the reward"), line.whole(words[0], "a state", model.n_states)
        if len(words) == 2:
            earned[state == s] += reward
            continue
        choice = 0 if len(words) == 3 else line.whole(words[1], "the choice")
        key = (s, choice, line.whole(words[-2], "a state", model.n_states))
        if key not in where:
            raise line.error("there is no such transition")
        earned[where[key]] += reward
    return earned


def _labels(path: Path, n_states: int) -> dict[str, set[int]]:
    lines = lines_of(path)
    head = next(lines, None)
    names = {} if head is None else dict(re.findall(r'(\d+)\s*=\s*"([^"]*)"', head.text))
    if head is None or not names:
        raise ValueError(f'{path} names no labels; expected a first line such as 0="init" 1="goal"')
    found: dict[str, set[int]] = {name: set() for name in names.values()}
    for line in lines:
        state, separator, rest = line.text.partition(":")
        s = line.whole(state.strip(), "a state", n_states)
        for number in rest.split():
            if not separator or number not in names:
                raise line.error(f"{number} is none of the labels {listed(names)}")
            found[names[number]].add(s)
    return found


def _ending(by_label: dict[str, set[int]], ends: str | Sequence[str], path: Path) -> set[int]:
    """States that are over."""
    over: set[int] = set()
    for label in [ends] if isinstance(ends, str) else ends:
        if label not in by_label:
            known = f"there are: {listed(by_label)}" if by_label else f"no file of labels lies beside {path}"
            raise ValueError(f"no label is called {label!r}; {known}")
        over |= by_label[label]
    return over


def _states(path: Path, n_states: int) -> list[Hashable]:
    lines = lines_of(path)
    if next(lines, None) is None:
        raise ValueError(f"{path} is empty")
    names: dict[int, Hashable] = {}
    for line in lines:
        number, _, values = line.text.partition(":")
        found = [_value(x) for x in values.strip().strip("()").split(",")]
        names[line.whole(number.strip(), "a state", n_states)] = tuple(found) if len(found) > 1 else found[0]
    if len(names) != n_states:
        raise ValueError(f"{path} names {len(names)} states, the transitions are between {n_states}")
    return [names[s] for s in range(n_states)]


def _value(text: str) -> Hashable:
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _action_names(model: Model) -> dict[tuple[int, int], str] | None:
    """Labels of all choices, None where one has none or a state has one twice."""
    names: dict[tuple[int, int], str] = {}
    for state, choice, label in zip(model.state, model.choice, model.label):
        if not label or names.setdefault((state, choice), label) != label:
            return None
    return names if len({(state, label) for (state, _), label in names.items()}) == len(names) else None
