"""One state: divergence, conjugate and policy against bisection, decimal arithmetic and each other."""

import jax
import numpy as np
import oracle
import pytest
from cases import ALPHAS, lanes

import robustreg as rr

ACTIONS = 6
BETAS = (1e-3, 0.3, 10.0, 1e3)
LANES = lanes(alpha=ALPHAS, beta=BETAS)
EPS = np.finfo(float).eps


def rows():
    """Pairs of scores and priors, [N,A] each: ties, gaps of every size, tiny priors, masks, a single action."""
    rng = np.random.default_rng(0)
    scores = [
        rng.normal(size=ACTIONS),
        100 * rng.normal(size=ACTIONS),
        np.full(ACTIONS, 0.7),
        np.array([1.0, 1.0, 0.5, 1.0, -3.0, 0.999]),
        np.linspace(0, 1, ACTIONS),
        np.array([0.0, -1e4, -1.0, -1e-6, -30.0, -1e2]),
        -1e-9 * np.arange(ACTIONS),
    ]
    tiny = 2.0**-40
    priors = [
        np.full(ACTIONS, 1 / ACTIONS),
        np.array([1, 2, 4, 8, 16, 33]) / 64,
        np.array([tiny, 0.5 - tiny, 0.25, 0.125, 0.0625, 0.0625]),
        np.array([0.25, 0.0, 0.5, tiny, 0.0, 0.25 - tiny]),
        np.eye(ACTIONS)[4],
    ]
    pairs = [(q, p) for q in scores for p in priors]
    return np.array([q for q, _ in pairs]), np.array([p for _, p in pairs])


Q, PRIOR = rows()
SHAPE = (LANES["alpha"].size, *Q.shape)
ALPHA, BETA = LANES["alpha"][:, None], LANES["beta"][:, None]
# What the value is a sum of: scores that carry mass and terms of size 1/beta.
SCALE = np.abs(np.where(PRIOR > 0, Q, 0)).max(-1) + 1 / BETA


def regulariser(prior=PRIOR, alpha=LANES["alpha"], beta=LANES["beta"], **kw):
    return rr.alpha(alpha=alpha, beta=beta, prior=prior, **kw)


@jax.jit
def one_step(reg, q):
    policy = reg.argmax(q)
    return reg.conjugate(q), policy, reg.value(policy), rr.worst_case(reg, policy)


@pytest.fixture(scope="module")
def answers():
    return [np.asarray(x) for x in one_step(regulariser(), np.broadcast_to(Q, SHAPE))]


@pytest.fixture(scope="module")
def truth():
    return oracle.best_response(ALPHA, BETA, PRIOR, Q)


def test_oracle_matches_decimal_arithmetic():
    rng = np.random.default_rng(1)
    alphas = (*ALPHAS, 1 + 1e-9, 1 - 1e-6, 1e-12, -1e-7)
    for alpha in alphas:
        for beta in (0.3, 10.0):
            row = rng.integers(len(Q), size=3)
            value, policy = oracle.best_response(alpha, beta, PRIOR[row], Q[row])
            primal = (policy * Q[row]).sum(-1) - oracle.divergence(np.full(3, alpha), PRIOR[row], policy) / beta
            exact = [
                float(oracle.exact_conjugate(alpha, beta, p, q, 30)) for p, q in zip(PRIOR[row], Q[row], strict=True)
            ]
            scale = np.abs(np.where(PRIOR > 0, Q, 0)).max(-1)[row] + 1 / beta
            np.testing.assert_array_less(np.abs(value - exact) / scale, 2e-14)
            np.testing.assert_array_less(np.abs(primal - exact) / scale, 2e-14)


def test_oracle_closed_forms():
    """The textbook: logsumexp at 1, sparsemax at 2, the explicit divergences of the table."""
    rng = np.random.default_rng(2)
    q, beta = rng.normal(size=(50, 5)), 3.0
    prior, policy = rng.dirichlet(np.ones(5), (2, 50))
    value, pi = oracle.best_response(1.0, beta, prior, q)
    np.testing.assert_allclose(value, np.log((prior * np.exp(beta * q)).sum(-1)) / beta, atol=1e-14)
    np.testing.assert_allclose(pi, prior * np.exp(beta * (q - value[:, None])), atol=1e-14)
    pi = oracle.best_response(2.0, beta, np.full(5, 0.2), q)[1]
    np.testing.assert_allclose(pi, oracle.project_simplex(beta * q / 5), atol=1e-14)
    table = {
        1.0: (policy * np.log(policy / prior)).sum(-1),
        0.0: (prior * np.log(prior / policy)).sum(-1),
        0.5: 4 * (1 - np.sqrt(policy * prior).sum(-1)),
        2.0: ((policy - prior) ** 2 / prior).sum(-1) / 2,
        -1.0: ((policy - prior) ** 2 / policy).sum(-1) / 2,
        3.0: ((policy**3 / prior**2).sum(-1) - 1) / 6,
    }
    for alpha, expected in table.items():
        np.testing.assert_allclose(
            oracle.divergence(np.full(50, alpha), prior, policy), expected, rtol=1e-10, atol=1e-13
        )


def test_conjugate_matches_oracle(answers, truth):
    error = np.abs(answers[0] - truth[0]) / SCALE
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= 1e-13, (
        error.max(),
        LANES["alpha"][worst[0]],
        LANES["beta"][worst[0]],
        Q[worst[1]],
        PRIOR[worst[1]],
    )


def test_policy_is_a_distribution_on_the_prior_support(answers):
    policy = answers[1]
    assert (policy >= 0).all()
    np.testing.assert_allclose(policy.sum(-1), 1, atol=4 * EPS)
    assert (policy[:, PRIOR == 0] == 0).all()
    full = (LANES["alpha"] < 1) & (LANES["beta"] <= 10)
    assert (policy[full][:, PRIOR > 0] > 0).all()


def test_policy_matches_oracle(answers, truth):
    """Entry by entry where the policy is a Lipschitz function of the scores, alpha <= 2."""
    smooth = LANES["alpha"] <= 2
    # d pi / d(beta q) <= 1 for alpha in [1, 2]; below 1 the curvature of rare actions adds up to a factor.
    noise = 1 + BETA * np.abs(np.where(PRIOR > 0, Q, 0)).max(-1)
    error = np.abs(answers[1] - truth[1]).max(-1) / noise
    assert error[smooth].max() <= 1e-13, LANES["alpha"][np.unravel_index(error.argmax(), error.shape)[0]]


def test_policy_attains_the_conjugate(answers, truth):
    """For every alpha, kinks included: <pi, q> - D/beta is the maximum (D by the oracle, from pi alone)."""
    policy = answers[1]
    # An entry that underflows to zero has no logarithm; alpha <= 0 then has no divergence to compare.
    rare = (policy == 0).any(-1, where=PRIOR > 0) & (ALPHA <= 0)
    with np.errstate(invalid="ignore"):
        primal = (policy * np.where(PRIOR > 0, Q, 0)).sum(-1) - oracle.divergence(
            np.broadcast_to(ALPHA, policy.shape[:-1]), PRIOR, policy
        ) / BETA
    assert not rare.any()
    assert (np.abs(primal - truth[0]) / SCALE).max() <= 1e-13


def test_value_is_the_divergence_over_beta():
    """On arbitrary policies, zeros included: +inf where a live action has none of the mass and alpha <= 0."""
    rng = np.random.default_rng(3)
    policy = rng.dirichlet(np.full(ACTIONS, 0.3), SHAPE[:2])
    policy[:, ::3, 2] = 0.0
    policy = np.where(PRIOR > 0, policy + 1e-300 * (policy > 0), 0)
    policy /= policy.sum(-1, keepdims=True)
    policy = np.where(np.isfinite(policy), policy, PRIOR)
    expected = oracle.divergence(np.broadcast_to(ALPHA, SHAPE[:2]), PRIOR, policy) / BETA
    actual = np.asarray(jax.jit(lambda reg, p: reg.value(p))(regulariser(), policy))
    np.testing.assert_array_equal(np.isinf(actual), np.isinf(expected))
    assert np.isinf(expected).any() and not np.isinf(expected).all()
    finite = np.isfinite(expected)
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=1e-11, atol=1e-12)


def test_value_of_the_prior_is_zero():
    value = np.asarray(regulariser().value(np.broadcast_to(PRIOR, SHAPE)))
    np.testing.assert_allclose(value * BETA, 0, atol=1e-15)


def test_biconjugacy():
    """Fenchel-Young: <pi, x> <= value(pi) + conjugate(x), with equality at x = worst_case(pi)."""
    rng = np.random.default_rng(4)
    policy = np.where(PRIOR > 0, rng.dirichlet(np.ones(ACTIONS), SHAPE[:2]) + 1e-3, 0)
    policy /= policy.sum(-1, keepdims=True)
    x = rng.normal(size=SHAPE) * rng.choice([0.1, 1, 10], SHAPE[:2])[..., None] / BETA[..., None]
    both = jax.jit(lambda reg, p, x: (reg.value(p), reg.conjugate(x), rr.worst_case(reg, p)))
    value, other, gradient = map(np.asarray, both(regulariser(), policy, x))
    scale = np.abs(x).max(-1) + 1 / BETA + value
    assert ((policy * np.where(PRIOR > 0, x, 0)).sum(-1) <= value + other + 1e-13 * scale).all()
    stiff = np.abs(gradient).max(-1) + 1 / BETA
    back, again = map(np.asarray, jax.jit(lambda reg, g: (reg.conjugate(g), reg.argmax(g)))(regulariser(), gradient))
    assert (np.abs(back) / stiff).max() <= 1e-13
    assert (np.abs((policy * gradient).sum(-1) - value) / stiff).max() <= 1e-13
    # Rounding of the gradient comes back multiplied by beta (alpha in [1, 2]) or worse; keep to the mild lanes.
    mild = ((ALPHA >= 0.5) & (ALPHA <= 2) & (BETA * stiff < 1e4)).nonzero()
    np.testing.assert_allclose(again[mild], policy[mild], atol=1e-11)


def test_worst_case_matches_oracle(answers):
    """Including -inf where alpha <= 1 and the policy is zero, and 0 on masked actions."""
    policy = answers[1]
    with np.errstate(divide="ignore"):
        expected = oracle.worst_case(np.broadcast_to(ALPHA, SHAPE[:2]), np.broadcast_to(BETA, SHAPE[:2]), PRIOR, policy)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(answers[3]), finite)
    got, expected = np.where(finite, answers[3], 0), np.where(finite, expected, 0)
    scale = (1 / BETA + np.abs(expected).max(-1))[..., None]
    assert (np.abs(got - expected) / scale).max() <= 1e-12
    assert not finite.all(), "no policy underflows: nothing infinite was compared"
    assert (answers[3][:, PRIOR == 0] == 0).all()


@pytest.mark.parametrize("centre", [0.0, 1.0])
def test_continuity_at_the_removable_points(centre):
    h = np.concatenate([s * 10.0 ** -np.arange(3, 13) for s in (-1, 1)] + [np.zeros(1)])
    index = lanes(alpha=centre + h, beta=(0.3, 10.0))
    alpha, beta = index["alpha"][:, None], index["beta"][:, None]
    shape = (alpha.size, *Q.shape)
    value, policy, cost, _ = map(np.asarray, one_step(regulariser(PRIOR, **index), np.broadcast_to(Q, shape)))
    expected, pi = oracle.best_response(alpha, beta, PRIOR, Q)
    scale = np.abs(np.where(PRIOR > 0, Q, 0)).max(-1) + 1 / beta
    assert (np.abs(value - expected) / scale).max() <= 1e-14
    assert (np.abs(policy - pi).max(-1) / (1 + beta * scale)).max() <= 1e-14
    # KL of a policy that underflows has a finite cost, reverse KL does not: compare where both are ordinary.
    ordinary = policy.min(-1, where=PRIOR > 0, initial=1.0) > 1e-30
    d = oracle.divergence(np.broadcast_to(alpha, shape[:2]), PRIOR, policy)
    np.testing.assert_allclose((cost * beta)[ordinary], d[ordinary], rtol=1e-12, atol=1e-14)
    assert ordinary.mean() > 0.5


def test_alpha_one_is_kl():
    beta = np.array(BETAS)
    q = np.broadcast_to(Q, (beta.size, *Q.shape))
    kl = one_step(rr.kl(beta=beta, prior=PRIOR), q)
    alpha = one_step(rr.alpha(alpha=np.ones(beta.size), beta=beta, prior=PRIOR), q)
    scale = np.abs(np.where(PRIOR > 0, Q, 0)).max(-1) + 1 / beta[:, None]
    assert (np.abs(np.asarray(kl[0] - alpha[0])) / scale).max() <= 4 * EPS
    noise = 1 + beta[:, None, None] * scale[..., None]
    assert (np.abs(np.asarray(kl[1] - alpha[1])) / noise).max() <= 4 * EPS
    live = (PRIOR > 0).all(-1)
    with np.errstate(divide="ignore"):
        exact = np.log((PRIOR * np.exp(beta[:, None, None] * (Q - Q.max(-1, keepdims=True)))).sum(-1)) / beta[:, None]
    assert (np.abs(np.asarray(kl[0]) - exact - Q.max(-1)) / scale)[:, live].max() <= 8 * EPS


def test_alpha_two_is_the_projection_by_sort():
    beta = np.array(BETAS)
    q = np.broadcast_to(Q[::5], (beta.size, *Q[::5].shape))
    policy = np.asarray(rr.alpha(alpha=2.0, beta=beta).argmax(q))
    expected = oracle.project_simplex((beta[:, None, None] * q / ACTIONS).reshape(-1, ACTIONS)).reshape(q.shape)
    noise = 1 + beta[:, None, None] * np.abs(q).max(-1, keepdims=True)
    assert (np.abs(policy - expected) / noise).max() <= 8 * EPS


def test_six_actions_on_the_kink():
    """alpha = 2, beta = 10, rewards 0, .2, ..., 1: the fifth action sits exactly on the threshold."""
    q = np.linspace(0, 1, 6)
    reg = rr.alpha(alpha=2.0, beta=10.0)
    value, policy, cost, _ = map(np.asarray, one_step(reg, q))
    exact = float(oracle.exact_conjugate(2.0, 10.0, np.full(6, 1 / 6), q))
    np.testing.assert_allclose(policy, oracle.project_simplex(10 * q / 6), atol=2e-15)
    np.testing.assert_allclose([value, policy @ q - cost], exact, atol=2e-15)


def test_boundary_action_has_no_value_floor():
    """An action at, or a hair to either side of, the threshold: the value is good to 1e-13 for steep roots too."""
    offsets = np.concatenate([[0.0], *(s * 10.0 ** -np.arange(1.0, 16.0, 2.0) for s in (-1, 1))])
    for alpha in (3.0, 5.0, 8.0):
        edge = -(1.5 ** (alpha - 1)) / (alpha - 1)
        q = np.array([[0.0, 0.0, edge * (1 + e)] for e in offsets])
        reg = rr.alpha(alpha=alpha, beta=1.0)
        value, policy, _, _ = map(np.asarray, one_step(reg, q))
        exact = [float(oracle.exact_conjugate(alpha, 1.0, np.full(3, 1 / 3), row, 40)) for row in q]
        primal = (policy * q).sum(-1) - oracle.divergence(np.full(len(q), alpha), np.full(3, 1 / 3), policy)
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-13, err_msg=str(alpha))
        np.testing.assert_allclose(primal, exact, rtol=0, atol=1e-13, err_msg=str(alpha))


def test_extreme_ranges():
    """beta * range from 1e4 to 1e8: the value stays accurate although probabilities vanish."""
    base = np.array([0.0, -1.0, -0.5, -1e-3, -1e-4, -1e-8])
    index = lanes(alpha=(-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0), beta=(1e4, 1e6, 1e8))
    q = np.broadcast_to(base, (index["alpha"].size, 1, ACTIONS))
    prior = PRIOR[1]
    value, policy, _, _ = map(np.asarray, one_step(regulariser(prior, **index), q))
    for i, (alpha, beta) in enumerate(zip(index["alpha"], index["beta"], strict=True)):
        exact = float(oracle.exact_conjugate(alpha, beta, prior, base, 36))
        assert abs(value[i, 0] - exact) <= 1e-15 + 1e-14 / beta, (alpha, beta)
    assert np.isfinite(policy).all()


@pytest.mark.parametrize("junk", [-np.inf, np.nan, np.inf, 1e300])
def test_masked_scores_do_not_leak(junk):
    """Whatever stands at a masked action, the answer has the bits it has with a dull number there."""
    q = np.broadcast_to(np.where(PRIOR > 0, Q, junk), SHAPE)
    dull = np.broadcast_to(np.where(PRIOR > 0, Q, 0.0), SHAPE)
    for got, expected in zip(one_step(regulariser(), q), one_step(regulariser(), dull), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    finite = np.asarray(one_step(regulariser(), q)[0])
    assert np.isfinite(finite).all()


def test_masking_is_deleting(answers):
    """Priors with zeros give what the smaller problem gives."""
    row = 3
    keep = PRIOR[row] > 0
    small = one_step(regulariser(PRIOR[row][keep]), np.broadcast_to(Q[row][keep], (SHAPE[0], 1, keep.sum())))
    assert (np.abs(answers[0][:, row] - np.asarray(small[0])[:, 0]) / SCALE[:, row]).max() <= 1e-14
    cost = np.abs(answers[2][:, row] - np.asarray(small[2])[:, 0])
    assert (cost / SCALE[:, row]).max() <= 1e-13


def test_a_single_action_costs_nothing(answers):
    single = PRIOR.max(-1) == 1
    np.testing.assert_allclose(
        answers[0][:, single], np.broadcast_to(Q[single, 4], answers[0][:, single].shape), rtol=1e-15
    )
    assert (answers[2][:, single] == 0).all() and (answers[3][:, single] == 0).all()
    np.testing.assert_array_equal(answers[1][:, single], np.broadcast_to(PRIOR[single], answers[1][:, single].shape))


def test_shift_and_scale(answers):
    """conjugate(q + c) = conjugate(q) + c, and k conjugate(q; beta) = conjugate(k q; beta / k) for powers of two."""
    shifted = np.asarray(one_step(regulariser(), np.broadcast_to(Q + 8.0, SHAPE))[0])
    assert (np.abs(shifted - 8 - answers[0]) / (SCALE + 8)).max() <= 1e-13
    scaled = one_step(regulariser(beta=LANES["beta"] / 1024), np.broadcast_to(Q * 1024, SHAPE))
    assert (np.abs(np.asarray(scaled[0]) / 1024 - answers[0]) / SCALE).max() <= 1e-14


def test_state_scale_multiplies_beta(answers):
    scale = np.linspace(0.5, 2.0, len(Q))
    scaled = one_step(regulariser(state_scale=scale), np.broadcast_to(Q, SHAPE))
    value, _ = oracle.best_response(ALPHA, BETA * scale, PRIOR, Q)
    assert (np.abs(np.asarray(scaled[0]) - value) / SCALE).max() <= 1e-13
    assert np.abs(np.asarray(scaled[0]) - answers[0]).max() > 1e-3
    kl = rr.kl(beta=2.0, prior=PRIOR, state_scale=scale)
    expected = oracle.conjugate(1.0, 2.0 * scale, PRIOR, Q)
    np.testing.assert_allclose(np.asarray(kl.conjugate(Q)), expected, rtol=1e-13, atol=1e-13)


def test_forms_of_the_prior():
    """None is uniform; [A] serves every state; a log prior is the logarithm of a prior, masks included."""
    q, beta, alpha = Q[:7], 2.0, 1.5
    uniform = rr.alpha(alpha=alpha, beta=beta).conjugate(q)
    given = rr.alpha(alpha=alpha, beta=beta, prior=PRIOR[0]).conjugate(q)
    np.testing.assert_allclose(np.asarray(uniform), np.asarray(given), rtol=1e-14)
    for factory in (rr.kl, lambda **kw: rr.alpha(alpha=alpha, **kw)):
        for prior in (PRIOR[3], PRIOR[:7]):
            with np.errstate(divide="ignore"):
                log_prior = np.log(prior)
            direct, logarithmic = factory(beta=beta, prior=prior), factory(beta=beta, log_prior=log_prior)
            np.testing.assert_allclose(
                np.asarray(direct.conjugate(q)), np.asarray(logarithmic.conjugate(q)), rtol=1e-14
            )
            np.testing.assert_allclose(np.asarray(direct.argmax(q)), np.asarray(logarithmic.argmax(q)), atol=1e-13)
    far = rr.kl(beta=1.0, log_prior=np.array([0.0, -1000.0]))
    np.testing.assert_allclose(np.asarray(far.conjugate(np.array([0.0, 2000.0]))), 1000.0, rtol=1e-14)


def test_projection_by_sort_is_the_nearest_point():
    """The oracle's projection satisfies the variational inequality that characterises it."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(40, 4))
    p = oracle.project_simplex(x)
    other = rng.dirichlet(np.ones(4), 200)
    assert (np.einsum("na,nka->nk", x - p, other[None] - p[:, None]) <= 1e-14).all()


@pytest.mark.parametrize("order", [-3.0, 0.5, 1.5, 3.0])
def test_no_action_is_lost_to_fusion(order):
    """Compiled together with what makes its argument, a conjugate is still finite and what it is alone.

    Some compilers evaluate the product anew in every kernel that reads it, once with a fused multiply-add and once
    without: then no gap to the best action is exactly 0.
    """
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1000, 4)), rng.normal(size=(1000, 1))
    prior = np.array([1e-9, 0.3, 0.5, 0.2 - 1e-9])
    reg = rr.alpha(order, 2.5, prior)
    fused, policy = jax.jit(lambda a, b: (reg.conjugate(a * b), reg.argmax(a * b)))(a, b)
    np.testing.assert_allclose(np.asarray(fused), np.asarray(reg.conjugate(a * b)), atol=1e-14)
    np.testing.assert_allclose(np.asarray(policy), np.asarray(reg.argmax(a * b)), atol=1e-11)


def test_critical_beta_near_the_largest_number():
    """In single precision: 1e38 is no root that is infinite, as long as it times the largest entry is a number."""
    prior = np.array([9.9998474e-01, 1.5258789e-05, 9.0949470e-13], np.float32)
    dr = np.array([-4.0858667e-05, -3.5098817e-06, 2.4326261e-04], np.float32)
    critical = rr.critical_beta(rr.alpha(np.float32(4.370158), np.float32(1.0), prior), dr)
    assert 1e37 < float(critical) < 1e38
    with jax.enable_x64(True):
        slack = rr.slack(rr.alpha(4.370158, float(critical), prior / prior.sum(dtype=float)), dr.astype(float))
    assert abs(float(slack)) <= 64 * np.finfo(np.float32).eps * np.abs(dr).max()


def test_a_conjugate_next_to_overflow():
    """In single precision, beta * range from 1e36 to 1e38: e^-hl is below the smallest number there."""
    prior = np.array([7.5e-01, 9.0949470e-13, 2.5e-01, 1.4901161e-08], np.float32)
    q = np.array([-3.1604398e06, 7.7639735e06, -1.1219116e06, -6.0085175e05], np.float32)
    order = np.float32(4.778761)
    for beta in np.array([1e29, 1e30, 3e30, 1e31], np.float32):
        got = float(rr.alpha(order, beta, prior).conjugate(q))
        with jax.enable_x64(True):
            exact = prior / prior.sum(dtype=float)
            right = float(rr.alpha(float(order), float(beta), exact).conjugate(q.astype(float)))
        # Logarithms of the prior are rounded.
        allowed = (128 + 4 * np.abs(np.log(prior)).max()) * np.finfo(np.float32).eps * np.abs(q).max()
        assert abs(got - right) <= allowed
