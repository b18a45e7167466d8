"""What robust sets are compared with: entropy without a reference, norm balls, noise, and a single decision."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import ACTIONS, garnet_case

import robustreg as rr

PRIOR = np.array([1, 2, 4, 9]) / 16


def test_entropy_without_a_reference():
    """The policy of uniform KL, values higher by log(A)/(beta (1-g)), and a worst case that raises every reward."""
    m, beta = garnet_case(1).mdp(0.9), np.array([0.5, 4.0])
    plain, uniform = (rr.solve(m, reg, tol=1e-10).raise_if_failed() for reg in (rr.entropy(beta), rr.kl(beta)))
    np.testing.assert_allclose(np.asarray(plain.policy), np.asarray(uniform.policy), atol=1e-9)
    shift = np.log(ACTIONS) / beta
    np.testing.assert_allclose(np.asarray(plain.value - uniform.value), np.tile(10 * shift[:, None], 12), atol=1e-8)
    policy = np.asarray(plain.policy)
    worst = np.asarray(rr.worst_case(rr.entropy(beta), policy))
    np.testing.assert_allclose(worst, np.log(policy) / beta[:, None, None], atol=1e-12)
    assert (worst <= 0).all() and np.asarray(rr.worst_case(rr.kl(beta), policy)).max() > 1e-3
    x = np.random.default_rng(0).normal(size=(2, 50, ACTIONS))
    set_value = np.exp(beta[:, None, None] * x).sum(-1)
    np.testing.assert_array_equal(np.asarray(rr.slack(rr.entropy(beta), x)) >= 0, set_value <= 1)
    entropy = -(policy * np.log(policy)).sum(-1)
    np.testing.assert_allclose(np.asarray(rr.entropy(beta).value(policy)), -entropy / beta[:, None], atol=1e-12)


@pytest.mark.parametrize("order", (1.0, 1.5, 2.0, 7.0, np.inf))
def test_norm_attack(order):
    """In the ball, worth radius times the dual norm, never positive for the agent; no other member takes more."""
    rng = np.random.default_rng(1)
    policy = rng.dirichlet(np.ones(ACTIONS), 100)
    policy[0], policy[1], policy[2] = [0.5, 0.5, 0, 0], np.eye(ACTIONS)[1], 0.25
    radius = rng.exponential(size=100)
    dr = np.asarray(rr.baselines.norm_attack(policy, radius, order))
    np.testing.assert_allclose(np.linalg.norm(dr, order, axis=-1), radius, rtol=1e-12)
    conjugate = {1.0: np.inf, np.inf: 1.0}
    dual = np.linalg.norm(policy, conjugate[order] if order in conjugate else order / (order - 1), axis=-1)
    np.testing.assert_allclose((policy * dr).sum(-1), radius * dual, rtol=1e-12)
    assert (dr >= 0).all() and (dr[policy == 0] == 0).all()
    other = np.abs(rng.normal(size=(2000, 100, ACTIONS)))
    other *= (radius / np.linalg.norm(other, order, axis=-1))[..., None]
    taken = (policy * other).sum(-1)
    assert (taken <= radius * dual * (1 + 1e-12)).all()
    assert (taken.max(0) > 0.8 * radius * dual).any()
    slope = jax.grad(lambda r: jnp.sum(rr.baselines.norm_attack(policy, r, order)))(jnp.asarray(radius))
    np.testing.assert_allclose(np.asarray(slope), dr.sum(-1) / radius, rtol=1e-12)


@pytest.mark.parametrize("order", (0.5, 2.0))
def test_random_attack(order):
    """On the boundary it takes less than the worst case; taking as much, it is outside the set."""
    rng = np.random.default_rng(2)
    reg = rr.alpha(order, 3.0, PRIOR)
    policy = rng.dirichlet(np.ones(ACTIONS), 500) + 0.01
    policy /= policy.sum(-1, keepdims=True)
    price, worst = (np.asarray(f) for f in (reg.value(policy), rr.worst_case(reg, policy)))
    deviation = lambda x: np.sqrt((PRIOR * (x - (x @ PRIOR)[:, None]) ** 2).sum(-1))  # noqa: E731  # a formula
    cost, effect = (
        np.asarray(rr.baselines.random_attack(jax.random.key(0), reg, policy, k)) for k in ("cost", "effect")
    )
    for dr in (cost, effect):
        np.testing.assert_allclose(deviation(dr), deviation(worst), rtol=1e-10)
    np.testing.assert_allclose(np.asarray(rr.slack(reg, cost)), 0, atol=1e-11)
    np.testing.assert_allclose((policy * effect).sum(-1), price, atol=1e-11)
    assert ((policy * cost).sum(-1) <= price + 1e-12).all() and (np.asarray(rr.slack(reg, effect)) <= 1e-12).all()
    np.testing.assert_allclose(cost - effect, (cost - effect)[:, :1] * np.ones(ACTIONS), atol=1e-12)
    set_ = np.asarray(rr.baselines.random_attack(jax.random.key(1), reg, policy, spread=0.25))
    np.testing.assert_allclose(deviation(set_), 0.25, rtol=1e-12)
    with pytest.raises(ValueError, match="match"):
        rr.baselines.random_attack(jax.random.key(0), reg, policy, "size")  # type: ignore[arg-type]  # the point


def test_single_decision():
    """Certainty equivalents for both signs, indifference, the saddle point, limits, and smoothness at 0."""
    rng = np.random.default_rng(3)
    u = rng.normal(size=ACTIONS)
    beta = np.array([-1e4, -30.0, -2.0, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 2.0, 30.0, 1e4])
    game = rr.baselines.single_decision(u, beta, PRIOR)
    value, policy, cost = (np.asarray(x) for x in (game.value, game.policy, game.cost))
    assert (np.diff(value) >= 0).all() and u.min() <= value[0] and value[-1] <= u.max()
    np.testing.assert_allclose(value[[0, 5, -1]], [u.min(), PRIOR @ u, u.max()], atol=1e-3)
    np.testing.assert_allclose(value[5], PRIOR @ u, rtol=1e-14)
    positive = beta > 0
    expected = oracle.conjugate(1.0, beta[positive], PRIOR, u)
    # The oracle's logarithm is known to u/beta.
    assert (np.abs(value[positive] - expected) <= 1e-12 + 1e-15 / beta[positive]).all()
    averse = -oracle.conjugate(1.0, -beta[beta < 0], PRIOR, -u)
    assert (np.abs(value[beta < 0] - averse) <= 1e-12 - 1e-15 / beta[beta < 0]).all()
    np.testing.assert_allclose(u - cost, np.tile(value[:, None], ACTIONS), atol=1e-12)
    for b in (-2.0, 2.0):
        i = int(np.flatnonzero(beta == b)[0])

        def payoff(p, c, b=b):
            return (p * (u - c)).sum(-1) + ((PRIOR * np.exp(b * c)).sum(-1) - 1) / b

        np.testing.assert_allclose(policy[i], PRIOR * np.exp(b * u) / (PRIOR * np.exp(b * u)).sum(), rtol=1e-12)
        np.testing.assert_allclose(payoff(policy[i], cost[i]), value[i], atol=1e-12)
        replies = payoff(policy[i], cost[i] + 0.3 * rng.normal(size=(500, ACTIONS)))
        assert (np.sign(b) * (replies - value[i]) >= -1e-12).all()
        # Against the equilibrium's costs every policy is worth the same.
        np.testing.assert_allclose(payoff(rng.dirichlet(np.ones(ACTIONS), 50), cost[i]), value[i], atol=1e-12)
    slope = jax.grad(lambda b: rr.baselines.single_decision(u, b, PRIOR).value)(0.0)
    np.testing.assert_allclose(slope, 0.5 * (PRIOR @ u**2 - (PRIOR @ u) ** 2), rtol=1e-12)
    masked = rr.baselines.single_decision(np.array([1.0, np.nan, 2.0]), 2.0, np.array([0.5, 0.0, 0.5]))
    assert np.isfinite(np.asarray(masked.value)) and masked.policy[1] == 0 and masked.cost[1] == 0
    assert rr.baselines.single_decision(np.array([1, 2]), 1.0).value.dtype == np.float64
