"""An MDP with what a picture or a table needs beside it: a title, remarkable states, names of actions."""

import dataclasses
from collections.abc import Mapping

from robustreg.problems.mdps import MDP


@dataclasses.dataclass(frozen=True)
class Problem:
    """An MDP and what a picture of it needs to know.

    Attributes:
        mdp: the problem.
        title: what to call it in tables and figures.
        marks: groups of remarkable cells of a grid by name ("goal", "hole", "water", ...), state numbers.
        actions: names of the actions, empty where they have none.
    """

    mdp: MDP
    title: str
    marks: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    actions: tuple[str, ...] = ()
