"""Files that hold a problem: PRISM's, Cassandra's, ours, and tables, from Python and from configurations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import robustreg
from robustreg.cli import commands, config

rr: Any = robustreg

# One machine in both formats: it runs slow or fast, may overheat, and is off for good at last.
TRA = """3 4 6
0 0 0 1 slow
0 1 0 0.25 fast
0 1 1 0.75 fast
1 0 0 0.5 slow
1 0 1 0.5 slow
1 1 2 1 push
"""
SREW = "# state rewards\n3 2\n0 1\n1 0.5\n"
TREW = "3 4 2\n0 1 0 2\n0 1 1 4\n"
LAB = '0="init" 1="off"\n0: 0\n2: 1\n'
STA = "(heat,on)\n0:(0,true)\n1:(1,true)\n2:(-1,false)\n"
REWARD = {
    (0, True): {"slow": 1.0, "fast": 1 + 0.25 * 2 + 0.75 * 4},
    (1, True): {"slow": 0.5, "push": 0.5},
    (-1, False): {},
}

CASSANDRA = """# a machine
discount: 0.9
values: cost
states: cool warm off
actions: slow fast
start: cool
T: slow identity
T: slow : warm
0.5 0.5 0   # a row
T: fast : cool
uniform
T: fast : 1 : off 1.0
T: * : off : off 1
R: * : * : * 0
R: slow : * : * : * -1
R: fast : cool
-1 -2 -3
"""
ROWS = {
    "slow": [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]],
    "fast": [[1 / 3, 1 / 3, 1 / 3], [0, 0, 1], [0, 0, 1]],
}


@pytest.fixture
def folder(tmp_path):
    for name, text in {"m.tra": TRA, "m.srew": SREW, "m.trew": TREW, "m.lab": LAB, "m.sta": STA}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "m.mdp").write_text(CASSANDRA)
    return tmp_path


def test_prism(folder):
    m = rr.from_prism(folder / "m.tra", 0.9)
    assert m.names.states == ((0, True), (1, True), (-1, False)) and m.names.actions == ("slow", "fast", "push")
    assert m.by_name(m.reward) == REWARD
    assert m.initial.tolist() == [1, 0, 0]
    np.testing.assert_array_equal(m.available, [[1, 1, 0], [1, 0, 1], [1, 0, 0]])
    found = m.transitions.expect(np.array([1.0, 10.0, 100.0]))
    np.testing.assert_allclose(np.asarray(found)[[0, 0, 1, 1], [0, 1, 0, 2]], [1, 7.75, 5.5, 100])
    assert rr.solve(m, rr.kl(1.0)).converged


def test_prism_arguments(folder):
    for name in ("m.srew", "m.trew", "m.lab", "m.sta"):
        (folder / name).rename(folder / name.replace("m.", "other."))
    bare = rr.from_prism(folder / "m.tra", 0.9)
    assert bare.names.states == (0, 1, 2) and not np.asarray(bare.reward).any()
    np.testing.assert_allclose(bare.initial, np.full(3, 1 / 3))
    given = {"rewards": [folder / "other.srew", folder / "other.trew"], "labels": folder / "other.lab"}
    m = rr.from_prism(folder / "m.tra", 0.9, **given, states=folder / "other.sta", initial=(1, True))
    assert m.by_name(m.reward) == REWARD and m.initial.tolist() == [0, 1, 0]
    ended = rr.from_prism(folder / "m.tra", 0.9, **given, ends=["init"])
    assert ended.names.ends == {0, 2} and ended.names.actions == ("slow", "push")
    with pytest.raises(ValueError, match="no label is called 'of'; there are: 'init', 'off'"):
        rr.from_prism(folder / "m.tra", **given, ends="of")


def test_a_markov_chain_and_choices_without_names(tmp_path):
    (tmp_path / "c.tra").write_text("2 3\n0 0 1/3\n0 1 2/3\n1 1 1\n")
    (tmp_path / "c.rew").write_text("2 1\n0 1 3\n")
    m = rr.from_prism(tmp_path / "c.tra", 0.5)
    assert m.names.actions == (0,)
    np.testing.assert_allclose(m.reward, [[2.0], [0.0]])
    (tmp_path / "c.tra").write_text("2 3 3\n0 0 0 1 a\n0 1 1 1 a\n1 0 1 1 a\n")
    assert rr.from_prism(tmp_path / "c.tra", rewards=[]).names.actions == (0, 1)


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("m.tra", "3 4 6", "3 4 6 2", "line 1: four numbers: the states of this model are observed in part (POMDP)"),
        ("m.tra", "0 1 0 0.25", "0 1 0 [0.2,0.3]", "line 3: the probability is an interval, [0.2,0.3]"),
        ("m.tra", "0 1 0 0.25", "0 1 0 p", "line 3: the probability is 'p'; expected a number (a parameter"),
        ("m.tra", "0 0 0 1 ", "0 0 0 3.5 ", "line 2: 3.5 is no probability; a rate of a model in continuous time?"),
        ("m.tra", "1 1 2 1", "1 1 3 1", "line 7: a state is 3, but there are 3, from 0"),
        ("m.tra", "3 4 6", "3 4 7", "line 1: announces 7 transitions, but 6 follow: the file is not whole"),
        ("m.tra", "0 1 0 0.25", "0 1 0 0.5", "m.tra, line 3"),
        ("m.tra", "0 0 0 1 slow", "0:1 0 0 1 slow", "line 2: a state is '0:1'; expected a whole number"),
        ("m.tra", TRA, "", "m.tra is empty"),
        ("m.srew", "1 0.5", "5 0.5", "m.srew, line 4: a state is 5, but there are 3"),
        ("m.srew", "1 0.5", "1 Infinity", "m.srew, line 4: the reward is Infinity; expected a finite number"),
        ("m.trew", "0 1 1 4", "0 0 1 4", "m.trew, line 3: there is no such transition"),
        ("m.trew", "3 4 2", "4 4 2", "m.trew, line 1: is about 4 states, the transitions about 3"),
        ("m.lab", "2: 1", "2: 7", "m.lab, line 3: 7 is none of the labels"),
        ("m.lab", LAB, "hello\n", "m.lab names no labels"),
        ("m.sta", "1:(1,true)\n", "", "m.sta names 2 states, the transitions are between 3"),
    ],
)
def test_prism_refusals(folder, name, old, new, words):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        rr.from_prism(folder / "m.tra", 0.9)
    assert words in str(caught.value)


def test_rates_below_one(tmp_path):
    (tmp_path / "c.tra").write_text("2 2\n0 1 0.5\n1 0 0.25\n")
    with pytest.raises(ValueError, match="c.tra, line 2: the numbers of state 0 sum to 0.5, not 1; rates of"):
        rr.from_prism(tmp_path / "c.tra")


def test_cassandra(folder):
    m = rr.from_cassandra(folder / "m.mdp")
    assert m.names.states == ("cool", "warm", "off") and m.names.actions == ("slow", "fast")
    assert m.initial.tolist() == [1, 0, 0] and float(m.discount) == 0.9 and m.available is None
    v = np.array([1.0, 10.0, 100.0])
    np.testing.assert_allclose(m.transitions.expect(v), np.stack([np.dot(ROWS[a], v) for a in ("slow", "fast")], -1))
    np.testing.assert_allclose(m.reward, [[1, 2], [1, 0], [1, 0]], atol=1e-15)  # costs, turned
    assert float(rr.from_cassandra(folder / "m.mdp", 0.5).discount) == 0.5
    assert rr.from_cassandra(folder / "m.mdp", initial="off").initial.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("start: uniform", [1 / 3] * 3),
        ("start: 0.25 0.5 0.25", [0.25, 0.5, 0.25]),
        ("start: 1", [0, 1, 0]),
        ("start include: cool 2", [0.5, 0, 0.5]),
        ("start exclude: off", [0.5, 0.5, 0]),
        ("", [1 / 3] * 3),
    ],
)
def test_starts(folder, start, expected):
    (folder / "m.mdp").write_text(CASSANDRA.replace("start: cool", start))
    np.testing.assert_allclose(rr.from_cassandra(folder / "m.mdp").initial, expected)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("start: cool", "observations: 2", "line 6: 'observations' is about observations: this is a POMDP"),
        ("R: * : * : * 0", "O: * : * : * 1", "line 14: 'O' is about observations"),
        ("R: slow : * : * : * -1", "R: slow : * : * : seen -1", "line 15: 'seen' is an observation: this is a POMDP"),
        ("values: cost", "gamma: 2", "line 3: 'gamma' begins no statement; expected one of: discount"),
        ("values: cost", "values: profit", "line 3: values are 'profit'; expected reward or cost"),
        ("T: fast : cool", "T: fast : col", "line 10: 'col' is none of the states: 'cool', 'warm', 'off'"),
        ("1.0\n", "x\n", "line 12: 'x' stands where a number should"),
        ("0.5 0.5 0 ", "0.5 0.6 0 ", "state 'warm' and action 'slow'"),
        ("0.5 0.5 0 ", "0.5 0.5 2 ", "line 9: 2 is no probability"),
        ("0.5 0.5 0 ", "0.5 0.5 ", "line 10: 'T' stands where a number should"),
        ("T: fast : 1 : off 1.0\n", "", "gives no transitions of action 'fast' in state 'warm'"),
        ("-1 -2 -3\n", "-1 -2\n", "ends where a number should stand"),
        ("start: cool", "start: 0.5 0.4 0", "line 6: start has 3 numbers that sum to 0.9"),
        ("discount: 0.9\n", "", "gives no discount; pass one"),
        ("discount: 0.9", "discount: 0.9 0.8", "line 2: 'discount' is followed by 2 words; expected one word"),
        ("states: cool warm off\n", "", "line 5: start says nothing, or stands before the states"),
    ],
)
def test_cassandra_refusals(folder, old, new, words):
    assert old in CASSANDRA
    (folder / "m.mdp").write_text(CASSANDRA.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        rr.from_cassandra(folder / "m.mdp")
    assert words in str(caught.value)


# ---- configurations

TABLE = "state,action,successor,probability,reward\ncool,slow,cool,1,1\ncool,fast,off,1,3\n"
PROBLEMS = {
    "table": 'kind = "table"\npath = "t.csv"\ndiscount = 0.9\ninitial = "cool"',
    "file": 'kind = "file"\npath = "mine.npz"',
    "prism": 'kind = "prism"\npath = "m.tra"\ndiscount = 0.9\nends = "off"',
    "cassandra": 'kind = "cassandra"\npath = "m.mdp"',
}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("regulariser", ["kl", "entropy"])
def test_configurations(folder, kind, regulariser, monkeypatch):
    """Paths are from the folder of the configuration, wherever the program runs."""
    (folder / "t.csv").write_text(TABLE)
    expected = rr.from_table(folder / "t.csv", 0.9, initial="cool")
    rr.save(folder / "mine.npz", expected)
    (folder / "c.toml").write_text(f'[problem]\n{PROBLEMS[kind]}\n[regulariser]\nkind = "{regulariser}"\nbeta = 2.0\n')
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    job = config.load(Path("..") / "c.toml")
    m: Any = job.problem.mdp
    if kind in ("table", "file"):
        assert m.names == expected.names
        np.testing.assert_array_equal(m.reward, expected.reward)
    assert job.problem.actions == tuple(map(str, m.names.actions))
    assert job.problem.title == {"table": "t", "file": "mine"}.get(kind, "m")
    assert type(job.regulariser) is {"kl": rr.KL, "entropy": rr.Entropy}[regulariser]


def test_a_newcomers_table_from_the_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "t.csv").write_text(TABLE)
    text = f'[problem]\n{PROBLEMS["table"]}\n[regulariser]\nkind = "entropy"\nbeta = 2.0\n'
    (tmp_path / "c.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert commands.main(["solve", "c.toml", "--out", "out"]) == 0
    assert (tmp_path / "out" / "heat_map.png").exists()
    # The result keeps the configuration, and finds the table from anywhere.
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    assert commands.main(["certify", "../out/result.npz"]) == 0
    assert "holds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ({"kind": "table", "path": "/nowhere.csv", "discount": 0.9}, "kind 'table': there is no file /nowhere.csv"),
        ({"kind": "file", "path": 3}, "kind 'file': path is 3; expected text"),
        ({"kind": "table", "path": "x.csv"}, "kind 'table' needs discount"),
    ],
)
def test_configurations_refuse(problem, words):
    with pytest.raises(config.ConfigError) as caught:
        config.build({"problem": problem, "regulariser": {"kind": "kl", "beta": 1.0}}, "file.toml")
    assert words in str(caught.value)


def test_a_file_of_something_else(tmp_path):
    rr.save(tmp_path / "reg.npz", rr.kl(1.0))
    with pytest.raises(config.ConfigError, match="holds a KL, not an MDP; save the problem itself"):
        config.problem_of({"kind": "file", "path": str(tmp_path / "reg.npz")}, "file.toml")
