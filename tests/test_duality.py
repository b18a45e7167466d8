"""The adversary: guarantee, tightness, indifference, minimax, and the symmetries of the value.

Solutions come from the library; what is claimed of them is recomputed with the oracle's plain linear algebra.
"""

import numpy as np
import oracle
import pytest
from cases import ACTIONS, STATES, all_cases, dense, garnet_case, lanes, make, problem, replace, size, solve, stack

import robustreg as rr

DISCOUNT = 0.95
INDEX = lanes(alpha=(-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0), beta=(0.5, 4.0, 30.0), discount=(DISCOUNT,))
ALPHA, BETA = INDEX["alpha"], INDEX["beta"]
CASES = stack(all_cases())
PRIOR = CASES.prior[:, None]
P = CASES.P[:, None]
REWARD = np.where(PRIOR > 0, CASES.reward[:, None], 0)
ALLOWED = np.broadcast_to(PRIOR > 0, (9, len(ALPHA), STATES, ACTIONS))
INITIAL = np.broadcast_to(CASES.initial[:, None], ALLOWED.shape[:-1])
GAMMA = np.full(len(ALPHA), DISCOUNT)
M, REG = problem(CASES, INDEX)


@pytest.fixture(scope="module")
def solved():
    """Value [M,L,S], policy, perturbation [M,L,S,A] of every case under every alpha."""
    sol = solve(CASES, INDEX, tol=1e-10)
    sol.raise_if_failed()
    return {name: np.asarray(getattr(sol, name)) for name in ("value", "policy", "perturbation", "objective")}


@pytest.fixture(scope="module")
def random_policies():
    """Policies that nobody solved for, with the prior's support: [M,L,S,A]."""
    rng = np.random.default_rng(0)
    policy = np.where(ALLOWED, rng.dirichlet(np.ones(ACTIONS), ALLOWED.shape[:-1]) + 1e-3, 0)
    return policy / policy.sum(-1, keepdims=True)


def returns(reward, policy):
    """Discounted return of a policy from the initial distribution, [M,L]."""
    return (INITIAL * oracle.evaluate(P, reward, GAMMA, policy)).sum(-1)


def regularised_return(policy):
    """The same less the price of the policy where it goes."""
    visits = oracle.occupancy(P, INITIAL, GAMMA, policy).sum(-1)
    return returns(REWARD, policy) - (visits * price(policy)).sum(-1)


def price(policy):
    """D_alpha / beta per state, [M,L,S]."""
    return oracle.divergence(ALPHA[:, None], PRIOR, policy) / BETA[:, None]


def random_feasible(rng):
    """Perturbations on the boundary of the robust set: x - conjugate(x), [M,L,S,A]."""
    x = rng.normal(size=ALLOWED.shape) * rng.choice([0.1, 1.0, 10.0], ALLOWED.shape[:-1])[..., None]
    x = x / BETA[:, None, None]
    return np.where(ALLOWED, x - oracle.conjugate(ALPHA[:, None], BETA[:, None], PRIOR, x)[..., None], 0)


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
    unit = problem(CASES, {**INDEX, "beta": np.ones(len(ALPHA))})[1]
    np.testing.assert_allclose(np.asarray(rr.slack(unit, boundary * BETA[:, None, None])), 0, atol=1e-10)


def test_evaluate_and_occupancy(random_policies):
    """Against the oracle; flow, mass and the equality of the two ways to compute a return."""
    policy = random_policies
    plain = np.asarray(rr.evaluate(M, policy))
    np.testing.assert_allclose(plain, oracle.evaluate(P, REWARD, GAMMA, policy), atol=1e-10)
    other = np.random.default_rng(2).normal(size=policy.shape)
    both = np.asarray(rr.evaluate(M, policy, reg=REG, reward=other))
    np.testing.assert_allclose(both, oracle.evaluate(P, other, GAMMA, policy, price(policy)), atol=1e-9)
    mu = np.asarray(rr.occupancy(M, policy))
    np.testing.assert_allclose(mu, oracle.occupancy(P, INITIAL, GAMMA, policy), atol=1e-11)
    assert (mu >= 0).all()
    inflow = INITIAL + DISCOUNT * np.einsum("mlsa,mxsat->mlt", mu, P)
    np.testing.assert_allclose(mu.sum(-1), inflow, atol=1e-11)
    forever = (CASES.termination == 0).all((-1, -2))
    np.testing.assert_allclose(mu.sum((-1, -2))[forever], 1 / (1 - DISCOUNT), rtol=1e-11)
    assert (mu.sum((-1, -2))[~forever] < 1 / (1 - DISCOUNT) - 1e-3).all()
    np.testing.assert_allclose((mu * REWARD).sum((-1, -2)), (INITIAL * plain).sum(-1), atol=1e-10)


def test_generalisation_guarantee(random_policies):
    """Any policy, any feasible perturbation: the perturbed return is at least the regularised one."""
    rng = np.random.default_rng(3)
    guarantee = regularised_return(random_policies)
    for _ in range(4):
        assert (returns(REWARD - random_feasible(rng), random_policies) >= guarantee - 1e-10).all()
    worst = np.asarray(rr.worst_case(REG, random_policies))
    # The masked case has a prior of 1e-6, whose worst case at alpha = 5 is 1e20: rounding is relative to that.
    scale = 1 + (np.abs(worst) * random_policies).sum((-1, -2)) / (1 - DISCOUNT)
    assert (np.abs(returns(REWARD - worst, random_policies) - guarantee) <= 1e-12 * scale).all()
    # And a whisker outside the set breaks it: the guarantee is not vacuous.
    mild = scale < 1e4
    assert (returns(REWARD - worst - 1e-3, random_policies) < guarantee - 1e-4)[mild].all() and mild.mean() > 0.8


def test_aggregated_set(random_policies):
    """Feasibility on average over visited states is enough: shift mass between states against their visits."""
    rng = np.random.default_rng(4)
    visits = oracle.occupancy(P, INITIAL, GAMMA, random_policies).sum(-1)
    shift = rng.normal(size=visits.shape)
    shift -= ((visits * shift).sum(-1) / visits.sum(-1))[..., None]
    dr = random_feasible(rng) + shift[..., None]
    assert (np.asarray(rr.slack(REG, dr)).min(-1) < -1e-2).all()
    guarantee = regularised_return(random_policies)
    assert (returns(REWARD - dr, random_policies) >= guarantee - 1e-10).all()


def test_tightness(random_policies, solved):
    """At the worst case: slack 0, mean D / beta, and the outward normal is the policy itself."""
    for policy in (random_policies, solved["policy"]):
        worst = np.asarray(rr.worst_case(REG, policy))
        scale = 1 + np.abs(worst).max(-1)
        assert (np.abs(np.asarray(rr.slack(REG, worst))) / scale).max() <= 1e-10
        assert (np.abs((policy * worst).sum(-1) - price(policy)) / scale).max() <= 1e-12
        assert (np.abs(np.asarray(REG.value(policy)) - price(policy)) / scale).max() <= 1e-12
    worst = np.asarray(rr.worst_case(REG, random_policies))
    normal = np.asarray(REG.argmax(worst))
    mild = np.abs(worst).max(-1) < 1e4
    np.testing.assert_allclose(normal[mild], random_policies[mild], atol=1e-9)
    assert mild.mean() > 0.9


def test_indifference_and_complementary_slackness(solved):
    """r - dr + g P V = V on the support; off it the action is no better; dr from Q - V equals dr from the policy."""
    v, policy, dr = (solved[k] for k in ("value", "policy", "perturbation"))
    support = policy > 0
    backed_up = REWARD + DISCOUNT * np.einsum("mxsat,mlt->mlsa", P, v)
    excess = backed_up - dr - v[..., None]
    assert np.abs(excess[support]).max() <= 1e-9
    assert excess[ALLOWED].max() <= 1e-9
    # dr = Q - V = worst_case(pi) - lambda with a multiplier lambda >= 0 that vanishes where the policy acts.
    multiplier = np.where(ALLOWED, np.asarray(rr.worst_case(REG, policy)) - dr, 0)
    assert multiplier.min() >= -1e-8
    assert np.abs(policy * multiplier).max() <= 1e-8
    off = ALLOWED & ~support
    assert off[:, ALPHA > 1].any() and not off[:, ALPHA <= 1].any()
    assert multiplier[off].max() > 1e-2
    np.testing.assert_allclose(np.asarray(rr.slack(REG, dr)), 0, atol=1e-9)
    np.testing.assert_allclose((policy * dr).sum(-1), price(policy), atol=1e-9)


def test_plain_optimum_of_the_perturbed_reward_is_the_value(solved):
    """Strong duality seen by code that knows no regulariser: policy iteration, and value iteration on one case."""
    reward = REWARD - solved["perturbation"]
    for m, lane in np.ndindex(solved["value"].shape[:2]):
        plain = oracle.optimal_value(CASES.P[m], reward[m, lane], DISCOUNT, CASES.prior[m] > 0)
        np.testing.assert_allclose(plain, solved["value"][m, lane], atol=1e-9)
    swept = oracle.value_iteration(CASES.P[0], reward[0, 16], DISCOUNT, 600)
    np.testing.assert_allclose(swept, solved["value"][0, 16], atol=1e-9)


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
    own = np.asarray(rr.evaluate(M, solved["policy"], reg=REG))
    np.testing.assert_allclose(own, solved["value"], atol=1e-9)
    mixed = 0.9 * solved["policy"] + 0.1 * random_policies
    assert (np.asarray(rr.evaluate(M, mixed, reg=REG)) <= solved["value"] + 1e-9).all()


# ---------------------------------------------------------------------------------------------------------------
# symmetries


@pytest.fixture(scope="module")
def symmetric():
    """A problem beside its transforms, solved in one batch: value [T,L,S], policy and perturbation [T,L,S,A]."""
    base = garnet_case(1)
    rng = np.random.default_rng(6)
    phi, s, a = rng.normal(size=STATES), rng.permutation(STATES), rng.permutation(ACTIONS)
    half = STATES // 2
    blocks = np.zeros_like(base.P)
    blocks[:half, :, :half], blocks[half:, :, half:] = base.P[:half, :, :half], base.P[half:, :, half:]
    blocks[..., 0] += np.where(np.arange(STATES) < half, 1, 0)[:, None] * (1 - blocks.sum(-1))
    blocks[..., half] += 1 - blocks.sum(-1)
    other = np.where(np.arange(STATES)[:, None] < half, base.reward, 1 - 3 * base.reward)
    transforms = {
        "base": base,
        "shift": replace(base, reward=base.reward + 4.0),
        "potential": replace(base, reward=base.reward + DISCOUNT * base.P @ phi - phi[:, None]),
        "permutation": make(
            "permuted",
            base.P[s][:, a][..., s],
            base.reward[s][:, a],
            initial=base.initial[s],
            prior=base.prior[s][:, a],
        ),
        "blocks": make("blocks", blocks, base.reward, prior=base.prior),
        "other block": make("blocks", blocks, other, prior=base.prior),
    }
    sol = solve(stack(list(transforms.values())), INDEX, tol=1e-10)
    sol.raise_if_failed()
    fields = {
        name: tuple(np.asarray(x)[i] for x in (sol.value, sol.policy, sol.perturbation))
        for i, name in enumerate(transforms)
    }
    return fields, phi, s, a


def test_shift_of_the_reward(symmetric):
    (v, policy, dr), (w, shifted, dw) = symmetric[0]["base"], symmetric[0]["shift"]
    np.testing.assert_allclose(w, v + 4 / (1 - DISCOUNT), atol=1e-9)
    np.testing.assert_allclose(shifted, policy, atol=1e-7)
    np.testing.assert_allclose(dw, dr, atol=1e-9)


def test_potential_shaping(symmetric):
    (v, policy, dr), (w, shaped, dw) = symmetric[0]["base"], symmetric[0]["potential"]
    np.testing.assert_allclose(w, v - symmetric[1], atol=1e-9)
    np.testing.assert_allclose(shaped, policy, atol=1e-7)
    np.testing.assert_allclose(dw, dr, atol=1e-9)


def test_permutations_of_states_and_actions(symmetric):
    fields, _, s, a = symmetric
    (v, policy, dr), (w, permuted, dw) = fields["base"], fields["permutation"]
    np.testing.assert_allclose(w, v[:, s], atol=1e-9)
    np.testing.assert_allclose(permuted, policy[:, s][..., a], atol=1e-7)
    np.testing.assert_allclose(dw, dr[:, s][..., a], atol=1e-9)


def test_blocks_are_separate_problems(symmetric):
    """A block-diagonal problem is its blocks side by side: changing one leaves the other alone."""
    half = STATES // 2
    (v, policy, dr), (w, changed, dw) = symmetric[0]["blocks"], symmetric[0]["other block"]
    np.testing.assert_allclose(w[:, :half], v[:, :half], atol=1e-9)
    np.testing.assert_allclose(changed[:, :half], policy[:, :half], atol=1e-7)
    np.testing.assert_allclose(dw[:, :half], dr[:, :half], atol=1e-9)
    assert np.abs(w - v)[:, half:].max(-1).min() > 1e-2


def test_duplicated_action_and_padding_state(symmetric):
    """Splitting an action's prior between two copies, and adding a state nobody visits, change nothing."""
    base = garnet_case(1)
    wide = np.zeros((STATES + 1, ACTIONS + 1, STATES + 1))
    wide[:STATES, :ACTIONS, :STATES], wide[:STATES, ACTIONS, :STATES] = base.P, base.P[:, 0]
    wide[STATES, :, STATES] = 1.0
    reward, prior = np.zeros((STATES + 1, ACTIONS + 1)), np.full((STATES + 1, ACTIONS + 1), 1 / (ACTIONS + 1))
    reward[:STATES] = np.concatenate([base.reward, base.reward[:, :1]], -1)
    prior[:STATES] = np.concatenate([base.prior, base.prior[:, :1] / 4], -1)
    prior[:STATES, 0] *= 0.75
    sol = rr.solve(rr.mdp(dense(wide), reward, DISCOUNT), rr.alpha(alpha=ALPHA, beta=BETA, prior=prior), tol=1e-10)
    sol.raise_if_failed()
    value, policy, dr = (np.asarray(x) for x in (sol.value, sol.policy, sol.perturbation))
    v, pi, narrow = symmetric[0]["base"]
    np.testing.assert_allclose(value[:, :STATES], v, atol=1e-9)
    np.testing.assert_allclose(value[:, STATES], 0, atol=1e-9)
    merged = policy[:, :STATES, :ACTIONS].copy()
    merged[..., 0] += policy[:, :STATES, ACTIONS]
    np.testing.assert_allclose(merged, pi, atol=1e-7)
    np.testing.assert_allclose(policy[:, :STATES, 0], 3 * policy[:, :STATES, ACTIONS], atol=1e-7)
    np.testing.assert_allclose(dr[:, :STATES, :ACTIONS], narrow, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_homogeneity(dtype):
    """V(k r, beta / k) = k V(r, beta) for k from 2^-26 to 2^26, to rounding, in one batch."""
    base = garnet_case(1)
    k = 2.0 ** np.array([-26, -10, 0, 10, 26])
    pick = BETA == 4.0
    cases = stack([replace(base, reward=base.reward * scale) for scale in k])
    m, _ = problem(cases, {name: values[pick] for name, values in INDEX.items()}, dtype=dtype)
    beta = (BETA[pick] / k[:, None]).astype(dtype)
    sol = rr.solve(m, rr.alpha(alpha=ALPHA[pick].astype(dtype), beta=beta, prior=base.prior.astype(dtype)))
    sol.raise_if_failed()
    assert sol.value.dtype == dtype
    value, lower, upper = (np.asarray(x, float) / k[:, None, None] for x in (sol.value, sol.lower, sol.upper))
    width = upper - lower
    # All are certified, so they may differ by their certificates and by no more; those scale too.
    assert (np.abs(value - value[2]) <= width + width[2]).all()
    assert (width.max(-1) <= 4 * width[2].max(-1)).all()
    attainable = np.finfo(dtype).eps * size(base.reward, 4.0, value[2]) / (1 - DISCOUNT)
    assert (width[2].max(-1) <= 200 * attainable).all()


def test_nominal_return_and_price(solved):
    """Return of the policy = guarantee + price; return, guarantee and fidelity to the reward all grow with beta."""
    nominal, cost = returns(REWARD, solved["policy"]), regularised_return(solved["policy"])
    guarantee = (INITIAL * solved["value"]).sum(-1)
    np.testing.assert_allclose(cost, guarantee, atol=1e-8)
    np.testing.assert_allclose(solved["objective"], guarantee, atol=1e-12)
    assert (nominal >= guarantee - 1e-9).all()
    for ladder in (nominal, guarantee):
        assert (np.diff(ladder.reshape(9, -1, 3), axis=-1) >= -1e-8).all()
        assert np.diff(ladder.reshape(9, -1, 3), axis=-1).max() > 0.1
