"""Sets of perturbations and what they guarantee, against returns recomputed with the oracle's linear algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import ACTIONS, garnet, make, random_reward

import robustreg as rr

# Many compilations: the run on the oldest releases leaves this file out.
pytestmark = pytest.mark.slow

# A mask, a single action, a small prior. One shape for nearly all that is compiled: [N, STATES, ACTIONS].
PRIOR = np.stack(
    [[1 / 4, 1 / 8, 1 / 2, 1 / 8], np.full(ACTIONS, 0.25), [0.5, 0.0, 0.25, 0.25], np.eye(ACTIONS)[1]]
    + [np.array([1, 500, 400, 99]) / 1000]
)
STATES, ALLOWED = len(PRIOR), PRIOR > 0
DISCOUNT, BETA = 0.95, 2.0
REWARD = random_reward(np.random.default_rng(101), (STATES, ACTIONS))
CASE = make("small", garnet(1, states=STATES), REWARD, initial=np.array([8, 4, 2, 1, 1]) / 16, prior=PRIOR)
M = CASE.mdp(DISCOUNT)
GAMMA = np.asarray(DISCOUNT)
# None is `rr.kl`; the others are orders of `rr.alpha`.
ORDERS = (None, -1.0, 0.0, 0.5, 1.5, 2.0, 3.0)
N = 250


def regulariser(order, beta=BETA, prior=PRIOR, **kw):
    return rr.kl(beta, prior, **kw) if order is None else rr.alpha(order, beta, prior, **kw)


def alpha_of(order):
    return 1.0 if order is None else order


def random_policies(rng, shape, prior=PRIOR):
    """Any policy of the prior's support, a little mixed with it."""
    p = rng.dirichlet(np.ones(prior.shape[-1]), shape) * (prior > 0) + 0.02 * prior
    return p / p.sum(-1, keepdims=True)


def random_members(rng, order, shape, prior=PRIOR, beta=BETA, inside=True):
    """Members by the oracle's projection, on the boundary or below it."""
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 1, shape[:-1] + (1,)) / beta
    x = x - oracle.conjugate(alpha_of(order), beta, prior, x)[..., None]
    return x - inside * rng.choice([0.0, 1.0], shape[:-1] + (1,)) * rng.exponential(size=shape[:-1] + (1,))


def returns(reward, policy):
    return oracle.evaluate(CASE.P, reward, GAMMA, policy) @ CASE.initial


def price(order, policy, prior=PRIOR, beta=BETA):
    return oracle.divergence(alpha_of(order), prior, policy) / beta


def members(rng, reg, worst):
    """Members by the library's projection, on the boundary or 1 below it, and mixtures of them with the worst case."""
    x = rng.normal(size=worst.shape) * 10.0 ** rng.uniform(-2, 1, (*worst.shape[:-1], 1))
    dr = np.asarray(rr.RobustSet(reg).project(x)) - rng.choice([0.0, 1.0], (*worst.shape[:-1], 1))
    return worst + 10.0 ** rng.uniform(-6, 0, (len(worst), 1, 1)) * (dr - worst)


@pytest.mark.parametrize("order", ORDERS)
def test_ten_thousand_members_never_break_the_guarantee(order):
    """Random policies against random members; equality at the worst case; a thousand non-members break it."""
    rng = np.random.default_rng(0)
    reg, nearest = regulariser(order), np.inf
    for batch in range(40):
        policy = random_policies(rng, (N, STATES))
        worst = np.asarray(rr.worst_case(reg, policy))
        dr = members(rng, reg, worst)
        visits = oracle.occupancy(CASE.P, CASE.initial, GAMMA, policy).sum(-1)
        guaranteed = returns(CASE.reward, policy) - (visits * price(order, policy)).sum(-1)
        actual = returns(CASE.reward - dr, policy)
        scale = 1 + np.abs(guaranteed) + np.abs(actual) + np.abs(dr).max((-1, -2))
        assert (actual >= guaranteed - 1e-10 * scale).all()
        touch = returns(CASE.reward - worst, policy)
        assert (np.abs(touch - guaranteed) <= 1e-10 * (scale + np.abs(worst).max((-1, -2)))).all()
        nearest = min(nearest, ((actual - guaranteed) / scale).min())
        if batch < 4:
            agree_inside(order, policy, dr, guaranteed, actual, scale)
            break_outside(order, policy, worst * rng.uniform(1.001, 2, (N, 1, 1)), guaranteed)
    assert nearest < 1e-4, "no member comes near: the test could not fail"


def agree_inside(order, policy, dr, guaranteed, actual, scale):
    """The library's account of members: what the oracle says."""
    inside = oracle.conjugate(alpha_of(order), BETA, PRIOR, dr)
    assert (inside <= 1e-11 * (1 + np.abs(dr).max(-1))).all()
    told = rr.guarantee(M, regulariser(order), policy, deployed=CASE.reward - dr)
    assert (np.abs(np.asarray(told.guaranteed) - guaranteed) <= 1e-11 * scale).all()
    assert (np.abs(np.asarray(told.actual) - actual) <= 1e-11 * scale).all()
    np.testing.assert_array_equal(np.asarray(told.margin), np.asarray(told.actual - told.guaranteed))
    assert (np.asarray(told.slack) >= -1e-10 * scale[:, None]).all()
    assert (np.asarray(told.total_slack) >= -1e-10 * scale / (1 - DISCOUNT)).all()


def break_outside(order, policy, beyond, guaranteed):
    """Perturbations beyond the worst case, in its direction, take more than the guarantee allows."""
    broken = rr.guarantee(M, regulariser(order), policy, deployed=CASE.reward - beyond)
    assert (returns(CASE.reward - beyond, policy) < guaranteed).all()
    assert (np.asarray(broken.margin) < 0).all() and not np.asarray(broken.covered).any()
    assert (np.asarray(broken.slack) <= 1e-11 * (1 + np.abs(beyond).max(-1))).all()


@pytest.mark.parametrize("order", (None, -1.0, 0.5, 2.0))
def test_what_still_holds_outside(order):
    """Fenchel and Young: the bound for any reward at all, with equality at the worst case plus a constant per state."""
    rng = np.random.default_rng(1)
    policy = random_policies(rng, (N, STATES))
    reg, dr = regulariser(order), 3 * rng.normal(size=(N, STATES, ACTIONS))
    told = rr.guarantee(M, reg, policy, deployed=CASE.reward - dr)
    assert not np.asarray(told.covered).all() and (np.asarray(told.margin) < 0).any()
    assert (returns(CASE.reward - dr, policy) >= np.asarray(told.bound) - 1e-9).all()
    assert (np.asarray(told.actual) >= np.asarray(told.guaranteed))[np.asarray(told.covered)].all()
    visits = oracle.occupancy(CASE.P, CASE.initial, GAMMA, policy).sum(-1)
    outside = (visits * oracle.conjugate(alpha_of(order), BETA, PRIOR, dr)).sum(-1)
    np.testing.assert_allclose(np.asarray(told.total_slack), -outside, atol=1e-8)
    aggregated = rr.aggregated_slack(M, reg, policy, dr)
    # (The sum may be near 0: rounding is that of its terms, which have either sign.)
    terms = np.abs(visits * oracle.conjugate(alpha_of(order), BETA, PRIOR, dr)).sum(-1)
    assert (np.abs(np.asarray(aggregated) - np.asarray(told.total_slack)) <= 1e-15 * terms).all()
    known = rr.aggregated_slack(M, reg, None, dr, visits=visits)
    np.testing.assert_allclose(np.asarray(known), -outside, atol=1e-8)
    shifted = np.asarray(rr.worst_case(reg, policy)) + rng.normal(size=(N, STATES, 1))
    tight = rr.guarantee(M, reg, policy, deployed=CASE.reward - shifted)
    np.testing.assert_allclose(np.asarray(tight.actual), np.asarray(tight.bound), atol=1e-8)
    own = rr.guarantee(M, reg, policy, deployed=np.tile(CASE.reward, (N, 1, 1)))
    np.testing.assert_allclose(np.asarray(own.actual), returns(CASE.reward, policy), atol=1e-10)
    assert np.asarray(own.covered).all()


def test_unregularised_optima_never_fall_below_the_robust_value():
    """Minimax from above: whatever the member, the plain optimum of the perturbed reward is at least V*."""
    rng = np.random.default_rng(2)
    for order in ORDERS:
        reg = regulariser(order)
        sol = rr.solve(M, reg, tol=1e-10)
        value, worst = np.asarray(sol.value), np.asarray(sol.perturbation)
        dr = members(rng, reg, np.tile(worst, (N, 1, 1)))
        # Of masked actions nothing is known, and nobody plays them.
        perturbed = np.where(ALLOWED, CASE.reward - dr, -1e3)
        plain = np.asarray(rr.nominal_optimum(rr.mdp(CASE.transitions(), perturbed, DISCOUNT, initial=CASE.initial)))
        assert (plain >= value - 1e-9).all()
        assert (plain - value).min() < 1e-3, "no member comes near: the test could not fail"


# ---------------------------------------------------------------------------------------------------------------
# the four sets


@pytest.mark.slow
@pytest.mark.parametrize("order", (*ORDERS, 1.0, 1 - 1e-9, 1 + 1e-9, 5.0))
def test_sets_and_inclusions(order):
    """Orthant and unnormalised set in the robust set in the half-space; supports are attained; radii end at 0."""
    rng = np.random.default_rng(3)
    reg = regulariser(order, prior=PRIOR)
    policy, other = (random_policies(rng, (N, STATES)) for _ in range(2))
    sets = {
        "orthant": rr.Orthant(reg, jnp.asarray(policy)),
        "unnormalised": rr.UnnormalisedSet(reg),
        "robust": rr.RobustSet(reg),
        "half-space": rr.HalfSpace(reg, jnp.asarray(policy)),
    }
    x = rng.normal(size=policy.shape) * 10.0 ** rng.uniform(-2, 1, policy.shape[:-1] + (1,))
    slack = {name: np.asarray(each.slack(x)) for name, each in sets.items()}
    noise = 1e-12 * (1 + np.abs(x).max(-1) + np.abs(np.asarray(rr.worst_case(reg, policy))).max(-1))
    assert (slack["orthant"] <= slack["robust"] + noise).all()
    assert (slack["unnormalised"] <= slack["robust"] + noise).all()
    assert (slack["robust"] <= slack["half-space"] + noise).all()
    gap = (slack["robust"] - slack["unnormalised"])[:, :3].max()
    assert gap > 1e-2 if abs(alpha_of(order) - 1) > 1e-3 else gap <= 1e-8
    np.testing.assert_allclose(slack["half-space"], price(order, policy, PRIOR) - (policy * x).sum(-1), atol=1e-8)
    for name, each in sets.items():
        ends = each.project(x)
        np.testing.assert_allclose(np.asarray(each.slack(ends)) / (1 + noise * 1e12), 0, atol=1e-12, err_msg=name)
        assert np.asarray(each.contains(ends, tol=1e-10 * (1 + noise * 1e12))).all()
        assert not np.asarray(each.contains(np.asarray(ends) + 1e-3 * (1 + noise[..., None] * 1e12))).any()
        # Support: no member takes more from any policy, and the worst case takes exactly that.
        most = np.asarray(each.support(other))
        worst = np.where(ALLOWED, ends, 0)
        assert ((other * worst).sum(-1) <= most + 1e3 * noise).all(), name
    for each in (sets["robust"], sets["unnormalised"]):
        worst = np.asarray(each.worst_case(policy))
        size = 1 + np.abs(worst).max(-1)
        assert (np.abs((policy * worst).sum(-1) - np.asarray(each.support(policy))) <= 1e-12 * size).all()
        assert (np.abs(np.asarray(each.slack(worst))) <= 1e-11 * size).all()
    assert (np.asarray(sets["unnormalised"].support(other)) <= np.asarray(sets["robust"].support(other)) + 1e-12).all()
    np.testing.assert_allclose(
        np.asarray(sets["robust"].support(other)), price(order, other, PRIOR), rtol=1e-10, atol=1e-13
    )
    assert np.isinf(np.asarray(sets["half-space"].support(other)))[:, :3].all()
    np.testing.assert_array_equal(np.asarray(sets["half-space"].support(policy)), np.asarray(reg.value(policy)))

    for name in ("unnormalised", "robust", "half-space"):
        t = np.asarray(sets[name].radius(x))
        proper = np.isfinite(t) & (t > 0)
        assert proper.mean() > 0.1
        at = np.where(proper, t, 0)[..., None]
        size = 1 / BETA + np.abs(at * x).max(-1)
        assert (np.abs(np.asarray(sets[name].slack(at * x))) <= 1e-11 * size)[proper].all(), name
        free = np.isinf(t)[..., None]
        assert np.asarray(sets[name].contains(np.where(free, 1e6 * x, 0), tol=1e-6)).all()
        assert not np.asarray(sets[name].contains(1e-3 * x))[t == 0].any()
    top, mean = np.where(ALLOWED, x, -np.inf).max(-1), (PRIOR * x).sum(-1)
    np.testing.assert_array_equal(np.isinf(np.asarray(sets["robust"].radius(x))), top <= 0)
    zero = np.asarray(sets["robust"].radius(x)) == 0
    np.testing.assert_array_equal(zero, (mean >= 0) & (top > 0))


def test_radius_of_the_orthant():
    """Largest t with t x below the corner, by scanning; minus infinity where there is none."""
    rng = np.random.default_rng(4)
    policy = random_policies(rng, (400,), PRIOR[0])
    reg = rr.kl(BETA, PRIOR[0])
    each = rr.Orthant(reg, jnp.asarray(policy))
    corner = np.asarray(rr.worst_case(reg, policy))
    x = corner * rng.uniform(0.5, 2, corner.shape) * rng.choice([1, 1, 1, 1, 1, -1], corner.shape)
    t = np.asarray(each.radius(x))
    grid = np.linspace(0, 20, 20001)
    fits = np.all(grid[:, None, None] * x <= corner, axis=-1)
    last = np.where(fits.any(0), grid[len(grid) - 1 - np.argmax(fits[::-1], axis=0)], -np.inf)
    some = np.isfinite(last) & (last < 20)
    assert some.sum() > 20 and (last == -np.inf).sum() > 20
    assert (np.abs(t[some] - last[some]) <= 1e-3 + 1e-12).all()
    # An interval shorter than the grid's step is all that scanning may miss.
    missed = np.isneginf(last) & ~np.isneginf(t)
    assert missed.mean() < 0.02
    own = rr.Orthant(reg, jnp.asarray(PRIOR[0]))
    assert float(own.radius(-np.ones(ACTIONS))) == np.inf and float(own.radius(np.ones(ACTIONS))) <= 1e-15
    empty = rr.Orthant(reg, jnp.asarray([0.5, 0.5, 0.0, 0.0]))
    assert float(empty.slack(-np.ones(ACTIONS))) == -np.inf


@pytest.mark.parametrize("order", ORDERS)
def test_facts_of_the_robust_set(order):
    """R(beta) = R(1)/beta, nested in beta, closed downward, convex; limits are half-space and orthant."""
    rng = np.random.default_rng(5)
    shape = (N, STATES, ACTIONS)
    dr = random_members(rng, order, shape, PRIOR)
    slack = {b: rr.RobustSet(regulariser(order, b, PRIOR)).slack for b in (1.0, BETA, 3.0, 1e-9, 1e12)}
    noise = 1e-11 * (1 + np.abs(dr).max(-1))
    assert (np.asarray(slack[BETA](dr)) >= -noise).all()
    np.testing.assert_allclose(np.asarray(slack[1.0](BETA * dr)), BETA * np.asarray(slack[BETA](dr)), atol=1e-9)
    assert (np.asarray(slack[1.0](dr)) >= np.asarray(slack[BETA](dr)) - noise).all()
    assert (np.asarray(slack[3.0](dr)) <= np.asarray(slack[BETA](dr)) + noise).all()
    assert (np.asarray(slack[3.0](dr)) < -1e-3).any()
    assert (np.asarray(slack[BETA](dr - rng.exponential(size=shape))) >= -noise).all()
    middle = 0.5 * (dr + random_members(rng, order, shape, PRIOR))
    assert (np.asarray(slack[BETA](middle)) >= -1e-9).all()
    np.testing.assert_allclose(np.asarray(slack[1e-9](dr)), -(PRIOR * dr).sum(-1), atol=1e-5)
    if alpha_of(order) > 0:
        np.testing.assert_allclose(np.asarray(slack[1e12](dr)), -np.where(ALLOWED, dr, -np.inf).max(-1), atol=1e-5)


@pytest.mark.parametrize("order", (None, -1.0, 0.5, 2.0))
def test_boundary_for_two_actions(order):
    """On the boundary; its tangent is orthogonal to the policy; for KL the explicit curve."""
    prior = np.array([0.75, 0.25])
    each = rr.RobustSet(regulariser(order, prior=prior))
    share = np.linspace(0.01, 0.99, 197)
    points = np.asarray(each.boundary(share))
    assert points.shape == (197, 2)
    np.testing.assert_allclose(np.asarray(each.slack(points)), 0, atol=1e-10 * np.abs(points).max())
    step = 1e-5
    tangent = np.asarray(each.boundary(share + step)) - np.asarray(each.boundary(share - step))
    normal = np.stack([share, 1 - share], -1)
    slope = (tangent * normal).sum(-1) / np.linalg.norm(tangent, axis=-1)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    if order is None:
        second = np.log((1 - 0.75 * np.exp(BETA * points[:, 0])) / 0.25) / BETA
        np.testing.assert_allclose(points[:, 1], second, atol=1e-11)


@pytest.mark.parametrize("order", (None, 0.0, 2.0))
def test_samples_are_uniform(order):
    """Against rejection from a box: same moments within five standard errors; and depth is uniform by itself."""
    prior, spread, depth, n = np.array([0.5, 0.25, 0.25]), 1.5, 0.75, 50_000
    each = rr.RobustSet(regulariser(order, prior=prior))
    drawn = np.asarray(each.sample(jax.random.key(1), (n, 3), spread, depth)) * BETA
    reach = spread + depth + 2
    box = np.random.default_rng(6).uniform(-reach, reach, (400_000, 3))
    box = box[np.linalg.norm(box - box.mean(-1, keepdims=True), axis=-1) <= spread]
    inside = -oracle.conjugate(alpha_of(order), 1.0, prior, box)
    kept = box[(inside >= 0) & (inside <= depth)]
    assert len(kept) > 5_000
    for f in (lambda x: x, lambda x: x**2, lambda x: x[:, :1] * x[:, 1:], np.exp, lambda x: x > 0.2):
        a, b = f(drawn), f(kept)
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        assert (np.abs(a.mean(0) - b.mean(0)) <= 5 * error).all()
    below = np.sort(np.asarray(each.slack(drawn / BETA)) * BETA / depth)
    assert np.abs(below - (np.arange(n) + 0.5) / n).max() <= 2 / np.sqrt(n)  # Kolmogorov: 1.95 has chance 0.001
    edge = np.asarray(each.sample(jax.random.key(2), (100, 3)))
    np.testing.assert_allclose(np.asarray(each.slack(edge)), 0, atol=1e-14)


def test_samples_of_masked_states():
    """Masked actions get 0, single actions only depth; per-state strength scales the part."""
    scale = np.linspace(0.5, 2, STATES)
    each = rr.RobustSet(rr.kl(BETA, PRIOR, state_scale=scale))
    drawn = np.asarray(each.sample(jax.random.key(0), (500, STATES, ACTIONS), depth=0.5))
    assert (drawn[:, ~ALLOWED] == 0).all() and np.isfinite(drawn).all()
    slack = np.asarray(each.slack(drawn)) * BETA * scale
    assert (slack >= -1e-13).all() and (slack <= 0.5 + 1e-13).all() and slack.max() > 0.49
    mean = drawn.sum(-1) / ALLOWED.sum(-1)
    off = np.linalg.norm(np.where(ALLOWED, drawn - mean[..., None], 0), axis=-1) * BETA * scale
    several = ALLOWED.sum(-1) > 1
    assert (off[:, several].max(0) > 0.9).all() and off.max() <= 1 + 1e-12 and (off[:, ~several] <= 1e-15).all()
    with pytest.raises(ValueError, match="asks for"):
        each.sample(jax.random.key(0), (ACTIONS,))


# ---------------------------------------------------------------------------------------------------------------
# transformations


@functools.cache
def measured():
    """Compiled for any order: what sets say of (order, beta, log_prior, x) with its tangents, and its cotangents."""

    def measure(leaves, policy):
        order, beta, log_prior, x = leaves
        reg = rr.alpha(order, beta, log_prior=jax.nn.log_softmax(log_prior))
        loose, tight = rr.UnnormalisedSet(reg), rr.RobustSet(reg)
        return jnp.stack([loose.slack(x), loose.radius(x), tight.radius(x), loose.support(policy), tight.slack(x)])

    def tangent(leaves, direction, policy):
        return jax.jvp(lambda v: measure(v, policy), (leaves,), (direction,))

    def cotangent(leaves, weight, policy):
        return jax.grad(lambda v: jnp.sum(weight * measure(v, policy)))(leaves)

    return jax.jit(tangent), jax.jit(cotangent)


@pytest.mark.slow
@pytest.mark.parametrize("order", (-1.0, 0.5, 1.0, 2.0))
def test_derivatives_of_the_sets(order):
    """Slack and radius of the unnormalised set, its support, and radii: against central differences, every leaf."""
    rng = np.random.default_rng(7)
    tangent, cotangent = measured()
    x = rng.normal(size=(6, ACTIONS))
    x = x - (x @ PRIOR[0])[:, None] - 0.2 * x.std(-1, keepdims=True)
    x[5] = [-60.0, 1.0, -50.0, -40.0]  # for alpha < 0 the end of the domain bounds the set here
    policy = random_policies(rng, (6,), PRIOR[0])
    leaves = tuple(np.asarray(v) for v in (order, BETA, np.log(PRIOR[0]), x))
    for trial in range(3):
        direction = tuple(np.asarray(rng.normal(size=np.shape(v))) for v in leaves)
        # At alpha = 1 itself the difference straddles the removable point.
        step = 1e-5
        ahead, behind = (
            np.asarray(tangent(tuple(np.asarray(v + s * d) for v, d in zip(leaves, direction)), direction, policy)[0])
            for s in (step, -step)
        )
        value, slope = (np.asarray(y) for y in tangent(leaves, direction, policy))
        assert np.isfinite(value).all() and (value[1:3] > 0).all()
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=2e-6, atol=2e-6, err_msg=str(trial))
        weight = rng.normal(size=slope.shape)
        pulled = cotangent(leaves, weight, policy)
        paired = sum(np.sum(np.asarray(a) * b) for a, b in zip(pulled, direction))
        np.testing.assert_allclose(paired, np.sum(weight * slope), rtol=1e-9)


@pytest.mark.slow
def test_batches_jit_and_lanes():
    """A batch of regularisers is its lanes; jit and vmap give the same; a NaN stays in its lane."""
    rng = np.random.default_rng(8)
    alphas = np.array([-1.0, 0.5, 2.0])
    reg = rr.alpha(alphas, BETA, PRIOR)
    x = rng.normal(size=(3, 7, STATES, ACTIONS)) - 0.5
    for kind in (rr.UnnormalisedSet, rr.RobustSet):
        whole = [np.asarray(f(x)) for f in (kind(reg).slack, kind(reg).radius)]
        assert whole[0].shape == whole[1].shape == (3, 7, STATES)
        poisoned = x.copy()
        poisoned[1, 2, 0, 0] = np.nan
        for f, clean in zip((kind(reg).slack, kind(reg).radius), whole):
            lost = np.array(f(poisoned))
            assert np.isnan(lost[1, 2, 0]) and np.isnan(lost).sum() == 1
            lost[1, 2, 0] = clean[1, 2, 0]
            np.testing.assert_array_equal(lost, clean)
    mapped = jax.vmap(lambda a, y: rr.RobustSet(rr.alpha(a, BETA, PRIOR)).radius(y))(jnp.asarray(alphas), x)
    np.testing.assert_allclose(np.asarray(mapped), whole[1], rtol=1e-13)
    jitted = jax.jit(lambda each, y: each.radius(2 * y))(rr.RobustSet(reg), x)
    np.testing.assert_allclose(2 * np.asarray(jitted), whole[1], rtol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("kind", (rr.RobustSet, rr.UnnormalisedSet))
def test_float32(kind):
    """The dtype of the input is kept; slack and radius agree with float64 to its digits."""
    rng = np.random.default_rng(9)
    x = (rng.normal(size=(N, STATES, ACTIONS)) - 0.5).astype(np.float32)
    for order in ORDERS[1:]:
        wide = regulariser(order)
        narrow = jax.tree.map(lambda leaf: leaf.astype(np.float32), wide)
        for name in ("slack", "radius"):
            a, b = getattr(kind(narrow), name)(x), getattr(kind(wide), name)(x.astype(float))
            assert a.dtype == np.float32
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-5)
        drawn = rr.RobustSet(narrow).sample(jax.random.key(0), (10, STATES, ACTIONS))
        assert drawn.dtype == np.float32
    told = rr.guarantee(CASE.mdp(DISCOUNT, dtype=np.float32), rr.kl(np.float32(BETA)), PRIOR.astype(np.float32))
    assert told.guaranteed.dtype == told.total_slack.dtype == np.float32


@pytest.mark.slow
def test_batched_guarantees_and_errors():
    """Batches of discounts, policies and rewards broadcast; wrong arguments are named."""
    rng = np.random.default_rng(10)
    policy = random_policies(rng, (STATES,))
    m = CASE.mdp(np.array([0.9, 0.95]))
    told = rr.guarantee(m, rr.kl(BETA, PRIOR), policy, deployed=CASE.reward - 0.1)
    assert told.guaranteed.shape == told.actual.shape == told.bound.shape == (2,)
    single = rr.guarantee(M, rr.kl(BETA, PRIOR), policy, deployed=CASE.reward - 0.1)
    for a, b in zip(told.guaranteed[1:], single.guaranteed[None]):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_allclose(told.actual[1], single.actual, rtol=1e-12)
    np.testing.assert_allclose(told.total_slack[1], single.total_slack, rtol=1e-12)
    with pytest.raises(TypeError, match="first argument"):
        rr.guarantee(rr.kl(1.0), rr.kl(1.0), policy)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(TypeError, match="second argument"):
        rr.guarantee(M, M, policy)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(ValueError, match="deployed"):
        rr.guarantee(M, rr.kl(1.0), policy, deployed=np.zeros((ACTIONS, STATES)))
    with pytest.raises(TypeError, match="kl"):
        rr.RobustSet(policy).radius(policy)  # type: ignore[arg-type]  # the point of the test
