"""Chains by neighbours and by sources are the same matrices as the successor lists they were made from."""

import dataclasses
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr
from robustreg.problems import sparsity
from robustreg.solvers import bellman, bound_problem


def star(n=64):
    """Everything leads to state 0: one state has all the sources."""
    indices = np.zeros((n, 4, 8), np.int32)
    indices[0] = np.random.default_rng(0).integers(0, 9, (4, 8))
    indices[:, :, 1:3] = (np.arange(n)[:, None, None] + np.arange(1, 3)) % n
    return indices


GRID = rr.problems.slippery_grid(12, 0.9)
KERNEL: Any = GRID.transitions
RANDOM, SPARSE, CHAIN = (
    m.transitions
    for m in (rr.problems.garnet(300, 8, 8), rr.problems.garnet(64, 4, 5), rr.problems.chain(discount=0.9))
)
LISTS = {
    "grid": np.asarray(KERNEL.indices),
    "star": star(),
    "random": np.asarray(vars(RANDOM)["indices"]),
}
HAS_NEIGHBOURS = {"grid": True, "star": True, "random": False}


def drawn(name, lanes=()):
    """A kernel over the lists, some of its probabilities 0, and its matrices `[*lanes, S, A, S]`."""
    indices = LISTS[name]
    rng = np.random.default_rng(1)
    p = rng.exponential(size=(*lanes, *indices.shape)) * (rng.random(indices.shape) < 0.8)
    p[..., 0] += 0.1
    p /= p.sum(-1, keepdims=True)
    matrix = np.zeros((*lanes, *indices.shape[:2], indices.shape[0]))
    s, a, _ = np.indices(indices.shape)
    entries: Any = (..., s, a, indices)
    np.add.at(matrix, entries, p)
    return rr.Successors(jnp.asarray(indices), jnp.asarray(p)), matrix


def make(name, own, lanes):
    kernel, matrix = drawn(name, (lanes,) if own else ())
    n_states, n_actions = matrix.shape[-3:-1]
    reward = np.random.default_rng(2).normal(size=(n_states, n_actions))
    m = rr.mdp(kernel, reward, 0.9)._with_sparsity()
    assert vars(m.transitions)["pattern"] is not None
    problem = bound_problem.bind(m, rr.kl(np.ones(lanes)))
    policy = np.random.default_rng(3).dirichlet(np.ones(n_actions), (lanes, n_states))
    chain = bellman.chain(problem, jnp.asarray(policy.transpose(2, 1, 0)))
    return chain, 0.9 * np.einsum("...sat,lsa->lst" if not own else "lsat,lsa->lst", matrix, policy)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("name", LISTS)
def test_chains_are_their_matrices(name, lanes, own):
    """Forwards, backwards and written out; whatever has no neighbours or no memory to spare takes the lists."""
    chain, matrix = make(name, own, lanes)
    few = HAS_NEIGHBOURS[name] and (own or lanes == 1 or patterns_width(name) <= 2 * LISTS[name].shape[1])
    assert (chain.policy.shape[0] == patterns_width(name)) == few
    assert (chain.backwards is not None) == (few or own or lanes == 1)
    x = np.random.default_rng(4).normal(size=(lanes, matrix.shape[-1]))
    forwards, backwards = np.einsum("lst,lt->sl", matrix, x), np.einsum("lst,ls->tl", matrix, x)
    np.testing.assert_allclose(np.asarray(chain.apply(jnp.asarray(x.T))), forwards, atol=1e-13)
    np.testing.assert_allclose(np.asarray(chain.transpose(jnp.asarray(x.T))), backwards, atol=1e-13)
    np.testing.assert_allclose(np.asarray(chain.matrix()), matrix, atol=1e-15)


def patterns_width(name):
    """Most different successors of a state."""
    rows = LISTS[name].reshape(LISTS[name].shape[0], -1)
    return max(len(set(row)) for row in rows)


@pytest.mark.parametrize("name", LISTS)
def test_every_entry_is_in_one_place(name):
    pattern = sparsity.find(jnp.asarray(LISTS[name]))
    assert pattern is not None
    listed = np.concatenate([np.asarray(pattern.sources).ravel(), np.asarray(pattern.overflow)])
    listed = listed[listed >= 0]
    assert len(set(listed)) == len(listed)
    width, n_states = pattern.neighbours.shape
    assert n_states <= len(listed) <= width * n_states
    if name == "star":  # the one state with many sources does not make all lists long
        assert pattern.sources.shape[0] <= 8
    slots = LISTS[name].transpose(2, 1, 0)
    if pattern.slot is not None:
        found = np.take_along_axis(
            np.asarray(pattern.neighbours), np.asarray(pattern.slot).reshape(-1, n_states), axis=0
        )
        np.testing.assert_array_equal(found.reshape(slots.shape), slots)
    else:
        np.testing.assert_array_equal(np.asarray(pattern.neighbours).reshape(slots.shape), slots)


def test_found_once_and_kept_as_long_as_the_array():
    indices = jnp.asarray(LISTS["grid"] + 0)
    first = sparsity.find(indices)
    assert sparsity.find(indices) is first and id(indices) in sparsity._found
    key = id(indices)
    del indices, first
    gc.collect()
    assert key not in sparsity._found


def test_not_sought_where_it_is_not_worth_it():
    for kernel in (CHAIN, SPARSE):  # small; large enough, but every successor another state
        assert sparsity.find(vars(kernel)["indices"]) is None
    assert sparsity.find(LISTS["grid"]) is None  # somebody may write into a NumPy array
    assert jax.jit(lambda i: i.sum() if sparsity.find(i) is None else 0)(jnp.asarray(LISTS["grid"])) > 0


def test_found_inside_a_trace_it_outlives_it():
    indices = KERNEL.indices + 0
    m = dataclasses.replace(GRID, transitions=rr.Successors(indices, KERNEL.probabilities))
    reg = rr.kl(2.0)
    inside = jax.jit(lambda r: rr.solve(dataclasses.replace(m, reward=r), reg, tol=1e-9).value)(m.reward)
    assert id(indices) in sparsity._found
    np.testing.assert_allclose(np.asarray(rr.solve(m, reg, tol=1e-9).value), np.asarray(inside), atol=2e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid", "random"])
def test_derivatives_are_those_without(name, monkeypatch):
    """First and second, in the reward and in probabilities of 0 as well; of alpha and, without neighbours, of KL."""
    kernel, matrix = drawn(name)
    reward = np.random.default_rng(5).normal(size=matrix.shape[:2])
    m = rr.mdp(kernel, reward, 0.9)

    def objective(reward, p):
        other = dataclasses.replace(m, reward=reward, transitions=rr.Successors(indices, p))
        return rr.solve(other, reg, tol=1e-10).objective

    reg: Any = rr.alpha(1.5, 3.0) if HAS_NEIGHBOURS[name] else rr.kl(3.0)
    indices, probabilities = (vars(m.transitions)[x] for x in ("indices", "probabilities"))
    point = (m.reward, probabilities)
    rng = np.random.default_rng(6)
    way = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in point)

    def both(point, way):
        return jax.jvp(jax.grad(objective, (0, 1)), point, way)

    found = jax.tree.leaves(jax.jit(both)(point, way))
    monkeypatch.setattr(sparsity, "find", lambda indices: None)
    expected = jax.tree.leaves(jax.jit(lambda *at: both(*at))(point, way))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-7 * float(jnp.max(jnp.abs(y))))


def test_a_prepared_mdp_keeps_its_pattern_as_an_argument():
    """Inside the caller's `jit`, where its lists cannot be looked at; gradients in all of it go through as before."""
    m, reg = GRID.prepared(), rr.kl(3.0)
    seen: list[Any] = []

    @jax.jit
    def objective(m):
        seen.append(vars(m._with_sparsity().transitions)["pattern"])
        return rr.solve(m, reg, tol=1e-10).objective

    value, gradient = jax.value_and_grad(objective)(m)
    plain, expected = jax.value_and_grad(objective)(GRID)
    assert seen[0] is not None and seen[-1] is None
    np.testing.assert_allclose(value, plain, rtol=1e-10)
    np.testing.assert_allclose(gradient.reward, expected.reward, atol=1e-8)
    kernel: Any = gradient.transitions
    np.testing.assert_array_equal(kernel.pattern.sources, 0)
    again: Any = jax.tree.map(lambda x: x, m).prepared()
    assert again.transitions.pattern.slot is vars(m.transitions)["pattern"].slot


@pytest.mark.slow
def test_exports_for_accelerators():
    """With a pattern too, value and gradient lower for what is not here."""

    def objective(reward):
        return rr.solve(dataclasses.replace(GRID, reward=reward), rr.kl(3.0), tol=1e-6).objective

    assert sparsity.find(KERNEL.indices) is not None
    for f in (objective, jax.grad(objective)):
        exported = jax.export.export(jax.jit(f), platforms=("cuda", "rocm", "tpu"))(GRID.reward)
        assert set(exported.platforms) == {"cuda", "rocm", "tpu"}
