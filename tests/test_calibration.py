"""Critical and calibrated beta: inverses of slack, derivatives, corners, and frequencies on fresh samples."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import ALPHAS, garnet_case

import robustreg as rr

ACTIONS = 4
PRIOR = np.array([[1, 2, 4, 9], [4, 4, 4, 4], [8, 0, 4, 4]]) / 16
STATES = len(PRIOR)
ALLOWED = PRIOR > 0
ORDERS = (*ALPHAS, 1 - 1e-9, 1 + 1e-9)


def regulariser(order, **kw):
    """KL at alpha = 1 exactly comes both ways: as `rr.alpha` here, as `rr.kl` in its own test."""
    return rr.alpha(order, 1.0, PRIOR, **kw)


def perturbations(rng, n):
    """Signs of every kind, entries of very different size, scales from 1e-8 to 1e8, means just below 0."""
    x = rng.normal(size=(n, STATES, ACTIONS)) * 10.0 ** rng.uniform(-2, 2, (n, STATES, ACTIONS))
    near = x - (PRIOR * x).sum(-1, keepdims=True) * (1 + 10.0 ** rng.uniform(-3, 0, (n, STATES, 1)))
    x = np.where(rng.random((n, STATES, 1)) < 0.3, near, x) * 10.0 ** rng.uniform(-8, 8, (n, STATES, 1))
    x[:5], x[5:10], x[10:15] = 0.0, -np.abs(x[5:10]), np.round(np.sign(x[10:15]))  # zero, recession, ties
    return x


def size(x):
    return np.where(ALLOWED, np.abs(x), 0).max(-1)


def bisect(order, x, sweeps=90):
    """The critical beta by bisection of the oracle's conjugate, in the logarithm and relative to the largest entry."""
    low, high = (np.full(x.shape[:-1], v) for v in (-30.0, 80.0))
    scale = np.where(size(x) > 0, size(x), 1)
    unit = x / scale[..., None]
    for _ in range(sweeps):
        middle = 0.5 * (low + high)
        inside = oracle.conjugate(order, np.exp(middle), PRIOR, unit) <= 0
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return np.exp(low) / scale, low > 79


@pytest.mark.parametrize("order", ORDERS)
def test_critical_beta_inverts_slack(order):
    """Infinite, 0 or the root exactly where it must be; slack there is 0; the oracle's bisection agrees."""
    x = perturbations(np.random.default_rng(0), 300)
    beta = np.asarray(rr.critical_beta(regulariser(order), x))
    assert beta.shape == (300, STATES)
    top, mean = np.where(ALLOWED, x, -np.inf).max(-1), (PRIOR * x).sum(-1)
    np.testing.assert_array_equal(beta == np.inf, top <= 0)
    clear = np.abs(mean) > 1e-12 * size(x)
    np.testing.assert_array_equal((beta == 0)[clear], ((mean >= 0) & (top > 0))[clear])
    root = np.isfinite(beta) & (beta > 0) & clear
    assert root.mean() > 0.3
    at = rr.alpha(order, 1.0, PRIOR, state_scale=np.where(root, beta, 1))
    slack = np.asarray(rr.slack(at, x))
    assert (np.abs(slack) <= 1e-12 * (size(x) + 1 / np.where(root, beta, 1)))[root].all()
    assert (np.abs(slack) <= 1e-8 * size(x))[root].all()
    # A percent to either side the sign is what it must be, where a percent can be told from rounding.
    for factor, sign in ((0.99, 1), (1.01, -1)):
        near = np.asarray(rr.slack(rr.alpha(order, 1.0, PRIOR, state_scale=np.where(root, beta * factor, 1)), x))
        told = root & (np.abs(mean) > 1e-4 * size(x)) & (top > 1e-3 * size(x))
        assert (sign * near > 0)[told].all()
    some = slice(0, 60)
    reference, beyond = bisect(order, x[some])
    told = root[some] & ~beyond & (np.abs(mean) > 1e-3 * size(x))[some]
    assert told.sum() > 30
    np.testing.assert_allclose(beta[some][told], reference[told], rtol=1e-7)


def test_kl_state_scale_and_reductions():
    """KL is alpha = 1; state_scale divides; one beta for all states is the smallest; own beta does not matter."""
    x = perturbations(np.random.default_rng(1), 200)
    plain = np.asarray(rr.critical_beta(rr.kl(7.0, PRIOR), x))
    np.testing.assert_allclose(plain, np.asarray(rr.critical_beta(regulariser(1.0), x)), rtol=1e-9)
    scale = np.array([0.5, 2.0, 4.0])
    scaled = np.asarray(rr.critical_beta(rr.kl(1.0, PRIOR, state_scale=scale), x))
    np.testing.assert_allclose(scaled, plain / scale, rtol=1e-12)
    np.testing.assert_array_equal(np.asarray(rr.critical_beta(rr.kl(1.0, PRIOR), x, per_state=False)), plain.min(-1))
    radius = np.asarray(rr.RobustSet(rr.kl(7.0, PRIOR)).radius(x))
    np.testing.assert_allclose(radius, plain / 7, rtol=1e-12)
    two = np.stack([[-1.0, 3.0], [0.5, -2.0]])
    uniform = np.asarray(rr.critical_beta(rr.kl(np.array([1.0, 2.0])), np.stack([two, 2 * two])))
    np.testing.assert_allclose(uniform[0], 2 * uniform[1])
    assert uniform[0][0] == 0 and 0 < uniform[0][1] < np.inf


@pytest.mark.parametrize("order", (-1.0, 0.0, 0.5, 1.0, 2.0, 3.0))
def test_aggregated_critical_beta(order):
    """Weighted over states: the weighted sum of conjugates is 0 there; unvisited states count for nothing."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(400, STATES, ACTIONS)) - 0.3
    weights = rng.exponential(size=(400, STATES))
    weights[:50, 1] = 0.0
    beta = np.asarray(rr.critical_beta(regulariser(order), x, weights=weights))
    total = lambda f: (weights * f).sum(-1)  # noqa: E731  # three uses, two lines apart
    top, mean = total(np.where(ALLOWED, x, -np.inf).max(-1)), total((PRIOR * x).sum(-1))
    np.testing.assert_array_equal(beta == np.inf, top <= 0)
    np.testing.assert_array_equal(beta == 0, (mean >= 0) & (top > 0))
    root = np.isfinite(beta) & (beta > 0)
    assert root.mean() > 0.5
    conjugate = oracle.conjugate(order, np.where(root, beta, 1)[:, None], PRIOR, x)
    assert (np.abs(total(conjugate)) <= 1e-10 * weights.sum(-1) * (1 + 1 / np.where(root, beta, 1)))[root].all()
    each = np.asarray(rr.critical_beta(regulariser(order), x[50:], per_state=False))
    assert (beta[50:] >= each * (1 - 1e-9)).all() and (beta[50:] > 2 * each).any()
    alone = np.asarray(rr.critical_beta(regulariser(order), x, weights=np.eye(STATES)[2]))
    np.testing.assert_allclose(alone, np.asarray(rr.critical_beta(regulariser(order), x))[:, 2], rtol=1e-9)
    poisoned = x.copy()
    poisoned[:50, 1] = np.nan
    np.testing.assert_array_equal(np.asarray(rr.critical_beta(regulariser(order), poisoned, weights=weights)), beta)


@pytest.mark.parametrize("order", (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0))
def test_derivatives(order):
    """Every leaf against central differences, forward against reverse, and a second derivative."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, STATES, ACTIONS)) - 0.5
    keep = np.asarray(rr.critical_beta(regulariser(order), x))
    mean = (PRIOR * x).sum(-1)
    keep = (np.isfinite(keep) & (mean < -0.05) & (np.where(ALLOWED, x, -np.inf).max(-1) > 0.05)).all(-1)
    x = x[keep][:6]
    assert len(x) == 6
    weights = rng.exponential(size=STATES)

    def measure(leaves):
        order, logits, scale, weights, x = leaves
        log_prior = jax.nn.log_softmax(jnp.where(ALLOWED, logits, -jnp.inf))
        reg = rr.alpha(order, 1.0, log_prior=log_prior, state_scale=scale)
        return jnp.log(rr.critical_beta(reg, x)), jnp.log(rr.critical_beta(reg, x, weights=weights))

    logits = np.log(np.where(ALLOWED, PRIOR, 1))
    leaves = tuple(jnp.asarray(v) for v in (order, logits, np.array([0.5, 1.0, 2.0]), weights, x))
    direction = tuple(jnp.asarray(rng.normal(size=np.shape(v))) for v in leaves)
    step = 1e-6
    ahead, behind = (measure(tuple(v + s * d for v, d in zip(leaves, direction))) for s in (step, -step))
    slope = jax.jvp(measure, (leaves,), (direction,))[1]
    for a, b, s in zip(ahead, behind, slope):
        np.testing.assert_allclose(s, (a - b) / (2 * step), rtol=1e-6, atol=1e-6)
    pulled = jax.grad(lambda v: sum(jnp.sum(y) for y in measure(v)))(leaves)
    paired = sum(jnp.sum(a * b) for a, b in zip(pulled, direction))
    np.testing.assert_allclose(paired, sum(jnp.sum(s) for s in slope), rtol=1e-10)
    if order in (0.5, 1.0):

        def along(s):
            return sum(jnp.sum(y) for y in measure(tuple(v + s * d for v, d in zip(leaves, direction))))

        second = jax.grad(jax.grad(along))(0.0)
        step = 1e-4
        difference = (jax.grad(along)(step) - jax.grad(along)(-step)) / (2 * step)
        np.testing.assert_allclose(second, difference, rtol=1e-5)


def test_corners():
    """Zero, ties, masks, infinite and single actions; derivatives there are 0; NaN in one lane is nobody else's."""
    order = jnp.asarray([0.5, 1.0, 2.0])
    reg = rr.alpha(order, 1.0, PRIOR)
    x = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [-1, 9, -2, 0], [0, 0, 0, 1e-30], [1, -1, 1, -1.5]])[:, None]
    x = np.broadcast_to(x[None], (3, 5, STATES, ACTIONS)).astype(float).copy()
    beta = np.asarray(rr.critical_beta(reg, x))
    assert (beta[:, 0] == np.inf).all() and (beta[:, 1] == 0).all() and (beta[:, 3] == 0).all()
    np.testing.assert_array_equal(beta[:, 2] == np.inf, np.broadcast_to([False, False, True], (3, STATES)))
    assert np.isfinite(beta[:, 4]).all()
    slope = np.asarray(jax.grad(lambda y: jnp.sum(jnp.where(jnp.isfinite(v := rr.critical_beta(reg, y)), v, 0)))(x))
    assert np.isfinite(slope).all() and (slope[:, [0, 1, 3]] == 0).all() and (slope[:, :, 2, 1] == 0).all()
    assert (slope[:, 4, 1] != 0).all()
    alone = rr.kl(1.0, np.eye(ACTIONS)[2])
    assert float(rr.critical_beta(alone, np.array([5.0, 5, -1, 5]))) == np.inf
    assert float(rr.critical_beta(alone, np.array([-5.0, -5, 1, -5]))) == 0
    # An action that nobody takes: its worst case is minus infinity, and beta is the policy's own.
    policy = np.array([0.5, 0.5, 0, 0])
    for reg_, exact in ((rr.kl(3.0), 3.0), (rr.alpha(0.5, 3.0), 3.0)):
        again = float(rr.critical_beta(reg_, rr.worst_case(reg_, policy)))
        np.testing.assert_allclose(again, exact, rtol=1e-12)
    poisoned = x.copy()
    poisoned[1, 4, 0, 0], poisoned[2, 2, 2, 1] = np.nan, np.nan  # the second is masked: never looked at
    lost = np.array(rr.critical_beta(reg, poisoned))
    assert np.isnan(lost[1, 4, 0]) and np.isnan(lost).sum() == 1
    lost[1, 4, 0] = beta[1, 4, 0]
    np.testing.assert_array_equal(lost, beta)
    assert np.isnan(np.asarray(rr.critical_beta(reg, poisoned, per_state=False))).sum() == 1
    with pytest.raises(TypeError, match="entropy"):
        rr.critical_beta(rr.entropy(1.0), x)
    with pytest.raises(TypeError, match="first argument"):
        rr.critical_beta(x, x)  # type: ignore[arg-type]  # the point of the test


@pytest.mark.parametrize("order", (-1.0, 0.0, 0.5, 1.0, 1 - 1e-6, 2.0, 3.0))
def test_float32(order):
    """Scales of 1e-8 and 1e8; means of 1% of the perturbation keep three digits."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(200, STATES, ACTIONS))
    x = x - (PRIOR * x).sum(-1, keepdims=True) - 0.01 * np.abs(x).max(-1, keepdims=True)
    x = x * np.array([1e-8, 1.0, 1e8])[:, None]
    x = x.astype(np.float32)
    narrow = rr.alpha(np.float32(order), np.float32(1), PRIOR.astype(np.float32))
    beta = rr.critical_beta(narrow, x)
    assert beta.dtype == np.float32
    wide = np.asarray(rr.critical_beta(rr.alpha(float(np.float32(order)), 1.0, PRIOR), x.astype(float)))
    np.testing.assert_allclose(np.asarray(beta), wide, rtol=2e-3)


# ---------------------------------------------------------------------------------------------------------------
# calibration

LANES, SAMPLES, FRESH, COVERAGE = 600, 19, 200, 0.9


def frequencies(beta, scores):
    """Share of fresh critical betas that reach the calibrated one, its mean over calibrations and standard error."""
    share = (scores >= np.asarray(beta)[:, None]).mean(-1)
    return share.mean(), share.std() / np.sqrt(len(share))


@pytest.mark.parametrize("order", (0.5, 1.0, 2.0))
def test_calibrated_frequency_on_fresh_samples(order):
    """Many calibrations from few samples each: 90% of fresh ones are in the set, neither fewer nor more.

    With N = 19 and k = 2 the frequency is exactly 0.9 on average; the plain quantile, one rank off, fails this test.
    """
    rng = np.random.default_rng(5)
    reg = regulariser(order)
    x = rng.normal(size=(LANES, SAMPLES + FRESH, STATES, ACTIONS)) * rng.exponential(size=(LANES, 1, 1, 1)) - 1.5
    beta = rr.calibrate(rr.alpha(np.full(LANES, order), 1.0, PRIOR), x[:, :SAMPLES], COVERAGE)
    assert beta.shape == (LANES,)
    scores = np.asarray(rr.critical_beta(reg, x, per_state=False))
    mean, error = frequencies(beta, scores[:, SAMPLES:])
    assert error < 0.004 and abs(mean - COVERAGE) <= 4 * error
    # The sets themselves: slack at the calibrated beta, by the definition of membership.
    at = rr.alpha(np.full(LANES, order), beta, PRIOR)
    inside = (np.asarray(rr.slack(at, x[:, SAMPLES:])) >= 0).all(-1)
    assert abs(inside.mean() - mean) < 1e-4
    plain = np.quantile(scores[:, :SAMPLES], 1 - COVERAGE, axis=-1)
    naive, error = frequencies(plain, scores[:, SAMPLES:])
    assert COVERAGE - naive > 4 * error


def test_calibrated_guarantee_of_a_policy():
    """The aggregated set: a fixed policy's guarantee is met with the frequency, at a weaker regulariser."""
    rng = np.random.default_rng(6)
    case = garnet_case(2)
    m, reg = case.mdp(0.9), rr.kl(1.0, case.prior)
    policy = np.asarray(rr.solve(m, rr.kl(3.0, case.prior)).policy)
    x = 0.5 * rng.normal(size=(200, SAMPLES + 40, *case.reward.shape)) - 0.1
    lanes = rr.kl(np.ones(200), case.prior)
    beta = rr.calibrate(lanes, x[:, :SAMPLES], COVERAGE, mdp=m, policy=policy)
    safe = rr.calibrate(lanes, x[:, :SAMPLES], COVERAGE)
    assert (np.asarray(beta) > 1.5 * np.asarray(safe)).all()
    visits = oracle.occupancy(case.P, case.initial, np.asarray(0.9), policy)
    fresh, mu = x[:, SAMPLES:], visits
    scores = np.asarray(rr.critical_beta(reg, fresh, weights=mu.sum(-1)))
    mean, error = frequencies(beta, scores)
    assert error < 0.006 and abs(mean - COVERAGE) <= 4 * error
    # The guarantee itself holds at least that often: the loss of return is at most the price of the policy.
    price = (mu.sum(-1) * oracle.divergence(1.0, case.prior, policy)).sum() / np.asarray(beta)
    loss = (mu * fresh).sum((-1, -2))
    covered = scores >= np.asarray(beta)[:, None]
    assert (loss <= price[:, None] + 1e-9)[covered].all()
    assert (loss <= price[:, None]).mean() >= COVERAGE - 4 * error


def test_ranks_derivatives_and_errors():
    """The rank of every coverage; too few samples give 0; the derivative is that of one sample."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(9, STATES, ACTIONS)) - 0.7
    reg = rr.kl(1.0, PRIOR)
    scores = np.sort(np.asarray(rr.critical_beta(reg, x, per_state=False)))
    ranks = {0.95: 0, 0.9: 1, 0.89: 1, 0.8: 2, 0.75: 2, 0.7: 3, 0.1: 9}
    for coverage, k in ranks.items():
        expected = scores[k - 1] if k else 0.0
        assert float(rr.calibrate(reg, x, coverage)) == expected, coverage
    batch = rr.calibrate(rr.kl(np.ones(7), PRIOR), np.broadcast_to(x, (7, *x.shape)), list(ranks))
    np.testing.assert_allclose(np.asarray(batch), [scores[k - 1] if k else 0 for k in ranks.values()], rtol=1e-12)

    jitted = jax.jit(lambda y, c: rr.calibrate(reg, y, c))
    mid = next(k for k in range(1, 9) if 0 < scores[k] < np.inf) + 1
    coverage = 1 - mid / 10
    assert float(jitted(x, coverage)) == scores[mid - 1]
    slope = np.asarray(jax.grad(lambda y: rr.calibrate(reg, y, coverage))(x))
    assert (np.abs(slope).sum((-1, -2)) > 0).sum() == 1 and (slope[:, 2, 1] == 0).all()
    direction = rng.normal(size=x.shape)
    step = 1e-6
    difference = rr.calibrate(reg, x + step * direction, coverage) - rr.calibrate(reg, x - step * direction, coverage)
    np.testing.assert_allclose((slope * direction).sum(), difference / (2 * step), rtol=1e-6)
    poisoned = np.stack([x, x])
    poisoned[0, 3, 0, 0] = np.nan
    both = np.asarray(rr.calibrate(rr.kl(np.ones(2), PRIOR), poisoned, coverage))
    assert np.isnan(both[0]) and both[1] == scores[mid - 1]

    for bad in (0.0, 1.0, -0.5, np.nan):
        with pytest.raises(ValueError, match="coverage"):
            rr.calibrate(reg, x, bad)
    with pytest.raises(ValueError, match="perturbations have shape"):
        rr.calibrate(reg, x[0], 0.9)
    with pytest.raises(ValueError, match="both mdp and policy"):
        rr.calibrate(reg, x, 0.9, policy=PRIOR)
    case = garnet_case()
    with pytest.raises(ValueError, match="perturbations has shape"):
        rr.calibrate(rr.kl(1.0), x, 0.9, mdp=case.mdp(0.9), policy=case.prior)
