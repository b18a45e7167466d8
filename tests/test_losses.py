"""Losses: their minimisers, their textbook formulas, their gradients, and what samples tell of the adversary.

References are written out in NumPy float64 from the formulas of the papers, and know nothing of the library.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import robustreg as rr

RNG = np.random.default_rng(0)
ALPHAS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
losses: Any = rr.losses


def family(alpha, beta, **kw) -> Any:
    """KL for None, or alpha of an order."""
    return rr.kl(beta, **kw) if alpha is None else rr.alpha(alpha, beta, **kw)


def slopes(f, at, step=1e-6):
    """Central differences of a function of arrays, along one direction of each, and the directions."""
    directions = [RNG.normal(size=np.shape(x)) for x in at]
    for i, d in enumerate(directions):
        ends = [float(f(*(x + s * step * d if i == j else x for j, x in enumerate(at)))) for s in (1, -1)]
        yield d, (ends[0] - ends[1]) / (2 * step)


def check_gradient(f, at, rtol=1e-6):
    """Backwards against differences."""
    back = jax.jit(jax.grad(f, tuple(range(len(at)))))(*at)
    for slope, (d, wanted) in zip(back, slopes(jax.jit(f), at)):
        np.testing.assert_allclose(np.sum(slope * d), wanted, rtol=rtol, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------
# path consistency

S, A, GAMMA, BETA = 5, 3, 0.9, 2.0
P = RNG.dirichlet(np.ones(S), (S, A))
REWARD = RNG.normal(size=(S, A))
PRIOR = RNG.dirichlet(np.ones(A), S)
M = rr.mdp(P, REWARD, discount=GAMMA)


def at_optimum(alpha):
    """The oracle's value `[S]` and policy `[S, A]`."""
    order = 1.0 if alpha is None else alpha
    value, policy = oracle.solve(P, REWARD, np.asarray(GAMMA), np.asarray(order), np.asarray(BETA), PRIOR)
    return np.asarray(value), np.asarray(policy)


@jax.jit
def every_residual(reg, value, log_policy):
    ahead = jnp.einsum("san,n->sa", P, value)
    given: Any = dict(value=value, next_value=ahead, reward=REWARD, discount=GAMMA)
    return losses.consistency_residual(reg, log_policy=log_policy, **given)


@pytest.mark.parametrize("alpha", [None, *ALPHAS])
def test_the_residual_vanishes_at_the_optimum_and_only_there(alpha):
    """For every action that the policy plays; not above 0 for the others."""
    value, policy = at_optimum(alpha)
    with np.errstate(divide="ignore"):
        logs = np.log(policy)
    reg = family(alpha, BETA, prior=PRIOR)
    residual = np.asarray(every_residual(reg, value, logs))
    played = policy > 1e-9
    assert played.sum() > S
    np.testing.assert_allclose(residual[played], 0, atol=1e-10)
    assert (residual[~played] <= 1e-10).all()
    assert np.abs(np.asarray(every_residual(reg, value + np.arange(S), logs))).max() > 0.1
    assert np.abs(np.asarray(every_residual(reg, value, np.log(0.9 * policy + 0.1 / A)))).max() > 1e-3


def test_kl_is_written_out():
    """`r + g V' - V - log(p/p0)/beta` of the actions taken, and half its square."""
    logs, action = np.log(RNG.dirichlet(np.ones(A), 7)), RNG.integers(0, A, 7)
    value, ahead, reward, discount = RNG.normal(size=(4, 7))
    given: Any = dict(value=value, next_value=ahead, reward=reward, discount=discount)
    prior = np.array([0.5, 0.25, 0.25])
    ratio = logs[np.arange(7), action] - np.log(prior[action])
    wanted = reward + discount * ahead - value - ratio / BETA
    reg = rr.kl(BETA, prior)
    got = losses.consistency_residual(reg, log_policy=logs, action=action, **given)
    np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-14)
    taken = losses.sampled_worst_case(reg, ratio)
    again = losses.consistency_residual(reg, perturbation=taken, **given)
    np.testing.assert_allclose(again, wanted, rtol=1e-13, atol=1e-14)
    weights = np.arange(7.0)
    got = losses.consistency_loss(reg, log_policy=logs, action=action, weights=weights, **given)
    np.testing.assert_allclose(got, np.sum(weights * wanted**2 / 2) / weights.sum(), rtol=1e-13)


def test_several_steps():
    """Written out as sums along two paths, whose windows end with them; without intermediate values."""
    T = 5
    logs, action = np.log(RNG.dirichlet(np.ones(A), (2, T))), RNG.integers(0, A, (2, T))
    value, ahead, reward = RNG.normal(size=(3, 2, T))
    discount = RNG.uniform(0.5, 1, (2, T))
    discount[1, 2] = 0  # an episode ends
    reg = rr.alpha(1.5, BETA)
    given: Any = dict(value=value, next_value=ahead, reward=reward, discount=discount, log_policy=logs, action=action)
    taken = np.asarray(rr.worst_case(reg, log_policy=logs, action=action))
    for steps in (1, 2, 3, None):
        wanted = np.zeros((2, T))
        for b in range(2):
            for t in range(T):
                end, factor = min(t + (T if steps is None else steps), T), 1.0
                for i in range(t, end):
                    wanted[b, t] += factor * (reward - taken)[b, i]
                    factor *= discount[b, i]
                wanted[b, t] += factor * ahead[b, end - 1] - value[b, t]
        np.testing.assert_allclose(losses.consistency_residual(reg, steps=steps, **given), wanted, rtol=1e-12)


def test_the_minimiser_is_the_regularised_optimum():
    """The loss knows the model only through transitions, all of them here: its minimiser is what `solve` returns."""
    reg = rr.alpha(np.array([1.0, 0.5]), BETA, PRIOR)
    sol = rr.solve(M, reg)

    def loss(params):
        values, logs = params["values"], jax.nn.log_softmax(params["logits"])
        ahead = jnp.einsum("san,bn->bsa", P, values)
        given: Any = dict(value=values, next_value=ahead, reward=REWARD[None], discount=GAMMA)
        return losses.consistency_loss(reg, log_policy=logs, weights=1.0, **given)

    solver = optax.lbfgs()

    @jax.jit
    def step(params, state):
        value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
        update, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, update), state

    params = {"values": jnp.zeros((2, S)), "logits": jnp.zeros((2, S, A))}
    # (Optax relies on promotion.)
    with jax.numpy_dtype_promotion("standard"):
        state = solver.init(params)
        for _ in range(150):
            params, state = step(params, state)
    np.testing.assert_allclose(params["values"], sol.value, atol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(params["logits"]), sol.policy, atol=1e-6)


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_gradients_of_consistency(alpha):
    prior = np.array([0.5, 0.25, 0.25])
    action = RNG.integers(0, A, (2, 4))

    def f(value, ahead, reward, discount, logits, beta):
        given: Any = dict(value=value, next_value=ahead, reward=reward, discount=discount, action=action)
        reg = family(alpha, beta, prior=prior)
        return losses.consistency_loss(reg, log_policy=jax.nn.log_softmax(logits), steps=2, weights=1.0, **given)

    check_gradient(f, (*RNG.normal(size=(4, 2, 4)), RNG.normal(size=(2, 4, A)), BETA))


@pytest.mark.parametrize("alpha", [1.5])
def test_masked_actions_spoil_no_gradient(alpha):
    """Logits of minus infinity where the prior is 0, in float32: finite, and 0 there; what is left is as without it."""
    dtype = np.float32
    given: Any = dict(value=dtype(0), next_value=dtype(0), reward=dtype(1), discount=0.9)
    logits, there = RNG.normal(size=(2, 3)).astype(dtype), np.array([True, False, True])

    @jax.jit
    @jax.grad
    def slope(z, reg, action):
        logs = jax.nn.log_softmax(z)
        loss = losses.consistency_loss(reg, log_policy=logs, action=action, weights=1.0, **given)
        return loss + losses.fenchel_young(reg, logs, action, weights=1.0)

    order = None if alpha is None else dtype(alpha)
    masked = family(order, dtype(BETA), prior=np.array([0.5, 0, 0.5], dtype))
    got = np.asarray(slope(np.where(there, logits, -np.inf).astype(dtype), masked, np.array([2, 0])))
    wanted = slope(logits[:, there], family(order, dtype(BETA)), np.array([1, 0]))
    np.testing.assert_allclose(got[:, there], wanted, rtol=1e-4, atol=1e-6)
    assert (got[:, 1] == 0).all()


# ---------------------------------------------------------------------------------------------------------------
# Fenchel and Young


@jax.jit
def gap(reg, q, target):
    """The loss, its gradient in q, and the loss of the maximiser."""
    loss, pull = jax.vjp(lambda q: losses.fenchel_young(reg, q, target), q)
    return loss, pull(jnp.ones_like(loss))[0], losses.fenchel_young(reg, q, reg.argmax(q))


@pytest.mark.parametrize("alpha", [None, *ALPHAS])
def test_fenchel_young_is_the_gap_of_the_inequality(alpha):
    """By the oracle's conjugate and divergence; 0 at the maximiser; never negative; the gradient is `argmax(q) - t`."""
    order, n = 1.0 if alpha is None else alpha, 6
    q, target = 3 * RNG.normal(size=(4, n)), RNG.dirichlet(np.ones(n), 4)
    prior = RNG.dirichlet(np.ones(n))
    reg = family(alpha, BETA, prior=prior)
    value, policy = oracle.best_response(order, BETA, prior, q)
    cost = oracle.divergence(np.full(4, order), prior, target) / BETA
    loss, slope, best = gap(reg, q, target)
    np.testing.assert_allclose(loss, value + cost - (target * q).sum(-1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(slope, policy - target, atol=1e-9)
    assert (best >= 0).all() and best.max() <= 8e-14 * np.abs(q).max()


def test_fenchel_young_of_actions():
    """Of KL it is the cross entropy over beta; masked actions, and one of them as a target."""
    q, action = RNG.normal(size=(4, 5)), np.array([0, 3, 1, 4])
    cross = -np.asarray(jax.nn.log_softmax(BETA * q))[np.arange(4), action] / BETA
    np.testing.assert_allclose(losses.fenchel_young(rr.kl(BETA), q, action), cross, rtol=1e-12)
    sparse = rr.alpha(2.0, BETA, prior=np.array([0.5, 0.0, 0.25, 0.0, 0.25]))
    q[:, [1, 3]] = [np.nan, np.inf]
    one = np.asarray(losses.fenchel_young(sparse, q, np.eye(5)[action]))
    np.testing.assert_allclose(losses.fenchel_young(sparse, q, action), one, rtol=1e-14)
    np.testing.assert_array_equal(np.isinf(one), [False, True, True, False])
    mean = lambda q, action: losses.fenchel_young(sparse, q, action, weights=np.array([1, 0, 0, 3]))  # noqa: E731
    value, slope = jax.jit(jax.value_and_grad(mean))(q, np.array([0, -100, 1, 4]))  # padded
    np.testing.assert_allclose(value, (one[0] + 3 * one[3]) / 4, rtol=1e-14)
    assert np.isfinite(slope).all() and (np.asarray(slope)[1:3] == 0).all()


# ---------------------------------------------------------------------------------------------------------------
# preferences

PAIRS = 2 * RNG.normal(size=(2, 8))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_dpo_is_its_textbook_formula():
    """From log-probabilities of sequences, and of tokens with masks; smoothed, and that of identities."""
    policy, base = -RNG.exponential(3, (2, 8, 6)), -RNG.exponential(3, (2, 8, 6))
    mask = RNG.random((2, 8, 6)) < 0.7
    b = 0.1  # the coefficient of KL
    total = [np.where(mask, x, 0).sum(-1) for x in (policy, base)]
    margin = b * (total[0][0] - total[1][0]) - b * (total[0][1] - total[1][1])
    junk = [np.where(mask, x, -np.inf) for x in (policy, base)]
    tokens = [losses.log_ratio(*x, mask=mask[i]) for i, x in enumerate(zip(*junk))]
    whole = [losses.log_ratio(*x) for x in zip(*total)]
    for chosen, rejected in (tokens, whole):
        got = losses.dpo(rr.kl(1 / b), chosen, rejected)
        np.testing.assert_allclose(got, -np.log(sigmoid(margin)), rtol=4e-15, atol=1e-15)
        got = losses.dpo(rr.kl(1 / b), chosen, rejected, label_smoothing=0.1, weights=1.0)
        wanted = -0.9 * np.log(sigmoid(margin)) - 0.1 * np.log(sigmoid(-margin))
        np.testing.assert_allclose(got, wanted.mean(), rtol=1e-14)
        # In units of log-ratios: (h - 1/(2 tau))^2 tau^2.
        wanted = b**2 * (margin / b - 1 / (2 * b)) ** 2
        np.testing.assert_allclose(losses.ipo(rr.kl(1 / b), chosen, rejected), wanted, rtol=1e-12)
    slope = jax.grad(lambda x: losses.log_ratio(x, junk[1][0], mask=mask[0]).sum())(junk[0][0])
    np.testing.assert_array_equal(slope, mask[0])


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_link_is_the_slope_of_the_divergence(alpha):
    """`f'(z)/beta` of the generator `f` with `D = sum p0 f(p/p0)`; its margin is that of the worst cases."""
    z = np.exp(PAIRS)
    link = {-1.0: (1 - z**-2) / 2, 0.0: 1 - 1 / z, 0.5: 2 - 2 / np.sqrt(z), 1.0: np.log(z), 2.0: z - 1}[alpha]
    reg = rr.alpha(alpha, BETA)
    np.testing.assert_allclose(losses.implicit_reward(reg, PAIRS), link / BETA, rtol=1e-12, atol=1e-13)
    wanted = np.logaddexp(0, (link[1] - link[0]) / BETA)
    np.testing.assert_allclose(losses.dpo(reg, *PAIRS), wanted, rtol=1e-12)
    policy = RNG.dirichlet(np.ones(5))
    worst = np.asarray(rr.worst_case(reg, policy))
    reward = np.asarray(losses.implicit_reward(reg, np.log(policy * 5)))
    np.testing.assert_allclose(np.diff(worst), np.diff(reward), rtol=1e-9, atol=1e-12)


def test_chi_po():
    """The link `z + log z`, clipped; cut off where it overflows, without NaN in the gradient."""
    b, clip = 0.2, 1.5
    phi = np.exp(PAIRS) + PAIRS
    margin = np.clip(b * (phi[0] - phi[1]), -clip, clip)
    reg = (rr.kl(1 / b), rr.alpha(2.0, 1 / b))
    both = jax.jit(jax.value_and_grad(lambda x: jnp.sum(losses.dpo(reg, *x, clip=clip))))
    got, slope = both(PAIRS)
    np.testing.assert_allclose(got, -np.log(sigmoid(margin)).sum(), rtol=1e-13)
    inside = np.abs(margin) < clip
    wanted = -sigmoid(-margin) * b * (np.exp(PAIRS) + 1) * np.array([[1], [-1]]) * inside
    assert inside.any() and not inside.all()
    np.testing.assert_allclose(slope, wanted, rtol=1e-12)
    got, slope = both(np.tile([[800.0, 900.0], [900.0, 800.0]], 4))
    np.testing.assert_allclose(got, 4 * np.logaddexp(0, [clip, -clip]).sum(), rtol=1e-14)
    assert (np.asarray(slope) == 0).all()


def test_links_at_their_ends():
    """Saturated pairs have no gradient, hopeless ones that of KL or NaN: never a silent 0 beside an infinite loss."""
    slope = lambda reg, *x: np.asarray(jax.grad(lambda x: losses.dpo(reg, *x))(jnp.asarray(x, jnp.float32)))  # noqa: E731
    one, two = rr.kl(np.float32(2)), rr.alpha(np.float32(2), np.float32(1))
    np.testing.assert_allclose(slope(one, -np.inf, 0.0), [-0.5, 0.5])
    np.testing.assert_array_equal(slope(two, 100.0, 0.0), [0, 0])
    assert np.isnan(slope(two, 0.0, 100.0)[1])


def test_gradients_of_preferences():
    def f(chosen, rejected, beta):
        mixed = (rr.kl(beta), rr.alpha(0.5, beta))
        smooth = losses.dpo(mixed, chosen, rejected, label_smoothing=0.1, weights=1.0)
        return smooth + losses.ipo(rr.alpha(1.5, beta), chosen, rejected, weights=np.arange(8))

    check_gradient(f, (*PAIRS, BETA))


def test_one_trace_of_a_training_loop():
    """A hundred steps with optax under jit: preferences that agree make their answers likelier than the others."""
    chex.clear_trace_counter()
    solver, reg = optax.adam(0.1), rr.alpha(0.5, BETA)
    params = jnp.zeros(4)
    state = solver.init(params)

    def loss(params, better, worse):
        logs = jax.nn.log_softmax(params)
        ratios = (losses.log_ratio(logs[i], np.full(len(i), -np.log(4))) for i in (better, worse))
        return losses.dpo(reg, *ratios, weights=1.0)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state, better, worse):
        update, state = solver.update(jax.grad(loss)(params, better, worse), state)
        return optax.apply_updates(params, update), state

    for seed in range(100):
        pair = np.sort([np.random.default_rng((seed, i)).choice(4, 2, replace=False) for i in range(8)], axis=1)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            params, state = step(params, state, pair[:, 1], pair[:, 0])
    assert (np.diff(params) > 0.5).all()


# ---------------------------------------------------------------------------------------------------------------
# samples


@jax.jit
def told(reg, ratio, dr, weights):
    """Of samples of a policy: their worst case, and slack and critical beta of it and of a perturbation."""
    worst = losses.sampled_worst_case(reg, ratio, weights=weights)
    given: Any = dict(log_ratio=ratio[..., None, :], weights=weights[..., None, :])
    both = jnp.stack([dr, worst], axis=-2)
    return worst, losses.sampled_slack(reg, both, **given), losses.sampled_critical_beta(reg, both, **given)


@jax.jit
def known(reg, policy, dr):
    return rr.worst_case(reg, policy), rr.slack(reg, dr), rr.critical_beta(reg, dr), reg.value(policy)


def test_samples_tell_what_the_distribution_tells():
    """A sample of every action, weighted as the policy weighs it, is the distribution; padding may be anything.

    Orders are lanes: every row is a problem of its own.
    """
    n, lanes = 5, len(ALPHAS)
    prior, policy = RNG.dirichlet(np.ones(n), lanes), RNG.dirichlet(3 * np.ones(n), lanes)
    dr, returns = RNG.normal(size=(lanes, n)) - 0.3, RNG.normal(size=(lanes, n))
    exact = known(rr.alpha(np.array(ALPHAS), BETA, prior[:, None]), policy[:, None], dr[:, None])
    exact = [np.asarray(x)[:, 0] for x in exact]
    reg, ratio = rr.alpha(np.array(ALPHAS), BETA), np.log(policy / prior)
    padded = [np.c_[x, np.full(lanes, y)] for x, y in ((ratio, np.nan), (dr, 9.0), (policy, 0.0))]
    worst, slack, critical = (np.asarray(x) for x in told(reg, *padded))
    np.testing.assert_allclose(worst[:, :n], exact[0], rtol=1e-9, atol=1e-12)
    # Of its own worst case: on the boundary, at the strength that it was computed with.
    np.testing.assert_allclose(slack, np.c_[exact[1], np.zeros(lanes)], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(critical, np.c_[exact[2], np.full(lanes, BETA)], rtol=1e-8)
    given: Any = dict(divergence=BETA * exact[3])
    np.testing.assert_allclose(losses.sampled_worst_case(reg, ratio, **given), exact[0], rtol=1e-9, atol=1e-12)
    wanted = (policy * returns).sum(-1) - exact[3]
    np.testing.assert_allclose(losses.sampled_guarantee(reg, returns, ratio, weights=policy), wanted, rtol=1e-9)


def test_samples_of_kl():
    """Every action as often as the policy, or the prior, takes it."""
    prior, policy = np.array([0.25, 0.25, 0.5]), np.array([0.5, 0.25, 0.25])
    dr, drawn = np.array([-0.5, 0.2, 0.1]), np.array([0, 0, 1, 2])
    exact = [np.asarray(x) for x in known(rr.kl(BETA, prior), policy, dr)]
    ratio = np.log(policy / prior)
    worst, slack, critical = (np.asarray(x) for x in told(rr.kl(BETA), ratio[drawn], dr[drawn], np.ones(4)))
    np.testing.assert_allclose(worst, ratio[drawn] / BETA, rtol=1e-14)
    np.testing.assert_allclose(slack, [float(exact[1]), 0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(critical, [float(exact[2]), BETA], rtol=1e-9)
    np.testing.assert_allclose(losses.sampled_slack(rr.kl(BETA), dr[[0, 1, 2, 2]]), exact[1], rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------
# all of them


def test_bfloat16_is_computed_in_float32():
    """Sums of a thousand tokens, and losses, are those of the float32 values of the inputs; so are gradients."""
    half = jnp.asarray(-RNG.exponential(1, (2, 2, 1000)), jnp.bfloat16)
    exact = half.astype(jnp.float32)

    def f(x):
        pair = (losses.log_ratio(x[0, i], x[1, i], mask=np.ones(1000, bool)) for i in range(2))
        return losses.dpo(rr.kl(np.float32(1)), *pair)

    got, slope = jax.value_and_grad(f)(half)
    wanted, precise = jax.value_and_grad(f)(exact)
    assert got.dtype == jnp.float32 and slope.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(slope, precise.astype(jnp.bfloat16))
    logs = jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(3, 4)), jnp.bfloat16))
    given: Any = dict(value=np.float32(1), next_value=0.5, reward=np.ones(3, np.float32), discount=0.9)
    reg = rr.kl(np.float32(2))
    got = losses.consistency_loss(reg, log_policy=logs, action=np.array([0, 1, 3]), **given)
    assert got.dtype == jnp.float32
    assert losses.fenchel_young(reg, logs, np.array([0, 1, 3])).dtype == jnp.float32


def test_what_has_no_weight_counts_for_nothing():
    """NaN, infinities: in samples of weight 0 they touch neither the mean nor any gradient."""
    logits, action = RNG.normal(size=(3, A)), np.array([0, 1, 2])
    arrays = RNG.normal(size=(3, 3))
    weights = np.array([True, False, True])  # as `sol.converged` is
    bad = [np.where(weights, x, np.nan) for x in arrays]
    reg = rr.alpha(1.5, BETA)

    def f(logits, value, ahead, reward, weights):
        logs = jax.nn.log_softmax(logits)
        given: Any = dict(value=value, next_value=ahead, reward=reward, discount=0.9, action=action)
        mean = losses.consistency_loss(reg, log_policy=logs, weights=weights, **given)
        mean = mean + losses.dpo(rr.alpha(2.0, 1.0), value, ahead, weights=weights)
        return mean + losses.fenchel_young(reg, logits, action, weights=weights)

    wild = np.where(weights[:, None], logits, np.inf)
    both = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))
    value, slope = both(wild, *bad, weights)
    wanted, precise = both(logits, *arrays, weights)
    np.testing.assert_allclose(value, wanted, rtol=1e-13)
    for x, y in zip(slope[1:], precise[1:]):
        np.testing.assert_allclose(x, y, rtol=1e-12)
        assert (np.asarray(x)[~weights] == 0).all()
    np.testing.assert_allclose(slope[0][weights], precise[0][weights], rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: losses.dpo(rr.kl(1.0), np.ones(3), np.ones(2)), ValueError, r"rejected has shape \[2\]; expected"),
        (lambda: losses.dpo(rr.entropy(1.0), np.ones(3), np.ones(3)), TypeError, "has no reference policy"),
        (lambda: losses.dpo((), np.ones(3), np.ones(3)), ValueError, "holds no regulariser"),
        (lambda: losses.dpo(None, np.ones(3), np.ones(3)), TypeError, "first argument must be a regulariser"),
        (lambda: losses.dpo(rr.kl(1.0), PAIRS[0], PAIRS[1], label_smoothing=0.5), ValueError, "below 1/2"),
        (lambda: losses.dpo(rr.kl(1.0), PAIRS[0], PAIRS[1], clip=-1.0), ValueError, "clip is -1"),
        (
            lambda: losses.ipo(rr.kl(1.0), PAIRS[0], PAIRS[1], weights=np.ones(3)),
            ValueError,
            r"weights has shape \[3\]",
        ),
        (lambda: losses.fenchel_young(rr.kl(1.0), np.ones((2, 3)), np.array([0, 3])), ValueError, r"target\[1\] is 3"),
        (lambda: losses.fenchel_young(rr.kl(1.0), np.ones((2, 3)), np.ones((2, 2))), ValueError, "target has shape"),
        (lambda: losses.fenchel_young(rr.kl(1.0), 1.0, 0), ValueError, r"q has shape \[\]"),
        (lambda: losses.log_ratio(np.ones((2, 3)), np.ones((2, 4))), ValueError, r"reference has shape \[2, 4\]"),
        (lambda: losses.sampled_slack(rr.kl(1.0), np.ones(3), weights=np.ones(4)), ValueError, "weights has shape"),
        (lambda: losses.sampled_worst_case(rr.kl(np.ones(2)), np.ones(3)), ValueError, r"beta has shape \[2\]"),
        (lambda: losses.sampled_guarantee(rr.kl(1.0), np.ones(2), np.ones(3)), ValueError, "returns has shape"),
        (lambda: losses.implicit_reward(rr.kl(1.0), "a"), TypeError, "log_ratio must be an array"),
        (lambda: losses.implicit_reward(rr.kl(1.0), ["a", 1.0]), TypeError, "log_ratio must be an array"),
        (lambda: losses.dpo(rr.kl(1.0), None, np.ones(3)), ValueError, "chosen must be an array"),
        (lambda: losses.log_ratio(np.ones(3), None), ValueError, "reference must be an array"),
        (lambda: losses.sampled_slack(rr.kl(1.0), None), ValueError, "perturbation must be an array"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_wrong_transitions_are_refused_by_name():
    logs = np.log(np.full((2, 3), 1 / 3))
    given: Any = dict(value=np.ones(2), next_value=np.ones(2), reward=np.ones(2), discount=0.9)
    call = lambda **kw: losses.consistency_residual(rr.kl(1.0), **{**given, **kw})  # noqa: E731
    for kw, text in (
        (dict(), "one of the two"),
        (dict(log_policy=logs, perturbation=np.ones(2)), "one of the two"),
        (dict(log_policy=logs, action=np.array([0, 1]), reward=np.ones(3)), r"reward has shape \[3\]; expected"),
        (dict(log_policy=logs, action=np.array([0, 1]), steps=0), "steps must be at least 1"),
        (dict(log_policy=logs, steps=2), "along a path, pass action="),
        (dict(log_policy=logs, next_value=np.ones(2)), r"next_value has shape \[2\]"),
    ):
        with pytest.raises(ValueError, match=text):
            call(**kw)
