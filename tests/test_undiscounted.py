"""Discounts of 1 where episodes end, against absorbing-chain algebra and Newton's method in NumPy.

Two classes of problems: those in which every policy ends, and those in which only some do (a wall to bump into), whose
certificate is another one. All have 12 states and 4 actions, so that one program serves most tests.
"""

import dataclasses
import re

import cases
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import robustreg as rr
from robustreg.problems import endless_states
from robustreg.solvers import bellman

S, A = cases.STATES, cases.ACTIONS
ALPHA = np.array([1.0, 1.0, 1.0, 0.5, 1.5, 2.0, 0.0, 3.0])
BETA = np.array([1.0, 0.1, 20.0, 1.0, 2.0, 1.0, 3.0, 0.5])
KEEP = np.full((S, A), 1.0)


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


def proper():
    """Three problems in which every policy ends, `[3, ...]`, with rewards of both signs."""
    Ps, ends = zip(garnet(1), garnet(2), corridor())
    reward = np.stack([cases.random_reward(np.random.default_rng(i), (S, A)) for i in range(3)])
    return np.stack(Ps), np.stack(ends), reward


def problem(P, end, reward, discount, lanes=(), dtype=np.float64):
    expand = (slice(None),) + (None,) * len(lanes) if P.ndim == 4 else ()
    P, end, reward = (x[expand].astype(dtype) for x in (P, end, reward))
    return rr.mdp(rr.Dense(jnp.asarray(P)), reward, discount, termination=end)


def regulariser(dtype=np.float64):
    return rr.alpha(alpha=ALPHA.astype(dtype), beta=BETA.astype(dtype))


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
    P, end, reward = proper()
    m, reg = problem(P, end, reward, 1.0, (1,)), regulariser()
    return P, end, reward, m, reg, rr.solve(m, reg).raise_if_failed()


def test_values_are_those_of_dense_algebra(solved):
    P, _, reward, _, _, sol = solved
    for i in range(3):
        for k, (alpha, beta) in enumerate(zip(ALPHA, BETA)):
            value, policy = newton(P[i], reward[i], 1.0, alpha, beta)
            assert np.abs(np.asarray(sol.value[i, k]) - value).max() <= 1e-9
            assert np.abs(np.asarray(sol.policy[i, k]) - policy).max() <= 1e-8
            assert (np.asarray(sol.lower[i, k]) <= value).all() and (np.asarray(sol.upper[i, k]) >= value).all()
    assert np.asarray(sol.gap).max() <= 1e-10


def test_evaluation_occupancy_and_certificate(solved):
    P, _, reward, m, reg, sol = solved
    policy = np.asarray(sol.policy)
    visits = np.asarray(rr.occupancy(m, policy))
    start = np.full(S, 1 / S)
    for i in range(3):
        for k in range(len(ALPHA)):
            expected = oracle.occupancy(P[i], start, np.float64(1), policy[i, k])
            assert np.abs(visits[i, k] - expected).max() <= 1e-10 * expected.sum()
            # As many steps as an episode has on average.
            steps = np.linalg.solve(np.eye(S) - oracle.chain_of(P[i], policy[i, k]), np.ones(S)).mean()
            assert visits[i, k].sum() == pytest.approx(steps, rel=1e-10)
    plain, own = rr.evaluate(m, policy), rr.evaluate(m, policy, reg)
    assert np.abs(np.asarray(plain) - oracle.evaluate(P[:, None], reward[:, None], np.float64(1), policy)).max() <= 1e-9
    assert np.abs(np.asarray(own - sol.value)).max() <= 1e-9
    proof = rr.certify(m, reg, sol).raise_if_loose(np.asarray(sol.tol) + 1e-9)
    assert np.asarray(proof.gap).max() <= 1e-9
    best = rr.nominal_optimum(m)[:, 0]
    for i in range(3):
        assert np.abs(np.asarray(best[i]) - oracle.optimal_value(P[i], reward[i], 1.0)).max() <= 1e-9
    kept = rr.guarantee(m, reg, sol.policy, m.reward - sol.perturbation)
    assert np.asarray(jnp.abs(kept.actual - kept.guaranteed)).max() <= 1e-8


def test_the_horizon_is_the_longest_any_policy_takes(solved):
    P, _, _, m, reg, _ = solved
    found = np.asarray(bellman.bind(m, reg).horizon).ravel()
    for i in range(3):
        longest = oracle.optimal_value(P[i], np.ones((S, A)), 1.0).max()
        assert longest <= found[i] <= 1.2 * longest
    assert longest == S  # the corridor


def test_discounts_of_one_among_others(solved):
    """A lane is the same bit for bit in company, and lanes below 1 are those of a batch without a 1."""
    P, end, reward, _, _, sol = solved
    reg = rr.kl(1.0)
    g = [0.9, 1.0, 0.99]
    mixed = rr.solve(problem(P, end, reward, g, (1,)), reg).raise_if_failed()
    assert np.abs(np.asarray(mixed.value[:, 1] - sol.value[:, 0])).max() <= 1e-10
    for i in range(3):
        for k, discount in enumerate(g):
            value, _ = newton(P[i], reward[i], discount, 1.0, 1.0)
            assert np.abs(np.asarray(mixed.value[i, k]) - value).max() <= 1e-9
    without = rr.solve(problem(P, end, reward, [0.9, 0.95, 0.99], (1,)), reg)
    for name in ("value", "lower", "upper", "steps"):
        assert (np.asarray(getattr(mixed, name)[:, ::2]) == np.asarray(getattr(without, name)[:, ::2])).all(), name


def test_close_to_one_tends_to_one(solved):
    P, end, reward, *_, sol = solved
    near = rr.solve(problem(P, end, reward, [1 - 1e-9], (1,)), rr.kl(1.0)).raise_if_failed()
    assert np.abs(np.asarray(near.value[:, 0] - sol.value[:, 0])).max() <= 1e-6


def test_walls_only_some_policies_end():
    """The regularised optimum with a certificate of its own, and everything that is computed of it."""
    P, end = walled()
    reward = -np.ones((S, A)) + 0.25 * cases.random_reward(np.random.default_rng(4), (S, A)) / 8
    m, reg = problem(P, end, reward, 1.0), regulariser()
    assert endless_states(m).all() and not endless_states(m, rr.kl(1.0, prior=np.array([0, 0, 0.5, 0.5]))).any()
    sol = rr.solve(m, reg).raise_if_failed()
    loose = rr.solve(m, reg, tol=1e-4).raise_if_failed()
    for k, (alpha, beta) in enumerate(zip(ALPHA, BETA)):
        value, policy = newton(P, reward, 1.0, alpha, beta)
        assert np.abs(np.asarray(sol.value[k]) - value).max() <= 1e-9 * np.abs(value).max()
        for found in (sol, loose):
            assert (np.asarray(found.lower[k]) <= value).all() and (np.asarray(found.upper[k]) >= value).all()
        assert rr.occupancy(m, policy).sum() == pytest.approx(
            np.linalg.solve(np.eye(S) - oracle.chain_of(P, policy), np.ones(S)).mean(), rel=1e-9
        )
    assert np.asarray(sol.gap).max() <= 1e-8 and np.asarray(loose.gap).max() <= 2e-4
    rr.certify(m, reg, sol).raise_if_loose(np.asarray(sol.tol) + 1e-8)
    assert np.abs(np.asarray(rr.nominal_optimum(m)) - oracle.value_iteration(P, reward, 1.0, 200)).max() <= 1e-9
    # A policy that stays has no value.
    stay = np.eye(A)[np.zeros(S, int)]
    assert np.isnan(np.asarray(rr.evaluate(m, stay))).all() and np.isnan(np.asarray(rr.occupancy(m, stay))).all()
    # Where staying pays, nobody comes to an end: no value, and it says so.
    lost = rr.solve(problem(P, end, reward + 2, 1.0), reg)
    assert not np.asarray(lost.converged).any()
    shown = np.asarray(lost.upper - lost.lower)
    assert (np.isnan(shown) | np.isinf(shown)).all()
    # The explicit play wants every policy to end.
    game = rr.solve_game(m, rr.kl(1.0), steps=1)
    assert int(game.status) == rr.Status.NONFINITE_INPUT and np.isnan(float(game.primal))


def test_masks_decide():
    """What is masked, by `available` or by a prior, is not among the policies that have to end."""
    P, end = walled()
    reward = cases.random_reward(np.random.default_rng(4), (S, A))  # of any sign: staying could pay
    available = np.ones((S, A), bool)
    available[:, :2] = False
    prior = np.broadcast_to([0.0, 0.0, 0.25, 0.75], (S, A))
    masked = rr.mdp(rr.Dense(jnp.asarray(P)), reward, 1.0, termination=end, available=available)
    by_prior = rr.solve(problem(P, end, reward, 1.0), rr.kl(2.0, prior=prior)).raise_if_failed()
    by_mask = rr.solve(masked, rr.kl(2.0, prior=prior)).raise_if_failed()
    value, _ = newton(P, reward, 1.0, 1.0, 2.0, prior)
    for sol in (by_prior, by_mask):
        assert np.abs(np.asarray(sol.value) - value).max() <= 1e-9
    # Without: no policy inside the mask ends.
    wrong = np.broadcast_to([0.5, 0.5, 0.0, 0.0], (S, A))
    lost = rr.solve(problem(P, end, reward, 1.0), rr.kl(2.0, prior=wrong))
    assert int(lost.status) == rr.Status.NONFINITE_INPUT and np.isnan(np.asarray(lost.value)).all()
    with pytest.raises(rr.SolveError, match="endless_states"):
        lost.raise_if_failed()


def test_float32_intervals_hold_the_truth(solved):
    P, end, reward, *_, sol = solved
    single = rr.solve(problem(P, end, reward, 1.0, (1,), np.float32), regulariser(np.float32))
    assert single.value.dtype == jnp.float32 and np.asarray(single.converged).all()
    value = np.asarray(sol.value)
    assert (np.asarray(single.lower, float) <= value + 1e-9).all()
    assert (np.asarray(single.upper, float) >= value - 1e-9).all()
    assert (np.asarray(single.gap) <= 1e-3 * (1 + np.abs(value).max(-1) + 1 / BETA)).all()
    walls, ends = walled()
    one = problem(walls, ends, -np.ones((S, A)), 1.0)
    truth = rr.solve(one, regulariser()).raise_if_failed()
    single = rr.solve(problem(walls, ends, -np.ones((S, A)), 1.0, (), np.float32), regulariser(np.float32))
    ok = np.asarray(single.converged)
    assert ok.sum() >= 6
    assert (np.asarray(single.lower, float)[ok] <= np.asarray(truth.upper)[ok]).all()
    assert (np.asarray(single.upper, float)[ok] >= np.asarray(truth.lower)[ok]).all()


@pytest.mark.parametrize("make", [lambda: garnet(3), walled], ids=["proper", "walled"])
def test_gradients(make):
    P, end = make()
    reward = -0.5 + cases.random_reward(np.random.default_rng(5), (S, A)) / 32
    m, reg = problem(P, end, reward, 1.0), rr.alpha(np.array([1.0, 1.5]), np.array([2.0, 1.0]))

    def objective(reward, beta, P):
        mdp = dataclasses.replace(m, reward=reward, transitions=rr.Dense(P))
        return rr.solve(mdp, dataclasses.replace(reg, beta=beta)).objective.sum()

    leaves = (m.reward, reg.beta, m.transitions.probabilities)
    value, grads = jax.jit(jax.value_and_grad(objective, (0, 1, 2)))(*leaves)
    visits = np.asarray(rr.occupancy(m, rr.solve(m, reg).policy)).sum(0)
    assert np.abs(np.asarray(grads[0]) - visits).max() <= 1e-8 * visits.sum()
    rng = np.random.default_rng(6)
    for i in (0, 1):
        way = rng.normal(size=np.shape(leaves[i]))
        moved = [[x + t * way if i == j else x for j, x in enumerate(leaves)] for t in (1e-5, -1e-5)]
        slope = (objective(*moved[0]) - objective(*moved[1])) / 2e-5
        assert float(jnp.vdot(grads[i], way)) == pytest.approx(float(slope), rel=1e-5)
    expected = np.asarray(rr.solve(m, reg).value)
    closed = np.einsum("bsa,bt->sat", np.asarray(rr.occupancy(m, rr.solve(m, reg).policy)), expected)
    for s, a, t in ((0, 0, 1), (3, 2, 4)):
        assert float(grads[2][s, a, t]) == pytest.approx(
            sum(float(v[s, a]) * e[t] for v, e in zip(rr.occupancy(m, rr.solve(m, reg).policy), expected)), rel=1e-7
        )
    assert closed.shape == grads[2].shape and np.isfinite(float(value))


def test_improper_problems_are_named():
    P, end = walled()
    P[5, :, :], end[5] = 0, 0
    P[5, :, 5] = 1
    with pytest.raises(ValueError, match=re.escape("discount is 1, but no episode that comes to states[s=5]")):
        rr.mdp(rr.Dense(jnp.asarray(P)), -np.ones((S, A)), 1.0, termination=end)
    P, end, _ = proper()
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
    with pytest.raises(ValueError, match="must lie in"):
        problem(P, end, np.zeros((3, S, A)), 1.0).replace(termination=np.zeros(S))
    assert np.asarray(endless_states(fine))[1, 7] and not np.asarray(endless_states(fine))[0].any()


def test_traced_lanes_that_never_end():
    """Inside jit nobody can look: a status and NaN, in the lanes concerned alone."""
    P, end, reward = proper()
    P[1, 7], P[1, 7, :, 7] = 0, 1
    end[1, 7] = 0

    @jax.jit
    def inside(P, end, discount):
        m = rr.mdp(rr.Dense(P), jnp.asarray(reward), discount, termination=end)
        sol = rr.solve(m, rr.kl(1.0))
        return sol.status, sol.value, rr.evaluate(m, jnp.full((S, A), 1 / A))

    status, value, plain = inside(P, end, jnp.ones(3))
    assert status.tolist() == [0, int(rr.Status.NONFINITE_INPUT), 0]
    assert np.isnan(value[1]).all() and np.isnan(plain[1]).all() and np.isfinite(value[::2]).all()
    status, value, _ = inside(P, end, jnp.array([1.0, 0.99, 1.0]))
    assert status.tolist() == [0, 0, 0]
    # No termination at all.
    never = jax.jit(lambda g: rr.solve(rr.mdp(rr.Dense(cases.garnet(1)), jnp.asarray(reward[0]), g), rr.kl(1.0)))
    assert int(never(1.0).status) == rr.Status.NONFINITE_INPUT


def test_sweeps_take_a_discount_of_one(solved):
    P, end, reward, _, _, sol = solved
    m = problem(P[0], end[0], reward[0], 0.9)
    table = rr.sweep(m, rr.kl(1.0), {"beta": [0.1, 1.0], "discount": [0.9, 1.0]}, outputs=("objective", "status"))
    assert (table.columns["status"] == 0).all()
    found = table.columns["objective"]
    assert found[1, 1] == pytest.approx(float(sol.objective[0, 0]), abs=1e-9)
    with pytest.raises(ValueError, match="must lie in"):
        rr.sweep(rr.problems.garnet(S, A, 3), rr.kl(1.0), {"discount": [1.0]})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FrozenLake-v1", "CliffWalking-v1", "Taxi-v4"])
def test_gymnasium(name):
    m = rr.from_gymnasium(gymnasium.make(name), discount=1.0)
    assert endless_states(m).any()
    reg = rr.alpha(np.array([1.0, 1.0, 0.5, 2.0]), np.array([1.0, 10.0, 10.0, 10.0]))
    sol = rr.solve(m, reg, tol=1e-7).raise_if_failed()
    rr.certify(m, reg, sol).raise_if_loose(2e-7)
    assert np.asarray(sol.gap).max() <= 2e-7
    index, chance = np.asarray(m.transitions.indices), np.asarray(m.transitions.probabilities)
    value = np.asarray(sol.value)
    for k, (alpha, beta) in enumerate(zip(*(np.asarray(x) for x in (reg.alpha, reg.beta)))):
        ahead = (chance * value[k][index]).sum(-1)
        prior = np.full(ahead.shape, 1 / ahead.shape[1])
        again = oracle.conjugate(np.full(len(ahead), alpha), np.full(len(ahead), beta), prior, np.asarray(m.reward) + ahead)
        assert np.abs(again - value[k]).max() <= 1e-7
