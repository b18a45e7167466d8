"""Problems of different sizes in one batch: each lane has the answers of its problem by itself."""

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import robustreg

rr: Any = robustreg
problems = rr.problems
loop: Any = import_module("robustreg.solvers.loop")


def dense(n_states, n_actions, seed, discount=0.9, **options):
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.ones(n_states), (n_states, n_actions))
    return rr.mdp(P, rng.normal(size=(n_states, n_actions)), discount, layout="sas", **options)


def visits_of(m, policy):
    """Discounted visits `[S, A]` of a problem without batch axes, in NumPy."""
    rows, policy = m.transitions, np.asarray(policy)
    P, (s, a) = np.zeros((*policy.shape, m.n_states)), np.ogrid[: m.n_states, : m.n_actions]
    if isinstance(rows, rr.Dense):
        P = np.asarray(rows.probabilities)
    else:
        for k in range(rows.indices.shape[-1]):
            np.add.at(P, (s, a, np.asarray(rows.indices)[..., k]), np.asarray(rows.probabilities)[..., k])
    chain = np.einsum("sat,sa->st", P, policy)
    return np.linalg.solve(np.eye(m.n_states) - float(m.discount) * chain.T, np.asarray(m.initial))[:, None] * policy


NAMED = {"a": {"x": [(1.0, "b", 1.0)], "y": [(0.5, "a", 2.0), (0.5, "b", 0.0)]}, "b": {"x": [(1.0, "c", 3.0)]}}
MIXES = {
    "sizes, priors, scales": lambda: [
        (dense(7, 3, 0), rr.kl(1.0)),
        (problems.chain(5, 0.95), rr.kl(3.0, prior=[0.25, 0.75])),
        (rr.from_table(NAMED, 0.8), rr.kl(2.0)),
        (dense(4, 2, 1, 0.99), rr.kl(2.0, state_scale=np.arange(1.0, 5))),
    ],
    "orders": lambda: [(dense(7, 3, 0), rr.alpha(1.5, 1.0)), (problems.chain(5, 0.9), rr.kl(2.0, prior=[0.5, 0.5]))],
    "entropy": lambda: [(dense(7, 3, 0), rr.entropy(1.0)), (rr.from_table(NAMED, 0.8), rr.entropy(2.0))],
    "short lists": lambda: [(problems.slippery_grid(n, 0.9), rr.kl(float(n))) for n in (7, 6)],
    "one": lambda: [(dense(7, 3, 2), rr.kl(1.0))],
    "ends and masks": lambda: [
        (dense(7, 3, 3, available=np.arange(21).reshape(7, 3) % 4 > 0), rr.kl(1.0)),
        (rr.mdp(np.zeros((3, 2, 3)), np.ones((3, 2)), 0.9, termination=np.ones(3)), rr.kl(1.0)),
    ],
}


@pytest.mark.parametrize("mix", MIXES)
def test_answers_are_those_of_each_by_itself(mix):
    pairs = MIXES[mix]()
    stacked = rr.stack(pairs)
    assert stacked.sizes == tuple((m.n_states, m.n_actions) for m, _ in pairs)
    tol = 1e-10
    sol = rr.solve(stacked.mdp, stacked.reg, tol=tol).raise_if_failed()
    assert isinstance(stacked.mdp.transitions, rr.Successors) == (mix == "short lists")
    # (Of arrays on the device once, else of NumPy's: every slice of those is a program.)
    parts = stacked.cut(sol if mix == "one" else jax.device_get(sol))
    for i, ((m, reg), mine) in enumerate(zip(pairs, parts)):
        alone = rr.solve(m, reg, tol=tol)
        for name in ("value", "q", "policy", "perturbation", "objective"):
            expected, found = np.asarray(getattr(alone, name)), np.asarray(getattr(mine, name))
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, atol=1e-8, err_msg=name)
        if i == 0 or mix in ("sizes, priors, scales", "ends and masks"):  # else the first one stands for the others
            assert rr.certify(m, reg, mine).raise_if_loose(1e-8) is not None
    if mix not in ("orders", "entropy"):  # whose problems are those of the first mix: visits know no regulariser
        for i, visits in enumerate(stacked.cut(np.asarray(rr.occupancy(stacked.mdp, sol.policy)))):
            np.testing.assert_allclose(visits, visits_of(pairs[i][0], parts[i].policy), atol=1e-9)


def test_against_the_oracle_and_differentiable():
    pairs = [(dense(5, 3, 0), rr.kl(1.0)), (dense(3, 2, 1), rr.kl(4.0))]

    @jax.jit
    @jax.value_and_grad
    def total(scale):
        scaled = [(jax.tree.map(lambda x: x, m), rr.kl(scale * reg.beta)) for m, reg in pairs]
        m, reg, _ = rr.stack(scaled)
        return jnp.sum(rr.solve(m, reg, tol=1e-11).objective)

    objective, gradient = total(1.0)
    expected = 0.0
    for m, reg in pairs:
        P, r = np.asarray(m.transitions.probabilities), np.asarray(m.reward)
        prior = np.full(m.n_actions, 1 / m.n_actions)
        value, _ = oracle.solve(P, r, 0.9, 1.0, float(reg.beta), prior)[:2]
        expected += value.mean()
    np.testing.assert_allclose(objective, expected, atol=1e-9)
    step = 1e-5
    slope = (total(1 + step)[0] - total(1 - step)[0]) / (2 * step)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6)


def test_refusals():
    m = problems.chain(3, 0.9)
    with pytest.raises(ValueError, match="stack takes at least one pair"):
        rr.stack([])
    with pytest.raises(TypeError, match=r"problem 0 is MDP; expected a pair \(mdp, regulariser\)"):
        rr.stack([m])
    with pytest.raises(TypeError, match="stack takes regularisers of one kind, got KL and, of problem 1, Entropy"):
        rr.stack([(m, rr.kl(1.0)), (m, rr.entropy(1.0))])
    with pytest.raises(ValueError, match=r"problem 1 has batch axes \[2\] of its own"):
        rr.stack([(m, rr.kl(1.0)), (m, rr.kl([1.0, 2.0]))])
    with pytest.raises(TypeError, match="problem 0 has transitions that are a function"):
        free = rr.MatrixFree(lambda v: jnp.broadcast_to(v[:, None], (2, 1)), n_states=2, n_actions=1)
        rr.stack([(rr.mdp(free, np.ones((2, 1)), 0.9), rr.kl(1.0))])
    with pytest.raises(ValueError, match=r"cut takes arrays \[N\], \[N, S\] or \[N, S, A\] with N = 1"):
        rr.stack([(m, rr.kl(1.0))]).cut(np.zeros(3))


# ---- stacked by jax.tree.map


@pytest.mark.parametrize("sizes", [(6, 2, 2), (60, 2, 3)])
def test_a_tree_of_stacked_leaves_is_a_batch(sizes):
    """Lists of their own for every lane are written out where they are long, and joined where they are short."""
    ones = [problems.garnet(*sizes, 0.9, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *ones)
    reg = rr.kl(2.0)
    sol = rr.solve(stacked, reg, tol=1e-11).raise_if_failed()
    value = jax.jit(lambda m: rr.solve(m, reg, tol=1e-11).value)
    inside, mapped = value(stacked), jax.vmap(value)(stacked)
    v, visits = np.arange(sizes[0]) ** 2.0, np.asarray(rr.occupancy(stacked, sol.policy))
    for i, one in enumerate(ones):
        alone = rr.solve(one, reg, tol=1e-11)
        for found in (sol.value, inside, mapped):
            np.testing.assert_allclose(found[i], alone.value, atol=1e-9)
        np.testing.assert_allclose(stacked.transitions.expect(v)[i], one.transitions.expect(v), rtol=1e-12)
        np.testing.assert_allclose(visits[i], visits_of(one, alone.policy), atol=1e-8)


def test_repeated_successors_add_up_in_joined_lists():
    lists = np.array([[[[1, 1, 0]], [[0, 0, 0]]], [[[0, 2, 0]], [[2, 1, 0]]]])  # [B, S, A, K], 3 of 40 states used
    lists = np.pad(lists, ((0, 0), (0, 38), (0, 0), (0, 0)))
    p = np.broadcast_to([0.25, 0.5, 0.25], lists.shape)
    kernel = rr.Successors(jnp.asarray(lists, np.int32), jnp.asarray(p))
    joined = kernel._joined()
    assert isinstance(joined, rr.Successors) and joined.indices.ndim == 3
    v = np.random.default_rng(0).normal(size=40)
    np.testing.assert_allclose(joined.expect(v), (p * v[lists]).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(kernel.expect(v), (p * v[lists]).sum(-1), rtol=1e-12)


# ---- lanes or states


def test_a_number_per_state_is_refused_with_both_readings():
    m, three = problems.chain(3, 0.9), np.array([0.9, 0.8, 0.7])
    per_state = problems.chain(3, three)
    half = np.full((3, 2), 0.5)
    for call in (
        lambda: rr.solve(per_state, rr.kl(1.0)),
        lambda: rr.evaluate(per_state, half),
        lambda: rr.occupancy(per_state, half),
        lambda: rr.nominal_optimum(per_state),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        for words in ("discount has shape [3]", "there are 3 states", "reward[None]", "termination=1 - g / g.max()"):
            assert words in str(caught.value)
    for call in (lambda: rr.solve(m, rr.kl(1 + three)), lambda: rr.evaluate(m, half, rr.kl(1 + three))):
        with pytest.raises(ValueError) as caught:
            call()
        for words in ("beta has shape [3]", "state_scale=np.ones(3)", "pass beta=1.0 and state_scale=beta"):
            assert words in str(caught.value)


def test_the_remedies_do_what_they_say():
    g, betas = np.array([0.9, 0.8, 0.7]), np.array([1.0, 2.0, 3.0])
    rng = np.random.default_rng(0)
    P, r = rng.dirichlet(np.ones(3), (3, 2)), rng.normal(size=(3, 2))
    m = rr.mdp(P * (g / g.max())[:, None, None], r, g.max(), termination=1 - g / g.max())
    value = np.zeros(3)
    for _ in range(2000):
        value = np.log(np.exp(2.0 * (r + g[:, None] * (P @ value))).mean(-1)) / 2.0
    np.testing.assert_allclose(rr.solve(m, rr.kl(2.0), tol=1e-11).value, value, atol=1e-10)
    lanes = rr.solve(rr.mdp(P, r[None], g), rr.kl(2.0), tol=1e-11).value
    alone = [rr.solve(rr.mdp(P, r, x), rr.kl(2.0), tol=1e-11).value for x in (0.8, 0.9)]
    np.testing.assert_allclose(lanes[1], alone[0], atol=1e-9)
    plain = rr.mdp(P, r, 0.9)
    by_beta = np.asarray(rr.solve(plain, rr.kl(betas, state_scale=np.ones(3)), tol=1e-11).value)
    np.testing.assert_allclose(by_beta[1], alone[1], atol=1e-9)
    np.testing.assert_allclose(rr.sweep(plain, rr.kl(1.0), {"beta": betas})["objective"], by_beta.mean(-1), atol=1e-9)


def test_lanes_that_are_none_too_many_are_lanes(monkeypatch):
    """Accepted outside jit, where values are looked at; what is then solved is traced for its shape alone."""
    m, betas = problems.chain(3, 0.9), np.array([1.0, 2.0, 3.0])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_solve", loop._solve.eval_shape)
        assert rr.solve(m, rr.kl(betas[:2])).value.shape == (2, 3)
        assert rr.solve(problems.chain(3, betas / 4), rr.kl(betas)).value.shape == (3, 3)
        assert rr.solve(m, rr.kl(betas), tol=np.full(3, 1e-6)).value.shape == (3, 3)
        assert rr.solve(m, rr.kl(betas), init=np.zeros((3, 3))).value.shape == (3, 3)
        assert rr.solve(problems.bandit(), rr.kl([1.0])).value.shape == (1, 1)
    assert jax.jit(lambda b: rr.solve(m, rr.kl(b)).value)(betas).shape == (3, 3)
