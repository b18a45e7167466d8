"""Figures of the paper from TOML files: `robustreg figure CONFIG`.

```toml
[figure]
kind = "price"                     # which picture: a function of `paper_numbers`, whose arguments are the other keys
title = "What robustness costs"    # optional, over the picture
alpha = [1.0, 2.0]                 # numbers and lists, or a range:
beta = { from = 0.1, to = 100.0, count = 60, spacing = "log" }

[problem]                          # for the kinds that need one: as for `robustreg solve`
kind = "chain"
discount = 0.9

[small.figure]                     # optional: what to replace for a quick look (--small)
beta = { from = 0.1, to = 100.0, count = 5, spacing = "log" }
```

`[small.problem]` works the same way. Whatever is wrong with a file is a `ConfigError` that names the file, the table,
the key, and what is allowed.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robustreg._core.files import write_whole
from robustreg.cli import config
from robustreg.figures import paper_figures, paper_numbers
from robustreg.figures.style import available, check_formulas


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure with its numbers, ready to be drawn.

    Attributes:
        name: of its files: that of the configuration.
        title: over the picture.
        numbers: what it shows; see `paper_numbers`.
        draw: makes a matplotlib figure of `(numbers, title)`.
    """

    name: str
    title: str
    numbers: paper_numbers.Numbers
    draw: Callable[[paper_numbers.Numbers, str], Any]

    def write(self, out: Path) -> list[Path]:
        """Write `NAME.npz`, and if matplotlib is installed `NAME.png` and `NAME.pdf`, into an existing folder."""
        paths = [out / f"{self.name}.npz"]
        content: Any = {"title": np.array(self.title), **self.numbers}
        write_whole(paths[0], lambda file: np.savez(file, **content))
        if not available():
            return paths
        figure = self.draw(self.numbers, self.title)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # arranged once, for both files
        for kind, about in (("png", {}), ("pdf", {"CreationDate": None})):  # the same bits every time
            paths.append(out / f"{self.name}.{kind}")
            write_whole(paths[-1], lambda file, k=kind, a=about: figure.savefig(file, format=k, metadata=a))
        return paths


def _kind(name: str) -> Callable[..., Picture]:
    """What builds the picture of that name: the arguments are those of its numbers."""
    numbers: Callable[..., paper_numbers.Numbers] = getattr(paper_numbers, name)

    @functools.wraps(numbers)
    def build(**arguments: Any) -> Picture:
        return Picture("", "", numbers(**arguments), getattr(paper_figures, name))

    return build


KINDS = {name: _kind(name) for name in ("decision", "feasible_sets", "sequential", "consistency", "price", "attacks")}


def load(path: str | Path, small: bool = False) -> Picture:
    """Read a configuration and compute its numbers, in the precision that JAX is set to.

    Args:
        path: of the file.
        small: with the replacements of its [small] tables.

    Raises:
        ConfigError: the file cannot be read, or something in it is not allowed.
        SolveError: a problem in it could not be solved.
    """
    table, where = config.read(path), f"{path}: [figure]"
    config.refuse_unknown(table, ("figure", "problem", "small"), str(path))
    replaced = table.pop("small", {})
    sections = {**table, **{f"small.{name}": x for name, x in replaced.items()}} if isinstance(replaced, dict) else {}
    for name, section in (sections or {"small": replaced}).items():
        if not isinstance(section, dict):
            raise config.ConfigError(f"{path}: {name} is {section!r}; expected a table [{name}]")
    config.refuse_unknown(replaced, ("figure", "problem"), f"{path}: [small]")
    for name in replaced if small else ():
        table[name] = {**table.get(name, {}), **replaced[name]}
    if "figure" not in table:
        raise config.ConfigError(f"{path}: no [figure] table")
    arguments = dict(table["figure"])
    title = arguments.pop("title", "")
    if not isinstance(title, str):
        raise config.ConfigError(f"{where} title is {title!r}; expected text")
    try:
        check_formulas(title)
    except ValueError as error:
        raise config.ConfigError(f"{where} title is {error}") from error
    arguments = {key: _ranged(x, f"{where} {key}") for key, x in arguments.items()}
    picture = config.construct(KINDS, arguments, where, supplied=_problem(arguments.get("kind"), table, str(path)))
    return dataclasses.replace(picture, name=Path(path).stem, title=title)


def _ranged(x: Any, where: str) -> Any:
    """A range as its values."""
    return config.values(x, where).tolist() if isinstance(x, dict) else x


def _problem(kind: Any, table: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The problem, for the kinds that take one."""
    if kind not in KINDS:
        return {}  # refused in a moment
    needed = "problem" in inspect.signature(KINDS[kind]).parameters
    if needed != ("problem" in table):
        remedy = "needs a table [problem]" if needed else "takes no [problem]: remove that table"
        raise config.ConfigError(f"{source}: [figure] kind {kind!r} {remedy}")
    if not needed:
        return {}
    problem = config.problem_of(table["problem"], source)
    if problem.mdp.batch_shape:
        raise config.ConfigError(f"{source}: [problem] describes a batch of problems; a figure takes one")
    return {"problem": problem}
