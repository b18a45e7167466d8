"""Critical and calibrated beta: inverses of slack, derivatives, corners, and frequencies on fresh samples."""

import functools

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
    x = perturbations(np.random.default_rng(1), 300)
    plain = np.asarray(rr.critical_beta(rr.kl(7.0, PRIOR), x))
    np.testing.assert_allclose(plain, np.asarray(rr.critical_beta(regulariser(1.0), x)), rtol=1e-9)
    scale = np.array([0.5, 2.0, 4.0])
    scaled = np.asarray(rr.critical_beta(rr.kl(1.0, PRIOR, state_scale=scale), x))
    np.testing.assert_allclose(scaled, plain / scale, rtol=1e-12)
    np.testing.assert_array_equal(np.asarray(rr.critical_beta(rr.kl(1.0, PRIOR), x, per_state=False)), plain.min(-1))
    radius = np.asarray(rr.RobustSet(rr.kl(7.0, PRIOR)).radius(x))
    # Two programs: a root near 0 is as `-2 mean/variance`, and a mean close to 0 is known to rounding of its summands.
    root = np.isfinite(plain) & (plain > 0)
    np.testing.assert_array_equal(radius[~root], plain[~root])
    condition = np.where(ALLOWED, np.abs(x), 0).max(-1)[root] / np.abs((PRIOR * x).sum(-1)[root])
    assert (np.abs(7 * radius[root] / plain[root] - 1) <= 1e-12 + np.finfo(float).eps * condition).all()
    two = np.stack([[-1.0, 3.0], [0.5, -2.0]])
    uniform = np.asarray(rr.critical_beta(rr.kl(np.array([1.0, 2.0])), np.stack([two, 2 * two])))
    np.testing.assert_allclose(uniform[0], 2 * uniform[1])
    assert uniform[0][0] == 0 and 0 < uniform[0][1] < np.inf


@pytest.mark.parametrize("order", (-1.0, 0.0, 0.5, 1.0, 2.0, 3.0))
def test_aggregated_critical_beta(order):
    """Weighted over states: the weighted sum of conjugates is 0 there; unvisited states count for nothing."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, STATES, ACTIONS)) - 0.3
    weights = rng.exponential(size=(300, STATES))
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
    each = np.asarray(rr.critical_beta(regulariser(order), x))
    least = each[50:].min(-1)
    assert (beta[50:] >= least * (1 - 1e-9)).all() and (beta[50:] > 2 * least).any()
    alone = np.asarray(rr.critical_beta(regulariser(order), x, weights=np.tile(np.eye(STATES)[2], (300, 1))))
    np.testing.assert_allclose(alone, each[:, 2], rtol=1e-9)
    poisoned = x.copy()
    poisoned[:50, 1] = np.nan
    np.testing.assert_array_equal(np.asarray(rr.critical_beta(regulariser(order), poisoned, weights=weights)), beta)


def per_state(leaves):
    """Logarithms of critical betas, a function of every leaf."""
    order, logits, scale, _, x = leaves
    log_prior = jax.nn.log_softmax(jnp.where(ALLOWED, logits, -jnp.inf))
    return jnp.log(rr.critical_beta(rr.alpha(order, 1.0, log_prior=log_prior, state_scale=scale), x))


def aggregated(leaves):
    """The same, of all states together."""
    order, logits, scale, weights, x = leaves
    log_prior = jax.nn.log_softmax(jnp.where(ALLOWED, logits, -jnp.inf))
    return jnp.log(rr.critical_beta(rr.alpha(order, 1.0, log_prior=log_prior, state_scale=scale), x, weights=weights))


def moved(leaves, direction, step):
    return tuple(v + step * d for v, d in zip(leaves, direction))


@functools.partial(jax.jit, static_argnums=0)
def pull(measure, leaves):
    """A weighted sum of a measure and its gradient by reverse mode, in one program."""

    def total(leaves):
        y = measure(leaves)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return jax.value_and_grad(total)(leaves)


def a_point(order):
    """Leaves at which every critical beta is a root well away from 0 and infinity, and a direction."""
    rng = np.random.default_rng(3)
    x = samples(rng, (6, STATES, ACTIONS), PRIOR)
    leaves = (order, np.log(np.where(ALLOWED, PRIOR, 1)), np.array([0.5, 1.0, 2.0]), rng.exponential(size=STATES), x)
    leaves = tuple(np.asarray(v, float) for v in leaves)
    size_ = (1.0, 1.0, 1.0, 1.0, 0.1)
    return leaves, tuple(np.asarray(s * rng.normal(size=np.shape(v))) for s, v in zip(size_, leaves))


ROOTS = (per_state, pytest.param(aggregated, marks=pytest.mark.slow))


@pytest.mark.parametrize("measure", ROOTS)
@pytest.mark.parametrize("order", (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0))
def test_gradients(measure, order):
    """Reverse mode against central differences, every leaf."""
    leaves, direction = a_point(order)
    gradient = [np.asarray(g) for g in pull(measure, leaves)[1]]
    step = 1e-6
    for i, (slope, along) in enumerate(zip(gradient, direction)):
        one = tuple(d if i == j else np.zeros_like(d) for j, d in enumerate(direction))
        ahead, behind = (pull(measure, moved(leaves, one, s))[0] for s in (step, -step))
        np.testing.assert_allclose(np.sum(slope * along), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    assert (gradient[4][:, 2, 1] == 0).all(), "masked"


@pytest.mark.slow
@pytest.mark.parametrize("measure", (per_state, aggregated))
def test_forward_mode(measure):
    """The same pairing from either side."""
    forward = jax.jit(lambda leaves, direction: jax.jvp(lambda v: pull(measure, v)[0], (leaves,), (direction,))[1])
    for order in (-1.0, 0.5, 1.0, 2.0):
        leaves, direction = a_point(order)
        paired = sum(np.sum(np.asarray(a) * b) for a, b in zip(pull(measure, leaves)[1], direction))
        np.testing.assert_allclose(forward(leaves, direction), paired, rtol=1e-10)


@functools.cache
def curvature():
    """Compiled: first and second derivative of a weighted sum along a line, at a step from a point."""

    def slope(step, leaves, direction):
        return jax.grad(lambda s: pull(aggregated, moved(leaves, direction, s))[0])(step)

    return jax.jit(jax.value_and_grad(slope))


@pytest.mark.slow
@pytest.mark.parametrize("order", (0.5, 1.0))
def test_second_derivatives(order):
    """Reverse over reverse mode against central differences of the first derivative, in every leaf at once."""
    leaves, direction = a_point(order)
    step = 1e-4
    ahead, behind = (curvature()(s, leaves, direction)[0] for s in (step, -step))
    difference = (ahead - behind) / (2 * step)
    assert np.isfinite(difference)
    np.testing.assert_allclose(curvature()(0.0, leaves, direction)[1], difference, rtol=1e-5)


def corners():
    """A batch of three regularisers, and zero, a tie, a mask, an underflow, and a root."""
    order = jnp.asarray([0.5, 1.0, 2.0])
    reg = rr.alpha(order, 1.0, PRIOR)
    x = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [-1, 9, -2, 0], [0, 0, 0, 1e-30], [1, -1, 1, -1.5]])[:, None]
    x = np.broadcast_to(x[None], (3, 5, STATES, ACTIONS)).astype(float).copy()
    return reg, x


@pytest.mark.slow
def test_derivatives_of_corners():
    """Where there is no root they are 0."""
    reg, x = corners()

    def total(y):
        beta = rr.critical_beta(reg, y)
        return jnp.sum(jnp.where(jnp.isfinite(beta), beta, 0))

    slope = np.asarray(jax.jit(jax.grad(total))(x))
    assert np.isfinite(slope).all() and (slope[:, [0, 1, 3]] == 0).all() and (slope[:, :, 2, 1] == 0).all()
    assert (slope[:, 4, 1] != 0).all()


def test_corners():
    """Zero, ties, masks, infinite and single actions; NaN in one lane is nobody else's."""
    reg, x = corners()
    beta = np.asarray(rr.critical_beta(reg, x))
    assert (beta[:, 0] == np.inf).all() and (beta[:, 1] == 0).all() and (beta[:, 3] == 0).all()
    np.testing.assert_array_equal(beta[:, 2] == np.inf, np.broadcast_to([False, False, True], (3, STATES)))
    assert np.isfinite(beta[:, 4]).all()
    alone = rr.kl(1.0, np.eye(ACTIONS)[2])
    assert float(rr.critical_beta(alone, np.array([5.0, 5, -1, 5]))) == np.inf
    assert float(rr.critical_beta(alone, np.array([-5.0, -5, 1, -5]))) == 0
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


def test_losses_of_minus_infinity():
    """Actions taken out of every policy at a finite price, or (alpha <= 0) at none; and the policy's own beta again."""
    order = np.array([-1.0, 0.0, 0.01, 0.5, 1.0, 2.0, 3.0])
    prior = np.array([1, 2, 4, 9]) / 16
    x = np.array([[-np.inf, 1, -2, -0.5], [-np.inf, -np.inf, 1, -0.1], [-np.inf, -1, 0, -3], [-np.inf, np.nan, 1, -1]])
    beta = jax.jit(lambda a, y: rr.critical_beta(rr.alpha(a, 1.0, prior), y[None]))
    found = np.stack([np.asarray(beta(np.asarray(a), x))[0] for a in order])
    assert (found[:2, :2] == np.inf).all() and (found[:, 2] == np.inf).all() and np.isnan(found[:, 3]).all()
    at = found[2:, :2]
    assert np.isfinite(at).all() and (at > 0).all()
    # What is left is a policy over the other actions: the oracle's conjugate at a loss beyond every other.
    large = np.where(np.isneginf(x[:2]), -1e300, x[:2])
    rest = slice(1, None)  # at alpha = 0.01 even that loss is felt
    level = oracle.conjugate(order[3:, None], at[rest], prior, large)
    np.testing.assert_allclose(level, 0, atol=1e-12)
    for order_, reg in ((1.0, rr.kl(3.0, prior)), (0.5, rr.alpha(0.5, 3.0, prior))):
        worst = rr.worst_case(reg, np.array([0.5, 0.5, 0, 0]))
        assert np.isneginf(worst[2:]).all()
        again = np.asarray(beta(np.asarray(order_), np.tile(worst, (4, 1))))
        np.testing.assert_allclose(again[0, 0], 3.0, rtol=1e-12)
    slope = np.asarray(jax.jit(jax.grad(lambda y: jnp.sum(jnp.log(beta(0.5, y)[0, :2]))))(x))
    assert np.isfinite(slope[:2]).all() and (slope[:2][np.isneginf(x[:2])] == 0).all() and (slope[0, 1:] != 0).all()
    # In a state that nobody visits, it counts for nothing.
    two = np.stack([x[0], np.where(np.isneginf(x[0]), -9.0, x[0])])
    weighed = rr.critical_beta(rr.alpha(0.0, 1.0, prior), two, weights=np.array([0.0, 2.0]))
    np.testing.assert_allclose(weighed, np.asarray(beta(np.asarray(0.0), np.tile(two, (2, 1))))[0, 1], rtol=1e-12)


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

LANES, SAMPLES, COVERAGE = 300, 19, 0.9


def frequencies(beta, scores):
    """Share of fresh critical betas that reach the calibrated one, its mean over calibrations and standard error."""
    share = (scores >= np.asarray(beta)[:, None]).mean(-1)
    return share.mean(), share.std() / np.sqrt(len(share))


def samples(rng, shape, prior):
    """Perturbations with a proper critical beta each: means below 0, largest entries above."""
    x = rng.normal(size=shape)
    x = np.where(prior > 0, x - (prior * x).sum(-1, keepdims=True), -np.inf)
    x = x - rng.uniform(0.05, 0.95, (*shape[:-1], 1)) * x.max(-1, keepdims=True)
    return np.where(prior > 0, x, 0) * rng.exponential(size=(shape[0],) + (1,) * (len(shape) - 1))


@pytest.mark.parametrize("order", (0.5, 1.0, 2.0))
def test_calibrated_frequency_on_fresh_samples(order):
    """Many calibrations from few samples each: 90% of fresh ones are in the set, neither fewer nor more.

    With N = 19 and k = 2 the frequency is exactly 0.9 on average; the plain quantile, one rank off, fails this test.
    """
    rng = np.random.default_rng(5)
    reg = regulariser(order)
    known, *fresh = np.split(samples(rng, (LANES, 3 * SAMPLES, STATES, ACTIONS), PRIOR), 3, axis=1)
    beta = np.asarray(rr.calibrate(reg, known, COVERAGE))
    assert beta.shape == (LANES,) and (beta > 0).all()
    scores = np.concatenate([np.asarray(rr.critical_beta(reg, x, per_state=False)) for x in fresh], axis=-1)
    mean, error = frequencies(beta, scores)
    assert error < 0.006 and abs(mean - COVERAGE) <= 4 * error
    # The sets themselves, by the definition of membership and the oracle.
    some = fresh[0][:100]
    inside = (oracle.conjugate(order, beta[:100, None, None], PRIOR, some) <= 0).all(-1)
    assert (inside == (scores[:100, :SAMPLES] >= beta[:100, None])).mean() > 0.999
    ranked = np.asarray(rr.critical_beta(reg, known, per_state=False))
    naive, error = frequencies(np.quantile(ranked, 1 - COVERAGE, axis=-1), scores)
    assert COVERAGE - naive > 4 * error


def test_calibrated_guarantee_of_a_policy():
    """The aggregated set: a fixed policy's guarantee is met with the frequency, at a weaker regulariser."""
    rng = np.random.default_rng(6)
    case = garnet_case(2)
    m, reg = case.mdp(0.9), rr.kl(1.0, case.prior)
    policy = np.asarray(reg.argmax(3 * case.reward))
    known, *fresh = np.split(samples(rng, (LANES, 4 * SAMPLES, *case.reward.shape), case.prior), 4, axis=1)
    beta = np.asarray(rr.calibrate(reg, known, COVERAGE, mdp=m, policy=policy))
    safe = np.asarray(rr.calibrate(reg, known, COVERAGE))
    assert (safe > 0).all() and (beta > 1.5 * safe).all()
    mu = oracle.occupancy(case.P, case.initial, np.asarray(0.9), policy)
    visits = np.broadcast_to(mu.sum(-1), (LANES, SAMPLES, mu.shape[0]))
    scores = np.concatenate([np.asarray(rr.critical_beta(reg, x, weights=visits)) for x in fresh], axis=-1)
    mean, error = frequencies(beta, scores)
    assert error < 0.006 and abs(mean - COVERAGE) <= 4 * error
    # The guarantee itself holds at least that often: the loss of return is at most the price of the policy.
    price = (mu.sum(-1) * oracle.divergence(1.0, case.prior, policy)).sum() / beta
    loss = np.concatenate([(mu * x).sum((-1, -2)) for x in fresh], axis=-1)
    covered = scores >= beta[:, None]
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
    batch = rr.calibrate(reg, x, np.array(list(ranks)))
    np.testing.assert_array_equal(np.asarray(batch), [scores[k - 1] if k else 0 for k in ranks.values()])
    lanes = rr.calibrate(rr.kl(np.array([1.0, 5.0]), PRIOR), np.stack([x, 2 * x]), np.array([0.7, 0.8]))
    np.testing.assert_allclose(np.asarray(lanes), [scores[2], scores[1] / 2], rtol=1e-12)

    jitted = jax.jit(lambda y, c: rr.calibrate(reg, y, c))
    mid = next(k for k in range(1, 9) if 0 < scores[k] < np.inf) + 1
    coverage = 1 - mid / 10
    assert float(jitted(x, coverage)) == scores[mid - 1]
    slope = np.asarray(jax.jit(jax.grad(lambda y: rr.calibrate(reg, y, coverage)))(x))
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
    with pytest.raises(ValueError, match="batch axes"):
        rr.calibrate(rr.kl(np.ones(2), PRIOR), x, 0.9)
    with pytest.raises(ValueError, match="batch axes do not broadcast: coverage"):
        rr.calibrate(rr.kl(np.ones(2), PRIOR), np.stack([x, x]), np.array([0.9, 0.8, 0.7]))
    for weights, message in ((np.ones(2), "weights has shape"), (np.array([1, -1.0, 1]), "weights.s=1. is -1")):
        with pytest.raises(ValueError, match=message):
            rr.critical_beta(reg, x, weights=weights)
    with pytest.raises(ValueError, match="one beta for all states"):
        rr.critical_beta(rr.kl(np.ones(2)), x[0, :2], per_state=False)
    case = garnet_case()
    with pytest.raises(ValueError, match="perturbations has shape"):
        rr.calibrate(rr.kl(1.0), x, 0.9, mdp=case.mdp(0.9), policy=case.prior)


def test_small_priors_in_single_precision():
    """Where the first ratio overflows, or the root does: the root, or infinity, and not just any number."""
    prior, dr = np.array([0.25, 0.75, 2.0**-40], np.float32), np.array([-900.0, 30.0, 1000.0], np.float32)
    reg = rr.alpha(np.float32(4.5), np.float32(1.0), prior)
    beta = rr.critical_beta(reg, dr)
    assert beta.dtype == np.float32
    exact = rr.critical_beta(rr.alpha(4.5, 1.0, prior.astype(float) / prior.astype(float).sum()), dr.astype(float))
    np.testing.assert_allclose(beta, exact, rtol=1e-4)
    prior = np.array([2.0**-38, 2.0**-21, 0.03125, 0.96875 - 2.0**-20], np.float32)
    dr = np.array([5.3e-8, -2.4e-6, -1e-6, -1.9e-7], np.float32)
    assert np.isinf(rr.critical_beta(rr.alpha(np.float32(4.78), np.float32(1.0), prior / prior.sum()), dr))
