"""Discounts of 1 where episodes end, against absorbing-chain algebra and Newton's method in NumPy.

Two classes of problems: those in which every policy ends, and those in which only some do (a wall to bump into), whose
certificate is another one. All have 12 states and 4 actions, so that one program serves most tests.
"""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import cases
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from numpy.typing import DTypeLike

import robustreg as rr
from robustreg.problems import endless_states
from robustreg.solvers import bound_problem

S, A = cases.STATES, cases.ACTIONS
ALPHA = np.array([1.0, 1.0, 1.0, 0.5, 1.5, 2.0, 0.0, 3.0])
BETA = np.array([1.0, 0.1, 20.0, 1.0, 2.0, 1.0, 3.0, 0.5])


def garnet(seed):
    """A random chain that ends now and then, in some states and actions only."""
    P, rng = cases.garnet(seed), np.random.default_rng(seed)
    end = rng.choice([0.0, 0.25, 0.5], (S, A))
    end[:, 0] = 0.125
    end[seed % S] = 0.5
    return P * (1 - end)[..., None], end


def corridor():
    """Deterministic, every action leads on: the k-th state takes 12 - k steps to the end."""
    P, end = np.zeros((S, A, S)), np.zeros((S, A))
    for s in range(S - 1):
        P[s, :, s + 1] = 1
    P[2, 1, 2], P[2, 1, 5] = 0, 1
    P[2, 1, 3] = 0
    end[S - 1] = 1
    return P, end


def walled():
    """A walk to the right end; action 0 stays where it is, action 1 goes left: neither need ever end."""
    P, end = np.zeros((S, A, S)), np.zeros((S, A))
    for s in range(S):
        P[s, 0, s] = 1
        P[s, 1, max(s - 1, 0)] = 1
        for a in (2, 3):
            if s == S - 1:
                end[s, a] = 1
            else:
                P[s, a, s + 1] = 1 if a == 2 else 0.5
                P[s, a, s] = 0 if a == 2 else 0.5
    return P, end


# The first three of the stack end whatever is done, in the fourth some policies go on forever.
PROPER, WALLED = 3, 3


@functools.cache
def stack():
    """Four problems, `[4, ...]`: rewards of both signs, and where one may stay, of one sign."""
    Ps, ends = zip(garnet(1), garnet(2), corridor(), walled())
    reward = np.stack([cases.random_reward(np.random.default_rng(i), (S, A)) for i in range(4)])
    reward[WALLED] = -1 + reward[WALLED] / 64
    return np.stack(Ps), np.stack(ends), reward


def problem(P, end, reward, discount=(1.0,) * 8, dtype: DTypeLike = np.float64):
    """Problems `[4, 1]` with discounts `[8]`."""
    P, end, reward = (x[:, None].astype(dtype) for x in (P, end, reward))
    return rr.mdp(rr.Dense(jnp.asarray(P)), jnp.asarray(reward), list(discount), termination=end)


def regulariser(dtype: DTypeLike = np.float64, prior=None):
    """Eight of them; with a prior always, so that one program serves all."""
    prior = np.full((S, A), 1 / A) if prior is None else prior
    return rr.alpha(alpha=ALPHA.astype(dtype), beta=BETA.astype(dtype), prior=prior.astype(dtype))


def newton(P, reward, discount, alpha, beta, prior=None):
    """Policy iteration with dense solves from the value of the prior, one problem."""
    prior = np.full(reward.shape, 1 / A) if prior is None else prior
    policy, cost = prior, np.zeros(len(reward))
    reward = np.where(prior > 0, reward, 0)
    for _ in range(60):
        value = oracle.evaluate(P, reward, discount, policy, cost)
        policy = oracle.best_response(alpha, beta, prior, reward + discount * (P @ value))[1]
        cost = oracle.divergence(np.full(len(reward), alpha), prior, policy) / beta
    return value, policy


@pytest.fixture(scope="module")
def solved():
    m, reg = problem(*stack()), regulariser()
    return m, reg, rr.solve(m, reg).raise_if_failed()


@functools.cache
def truth():
    """Value and policy of every lane, `[4, 8, ...]`."""
    P, _, reward = stack()
    pairs = [[newton(P[i], reward[i], 1.0, *lane) for lane in zip(ALPHA, BETA)] for i in range(4)]
    return np.array([[v for v, _ in row] for row in pairs]), np.array([[p for _, p in row] for row in pairs])


def test_values_are_those_of_dense_algebra(solved):
    value, policy = truth()
    _, _, sol = solved
    size = 1 + np.abs(value).max(-1, keepdims=True)
    assert (np.abs(np.asarray(sol.value) - value) <= 1e-10 * size).all()
    assert np.abs(np.asarray(sol.policy) - policy).max() <= 1e-7
    assert (np.asarray(sol.lower) <= value + 1e-12 * size).all()
    assert (np.asarray(sol.upper) >= value - 1e-12 * size).all()
    assert np.asarray(sol.gap).max() <= 1e-9


def test_a_tolerance_is_met(solved):
    m, reg, _ = solved
    value, _ = truth()
    sol = rr.solve(m, reg, tol=1e-4).raise_if_failed()
    assert np.asarray(sol.gap).max() <= 2e-4
    assert (np.asarray(sol.lower) <= value).all() and (np.asarray(sol.upper) >= value).all()


def test_evaluation_occupancy_and_certificate(solved):
    P, _, reward = stack()
    m, reg, sol = solved
    policy, one = np.asarray(sol.policy), np.ones((4, 8))
    visits, start = np.asarray(rr.occupancy(m, policy)), np.full(S, 1 / S)
    expected = oracle.occupancy(P[:, None], start, one, policy)
    assert (np.abs(visits - expected) <= 1e-10 * expected.sum((-1, -2), keepdims=True)).all()
    # As many as an episode has steps.
    steps = np.linalg.solve(np.eye(S) - oracle.chain_of(P[:, None], policy), np.ones((4, 8, S, 1)))[..., 0]
    assert np.abs(visits.sum((-1, -2)) / steps.mean(-1) - 1).max() <= 1e-10
    plain, own = rr.evaluate(m, policy), rr.evaluate(m, policy, reg)
    assert np.abs(np.asarray(plain) - oracle.evaluate(P[:, None], reward[:, None], one, policy)).max() <= 1e-9
    assert np.abs(np.asarray(own - sol.value)).max() <= 1e-9
    proof = rr.certify(m, reg, sol).raise_if_loose(np.asarray(sol.tol) + 1e-8)
    assert np.asarray(proof.gap).max() <= 1e-8
    best = np.asarray(rr.nominal_optimum(m))[:, 0]
    for i in range(PROPER):
        assert np.abs(best[i] - oracle.optimal_value(P[i], reward[i], 1.0)).max() <= 1e-9
    # Where policy iteration from any policy would not do, sweeps do.
    assert np.abs(best[WALLED] - oracle.value_iteration(P[WALLED], reward[WALLED], 1.0, 200)).max() <= 1e-9
    # A policy that stays has no value.
    stay = np.broadcast_to(np.eye(A)[0], policy.shape)
    for x in (rr.evaluate(m, stay), rr.occupancy(m, stay)):
        assert np.isnan(np.asarray(x)[WALLED]).all() and np.isfinite(np.asarray(x)[:PROPER]).all()


def test_the_horizon_is_the_longest_any_policy_takes(solved):
    P, _, _ = stack()
    m, reg, _ = solved

    @jax.jit
    def bounds(m, reg):
        bound = bound_problem.bind(m, reg)
        return bound.horizon, bound.proved

    found, proved = (np.asarray(x)[:, 0] for x in bounds(m, reg))
    assert proved.tolist() == [True, True, True, False] and np.isinf(found[WALLED])
    longest = [oracle.optimal_value(P[i], np.ones((S, A)), 1.0).max() for i in range(PROPER)]
    assert (longest <= found[:PROPER]).all() and (found[:PROPER] <= 2 * np.array(longest)).all()
    assert longest[-1] == S  # the corridor


def test_discounts_of_one_among_others(solved):
    """Lanes of a mixed batch are right, and one lane changes no bit of another."""
    P, _, reward = stack()
    _, reg, sol = solved
    g = [0.9, 1.0, 0.99, 1.0, 0.5, 1.0, 0.999, 1.0]
    mixed = rr.solve(problem(*stack(), g), reg).raise_if_failed()
    for name in ("value", "policy", "lower", "upper", "steps"):
        a, b = (np.asarray(getattr(x, name))[:, 1::2] for x in (mixed, sol))
        assert (a == b).all(), name
    for i in range(4):
        for k in range(0, 8, 2):
            value, _ = newton(P[i], reward[i], g[k], ALPHA[k], BETA[k])
            assert np.abs(np.asarray(mixed.value[i, k]) - value).max() <= 1e-9


def test_where_staying_pays_there_is_no_value(solved):
    P, end, reward = stack()
    paid = reward.copy()
    paid[WALLED] += 2
    sol = rr.solve(problem(P, end, paid), regulariser())
    assert np.asarray(sol.converged)[:PROPER].all() and not np.asarray(sol.converged)[WALLED].any()
    width = np.asarray(sol.upper - sol.lower)[WALLED]
    assert (np.isnan(width) | np.isinf(width)).all()
    # Unless a prior leaves only what leads on, which need not be a single action.
    leads = np.broadcast_to([0.0, 0.0, 0.25, 0.75], (S, A))
    sol = rr.solve(problem(P, end, paid), regulariser(prior=leads)).raise_if_failed()
    value, _ = newton(P[WALLED], paid[WALLED], 1.0, ALPHA[0], BETA[0], leads)
    assert np.abs(np.asarray(sol.value[WALLED, 0]) - value).max() <= 1e-9
    # Or only what does not.
    lost = rr.solve(problem(P, end, reward), regulariser(prior=leads[:, ::-1].copy()))
    assert (np.asarray(lost.status)[WALLED] == rr.Status.NONFINITE_INPUT).all()
    assert np.isnan(np.asarray(lost.value)[WALLED]).all()
    with pytest.raises(rr.SolveError, match="endless_states"):
        lost.raise_if_failed()


def test_available_decides():
    """What is not available is not among the policies that have to end."""
    P, end = walled()
    reward = cases.random_reward(np.random.default_rng(4), (S, A))
    available = np.ones((S, A), bool)
    available[:, :2] = False
    masked = rr.mdp(rr.Dense(jnp.asarray(P)), reward, 1.0, termination=end, available=available)
    assert not endless_states(masked).any()
    sol = rr.solve(masked, rr.kl(2.0)).raise_if_failed()
    value, _ = newton(P, reward, 1.0, 1.0, 2.0, np.broadcast_to([0.0, 0.0, 0.5, 0.5], (S, A)))
    assert np.abs(np.asarray(sol.value) - value).max() <= 1e-9


def test_float32_intervals_hold_the_truth(solved):
    value, _ = truth()
    sol = rr.solve(problem(*stack(), dtype=np.float32), regulariser(np.float32))
    assert sol.value.dtype == jnp.float32
    good = np.asarray(sol.converged)
    assert good[:PROPER].all() and good[WALLED].sum() >= 6, good[WALLED]
    lower, upper = (np.asarray(x, float)[good] for x in (sol.lower, sol.upper))
    # (Rewards of the walled problem are rounded to float32 themselves: by nothing, as binary fractions.)
    assert (lower <= value[good] + 1e-9).all() and (upper >= value[good] - 1e-9).all()


def test_gradients(solved):
    m, reg, sol = solved

    def objective(reward, beta):
        return rr.solve(dataclasses.replace(m, reward=reward), dataclasses.replace(reg, beta=beta)).objective

    def total(reward, beta):
        x = objective(reward, beta)
        return x.sum(), x

    dr, dbeta = jax.jit(jax.grad(total, (0, 1), has_aux=True))(m.reward, reg.beta)[0]
    visits = np.asarray(rr.occupancy(m, sol.policy)).sum(1)
    assert np.abs(np.asarray(dr)[:, 0] - visits).max() <= 1e-8 * visits.max()
    for k in (0, 3, 5):
        step = 1e-5 * np.eye(8)[k] * BETA
        up, down = (
            np.asarray(rr.solve(m, dataclasses.replace(reg, beta=reg.beta + t * step)).objective) for t in (1, -1)
        )
        assert (up - down).sum() / (2e-5 * BETA[k]) == pytest.approx(float(dbeta[k]), rel=1e-5)


def test_improper_problems_are_named():
    P, end = walled()
    P[S - 1, :, :], P[S - 1, :, S - 1] = 0, 1
    end[S - 1], end[0] = 0, 0.5
    P[0] *= 0.5
    P[5, :], P[5, :, 6] = 0, 1
    with pytest.raises(ValueError, match=re.escape("discount is 1, but no episode that comes to states[s=5]")):
        rr.mdp(rr.Dense(jnp.asarray(P)), -np.ones((S, A)), 1.0, termination=end)
    P, end, _ = (x[:PROPER] for x in stack())
    Q = P.copy()
    Q[1, 7], Q[1, 7, :, 7] = 0, 1
    ends = end.copy()
    ends[1, 7] = 0
    with pytest.raises(ValueError, match=re.escape("states[lane=1, s=7]")):
        rr.mdp(rr.Dense(jnp.asarray(Q)), np.zeros((S, A)), 1.0, termination=ends)
    fine = rr.mdp(rr.Dense(jnp.asarray(Q)), np.zeros((S, A)), 0.99, termination=ends)
    with pytest.raises(ValueError, match="no episode"):
        fine.replace(discount=1.0)
    with pytest.raises(ValueError, match="must lie in"):
        rr.mdp(cases.dense(cases.garnet(1), np.float64), np.zeros((S, A)), 1.0)
    assert np.asarray(endless_states(fine))[1, 7] and not np.asarray(endless_states(fine))[0].any()


def test_traced_lanes_that_never_end():
    """Inside jit nobody can look: a status and NaN, in the lanes concerned alone."""
    P, end, reward = (x[:PROPER].copy() for x in stack())
    P[1, 7], P[1, 7, :, 7] = 0, 1
    end[1, 7] = 0

    @jax.jit
    def inside(P, end, discount):
        m = rr.mdp(rr.Dense(P), jnp.asarray(reward), discount, termination=end)
        sol = rr.solve(m, rr.kl(1.0))
        return sol.status, sol.value

    status, value = inside(P, end, jnp.ones(3))
    assert status.tolist() == [0, int(rr.Status.NONFINITE_INPUT), 0]
    assert np.isnan(value[1]).all() and np.isfinite(value[::2]).all()
    status, value = inside(P, end, jnp.array([1.0, 0.99, 1.0]))
    assert status.tolist() == [0, 0, 0]
    # No termination at all.
    never = jax.jit(
        lambda g: rr.solve(rr.mdp(rr.Dense(jnp.asarray(cases.garnet(1))), jnp.asarray(reward[0]), g), rr.kl(1.0))
    )
    assert int(never(1.0).status) == rr.Status.NONFINITE_INPUT


def test_sweeps_take_a_discount_of_one(solved):
    P, end, reward = stack()
    m = rr.mdp(rr.Dense(jnp.asarray(P[0])), reward[0], 0.9, termination=end[0])
    table = rr.sweep(m, rr.kl(1.0), {"beta": [0.1, 1.0], "discount": [0.9, 1.0]}, outputs=("objective", "status"))
    assert (table.columns["status"] == 0).all()
    assert table.columns["objective"][:, 1] == pytest.approx(np.asarray(solved[2].objective)[0, 1::-1], abs=1e-9)
    with pytest.raises(ValueError, match="must lie in"):
        rr.sweep(rr.problems.garnet(S, A, 3), rr.kl(1.0), {"discount": [1.0]})


@pytest.mark.slow
def test_gymnasium():
    """Three tables in one batch, padded to the largest, each under four regularisers."""
    names = ("FrozenLake-v1", "CliffWalking-v1", "Taxi-v4")
    problems = [rr.from_gymnasium(gymnasium.make(name), discount=1.0) for name in names]
    for name, m in zip(names, problems):
        assert endless_states(m).any(), name
    lanes = [(1.0, 1.0), (1.0, 10.0), (0.5, 10.0), (2.0, 10.0)]
    pairs = [(i, *lane) for i in range(3) for lane in lanes]
    stacked = rr.stack([(problems[i], rr.alpha(alpha, beta)) for i, alpha, beta in pairs])
    sol = rr.solve(stacked.mdp, stacked.reg, tol=1e-7).raise_if_failed()
    rr.certify(stacked.mdp, stacked.reg, sol).raise_if_loose(2e-7)
    assert np.asarray(sol.gap).max() <= 2e-7
    values = np.asarray(sol.value)
    for (i, alpha, beta), padded in zip(pairs, values):
        m = problems[i]
        kernel: Any = m.transitions
        value = padded[: m.n_states]
        ahead = (np.asarray(kernel.probabilities) * value[np.asarray(kernel.indices)]).sum(-1)
        prior = np.full(ahead.shape, 1 / ahead.shape[1])
        again = oracle.conjugate(
            np.full(len(ahead), alpha), np.full(len(ahead), beta), prior, np.asarray(m.reward) + ahead
        )
        assert np.abs(again - value).max() <= 1e-7, (names[i], alpha, beta)


def test_icu_sepsis_has_its_published_returns():
    """716 states, 25 actions, no discount [Choudhary et al. 2024]: the optimum and the random policy."""
    # (Its data alone: importing it brings gym, which warns.)
    spec = importlib.util.find_spec("icu_sepsis")
    if spec is None or spec.origin is None:
        pytest.skip("icu-sepsis is not installed (extra: bench)")
    data = np.load(Path(spec.origin).parent / "envs" / "assets" / "dynamics.npz")
    P, initial = data["tx_mat"], data["d_0"]
    reward = (P * data["r_mat"]).sum(-1)
    over = (np.diagonal(P, axis1=0, axis2=2) == 1).all(0)  # one absorbing state, in which nothing is earned
    P, end = np.where(over[:, None, None], 0, P), np.repeat(over[:, None] * 1.0, 25, 1)
    m = rr.mdp(P, reward, 1.0, termination=end, initial=initial, normalise=False)
    best = rr.solve(m, None, tol=1e-9).raise_if_failed()
    assert round(float(best.objective), 5) == 0.87514
    assert round(float(m.initial @ rr.evaluate(m, np.full((716, 25), 1 / 25))), 5) == 0.78007
    # Against the worst case of a regulariser: between the two, and what the perturbed reward gives.
    sol = rr.solve(m, rr.kl(100.0), tol=1e-9).raise_if_failed()
    assert 0.78007 < float(sol.objective) < 0.87514
    rr.certify(m, rr.kl(100.0), sol).raise_if_loose(1e-8)
    attacked = rr.evaluate(m, sol.policy, reward=m.reward - sol.perturbation)
    np.testing.assert_allclose(m.initial @ attacked, sol.objective, rtol=1e-9)
