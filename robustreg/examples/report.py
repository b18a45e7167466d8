"""What a pipeline returns, and the few lines that all of them share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import robustreg as rr


class Problem(Protocol):
    """An MDP and the remarkable cells of its grid by name, as a [problem] table describes them."""

    @property
    def mdp(self) -> rr.MDP: ...

    @property
    def marks(self) -> Mapping[str, Sequence[int]]: ...


@dataclass(frozen=True)
class Claim:
    """Something that a pipeline says of itself.

    Attributes:
        sentence: what is claimed, with the measured numbers.
        holds: whether it is so in this run.
    """

    sentence: str
    holds: bool


@dataclass(frozen=True)
class Report:
    """Hold what a pipeline found.

    Attributes:
        rows: of the printed table, each from the name of a column to its text; all have the same columns.
        numbers: arrays to keep, by name.
        claims: what is claimed of them.
        draw: makes the picture, a matplotlib figure.
    """

    rows: Sequence[Mapping[str, str]]
    numbers: Mapping[str, Any]
    claims: Sequence[Claim]
    draw: Callable[[], Any]

    def __str__(self) -> str:
        """The table in columns, names to the left and numbers to the right; below it, the claims that hold."""
        names = list(self.rows[0])
        lines = [names, *([row[name] for name in names] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        first, *rest = widths
        table = [
            "  ".join([x.ljust(first), *(y.rjust(width) for y, width in zip(others, rest))]) for x, *others in lines
        ]
        return "\n".join([*table, *(f"holds: {claim.sentence}" for claim in self.claims if claim.holds)])

    @property
    def failed(self) -> list[str]:
        """Say which claims do not hold."""
        return [f"claimed, but not so: {claim.sentence}" for claim in self.claims if not claim.holds]


def standard_error(share: float, count: int) -> float:
    """Compute the standard error of a share of independent yes-or-no outcomes."""
    return float(np.sqrt(share * (1 - share) / count))
