"""Configurations: the registries reach everything, and every mistake names its place and what is allowed."""

import inspect
import re
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr
from robustreg.cli import config

EVERY = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
SWEEPS = [path for path in EVERY if "[sweep]" in path.read_text(encoding="utf-8")]
CONFIGS = [path for path in EVERY if path not in SWEEPS]
KL = {"kind": "kl", "beta": 2.0}
BANDIT = {"kind": "bandit"}


def build(problem=BANDIT, regulariser=KL, **tables):
    return config.build({"problem": problem, "regulariser": regulariser, **tables}, "file.toml")


def refusal(*arguments, **tables):
    """The message with which a configuration is refused."""
    with pytest.raises(config.ConfigError) as caught:
        build(*arguments, **tables)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_builds(path):
    job = config.load(path)
    assert isinstance(job.problem.mdp, rr.MDP)
    expected = tomllib.loads(path.read_text())
    if "path" in expected["problem"]:
        expected["problem"]["path"] = str(path.parent / expected["problem"]["path"])  # found from anywhere
    assert job.table == expected


def test_the_shipped_configurations_are_the_promised_ones():
    assert {path.stem for path in CONFIGS} >= {"bandit", "cliff_walking", "frozen_lake", "grid_world", "taxi"}
    sizes = {path.stem: config.load(path).problem.mdp.reward.shape for path in CONFIGS}
    assert sizes["frozen_lake"] == (64, 4)
    assert sizes["bandit"] == (1, 6)
    assert sizes["taxi"] == (500, 6)


@pytest.mark.parametrize(
    ("problem", "shape"),
    [
        ({"kind": "bandit", "reward": [1, 2, 3]}, (1, 3)),
        ({"kind": "grid_world", "cells": ["S.~", "#.G"], "slip": 0, "goal": 2}, (6, 4)),
        ({"kind": "slippery_grid", "size": 4, "water_share": 0.5, "seed": 3}, (16, 4)),
        ({"kind": "chain", "n_states": 7, "discount": 0.5}, (7, 2)),
        ({"kind": "ring", "n_states": 9}, (9, 2)),
        ({"kind": "garnet", "n_states": 11, "n_actions": 3, "branching": 2, "seed": 1}, (11, 3)),
        (
            {"kind": "gymnasium", "id": "FrozenLake-v1", "discount": 0.9, "kwargs": {"map_name": "4x4"}},
            (16, 4),
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_problems(problem, shape):
    assert build(problem).problem.mdp.reward.shape == shape
    assert set(config.PROBLEMS) == {
        "gymnasium",
        "bandit",
        "grid_world",
        "slippery_grid",
        "chain",
        "ring",
        "garnet",
        "garnets",
        "file",
        "table",
        "prism",
        "cassandra",
    }


def test_the_generators_arguments_arrive():
    m = build({"kind": "garnet", "n_states": 11, "n_actions": 3, "branching": 2, "seed": 1}).problem.mdp
    expected = rr.problems.garnet(11, 3, 2, seed=1)
    np.testing.assert_array_equal(m.reward, expected.reward)
    value = jnp.arange(11.0)
    np.testing.assert_array_equal(m.transitions.expect(value), expected.transitions.expect(value))


def test_remarkable_cells():
    lake = build({"kind": "gymnasium", "id": "FrozenLake-v1", "discount": 0.9}).problem
    assert lake.marks == {"start": (0,), "hole": (5, 7, 11, 12), "goal": (15,)}
    cliff = build({"kind": "gymnasium", "id": "CliffWalking-v1", "discount": 0.9}).problem
    assert cliff.marks == {"start": (36,), "cliff": tuple(range(37, 47)), "goal": (47,)}
    world = build({"kind": "grid_world", "cells": ["S.~", "#.G"]}).problem
    assert world.marks == {"start": (0,), "goal": (5,), "water": (2,), "wall": (3,)}
    grid = build({"kind": "slippery_grid", "size": 5, "seed": 4}).problem
    drawn = "".join(rr.problems.slippery_cells(5, seed=4))
    assert grid.marks["water"] == tuple(i for i, letter in enumerate(drawn) if letter == "~")
    taxi = build({"kind": "gymnasium", "id": "Taxi-v4", "discount": 0.9}).problem
    assert taxi.marks == {} and len(taxi.actions) == 6


def test_regularisers():
    kl = build(regulariser={"kind": "kl", "beta": 3, "prior": [0.5, 0.5, 0, 0, 0, 0]}).regulariser
    assert isinstance(kl, rr.KL) and float(kl.beta) == 3.0
    np.testing.assert_allclose(np.exp(np.array(kl.log_prior)), [0.5, 0.5, 0, 0, 0, 0])
    alpha = build(regulariser={"kind": "alpha", "alpha": 2, "beta": 0.5}).regulariser
    assert isinstance(alpha, rr.Alpha) and (float(alpha.alpha), float(alpha.beta)) == (2.0, 0.5)


def test_solvers():
    cases = {
        "auto": None,
        "value_iteration": rr.ValueIteration(),
        "modified_policy_iteration": rr.ModifiedPolicyIteration(),
        "newton": rr.Newton(),
        "anderson": rr.Anderson(),
    }
    assert set(cases) == set(config.SOLVERS)
    for kind, expected in cases.items():
        assert build(solver={"kind": kind}).solver == expected
    assert build().solver is None
    assert build(solver={"kind": "newton", "linear": "direct"}).solver == rr.Newton(linear="direct")
    job = build(solver={"kind": "anderson", "history": 3, "tol": 1e-6, "max_steps": 70})
    assert (job.solver, job.tol, job.max_steps) == (rr.Anderson(history=3), 1e-6, 70)


def test_allowed_keys_are_the_constructors_arguments():
    for registry, table in ((config.PROBLEMS, "problem"), (config.REGULARISERS, "regulariser")):
        for kind, constructor in registry.items():
            message = refusal(**{table: {"kind": kind, "nonsense": 1}})
            assert f"file.toml: [{table}] kind {kind!r} unknown key 'nonsense'; allowed: " in message
            allowed = message.split("allowed: ")[1].split(", ")
            known = sorted(set(inspect.signature(constructor).parameters) - {"dtype"})
            assert allowed == (known or ["no keys"])


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"problem": {"kind": "maze"}}, r"\[problem\] unknown kind 'maze'; allowed: bandit, cassandra, chain, file"),
        ({"problem": {}}, r"\[problem\] no kind; allowed: bandit"),
        ({"regulariser": {"kind": "kl"}}, r"\[regulariser\] kind 'kl' needs beta"),
        ({"regulariser": {"kind": "alpha", "beta": 1}}, r"needs alpha"),
        ({"solver": {"kind": "simplex"}}, r"\[solver\] unknown kind 'simplex'; allowed: anderson, auto"),
        ({"solver": {"kind": "auto", "linear": "direct"}}, r"unknown key 'linear'; allowed: max_steps, tol"),
        ({"solver": {"kind": "newton", "linear": "lu"}}, r"\[solver\] kind 'newton': .*'lu'"),
        ({"solver": {"tol": 0.0}}, r"\[solver\] tol is 0.0; expected a positive number"),
        ({"solver": {"tol": float("nan")}}, r"tol is nan"),
        ({"solver": {"max_steps": True}}, r"max_steps is True; expected a positive whole number"),
        ({"plot": {}}, r"file.toml unknown key 'plot'; allowed: ambiguity, problem, regulariser, solver"),
        ({"solver": "newton"}, r"solver is 'newton'; expected a table \[solver\]"),
        ({"regulariser": {"kind": "kl", "beta": "5"}}, r"beta is '5'; expected a number"),
        ({"regulariser": {"kind": "kl", "beta": -1}}, r"beta is -1"),
        ({"regulariser": {"kind": "kl", "beta": [1.0, 2.0]}}, r"describes a batch"),
        ({"regulariser": {"kind": "kl", "beta": 1, "prior": [0.5, 0.5]}}, r"does not fit the problem"),
        ({"problem": {"kind": "garnet", "n_states": "many"}}, r"n_states is 'many'; expected a whole number"),
        ({"problem": {"kind": "chain", "slip": True}}, r"slip is True; expected a number"),
        ({"problem": {"kind": "bandit", "reward": [1.0, True]}}, r"reward is \[1.0, True\]; expected numbers, not"),
        ({"problem": {"kind": "bandit", "discount": False}}, r"discount is False; expected numbers, not"),
        ({"example": {}}, r"hence is for `robustreg example`"),
        ({"problem": {"kind": "bandit", "discount": 1.0}}, r"\[problem\] kind 'bandit': discount is 1;"),
        ({"problem": {"kind": "bandit", "dtype": "float32"}}, r"unknown key 'dtype'"),
        (
            {"problem": {"kind": "gymnasium", "id": "Nowhere-v0", "discount": 0.9}},
            r"gymnasium.make refused.*Nowhere",
        ),
        (
            {"problem": {"kind": "gymnasium", "id": "CartPole-v1", "discount": 0.9}},
            r"no table of transitions",
        ),
    ],
)
def test_mistakes_name_their_place_and_the_remedy(tables, expected):
    assert re.search(expected, refusal(**tables)), refusal(**tables)


@pytest.mark.parametrize("missing", ["problem", "regulariser"])
def test_missing_tables(missing):
    tables = {"problem": BANDIT, "regulariser": KL}
    del tables[missing]
    with pytest.raises(config.ConfigError, match=rf"file.toml: no \[{missing}\] table"):
        config.build(tables, "file.toml")


def test_unreadable_files(tmp_path):
    with pytest.raises(config.ConfigError, match="absent.toml"):
        config.load(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[problem\n")
    with pytest.raises(config.ConfigError, match="broken.toml: .*line 1"):
        config.load(broken)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (3000 * "[" + 3000 * "]", "nested too deeply"),
        ("1" + 400 * "0", "solver: tol is a whole number of 1329 bits; expected at most 64"),
        ("1" + 5000 * "0", "integer string conversion"),
        ("{ a = [1, 99999999999999999999] }", "solver: tol: a is a whole number of 67 bits"),
    ],
)
def test_files_beyond_all_measure(tmp_path, line, expected):
    path = tmp_path / "strange.toml"
    path.write_text(f"[problem]\nkind = 'chain'\n[regulariser]\nkind = 'kl'\nbeta = 1.0\n[solver]\ntol = {line}\n")
    with pytest.raises(config.ConfigError) as error:
        config.load(path)
    assert str(error.value).startswith(f"{path}: ") and expected in str(error.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf[problem]\r\nkind = 'chain'\r\n[regulariser]\r\nkind = 'kl'\r\nbeta = 1.0\r\n")
    assert config.load(path).problem.title == "chain"


def test_gymnasium_is_optional(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    assert "robustreg[gym]" in refusal({"kind": "gymnasium", "id": "FrozenLake-v1", "discount": 0.9})


def test_the_example_in_the_documentation_builds():
    example = re.search(r"```toml\n(.*?)```", config.__doc__ or "", re.DOTALL)
    assert example
    job = config.build(tomllib.loads(example[1]))
    assert (job.tol, job.max_steps) == (1e-8, 10_000)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_builds(path):
    run = config.load_sweep(path)
    cells = np.prod([len(x) for x in run.grid.values()]) * int(np.prod(run.job.problem.mdp.batch_shape))
    assert cells >= 2000 and set(run.options) <= {"outputs", "chunk", "zipped"}
    with pytest.raises(config.ConfigError, match=r"has a \[sweep\] table, hence is for `robustreg sweep`"):
        config.load(path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "no [sweep] table; `robustreg solve` reads such files"),
        ("[sweep]\nbeta = 3.0", "[sweep] beta is 3.0; expected a list"),
        ("[sweep]\nbeta = [1.0, 'x']", "[sweep] beta is [1.0, 'x']; expected numbers"),
        ("[sweep]\nbeta = { from = 1, to = 2 }", "[sweep] beta needs numbers from and to, and a whole number count"),
        ("[sweep]\nbeta = { from = 0, to = 2, count = 3, spacing = 'log' }", "from and to positive"),
        ("[sweep]\nbeta = { from = 0, to = 2, count = 3, step = 1 }", "unknown key 'step'"),
        ("[sweep]\nbeta = [true, 2.0]", "[sweep] beta is [True, 2.0]; expected numbers"),
        ("[sweep]\nprior = [[1.0], [0.5, 0.5]]", "equally many in every row"),
        ("[sweep]\nbeta = { from = true, to = 2, count = 3, spacing = 'log' }", "needs numbers from and to"),
        ("[sweep]\nbeta = { from = 1, to = inf, count = 3, spacing = 'log' }", "needs numbers from and to"),
        ("[sweep]\nbeta = { from = 1, to = 2, count = true, spacing = 'log' }", "whole number count"),
        ("[sweep]\nbeta = { from = 1, to = 2, count = 100000000000000, spacing = 'log' }", "1 to 10,000,000"),
        (
            "[sweep]\nbeta = { from = 1, to = 1" + 400 * "0" + ", count = 3 }",
            "sweep: beta: to is a whole number of 1329",
        ),
        ("[sweep]\nbeta = [1.0]\nchunk = 0", "chunk is 0; expected a positive whole number"),
        ("[sweep]\nbeta = [1.0]\nzipped = 1", "zipped is 1; expected true or false"),
        ("[sweep]\nbeta = [1.0]\noutputs = 'gap'", "outputs is 'gap'; expected a list of names"),
    ],
)
def test_mistakes_in_a_sweep(tmp_path, line, expected):
    path = tmp_path / "sweep.toml"
    path.write_text(f"[problem]\nkind = 'chain'\n[regulariser]\nkind = 'kl'\nbeta = 1.0\n{line}\n")
    with pytest.raises(config.ConfigError) as error:
        config.load_sweep(path)
    assert expected in str(error.value)


def test_text_in_another_encoding_says_which_is_wanted(tmp_path):
    path = tmp_path / "wide.toml"
    path.write_text("[problem]\nkind = 'chain'\n", encoding="utf-16")
    with pytest.raises(config.ConfigError, match="wide.toml: is not text in UTF-8 .*save it in that encoding"):
        config.read(path)
