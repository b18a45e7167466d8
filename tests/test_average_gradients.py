"""Derivatives of average rewards: against differences, and none where there is none."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import ACTIONS, STATES

import robustreg as rr


def test_of_gain_bias_policy_and_perturbation_in_every_leaf():
    """By both modes against differences, and once more."""
    case, rng = cases.garnet_case(), np.random.default_rng(2)
    weights = [rng.normal(size=shape) for shape in ((STATES,), (STATES, ACTIONS), (STATES, ACTIONS))]

    def outcome(x, gain_alone=False):
        P = jnp.asarray(case.P) * jnp.exp(x["P"])
        logits = jnp.log(case.prior) + x["prior"]
        reg = rr.kl(x["beta"], log_prior=logits) if gain_alone else rr.alpha(x["alpha"], x["beta"], log_prior=logits)
        start = jax.nn.softmax(x["initial"])
        kernel = rr.Dense(P / P.sum(-1, keepdims=True))
        sol = rr.solve_average(rr.MDP(kernel, x["reward"], jnp.asarray(0.9), jnp.asarray(0.1), start), reg)
        rest = (sol.bias, sol.policy, sol.perturbation)
        return sol.gain if gain_alone else sol.gain + sum(jnp.sum(w * f) for w, f in zip(weights, rest))

    x = {
        "P": jnp.zeros((STATES, ACTIONS, STATES)), "reward": jnp.asarray(case.reward), "initial": jnp.zeros(STATES),
        "beta": jnp.asarray(3.0), "alpha": jnp.asarray(0.5), "prior": jnp.zeros((STATES, ACTIONS)),
    }  # fmt: skip
    # Value and derivative of one program, which has to be compiled.
    along, nothing = jax.jit(lambda x, t: jax.jvp(outcome, (x,), (t,))), jax.tree.map(jnp.zeros_like, x)
    slopes, d = jax.jit(jax.grad(outcome))(x), 1e-5
    steps = [{k: jnp.asarray(rng.normal(size=v.shape) * (k == name)) for k, v in x.items()} for name in x]
    for name, step in zip(x, steps):
        high, low = (along({k: v + sign * step[k] for k, v in x.items()}, nothing)[0] for sign in (d, -d))
        found = jnp.sum(slopes[name] * step[name])
        np.testing.assert_allclose(found, (high - low) / (2 * d), rtol=1e-7, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(found, along(x, step)[1], rtol=1e-9, atol=1e-10, err_msg=name)
    step = {k: v + steps[1][k] for k, v in steps[3].items()}  # reward and beta
    once = jax.jit(lambda x, t: jax.jvp(lambda x: jax.grad(outcome)(x, True), (x,), (t,)))
    slopes, second = once(x, step)
    high, low = (once({k: v + sign * step[k] for k, v in x.items()}, nothing)[0] for sign in (d, -d))
    for name in x:
        np.testing.assert_allclose(second[name], (high[name] - low[name]) / (2 * d), rtol=1e-6, atol=1e-8, err_msg=name)
    # In the reward it is the stationary distribution.
    m, reg = case.mdp(0.9), rr.kl(3.0, case.prior)
    policy = np.asarray(rr.solve_average(m, reg).policy)
    mu = np.linalg.matrix_power(oracle.chain_of(case.P, policy), 4096)[0]
    np.testing.assert_allclose(slopes["reward"], mu[:, None] * policy, atol=1e-10)


def test_what_has_no_derivative_spoils_none():
    """Bandits, of which each has its own gain, and a lane of NaN, beside one that is as it should be."""
    m = cases.bandits().mdp(0.9)

    def gains(reward, P):
        sol = rr.solve_average(dataclasses.replace(m, transitions=rr.Dense(P), reward=reward), rr.kl(3.0))
        return sol.where_converged(sol.gain), sol.gain

    whole = jnp.asarray(cases.bandits().P)
    stack = jnp.stack([whole, jnp.asarray(cases.garnet_case().P), 0 * whole + jnp.nan])
    (found, _), pull = jax.vjp(gains, m.reward, stack)
    slopes = pull((jnp.ones(3), jnp.zeros(3)))
    assert found[1] != 0
    np.testing.assert_allclose(slopes[0].sum(), 1)
    assert np.isfinite(slopes[1]).all() and not slopes[1][0].any() and not slopes[1][2].any()
    for lane in (0, 2):
        reward, P = pull((jnp.zeros(3), jnp.eye(3)[lane]))
        assert np.isnan(reward).any() and np.isnan(P[lane]).any() and not P[1].any()
