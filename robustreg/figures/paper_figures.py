"""The figures of the paper, drawn from the numbers of `paper_numbers` and from nothing else: one function per figure.

Made to be put on a slide: a size that fills one, text that is read from the back, a title that says what to see.
Colours are those of Okabe and Ito (which every common form of colour blindness tells apart), and what they tell is
told by position, marker or line style too. Blue is the reward as it is, or what the adversary gives; vermilion is the
worst case, or what it takes.
"""

from typing import Any

import numpy as np

from robustreg.figures.paper_numbers import Numbers
from robustreg.figures.style import (
    AMBER,
    BLUE,
    DIFFERENCES,
    GREEN,
    GREY,
    INK,
    PURPLE,
    VALUES,
    VERMILION,
    Marks,
    colour_bar,
    diverging,
    draw_arrows,
    draw_decision,
    dress,
    inhabited,
    new_figure,
    probabilities_alike,
    rewards_alike,
    shown_number,
)

SERIES = ((BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"), (AMBER, "v", "-"))
BETA = "β, inverse strength (1/reward units)"
_MOVES = {"↑": (0, -1), "→": (1, 0), "↓": (0, 1), "←": (-1, 0)}


def decision(numbers: Numbers, title: str = "") -> Any:
    """Rows: strengths. Columns: reward, policy, worst case, and what it leaves, with the level of indifference."""
    rows = len(numbers["beta"])
    figure = new_figure(13.0, 2.9 * rows + 0.8)
    panels = figure.subplots(rows, 4, squeeze=False, sharex=True, sharey="col")
    heads = ("reward r = Q", "policy π", "worst case Δ", "perturbed reward r − Δ")
    for k, (row, strength) in enumerate(zip(panels, _strengths(numbers))):
        shown = numbers["reward"], numbers["policy"][k], numbers["perturbation"][k]
        draw_decision(row, *shown, "indifferent at %s", [str(a) for a in range(numbers["reward"].size)])
        rewards_alike(row[[0, 3]], numbers["reward"], numbers["perturbed"])
        probabilities_alike(row[[1]], numbers["policy"])
        row[0].set_ylabel(f"{strength}\n\nreward units")
    for axes, head in zip(panels[0], heads):
        axes.set_title(head)
    for axes in panels[-1]:
        axes.set_xlabel("action")
    figure.suptitle(_titled(title, f"{_divergence(numbers['alpha'])}; Δ: vermilion is taken, blue is given"))
    return figure


def feasible_sets(numbers: Numbers, title: str = "") -> Any:
    """Rows: strengths. Columns: divergences. The set of perturbed rewards, both stars, and the policy as its normal."""
    betas, alphas = numbers["beta"], numbers["alpha"]
    figure = new_figure(3.1 * len(alphas) + 0.9, 3.0 * len(betas) + 1.3)
    panels = figure.subplots(len(betas), len(alphas), squeeze=False, sharex=True, sharey=True)
    for j, column in enumerate(panels.T):
        column[0].set_title(_divergence(alphas[j]))
        column[-1].set_xlabel("perturbed reward\nof action 0")
        for k, axes in enumerate(column):
            handles = _set(axes, numbers, j, k)
    for row, strength in zip(panels, _strengths(numbers)):
        row[0].set_ylabel(f"{strength}\n\nperturbed reward\nof action 1")
    prior = ", ".join(f"{p:.3g}" for p in numbers["prior"])
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(_titled(title, f"prior π₀ = ({prior}); axes in reward units"))
    return figure


def _set(axes: Any, numbers: Numbers, j: int, k: int) -> list[Any]:
    """One robust set, as perturbed rewards; what to list in the legend."""
    from matplotlib.patches import Polygon

    centre, window = numbers["reward"], float(numbers["window"])
    far = 4 * window
    # On to infinity at both ends, and round the far corner: more reward is always in the set.
    edge = np.clip(np.nan_to_num(numbers["boundary"][j, k], nan=0.0), centre - far, centre + far)
    corners = [[centre[0] + far, edge[0, 1]], *edge, [edge[-1, 0], centre[1] + far], centre + far]
    region = Polygon(corners, facecolor=VERMILION, alpha=0.2, label="robust set")
    axes.add_patch(region)
    axes.plot(*np.array(corners[:-1]).T, color=VERMILION, linewidth=1.8)
    worst, normal, value = numbers["worst"][j, k], numbers["normal"][j, k], float(numbers["value"][j, k])
    along = np.array([-normal[1], normal[0]]) / np.hypot(*normal)
    same = np.stack([worst - far * along, worst + far * along])
    handles = [region, *axes.plot(*same.T, "--", color=INK, linewidth=1.2, label="⟨π, r′⟩ = V")]
    axes.annotate("", worst + 0.55 * window * normal / np.hypot(*normal), worst, arrowprops=_ARROW, zorder=4)
    star: dict[str, Any] = {"ls": "", "marker": "*", "markersize": 15, "markeredgecolor": "white", "zorder": 5}
    handles += axes.plot(*centre, color=BLUE, label="reward r", **star)
    handles += axes.plot(*worst, color="#b30000", label="worst case r − Δ", **star)
    handles.append(axes.plot([], [], color=INK, ls="", marker=r"$\rightarrow$", ms=14, label="policy π")[0])
    axes.set(aspect="equal", xlim=centre[0] + window * np.array([-1, 1]), ylim=centre[1] + window * np.array([-1, 1]))
    p = numbers["policy"][j, k]
    text = f"π = ({p[0]:.2f}, {p[1]:.2f})\nV = {shown_number(value, '.2f')}"
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axes.text(0.03, 0.03, text, transform=axes.transAxes, size=9, va="bottom", bbox=box, zorder=6)
    axes.axhline(centre[1], color="#bbbbbb", linewidth=0.6, zorder=0)
    axes.axvline(centre[0], color="#bbbbbb", linewidth=0.6, zorder=0)
    return handles


_ARROW = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}


def sequential(numbers: Numbers, title: str = "") -> Any:
    """Draw a block of maps per strength: value, policy, and the worst case of each action on the grid."""
    rows, columns = (int(n) for n in numbers["grid"])
    grid, marks, actions = (rows, columns), _marks(numbers), [str(name) for name in numbers["actions"]]
    blocks, down = len(numbers["beta"]), 1 + -(-len(actions) // 2)
    cell = 2.8 / max(columns, rows)  # inches
    figure = new_figure(2 * blocks * (cell * columns + 0.15) + 1.4, down * (cell * rows + 0.4) + 1.3)
    panels = figure.subplots(down, 2 * blocks, squeeze=False)
    values = [inhabited(x, grid, marks) for x in numbers["value"]]
    taken = np.stack([[inhabited(x, grid, marks) for x in dr.T] for dr in numbers["perturbation"]])
    norm, note = diverging(taken)
    limits = {"vmin": np.nanmin(values), "vmax": np.nanmax(values)}
    steps = np.array([_MOVES.get(name[:1], (0, 0)) for name in actions], float)
    for k, strength in enumerate(_strengths(numbers)):
        worth, chosen = panels[0, 2 * k : 2 * k + 2]
        worth.imshow(values[k], cmap=VALUES, **limits)
        worth.set_title(f"{strength}\nvalue V")
        chosen.set(facecolor="#efeff4", aspect="equal")
        draw_arrows(chosen, numbers["policy"][k], steps, grid, marks, facecolor=INK, edgecolor="none")
        chosen.set_title(f"guaranteed {float(numbers['objective'][k]):.2f}\npolicy π".replace("-", "−"))
        maps = panels[1:, 2 * k : 2 * k + 2].ravel()
        for axes, x, name in zip(maps, taken[k], actions):
            axes.imshow(x, cmap=DIFFERENCES, norm=norm)
            axes.set_title(f"worst case Δ of {name}")
        for axes in (worth, chosen, *maps[: len(actions)]):
            _mark_cells(axes, grid, marks, cell)
        for axes in maps[len(actions) :]:
            axes.set_axis_off()
    figure.colorbar(panels[0, 0].images[0], ax=list(panels[0]), label="value\n(reward units)", aspect=10, pad=0.01)
    label = f"worst case Δ (reward units{note})\nblue: given, red: taken"
    colour_bar(figure, maps[0].images[0], label, ax=list(panels[1:].ravel()), aspect=22, pad=0.01)
    shown = [text for name, text in _SYMBOLS.items() if name in marks]
    figure.supxlabel("     ".join([*shown, "arrows: half a cell is probability 1"]), size=11)
    figure.suptitle(_titled(title, _divergence(numbers["alpha"])))
    return figure


_SYMBOLS = {
    "start": "○ start",
    "water": "□ water",
    "goal": "★ goal",
    "hole": "H hole",
    "cliff": "C cliff",
    "wall": "grey: wall",
}


def _mark_cells(axes: Any, grid: tuple[int, int], marks: Marks, cell: float) -> None:
    """Cell borders and marks that leave the middle of small cells free."""
    from matplotlib.patches import Circle, Rectangle

    others = {name: states for name, states in marks.items() if name not in ("start", "water")}
    dress(axes, grid, others, cell, legend=False)
    for name in ("water", "start"):
        for row, column in (divmod(int(state), grid[1]) for state in marks.get(name, ())):
            shape = Rectangle((column - 0.45, row - 0.45), 0.9, 0.9) if name == "water" else Circle((column, row), 0.42)
            shape.set(fill=False, edgecolor="#1f4e9e" if name == "water" else "white", linewidth=1.2, zorder=4)
            axes.add_patch(shape)
            if name == "start":
                axes.add_patch(Circle((column, row), 0.36, fill=False, edgecolor=INK, linewidth=1.6, zorder=4))


def consistency(numbers: Numbers, title: str = "") -> Any:
    """Left: what every action is worth against the worst case, by state. Right: running totals along trajectories."""
    figure = new_figure(12.5, 5.6)
    left, right = figure.subplots(1, 2)
    order = np.argsort(numbers["value"])
    value, used = numbers["value"][order], numbers["policy"][order] > 0
    worth, unforced = numbers["perturbed_q"][order], numbers["unforced_q"][order]
    index = np.broadcast_to(np.arange(len(order))[:, None], worth.shape)
    left.plot(value, "_", color=AMBER, ms=14, mew=4, alpha=0.6, label="value V")
    left.plot(index[used], worth[used], "o", color=BLUE, ms=4, label="Q − Δ of actions in use")
    if not used.all():
        shut = ~used & np.isfinite(unforced)
        left.plot(index[~used], worth[~used], "x", color=VERMILION, ms=5, label="Q − Δ + λ of actions never used")
        left.plot(index[shut], unforced[shut], "v", mfc="none", mec=GREY, ms=4, label="the same without λ")
    left.set(xlabel="states, by value   (λ: multiplier of π ≥ 0)", ylabel="reward units")
    left.set_title("in every state: indifference")
    left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    for n, (perturbed, nominal) in enumerate(zip(numbers["perturbed"], numbers["nominal"])):
        colour = SERIES[n % 2][0]
        kind = "the policy's actions" if n % 2 == 0 else "random actions"
        named = {"label": f"{kind}: perturbed"} if n < 2 else {}
        # The policy's own is a light band, on which what is dotted in its colour is still seen.
        shade, width, line = (("#a6cbe3", 9.0, "-"), (colour, 2.4, "--"))[n % 2]
        right.plot(perturbed, line, color=shade, linewidth=width, zorder=3 + n % 2, **named)
        named = {"label": f"{kind}: undisturbed"} if n < 2 else {}
        right.plot(nominal, color=colour, linewidth=1.4, linestyle=":", zorder=6, **named)
    worst = np.ptp(numbers["perturbed"], axis=1).max()
    right.set(xlabel="step t", ylabel="collected so far + γᵗ V(sₜ)  (reward units)")
    right.set_title(f"along every path: constant to {worst:.0e}")
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    for axes in (left, right):
        _plain(axes)
    beta = f"β = {float(numbers['beta']):g}"
    figure.suptitle(_titled(title, f"{_divergence(numbers['alpha'])}, {beta}"))
    return figure


def price(numbers: Numbers, title: str = "") -> Any:
    """Left: guaranteed and nominal return against beta, below the optimum. Right: the price, their distance to it."""
    figure = new_figure(12.5, 5.0)
    left, right = figure.subplots(1, 2)
    beta, optimum = numbers["beta"], float(numbers["optimum"])
    complete = bool((optimum - numbers["nominal"] > float(numbers["resolution"])).all())
    left.axhline(optimum, color=INK, linewidth=1.2)
    left.annotate("optimum", (beta[0], optimum), xytext=(0, 4), textcoords="offset points", size=10)
    for alpha, guaranteed, nominal, (colour, marker, _) in zip(
        numbers["alpha"], numbers["guaranteed"], numbers["nominal"], SERIES
    ):
        style: dict[str, Any] = {"color": colour, "marker": marker, "markevery": max(1, len(beta) // 8), "ms": 5}
        left.plot(beta, nominal, "--", linewidth=1.6, **style)
        left.plot(beta, guaranteed, "-", linewidth=2.4, label=_divergence(alpha), **style)
        gap = optimum - nominal
        shown = gap > float(numbers["resolution"])
        right.plot(beta[shown], gap[shown], linewidth=2.4, label=_divergence(alpha), **style)
    left.plot([], [], "-", color=INK, lw=2.4, label="guaranteed: under the worst case")
    left.plot([], [], "--", color=INK, lw=1.6, label="nominal: undisturbed")
    left.set(xscale="log", xlabel=BETA, ylabel="return (reward units)", title="what the policy earns")
    right.set(xscale="log", yscale="log", xlabel=BETA, ylabel="optimum − nominal (reward units)")
    right.set_title("price of robustness" + ("" if complete else " (a line ends where it is 0 to rounding)"))
    for axes, where in ((left, "lower right"), (right, "lower left")):
        axes.legend(frameon=False, loc=where)
        axes.grid(color="#dddddd", linewidth=0.6)
        _plain(axes)
    figure.suptitle(title)
    return figure


def attacks(numbers: Numbers, title: str = "") -> Any:
    """Left: return against the size of the attack. Right: against its cost, with both bounds."""
    figure = new_figure(13.0, 6.0)
    left, right = figure.subplots(1, 2, sharey=True)
    guaranteed, undisturbed = float(numbers["guaranteed"]), float(numbers["undisturbed"])
    scale, styles = numbers["scale"], dict(zip(("worst", "ball", "noise"), SERIES[1:]))
    names = {
        "worst": "worst case of the robust set",
        "ball": f"same norm (order {float(numbers['order']):g}), rewards only lowered",
        "noise": f"noise of the same cost ({numbers['noise_return'].shape[-1]} samples)",
    }
    reach = numbers["worst_cost"]
    ends = np.array([min(reach.min(), numbers["shifted_cost"].min()), 1.15 * reach.max()])
    lowest = min(guaranteed - ends[1], float(numbers["worst_return"].min()))
    span = undisturbed - lowest
    floor, top = lowest - 0.1 * span, undisturbed
    for name, (colour, marker, line) in styles.items():
        earned, cost = (numbers[f"{name}_{what}"].reshape(len(scale), -1) for what in ("return", "cost"))
        every: dict[str, Any] = {"color": colour, "marker": marker, "ms": 4, "linestyle": line}
        if name == "noise":
            left.fill_between(scale, earned.min(1), earned.max(1), color=colour, alpha=0.35, lw=0, label=names[name])
            top = float(earned.max())
            for k, line in enumerate(right.plot(cost, earned, "-", color=colour, linewidth=0.8, alpha=0.6)):
                line.set_label("each sample" if k == 0 else "")
            continue
        down = f", down to {shown_number(float(earned.min()), '.3g')}" if earned.min() < floor else ""
        left.plot(scale, earned, linewidth=2.4, label=names[name] + down, **every)
        right.plot(cost, earned, linewidth=2.4, **every)
    right.plot(ends, guaranteed - ends, "-", color=INK, linewidth=2, label="bound: guaranteed − cost [Fenchel–Young]")
    right.plot(
        numbers["shifted_cost"], numbers["shifted_return"], "P", color=AMBER, ms=9, mec="white", zorder=4,
        label="worst case + a constant: meets the bound",
    )  # fmt: skip
    if top > undisturbed + 0.5 * span:
        left.collections[0].set_label(f"{names['noise']}, up to {top:.3g}")
    for axes in (left, right):
        axes.axhline(guaranteed, color=BLUE, linewidth=2, linestyle=(0, (6, 2)))
        # Noise may earn far more than all else, lowered rewards less: what leaves the picture, the legend tells.
        axes.set_ylim(floor, undisturbed + min(0.5 * span, top - undisturbed + 0.08 * span))
        axes.grid(color="#eeeeee", linewidth=0.6)
        _plain(axes)
    right.set_xlim(*ends)
    right.axvspan(ends[0], 0, color=GREEN, alpha=0.1, linewidth=0)
    right.text(
        0.98 * ends[0], lowest - 0.07 * span, "in the robust set:\nnever below the guarantee", size=10, va="bottom"
    )
    left.annotate(
        "guaranteed", (scale[-1], guaranteed), xytext=(0, 4), textcoords="offset points", ha="right", color=BLUE
    )
    right.annotate("undisturbed", (0, undisturbed), xytext=(8, 0), textcoords="offset points", va="bottom")
    left.set(xlabel="size of the attack (1: worst case on the boundary)", ylabel="return (reward units)")
    right.set(xlabel="cost of the attack, Σ d Ω*(Δ)  (reward units; positive: outside the set)")
    left.set_title("outside the set the guarantee fails …")
    right.set_title("… but by no more than the attack costs")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(_titled(title, f"{_divergence(numbers['alpha'])}, β = {float(numbers['beta']):g}"))
    return figure


def _strengths(numbers: Numbers) -> list[str]:
    """Tell what to call the rows: the smallest beta is the strongest regulariser."""
    betas = numbers["beta"]
    words = {
        2: ("strong regulariser", "weak regulariser"),
        3: ("high strength", "medium strength", "low strength"),
    }.get(len(betas), ("",) * len(betas))
    ranks = np.argsort(np.argsort(betas))
    return [f"{words[i]} (β = {b:g})".strip() if words[i] else f"β = {b:g}" for i, b in zip(ranks, betas)]


def _divergence(alpha: Any) -> str:
    return "KL" if float(alpha) == 1 else f"α = {float(alpha):g}".replace("-", "−")


def _titled(title: str, detail: str) -> str:
    return f"{title}\n{detail}" if title else detail


def _marks(numbers: Numbers) -> Marks:
    """Remarkable cells by name, from the name of every cell."""
    names = numbers["marks"]
    return {str(name): tuple(np.flatnonzero(names == name).tolist()) for name in dict.fromkeys(names.tolist()) if name}


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
