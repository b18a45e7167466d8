"""Pictures of a sweep: what a regulariser costs and buys, and how much work it is, against its strength.

Conventions. beta runs along a logarithmic axis; alphas are lines, or rows of a map; discounts are panels. Over every
other axis of the grid (many MDPs, rewards, priors) lines are medians; up to three of them lie within a band from the
10th to the 90th percentile, more bands would hide each other. A cell that did not converge has a cross, at the edge of
the picture if it has no value; one that was not computed is left out. Colours (viridis) can be read with every common
form of colour blindness, and in print.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from robustreg.figures.style import INK, heading, new_figure, shown_number, write_figures
from robustreg.solvers.solution import Status
from robustreg.sweeps.table import Table

COLOURS, FAILED = "viridis", "#c51b1b"
BETA = "β, inverse strength (1/reward units)"
# Of longer axes, as many values are shown, evenly chosen.
_LINES, _PANELS = 7, 6
_BANDS = 3  # in one panel
# What matplotlib's logarithmic axes can show: their margins and ticks are beyond it, and must still be numbers.
_REACH = (1e-200, 1e200)


@dataclasses.dataclass(frozen=True)
class Cells:
    """A column of a table with its axes in the order of the pictures.

    Attributes:
        discounts, alphas, betas: coordinates, `[D]`, `[L]`, `[K]`; [nan] for an axis that the grid has not.
        values: `[D, L, K, others]`, NaN where nothing was computed.
        failed: cells that did not converge, `[D, L, K, others]`.
        others: names of the axes that have no place of their own; in a zipped table, of those that change along a line.
    """

    discounts: np.ndarray
    alphas: np.ndarray
    betas: np.ndarray
    values: np.ndarray
    failed: np.ndarray
    others: tuple[str, ...]


def cells(table: Table, name: str) -> Cells:
    """Arrange a column; betas ascend. A zipped table is one line along beta."""
    shown = ("discount", "alpha", "beta")
    computed = np.asarray(table.computed)
    values = np.where(computed, np.asarray(table[name], float), np.nan)
    failed = np.zeros(table.shape, bool)
    if "status" in table.columns:
        failed = computed & (np.asarray(table["status"]) != Status.CONVERGED)
    axes = ["beta"] if table.zipped else list(table.coordinates)
    first = [axes.index(n) for n in shown if n in axes]
    order = first + [i for i in range(len(axes)) if i not in first]
    lengths = tuple(len(table.coordinates[n]) if n in axes else 1 for n in shown)
    coordinates = [np.asarray(table.coordinates[n]) if n in axes else np.array([np.nan]) for n in shown]
    ascending = np.argsort(coordinates[2])
    ascending = ascending[_in_reach(coordinates[2][ascending])]
    values, failed = (x.transpose(order).reshape(*lengths, -1)[:, :, ascending] for x in (values, failed))
    others = tuple(n for n in table.coordinates if n not in (("beta",) if table.zipped else shown))
    return Cells(coordinates[0], coordinates[1], coordinates[2][ascending], values, failed, others)


def _in_reach(betas: np.ndarray) -> np.ndarray:
    """Betas that an axis can show; NaN stands for no axis."""
    return ~((betas < _REACH[0]) | (betas > _REACH[1]))


def _left_out(table: Table) -> str:
    """How many betas no axis can show, and how many cells nobody has solved."""
    betas = np.asarray(table.coordinates["beta"])
    left, missing = int((~_in_reach(betas)).sum()), int((~table.computed).sum())
    said = [f"{left} of {betas.size} values of β are beyond the axis"] if left else []
    said += [f"{missing} of {len(table)} cells are not there"] if missing else []
    return "".join(f"\n{x}" for x in said)


def _there(column: Cells) -> np.ndarray:
    """Which entries of the last axis have any value, `[others]`."""
    return np.asarray(np.any(np.isfinite(column.values) | column.failed, axis=(0, 1, 2)))


def write(out: Path, table: Table, title: str = "") -> list[Path]:
    """Draw what the table has columns and axes for, and write it as PNG files into `out`.

    Args:
        out: an existing folder.
        table: of a sweep over beta, among others; of another, or of a single beta, nothing is drawn.
        title: name of the problem.

    Returns:
        The paths written.
    """
    if np.sum(_in_reach(table.coordinates.get("beta", np.zeros(1)))) < 2 or not table.computed.any():
        return []
    drawn = {}
    if {"objective", "nominal_return"} & set(table.columns):
        drawn["returns"] = returns(table, title=title)
    if "price_of_robustness" in table.columns:
        drawn["price"] = price(table, title=title)
    if "steps" in table.columns and not table.zipped and {"alpha", "discount"} & set(table.coordinates):
        drawn["steps"] = step_map(table, title=title)
    return write_figures(out, drawn)


def returns(table: Table, *, title: str = "") -> Any:
    """Draw what a policy guarantees (`objective`) and earns undisturbed (`nominal_return`), as the table has it."""
    styles = {"objective": ("-", "guaranteed\n(objective)"), "nominal_return": ("--", "undisturbed\n(nominal return)")}
    present = {name: style for name, style in styles.items() if name in table.columns}
    return _lines(table, present, heading(title, "return against strength", ": "), "return (reward units)")


def price(table: Table, *, title: str = "") -> Any:
    """Draw what the best unregularised policy would earn on top of the robust one, undisturbed."""
    style = {"price_of_robustness": ("-", "optimum less\nnominal return")}
    subject = heading(title, "price of robustness against strength", ": ")
    return _lines(table, style, subject, "price of robustness (reward units)")


def step_map(table: Table, *, title: str = "") -> Any:
    """Steps of every cell over beta and alpha (a panel per discount), or over beta and discount if alpha is one.

    A cell starts from its neighbours' values along beta, so that most take few. Columns that stand out had none: a path
    begins there. Over other axes of the grid the map shows the median, and a cross where any of its cells failed.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    steps = cells(table, "steps")
    by_alpha = steps.alphas.size > 1
    panels = _some(steps.discounts, _PANELS) if by_alpha else np.zeros(1, int)
    rows, label = (steps.alphas, "α") if by_alpha else (steps.discounts, "discount")
    maps = _over_others(steps.values, 50)
    maps, failed = (x if by_alpha else x.swapaxes(0, 1) for x in (maps, _any(steps.failed)))
    known = maps[panels][np.isfinite(maps[panels])]
    low, high = (known.min(), known.max()) if known.size else (1.0, 2.0)
    norm = LogNorm(max(low, 1), high) if high > 20 * max(low, 1) else Normalize(low, max(high, low + 1))
    figure, all_axes = _panels(len(panels), 0.32 * len(rows) + 1.2)
    order = np.argsort(rows)
    for axes, i in zip(all_axes, panels):
        shown = maps[i][order]
        mesh = axes.pcolormesh(_edges(steps.betas), np.arange(len(rows) + 1) - 0.5, shown, cmap=COLOURS, norm=norm)
        row, column = np.nonzero(failed[i][order])
        if row.size:
            for colour, weight in (("white", 3.5), (FAILED, 1.5)):
                axes.plot(steps.betas[column], row, "x", color=colour, markersize=6, markeredgewidth=weight)
            axes.set_xlim(*_edges(steps.betas)[[0, -1]])
        kept = _some(rows, 12)
        axes.set_yticks(kept, [shown_number(float(rows[order][k])) for k in kept])
        axes.set(xscale="log", title=_panel_title(steps, i, by_alpha))
    several = steps.values.shape[-1] > 1
    crosses = f"; ×: {'not all of them' if several else 'not'} converged" if failed[panels].any() else ""
    over = f", median of {_there(steps).sum()} ({', '.join(steps.others)})" if several else ""
    subject = f"steps of the solver in every cell{over}{crosses}{_omitted(steps, panels, by_alpha)}{_left_out(table)}"
    _label(figure, all_axes, heading(title, subject, ": "), label)
    ticks = MaxNLocator(integer=True) if isinstance(norm, Normalize) and not isinstance(norm, LogNorm) else None
    figure.colorbar(mesh, ax=list(all_axes), label="steps", aspect=30, pad=0.02, ticks=ticks)
    return figure


def _lines(table: Table, styles: dict[str, tuple[str, str]], title: str, label: str) -> Any:
    """Columns against beta: a panel per discount, a colour per alpha, a style per column."""
    from matplotlib.lines import Line2D

    columns = {name: cells(table, name) for name in styles}
    one = next(iter(columns.values()))
    panels, kept = _some(one.discounts, _PANELS), _some(one.alphas, _LINES)
    # Without alphas the colours are for the columns.
    shades = _shades(len(kept) if len(kept) > 1 else len(styles))
    figure, all_axes = _panels(len(panels), 4.0 if len(panels) < 3 else 2.8)
    crosses, banded = False, len(kept) * len(styles) <= _BANDS
    for axes, i in zip(all_axes, panels):
        for k, (name, (style, _)) in enumerate(styles.items()):
            for n, j in enumerate(kept):
                colour = shades[n if len(kept) > 1 else k]
                crosses |= _line(axes, columns[name], i, j, colour, style, banded)
        axes.set(xscale="log", title=_panel_title(one, i, True))
        axes.margins(x=0.02)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    entries = [
        Line2D([], [], color=c, lw=2.5, label=f"α = {shown_number(float(one.alphas[j]))}") for c, j in zip(shades, kept)
    ]
    entries = entries if len(kept) > 1 else []
    inks = [INK] * len(styles) if len(kept) > 1 else shades
    entries += [Line2D([], [], color=c, ls=s, lw=2, label=text) for c, (s, text) in zip(inks, styles.values())]
    several = one.values.shape[-1] > 1
    if several:
        whose = f"of {_there(one).sum()} ({', '.join(one.others)})"
        text = f"line: median\nband: 10–90 %\n{whose}" if banded else f"line: median\n{whose}"
        entries.append(Line2D([], [], color="#999999", lw=8 if banded else 0, alpha=0.4, label=text))
    if crosses:
        entries.append(Line2D([], [], color=FAILED, marker="x", ls="", label=f"not {'all ' * several}converged"))
    figure.legend(handles=entries, loc="outside right center", frameon=False)
    along = f"\nalong the line {', '.join(one.others)} changes too" if table.zipped and one.others else ""
    _label(figure, all_axes, title + _omitted(one, panels, True) + along + _left_out(table), label)
    return figure


def _line(axes: Any, column: Cells, i: int, j: int, colour: Any, style: str, banded: bool) -> bool:
    """One line with its crosses and perhaps a band; whether there are crosses."""
    values, failed = column.values[i, j], _any(column.failed[i, j])
    low, middle, high = (_over_others(values, q) for q in (10, 50, 90))
    axes.plot(column.betas, middle, style, color=colour, linewidth=1.8)
    if values.shape[-1] > 1 and banded:
        axes.fill_between(column.betas, low, high, color=colour, alpha=0.15, linewidth=0)
    # Where there is no value, a cross stands at the lower edge.
    known = np.isfinite(middle)
    for at, height, where in (
        (np.flatnonzero(failed & known), middle, axes.transData),
        (np.flatnonzero(failed & ~known), np.full(middle.shape, 0.02), axes.get_xaxis_transform()),
    ):
        if at.size:
            axes.plot(column.betas[at], height[at], "x", color=FAILED, markersize=6, zorder=5, transform=where)
    return bool(failed.any())


def _any(failed: np.ndarray) -> np.ndarray:
    """Whether any along the last axis did."""
    return np.asarray(np.any(failed, axis=-1))


def _over_others(values: np.ndarray, percent: float) -> np.ndarray:
    """A percentile over the last axis of what is finite, NaN where nothing is."""
    finite = np.where(np.isfinite(values), values, np.nan)
    empty = ~_any(np.isfinite(finite))
    return np.where(empty, np.nan, np.nanpercentile(np.where(empty[..., None], 0, finite), percent, axis=-1))


def _some(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most so many values, evenly chosen, the ends among them."""
    return np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))


def _shades(count: int) -> list[Any]:
    """Colours of an ordered quantity; the lightest part of the map is too faint for a line."""
    from matplotlib import colormaps

    return [colormaps[COLOURS](x) for x in np.linspace(0.0, 0.85 if count > 2 else 0.6, count)]


def _edges(betas: np.ndarray) -> np.ndarray:
    """Borders of cells around ascending betas, half-way on the logarithmic axis."""
    logs = np.log(betas)
    middle = 0.5 * (logs[1:] + logs[:-1])
    return np.exp([logs[0] - (middle[0] - logs[0]), *middle, logs[-1] + (logs[-1] - middle[-1])])


def _panels(count: int, height: float) -> tuple[Any, Any]:
    """A figure with panels in rows of at most three, or two by two."""
    across = 2 if count == 4 else min(count, 3)
    down = -(-count // across)
    width = 8.0 if across == 1 else 4.0 * across + 1.6
    figure = new_figure(width, down * height + 0.6)
    axes = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes[:count]


def _panel_title(column: Cells, i: int, split: bool) -> str:
    return f"discount {column.discounts[i]:g}" if split and column.discounts.size > 1 else ""


def _omitted(column: Cells, panels: np.ndarray, split: bool) -> str:
    hidden = split and column.discounts.size > len(panels)
    return f" ({len(panels)} of {column.discounts.size} discounts)" if hidden else ""


def _label(figure: Any, all_axes: Any, title: str, ylabel: str) -> None:
    """Title and labels, on the outer axes only."""
    figure.suptitle(title)
    grid = all_axes[0].get_subplotspec().get_gridspec()
    for i, axes in enumerate(all_axes):
        if i + grid.ncols >= len(all_axes):
            axes.set_xlabel(BETA)
            axes.tick_params(labelbottom=True)
        if i % grid.ncols == 0:
            axes.set_ylabel(ylabel)
