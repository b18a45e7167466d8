"""Nothing rests on two evaluations that round alike: compiled batches against long double, and bounds that own up."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import garnet_case

import robustreg as rr

pytestmark = pytest.mark.slow

STATES, ACTIONS = 2, 4
PRECISIONS = (np.float32, np.float64)
LONG = np.longdouble


def dual(alpha, beta, log_prior, q):
    """Omega*, [B,S], in long double by minimising its dual function over the best action's log-ratio: bisection.

    Nothing of the library is used, and nothing of what it computes: the sum of the policy is a textbook formula.
    """
    alpha, beta, log_prior, q = (np.asarray(x, LONG) for x in (alpha, beta, log_prior, q))
    alpha, beta = alpha[:, None, None], beta[:, None, None]
    h, prior = alpha - 1, np.exp(log_prior)
    prior = prior / prior.sum(-1, keepdims=True)
    top = q.max(-1, keepdims=True)
    gap = beta * (top - q)

    def ratios(level):
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            x = np.where(gap > 0, -h * gap * np.exp(-h * level), 0)
            curved = level + np.log1p(np.maximum(x, -1)) / np.where(h == 0, 1, h)
            return np.where(h == 0, level - gap, curved)

    low = np.zeros_like(top)
    high = -np.log(np.where(gap == 0, prior, 0).sum(-1, keepdims=True)) + 1e-18
    for _ in range(80):
        middle = 0.5 * (low + high)
        short = (prior * np.exp(ratios(middle))).sum(-1, keepdims=True) < 1
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    # The policy that sums to one between the two neighbours; its own value errs by the square of its error.
    below, above = prior * np.exp(ratios(low)), prior * np.exp(ratios(high))
    wide = (above - below).sum(-1, keepdims=True)
    share = np.clip((1 - below.sum(-1, keepdims=True)) / np.where(wide > 0, wide, 1), 0, 1)
    policy = below + share * (above - below)
    policy = policy / policy.sum(-1, keepdims=True)
    cost = divergence(alpha[..., 0], prior, policy)
    return top[..., 0] - ((policy * gap).sum(-1) + cost) / beta[..., 0]


def divergence(alpha, prior, policy):
    """D_alpha[p0 : p], [B,S], of [B,S,A] in long double; `alpha` [B,1]."""
    alpha, prior, policy = (np.asarray(x, LONG) for x in (alpha, prior, policy))
    on = policy > 0
    with np.errstate(divide="ignore"):
        ratio = np.where(on, np.log(np.where(on, policy, 1)) - np.log(prior), -np.inf)
    a, h = alpha[..., None], alpha[..., None] - 1
    inner = np.where(on, ratio, 0)
    high = policy * np.where(h == 0, inner, np.expm1(h * inner) / np.where(h == 0, 1, h)) / np.where(a == 0, 1, a)
    with np.errstate(over="ignore"):
        low = prior * np.where(a == 0, ratio, np.expm1(a * ratio) / np.where(a == 0, 1, a)) / np.where(h == 0, 1, h)
    low = np.where(on, low, np.where(a > 0, prior * -1 / np.where(a == 0, 1, a) / np.where(h == 0, 1, h), np.inf))
    return np.where(alpha >= 0.5, high.sum(-1), low.sum(-1))


def lanes(width, dtype, seed=0):
    """One-step problems of every difficulty: alpha -10 to 10, priors to 1e-12, beta * range from 1e-12 to 1e8."""
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-3, 6, width)
    alpha = np.where(
        rng.random(width) < 0.3, rng.choice([-1, 0, 0.5, 1, 1.5, 2, 3], width), rng.uniform(-10, 10, width)
    )
    beta = 10 ** rng.uniform(-12, 8, width) / scale
    prior = 10 ** rng.uniform(-12, 0, (width, STATES, ACTIONS))
    reward = rng.standard_normal((width, STATES, ACTIONS)) * scale[:, None, None]
    # Actions as good as the best.
    reward = np.where(rng.random(reward.shape) < 0.2, reward.max(-1, keepdims=True), reward)
    log_prior = np.log(prior / prior.sum(-1, keepdims=True))
    P = rng.dirichlet(np.ones(STATES), (width, STATES, ACTIONS))
    return tuple(x.astype(dtype) for x in (alpha, beta, log_prior, reward, P))


# Of most tests below, so that they share programs.
WIDTH = 1024
# What is fused depends on the width.
WIDTHS = [(width, dtype) for width in (32, WIDTH, 1, 128) for dtype in PRECISIONS]


@pytest.mark.parametrize(("width", "dtype"), WIDTHS)
def test_certified_batches_hold_the_truth(width, dtype):
    """`solve` and `certify` as compiled, at discount 0, where the truth is Omega* of the reward."""
    alpha, beta, log_prior, reward, P = lanes(width, dtype)
    zero = np.zeros(width, dtype)
    regs = [(rr.alpha(alpha, beta, log_prior=log_prior), alpha)]
    # KL has no root that could be lost: one width is enough.
    regs += [(rr.kl(beta, log_prior=log_prior), np.ones(width))] if width == WIDTH else []
    for reg, order in regs:
        truth = dual(order, beta, log_prior, reward)
        own = np.spacing(LONG(1)) * 8 * (1 / beta.astype(LONG) + np.abs(reward).max((1, 2)))[:, None]
        m = rr.mdp(P, reward, zero, layout="sas", normalise=True)
        sol = rr.solve(m, reg).raise_if_failed()
        proof = rr.certify(m, reg, sol)
        for claim in (sol, proof):
            assert (np.asarray(claim.lower) <= truth + own).all() and (truth - own <= np.asarray(claim.upper)).all()
        proof.raise_if_loose(sol.tol + proof.rounding)


@pytest.mark.parametrize("dtype, width", [(np.float64, 128), (np.float32, 32), (np.float32, WIDTH)])
def test_certified_batches_do_not_cross(dtype, width):
    """Chains of many steps with alpha below -1: certify's interval meets that of the solve, which passes it."""
    rng = np.random.default_rng(7)
    states = 34 if width == 128 else 2
    P = rng.dirichlet(np.ones(states), (width, states, ACTIONS)).astype(dtype)
    scale = 10 ** rng.uniform(-3, 6, width)
    reward = (rng.standard_normal((width, states, ACTIONS)) * scale[:, None, None]).astype(dtype)
    beta, alpha = (10 ** rng.uniform(0, 6, width)).astype(dtype), rng.uniform(-10, -1, width).astype(dtype)
    reg = rr.alpha(alpha, beta, rng.dirichlet(np.ones(ACTIONS), (width, states)).astype(dtype))
    m = rr.mdp(P, reward, np.full(width, 0.95, dtype), layout="sas", normalise=True)
    sol = rr.solve(m, reg).raise_if_failed()
    proof = rr.certify(m, reg, sol)
    proof.raise_if_loose(sol.tol + proof.rounding)
    assert (np.asarray(proof.gap) >= 0).all()
    assert (np.asarray(proof.lower) <= np.asarray(sol.upper)).all()
    assert (np.asarray(sol.lower) <= np.asarray(proof.upper)).all()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_user_s_policy_is_guaranteed_the_lower_bound(dtype):
    """Any policy, its probabilities rounded, at discount 0: what it guarantees is known in long double."""
    alpha, beta, log_prior, reward, P = lanes(WIDTH, dtype, 3)
    rng = np.random.default_rng(4)
    policy = rng.dirichlet(np.full(ACTIONS, 0.3), (WIDTH, STATES)).astype(dtype)
    policy = np.maximum(policy, np.finfo(dtype).tiny * 1e6)
    m = rr.mdp(P, reward, np.zeros(WIDTH, dtype), layout="sas", normalise=True)
    for reg, order in (
        (rr.alpha(alpha, beta, log_prior=log_prior), alpha),
        (rr.kl(beta, log_prior=log_prior), np.ones(WIDTH)),
    ):
        value = rr.evaluate(m, policy, reg=reg)
        claim: Any = types.SimpleNamespace(value=value, policy=policy, perturbation=np.zeros_like(policy))
        lower = np.asarray(rr.certify(m, reg, claim).lower)
        exact = policy.astype(LONG) / policy.astype(LONG).sum(-1, keepdims=True)
        prior = np.exp(log_prior.astype(LONG))
        prior = prior / prior.sum(-1, keepdims=True)
        cost = divergence(order[:, None], prior, exact) / beta.astype(LONG)[:, None]
        truth = (exact * reward).sum(-1) - cost
        own = np.spacing(LONG(1)) * 64 * (np.abs(truth) + 1 / beta.astype(LONG)[:, None])
        # Divergences beyond the largest number prove nothing, and say so.
        held = (np.maximum(cost, cost * beta.astype(LONG)[:, None]) < float(np.finfo(dtype).max) ** 0.6).all(-1)
        assert np.isfinite(lower[held]).all() and held.mean() > 0.5
        assert ((lower <= truth + own) | ~held[:, None]).all()
        # And close to it.
        size = np.abs(truth) + np.abs(reward).max((1, 2))[:, None]
        assert np.median(((truth - lower) / size)[held]) <= 1e3 * np.finfo(dtype).eps


@pytest.mark.parametrize("alpha", [None, -1.0, 0.5, 1.5, 2.0, 3.0])
def test_a_small_beta_costs_no_digits(alpha):
    """float32: conjugate, solve and its interval at beta 1e-6 and far below it."""
    q = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    P = np.full((1, 4, 1), 1, np.float32)
    for beta in np.array([1e-2, 1e-4, 1e-6, 1e-9], np.float32):
        reg = rr.kl(beta) if alpha is None else rr.alpha(np.float32(alpha), beta)
        order = 1.0 if alpha is None else alpha
        right = float(dual([order], [beta], np.log(np.full((1, 1, 4), LONG(0.25))), q[None, None])[0, 0])
        assert abs(float(reg.conjugate(q)) - right) <= 1e-6
        sol = rr.solve(rr.mdp(P, q[None], np.float32(0.5), layout="sas"), reg).raise_if_failed()
        assert abs(float(sol.value[0]) - 2 * right) <= 1e-5
        assert float(sol.lower[0]) <= 2 * right <= float(sol.upper[0])
        assert float(sol.gap) <= 1e-3


# Lanes of the test below, and of the claims of those that follow it.
INDEX = np.array([(a, b, g) for a in (-3, 0, 0.5, 1, 1.5, 3) for b in (0.1, 3, 300) for g in (0.5, 0.99, 0.999)])


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_converged_solve_passes_its_own_verdict(dtype):
    """As `robustreg solve` and `certify` form it, without tol: alphas, priors, discounts, episodes that end."""
    alpha, beta, discount = (INDEX[:, i].astype(dtype) for i in range(3))
    for seed in range(3):
        case = garnet_case(seed)
        # (Written out, so that one program serves all.)
        prior = (np.full_like(case.prior, 1 / ACTIONS) if seed == 0 else case.prior).astype(dtype)
        m = case.mdp(discount)
        m = jax.tree.map(lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, m)
        for reg in (rr.alpha(alpha, beta, prior), rr.kl(beta, prior)):
            sol = rr.solve(m, reg).raise_if_failed()
            proof = rr.certify(m, reg, sol)
            proof.raise_if_loose(sol.tol + proof.rounding)
    m = rr.problems.ring(discount=0.999)
    sol = rr.solve(m, rr.kl(1.0))
    proof = rr.certify(m, rr.kl(1.0), sol)
    proof.raise_if_loose(float(sol.tol) + float(proof.rounding))


def test_the_last_digit_of_a_penalty_is_no_fault_of_the_perturbation():
    """float32: an action that is never taken, for its penalty; `Q - dr` there has the penalty's digits.

    The bounds stay as narrow as without it, and no allowance is made for a perturbation that is wrong.
    """
    rng = np.random.default_rng(0)
    lanes = 64
    prior = np.array([1e-9, 0.6, 0.4 - 1e-9], np.float32)
    P = np.broadcast_to(np.eye(4)[rng.integers(4, size=(4, 3))], (lanes, 4, 3, 4)).astype(np.float32)
    reward = rng.standard_normal((lanes, 4, 3)).astype(np.float32) * np.float32(1e-3)
    mild = rr.mdp(P, reward, np.float32(0.5), layout="sas")
    penalised = reward.copy()
    penalised[..., 0] = -(10 ** rng.uniform(3, 7, (lanes, 4)))
    m, reg = mild.replace(reward=penalised), rr.kl(np.full(lanes, 5, np.float32), prior)
    sol = rr.solve(m, reg).raise_if_failed()
    proof = rr.certify(m, reg, sol)
    limit = sol.tol + proof.rounding
    assert (proof.consistency.max(-1) > 2 * limit).sum() > lanes // 4  # that it happens is what this is about
    proof.raise_if_loose(limit)
    without = rr.certify(mild, reg, rr.solve(mild, reg))
    assert float(proof.gap.max()) < 4 * float(without.gap.max())
    wrong = dataclasses.replace(sol, perturbation=sol.perturbation.at[3, 1, 1].add(1e-4))
    with pytest.raises(rr.SolveError, match="slack.*state 1"):
        rr.certify(mild, reg, dataclasses.replace(wrong, value=rr.solve(mild, reg).value)).raise_if_loose(limit)


@pytest.fixture(scope="module")
def small():
    case = garnet_case(0)
    lanes = len(INDEX)
    m, reg = case.mdp(np.full(lanes, 0.97)), rr.alpha(np.resize([0.5, 1.5], lanes), np.full(lanes, 5.0), case.prior)
    return m, reg, rr.solve(m, reg, tol=1e-9)


def test_crossed_bounds_never_pass(small):
    m, reg, sol = small
    proof = rr.certify(m, reg, sol)
    for gap in (-1e-3, np.nan):
        crossed = dataclasses.replace(proof, upper=proof.lower + gap)
        with pytest.raises(rr.SolveError, match="gap"):
            crossed.raise_if_loose(1e6)


def test_a_conjugate_that_comes_out_low_is_not_certified(small, monkeypatch):
    """Bounds that cross are NaN: here because the upper one is wrong on purpose."""
    from robustreg.adversary import certificates

    m, reg, sol = small
    bounds = certificates.bellman.value_bounds
    shifted = lambda problem, h, c, th, cost: tuple(x - 1 for x in bounds(problem, h, c, th - 1, cost))  # noqa: E731
    honest = rr.certify(m, reg, sol)
    jitted: Any = certificates._certify
    certify = jitted.__wrapped__
    calls = []

    def once(*arguments):
        # The lower bound is formed first.
        calls.append(arguments)
        return (bounds if len(calls) == 1 else shifted)(*arguments)

    monkeypatch.setattr(certificates.bellman, "value_bounds", once)
    wrong = jax.jit(lambda *claim: certify(*claim, ball=None, strict=False))(
        m, reg, sol.value, sol.policy, sol.perturbation
    )
    assert np.isfinite(np.asarray(honest.gap)).all() and np.isnan(np.asarray(wrong.gap)).all()
    with pytest.raises(rr.SolveError):
        wrong.raise_if_loose(1e6)


def test_tolerances_per_lane_and_inside_jit(small):
    m, reg, sol = small
    proof = rr.certify(m, reg, sol)
    tolerance = np.where(np.arange(len(INDEX)) == 0, 1e-6, 1e-3)
    proof.raise_if_loose(tolerance)
    with pytest.raises(rr.SolveError, match=r"lane \[1\]"):
        proof.raise_if_loose(np.where(np.arange(len(INDEX)) == 1, 1e-18, tolerance))
    with pytest.raises(ValueError, match="one per lane"):
        proof.raise_if_loose(np.ones(3))
    with pytest.raises(TypeError, match="inside jit"):
        jax.jit(lambda s: rr.certify(m, reg, s).raise_if_loose(1.0))(sol)
    with pytest.raises(TypeError, match="inside jit"):
        jax.jit(lambda t: proof.raise_if_loose(t).gap)(1.0)


def test_remedies_fit_the_precision(small):
    m, reg, sol = small
    proof = rr.certify(m, reg, sol)
    proof = dataclasses.replace(proof, upper=proof.lower + 1)
    with pytest.raises(rr.SolveError) as error:
        proof.raise_if_loose(1e-18)
    assert "float64" not in str(error.value)
    with pytest.raises(rr.SolveError, match="in float64"):
        jax.tree.map(lambda x: x.astype(np.float32), proof).raise_if_loose(1e-18)


def test_dual_function_is_the_textbook_s():
    """What `alpha_maximiser` sums up is `psi + Omega*_unnormalised(q - psi)`: of any psi, in long double."""
    rng = np.random.default_rng(0)
    for alpha in (-3.0, -0.5, 0.3, 0.7, 1.5, 3.0):
        prior, q, beta = rng.dirichlet(np.ones(5)).astype(LONG), rng.normal(size=5).astype(LONG), LONG(2.0)
        prior = prior / prior.sum()  # to the last digit of this precision
        h = LONG(alpha) - 1
        for level in (0.05, 0.3, 0.8):
            psi = q.max() - np.expm1(h * level) / h / beta
            base = 1 + h * beta * (q - psi)
            power = np.where(base > 0, np.maximum(base, 0) ** (1 / h), 0)
            textbook = psi + ((prior * np.where(base > 0, np.abs(base) ** (alpha / h), 0)).sum() - 1) / (beta * alpha)
            p, a = prior * power, LONG(alpha)
            extended = (a * p + (1 - a) * prior - prior ** (1 - a) * p**a).sum() / (a * (1 - a))
            gap = beta * (q.max() - q)
            ours = q.max() - ((p * gap).sum() + extended + (1 - p.sum()) * np.expm1(h * level) / h) / beta
            # Of the size of what the textbook's form takes the difference of.
            summands = abs(psi) + ((prior * np.abs(base) ** (alpha / h)).sum() + 1) / abs(beta * alpha)
            assert abs(ours - textbook) <= 64 * np.finfo(LONG).eps * (1 + summands)
            assert float(textbook) >= float(oracle.conjugate(alpha, 2.0, prior.astype(float), q.astype(float))) - 1e-14
