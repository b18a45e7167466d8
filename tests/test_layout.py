"""The kernels' own reductions and groups: the same numbers as the plain ones, and not the slow way there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import garnet_case, replace

import robustreg as rr
from robustreg._core import pytrees
from robustreg.game import sets
from robustreg.solvers import bellman, bound_problem, lane_groups

AWKWARD = np.array([[1.0, -2.0, 3.0], [np.inf, 1.0, 2.0], [np.nan, 1.0, 2.0], [-np.inf, -np.inf, -np.inf]]).T


def test_reductions_are_the_plain_ones():
    """Also with infinities and NaN."""
    np.testing.assert_array_equal(np.asarray(pytrees.total(jnp.asarray(AWKWARD))), AWKWARD.sum(0))
    np.testing.assert_array_equal(np.asarray(pytrees.largest(jnp.asarray(AWKWARD))), AWKWARD.max(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 3)))
    for axis in (0, 1):
        np.testing.assert_allclose(np.asarray(pytrees.total(x, axis)), np.asarray(x).sum(axis), rtol=1e-14)

    def cubes(sum_up):
        return lambda y: jnp.sum(sum_up(y * x) ** 3)

    for derivative in (jax.grad, jax.hessian):
        expected = derivative(cubes(pytrees.plain_sum))(x)
        np.testing.assert_allclose(np.asarray(derivative(cubes(pytrees.total))(x)), np.asarray(expected), rtol=1e-12)


def test_no_product_is_handed_to_a_library_of_reductions():
    """XLA's CPU compiler did so for sums of 1,024 results and more: 10 to 40 times slower."""
    m = rr.problems.slippery_grid(32, 0.99)
    problem = bound_problem.bind(m, rr.alpha(1.5, jnp.geomspace(0.1, 10.0, 16)))
    policy = jnp.full((m.n_actions, m.n_states, 16), 1 / m.n_actions)

    def step(problem, policy, x):
        return bellman.chain(problem, policy).apply(bellman.backup(problem, x, x[0])[0])

    text = str(jax.jit(step).lower(problem, policy, jnp.zeros((m.n_states, 16))).compile().as_text())
    assert "fusion" in text and "ynn" not in text and "xnn" not in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "successors", "matrix-free"])
def test_groups_change_nothing(kind, monkeypatch):
    """Seven groups of two lanes, with a lane of NaN and axes that some leaves share, against all lanes at once."""
    case = garnet_case(0)
    rewards = np.stack([case.reward, 2 * case.reward])
    m = rr.mdp(replace(case, reward=rewards).transitions(kind), rewards[:, None], 0.9, initial=case.initial)
    betas = np.array([50.0, 0.5, 5.0, 1.0, 20.0, 2.0, 9.0])
    discounts = np.array([0.9, 0.5, 0.8, 0.9, 0.0, 0.7, 0.95])
    m = dataclasses.replace(m, discount=jnp.asarray(discounts), complement=jnp.asarray(1 - discounts))
    reg = rr.alpha(alpha=np.array([[0.5], [2.0]]), beta=betas, prior=case.prior)
    reg = dataclasses.replace(reg, beta=reg.beta.at[3].set(jnp.nan))
    whole = rr.solve(m, reg, tol=1e-9)
    monkeypatch.setattr(lane_groups, "width", lambda problem: 2)
    jax.clear_caches()
    grouped = rr.solve(m, reg, tol=1e-9)
    jax.clear_caches()
    assert whole.status.shape == (2, 7) and not np.asarray(whole.converged)[:, 3].any()
    np.testing.assert_array_equal(np.asarray(grouped.status), np.asarray(whole.status))
    np.testing.assert_array_equal(np.asarray(grouped.steps), np.asarray(whole.steps))
    np.testing.assert_allclose(np.asarray(grouped.value), np.asarray(whole.value), atol=2e-9)
    assert np.asarray(whole.converged).sum() == 12


def test_few_lanes_of_some_hundred_states_are_solved_one_by_one():
    """A batch is its single solves, also where a lane has failed, and takes no more steps than they do."""
    garnet = lambda n, dtype: rr.problems.garnet(n, 2, 3, 0.9, dtype=dtype)._with_sparsity()  # noqa: E731
    lanes = lambda m, n: lane_groups.width(bound_problem.bind(m, rr.kl(np.ones(n, m.dtype))))  # noqa: E731
    assert [lanes(garnet(128, float), n) for n in (2, 32, 33)] == [1, 1, 128]
    assert [lanes(garnet(n, float), 2) for n in (127, 1024, 1025)] == [128, 1, 16]
    assert [lanes(garnet(n, np.float32), 2) for n in (2048, 2049)] == [1, 16]
    dense = rr.mdp(np.full((2, 128, 128), 1 / 128), np.zeros((128, 2)), 0.9, layout="ass")
    assert lanes(dense, 2) == 128
    m, betas = garnet(128, float), (3.0, np.nan, 0.5)
    reg = lambda beta: dataclasses.replace(rr.kl(np.ones_like(beta)), beta=jnp.asarray(beta))  # noqa: E731
    together, alone = rr.solve(m, reg(betas), tol=1e-9), [rr.solve(m, reg(b), tol=1e-9) for b in betas]
    assert np.array_equal(together.steps, [x.steps for x in alone])
    assert np.array_equal(together.status, [x.status for x in alone])
    np.testing.assert_allclose(together.value, [x.value for x in alone], atol=1e-12)


def test_lanes_that_share_one_of_several_dense_kernels_stay_together(monkeypatch):
    """A group would hold a copy of its kernel for each lane."""
    grouped, calls = lane_groups._grouped, []
    monkeypatch.setattr(lane_groups, "width", lambda problem: 2)
    monkeypatch.setattr(lane_groups, "_grouped", lambda *x: calls.append(1) or grouped(*x))
    jax.clear_caches()
    two, six = rr.problems.garnets(2, 5, 2, 3, 0.9), rr.problems.garnets(6, 5, 2, 3, 0.9)
    for m, betas, expected in (
        (jax.tree.map(lambda x: x[:, None] if x.shape[:1] == (2,) else x, two), np.ones((2, 3)), False),
        (two, np.ones((3, 2)), False),
        (six, np.ones(6), True),
        (rr.problems.garnet(5, 2, 3, 0.9), np.ones(6), True),
    ):
        calls.clear()
        assert np.asarray(rr.solve(m, rr.kl(betas)).converged).all() and bool(calls) == expected
    jax.clear_caches()


def test_no_class_is_taken_for_another():
    """Treedefs of different classes differ, however alike their fields: compiled programs are found by them."""
    beta = jnp.ones(2)
    alike = [rr.KL(beta), rr.Entropy(beta)]
    alike += [rr.HalfSpace(alike[0], beta), rr.Orthant(alike[0], beta), rr.RobustSet(alike[0]), rr.Dense(beta)]
    alike += [rr.UnnormalisedSet(alike[0]), rr.Box(beta), rr.StatesOnly(), sets.Whole()]
    for i, one in enumerate(alike):
        for other in alike[:i]:
            assert jax.tree.structure(one) != jax.tree.structure(other), (one, other)
        leaves, structure = jax.tree.flatten(one)
        again = jax.tree.unflatten(structure, leaves)
        assert type(again) is type(one) and jax.tree.structure(again) == structure
