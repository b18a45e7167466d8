"""A finite horizon is a recursion of the same backup: against a recursion in NumPy, with bounds, masks and lanes."""

import dataclasses
import functools
from typing import Any

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import ACTIONS, STATES

import robustreg as rr

STEPS = 6
ORDERS = np.array([-1.0, 0.5, 1.0, 1.5, 2.0, 3.0])
BETA = np.array([0.3, 30.0, 3.0, 1000.0, 1.0, 10.0])


def recursion(P, reward, discount, alpha, beta, prior, terminal):
    """Values [*B,T+1,S] and policies [*B,T,S,A] of rewards [T,*B,S,A], backwards; one batch shape for everything."""
    values, policies = [terminal], []
    for r in reward[::-1]:
        q = r + np.asarray(discount)[..., None, None] * np.einsum("...sat,...t->...sa", P, values[0])
        value, policy = oracle.best_response(alpha[..., None], beta[..., None], prior, q)
        values.insert(0, value)
        policies.insert(0, policy)
    return np.stack(values, -2), np.stack(policies, -3)


@functools.cache
def stacked():
    """All cases [9,1] against the orders [6], with rewards of each step [T,9,1,S,A], and the truth at two discounts."""
    group = cases.stack(cases.all_cases())
    rng = np.random.default_rng(0)
    change = cases.random_reward(rng, (STEPS, 1, 1, STATES, ACTIONS))
    reward = group.reward[None, :, None] + np.where(group.prior[:, None] > 0, change, 0)
    terminal = cases.random_reward(rng, (9, 1, STATES))
    truth = {
        g: recursion(
            group.P[:, None], reward, np.array(g), ORDERS, BETA, group.prior[:, None], np.tile(terminal, (1, 6, 1))
        )
        for g in (1.0, 0.9)
    }
    return group, reward, terminal, truth


def problem(kind="dense", dtype: Any = np.float64):
    """The stack as an MDP and a regulariser whose last batch axis is time."""
    group, reward, *_ = stacked()
    P = group.P[:, None, None].astype(dtype)
    m = rr.mdp(
        cases.dense(P, dtype) if kind == "dense" else cases.successors(P, dtype, STATES),
        np.moveaxis(reward, 0, 2).astype(dtype),
        0.9,
        initial=group.initial[:, None, None].astype(dtype),
        termination=group.termination[:, None, None].astype(dtype),
    )
    alpha, beta = (x[:, None].astype(dtype) for x in (ORDERS, BETA))
    return m, rr.alpha(alpha, beta, group.prior[:, None, None].astype(dtype))


def solved(kind="dense", dtype: Any = np.float64, discount=1.0):
    m, reg = problem(kind, dtype)
    _, _, terminal, _ = stacked()
    return rr.solve_horizon(m, reg, STEPS, terminal.astype(dtype), discount=discount, varying=True)


@pytest.mark.parametrize("kind", ["dense", "successors"])
def test_values_and_policies_are_those_of_the_recursion(kind):
    """With rewards of each step, ends of episodes, masks, and a discount of 1 or below; bounds hold the truth."""
    group, reward, terminal, truth = stacked()
    for discount, (value, policy) in truth.items():
        sol = solved(kind, discount=discount).raise_if_failed()
        assert sol.value.shape == (9, 6, STEPS + 1, STATES)
        assert sol.policy.shape == (9, 6, STEPS, STATES, ACTIONS) == sol.perturbation.shape
        assert np.abs(sol.value - value).max() < 1e-11
        # (A weak regulariser multiplies the rounding of q by beta.)
        assert np.abs(sol.policy - policy).max() < 1e-9
        # The truth is rounded too.
        slack = 1e-14 * (1 + np.abs(value))
        assert (sol.lower <= value + slack).all() and (value <= sol.upper + slack).all()
        assert (sol.upper - sol.lower).max() < 1e-9
        np.testing.assert_array_equal(sol.value[..., -1, :], np.broadcast_to(terminal, (9, 6, STATES)))
        objective = (group.initial[:, None] * value[..., 0, :]).sum(-1)
        assert np.abs(sol.objective - objective).max() < 1e-11


def test_float32_intervals_hold_the_truth():
    """And are no wider than some roundings of the numbers involved."""
    for discount, (value, _) in stacked()[3].items():
        sol = solved(dtype=np.float32, discount=discount).raise_if_failed()
        assert sol.value.dtype == np.float32
        assert (np.asarray(sol.lower) <= value).all() and (value <= np.asarray(sol.upper)).all()
        width = np.asarray(sol.upper - sol.lower, float).max(-1)
        size = 1 + np.abs(value).max(-1) + 1 / BETA[:, None]
        assert (width < 1e3 * STEPS * np.finfo(np.float32).eps * size).all()


def test_bounds_grow_with_what_is_summed_and_not_with_the_sum():
    """Rewards of 10,000 that cancel under a policy which hardly leaves the prior: the value is small, its error not."""
    rng = np.random.default_rng(4)
    half = rng.uniform(5e3, 1e4, (64, STATES, ACTIONS // 2)).astype(np.float32)
    reward, P = np.concatenate([half, -half], -1), one().P
    value = np.zeros((64, STATES))
    for _ in range(3):
        x = 1e-6 * (reward.astype(float) + np.einsum("sat,bt->bsa", P, value))
        value = 1e6 * np.log1p(np.expm1(x).mean(-1))
    sol = rr.solve_horizon(rr.mdp(cases.dense(P, np.float32), reward, 0.9), rr.kl(1e-6), 3, discount=1.0)
    lower, upper = (np.asarray(x, float)[:, 0] for x in (sol.lower, sol.upper))
    assert (lower <= value).all() and (value <= upper).all() and (value < 300).all()
    assert np.abs(np.asarray(sol.value, float)[:, 0] - value).max() > 300 * 10 * np.finfo(np.float32).eps


def test_the_perturbation_is_the_worst_case_and_prices_the_policy():
    """It is `worst_case(policy)` where the policy plays, and in the perturbed rewards the policy is worth the value."""
    group, reward, terminal, truth = stacked()
    sol = solved()
    worst = np.asarray(rr.worst_case(problem()[1], sol.policy))
    played = np.asarray(sol.policy) > 1e-6
    # What is rarely played is sensitive to rounding of its probability.
    assert np.abs(np.where(played, worst - sol.perturbation, 0)).max() < 1e-8
    masked = np.broadcast_to((group.prior == 0)[:, None, None], sol.perturbation.shape)
    assert masked.any() and (np.asarray(sol.perturbation)[masked] == 0).all()
    perturbed = np.moveaxis(reward, 0, 2) - np.asarray(sol.perturbation)
    value = np.tile(terminal, (1, 6, 1))
    for t in reversed(range(STEPS)):
        q = perturbed[..., t, :, :] + np.einsum("...sat,...t->...sa", group.P[:, None], value)
        value = (np.asarray(sol.policy)[..., t, :, :] * q).sum(-1)
        assert np.abs(value - sol.value[..., t, :]).max() < 1e-11


def one():
    """A single problem with skewed priors."""
    return cases.garnet_case()


def test_every_number_may_depend_on_time():
    """Transitions, termination, discount, prior, beta, alpha and state_scale of each step."""
    rng = np.random.default_rng(1)
    group = cases.stack([cases.terminating(), cases.garnet_case(), cases.ring()] * 2)
    discount, scale = np.linspace(0.5, 1, STEPS), 2.0 ** rng.integers(-2, 3, (STEPS, STATES))
    value = terminal = cases.random_reward(rng, STATES)
    values = [value]
    for t in reversed(range(STEPS)):
        q = group.reward[t] + discount[t] * group.P[t] @ value
        value, _ = oracle.best_response(np.full(STATES, ORDERS[t]), BETA[t] * scale[t], group.prior[t], q)
        values.insert(0, value)
    reg = rr.alpha(ORDERS, BETA, group.prior, state_scale=scale)
    for kind in ("dense", "successors"):
        P = cases.dense(group.P) if kind == "dense" else cases.successors(group.P, width=STATES)
        m = rr.mdp(P, group.reward, 0.5, termination=group.termination)
        sol = rr.solve_horizon(m, reg, STEPS, terminal, discount=discount, varying=True)
        assert np.abs(sol.value - np.stack(values)).max() < 1e-12
    # Through a function there are no transitions of each step, but rewards.
    fixed = one()
    m = rr.mdp(fixed.transitions("matrix-free"), group.reward, 0.9)
    dense = rr.mdp(fixed.transitions(), group.reward, 0.9)
    found, wanted = (rr.solve_horizon(x, rr.kl(2.0), STEPS).value for x in (m, dense))
    np.testing.assert_allclose(found, wanted, atol=1e-13)


def test_available_is_a_mask_of_the_prior():
    case = cases.masked()
    there = case.prior > 0
    value, policy = recursion(
        case.P, case.reward[None].repeat(STEPS, 0), 1.0, np.array(2.0), np.array(3.0),
        np.where(there, 1, 0) / there.sum(-1, keepdims=True), np.zeros(STATES),
    )  # fmt: skip
    m = rr.mdp(case.P, np.where(there, case.reward, np.nan), 0.9, available=there)
    sol = rr.solve_horizon(m, rr.alpha(2.0, 3.0), STEPS, discount=1.0).raise_if_failed()
    assert np.abs(sol.value - value).max() < 1e-12 and np.abs(sol.policy - policy).max() < 1e-12
    assert (np.asarray(sol.perturbation)[..., ~there] == 0).all()


def test_a_long_horizon_meets_the_fixed_point():
    case = one()
    m, reg = case.mdp(0.9), rr.kl(np.array([0.5, 50.0]), case.prior)
    sol, far = rr.solve(m, reg), rr.solve_horizon(m, reg, 400)
    assert np.abs(far.value[:, 0] - sol.value).max() < 1e-12
    assert np.abs(far.perturbation[:, 0] - sol.perturbation).max() < 1e-12
    # An error of each step counts g times less with every step that it is away: the bounds stay as wide.
    width = np.asarray(far.upper - far.lower).max(-1)
    assert (width[:, 0] < 1.01 * width[:, 200]).all()


def test_thousands_of_undiscounted_steps_in_float32():
    """Values grow with T, the error of a step does not: offsets take up what all states have in common.

    And where values do not grow, errors add up all the same, and are in the bounds.
    """
    case, steps = one(), 2000
    gain = float(rr.solve_average(case.mdp(0.9), rr.kl(2.0, case.prior)).gain)
    reward = (case.reward + np.array([1.0, -gain])[:, None, None]).astype(np.float32)
    values = [np.zeros((2, STATES))]
    for _ in range(steps):
        q = reward + np.einsum("sat,bt->bsa", case.P, values[0])
        top = q.max(-1, keepdims=True)
        values.insert(0, np.log((case.prior * np.exp(2 * (q - top))).sum(-1)) / 2 + top[..., 0])
    exact = np.stack(values, 1)
    m = rr.mdp(case.transitions(dtype=np.float32), reward, 0.9)
    sol = rr.solve_horizon(m, rr.kl(2.0, case.prior.astype(np.float32)), steps, discount=1.0)
    lower, value, upper = (np.asarray(x, float) for x in (sol.lower, sol.value, sol.upper))
    assert (lower <= exact).all() and (exact <= upper).all()
    error, width = np.abs(value - exact)[:, 0].max(-1), (upper - lower)[:, 0].max(-1)
    assert (exact[0, 0] > 1000).all() and (np.abs(exact[1, 0]) < 5).all()
    assert (error < 1e-3).all() and (width < 0.2).all()


def test_gradients_are_those_of_the_recursion():
    """By reverse and forward mode, with and without checkpoints, against differences, in every leaf."""
    case, rng = cases.terminating(), np.random.default_rng(2)
    reward, terminal = cases.random_reward(rng, (STEPS, STATES, ACTIONS)), cases.random_reward(rng, STATES)
    weights = rng.normal(size=(STEPS, STATES, ACTIONS))
    m = rr.mdp(case.P, reward, 0.9, termination=case.termination)

    def outcome(x):
        P = jnp.asarray(case.P) * jnp.exp(x["P"])
        P = P * ((1 - case.termination) / jnp.maximum(P.sum(-1), 1e-9))[..., None]
        logits = jnp.log(case.prior) + x["prior"]
        reg = rr.alpha(x["alpha"], x["beta"], log_prior=logits)
        changed = rr.MDP(rr.Dense(P), x["reward"], m.discount, m.complement, x["initial"], m.termination)
        sol = rr.solve_horizon(changed, reg, STEPS, x["terminal"], discount=x["discount"])
        return sol.objective + jnp.sum(weights * (sol.policy + sol.perturbation))

    x = {
        "P": jnp.zeros((STATES, ACTIONS, STATES)), "reward": jnp.asarray(reward), "initial": m.initial,
        "terminal": jnp.asarray(terminal), "discount": jnp.asarray(1.0), "beta": jnp.asarray(3.0),
        "alpha": jnp.asarray(0.5), "prior": jnp.zeros((STATES, ACTIONS)),
    }  # fmt: skip
    # Value and derivative of one program, which has to be compiled.
    along, nothing = jax.jit(lambda x, t: jax.jvp(outcome, (x,), (t,))), jax.tree.map(jnp.zeros_like, x)
    slopes = jax.jit(jax.grad(outcome))(x)

    def weak(r, checkpoint):
        return rr.solve_horizon(m.replace(reward=r), rr.kl(2.0), STEPS, checkpoint=checkpoint).objective

    kept, anew = (jax.grad(functools.partial(weak, checkpoint=flag))(jnp.asarray(reward)) for flag in (False, True))
    np.testing.assert_allclose(kept, anew, rtol=1e-12)
    for name in x:
        step = {k: jnp.asarray(rng.normal(size=v.shape) if k == name else np.zeros(v.shape)) for k, v in x.items()}
        if name == "discount":  # beyond 1 there is nothing: from below
            step = {**step, name: jnp.asarray(-1.0)}
            ends = [along({**x, name: x[name] - d}, nothing)[0] for d in (0, 1e-6, 2e-6)]
            difference = (-3 * ends[0] + 4 * ends[1] - ends[2]) / 2e-6
        else:
            ends = [along({k: v + d * step[k] for k, v in x.items()}, nothing)[0] for d in (1e-6, -1e-6)]
            difference = (ends[0] - ends[1]) / 2e-6
        found = jnp.sum(slopes[name] * step[name])
        np.testing.assert_allclose(found, difference, rtol=1e-6, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found, along(x, step)[1], rtol=1e-10, atol=1e-10, err_msg=name)


def test_a_lane_of_nan_leaves_the_others_alone():
    """In values, to the bit, and in gradients of what it shares with them."""
    case = one()
    beta = jnp.asarray([0.5, 3.0, 20.0])
    reward = np.broadcast_to(case.reward, (3, STATES, ACTIONS)).copy()
    spoilt = reward.copy()
    spoilt[1, 2, 3] = np.nan

    def outcome(reward, P):
        m = dataclasses.replace(case.mdp(0.9), transitions=rr.Dense(P), reward=reward)
        sol = rr.solve_horizon(m, rr.kl(beta, case.prior), STEPS)
        return jnp.sum(sol.where_converged(sol.objective)), sol

    (_, good), _ = jax.value_and_grad(outcome, argnums=(0, 1), has_aux=True)(jnp.asarray(reward), jnp.asarray(case.P))
    (_, sol), slopes = jax.value_and_grad(outcome, argnums=(0, 1), has_aux=True)(
        jnp.asarray(spoilt), jnp.asarray(case.P)
    )
    assert sol.status.tolist() == [0, int(rr.Status.NONFINITE_INPUT), 0] and good.converged.all()
    for name in ("value", "policy", "perturbation", "lower", "upper", "objective"):
        found, wanted = getattr(sol, name), getattr(good, name)
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[::2], wanted[::2])
    assert all(np.isfinite(x).all() for x in slopes) and (np.asarray(slopes[0])[1] == 0).all()
    with pytest.raises(rr.SolveError, match=r"lane \[1\] \(horizon 6\).*mend the input"):
        sol.raise_if_failed()


def test_overflow_on_the_way_has_a_status_and_spoils_no_gradient():
    case = one()
    reward = np.broadcast_to(case.reward, (2, STATES, ACTIONS)) * np.array([1.0, 1e308])[:, None, None]

    def outcome(P):
        m = dataclasses.replace(case.mdp(0.9), transitions=rr.Dense(P), reward=jnp.asarray(reward))
        sol = rr.solve_horizon(m, rr.kl(jnp.asarray([1.0, 1.0]), case.prior), STEPS)
        return jnp.sum(sol.where_converged(sol.objective)), sol.status

    slope, status = jax.grad(outcome, has_aux=True)(jnp.asarray(case.P))
    assert status.tolist() == [0, int(rr.Status.NONFINITE)] and np.isfinite(slope).all()


def test_time_or_lanes():
    """What a batch axis of a reward means: by itself, refused where it could be either, and as told."""
    case, rng = one(), np.random.default_rng(3)
    reward = cases.random_reward(rng, (STEPS, STATES, ACTIONS))
    m = rr.mdp(case.P, reward, 0.9)
    assert rr.solve_horizon(m, rr.kl(2.0), STEPS).value.shape == (STEPS + 1, STATES)
    lanes = rr.solve_horizon(m, rr.kl(2.0), STEPS, varying=False)
    assert lanes.value.shape == (STEPS, STEPS + 1, STATES)
    other = jax.eval_shape(lambda m: rr.solve_horizon(m, rr.kl(2.0), STEPS - 1), m)
    assert other.value.shape == (STEPS, STEPS, STATES)
    betas = np.arange(1.0, STEPS + 1)
    with pytest.raises(ValueError, match="reads in two ways.*varying=True.*varying=False"):
        rr.solve_horizon(m, rr.kl(betas), STEPS)
    with pytest.raises(
        ValueError, match=r"batch axes \[5\]; with varying=True the last of them is time, of length 1 or 6"
    ):
        rr.solve_horizon(m, rr.kl(betas[:5]), STEPS, varying=True)
    pairs = jax.eval_shape(lambda m: rr.solve_horizon(m, rr.kl(betas[:5, None]), STEPS, varying=True), m)
    assert pairs.value.shape == (5, STEPS + 1, STATES)
    # By vmap a lane has no axis at all: the reading does not depend on how many there are.
    mapped = jax.vmap(lambda r: rr.solve_horizon(m.replace(reward=r), rr.kl(2.0), STEPS).value)(jnp.asarray(reward))
    np.testing.assert_allclose(mapped, lanes.value, atol=1e-13)


def test_one_program_for_all_numbers():
    case = one()

    @jax.jit
    @chex.assert_max_traces(1)
    def run(beta, discount, reward):
        m = rr.mdp(cases.dense(case.P), reward, 0.5)
        return rr.solve_horizon(m, rr.kl(beta), STEPS, discount=discount).objective

    found = [run(jnp.asarray(b), jnp.asarray(g), jnp.asarray(case.reward)) for b, g in ((1.0, 0.5), (2.0, 1.0))]
    assert found[0] != found[1]


def test_what_is_refused():
    case = one()
    m, reg = case.mdp(0.9), rr.kl(2.0)
    wrong: Any = (
        ((m, reg, 0), {}, "horizon must be at least 1"),
        ((m, reg, 2.5), {}, "horizon must be an integer"),
        ((m, reg, 3, np.zeros(5)), {}, "terminal has shape"),
        ((m, reg, 3), {"discount": 1.5}, r"discount is 1.5; it must lie in \[0, 1\]"),
        ((reg, m, 3), {}, "the first argument must be an MDP"),
        ((m, reg, 3), {"varying": 1}, "varying must be True or False"),
        ((m, reg, 3), {"checkpoint": 1}, "checkpoint must be True or False"),
        ((m, rr.kl(np.ones(STATES)), 3), {}, "reads in two ways"),
    )
    for arguments, options, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            rr.solve_horizon(*arguments, **options)


def test_files(tmp_path):
    sol = rr.solve_horizon(one().mdp(0.9), rr.kl(2.0), 3)
    chex.assert_trees_all_equal(rr.load(rr.save(tmp_path / "sol", sol)), sol)
