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
    "CliffWalking": lambda: gymnasium.make("CliffWalking-v1"),
    "Taxi": lambda: gymnasium.make("Taxi-v4"),
}
ALPHAS = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0])[:, None]
BETAS = 10.0 ** np.array([-3.0, -1.0, 0.0, 1.0, 2.0, 4.0])
TOL = 1e-8


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def mdp(request):
    """One environment, discount .99; tests put in others."""
    m = rr.from_gymnasium(ENVIRONMENTS[request.param](), discount=0.99)
    return m if request.param == "Taxi" else as_large_as_frozen_lake(m)


def as_large_as_frozen_lake(m):
    """The same problem with states that nobody reaches, and successors of probability 0: one program for two of them.

    There are 64 states, and 3 successors per action.
    """
    index, probability = np.asarray(m.transitions.indices), np.asarray(m.transitions.probabilities)
    new, short = 64 - m.n_states, 3 - index.shape[2]
    rows = [(0, new), (0, 0), (0, short)]
    index, probability = np.pad(index, rows), np.pad(probability, rows)
    index[64 - new :, :, 0], probability[64 - new :, :, 0] = np.arange(64 - new, 64)[:, None], 1.0
    kernel = rr.Successors(jnp.asarray(index), jnp.asarray(probability))
    return rr.mdp(
        kernel,
        np.pad(m.reward, rows[:2]),
        0.99,
        initial=np.pad(m.initial, rows[0]),
        termination=None if m.termination is None else np.pad(m.termination, rows[:2]),
    )


def strengths(mdp):
    """Alphas and betas that broadcast to `[8, N]`: all pairs, but of Taxi's 500 states two betas for each alpha."""
    if mdp.n_states == 64:
        return ALPHAS, BETAS
    return ALPHAS, BETAS[(np.arange(8)[:, None] + [0, 3]) % 6]


def alternating(beta, *discounts):
    """A discount for each alpha and beta, such that all pairs of values of the three meet in one batch, `[8, N]`.

    (Of two betas for each alpha, all pairs of an alpha and a discount.)
    """
    i, j = np.indices((ALPHAS.size, beta.shape[-1]))
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
    alpha, beta = strengths(mdp)
    discount = np.array([[0.99], [0.999]]) if regulariser == "KL" else alternating(beta, 0.99, 0.999)
    mdp = with_discount(mdp, discount)
    reg = rr.kl(beta=BETAS) if regulariser == "KL" else rr.alpha(alpha=alpha, beta=beta)
    sol = rr.solve(mdp, reg, tol=TOL).raise_if_failed()
    assert (np.asarray(sol.upper - sol.lower) <= 2 * TOL).all()
    proof = rr.certify(mdp, reg, sol)
    assert np.asarray(proof.indifference).max() <= 1e-8
    assert np.abs(np.asarray(rr.slack(reg, sol.perturbation))).max() <= 1e-9
    # Without any regularised code: the best plain value on the perturbed reward is the value.
    P, perturbed = dense(mdp), np.asarray(mdp.reward) - np.asarray(sol.perturbation)
    every = np.broadcast_to(discount, sol.status.shape)
    small = beta is BETAS
    if regulariser == "KL":
        lanes = np.ndindex(*every.shape) if small else [(j % 2, j) for j in range(BETAS.size)]
    else:  # with the discounts .99, .999, .99, .999
        lanes = [(0, 0), (2, 5), (5, 3), (7, 2)] if small else [(0, 0), (2, 1), (5, 1), (7, 0)]
    for lane in lanes:
        best = oracle.optimal_value(P, perturbed[lane], every[lane])
        assert np.abs(best - np.asarray(sol.value[lane])).max() <= 2 * TOL


def expect(v, p):
    """Matrix-free expectation; of one module, so that environments of one size share its programs."""
    index, probability = p
    return jnp.sum(probability * v[index], axis=-1)


def test_transition_kinds_and_solvers_agree(mdp):
    large = mdp.n_states > 64
    rows = mdp.transitions
    written_out = rr.Dense(jnp.asarray(dense(mdp)))
    free = rr.MatrixFree(
        expect, n_states=mdp.n_states, n_actions=mdp.n_actions, parameters=(rows.indices, rows.probabilities)
    )
    direct, modified = rr.Newton(linear="direct"), rr.ModifiedPolicyIteration(20)
    # Of many states each kind and each solver once, not each by itself, and KL, of which programs are small.
    kinds = [(written_out, direct), (free, modified)] if large else [(written_out, None), (free, None)]
    solvers = [rr.Anderson(5)] if large else [modified, direct, rr.Anderson(5)]
    reg = rr.kl(BETAS[[1, 3, 5]]) if large else rr.alpha(alpha=ALPHAS[[1, 3, 5]], beta=BETAS[[1, 3, 5]])
    base = rr.solve(mdp, reg).raise_if_failed()
    for kind, solver in kinds:
        other = rr.solve(dataclasses.replace(mdp, transitions=kind), reg, solver).raise_if_failed()
        assert np.abs(np.asarray(other.value) - np.asarray(base.value)).max() <= 1e-10, (type(kind), solver)
    for solver in solvers:
        other = rr.solve(mdp, reg, solver, tol=TOL).raise_if_failed()
        assert (np.asarray(other.lower) <= np.asarray(base.upper)).all(), solver
        assert (np.asarray(other.upper) >= np.asarray(base.lower)).all(), solver


def test_float32_interval_contains_the_float64_value(mdp):
    alpha, beta = strengths(mdp)
    reg = rr.alpha(alpha=alpha, beta=beta)
    problem = with_discount(mdp, alternating(beta, 0.99, 0.999, 0.9999))
    truth = rr.solve(problem, reg).raise_if_failed()
    sol = rr.solve(to_float32(problem), to_float32(reg))
    assert sol.value.dtype == jnp.float32
    assert np.asarray(sol.converged).all(), np.asarray(sol.status)
    lower, upper = (np.asarray(x, np.float64) for x in (sol.lower, sol.upper))
    assert (lower <= np.asarray(truth.upper)).all() and (upper >= np.asarray(truth.lower)).all()
