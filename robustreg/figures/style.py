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

from robustreg._core.files import write_whole

Marks = Mapping[str, Sequence[int]]
Grid = tuple[int, int]

VALUES, DIFFERENCES, INK = "cividis", "RdBu_r", "#1a1a1a"
# Of Okabe and Ito.
BLUE, VERMILION, GREEN, PURPLE, AMBER, GREY = "#0072b2", "#d55e00", "#009e73", "#8f5a8a", "#b8860b", "#5a5a5a"
# Marked cells: a letter, its colour, and the fill of cells that nobody acts in (None: an ordinary cell).
STYLES = {
    "start": ("S", "black", None),
    "goal": ("★", "#b8860b", "white"),
    "hole": ("H", "white", "#404040"),
    "cliff": ("C", "white", "#404040"),
    "wall": ("", "white", "#9e9e9e"),
    "water": ("≈", "#1f4e9e", None),
}
EXCLUDED = "#c9c9c9"  # actions that nobody may take
# Sizes in inches: below, cells have no room for a letter in their corner; and what letters of one point need.
_SMALL, _POINT = 0.4, 1 / 72
UNMARKED: Marks = {}
# An arrow from the origin to (1, 0).
_ARROW = np.array([[0, 0.07], [0.55, 0.07], [0.55, 0.24], [1, 0], [0.55, -0.24], [0.55, -0.07], [0, -0.07]])


def available() -> bool:
    """Tell whether matplotlib is installed."""
    try:
        new_figure(1.0, 1.0)
    except ModuleNotFoundError:
        return False
    return True


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure of that size in inches."""
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


def literal(text: str) -> str:
    """Text as it is: between dollar signs matplotlib would read formulas, in names that are not ours as well."""
    return text.replace("$", r"\$")


def check_formulas(text: str) -> None:
    """Refuse text that matplotlib cannot set, which otherwise fails only when all else is done.

    Raises:
        ValueError: it has a formula between dollar signs that is none.
    """
    if not available():
        return
    from matplotlib.mathtext import MathTextParser

    try:
        MathTextParser("path").parse(text)
    except ValueError:
        raise ValueError(f"{text!r}; between dollar signs it is no formula: write \\$ for the sign itself") from None


def heading(title: str, subject: str, between: str = "\n") -> str:
    """Title of a picture over what it shows, or that alone."""
    return f"{literal(title)}{between}{subject}" if title else subject


def shown_number(x: float, form: str = "g") -> str:
    """Write a number with a minus sign like those on axes, not a hyphen; none before zero."""
    text = f"{x:{form}}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def label_some(axis: Any, labels: Sequence[str], most: int) -> None:
    """Label the ticks 0, 1, ... of an axis, all of them or, where they are more than fit, evenly chosen ones.

    Args:
        axis: of a picture, `axes.xaxis` or `axes.yaxis`.
        labels: one per tick.
        most: how many fit beside each other.
    """
    step = max(1, -(-len(labels) // max(1, most)))
    axis.set_ticks(range(0, len(labels), step), [literal(label) for label in labels[::step]])


def draw_decision(
    row: Sequence[Any], reward: np.ndarray, policy: np.ndarray, taken: np.ndarray, level: str, names: Sequence[str]
) -> None:
    """Draw a decision as bars: reward, policy, what is taken of the reward, and what is left with its mean as a line.

    Args:
        row: four axes.
        reward: of each action, `[A]`, in reward units.
        policy: `[A]`.
        taken: `[A]`, in reward units; NaN of actions that nobody may take, which are grey.
        level: what to call the line; `%s` is its number.
        names: of the actions.
    """
    left = reward - taken
    colours = (GREY, GREEN, np.where(taken > 0, VERMILION, BLUE), GREY)
    units = ("reward units", "probability", "reward units", "reward units")
    for axes, height, colour, unit in zip(row, (reward, policy, taken, left), colours, units):
        axes.bar(np.arange(reward.size), height, color=colour, width=0.72)
        for action in np.flatnonzero(np.isnan(taken)):
            axes.axvspan(action - 0.5, action + 0.5, color=EXCLUDED, linewidth=0, zorder=0)
        axes.axhline(0.0, color=INK, linewidth=0.8)
        axes.set(ylabel=unit, xlim=(-0.6, reward.size - 0.4))
        label_some(axes.xaxis, names, max(1, 30 // (max(map(len, names)) + 1)))
        axes.spines[["top", "right"]].set_visible(False)
    known = np.isfinite(taken)
    mean = float(policy[known] @ left[known])
    label = level % shown_number(mean, ".3g")
    row[3].axhline(mean, color=AMBER, linewidth=2.0, linestyle="--", label=label)
    row[3].legend(frameon=False, loc="best")


def probabilities_alike(axes: Sequence[Any], *shown: np.ndarray) -> None:
    """Give axes of probabilities one scale: all of it, unless every bar would be low."""
    most = max(float(np.nanmax(x)) for x in shown)
    for each in axes:
        each.set_ylim(0.0, 1.05 if most > 0.5 else 1.1 * most)


def rewards_alike(axes: Sequence[Any], *shown: np.ndarray) -> None:
    """Give axes of rewards one scale that holds 0 and all that is shown, with room for a legend above."""
    seen = np.concatenate([[0.0], *(x[np.isfinite(x)].ravel() for x in shown)])
    span = float(np.ptp(seen)) or 1.0
    for each in axes:
        each.set_ylim(seen.min() - 0.08 * span * (seen.min() < 0), seen.max() + 0.3 * span)


def draw_arrows(axes: Any, policy: np.ndarray, steps: ArrayLike, grid: Grid, marks: Marks, **style: Any) -> None:
    """Arrows from the centre of every cell that somebody acts in, one per action, as long as it is probable.

    Their width goes with the root of the probability: scaled as a whole, an arrow of 0.15 would have a seventh of the
    area of one of 0.4, and be overlooked.

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
        arrow = 0.48 * np.stack([p[:, None] * _ARROW[:, 0], np.sqrt(p)[:, None] * _ARROW[:, 1]], -1)
        arrows = np.stack([column, row], -1)[:, None, :] + arrow @ np.array([[right, down], [-down, right]])
        axes.add_collection(PolyCollection(list(arrows[p >= 0.01]), zorder=3, **style))


def inhabited(x: ArrayLike, grid: Grid, marks: Marks) -> np.ndarray:
    """Lay `x [S]` out as cells `[rows, columns]`, NaN where marked cells are filled: nobody acts there."""
    cells = np.array(x, dtype=float)
    if cells.shape != (grid[0] * grid[1],):
        raise ValueError(f"a {grid[0]} x {grid[1]} grid has one number per cell, got shape {cells.shape}")
    for name, states in marks.items():
        if STYLES[name][2] is not None:
            cells[list(states)] = np.nan
    return cells.reshape(grid)


def diverging(x: np.ndarray) -> tuple[Any, str]:
    """Make a colour scale with zero in its middle; logarithmic over two decades if few entries dwarf the rest."""
    from matplotlib.colors import Normalize, SymLogNorm

    sizes = np.abs(x[np.isfinite(x)])
    largest = sizes.max(initial=0.0) or 1.0
    if largest <= 20.0 * np.median(sizes):
        return Normalize(-largest, largest), ""
    note = f",\nlog scale, linear below {largest / 100:.2g}"
    return SymLogNorm(linthresh=largest / 100, vmin=-largest, vmax=largest), note


def colour_bar(figure: Any, image: Any, label: str, **where: Any) -> None:
    """Draw a colour bar whose ticks stay apart around a logarithmic zero; `where` as in `Figure.colorbar`."""
    bar = figure.colorbar(image, label=label, **where)
    if hasattr(image.norm, "linthresh"):
        powers = 10.0 ** np.arange(-30, 30)
        shown = powers[(powers > image.norm.linthresh) & (powers <= image.norm.vmax)]
        ticks = [*-shown[::-1], 0.0, *shown]
        bar.set_ticks(ticks, labels=[shown_number(tick) for tick in ticks])
        bar.minorticks_off()


def write_numbers(axes: Any, shown: np.ndarray, image: Any, cell: float) -> str:
    """Write the value into each cell, light on dark and dark on light, if the numbers fit and tell cells apart.

    Args:
        axes: of a map.
        shown: its cells, NaN where nothing is to be written.
        image: the map.
        cell: width of a cell in inches.

    Returns:
        The factor to multiply the numbers with, "" for 1, to be put before the unit.
    """
    known = shown[np.isfinite(shown)]
    if not known.size or shown.size > 256:  # nobody reads more
        return ""
    largest, spread = np.abs(known).max(), np.ptp(known)
    power = 3 * round(np.log10(largest) / 3) if largest > 0 else 0
    power = power if largest < 1e-2 or largest >= 1e5 else 0
    spread = (spread or largest or 1.0) / 10.0**power
    digits = max(0, 2 - int(np.floor(np.log10(spread))))  # three of what the cells differ by
    form = {place: shown_number(x / 10.0**power, f".{digits}f") for place, x in np.ndenumerate(shown) if np.isfinite(x)}
    size = min(8.0, 0.9 * cell / (0.62 * _POINT * max(map(len, form.values()))))
    if size < 5:
        return ""
    for (row, column), text in form.items():
        colour = "white" if image.norm(shown[row, column]) < 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, size=size)
    return f"10{str(power).translate(_RAISED)} " if power else ""


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def dress(axes: Any, grid: Grid, marks: Marks, cell: float, *, legend: bool = True) -> None:
    """Cell borders, marked cells, and what the marks mean.

    Args:
        axes: of a map.
        grid: rows and columns.
        marks: remarkable cells by name.
        cell: width of a cell in inches; small ones get frames in the place of letters.
        legend: whether to say what the marks mean, below the map.
    """
    rows, columns = grid
    for name, states in marks.items():
        for state in states:
            _mark(axes, name, *divmod(int(state), columns), cell)
    axes.set(xticks=[], yticks=[], xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_xticks(np.arange(0.5, columns - 1), minor=True)
    axes.set_yticks(np.arange(0.5, rows - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=min(0.8, 2 * cell), zorder=3)
    axes.tick_params(which="both", length=0)
    if legend and marks:
        axes.set_xlabel(legend_of(marks, cell))


def legend_of(marks: Marks, cell: float) -> str:
    """Say what the marks mean, in a line."""
    frames = {"start": "□ (black)", "water": "□ (blue)"} if cell < _SMALL else {}
    return "   ".join(f"{frames.get(name, STYLES[name][0]) or 'grey:'} {name}" for name in marks)


def _mark(axes: Any, name: str, row: int, column: int, cell: float) -> None:
    """One marked cell: filled, its letter in the middle; or an ordinary cell, the letter in a corner."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    letter, colour, fill = STYLES[name]
    style: dict[str, Any] = {"color": colour, "ha": "center", "va": "center", "weight": "bold", "zorder": 4}
    if fill is not None:
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=fill, edgecolor="none", zorder=2))
        axes.text(column, row, letter, size=min(11.0, 0.7 * cell / _POINT), **style)
        return
    if name == "water" or cell < _SMALL:
        # Within a light border: a frame alone is lost on a dark cell.
        line = min(1.0, 4 * cell)
        frame = Rectangle((column - 0.44, row - 0.44), 0.88, 0.88, fill=False, ec=colour, lw=line, zorder=2)
        frame.set_path_effects([withStroke(linewidth=3 * line, foreground="white")])
        axes.add_patch(frame)
    if cell >= _SMALL:
        style |= {"ha": "left", "va": "top", "size": min(7.0, 0.18 * cell / _POINT)}
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        axes.text(column - 0.43, row - 0.43, letter, bbox=box, **style)
