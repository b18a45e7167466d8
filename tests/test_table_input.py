"""Tables of named states: every form gives one MDP, held against value iteration on the rows in plain NumPy."""

import csv
import itertools
from typing import Any

import chex
import jax
import numpy as np
import pandas as pd
import pytest

import robustreg
from robustreg.figures import solution_figures

rr: Any = robustreg

ROWS: list[Any] = [
    ("cool", "slow", "cool", 1.0, 1.0),
    ("cool", "fast", "cool", 0.25, 2.0),
    ("cool", "fast", "warm", 0.75, 3.0),
    ("warm", "slow", "cool", 0.5, 1.0),
    ("warm", "slow", "warm", 0.5, 0.5),
    ("warm", "push", "off", 0.5, -10.0),
    ("warm", "push", "warm", 0.5, 4.0),
]
NAMED: dict[str, dict[str, Any]] = {
    "cool": {"slow": [(1.0, "cool", 1.0)], "fast": [(0.25, "cool", 2.0, False), (0.75, "warm", 3.0)]},
    "warm": {
        "slow": {"cool": (0.5, 1.0), "warm": (0.5, 0.5)},
        "push": [(0.5, "off", -10.0, False), (0.5, "warm", 4.0)],
    },
    "off": {},
}
NAMES = ("state", "action", "successor", "probability", "reward")


def soft_values(rows, discount, beta, sweeps=2000):
    """KL-regularised values by name: the prior is uniform over the actions that a state has rows for."""
    value = {name: 0.0 for row in rows for name in (row[0], row[2]) if name is not None}
    for _ in range(sweeps):
        q: dict[Any, dict[Any, float]] = {}
        for s, a, t, p, r, *done in rows:
            follows = 0.0 if done and done[0] else discount * value[t]
            actions = q.setdefault(s, {})
            actions[a] = actions.get(a, 0.0) + p * (r + follows)
        for s, actions in q.items():
            x = beta * np.array(list(actions.values()))
            value[s] = float(x.max() + np.log(np.exp(x - x.max()).mean())) / beta
    return value


def solved(m, beta=2.0):
    return m.by_name(rr.solve(m, rr.kl(beta), tol=1e-11).raise_if_failed().value)


def agree(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


def with_csv(tmp_path, rows, names=NAMES, separator=","):
    path = tmp_path / "table.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([names, *rows] if names else rows)
    return path


FORMS = {
    "rows": lambda tmp_path: ROWS,
    "generator": lambda tmp_path: (row for row in ROWS),
    "dicts": lambda tmp_path: [dict(zip(NAMES, row)) for row in ROWS],
    "columns": lambda tmp_path: {name: [row[k] for row in ROWS] for k, name in enumerate(NAMES)},
    "frame": lambda tmp_path: pd.DataFrame(ROWS, columns=["State", "a", "next state", "Prob", "R"]),
    "structured": lambda tmp_path: np.array(ROWS, [(n, "U8" if k < 3 else float) for k, n in enumerate(NAMES)]),
    "nested": lambda tmp_path: NAMED,
    "pairs": lambda tmp_path: {(s, a): x for s, actions in NAMED.items() for a, x in actions.items()},
    "csv": lambda tmp_path: with_csv(tmp_path, ROWS),
    "csv with semicolons": lambda tmp_path: str(with_csv(tmp_path, ROWS, separator=";")),
    "csv without names": lambda tmp_path: with_csv(tmp_path, ROWS, names=None),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_problem(form, tmp_path):
    m = rr.from_table(FORMS[form](tmp_path), 0.9)
    assert m.names.states == ("cool", "warm", "off") and m.names.actions == ("slow", "fast", "push")
    assert m.names.ends == {2}
    np.testing.assert_array_equal(m.available, [[1, 1, 0], [1, 0, 1], [1, 0, 0]])
    np.testing.assert_array_equal(m.termination, [[0, 0, 0], [0, 0, 0], [1, 0, 0]])
    agree(solved(m), soft_values(ROWS, 0.9, 2.0))


@pytest.mark.parametrize(
    "names", [(3, 1, 7), ((0, 0), (0, 1), "end"), (None, True, 2.5), (0, 1, 2), (frozenset("a"), "b", b"c")]
)
def test_any_hashable_is_a_name(names):
    if None in names:
        names = ("none", *names[1:])  # nothing is no name
    new: dict[str, Any] = dict(zip(("cool", "warm", "off"), names))
    rows = [(new[s], a, new[t], p, r) for s, a, t, p, r in ROWS]
    m = rr.from_table(rows, 0.9)
    assert set(m.names.states) == set(names)
    agree(solved(m), {new[name]: value for name, value in soft_values(ROWS, 0.9, 2.0).items()})


def test_numbers_from_zero_keep_their_places():
    m = rr.from_table([(2, 1, 0, 1.0, 0.0), (0, 0, 1, 1.0, 5.0), (1, 1, 1, 1.0, 7.0)], 0.5)
    assert m.names.states == (0, 1, 2) and m.names.actions == (0, 1)
    np.testing.assert_array_equal(m.reward, [[5, 0], [0, 7], [0, 0]])
    whole = rr.from_table(np.array([[1, 0, 0, 1.0, 2.5], [0, 0, 1, 1.0, 0.0]]), 0.5)
    assert whole.names.states == (0, 1) and whole.by_name(whole.reward) == {0: {0: 0.0}, 1: {0: 2.5}}


def test_done_and_repeated_rows():
    rows = [("a", "x", "a", 0.25, 1.0), ("a", "x", "a", 0.25, 3.0), ("a", "x", None, 0.5, 8.0, True)]
    m = rr.from_table(rows, 0.9)
    assert m.names.states == ("a",) and m.available is None
    np.testing.assert_allclose(m.reward, [[5.0]])
    np.testing.assert_allclose(m.termination, [[0.5]])
    agree(solved(m), soft_values(rows, 0.9, 2.0))
    marks = itertools.cycle(["False", "", "0"])
    frame = pd.DataFrame([(*row[:5], row[5] if len(row) > 5 else next(marks)) for row in rows])
    frame.columns = [*NAMES, "done"]
    np.testing.assert_allclose(rr.from_table(frame, 0.9).termination, [[0.5]])


def test_initial_by_name():
    assert rr.from_table(ROWS, 0.9, initial="warm").initial.tolist() == [0, 1, 0]
    assert rr.from_table(ROWS, 0.9, initial={"cool": 0.25, "warm": 0.75}).initial.tolist() == [0.25, 0.75, 0]
    assert rr.from_table(ROWS, 0.9, initial=[0.5, 0.5, 0]).initial.tolist() == [0.5, 0.5, 0]
    assert rr.from_table([((0, 1), "x", (0, 1), 1, 0)], 0.9, initial=(0, 1)).initial.tolist() == [1]
    np.testing.assert_allclose(rr.from_table(ROWS, 0.9).initial, np.full(3, 1 / 3))


def test_normalise():
    rows = [("a", "x", "a", 2 / 8, 1.0), ("a", "x", "b", 1 / 8, 4.0)]
    m = rr.from_table(rows, 0.9, normalise=True)
    np.testing.assert_allclose(m.reward, [[2.0], [0.0]])
    np.testing.assert_allclose(m.transitions.expect(np.array([3.0, 0.0]))[0], [2.0])
    # Seven tenths and thrice a tenth are 1, whatever their sum in binary.
    assert rr.from_table([("a", "x", "a", p, 0.0) for p in (0.7, 0.1, 0.1, 0.1)], 0.9).n_states == 1


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([*ROWS[:-1]], ("state 'warm' and action 'push' (row 5) sum to 0.5, not 1", "normalise=True", "done")),
        ([*ROWS, ROWS[0]], ("row 0 and row 7 both lead to 'cool', with the same reward", "keep one of the two")),
        ([*ROWS, ("cool", "slow", "cool", 1.0, 2.0)], ("contradictory rewards 1 and 2", "average by probability")),
        ([("a", "x", "b", "y", 0.0)], ("row 0 has the probability 'y'", "(state, action, successor, probability")),
        ([("a", "x", "b", 1.5, 0.0)], ("row 0 has the probability 1.5; a probability lies between 0 and 1",)),
        ([("a", "x", "b", np.nan, 0.0)], ("row 0 has the probability nan",)),
        ([*ROWS, ("a", "x", "b", 1.0, np.inf)], ("row 7 has the reward inf; rewards must be finite",)),
        ([("a", "x", ["b"], 1.0, 0.0)], ("row 0 has the successor ['b']; a name must be hashable",)),
        ([("1", "x", 1, 1.0, 0.0)], ("row 0 leads to 1, but there is a state '1' (int and str)",)),
        ([("a", "x", "a ", 1.0, 0.0)], ("row 0 leads to 'a ', but there is a state 'a'",)),
        ([("a", "x", None, 1.0, 0.0)], ("row 0 has no successor; only a row with done may leave it out",)),
        ([(None, "x", "a", 1.0, 0.0)], ("row 0 has no state",)),
        ([("a", "x", "a", 1.0, 0.0, "maybe")], ("row 0 has done 'maybe'; expected true or false",)),
        ([("a", "x", 1.0)], ("row 0 is ('a', 'x', 1.0); expected (state, action, successor",)),
        ([], ("the table has no rows",)),
        (pd.DataFrame({"s": [1], "a": [1]}), ("no column for the successor (one of successor, next_state",)),
        ({"a": {"x": [(1.0, "a")]}}, ("table['a']['x'] holds (1.0, 'a'); expected (probability, successor, reward",)),
        ({"a": 3}, ("table['a'] is 3; expected its actions",)),
        ({"a": {}}, ("no state of the table has an action",)),
    ],
)
def test_the_first_offender_is_named(table, words):
    with pytest.raises(ValueError) as caught:
        rr.from_table(table, 0.9)
    for word in words:
        assert word in str(caught.value)


def test_other_refusals(tmp_path):
    with pytest.raises(TypeError, match="a table is rows .* got 5"):
        rr.from_table(5)
    with pytest.raises(ValueError, match="no state is called 'of'; there are: 'cool', 'warm', 'off'"):
        rr.from_table(ROWS, initial="of")
    with pytest.raises(ValueError, match="columns names 'next'; the columns are state, action"):
        rr.from_table(ROWS, columns={"next": "x"})
    frame = pd.DataFrame(ROWS, columns=["state", "action", "where to", "p", "r"])
    with pytest.raises(ValueError, match='no column for the successor .* columns={"successor": NAME}'):
        rr.from_table(frame)
    agree(solved(rr.from_table(frame, 0.9, columns={"successor": "where to"})), soft_values(ROWS, 0.9, 2.0))
    with pytest.raises(ValueError, match="no column 'wo' for the successor"):
        rr.from_table(frame, columns={"successor": "wo"})
    path = with_csv(tmp_path, [*ROWS[:2], ("cool", "fast", "cool", "x", 1)])
    with pytest.raises(ValueError, match=r"table.csv, line 4 has the probability 'x'"):
        rr.from_table(path)
    path.write_text("state,action\n1,2\n")
    with pytest.raises(ValueError, match=r"table.csv has no column for the successor"):
        rr.from_table(path)
    path.write_text(path.read_text() + "3\n")
    with pytest.raises(ValueError, match=r"table.csv, line 3 has another number of columns than line 1, 2"):
        rr.from_table(path)
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        rr.from_table("nowhere.csv")


def test_whole_numbers_in_a_csv_file(tmp_path):
    m = rr.from_table(with_csv(tmp_path, [(0, "x", 1, 1, 2), (1, "x", 0, 1, 0)]), 0.9)
    assert m.names.states == (0, 1)
    assert rr.from_table(with_csv(tmp_path, [("01", "x", "2", 1, 2)]), 0.9).names.states == ("01", "2")


# ---- Gymnasium's tables


def test_gymnasium_takes_names_and_missing_actions():
    four: dict[str, dict[str, list[Any]]] = {"cool": {}, "warm": {}, "off": {}}
    for s, a, t, p, r in ROWS:
        four[s].setdefault(a, []).append((p, t, r, False))
    m = rr.from_gymnasium(four, 0.9)
    agree(solved(m), soft_values(ROWS, 0.9, 2.0))
    numbered = rr.from_gymnasium({0: {0: [(1.0, 1, 1.0, False)], 1: [(1.0, 0, 2.0, False)]}, 1: {1: []}}, 0.9)
    np.testing.assert_array_equal(numbered.available, [[1, 1], [1, 0]])
    assert numbered.names is None
    agree(solved(numbered), soft_values([(0, 0, 1, 1.0, 1.0), (0, 1, 0, 1.0, 2.0)], 0.9, 2.0))


class DiscreteEnv:
    """The shape of gym's environments before 2021: nS, nA, P and isd."""

    nS, nA = 2, 1
    P = {0: {0: [(1.0, 1, 1.0, False)]}, 1: {0: [(1.0, 1, 0.0, True)]}}
    isd = np.array([1.0, 0.0])


def test_isd_is_where_episodes_start():
    assert rr.from_gymnasium(DiscreteEnv(), 0.9).initial.tolist() == [1, 0]
    assert rr.from_gymnasium(DiscreteEnv(), 0.9, initial=[0.5, 0.5]).initial.tolist() == [0.5, 0.5]
    newer = type("Newer", (DiscreteEnv,), {"initial_state_distrib": np.array([0.25, 0.75])})
    assert rr.from_gymnasium(newer(), 0.9).initial.tolist() == [0.25, 0.75]


# ---- names


def test_names_go_where_the_mdp_goes(tmp_path):
    m = rr.from_table(ROWS, 0.9)
    for other in (
        jax.tree.map(lambda x: x, m),
        jax.jit(lambda m: m)(m),
        jax.tree.unflatten(jax.tree.structure(m), jax.tree.leaves(m)),
        jax.device_put(m),
        rr.load(rr.save(tmp_path / "m", m)),
    ):
        assert other.names == m.names and hash(other.names) == hash(m.names)
        chex.assert_trees_all_equal(other, m)
    twins = rr.from_table(list(ROWS), 0.9)
    assert jax.tree.structure(twins) == jax.tree.structure(m)
    with pytest.raises(TypeError, match="cannot save the name frozenset"):
        rr.save(tmp_path / "x", rr.from_table([(frozenset(), "x", frozenset(), 1.0, 0.0)], 0.9))


def test_names_compile_nothing_anew_in_solve():
    def renamed(suffix):
        return rr.from_table([(s + suffix, a, t + suffix, p, r) for s, a, t, p, r in ROWS], 0.9)

    program: Any = rr.solve.__globals__["_solve"]
    rr.solve(renamed(""), rr.kl(2.0))
    before = program._cache_size()
    for suffix in "abc":
        rr.solve(renamed(suffix), rr.kl(2.0))
    assert program._cache_size() == before


def test_by_name_and_numbers():
    m = rr.from_table(ROWS, 0.9)
    assert m.names.state("warm") == 1 and m.names.action("push") == 2
    with pytest.raises(ValueError, match="no action is called 'pull'; there are: 'slow', 'fast', 'push'"):
        m.names.action("pull")
    policy = rr.solve(m, rr.kl(2.0)).policy
    shown = m.by_name(policy)
    assert shown["off"] == {} and set(shown["warm"]) == {"slow", "push"}
    assert shown["cool"]["fast"] == float(policy[0, 1])
    plain = rr.problems.chain(3, 0.9)
    assert plain.by_name(np.arange(3.0)) == {0: 0.0, 1: 1.0, 2: 2.0}
    with pytest.raises(ValueError, match=r"got shape \[2, 3\]; of a batch, pick a lane first"):
        m.by_name(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="two states are called 'a'"):
        rr.Names(["a", "a"], ["x"])


def test_names_in_figures(tmp_path):
    m = rr.from_table(ROWS, 0.9)
    sol = rr.solve(m, rr.kl(2.0))
    assert solution_figures.write(tmp_path, m, sol, "machine") == [tmp_path / "heat_map.png"]
    drawn = solution_figures.heat_map(
        sol.value, sol.policy, sol.perturbation, actions=m.names.actions, states=m.names.states
    )
    ticks = [label.get_text() for axes in drawn.axes for label in axes.get_xticklabels() + axes.get_yticklabels()]
    assert {*m.names.states, *m.names.actions} <= set(ticks)
