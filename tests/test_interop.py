"""MDPs from Gymnasium and SciPy, and files that give back what was written."""

import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import robustreg
from robustreg import archive
from robustreg.problems.gymnasium import from_scipy

# For the type checker: tests hand NumPy arrays to classes that declare JAX arrays, and read any transitions.
rr: Any = robustreg
problems = rr.problems

gymnasium = pytest.importorskip("gymnasium")


def optimum(table, discount, sweeps):
    """Unregularised value iteration on the table itself, entry by entry as Gymnasium steps through it."""
    n = len(table)
    steps = [[np.array([(p, t, r, end) for p, t, r, end in table[s][a]], float) for a in table[s]] for s in range(n)]
    width = max(len(x) for actions in steps for x in actions)
    padded = np.zeros((n, len(steps[0]), width, 4))
    for s, actions in enumerate(steps):
        for a, x in enumerate(actions):
            padded[s, a, : len(x)] = x
    p, to, r, end = np.moveaxis(padded, -1, 0)
    v = np.zeros(n)
    for _ in range(sweeps):
        v = (p * (r + discount * (1 - end) * v[to.astype(int)])).sum(-1).max(-1)
    return v


def optimum_of(m, sweeps):
    """The same on an imported MDP."""
    reward, discount = np.asarray(m.reward), float(m.discount)
    to, p = np.asarray(m.transitions.indices), np.asarray(m.transitions.probabilities)
    v = np.zeros(m.n_states)
    for _ in range(sweeps):
        v = (reward + discount * (p * v[to]).sum(-1)).max(-1)
    return v


ENVIRONMENTS = {
    "FrozenLake-v1": ({"map_name": "8x8"}, (64, 4), (8, 8)),
    "Taxi-v4": ({}, (500, 6), None),
    "CliffWalking-v1": ({"is_slippery": True}, (48, 4), (4, 12)),
}


def make(name, **options):
    """The environment, under the older name where the newer does not exist yet."""
    known = gymnasium.registry
    name = name if name in known else name.replace("v4", "v3").replace("v1", "v0")
    return gymnasium.make(name, **options)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments(name):
    options, shape, grid = ENVIRONMENTS[name]
    env = make(name, **options)
    m = rr.from_gymnasium(env, discount=0.95)
    assert m.reward.shape == m.termination.shape == shape and m.grid == grid
    rows = np.asarray(m.transitions.probabilities).sum(-1)
    np.testing.assert_allclose(rows, 1 - np.asarray(m.termination), rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(m.initial, env.unwrapped.initial_state_distrib, rtol=1e-14)
    np.testing.assert_allclose(optimum_of(m, 200), optimum(env.unwrapped.P, 0.95, 200), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "value"), [("Taxi-v4", 6.3274643), ("CliffWalking-v1", -12.2478977)])
def test_known_values_from_the_start(name, value):
    m = rr.from_gymnasium(make(name), discount=0.99)
    assert np.asarray(m.initial) @ optimum_of(m, 4000) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_they_solve(name):
    options, _, _ = ENVIRONMENTS[name]
    m = rr.from_gymnasium(make(name, **options), discount=0.99)
    sol = rr.solve(m, rr.kl(beta=1e4), tol=1e-8).raise_if_failed()
    best = optimum_of(m, 4000)
    gap = best - np.asarray(sol.value)
    assert gap.min() > -1e-7 and gap.max() <= 100 * np.log(m.n_actions) / 1e4 + 1e-7


def test_duplicates_accumulate_and_terminated_ends():
    row = [(0.25, 1, 4.0, False), (0.25, 1, 0.0, False), (0.25, 1, 8.0, True), (0.25, 0, 0.0, True)]
    stay = [(1.0, 1, 0.0, False)]
    m = rr.from_gymnasium({0: {0: row, 1: stay}, 1: {0: stay, 1: stay}}, 0.5)
    np.testing.assert_array_equal(m.transitions.indices[0, 0], [1])
    np.testing.assert_array_equal(m.transitions.probabilities[0, 0], [0.5])
    np.testing.assert_array_equal(m.reward, [[3.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(m.termination, [[0.5, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(m.initial, [0.5, 0.5])


def test_table_of_lists_initial_and_discounts():
    stay = [(1.0, 0, 1.0, False)]
    m = rr.from_gymnasium([[stay, stay, stay], [stay, stay, stay]], np.array([0.5, 0.9]), initial=[0.0, 1.0])
    assert m.batch_shape == (2,) and m.termination is None and m.grid is None
    np.testing.assert_array_equal(m.initial, [0.0, 1.0])


def test_by_name():
    m = rr.from_gymnasium("FrozenLake-v1")
    assert m.n_states == 16 and m.discount == 0.99


def test_observation_space_must_agree():
    env = make("FrozenLake-v1").unwrapped
    del env.P[15]
    with pytest.raises(ValueError, match="P lists 15 states, observation_space 16; give every state its actions"):
        rr.from_gymnasium(env)


# ---- SciPy


@pytest.mark.parametrize("form", ["csr_matrix", "csr_array", "csc_array", "coo_matrix", "lil_array", "dok_matrix"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scipy_formats(form, dtype):
    P = np.eye(4)[[[1, 2], [0, 3], [3, 3], [0, 0]]] * 0.75 + np.eye(4)[[[0, 0], [0, 1], [3, 2], [0, 1]]] * 0.25
    matrices = [getattr(sparse, form)(P[:, a].astype(dtype)) for a in range(2)]
    kernel = from_scipy(matrices)
    assert kernel.dtype == dtype and kernel.indices.shape == (4, 2, 2)
    v = jnp.arange(4, dtype=dtype)
    np.testing.assert_array_equal(kernel.expect(v), (P @ np.arange(4)).astype(dtype))
    m = rr.mdp(matrices, np.ones((4, 2), dtype), 0.9)
    chex.assert_trees_all_equal(m.transitions, kernel)


# ---- files


def objects():
    """One of each kind that a file can hold."""
    m = problems.grid_world(["S.~", "..G"], np.array([0.5, 0.9]))
    ends = rr.mdp(rr.Dense(0.5 * np.ones((3, 2, 3)) / 3), np.ones((3, 2)), 0.9, termination=np.full((3, 2), 0.5))
    reg = rr.alpha(alpha=2.0, beta=np.array([1.0, 3.0]), prior=np.array([0.5, 0.25, 0.25, 0.0]))
    scaled = rr.kl(beta=1.0, state_scale=np.ones(6))
    return {
        "grid": m,
        "termination": ends,
        "float32": problems.ring(dtype=np.float32),
        "solution": rr.solve(m, reg),
        "alpha": reg,
        "kl": scaled,
        "entropy": rr.entropy(2.0, available=[True, False]),
        "Dense": ends.transitions,
        "Successors": m.transitions,
    }


@pytest.mark.parametrize("name", objects())
def test_round_trip(tmp_path, name):
    obj = objects()[name]
    path = rr.save(tmp_path / "thing", obj)
    assert path == tmp_path / "thing.npz" and list(tmp_path.iterdir()) == [path]
    back = rr.load(path)
    assert type(back) is type(obj) and jax.tree.structure(back) == jax.tree.structure(obj)
    chex.assert_trees_all_equal_shapes_and_dtypes(obj, back)
    chex.assert_trees_all_equal(obj, back)


def test_answers_go_into_files(tmp_path):
    m, reg = problems.chain(discount=0.9), rr.kl(2.0)
    sol = rr.solve(m, reg, tol=1e-3)
    for obj in (rr.certify(m, reg, sol), rr.guarantee(m, reg, sol.policy), rr.solve_game(m, reg, steps=3)):
        back = rr.load(rr.save(tmp_path / "answer", obj, {"of": "chain"}))
        assert type(back) is type(obj)
        chex.assert_trees_all_equal(obj, back)
        assert archive.read_header(tmp_path / "answer.npz")["of"] == "chain"


def test_a_reader_needs_numpy_only(tmp_path):
    obj = objects()["solution"]
    rr.save(str(tmp_path / "result.npz"), obj, {"config": {"beta": np.float64(3.0)}, "when": tmp_path})
    with np.load(tmp_path / "result.npz", allow_pickle=False) as file:
        for name in ("value", "policy", "perturbation", "lower", "upper", "status"):
            np.testing.assert_array_equal(file[name], getattr(obj, name))
        header = json.loads(str(file["header"]))
    assert header["config"] == {"beta": 3.0} and header["dtype"] == "float64"
    assert header["versions"]["jax"] == jax.__version__
    assert archive.read_header(tmp_path / "result.npz")["when"] == str(tmp_path)
    rr.save(tmp_path / "mdp", objects()["grid"], {"dtype": "mine"})
    assert archive.read_header(tmp_path / "mdp.npz")["dtype"] == "mine"
    with np.load(tmp_path / "mdp.npz") as file:
        assert {"transitions.indices", "transitions.probabilities", "complement"} < set(file)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = rr.save(tmp_path / "x", problems.ring())

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        rr.save(path, problems.chain())
    assert list(tmp_path.iterdir()) == [path] and rr.load(path).n_states == 20
    monkeypatch.undo()
    rr.save(path, problems.chain())
    assert rr.load(path).n_states == 6


def test_float64_file_without_x64(tmp_path):
    path = rr.save(tmp_path / "x", problems.chain())
    jax.config.update("jax_enable_x64", False)
    try:
        assert rr.load(path).dtype == np.float32
    finally:
        jax.config.update("jax_enable_x64", True)
