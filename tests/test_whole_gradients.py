"""`jax.grad` with respect to a whole MDP, of every kind, and an optimiser's step on the result."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import written_out

import robustreg
from robustreg._core import discrete

rr: Any = robustreg

ROWS = {"a": {"x": [(1.0, "b", 1.0)], "y": [(0.5, "a", 2.0), (0.5, "b", 0.0)]}, "b": {"x": [(1.0, "c", 3.0)]}}


def masked():
    rng = np.random.default_rng(0)
    P, there = rng.dirichlet(np.ones(5), (5, 3)), rng.random((5, 3)) < 0.6
    there[:, 0] |= ~there.any(-1)
    return rr.mdp(P, rng.normal(size=(5, 3)), 0.9, available=there)


KINDS = {
    "successors": lambda: rr.problems.garnet(6, 2, 3, 0.9),
    "names, mask, ends": lambda: rr.from_table(ROWS, 0.8),
    "mask": masked,
    "dense": lambda: rr.mdp(np.full((3, 2, 3), 1 / 3), np.arange(6.0).reshape(3, 2), 0.9),
    "pattern": lambda: rr.problems.slippery_grid(9, 0.9),
}
REG = rr.kl(2.0)


def objective(m):
    return rr.solve(m, REG, tol=1e-11).objective


@jax.jit
def slopes_and_policy(m):
    """Gradient of the objective in the whole MDP, and the policy that it belongs to."""

    def solved(m):
        sol = rr.solve(m, REG, tol=1e-11)
        return sol.objective, sol.policy

    return jax.grad(solved, has_aux=True)(m)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_one_step(kind):
    m = KINDS[kind]()
    slopes, policy = slopes_and_policy(m)
    # The gradient in the reward is the occupancy.
    policy, g = np.asarray(policy), np.asarray(m.discount)
    visits = oracle.occupancy(written_out(m.transitions), np.asarray(m.initial), g, policy)
    np.testing.assert_allclose(slopes.reward, visits, atol=1e-7)
    assert jax.tree.structure(slopes) == jax.tree.structure(m)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(slopes))
    optimiser = optax.adam(1e-3)
    with jax.numpy_dtype_promotion("standard"):  # which optax takes for granted
        updates, _ = optimiser.update(slopes, optimiser.init(m), m)
        moved: Any = optax.apply_updates(m, updates)
    assert float(abs(moved.reward - m.reward).max()) > 5e-4
    if isinstance(m.transitions, rr.Successors):
        assert moved.transitions.indices.dtype == jnp.int32
        np.testing.assert_array_equal(moved.transitions.indices, m.transitions.indices)
    if m.available is not None:
        assert moved.available.dtype == bool
        np.testing.assert_array_equal(moved.available, m.available)


@pytest.mark.parametrize("kind", ["names, mask, ends", "pattern"])
def test_outside_jit_it_is_the_same(kind):
    """Whole numbers and truth values among the leaves, and a list that actions share, with no jit around `grad`."""
    m = KINDS[kind]()
    chex.assert_trees_all_close(jax.grad(objective)(m), slopes_and_policy(m)[0], atol=1e-9)


def test_steps_climb():
    """Steps in the reward alone raise the objective, in one compiled program."""
    m = KINDS["names, mask, ends"]()
    optimiser = optax.sgd(1.0)
    state = optimiser.init(m)
    program: Any = jax.jit(jax.value_and_grad(lambda m: -objective(m)))
    before = -float(program(m)[0])
    for _ in range(5):
        _, slopes = program(m)
        slopes = dataclasses.replace(jax.tree.map(jnp.zeros_like, slopes), reward=slopes.reward)
        updates, state = optimiser.update(slopes, state, m)
        m = optax.apply_updates(m, updates)
    assert -float(program(m)[0]) > before + 1 and program._cache_size() == 1


def test_no_program_per_problem():
    program: Any = jax.jit(objective)
    for seed in range(3):
        m = rr.problems.garnet(6, 2, 3, 0.9, seed=seed)
        np.testing.assert_allclose(program(m), objective(m), atol=1e-9)
    assert program._cache_size() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_trees_hold_what_they_held(kind):
    m = KINDS[kind]()
    same = jax.tree.map(lambda x: x, m)
    for name in ("available", "reward"):
        assert getattr(same, name) is getattr(m, name)
    if isinstance(m.transitions, rr.Successors):
        assert same.transitions.indices is m.transitions.indices
        single = jax.tree.map(lambda x: x.astype(jnp.float32), m)
        np.testing.assert_array_equal(single.transitions.indices, m.transitions.indices)
        on_host = jax.device_get(m)
        assert on_host.transitions.indices.dtype == np.int32
        shapes = jax.eval_shape(lambda m: m, m)
        assert shapes.transitions.indices.dtype == jnp.int32
        axes = jax.tree.map(lambda x: 0, m)
        assert axes.transitions.indices == 0
    twice = jax.tree.map(lambda x: np.stack([x, x]), m)
    if kind == "pattern":  # in numbers; of the others the trace tells whether the leaves fit
        np.testing.assert_allclose(jax.vmap(objective)(twice), objective(m), rtol=1e-9)
    assert jax.eval_shape(jax.vmap(objective), twice).shape == (2,)


def test_derivatives_of_both_modes():
    m = KINDS["successors"]()
    along = jax.tree.map(jnp.zeros_like, m)
    along = dataclasses.replace(along, reward=m.reward)
    change = jax.jit(lambda m, along: jax.jvp(objective, (m,), (along,))[1])(m, along)
    np.testing.assert_allclose(change, jnp.vdot(slopes_and_policy(m)[0].reward, m.reward), rtol=1e-8)
    whole = jax.eval_shape(jax.grad(objective, allow_int=True), m)
    assert whole.transitions.indices.shape == m.transitions.indices.shape


def test_too_many_numbers_for_single_precision_stay_whole():
    big = jnp.zeros(discrete._EXACT, jnp.int32)
    kinds = (int, None)
    left, _ = discrete.as_leaves((big, jnp.zeros(1, jnp.float32)), kinds)
    assert left is big
    turned, _ = discrete.as_leaves((big, jnp.zeros(1, jnp.float64)), kinds)
    assert turned.dtype == jnp.float64
    assert discrete.from_leaves((turned, None), kinds)[0] is big
