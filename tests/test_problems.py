"""The generators build what their docstrings say."""

import inspect
from typing import Any

import jax
import numpy as np
import pytest

import robustreg
from robustreg.problems import generators

# For the type checker: tests hand NumPy arrays to classes that declare JAX arrays, and read any transitions.
rr: Any = robustreg
problems = rr.problems

GENERATORS = {
    "bandit": problems.bandit,
    "grid_world": lambda **k: problems.grid_world(["S.~", "#.G"], **k),
    "slippery_grid": lambda **k: problems.slippery_grid(5, **k),
    "chain": problems.chain,
    "ring": problems.ring,
    "garnet": lambda **k: problems.garnet(7, 3, 2, **k),
}


def dense(m):
    """P as an array, [S,A,S], by averaging indicator functions."""
    return np.moveaxis(np.asarray(m.transitions.expect(np.eye(m.n_states))), 0, -1)


@pytest.mark.parametrize("name", GENERATORS)
def test_rows_are_distributions_and_dtype_is_asked_for(name):
    m = GENERATORS[name]()
    np.testing.assert_allclose(dense(m).sum(-1), 1.0, rtol=1e-15)
    assert m.dtype == np.float64 and m.termination is None
    single = GENERATORS[name](dtype=np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(single)} <= {np.dtype(np.float32), np.dtype(np.int32)}
    assert single.complement == np.float32(1 - np.longdouble(float(m.discount)))
    np.testing.assert_allclose(single.reward, m.reward, rtol=1e-6)


@pytest.mark.parametrize("name", GENERATORS)
def test_discount_may_be_a_batch(name):
    discounts = np.array([0.5, 0.99])
    m = GENERATORS[name](discount=discounts)
    assert m.batch_shape == (2,)
    np.testing.assert_array_equal(m.discount, discounts)


def test_bandit():
    m = problems.bandit([1.0, 0.5, 0.0], 0.5)
    assert (m.n_states, m.n_actions) == (1, 3)
    np.testing.assert_array_equal(m.reward, [[1.0, 0.5, 0.0]])
    assert problems.bandit().n_actions == 6 and problems.bandit().discount == 0.0


def test_grid_world_by_hand():
    m = problems.grid_world(["S.~", "#.G"], slip=0.1, step=-1.0, water=-3.0, goal=10.0)
    P, reward = dense(m), np.asarray(m.reward)
    up, right, down, _ = range(4)
    assert m.grid == (2, 3) and m.n_states == 6
    # From the start, right reaches cell 1; its sides are off the grid and into the wall: both stay.
    np.testing.assert_allclose(P[0, right], [0.2, 0.8, 0, 0, 0, 0], rtol=1e-15)
    np.testing.assert_allclose(P[1, down], [0.1, 0, 0.1, 0, 0.8, 0], rtol=1e-15)
    np.testing.assert_allclose(P[4, up], [0, 0.8, 0, 0, 0.1, 0.1], rtol=1e-15)
    np.testing.assert_array_equal(P[3], np.tile(np.eye(6)[3], (4, 1)))  # the wall
    np.testing.assert_array_equal(P[5], np.tile(np.eye(6)[5], (4, 1)))  # the goal
    # From the water only moving or slipping down enters the goal.
    np.testing.assert_allclose(reward[2], [-3.0, -2.0, 5.0, -2.0])
    np.testing.assert_allclose(reward[1], [-1.0] * 4)
    np.testing.assert_array_equal(reward[[3, 5]], 0.0)
    np.testing.assert_array_equal(m.initial, np.eye(6)[0])


def test_grid_world_without_a_start_begins_anywhere_outside():
    m = problems.grid_world(["..#", "~.G"])
    np.testing.assert_allclose(m.initial, [0.25, 0.25, 0, 0.25, 0.25, 0])


def test_grid_marks():
    assert problems.grid_marks(["S.~", "#~G"]) == {"start": (0,), "goal": (5,), "water": (2, 4), "wall": (3,)}
    assert problems.grid_marks(["..", ".."]) == {}


def test_slippery_grid_is_the_drawing():
    cells = problems.slippery_cells()
    marks = problems.grid_marks(cells)
    assert marks["start"] == (0,) and marks["goal"] == (1023,) and len(marks["water"]) == round(0.2 * 1024)
    m = problems.slippery_grid()
    assert (m.n_states, m.n_actions, m.grid) == (1024, 4, (32, 32)) and m.discount == 0.99
    P, reward = dense(m), np.asarray(m.reward)
    assert {round(float(x), 12) for x in np.unique(P)} == {0.0, 0.1, 0.8, 0.9, 1.0}
    np.testing.assert_allclose(reward[1022], [-0.01 + 0.1, -0.01 + 0.8, -0.01 + 0.1, -0.01])
    dry = problems.slippery_grid(4, water_share=0.0)
    assert np.isclose(np.asarray(dry.reward)[:-1], -0.01).sum() == 15 * 4 - 6
    assert problems.slippery_cells(6, seed=1) != problems.slippery_cells(6, seed=2)
    assert problems.slippery_cells(6, seed=1) == problems.slippery_cells(6, seed=1)


def test_chain():
    m = problems.chain(4, slip=0.25, small=0.5, large=2.0)
    P = dense(m)
    np.testing.assert_array_equal(P[:, 0], np.eye(4)[[0, 0, 1, 2]])
    np.testing.assert_array_equal(P[2, 1], [0, 0.25, 0, 0.75])
    np.testing.assert_array_equal(P[3, 1], [0, 0, 0.25, 0.75])
    np.testing.assert_array_equal(m.reward, [[0.5, 0], [0, 0], [0, 0], [0, 2.0]])
    np.testing.assert_array_equal(m.initial, np.eye(4)[0])


def test_ring():
    m = problems.ring(5, slip=0.25)
    P = dense(m)
    np.testing.assert_array_equal(P[0], [[0.25, 0, 0, 0, 0.75], [0.25, 0.75, 0, 0, 0]])
    np.testing.assert_array_equal(P[3, 1], [0, 0, 0, 0.25, 0.75])
    np.testing.assert_array_equal(np.asarray(m.reward)[:, 0], np.eye(5)[0])
    np.testing.assert_array_equal(problems.ring(3, slip=0.0).transitions.probabilities, np.ones((3, 2, 1)))


def test_garnet():
    m = problems.garnet(30, 4, 6, seed=3)
    assert m.transitions.indices.shape == (30, 4, 6)
    assert all(len(set(row)) == 6 for row in np.asarray(m.transitions.indices).reshape(-1, 6).tolist())
    assert 0 <= m.reward.min() and m.reward.max() < 1
    again, other = problems.garnet(30, 4, 6, seed=3), problems.garnet(30, 4, 6, seed=4)
    np.testing.assert_array_equal(m.reward, again.reward)
    assert (np.asarray(m.reward) != np.asarray(other.reward)).all()
    assert (problems.garnet().n_states, problems.garnet().n_actions) == (500, 8)
    assert problems.garnet(4, 2, 4).transitions.indices.shape == (4, 2, 4)


@pytest.mark.parametrize("name", ["bandit", "grid_world", "slippery_grid", "chain", "ring", "garnet"])
def test_every_option_is_documented(name):
    generator = getattr(problems, name)
    for parameter in inspect.signature(generator).parameters:
        assert f"        {parameter}: " in (inspect.getdoc(generator) or "").replace("\n    ", "\n        ")


@pytest.mark.parametrize("name", GENERATORS)
def test_they_solve(name):
    m = GENERATORS[name]()
    sol = rr.solve(m, rr.kl(beta=2.0), tol=1e-8)
    assert bool(sol.converged)
    index = {"grid_world": 5, "slippery_grid": 24}.get(name)
    if index is not None:
        assert abs(float(sol.value[index])) < 1e-7  # the goal is worth what comes after the end: nothing


def test_many_garnets_are_those_of_their_seeds():
    m = rr.problems.garnets(3, n_states=6, n_actions=2, branching=4, discount=0.9, seed=5)
    assert m.batch_shape == (3,) and m.reward.shape == (3, 6, 2)
    v = np.arange(6.0)
    for i in range(3):
        one = rr.problems.garnet(n_states=6, n_actions=2, branching=4, discount=0.9, seed=5 + i)
        np.testing.assert_array_equal(m.reward[i], one.reward)
        np.testing.assert_allclose(m.transitions.expect(v)[i], one.transitions.expect(v), rtol=1e-14)


def test_successors_of_a_garnet_are_distinct_and_uniform():
    """Every pair of states is as likely as any other; large problems need no memory of S by S."""
    rng = np.random.default_rng(0)
    drawn = generators._distinct(rng, 60_000, 4, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all() and drawn.min() == 0 and drawn.max() == 3
    low, high = drawn.min(-1), drawn.max(-1)
    counts = np.bincount(4 * low + high, minlength=16)
    assert (np.abs(counts[counts > 0] / 10_000 - 1) < 0.05).all() and (counts > 0).sum() == 6
    assert generators._distinct(rng, 3, 5, 5).sum() == 30
