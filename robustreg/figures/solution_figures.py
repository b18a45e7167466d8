"""Pictures of a solution: one function per figure, each returning a matplotlib `Figure`.

Matplotlib is imported when a figure is drawn, and figures are made without pyplot: no window, no global
state, no backend to choose. All arguments are unbatched arrays; select a lane first.

Conventions. Cells of a grid are states in row-major order, the first row on top. Perturbations are what the
adversary takes, so that the agent is paid `reward - perturbation`: red is taken from the agent, blue is given
to it. Both colour maps (cividis; red to blue) can be read with every common form of colour blindness.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from robustreg.figures.style import (
    DIFFERENCES,
    EXCLUDED,
    INK,
    UNMARKED,
    VALUES,
    Grid,
    Marks,
    colour_bar,
    diverging,
    draw_arrows,
    draw_decision,
    dress,
    heading,
    inhabited,
    label_some,
    legend_of,
    literal,
    new_figure,
    probabilities_alike,
    rewards_alike,
    write_figures,
    write_numbers,
)
from robustreg.problems.mdps import MDP
from robustreg.solvers.solution import Solution

_NAMED_STATES = 40  # more names than that run into each other

# Names of actions that say where they lead, as (right, down).
COMPASS = {"→ right": (1, 0), "← left": (-1, 0), "↓ down": (0, 1), "↑ up": (0, -1), "stay": (0, 0)}


def write(
    out: str | Path,
    m: MDP,
    solution: Solution,
    title: str = "",
    marks: Marks = UNMARKED,
    actions: Sequence[str] = (),
    excluded: ArrayLike | None = None,
) -> list[Path]:
    """Draw what suits the problem and write it as PNG files into `out`.

    Grids get a value map, policy arrows and perturbation maps; a single state gets bars; others heat maps.

    Args:
        out: an existing folder.
        m: the problem; `m.grid` says whether its states are cells.
        solution: of one lane.
        title: name of the problem.
        marks: remarkable cells of a grid by name; see `STYLES`.
        actions: names of the actions, () for those of the problem; on a grid, those of `COMPASS` give the arrows, and
            () reads both off the transitions.
        excluded: bool `[S, A]`, actions that the prior does not allow: they are grey in maps of perturbations. (Those
            that the MDP does not have are known.)

    Returns:
        The paths written.
    """
    out, dr = Path(out), np.where(_excluded(m, excluded), np.nan, np.asarray(solution.perturbation))
    if m.names is not None:
        actions = actions or tuple(map(str, m.names.actions))
    if m.grid is not None:
        names, steps = directions(m)
        if actions and set(actions) <= set(COMPASS):
            names, steps = tuple(actions), np.array([COMPASS[name] for name in actions], float)
        drawn = {
            "value": value_map(solution.value, m.grid, title=title, marks=marks),
            "policy": policy_map(solution.policy, steps, m.grid, title=title, marks=marks),
            "perturbation": perturbation_maps(dr, m.grid, title=title, marks=marks, actions=actions or names),
        }
    elif m.n_states == 1:
        drawn = {"decision": decision_bars(solution.q, solution.policy, dr, title=title, actions=actions)}
    else:
        states = () if m.names is None else tuple(map(str, m.names.states))
        shown = heat_map(solution.value, solution.policy, dr, title=title, actions=actions, states=states)
        drawn = {"heat_map": shown}
    return write_figures(out, drawn)


def _excluded(m: MDP, excluded: ArrayLike | None) -> np.ndarray:
    """Actions that nobody may take, bool `[S, A]`."""
    barred = np.zeros((m.n_states, m.n_actions), bool) if excluded is None else np.asarray(excluded, bool)
    return barred if m.available is None else barred | ~np.asarray(m.available, bool)


def directions(m: MDP) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and directions of the actions of a grid, read off the transitions.

    The direction of an action is the one in which it moves to a neighbouring cell more often than the
    opposite way, so that slipping to both sides cancels. Cells are told apart by their row and column modulo
    3, which is enough to tell the neighbours of a cell: nine expectations, whatever the size of the grid.

    Args:
        m: an MDP with `grid`.

    Returns:
        One name per action, and unit steps `[A, 2]` as (right, down); an action that goes nowhere has step 0.

    Raises:
        ValueError: if the states are not cells of a grid.
    """
    if m.grid is None:
        raise ValueError("the states of this MDP are not cells of a grid: m.grid is None")
    row, column = np.indices(m.grid).reshape(2, -1)
    kind = 3 * (row % 3) + column % 3
    arrival = np.asarray(m.transitions.expect((kind == np.arange(9)[:, None]).astype(m.dtype)))  # [9, S, A]

    def net(down: int, right: int) -> np.ndarray:
        ahead, behind = (3 * ((row + k * down) % 3) + (column + k * right) % 3 for k in (1, -1))
        states = np.arange(row.size)
        return (arrival[ahead, states] - arrival[behind, states]).mean(0)

    steps = np.stack([net(0, 1), net(1, 0)], -1)
    larger = np.abs(steps) == np.abs(steps).max(-1, keepdims=True)
    steps = np.where(larger & (np.abs(steps) > 0.02), np.sign(steps), 0.0)
    names = {step: name for name, step in COMPASS.items()}
    return tuple(names.get((int(x), int(y)), f"action {i}") for i, (x, y) in enumerate(steps)), steps


def value_map(value: ArrayLike, grid: Grid, *, title: str = "", marks: Marks = UNMARKED) -> Any:
    """Draw the value of every cell of a grid.

    Args:
        value: `[S]`, in reward units.
        grid: rows and columns, `S = rows * columns`.
        title: name of the problem.
        marks: remarkable cells by name; see `STYLES`.
    """
    wide = grid[1] > 2 * grid[0]
    figure, axes, cell = _map(grid, below=0.6 if wide else 0.0)
    shown = inhabited(value, grid, marks)
    image = axes.imshow(shown, cmap=VALUES)
    unit = write_numbers(axes, shown, image, cell)
    dress(axes, grid, marks, cell)
    label = "value (reward units)"
    if wide:  # beside a corridor the colour bar would be as high as one cell
        figure.colorbar(image, ax=axes, label=label, location="bottom", aspect=40, pad=0.02)
    else:
        inch = 1 / (cell * grid[1])
        figure.colorbar(image, cax=axes.inset_axes((1 + 0.1 * inch, 0, 0.18 * inch, 1)), label=label)
    numbers = f" (numbers in {unit}reward units)" if unit else ""
    figure.suptitle(heading(title, f"regularised value{numbers}"))
    return figure


def policy_map(policy: ArrayLike, steps: ArrayLike, grid: Grid, *, title: str = "", marks: Marks = UNMARKED) -> Any:
    """Arrows from the centre of every cell, one per action, as long as the action is probable.

    Args:
        policy: `[S, A]`.
        steps: direction of each action, `[A, 2]` as (right, down); see `directions`.
        grid: rows and columns, `S = rows * columns`.
        title: name of the problem.
        marks: remarkable cells by name; see `STYLES`.
    """
    figure, axes, cell = _map(grid)
    axes.set(facecolor="#efeff4", aspect="equal")
    draw_arrows(axes, np.asarray(policy), steps, grid, marks, facecolor=INK, edgecolor="none")
    dress(axes, grid, marks, cell)
    figure.suptitle(heading(title, "policy: arrow length is probability, half a cell is 1"))
    return figure


def perturbation_maps(
    perturbation: ArrayLike,
    grid: Grid,
    *,
    title: str = "",
    marks: Marks = UNMARKED,
    actions: Sequence[str] = (),
) -> Any:
    """Draw the worst-case perturbation of every action on the grid, one map each, with one colour scale.

    Args:
        perturbation: `[S, A]`, in reward units; the perturbed reward is `reward - perturbation`. NaN: an action that
            nobody may take.
        grid: rows and columns, `S = rows * columns`.
        title: name of the problem.
        marks: remarkable cells by name; see `STYLES`.
        actions: names of the actions.
    """
    taken = np.asarray(perturbation)
    n_actions = taken.shape[-1]
    wide = grid[1] > 2 * grid[0]
    # Side by side they would run into each other where a map is narrower than its title.
    across = 1 if wide and grid[1] > 20 else 2 if n_actions == 4 else min(n_actions, 3)
    down = -(-n_actions // across)
    cell = min(0.45, 5.0 / max(grid))
    figure = new_figure(
        max(5.5, across * (max(cell * grid[1], 1.1) + 0.2) + 1.3), max(2.6, down * (cell * grid[0] + 0.35) + 0.9)
    )
    places = figure.add_gridspec(down, across + 1, width_ratios=(*[1.0] * across, 0.04))
    panels = [figure.add_subplot(places[i // across, i % across]) for i in range(n_actions)]
    maps = [inhabited(x, grid, marks) for x in taken.T]
    norm, note = diverging(np.stack(maps))
    barred = np.isnan(taken).any()
    for axes, shown, name in zip(panels, maps, _names(actions, n_actions)):
        axes.imshow(shown, cmap=DIFFERENCES, norm=norm)
        axes.set_facecolor(EXCLUDED if barred else "white")
        dress(axes, grid, marks, cell, legend=False)
        axes.set_title(literal(name))
    notes = [legend_of(marks, cell)] if marks else []
    notes += ["light grey: an action that nobody may take"] if barred else []
    # (A letter is some .075 inches wide.)
    figure.supxlabel(("   " if 0.075 * len("   ".join(notes)) < figure.get_figwidth() else "\n").join(notes), size=10)
    label = f"perturbation (reward units{note})\nblue: given, red: taken"
    # A place of its own: beside narrow maps matplotlib would put it on their titles.
    colour_bar(figure, panels[0].images[0], label, cax=figure.add_subplot(places[:, -1]))
    figure.suptitle(
        heading(title, "what the worst-case adversary takes", ": " if grid[1] * cell * across > 4 else "\n")
    )
    return figure


def decision_bars(
    q: ArrayLike, policy: ArrayLike, perturbation: ArrayLike, *, title: str = "", actions: Sequence[str] = ()
) -> Any:
    """One decision: action values, policy, worst case, and what is left, equal for all actions that are used.

    Args:
        q: action values, `[1, A]` or `[A]`, in reward units.
        policy: `[1, A]` or `[A]`.
        perturbation: `[1, A]` or `[A]`, in reward units.
        title: name of the problem.
        actions: names of the actions.
    """
    worth, probability, taken = (np.asarray(x).reshape(-1) for x in (q, policy, perturbation))
    figure = new_figure(12.0, 3.4)
    row = figure.subplots(1, 4)
    draw_decision(row, worth, probability, taken, "V = %s", list(actions) or [str(a) for a in range(worth.size)])
    rewards_alike(row[[0, 3]], worth, worth - taken)
    probabilities_alike(row[[1]], probability)
    heads = ("action values Q", "policy π", "perturbation Δ\n(red: taken, blue: given)", "Q − Δ: indifferent")
    for axes, head in zip(row, heads):
        axes.set(title=head, xlabel="action")
    barred = "light grey: an action that nobody may take" if np.isnan(taken).any() else ""
    figure.suptitle("\n".join(text for text in (literal(title), barred) if text))
    return figure


def heat_map(
    value: ArrayLike,
    policy: ArrayLike,
    perturbation: ArrayLike,
    *,
    title: str = "",
    actions: Sequence[str] = (),
    states: Sequence[str] = (),
) -> Any:
    """Value, policy and worst-case perturbation of every state, states grouped by their likeliest action.

    Args:
        value: `[S]`, in reward units.
        policy: `[S, A]`.
        perturbation: `[S, A]`, in reward units.
        title: name of the problem.
        actions: names of the actions.
        states: names of the states, written where there are few.
    """
    order = np.lexsort((np.asarray(value), np.asarray(policy).argmax(-1)))
    taken = np.asarray(perturbation)[order].T
    probability = np.where(np.isnan(taken), np.nan, np.asarray(policy)[order].T)
    named = 0 < len(states) <= _NAMED_STATES
    norm, note = diverging(taken)
    figure = new_figure(11.0, 6.5)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(1.0, 1.4, 1.4))
    # Between states that have names there is nothing.
    top.plot(np.asarray(value)[order], "o" if named else "-", color=INK, linewidth=1.5)
    top.grid(axis="y", color="#dddddd", linewidth=0.6)
    top.set_ylabel("value\n(reward units)")
    top.spines[["top", "right"]].set_visible(False)
    shared: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    # Of many actions each is unlikely: the scale ends where the policy does, or all would be white.
    image = middle.imshow(probability, cmap="Purples", vmin=0.0, vmax=float(np.nanmax(probability)), **shared)
    figure.colorbar(image, ax=middle, label="policy\n(probability)", pad=0.01)
    image = bottom.imshow(taken, cmap=DIFFERENCES, norm=norm, **shared)
    colour_bar(figure, image, f"perturbation\n(reward units{note})", ax=bottom, pad=0.01)
    for axes in (middle, bottom):
        axes.set_facecolor(EXCLUDED)
        label_some(axes.yaxis, _names(actions, len(taken)), 12)
    if named:
        long = max(map(len, states)) * len(states) > 80
        bottom.set_xticks(range(len(states)), [literal(states[int(s)]) for s in order], rotation=90 if long else 0)
    else:
        label_some(bottom.xaxis, [str(s) for s in range(len(order))], 20)  # places, not numbers of states
    bottom.set_xlabel("states, by likeliest action, then by value" + ("" if states else " (numbered in this order)"))
    barred = "; light grey: not allowed" if np.isnan(taken).any() else ""
    figure.suptitle(heading(title, f"value, policy and worst case (red: taken, blue: given{barred})", ": "))
    return figure


def _names(actions: Sequence[str], n_actions: int) -> Sequence[str]:
    return actions or [f"action {i}" for i in range(n_actions)]


def _map(grid: Grid, below: float = 0.0) -> tuple[Any, Any, float]:
    """A figure with one map of that many cells, and the width of a cell in inches.

    Args:
        grid: rows and columns.
        below: height in inches of what is to go below the map, beside the legend that there is always room for.
    """
    # Of many cells a larger figure, or the arrows in them would be dots.
    cell = min(0.72, (9.0 if max(grid) <= 20 else 14.0) / max(grid))
    figure = new_figure(max(5.0, cell * grid[1] + 1.4), cell * grid[0] + 1.5 + below)
    return figure, figure.subplots(), cell
