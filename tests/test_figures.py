"""Figures show the numbers that they were given: what is drawn is read back from the figure."""

import dataclasses
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

import robustreg as rr
from robustreg.figures import solution_figures, style

CELLS = ("S.~.", "..#.", "...G")
GRID = (3, 4)
MARKS = rr.problems.grid_marks(CELLS)
ACTIONS = ["↑ up", "→ right", "↓ down", "← left"]


@pytest.fixture(scope="module")
def world():
    return rr.problems.grid_world(CELLS, slip=0.1)


@pytest.fixture(scope="module")
def solved(world):
    return rr.solve(world, rr.kl(3.0))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def drawn(axes):
    """The numbers of the picture in `axes`, NaN where cells are left out."""
    return np.ma.filled(np.ma.asarray(axes.images[0].get_array(), dtype=float), np.nan)


@pytest.mark.parametrize("slip", [0.0, 0.1, 0.25])
def test_directions_of_a_grid_world(slip):
    m = rr.problems.grid_world(CELLS, slip=slip)
    names, steps = solution_figures.directions(m)
    assert list(names) == ACTIONS
    np.testing.assert_array_equal(steps, np.array(rr.problems.MOVES)[:, ::-1])


@pytest.mark.parametrize("options", [{"map_name": "8x8"}, {"map_name": "4x4", "is_slippery": False}])
def test_directions_of_frozen_lake(options):
    m = rr.from_gymnasium(gymnasium.make("FrozenLake-v1", **options))
    assert list(solution_figures.directions(m)[0]) == ["← left", "↓ down", "→ right", "↑ up"]


@pytest.mark.parametrize("slippery", [True, False])
def test_directions_where_a_fall_leads_far_away(slippery):
    m = rr.from_gymnasium(gymnasium.make("CliffWalking-v1", is_slippery=slippery))
    assert list(solution_figures.directions(m)[0]) == ACTIONS


def test_directions_need_a_grid():
    with pytest.raises(ValueError, match="not cells of a grid"):
        solution_figures.directions(rr.problems.chain())


def test_value_map(solved):
    figure = solution_figures.value_map(solved.value, GRID, title="a world", marks=MARKS)
    axes = figure.axes[0]
    expected = np.array(solved.value).reshape(GRID)
    filled = list(MARKS["wall"] + MARKS["goal"])
    np.testing.assert_array_equal(np.isnan(drawn(axes)).ravel().nonzero()[0], sorted(filled))
    shown = np.delete(drawn(axes).ravel(), filled)
    np.testing.assert_array_equal(shown, np.delete(expected.ravel(), filled))
    # Three digits of what they differ by.
    assert [t for t in texts(axes) if t not in "S★≈"] == [f"{number:.3f}".replace("-", "−") for number in shown]
    assert "a world" in figure.get_suptitle()
    assert axes.child_axes[0].get_ylabel() == "value (reward units)"


def written(figure):
    """Every text of a figure, drawn, with its place."""
    figure.draw_without_rendering()
    axes = [*figure.axes, *(child for axes in figure.axes for child in axes.child_axes)]
    labels = [x for a in axes for x in (a.title, a.xaxis.label, a.yaxis.label, *a.texts)]
    ticks = []
    for axis in (axis for a in axes for axis in (a.xaxis, a.yaxis)):
        low, high = sorted(axis.get_view_interval())
        # Those beyond the ends are not drawn.
        ticks += [x.label1 for x in axis.get_major_ticks() if low <= x.get_loc() <= high and x.label1.get_visible()]
    suptitles = [x for x in (figure._suptitle, figure._supxlabel) if x is not None]
    return [(x.get_text(), x.get_window_extent()) for x in labels + ticks + suptitles if x.get_text().strip()]


def check_layout(figure):
    """Every text is in the picture, and no two lie on each other."""
    width, height = figure.get_size_inches() * figure.dpi
    shown = written(figure)
    for i, (text, box) in enumerate(shown):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f"{text!r} is cut off"
        for other, there in shown[:i]:
            apart = box.x0 > there.x1 - 2 or there.x0 > box.x1 - 2 or box.y0 > there.y1 - 2 or there.y0 > box.y1 - 2
            assert apart, f"{text!r} and {other!r} lie on each other"


@pytest.mark.parametrize("shape", [(1, 80), (40, 1), (3, 4), (12, 12), (30, 30)], ids=str)
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, -1e3, 1e7])
def test_texts_of_maps_are_apart_and_numbers_differ(shape, scale):
    """Whatever the shape and the size of rewards; numbers are written where they fit, and tell cells apart."""
    value = scale * np.linspace(0.1, 1.0, shape[0] * shape[1])
    figure = solution_figures.value_map(value, shape, title="a problem")
    check_layout(figure)
    numbers = texts(figure.axes[0])
    assert len(set(numbers)) == len(numbers) == (value.size if value.size < 200 and max(shape) < 50 else 0)
    if shape == (3, 4):
        power = figure.get_suptitle().partition("numbers in 10")[2].partition(" ")[0]
        power = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)
        read = [float(x.replace("−", "-")) * 10.0**power for x in numbers]
        np.testing.assert_allclose(read, value, atol=0.01 * abs(scale))


@pytest.mark.parametrize("shape", [(1, 80), (40, 1), (3, 4)], ids=str)
def test_texts_of_perturbations_and_policies_are_apart(shape):
    size = shape[0] * shape[1]
    marks = {"start": (0,), "goal": (size - 1,), "water": (size // 2,)}
    taken = np.linspace(-1, 1, 4 * size).reshape(size, 4)
    check_layout(solution_figures.perturbation_maps(taken, shape, title="a problem", marks=marks, actions=ACTIONS))
    steps = np.array(rr.problems.MOVES)[:, ::-1]
    check_layout(solution_figures.policy_map(np.full((size, 4), 0.25), steps, shape, title="a problem", marks=marks))


def test_numbers_that_differ_by_little_or_not_at_all():
    value = 1000 + 1e-3 * np.arange(12)
    assert texts(solution_figures.value_map(value, GRID).axes[0])[:2] == ["1000.0000", "1000.0010"]
    assert set(texts(solution_figures.value_map(np.zeros(12), GRID).axes[0])) == {"0.00"}
    assert set(texts(solution_figures.value_map(np.full(12, -1e-12), GRID).axes[0])) == {"−1.00"}
    assert style.shown_number(-0.001, ".2f") == "0.00" and style.shown_number(-1.5) == "−1.5"


def test_what_is_likely_has_the_larger_arrow(world):
    """The area of an arrow goes with p^1.5, so that 0.15 beside 0.4 is not lost."""
    _, steps = solution_figures.directions(world)
    axes = solution_figures.policy_map(np.tile([0.15, 0.4, 0.4, 0.05], (12, 1)), steps, GRID).axes[0]
    spans = [np.ptp(c.get_paths()[0].vertices, axis=0) for c in axes.collections]
    areas = [np.prod(span) for span in spans]
    np.testing.assert_allclose(areas[0] / areas[1], (0.15 / 0.4) ** 1.5, rtol=1e-9)


def test_actions_that_nobody_may_take_are_grey(tmp_path):
    """Not white, which says that nothing is taken: those that the MDP has not, and those that the prior excludes."""
    taken = np.full((12, 4), 0.1)
    taken[3, 1] = np.nan
    figure = solution_figures.perturbation_maps(taken, GRID, actions=ACTIONS)
    assert np.isnan(drawn(figure.axes[1])).sum() == 1 and "nobody may take" in figure._supxlabel.get_text()
    prior = np.full((6, 2), 0.5)
    prior[2] = [1.0, 0.0]
    m = rr.problems.chain()
    sol = rr.solve(m, rr.kl(1.0, prior=prior))
    bars = solution_figures.decision_bars(*np.array([[1.0, 2.0, 3.0], [0.5, 0.5, 0.0], [0.1, -0.1, np.nan]]))
    for axes in bars.axes:  # the span behind the third action, beside the bars
        assert len(axes.patches) == 4 and "nobody may take" in bars.get_suptitle()
    odds, moved = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, np.nan], [0.1, 0.2]])
    _, middle, *_ = solution_figures.heat_map(np.arange(2.0), odds, moved).axes
    assert np.isnan(drawn(middle)).sum() == 1
    seen = []
    original = solution_figures.heat_map
    solution_figures.write(tmp_path, m, sol, excluded=prior == 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solution_figures, "heat_map", lambda *x, **y: seen.append(x[2]) or original(*x, **y))
        solution_figures.write(tmp_path, m, sol, excluded=prior == 0)
    assert np.isnan(seen[0]).nonzero() == ([2], [1])


@pytest.mark.parametrize("count", [2, 30, 200])
def test_labels_of_many_actions_are_apart(count):
    policy = np.full((20, count), 1 / count)
    taken = np.linspace(-1, 1, 20 * count).reshape(20, count)
    figure = solution_figures.heat_map(np.arange(20.0), policy, taken, title="$x_{$ in a name")
    check_layout(figure)
    assert figure.axes[1].images[0].norm.vmax == 1 / count  # or all would be white
    assert all(float(x).is_integer() for x in figure.axes[2].get_xticks())
    figure = solution_figures.decision_bars(
        taken[0], policy[0], taken[0], title="$x_{$", actions=[f"go ${i}" for i in range(count)]
    )
    check_layout(figure)
    assert "red: taken, blue: given" in figure.axes[2].get_title()
    assert max(bar.get_height() for bar in figure.axes[1].patches) > 0.3 * figure.axes[1].get_ylim()[1]


def test_policy_arrows_are_as_long_as_probable(solved, world):
    _, steps = solution_figures.directions(world)
    axes = solution_figures.policy_map(solved.policy, steps, GRID, marks=MARKS).axes[0]
    policy = np.array(solved.policy)
    acting = [s for s in range(12) if s not in MARKS["wall"] + MARKS["goal"]]
    assert len(axes.collections) == 4
    for action, collection in enumerate(axes.collections):
        states = [s for s in acting if policy[s, action] >= 0.01]
        tips = np.array([path.vertices[3] for path in collection.get_paths()])
        centres = np.array([divmod(s, 4)[::-1] for s in states])
        reach = 0.48 * policy[states, action, None] * steps[action]
        np.testing.assert_allclose(tips - centres, reach, atol=1e-12)


def test_perturbation_maps_share_one_balanced_scale(solved):
    figure = solution_figures.perturbation_maps(solved.perturbation, GRID, marks=MARKS, actions=ACTIONS)
    panels = figure.axes[:4]
    norms = {id(axes.images[0].norm) for axes in panels}
    assert len(norms) == 1
    norm = panels[0].images[0].norm
    assert norm.vmin == -norm.vmax and norm.vmax >= max(np.nanmax(np.abs(drawn(axes))) for axes in panels)
    for action, axes in enumerate(panels):
        shown = drawn(axes).ravel()
        kept = np.isfinite(shown)
        np.testing.assert_array_equal(shown[kept], np.array(solved.perturbation)[kept, action])
        assert axes.get_title() == ACTIONS[action]
    assert "reward units" in figure.axes[4].get_ylabel()


def test_a_few_large_perturbations_get_a_logarithmic_scale():
    taken = np.full((12, 4), 0.1)
    taken[3, 1] = -50.0
    figure = solution_figures.perturbation_maps(taken, GRID)
    assert isinstance(figure.axes[0].images[0].norm, SymLogNorm)
    assert "log scale" in figure.axes[4].get_ylabel()
    ticks = figure.axes[4].get_yticks()
    np.testing.assert_allclose(ticks, [-10, -1, 0, 1, 10])


def test_perturbations_of_nothing():
    norm = solution_figures.perturbation_maps(np.zeros((12, 5)), GRID).axes[0].images[0].norm
    assert norm.vmax == 1.0


def test_decision_bars():
    m = rr.problems.bandit()
    sol = rr.solve(m, rr.kl(3.0))
    axes = solution_figures.decision_bars(sol.q, sol.policy, sol.perturbation, title="bandit").axes
    heights = [[bar.get_height() for bar in panel.patches] for panel in axes]
    np.testing.assert_allclose(heights[0], m.reward[0], rtol=1e-14)
    np.testing.assert_array_equal(heights[1], sol.policy[0])
    np.testing.assert_array_equal(heights[2], sol.perturbation[0])
    np.testing.assert_allclose(heights[3], float(sol.value[0]), rtol=1e-12)
    assert axes[3].get_legend().get_texts()[0].get_text() == f"V = {float(sol.value[0]):.3g}"


def test_heat_map_groups_states_by_their_likeliest_action():
    m = rr.problems.garnet(30, 3, 4)
    sol = rr.solve(m, rr.alpha(2.0, 1.0))
    top, middle, bottom, *_ = solution_figures.heat_map(sol.value, sol.policy, sol.perturbation, actions="abc").axes
    likeliest = np.array(sol.policy).argmax(-1)
    order = sorted(range(30), key=lambda s: (likeliest[s], sol.value[s]))
    np.testing.assert_array_equal(top.lines[0].get_ydata(), np.array(sol.value)[order])
    np.testing.assert_array_equal(drawn(middle), np.array(sol.policy)[order].T)
    np.testing.assert_array_equal(drawn(bottom), np.array(sol.perturbation)[order].T)
    assert [label.get_text() for label in bottom.get_yticklabels()] == list("abc")


@pytest.mark.parametrize(
    ("problem", "names"),
    [
        (rr.problems.bandit, {"decision"}),
        (lambda: rr.problems.grid_world(CELLS), {"value", "policy", "perturbation"}),
        (rr.problems.chain, {"heat_map"}),
    ],
    ids=["bandit", "grid", "chain"],
)
def test_write_picks_what_suits_the_problem(problem, names, tmp_path):
    m = problem()
    paths = solution_figures.write(tmp_path, m, rr.solve(m, rr.kl(1.0)))
    assert {path.stem for path in paths} == names
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match="3 x 4 grid has one number per cell"):
        solution_figures.value_map(np.zeros(11), GRID)


def test_matplotlib_is_optional(monkeypatch, solved):
    assert style.available()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not style.available()
    with pytest.raises(ModuleNotFoundError, match=r"robustreg\[figures\]"):
        solution_figures.value_map(solved.value, GRID)


def test_drawing_leaves_no_global_state(world, solved, tmp_path):
    """Importing the package does not import matplotlib, and drawing does not import pyplot."""
    script = f"""
import sys, dataclasses, robustreg.figures as figures, numpy as np
assert "matplotlib" not in sys.modules
figures.value_map(np.zeros(12), {GRID}).savefig({str(tmp_path / "a.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    figure = solution_figures.value_map(solved.value, dataclasses.replace(world, grid=GRID).grid)
    assert isinstance(figure, Figure)
