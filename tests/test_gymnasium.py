"""Gymnasium's own tables, solved, certified, and their adversary held against an independent solver."""

import dataclasses

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import robustreg as rr

# Many compilations: the run on the oldest releases leaves this file out.
pytestmark = pytest.mark.slow

ENVIRONMENTS = {
    "FrozenLake": lambda: gymnasium.make("FrozenLake-v1", map_name="8x8"),
    "Taxi": lambda: gymnasium.make("Taxi-v4"),
    "CliffWalking": lambda: gymnasium.make("CliffWalking-v1"),
}
ALPHAS = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0])[:, None]
BETAS = 10.0 ** np.array([-3.0, -1.0, 0.0, 1.0, 2.0, 4.0])
TOL = 1e-8


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def mdp(request):
    """One environment, discount .99; tests put in others."""
    return rr.from_gymnasium(ENVIRONMENTS[request.param](), discount=0.99)


def alternating(*discounts):
    """A discount for each alpha and beta: all pairs of values of the three meet in one batch, `[8, 6]`."""
    i, j = np.indices((ALPHAS.size, BETAS.size))
    return np.array(discounts)[(i + j) % len(discounts)]


def with_discount(mdp, discount):
    """The same MDP at other discounts."""
    return dataclasses.replace(
        mdp, discount=jnp.asarray(discount, mdp.dtype), complement=jnp.asarray(1 - discount, mdp.dtype)
    )


def dense(mdp):
    """The kernel written out, `[S, A, S]`."""
    index, probability = np.asarray(mdp.transitions.indices), np.asarray(mdp.transitions.probabilities)
    P = np.zeros((*index.shape[:2], index.shape[0]))
    s, a = np.ogrid[: index.shape[0], : index.shape[1]]
    for k in range(index.shape[2]):
        np.add.at(P, (s, a, index[..., k]), probability[..., k])
    return P


def to_float32(tree):
    """Every floating leaf in single precision."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@pytest.mark.parametrize("regulariser", ["KL", "alpha"])
def test_certified_solution_and_its_adversary(mdp, regulariser):
    discount = np.array([[0.99], [0.999]]) if regulariser == "KL" else alternating(0.99, 0.999)
    mdp = with_discount(mdp, discount)
    reg = rr.kl(beta=BETAS) if regulariser == "KL" else rr.alpha(alpha=ALPHAS, beta=BETAS)
    sol = rr.solve(mdp, reg, tol=TOL).raise_if_failed()
    assert (np.asarray(sol.upper - sol.lower) <= 2 * TOL).all()
    proof = rr.certify(mdp, reg, sol)
    assert np.asarray(proof.indifference).max() <= 1e-8
    assert np.abs(np.asarray(rr.slack(reg, sol.perturbation))).max() <= 1e-9
    # Without any regularised code: the best plain value on the perturbed reward is the value.
    P, perturbed = dense(mdp), np.asarray(mdp.reward) - np.asarray(sol.perturbation)
    every = np.broadcast_to(discount, sol.status.shape)
    # (Of alpha, with the discounts .99, .999, .99, .999.)
    lanes = np.ndindex(*every.shape) if regulariser == "KL" else [(0, 0), (2, 5), (5, 3), (7, 2)]
    for lane in lanes:
        best = oracle.optimal_value(P, perturbed[lane], every[lane])
        assert np.abs(best - np.asarray(sol.value[lane])).max() <= 2 * TOL


def test_transition_kinds_and_solvers_agree(mdp):
    P = dense(mdp)
    index, probability = mdp.transitions.indices, mdp.transitions.probabilities
    kinds = {
        "dense": rr.Dense(jnp.asarray(P)),
        "matrix free": rr.MatrixFree(
            lambda v, p: jnp.sum(p * v[index], axis=-1),
            n_states=mdp.n_states,
            n_actions=mdp.n_actions,
            parameters=probability,
        ),
    }
    reg = rr.alpha(alpha=ALPHAS[[1, 3, 5]], beta=BETAS[[1, 3, 5]])
    base = rr.solve(mdp, reg).raise_if_failed()
    for name, kind in kinds.items():
        other = rr.solve(dataclasses.replace(mdp, transitions=kind), reg).raise_if_failed()
        assert np.abs(np.asarray(other.value - base.value)).max() <= 1e-10, name
    for solver in (rr.ModifiedPolicyIteration(20), rr.Newton(linear="direct"), rr.Anderson(5)):
        other = rr.solve(mdp, reg, solver, tol=TOL).raise_if_failed()
        assert (np.asarray(other.lower) <= np.asarray(base.upper)).all(), solver
        assert (np.asarray(other.upper) >= np.asarray(base.lower)).all(), solver


def test_float32_interval_contains_the_float64_value(mdp):
    reg = rr.alpha(alpha=ALPHAS, beta=BETAS)
    problem = with_discount(mdp, alternating(0.99, 0.999, 0.9999))
    truth = rr.solve(problem, reg).raise_if_failed()
    sol = rr.solve(to_float32(problem), to_float32(reg))
    assert sol.value.dtype == jnp.float32
    assert np.asarray(sol.converged).all(), np.asarray(sol.status)
    lower, upper = (np.asarray(x, np.float64) for x in (sol.lower, sol.upper))
    assert (lower <= np.asarray(truth.upper)).all() and (upper >= np.asarray(truth.lower)).all()
