"""The adversary: guarantee, tightness, indifference, minimax, and the symmetries of the value.

Solutions come from the library; what is claimed of them is recomputed with the oracle's plain linear algebra.
"""

import jax
import numpy as np
import oracle
import pytest
from cases import ACTIONS, STATES, Case, all_cases, garnet_case, make, stack, suite

import robustreg as rr

ALPHAS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
ALPHA = np.array(ALPHAS)
DISCOUNT, BETA = 0.95, 4.0
CASES = stack(all_cases())
PRIOR = CASES.prior[:, None]
ALLOWED = np.broadcast_to(PRIOR > 0, (9, len(ALPHAS), STATES, ACTIONS))

solve = rr.solve
worst_case = rr.worst_case


def mdp(cases, discount=DISCOUNT, reward=None):
    return rr.mdp(
        rr.Dense(cases.P[:, None]),
        cases.reward[:, None] if reward is None else reward,
        discount,
        initial=cases.initial[:, None],
        termination=cases.termination[:, None],
    )


REG = rr.alpha(alpha=ALPHA, beta=BETA, prior=PRIOR)


@pytest.fixture(scope="module")
def solved():
    """Value [M,L,S], policy, perturbation, q [M,L,S,A] of every case under every alpha."""
    sol = solve(mdp(CASES), REG, tol=1e-11)
    sol.raise_if_failed()
    return {name: np.asarray(getattr(sol, name)) for name in ("value", "policy", "perturbation", "q")}


@pytest.fixture(scope="module")
def random_policies():
    """Policies that nobody solved for, with the prior's support: [M,L,S,A]."""
    rng = np.random.default_rng(0)
    policy = np.where(ALLOWED, rng.dirichlet(np.ones(ACTIONS), ALLOWED.shape[:-1]) + 1e-3, 0)
    return policy / policy.sum(-1, keepdims=True)


def returns(reward, policy, initial=CASES.initial[:, None]):
    """Discounted return of a policy from the initial distribution, [M,L]."""
    return (initial * oracle.evaluate(CASES.P[:, None], reward, np.full(policy.shape[1], DISCOUNT), policy)).sum(-1)


def price(policy):
    """D_alpha / beta per state, [M,L,S]."""
    return oracle.divergence(ALPHA[:, None], PRIOR, policy) / BETA


def random_feasible(rng, shape=()):
    """Perturbations on the boundary of the robust set: x - conjugate(x), [M,L,S,A]."""
    x = rng.normal(size=ALLOWED.shape) * rng.choice([0.1, 1.0, 10.0], ALLOWED.shape[:-1])[..., None] / BETA
    return np.where(ALLOWED, x - np.asarray(REG.conjugate(x))[..., None], 0)


def test_robust_set_membership():
    """slack is -conjugate: 0 on the boundary, positive inside, negative outside; the set is closed downward."""
    rng = np.random.default_rng(1)
    boundary = random_feasible(rng)
    np.testing.assert_allclose(np.asarray(rr.slack(REG, boundary)), 0, atol=1e-11)
    np.testing.assert_allclose(np.asarray(rr.slack(REG, boundary - 0.25)), 0.25, atol=1e-11)
    np.testing.assert_allclose(np.asarray(rr.slack(REG, boundary + 0.25)), -0.25, atol=1e-11)
    lower = boundary - rng.exponential(size=boundary.shape) * 0.1
    assert (np.asarray(rr.slack(REG, lower)) >= -1e-11).all()
    assert (np.asarray(rr.slack(REG, np.zeros_like(boundary))) >= -1e-12).all()
    # Convex: the middle of two members is a member.
    assert (np.asarray(rr.slack(REG, (boundary + random_feasible(rng)) / 2)) >= -1e-11).all()
    # R(beta) = R(1) / beta.
    unit = rr.alpha(alpha=ALPHA, beta=1.0, prior=PRIOR)
    np.testing.assert_allclose(np.asarray(rr.slack(unit, boundary * BETA)), 0, atol=1e-10)


def test_evaluate_and_occupancy(random_policies):
    """Against the oracle; flow, mass and the equality of the two ways to compute a return."""
    m, policy = mdp(CASES), random_policies
    discount = np.full(len(ALPHAS), DISCOUNT)
    P, initial = CASES.P[:, None], np.broadcast_to(CASES.initial[:, None], policy.shape[:-1])
    reward = np.where(PRIOR > 0, CASES.reward[:, None], 0)
    plain = np.asarray(rr.evaluate(m, policy))
    np.testing.assert_allclose(plain, oracle.evaluate(P, reward, discount, policy), atol=1e-11)
    costly = np.asarray(rr.evaluate(m, policy, reg=REG))
    np.testing.assert_allclose(costly, oracle.evaluate(P, reward, discount, policy, price(policy)), atol=1e-10)
    other = np.random.default_rng(2).normal(size=policy.shape)
    np.testing.assert_allclose(
        np.asarray(rr.evaluate(m, policy, reward=other)), oracle.evaluate(P, other, discount, policy), atol=1e-11
    )
    both = np.asarray(rr.evaluate(m, policy, reg=REG, reward=other))
    np.testing.assert_allclose(both, oracle.evaluate(P, other, discount, policy, price(policy)), atol=1e-10)
    mu = np.asarray(rr.occupancy(m, policy))
    np.testing.assert_allclose(mu, oracle.occupancy(P, initial, discount, policy), atol=1e-12)
    inflow = initial + DISCOUNT * np.einsum("mlsa,mxsat->mlt", mu, P)
    np.testing.assert_allclose(mu.sum(-1), inflow, atol=1e-12)
    forever = (CASES.termination == 0).all((-1, -2))
    np.testing.assert_allclose(mu.sum((-1, -2))[forever], 1 / (1 - DISCOUNT), rtol=1e-12)
    assert (mu.sum((-1, -2))[~forever] < 1 / (1 - DISCOUNT) - 1e-3).all()
    np.testing.assert_allclose((mu * reward).sum((-1, -2)), (initial * plain).sum(-1), atol=1e-11)


def test_generalisation_guarantee(random_policies):
    """Any policy, any feasible perturbation: the perturbed return is at least the regularised one; equality at worst."""
    rng = np.random.default_rng(3)
    reward = np.where(PRIOR > 0, CASES.reward[:, None], 0)
    regularised = returns(reward, random_policies) - (
        oracle.occupancy(
            CASES.P[:, None],
            np.broadcast_to(CASES.initial[:, None], ALLOWED.shape[:-1]),
            np.full(8, DISCOUNT),
            random_policies,
        ).sum(-1)
        * price(random_policies)
    ).sum(-1)
    for _ in range(5):
        dr = random_feasible(rng)
        assert (returns(reward - dr, random_policies) >= regularised - 1e-10).all()
    worst = np.asarray(worst_case(REG, random_policies))
    np.testing.assert_allclose(returns(reward - worst, random_policies), regularised, atol=1e-10)
    # And a whisker outside the set breaks it: the guarantee is not vacuous.
    assert (returns(reward - worst - 1e-3, random_policies) < regularised - 1e-4).all()


def test_aggregated_set(random_policies):
    """Feasibility on average over visited states is enough: shift mass between states against their visits."""
    rng = np.random.default_rng(4)
    reward = np.where(PRIOR > 0, CASES.reward[:, None], 0)
    initial = np.broadcast_to(CASES.initial[:, None], ALLOWED.shape[:-1])
    visits = oracle.occupancy(CASES.P[:, None], initial, np.full(8, DISCOUNT), random_policies).sum(-1)
    shift = rng.normal(size=visits.shape)
    shift -= ((visits * shift).sum(-1) / visits.sum(-1))[..., None]
    dr = np.asarray(worst_case(REG, random_policies)) + shift[..., None]
    assert (np.asarray(rr.slack(REG, dr)).min(-1) < -1e-2).all()
    regularised = returns(reward, random_policies) - (visits * price(random_policies)).sum(-1)
    np.testing.assert_allclose(returns(reward - dr, random_policies), regularised, atol=1e-10)


def test_tightness(random_policies, solved):
    """At the worst case: slack 0, mean D / beta, and the outward normal is the policy itself."""
    for policy in (random_policies, solved["policy"]):
        worst = np.asarray(worst_case(REG, policy))
        np.testing.assert_allclose(np.asarray(rr.slack(REG, worst)), 0, atol=1e-10)
        np.testing.assert_allclose((policy * worst).sum(-1), price(policy), atol=1e-12)
        np.testing.assert_allclose(np.asarray(REG.value(policy)), price(policy), atol=1e-12)
    normal = np.asarray(REG.argmax(np.asarray(worst_case(REG, random_policies))))
    np.testing.assert_allclose(normal, random_policies, atol=1e-9)


def test_indifference_and_complementary_slackness(solved):
    """r - dr + g P V = V on the support; off it the action is no better; dr from Q - V equals dr from the policy."""
    v, policy, dr, q = (solved[k] for k in ("value", "policy", "perturbation", "q"))
    support = policy > 0
    backed_up = np.where(ALLOWED, CASES.reward[:, None], 0) + DISCOUNT * np.einsum(
        "mxsat,mlt->mlsa", CASES.P[:, None], v
    )
    np.testing.assert_allclose((backed_up - dr - v[..., None])[support], 0, atol=1e-10)
    assert ((backed_up - dr - v[..., None])[ALLOWED] <= 1e-10).all()
    worst = np.asarray(worst_case(REG, policy))
    np.testing.assert_allclose(np.where(support, dr - worst, 0), 0, atol=1e-8)
    multiplier = np.where(ALLOWED, v[..., None] + worst - q, 0)
    assert (multiplier >= -1e-8).all() and (np.abs(policy * multiplier) <= 1e-8).all()
    off = ALLOWED & ~support
    assert off[:, ALPHA > 1].any() and not off[:, ALPHA <= 1].any()
    np.testing.assert_allclose(np.asarray(rr.slack(REG, dr)), 0, atol=1e-9)
    np.testing.assert_allclose((policy * dr).sum(-1), price(policy), atol=1e-9)


def test_plain_optimum_of_the_perturbed_reward_is_the_value(solved):
    """Strong duality seen by code that knows no regulariser: policy iteration, and value iteration on one case."""
    reward = CASES.reward[:, None] - solved["perturbation"]
    for m, lane in np.ndindex(solved["value"].shape[:2]):
        plain = oracle.optimal_value(CASES.P[m], reward[m, lane], DISCOUNT, CASES.prior[m] > 0)
        np.testing.assert_allclose(plain, solved["value"][m, lane], atol=1e-9)
    swept = oracle.value_iteration(CASES.P[0], reward[0, 5], DISCOUNT, 600)
    np.testing.assert_allclose(swept, solved["value"][0, 5], atol=1e-9)


def test_minimax_from_above(solved):
    """Against any other feasible perturbation the plain optimum is at least the robust value, in every state."""
    rng = np.random.default_rng(5)
    for _ in range(2):
        dr = random_feasible(rng)
        for m, lane in np.ndindex(solved["value"].shape[:2]):
            reward = CASES.reward[m] - dr[m, lane]
            plain = oracle.optimal_value(CASES.P[m], reward, DISCOUNT, CASES.prior[m] > 0)
            assert (plain >= solved["value"][m, lane] - 1e-9).all()


def test_no_policy_does_better(solved, random_policies):
    """The regularised value of any policy is at most V*, of the optimal policy exactly V*."""
    m = mdp(CASES)
    own = np.asarray(rr.evaluate(m, solved["policy"], reg=REG))
    np.testing.assert_allclose(own, solved["value"], atol=1e-9)
    mixed = 0.9 * solved["policy"] + 0.1 * random_policies
    assert (np.asarray(rr.evaluate(m, mixed, reg=REG)) <= solved["value"] + 1e-9).all()


# ---------------------------------------------------------------------------------------------------------------
# symmetries


def transformed(change):
    """Solutions of a problem and of its transform, [2,L,...]."""
    base = garnet_case(1)
    pair = stack([base, change(base)])
    reg = rr.alpha(alpha=ALPHA, beta=BETA, prior=pair.prior[:, None])
    sol = solve(mdp(pair), reg, tol=1e-11)
    sol.raise_if_failed()
    return [np.asarray(x) for x in (sol.value, sol.policy, sol.perturbation)]


def replaced(case, **kw):
    fields = {name: kw.get(name, getattr(case, name)) for name in ("P", "reward", "termination", "initial", "prior")}
    return Case(case.name, **fields)


def test_shift_of_the_reward():
    v, policy, dr = transformed(lambda c: replaced(c, reward=c.reward + 4.0))
    np.testing.assert_allclose(v[1] - v[0], 4 / (1 - DISCOUNT), rtol=1e-11)
    np.testing.assert_allclose(policy[1], policy[0], atol=1e-8)
    np.testing.assert_allclose(dr[1], dr[0], atol=1e-9)


def test_potential_shaping():
    phi = np.random.default_rng(6).normal(size=STATES)

    def shape(c):
        return replaced(c, reward=c.reward + DISCOUNT * c.P @ phi - phi[:, None])

    v, policy, dr = transformed(shape)
    np.testing.assert_allclose(v[1], v[0] - phi, atol=1e-9)
    np.testing.assert_allclose(policy[1], policy[0], atol=1e-8)
    np.testing.assert_allclose(dr[1], dr[0], atol=1e-9)


def test_permutations_of_states_and_actions():
    rng = np.random.default_rng(7)
    s, a = rng.permutation(STATES), rng.permutation(ACTIONS)

    def shuffle(c):
        return Case(
            c.name, c.P[s][:, a][..., s], c.reward[s][:, a], c.termination[s][:, a], c.initial[s], c.prior[s][:, a]
        )

    v, policy, dr = transformed(shuffle)
    np.testing.assert_allclose(v[1], v[0][:, s], atol=1e-9)
    np.testing.assert_allclose(policy[1], policy[0][:, s][..., a], atol=1e-8)
    np.testing.assert_allclose(dr[1], dr[0][:, s][..., a], atol=1e-9)


def test_duplicated_action_and_padding_state():
    """Splitting an action's prior between two copies, and adding a state nobody visits, change nothing."""
    base = garnet_case(1)
    P = np.zeros((STATES + 1, ACTIONS + 1, STATES + 1))
    P[:STATES, :ACTIONS, :STATES], P[:STATES, ACTIONS, :STATES] = base.P, base.P[:, 0]
    P[STATES, :, STATES] = 1.0
    reward, prior = np.zeros((STATES + 1, ACTIONS + 1)), np.full((STATES + 1, ACTIONS + 1), 1 / (ACTIONS + 1))
    reward[:STATES] = np.concatenate([base.reward, base.reward[:, :1]], -1)
    prior[:STATES] = np.concatenate([base.prior, base.prior[:, :1] / 4], -1)
    prior[:STATES, 0] *= 0.75
    wide = rr.mdp(rr.Dense(P), reward, DISCOUNT)
    sol = solve(wide, rr.alpha(alpha=ALPHA, beta=BETA, prior=prior), tol=1e-11)
    narrow = solve(base.mdp(DISCOUNT), rr.alpha(alpha=ALPHA, beta=BETA, prior=base.prior), tol=1e-11)
    sol.raise_if_failed()
    value, policy, dr = (np.asarray(x) for x in (sol.value, sol.policy, sol.perturbation))
    np.testing.assert_allclose(value[:, :STATES], np.asarray(narrow.value), atol=1e-9)
    np.testing.assert_allclose(value[:, STATES], 0, atol=1e-9)
    merged = policy[:, :STATES, :ACTIONS].copy()
    merged[..., 0] += policy[:, :STATES, ACTIONS]
    np.testing.assert_allclose(merged, np.asarray(narrow.policy), atol=1e-8)
    np.testing.assert_allclose(policy[:, :STATES, 0], 3 * policy[:, :STATES, ACTIONS], atol=1e-8)
    np.testing.assert_allclose(dr[:, :STATES, :ACTIONS], np.asarray(narrow.perturbation), atol=1e-9)


def test_blocks_are_separate_problems():
    """A block-diagonal problem is its blocks side by side: changing one leaves the other alone."""
    half = STATES // 2
    base = garnet_case(2)
    P = np.zeros_like(base.P)
    P[:half, :, 0], P[half:, :, half] = 0.5, 0.5
    P[:half, :, 1:half] = P[half:, :, half + 1 :] = 0.5 / (half - 1)
    base = make("blocks", P, base.reward, prior=base.prior)
    other = base.reward.copy()
    other[half:] = -3 * other[half:] + 1

    v, policy, _ = transformed_pair(base, replaced(base, reward=other))
    np.testing.assert_allclose(v[1][:, :half], v[0][:, :half], atol=1e-9)
    np.testing.assert_allclose(policy[1][:, :half], policy[0][:, :half], atol=1e-8)
    assert np.abs(v[1] - v[0])[:, half:].min() > 1e-3


def transformed_pair(one, two):
    pair = stack([one, two])
    sol = solve(mdp(pair), rr.alpha(alpha=ALPHA, beta=BETA, prior=pair.prior[:, None]), tol=1e-11)
    sol.raise_if_failed()
    return [np.asarray(x) for x in (sol.value, sol.policy, sol.perturbation)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_homogeneity(dtype):
    """V(k r, beta / k) = k V(r, beta) for k from 2^-26 to 2^26, to rounding, with the same policy."""
    base = garnet_case(1)
    k = 2.0 ** np.array([-26, -10, 0, 10, 26])
    rewards = (base.reward * k[:, None, None, None]).astype(dtype)
    m = rr.mdp(rr.Dense(base.P.astype(dtype)), rewards, DISCOUNT, initial=base.initial.astype(dtype), termination=None)
    beta = (BETA / k)[:, None].astype(dtype)
    reg = rr.alpha(alpha=np.tile(ALPHA.astype(dtype), (5, 1)), beta=beta, prior=base.prior.astype(dtype))
    sol = solve(m, reg)
    sol.raise_if_failed()
    assert sol.value.dtype == dtype
    value = np.asarray(sol.value, float) / k[:, None, None]
    # Both lanes are certified, so they may differ by their certificates and by no more.
    width = np.asarray(sol.upper, float) - np.asarray(sol.lower, float)
    width = width / k[:, None, None]
    assert (np.abs(value - value[2]) <= width + width[2]).all()
    assert (width <= 4 * width[2]).all() and (width[2] <= 1e3 * np.finfo(dtype).eps * 20 / (1 - DISCOUNT)).all()


def test_nominal_return_and_price():
    """Return of the policy = guarantee + price; both grow with beta, the price falls away from neither sign."""
    cases, index, value, policy = suite()
    keep = (index["discount"] == 0.99) & (index["beta"] == 10) & (np.abs(index["alpha"]) <= 3)
    alpha, beta = index["alpha"][keep], index["beta"][keep]
    sol = solve(
        rr.mdp(
            rr.Dense(cases.P[:, None]),
            cases.reward[:, None],
            0.99,
            initial=cases.initial[:, None],
            termination=cases.termination[:, None],
        ),
        rr.alpha(alpha=alpha, beta=beta, prior=cases.prior[:, None]),
        tol=1e-9,
    )
    pi = np.asarray(sol.policy)
    P, initial = cases.P[:, None], np.broadcast_to(cases.initial[:, None], pi.shape[:-1])
    discount = np.full(len(alpha), 0.99)
    reward = np.where(cases.prior[:, None] > 0, cases.reward[:, None], 0)
    nominal = (initial * oracle.evaluate(P, reward, discount, pi)).sum(-1)
    visits = oracle.occupancy(P, initial, discount, pi).sum(-1)
    cost = (visits * oracle.divergence(alpha[:, None], cases.prior[:, None], pi) / beta[:, None]).sum(-1)
    assert (cost >= 0).all()
    np.testing.assert_allclose(np.asarray(sol.objective), nominal - cost, atol=1e-7)
    np.testing.assert_allclose(np.asarray(sol.objective), (initial * value[:, keep]).sum(-1), atol=1e-9)
