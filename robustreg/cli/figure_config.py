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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from robustreg._core.files import write_whole
from robustreg.cli import config, small_tables
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
    """Tell what builds the picture of that name: the arguments are those of its numbers."""
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
    table, where = small_tables.read(path, "figure", small), f"{path}: [figure]"
    title = table["figure"].pop("title", "")
    if not isinstance(title, str):
        raise config.ConfigError(f"{where} title is {title!r}; expected text")
    try:
        check_formulas(title)
    except ValueError as error:
        raise config.ConfigError(f"{where} title is {error}") from error
    arguments = small_tables.arguments(table, "figure", str(path))
    supplied = small_tables.problem(KINDS, table, "figure", str(path))
    picture = config.construct(KINDS, arguments, where, supplied=supplied)
    return dataclasses.replace(picture, name=Path(path).stem, title=title)
