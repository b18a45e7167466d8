"""What pictures are drawn with: figures without pyplot, colours, marked cells of a grid, arrows, colour scales.

Matplotlib is imported when something is drawn: no window, no global state, no backend to choose.

Conventions. Cells of a grid are states in row-major order, the first row on top. Both colour maps (cividis; red to
blue) can be read with every common form of colour blindness.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from robustreg._files import write_whole

Marks = Mapping[str, Sequence[int]]
Grid = tuple[int, int]

VALUES, DIFFERENCES, INK = "cividis", "RdBu_r", "#1a1a1a"
# Marked cells: a letter, its colour, and the fill of cells that nobody acts in (None: an ordinary cell).
STYLES = {
    "start": ("S", "black", None),
    "goal": ("★", "#b8860b", "white"),
    "hole": ("H", "white", "#404040"),
    "cliff": ("C", "white", "#404040"),
    "wall": ("", "white", "#9e9e9e"),
    "water": ("≈", "#1f4e9e", None),
}
UNMARKED: Marks = {}
# An arrow from the origin to (1, 0). Scaled as a whole: a short one keeps its shape.
_ARROW = np.array([[0, 0.07], [0.55, 0.07], [0.55, 0.24], [1, 0], [0.55, -0.24], [0.55, -0.07], [0, -0.07]])


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        new_figure(1.0, 1.0)
    except ModuleNotFoundError:
        return False
    return True


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that size in inches."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('figures need matplotlib: pip install "robustreg[figures]"') from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def write_figures(out: Path, drawn: Mapping[str, Any]) -> list[Path]:
    """Write figures by name as PNG files into a folder; each appears whole or not at all."""
    paths = [out / f"{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values()):
        write_whole(path, lambda file, figure=figure: figure.savefig(file, format="png"))
    return paths


def heading(title: str, subject: str, between: str = "\n") -> str:
    """Title of a picture over what it shows, or that alone."""
    return f"{title}{between}{subject}" if title else subject


def draw_arrows(axes: Any, policy: np.ndarray, steps: ArrayLike, grid: Grid, marks: Marks, **style: Any) -> None:
    """Arrows from the centre of every cell that somebody acts in, one per action, as long as it is probable.

    Args:
        axes: of a map of the grid.
        policy: `[S, A]`; half a cell is probability 1, and arrows below 0.01 are left out.
        steps: direction of each action, `[A, 2]` as (right, down).
        grid: rows and columns.
        marks: remarkable cells by name.
        style: of the arrows, to matplotlib's `PolyCollection`.
    """
    from matplotlib.collections import PolyCollection

    probability = np.asarray(policy, dtype=float)
    acting = np.isfinite(inhabited(np.zeros(len(probability)), grid, marks)).ravel()
    row, column = np.divmod(np.flatnonzero(acting), grid[1])
    for p, (right, down) in zip(probability[acting].T, np.asarray(steps)):
        arrow = 0.48 * _ARROW @ np.array([[right, down], [-down, right]])
        arrows = np.stack([column, row], -1)[:, None, :] + p[:, None, None] * arrow
        axes.add_collection(PolyCollection(list(arrows[p >= 0.01]), zorder=3, **style))


def inhabited(x: ArrayLike, grid: Grid, marks: Marks) -> np.ndarray:
    """The cells `[rows, columns]` of `x [S]`, NaN where marked cells are filled: nobody acts there."""
    cells = np.array(x, dtype=float)
    if cells.shape != (grid[0] * grid[1],):
        raise ValueError(f"a {grid[0]} x {grid[1]} grid has one number per cell, got shape {cells.shape}")
    for name, states in marks.items():
        if STYLES[name][2] is not None:
            cells[list(states)] = np.nan
    return cells.reshape(grid)


def diverging(x: np.ndarray) -> tuple[Any, str]:
    """A colour scale with zero in its middle; logarithmic over two decades if few entries dwarf the rest."""
    from matplotlib.colors import Normalize, SymLogNorm

    sizes = np.abs(x[np.isfinite(x)])
    largest = sizes.max(initial=0.0) or 1.0
    if largest <= 20.0 * np.median(sizes):
        return Normalize(-largest, largest), ""
    return SymLogNorm(linthresh=largest / 100, vmin=-largest, vmax=largest), ", log scale"


def colour_bar(figure: Any, image: Any, axes: Any, label: str, **where: Any) -> None:
    """A colour bar whose ticks stay apart around the zero of a logarithmic scale."""
    bar = figure.colorbar(image, ax=axes, label=label, **where)
    if hasattr(image.norm, "linthresh"):
        powers = 10.0 ** np.arange(-30, 30)
        shown = powers[(powers > image.norm.linthresh) & (powers <= image.norm.vmax)]
        ticks = [*-shown[::-1], 0.0, *shown]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()


def write_numbers(axes: Any, shown: np.ndarray, image: Any) -> None:
    """Write the value into each cell, light on dark and dark on light."""
    largest = np.nanmax(np.abs(shown))
    digits = 2 if largest < 10 else 1 if largest < 100 else 0
    for (row, column), number in np.ndenumerate(shown):
        if np.isfinite(number):
            colour = "white" if image.norm(number) < 0.5 else "black"
            axes.text(column, row, f"{number:.{digits}f}", ha="center", va="center", color=colour, size=8)


def dress(axes: Any, grid: Grid, marks: Marks, *, legend: bool = True) -> None:
    """Cell borders, marked cells, and what the marks mean."""
    rows, columns = grid
    for name, states in marks.items():
        for state in states:
            _mark(axes, name, *divmod(int(state), columns))
    axes.set(xticks=[], yticks=[], xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_xticks(np.arange(0.5, columns - 1), minor=True)
    axes.set_yticks(np.arange(0.5, rows - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8, zorder=3)
    axes.tick_params(which="both", length=0)
    if legend and marks:
        axes.set_xlabel(legend_of(marks))


def legend_of(marks: Marks) -> str:
    """What the marks mean, in a line."""
    return "   ".join(f"{STYLES[name][0] or 'grey:'} {name}" for name in marks)


def _mark(axes: Any, name: str, row: int, column: int) -> None:
    """One marked cell: filled, its letter in the middle; or an ordinary cell, the letter in a corner."""
    from matplotlib.patches import Rectangle

    letter, colour, fill = STYLES[name]
    style: dict[str, Any] = {"color": colour, "ha": "center", "va": "center", "weight": "bold", "zorder": 4}
    if fill is not None:
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=fill, edgecolor="none", zorder=2))
        axes.text(column, row, letter, size=11, **style)
        return
    if name == "water":
        frame = Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=colour, zorder=2)
        axes.add_patch(frame)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
    axes.text(column - 0.36, row - 0.34, letter, size=7, bbox=box, **style)
