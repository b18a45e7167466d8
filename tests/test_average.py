"""Average reward: against Newton's method in NumPy, a linear program, and values whose discount goes to 1."""

import dataclasses
import functools
from typing import Any

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import ACTIONS, STATES
from scipy.optimize import linprog

import robustreg as rr

ORDERS = np.array([-1.0, 0.5, 1.0, 1.5, 2.0, 3.0])
BETA = np.array([0.3, 30.0, 3.0, 1000.0, 1.0, 10.0])


def reference(P, reward, alpha, beta, prior):
    """Gain [*B], bias [*B,S] of mean 0 and policy [*B,S,A] by policy iteration, all of one batch shape."""
    reward = np.where(prior > 0, reward, 0)
    h, best = np.zeros(reward.shape[:-1]), np.full(reward.shape[:-2], np.inf)
    one = np.ones((h.shape[-1], h.shape[-1])) / h.shape[-1]
    for _ in range(40):
        q = reward + np.einsum("...sat,...t->...sa", P, h)
        value, policy = oracle.best_response(alpha[..., None], beta[..., None], prior, q)
        d = value - h
        best = np.minimum(best, np.ptp(d, axis=-1))
        system = np.eye(h.shape[-1]) - oracle.chain_of(P, policy) + one
        h = h + np.linalg.solve(system, d[..., None])[..., 0]
        h = h - h.mean(-1, keepdims=True)
    assert best.max() < 1e-10, best
    return 0.5 * (d.max(-1) + d.min(-1)), h, policy


@functools.cache
def stacked():
    """Cases of one recurrent class [6,1] against the orders [6], and the truth."""
    some = [cases.garnet_case(), cases.ring(), cases.grid(), cases.masked(), cases.ties(), cases.linked()]
    group = cases.stack(some)
    P, reward, prior = (np.repeat(x[:, None], 6, 1) for x in (group.P, group.reward, group.prior))
    return group, reference(P, reward, np.tile(ORDERS, (6, 1)), np.tile(BETA, (6, 1)), prior)


def problem(kind="dense", dtype: Any = np.float64, discount=0.9):
    group, _ = stacked()
    P = group.P[:, None].astype(dtype)
    m = rr.mdp(
        cases.dense(P, dtype) if kind == "dense" else cases.successors(P, dtype, STATES),
        group.reward[:, None].astype(dtype),
        discount,
        initial=group.initial[:, None].astype(dtype),
    )
    return m, rr.alpha(ORDERS.astype(dtype), BETA.astype(dtype), group.prior[:, None].astype(dtype))


@functools.cache
def solved():
    return rr.solve_average(*problem()).raise_if_failed()


def span(x):
    return np.ptp(np.asarray(x), axis=-1)


@pytest.mark.parametrize("kind", ["dense", "successors"])
def test_gains_biases_and_policies_are_those_of_policy_iteration(kind):
    group, (gain, bias, policy) = stacked()
    sol = solved() if kind == "dense" else rr.solve_average(*problem(kind)).raise_if_failed()
    assert sol.gain.shape == (6, 6) == sol.status.shape and sol.bias.shape == (6, 6, STATES)
    assert np.abs(sol.gain - gain).max() < 1e-12
    assert span(sol.bias - bias).max() < 1e-9 and np.abs((group.initial[:, None] * sol.bias).sum(-1)).max() < 1e-9
    assert np.abs(sol.policy - policy).max() < 1e-9
    assert (sol.lower <= gain + 1e-14).all() and (gain - 1e-14 <= sol.upper).all()
    assert (sol.upper - sol.lower).max() < 2e-12


def test_the_perturbation_is_the_worst_case_and_makes_indifferent():
    """`r - dr + P h - h` is the gain on the support, and `dr` is the worst case of the policy."""
    group, _ = stacked()
    sol, played = solved(), np.asarray(solved().policy) > 1e-6
    worst = np.asarray(rr.worst_case(problem()[1], sol.policy))
    assert np.abs(np.where(played, worst - sol.perturbation, 0)).max() < 1e-8
    ahead = np.einsum("...sat,...t->...sa", group.P[:, None], sol.bias)
    left = group.reward[:, None] - sol.perturbation + ahead - np.asarray(sol.bias)[..., None]
    assert np.abs(np.where(played, left - np.asarray(sol.gain)[..., None, None], 0)).max() < 1e-9
    assert (np.asarray(sol.perturbation)[3][:, group.prior[3] == 0] == 0).all()


def test_values_tend_to_it_as_the_discount_goes_to_1():
    """`V = gain/(1-g) + bias + const + O(1-g)`."""
    rest = 1e-6
    sol, slow = solved(), rr.solve(*problem(discount=1 - rest))
    fast = [0, 1, 2, 3, 4]  # the halves of the last case are linked by moves of probability 1/1024
    assert np.abs(rest * slow.objective - sol.gain)[fast].max() < 1e-5
    relative = np.asarray(slow.value - slow.objective[..., None])
    assert np.abs(relative - sol.bias)[fast].max() < 1e-4
    assert np.abs(rest * slow.objective - sol.gain).max() < 1e-3


def test_without_a_regulariser_it_is_the_stationary_linear_program():
    """`max <mu, r>` over stationary mu, from below, by at most what a weak regulariser costs."""
    group, _ = stacked()
    beta = 1e7
    m, _ = problem()
    weak = rr.solve_average(m, rr.alpha(ORDERS * 0 + 1.5, ORDERS * 0 + beta, group.prior[:, None]))
    for case, gain in zip(range(6), np.asarray(weak.gain)[:, 0]):
        allowed = group.prior[case] > 0
        flow = np.repeat(np.eye(STATES)[:, None], ACTIONS, 1) - group.P[case]  # [s,a,t]: in t, out of s
        equal = np.vstack([flow[allowed].T, np.ones(allowed.sum())])
        best = linprog(-group.reward[case][allowed], A_eq=equal, b_eq=np.eye(STATES + 1)[-1])
        assert best.status == 0
        cost = (group.prior[case][allowed].min() ** -0.5 - 1) / (1.5 * 0.5 * beta)
        assert -1e-9 < -best.fun - gain < cost + 1e-9


def test_cycles_do_not_matter():
    """Chains with a period, by themselves and where a policy chooses between them."""
    for n in (7, 300):
        P = np.zeros((n, 1, n))
        P[np.arange(n), 0, (np.arange(n) + 1) % n] = 1
        reward = np.random.default_rng(n).normal(size=(n, 1))
        sol = rr.solve_average(rr.mdp(P, reward, 0.9), rr.kl(1.0), tol=1e-10).raise_if_failed()
        assert abs(sol.gain - reward.mean()) < 1e-10
        assert np.abs(reward[:, 0] + np.roll(sol.bias, -1) - sol.bias - sol.gain).max() < 1e-9
    rng = np.random.default_rng(0)
    P = np.zeros((STATES, ACTIONS, STATES))
    for s, a in np.ndindex(STATES, ACTIONS):  # bipartite: every policy has period 2 or more
        P[s, a, (s + (1, STATES // 2 + 1, *rng.choice([3, 5, 7, 9, 11], 2))[a]) % STATES] = 1
    reward = cases.random_reward(rng, (STATES, ACTIONS))
    prior = np.full((6, STATES, ACTIONS), 1 / ACTIONS)
    gain, bias, policy = reference(P, np.tile(reward, (6, 1, 1)), ORDERS, BETA, prior)
    sol = rr.solve_average(rr.mdp(P, reward, 0.9), rr.alpha(ORDERS, BETA)).raise_if_failed()
    assert np.abs(sol.gain - gain).max() < 1e-11 and span(sol.bias - bias).max() < 1e-9


def test_float32_intervals_hold_the_truth():
    _, (gain, bias, _) = stacked()
    sol = rr.solve_average(*problem(dtype=np.float32))
    lower, upper = np.asarray(sol.lower, float), np.asarray(sol.upper, float)
    assert sol.gain.dtype == np.float32 and (lower <= gain).all() and (gain <= upper).all()
    size = 1 + np.abs(gain) + span(bias) + 1 / BETA
    assert (upper - lower < 100 * np.finfo(np.float32).eps * size).all()
    assert sol.converged.all()


def two():
    """Stay or move on between two states: who is sure of himself stays, and his chain falls apart."""
    P = np.zeros((2, 2, 2))
    P[:, 0], P[:, 1] = np.eye(2), np.eye(2)[::-1]
    return rr.mdp(P, np.array([[0.9, 0.0], [1.0, 0.0]]), 0.9, layout="sas")


def test_policies_whose_chains_fall_apart_are_passed_on_the_way():
    """Each state keeps to itself at first, with certainty in floating point; the best gain is that of the better."""
    beta = np.array([1.0, 10.0, 100.0, 1e3, 1e4, 1e6])
    for order in (1.0, 2.0, 3.0, 0.5):
        sol = rr.solve_average(two(), rr.alpha(order, beta)).raise_if_failed()
        assert (sol.upper - sol.lower).max() < 1e-8
        h = np.asarray(sol.bias)
        q = np.array([[0.9, 0.0], [1.0, 0.0]]) + np.stack([h, h[:, ::-1]], -1)
        value = oracle.conjugate(np.full((6, 2), order), beta[:, None], np.full(2, 0.5), q)
        assert np.abs(value - h - np.asarray(sol.gain)[:, None]).max() < 1e-8


def test_deterministic_moves_with_states_that_keep_to_themselves():
    """One way around all states, a way to stay, one at random: policy iteration alone needs hundreds of steps."""
    rng, lanes, n = np.random.default_rng(1), 12, 30
    P, reward = np.zeros((lanes, n, 3, n)), rng.normal(size=(lanes, n, 3))
    for b, s in np.ndindex(lanes, n):
        for a, t in enumerate(((s + 1) % n, s, rng.integers(n))):
            P[b, s, a, t] = 1
    sol = rr.solve_average(rr.mdp(P, reward, 0.9), rr.kl(10 ** rng.uniform(1, 4, lanes))).raise_if_failed()
    assert (sol.upper - sol.lower).max() < 1e-10 and (np.asarray(sol.steps) < 100).all()


def test_where_the_gain_depends_on_the_start_bounds_hold_all_of_them():
    """Twelve bandits: the smallest interval that is true of all, no claim to have converged, and no derivative."""
    case = cases.bandits()
    gains = oracle.conjugate(np.full(STATES, 1.0), 3.0, case.prior, case.reward)
    m = rr.mdp(case.P, case.reward, 0.9)
    sol = rr.solve_average(m, rr.kl(3.0))
    assert sol.status == rr.Status.STAGNATED
    assert abs(sol.lower - gains.min()) < 1e-9 and abs(sol.upper - gains.max()) < 1e-9
    assert sol.lower <= gains.min() + 1e-15 and gains.max() <= sol.upper + 1e-15
    with pytest.raises(rr.SolveError, match=r"gain in \[.*stopped shrinking.*depends on the start"):
        sol.raise_if_failed()
    # Who asks for no more gets it.
    loose = rr.solve_average(m, rr.kl(3.0), tol=0.51 * np.ptp(gains))
    assert loose.converged and loose.lower <= gains.min() and gains.max() <= loose.upper


def test_a_lane_of_nan_leaves_the_others_alone_and_discounts_do_not_matter():
    case = cases.garnet_case()
    beta, reward = np.array([0.5, 3.0, 20.0]), np.tile(case.reward, (3, 1, 1))
    m = rr.mdp(case.P, reward, np.linspace(0.1, 0.9, 3))
    good = rr.solve_average(m, rr.kl(beta, case.prior))
    spoilt = reward.copy()
    spoilt[1, 2, 3] = np.nan
    sol = rr.solve_average(dataclasses.replace(m, reward=jnp.asarray(spoilt)), rr.kl(beta, case.prior))
    assert sol.status.tolist() == [0, int(rr.Status.NONFINITE_INPUT), 0]
    for name in ("gain", "bias", "policy", "perturbation", "lower", "upper"):
        assert np.isnan(getattr(sol, name)[1]).all()
        np.testing.assert_array_equal(getattr(sol, name)[::2], getattr(good, name)[::2])
    five = rr.solve_average(rr.mdp(case.P, case.reward, np.linspace(0.1, 0.9, 5)), rr.kl(3.0, case.prior))
    assert five.gain.shape == () and abs(five.gain - good.gain[1]) < 1e-13


def test_one_program_for_all_numbers_and_a_function_for_transitions():
    case = cases.garnet_case()

    @jax.jit
    @chex.assert_max_traces(1)
    def run(m, beta, tol):
        return rr.solve_average(m, rr.kl(beta, case.prior), tol=tol)

    m = case.mdp(0.9, "matrix-free")
    for beta, tol in ((1.0, 1e-3), (2.0, 1e-6)):
        sol = run(m, jnp.asarray(beta), jnp.asarray(tol)).raise_if_failed()
        gain, _, _ = reference(case.P, case.reward, np.array(1.0), np.array(beta), case.prior)
        assert abs(sol.gain - gain) <= tol and 0 < sol.upper - sol.lower <= 2 * tol
    few = rr.solve_average(m, rr.kl(2.0, case.prior), max_steps=2)
    assert few.status == rr.Status.MAX_STEPS and few.lower <= gain <= few.upper and few.steps == 2
    # What is promised of the policy holds of it, however early it is.
    mu = np.linalg.matrix_power(oracle.chain_of(case.P, few.policy), 4096)[0]
    cost = oracle.divergence(np.full(STATES, 1.0), case.prior, few.policy) / 2.0
    earned = mu @ ((few.policy * case.reward).sum(-1) - cost)
    assert few.lower <= earned <= gain + 1e-12 and earned < gain - 1e-9


def test_available_is_a_mask_of_the_prior():
    case = cases.masked()
    there = case.prior > 0
    m = rr.mdp(case.P, np.where(there, case.reward, np.nan), 0.9, available=there)
    sol = rr.solve_average(m, rr.kl(3.0)).raise_if_failed()
    gain, _, policy = reference(case.P, case.reward, np.array(1.0), np.array(3.0), there / there.sum(-1, keepdims=True))
    assert abs(sol.gain - gain) < 1e-12 and np.abs(sol.policy - policy).max() < 1e-10


def test_what_is_refused():
    ends, m = cases.terminating().mdp(0.9), cases.garnet_case().mdp(0.9)
    wrong: Any = (
        ((ends, rr.kl(1.0)), {}, "the MDP has termination: its episodes end"),
        ((rr.kl(1.0), m), {}, "the first argument must be an MDP"),
        ((m, rr.kl(1.0)), {"tol": -1.0}, "tol must be positive"),
        ((m, rr.kl(1.0)), {"max_steps": 0}, "max_steps must be at least 1"),
        ((m, rr.kl(np.ones(STATES))), {}, "reads in two ways"),
    )
    for arguments, options, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            rr.solve_average(*arguments, **options)


def test_files(tmp_path):
    sol = rr.solve_average(two(), rr.kl(np.arange(1.0, 7.0)))
    chex.assert_trees_all_equal(rr.load(rr.save(tmp_path / "sol", sol)), sol)
