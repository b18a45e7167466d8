"""The numbers of the paper's figures satisfy the theory that the figures illustrate.

Every shipped configuration is drawn in its small size by the command, and what is checked is what it wrote.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import robustreg as rr
from robustreg.cli import commands, config, figure_config
from robustreg.figures import paper_figures, paper_numbers

# Many compilations: the run on the oldest releases leaves this file out.
pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "configs" / "paper"
CONFIGS = sorted(FOLDER.glob("*.toml"))
KINDS = {path.stem: tomllib.loads(path.read_text(encoding="utf-8"))["figure"]["kind"] for path in CONFIGS}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Numbers of a shipped figure in its small size, as `robustreg figure --small` writes them; each made once."""
    out, made = tmp_path_factory.mktemp("paper"), {}

    def numbers(name):
        if name not in made:
            assert commands.main(["figure", str(FOLDER / f"{name}.toml"), "--small", "--out", str(out)]) == 0
            assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and (out / f"{name}.pdf").stat().st_size > 5_000
            with np.load(out / f"{name}.npz", allow_pickle=False) as file:
                made[name] = dict(file)
        return made[name]

    return numbers


def of_kind(kind):
    return [name for name, k in KINDS.items() if k == kind]


def small_mdp(name):
    """The problem of a figure in its small size, as dense tables in NumPy."""
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    m = config.problem_of({**table["problem"], **table["small"]["problem"]}, name).mdp
    kernel = np.array(m.transitions.expect(np.eye(m.n_states))).transpose(1, 2, 0)
    return kernel, np.array(m.reward), float(m.discount), np.array(m.initial)


def divergence(policy, prior, alpha):
    """D_alpha[p0 : p] of positive policies, from its definition."""
    if alpha == 1:
        return np.sum(policy * np.log(policy / prior), -1)
    return (1 - np.sum(prior ** (1 - alpha) * policy**alpha, -1)) / (alpha * (1 - alpha))


def value_of(policy, kernel, reward, discount):
    """Value of a fixed policy by one linear solve."""
    chain = np.einsum("sa,sat->st", policy, kernel)
    return np.linalg.solve(np.eye(len(chain)) - discount * chain, np.sum(policy * reward, -1))


def best_value(kernel, reward, discount):
    """Unregularised optimum by plain sweeps."""
    value = np.zeros(len(reward))
    for _ in range(4_000):
        value = (reward + discount * kernel @ value).max(-1)
    return value


def test_every_kind_of_figure_is_shipped():
    assert set(KINDS.values()) == set(figure_config.KINDS)


@pytest.mark.parametrize("name", of_kind("decision"))
def test_a_decision_leaves_the_agent_indifferent(drawn, name):
    n = drawn(name)
    flat = np.broadcast_to(n["value"][:, None], n["perturbed"].shape)
    np.testing.assert_allclose(n["perturbed"], flat, rtol=0, atol=1e-8)
    np.testing.assert_allclose(n["reward"] - n["perturbation"], n["perturbed"], rtol=0, atol=1e-14)
    # A stronger adversary lowers the level; what it takes from the policy is the price of the regulariser.
    assert n["beta"][0] < n["beta"][1] and n["value"][0] < n["value"][1]
    used = n["policy"] > 0
    prior = 1 / n["policy"].shape[-1]
    for k, beta in enumerate(n["beta"]):
        p = n["policy"][k]
        omega = divergence(p[used[k]], prior, 1) if n["alpha"] == 1 else 0.5 * np.sum((p - prior) ** 2 / prior)
        assert p @ n["perturbation"][k] == pytest.approx(omega / beta, abs=1e-14)
        assert p.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("name", of_kind("feasible_sets"))
def test_the_worst_case_is_on_the_boundary_with_the_policy_as_normal(drawn, name):
    n = drawn(name)
    assert np.abs(n["slack"]).max() <= 1e-12
    np.testing.assert_allclose(n["normal"], n["policy"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(n["worst"], np.repeat(n["value"][..., None], 2, -1), rtol=0, atol=1e-12)
    for j, alpha in enumerate(n["alpha"]):
        for k, beta in enumerate(n["beta"]):
            check_boundary(n, j, k, alpha, beta)


def check_boundary(n, j, k, alpha, beta):
    """Boundary, star and normal against the definition of the set, `<p, dr> <= D/beta` for every p, on a fine grid."""
    share = np.linspace(1e-9, 1 - 1e-9, 200_001)
    p = np.stack([share, 1 - share], -1)
    price = divergence(p, n["prior"], alpha) / beta
    edge = n["boundary"][j, k]
    # The grid here is too coarse for points with a normal near a vertex.
    finite = edge[np.isfinite(edge).all(-1)]
    gaps = price - (n["reward"] - finite) @ p.T
    middle = np.abs(p[gaps.argmin(-1), 0] - 0.5) < 0.49
    assert middle.sum() >= 4
    assert (-1e-12 <= gaps[middle].min(-1)).all() and (gaps[middle].min(-1) <= 1e-8 / beta).all()
    assert abs((price - p @ (n["reward"] - n["worst"][j, k])).min()) <= 1e-8 / beta
    # As drawn, with chords between the points, the worst case lies on the boundary to the width of a line.
    if 0.01 < n["policy"][j, k][0] < 0.99:
        start, along = finite[:-1], np.diff(finite, axis=0)
        share_of = np.sum((n["worst"][j, k] - start) * along, -1) / np.maximum(np.sum(along**2, -1), 1e-300)
        nearest = start + np.clip(share_of, 0, 1)[:, None] * along
        assert np.linalg.norm(nearest - n["worst"][j, k], axis=-1).min() <= 0.003 * n["window"]
    # Half of the set's definition is the guarantee: the whole set pays the policy at least its value.
    paid = edge[np.isfinite(edge).all(-1)] @ n["policy"][j, k]
    assert paid.min() >= n["value"][j, k] - 1e-12
    best = np.argmax(p @ n["reward"] - price)
    np.testing.assert_allclose(n["policy"][j, k], p[best], atol=1e-5)


def test_sets_shrink_with_the_strength(drawn):
    """What the weak regulariser is robust to, the strong one is: by the definition, on a grid of policies."""
    n = drawn("feasible_sets_uniform")
    share = np.linspace(1e-6, 1 - 1e-6, 2_001)
    p = np.stack([share, 1 - share], -1)
    for j, alpha in enumerate(n["alpha"]):
        for k in range(len(n["beta"]) - 1):
            weak, strong = (n["reward"] - n["boundary"][j, i] for i in (k + 1, k))
            price = divergence(p, n["prior"], alpha) / n["beta"][k]
            assert (weak[np.isfinite(weak).all(-1)] @ p.T - price).max() <= 1e-9
            own = divergence(p, n["prior"], alpha) / n["beta"][k + 1]
            assert (strong[np.isfinite(strong).all(-1)] @ p.T - own).max() > 0.1


@pytest.mark.parametrize("name", of_kind("sequential"))
def test_a_grid_world_leaves_the_agent_indifferent_in_every_state(drawn, name):
    n = drawn(name)
    kernel, reward, discount, initial = small_mdp(name)
    for k, beta in enumerate(n["beta"]):
        value, policy, dr = n["value"][k], n["policy"][k], n["perturbation"][k]
        left = reward - dr + discount * kernel @ value
        np.testing.assert_allclose(left, np.repeat(value[:, None], 4, -1), rtol=0, atol=1e-8)
        np.testing.assert_allclose(best_value(kernel, reward - dr, discount), value, rtol=0, atol=1e-8)
        np.testing.assert_allclose(value_of(policy, kernel, reward - dr, discount), value, rtol=0, atol=1e-8)
        cost = 0.5 * np.sum((policy - 0.25) ** 2 / 0.25, -1) if n["alpha"] == 2 else divergence(policy, 0.25, 1)
        np.testing.assert_allclose(np.sum(policy * dr, -1), cost / beta, rtol=0, atol=1e-10)
        assert initial @ value == pytest.approx(n["objective"][k], abs=1e-10)
    assert [name for name in n["marks"] if name] == ["start", "water", "goal"]


def test_paths_are_consistent_whatever_their_actions(drawn):
    n = drawn("consistency")
    kernel, reward, discount, _ = small_mdp("consistency")
    value, used = n["value"], n["policy"] > 0
    assert (~used).any(), "the figure is about actions that are never taken"
    np.testing.assert_allclose(n["perturbed_q"], np.repeat(value[:, None], 4, -1), rtol=0, atol=1e-8)
    np.testing.assert_allclose(n["unforced_q"][used], n["perturbed_q"][used], rtol=0, atol=1e-8)
    assert (n["unforced_q"][~used] <= n["perturbed_q"][~used] + 1e-8).all()
    dr = reward + discount * kernel @ value - n["perturbed_q"]
    for states, taken, perturbed, nominal in zip(n["states"], n["taken"], n["perturbed"], n["nominal"]):
        collected = undisturbed = 0.0
        for t, (s, a) in enumerate(zip(states, taken)):
            assert kernel[s, a, states[t + 1]] == 1  # no slipping, no surprise
            collected += discount**t * (reward[s, a] - dr[s, a])
            undisturbed += discount**t * reward[s, a]
            ahead = discount ** (t + 1) * value[states[t + 1]]
            assert collected + ahead == pytest.approx(value[states[0]], abs=1e-8)
            assert perturbed[t + 1] == pytest.approx(collected + ahead, abs=1e-10)
            assert nominal[t + 1] == pytest.approx(undisturbed + ahead, abs=1e-10)
    assert len(set(n["states"][0])) > 1 and np.ptp(n["nominal"]) > 0.1


def test_paths_are_consistent_where_moves_slip():
    """The surprise of each step is paid: it has mean 0 and closes the sum."""
    world = config.problem_of({"kind": "grid_world", "cells": ["S~.", "..G"], "slip": 0.2, "goal": 5.0}, "test")
    n = paper_numbers.consistency(world, beta=2.0, alpha=2.0, trajectories=6, steps=8, seed=3)
    np.testing.assert_allclose(n["perturbed"], n["value"][n["states"][:, :1]] + np.zeros(9), rtol=0, atol=1e-8)
    moves = np.abs(np.diff(np.array(divmod(n["states"], 3)), axis=-1)).sum(0)
    assert moves.max() == 1


@pytest.mark.slow
def test_price_falls_as_beta_grows(drawn):
    n = drawn("price")
    kernel, reward, discount, initial = small_mdp("price")
    assert n["optimum"] == pytest.approx(initial @ best_value(kernel, reward, discount), abs=1e-10)
    assert (np.diff(n["guaranteed"], axis=-1) > 0).all()
    cost = n["optimum"] - n["nominal"]
    # Strictly, until only rounding is left of it (alpha = 2 reaches the optimum).
    falls = (np.diff(cost, axis=-1) < 0) | (cost[:, 1:] <= 1e-9)
    assert falls.all() and (cost[:, 0] > 1).all() and cost.min() >= -1e-9
    assert (n["guaranteed"] <= n["nominal"]).all() and (n["nominal"] <= n["optimum"] + 1e-9).all()


@pytest.mark.slow
def test_attacks_outside_break_the_guarantee_but_not_the_bound(drawn):
    n = drawn("attacks")
    kernel, reward, discount, initial = small_mdp("attacks")
    guaranteed, scale = float(n["guaranteed"]), n["scale"]
    inside, outside = scale <= 1, scale > 1
    assert (n["worst_return"][inside] >= guaranteed - 1e-10).all() and (n["worst_cost"][inside] <= 1e-10).all()
    assert (n["worst_return"][outside] < guaranteed - 0.1).all() and (n["worst_cost"][outside] > 0.1).all()
    assert n["worst_return"][scale == 1][0] == pytest.approx(guaranteed, abs=1e-10)
    assert n["worst_return"][scale == 0][0] == pytest.approx(float(n["undisturbed"]), abs=1e-10)
    for name in ("worst", "ball", "shifted", "noise"):
        assert (n[f"{name}_return"] >= guaranteed - n[f"{name}_cost"] - 1e-10).all()
    np.testing.assert_allclose(n["shifted_return"], guaranteed - n["shifted_cost"], rtol=0, atol=1e-10)
    # Only lowering rewards is outside the set from the start, and takes more than the worst case of the same norm.
    moved = scale > 0
    assert (n["ball_cost"][moved] > 0).all() and (n["ball_return"][moved] < n["worst_return"][moved]).all()
    # Noise on the boundary takes less than the worst case there.
    assert (n["noise_return"][scale == 1] > guaranteed).all()
    np.testing.assert_allclose(n["noise_cost"][scale == 1], 0, atol=1e-10)


def test_attacks_are_what_they_say(drawn):
    """The numbers of the attacks against the oracle, with every perturbation rebuilt."""
    name = "attacks"
    kernel, reward, discount, initial = small_mdp(name)
    n, m = drawn(name), config.problem_of({"kind": "grid_world", "cells": ["S~.", "..G"], **GRID}, name).mdp
    reg = rr.kl(float(n["beta"]))
    sol = rr.solve(m, reg)
    policy, dr = np.array(sol.policy), np.array(sol.perturbation)
    size = np.linalg.norm(dr, axis=-1, keepdims=True)
    ball = size * policy / np.linalg.norm(policy, axis=-1, keepdims=True)
    shifted = [dr + (t - 1) * divergence(policy, 0.25, 1)[:, None] / n["beta"] for t in n["scale"]]
    visits = np.linalg.solve(np.eye(6) - discount * np.einsum("sa,sat->ts", policy, kernel), initial)
    for kind, attacks in (("worst", [t * dr for t in n["scale"]]), ("ball", [t * ball for t in n["scale"]]),
                          ("shifted", shifted)):  # fmt: skip
        for k, x in enumerate(attacks):
            earned = initial @ value_of(policy, kernel, reward - x, discount)
            assert n[f"{kind}_return"][k] == pytest.approx(earned, abs=1e-9)
            cost = visits @ np.log(np.mean(np.exp(n["beta"] * x), -1)) / n["beta"]
            assert n[f"{kind}_cost"][k] == pytest.approx(cost, abs=1e-9)


GRID = {"discount": 0.99, "slip": 0.0, "step": 0.0, "water": -1.0, "goal": 5.0}


# ---- configurations and drawings


def refusal(tmp_path, text):
    path = tmp_path / "figure.toml"
    path.write_text(text)
    with pytest.raises(config.ConfigError) as caught:
        figure_config.load(path, small=True)
    assert str(path) in str(caught.value)
    return str(caught.value)


PROBLEM = "[problem]\nkind = 'chain'\n"
DECISION = "[figure]\nkind = 'decision'\nreward = [1, 2]\nbeta = [1.0]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no [figure] table"),
        ("figure = 3", "figure is 3; expected a table [figure]"),
        ("[figure]\nkind = 'pie'", "unknown kind 'pie'; allowed: attacks, consistency, decision"),
        (DECISION + "colour = 1", "unknown key 'colour'; allowed: alpha, beta, prior, reward"),
        (DECISION + "title = 1", "title is 1; expected text"),
        ("[figure]\nkind = 'decision'\nreward = [1]", "needs beta"),
        (DECISION + "alpha = 'two'", "alpha is 'two'; expected a number"),
        (DECISION.replace("[1.0]", "[0.0]"), "beta"),
        (DECISION.replace("[1.0]", "1.0"), "beta is 1.0; expected a list of numbers"),
        (DECISION.replace("[1.0]", "[true]"), "beta is [True]; expected numbers, not true and false"),
        ("[sweep]\nbeta = [1.0]\n" + PROBLEM, "no [figure] table; `robustreg sweep` reads such files"),
        (PROBLEM + "[regulariser]\nkind = 'kl'\n", "no [figure] table; `robustreg solve` reads such files"),
        (DECISION.replace("[1.0]", "{ from = 1, to = 2, count = 2 }"), 'needs spacing "log"'),
        (DECISION + "[problem]\nkind = 'chain'", "takes no [problem]"),
        (DECISION + "[solver]\nkind = 'auto'", "unknown key 'solver'; allowed: figure, problem, small"),
        (DECISION + "[small.regulariser]\n", "unknown key 'regulariser'; allowed: figure, problem"),
        (DECISION + "[small]\nfigure = 1", "small.figure is 1; expected a table"),
        ("small = 1\n" + DECISION, "small is 1; expected a table"),
        (DECISION + "[small.figure]\nbeta = [-1.0]", "beta"),
        ("[figure]\nkind = 'price'\nbeta = [1.0]\nalpha = [1.0]", "needs a table [problem]"),
        ("[figure]\nkind = 'price'\nproblem = 1\nbeta = [1.0]\nalpha = [1.0]\n[problem]\nkind = 'chain'",
         "unknown key 'problem'; allowed: alpha, beta"),
        ("[figure]\nkind = 'price'\nbeta = [1.0]\nalpha = [1.0]\n[problem]\nkind = 'garnets'\ncount = 2",
         "a batch of problems"),
        ("[figure]\nkind = 'sequential'\nbeta = [1.0]\n[problem]\nkind = 'chain'", "not cells of a grid"),
        ("[figure]\nkind = 'feasible_sets'\nreward = [1, 2, 3]\nbeta = [1.0]\nalpha = [1.0]", "two actions"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_is_allowed(tmp_path, text, expected):
    assert expected in refusal(tmp_path, text)


SETS = "[figure]\nkind = 'feasible_sets'\nreward = [1, 2]\nbeta = [1.0]\nalpha = [1.0]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DECISION.replace("[1, 2]", "[nan, 2]"), "reward is [nan, 2]; expected a list of numbers, all finite"),
        (DECISION + "title = '$x_{$'", "title is '$x_{$'; between dollar signs it is no formula"),
        (SETS + "points = 0", "points must be at least 1"),
        (SETS + "window = -1.0", "window is -1"),
        (SETS + "window = inf", "window is inf"),
        (
            "[figure]\nkind = 'attacks'\nbeta = 1.0\nscale = [1.0]\nsamples = 0\n" + PROBLEM,
            "samples must be at least 1",
        ),
        ("[figure]\nkind = 'attacks'\nbeta = 1.0\nscale = [1.0]\nseed = -1\n" + PROBLEM, "seed is -1"),
        ("[figure]\nkind = 'attacks'\nbeta = 1.0\nscale = [1.0]\norder = 0.5\n" + PROBLEM, "order"),
        ("[figure]\nkind = 'consistency'\nbeta = 1.0\nsteps = 0\n" + PROBLEM, "steps must be at least 1"),
        ("[figure]\nkind = 'consistency'\nbeta = 1.0\ntrajectories = 0\n" + PROBLEM, "trajectories must be at least 1"),
        ("[figure]\nkind = 'consistency'\nbeta = nan\n" + PROBLEM, "beta"),
    ],
)
def test_what_no_picture_can_be_drawn_of_is_refused(tmp_path, text, expected):
    assert expected in refusal(tmp_path, text)


def test_every_price_that_is_more_than_rounding_is_drawn():
    """The cut follows the precision: prices of a millionth of the range are certified in float64, 0 is not drawn."""
    beta = np.geomspace(1.0, 100.0, 5)
    nominal = 3.0 - np.array([[1.0, 1e-2, 1e-6, 1e-11, 0.0]])
    numbers = dict(beta=beta, alpha=np.ones(1), guaranteed=nominal - 1, nominal=nominal, optimum=3.0, resolution=1e-13)
    right = paper_figures.price({name: np.asarray(x) for name, x in numbers.items()}).axes[1]
    np.testing.assert_array_equal(right.lines[0].get_xdata(), beta[:4])
    assert "a line ends where it is 0 to rounding" in right.get_title()


def test_a_bad_figure_is_exit_code_2(tmp_path, capsys):
    assert commands.main(["figure", str(tmp_path / "absent.toml"), "--out", str(tmp_path)]) == 2
    assert "absent.toml" in capsys.readouterr().err


def test_the_example_of_the_documentation_works(tmp_path):
    text = (figure_config.__doc__ or "").split("```toml\n")[1].split("```")[0]
    (tmp_path / "example.toml").write_text(text)
    picture = figure_config.load(tmp_path / "example.toml", small=True)
    assert (picture.name, picture.title) == ("example", "What robustness costs")
    assert picture.numbers["guaranteed"].shape == (2, 5)


def test_a_figure_is_its_numbers(drawn, tmp_path):
    """The drawing needs nothing but the file: heights of bars, stars and axes are read back."""
    n = drawn("decision_kl")
    figure = paper_figures.decision(n, "T")
    panels = figure.axes
    assert figure.get_suptitle().startswith("T\nKL")
    heights = [[bar.get_height() for bar in axes.patches] for axes in panels]
    for k in range(2):
        for height, expected in zip(heights[4 * k : 4 * k + 4], ("reward", "policy", "perturbation", "perturbed")):
            shown = n[expected] if expected == "reward" else n[expected][k]
            np.testing.assert_array_equal(height, shown)
    n = drawn("feasible_sets_tilted")
    figure = paper_figures.feasible_sets(n)
    axes = figure.axes[0]
    stars = [tuple(float(x) for x in np.ravel(line.get_data())) for line in axes.lines if line.get_marker() == "*"]
    assert stars == [tuple(n["reward"]), tuple(n["worst"][0, 0])]


def test_without_matplotlib_the_numbers_are_still_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert commands.main(["figure", str(FOLDER / "decision_kl.toml"), "--out", str(tmp_path)]) == 0
    assert "robustreg[figures]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["decision_kl.npz"]


def test_a_figure_in_float32(tmp_path):
    """In a process of its own: the precision is a setting of the whole process."""
    command = [sys.executable, "-m", "robustreg", "figure", str(FOLDER / "decision_kl.toml"), "--precision", "float32"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    with np.load(tmp_path / "decision_kl.npz", allow_pickle=False) as n:
        assert n["perturbed"].dtype == np.float32
        np.testing.assert_allclose(n["perturbed"], np.repeat(n["value"][:, None], 6, -1), rtol=0, atol=1e-6)
