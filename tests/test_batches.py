"""Leading batch axes broadcast as in NumPy, vmap gives the same numbers, and lanes do not touch each other."""

import dataclasses
import timeit
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import ACTIONS, STATES, all_cases, dense, garnet_case, linked, replace, stack, successors

import robustreg as rr

# Many compilations: the run on the oldest releases leaves this file out.
pytestmark = pytest.mark.slow

CASE = garnet_case(0)
REWARDS = np.stack([garnet_case(i).reward for i in range(3)])
BETAS = np.array([0.5, 5.0, 50.0, 500.0])
DISCOUNT = 0.95


def single(case, beta, alpha=1.5, discount=DISCOUNT):
    """One problem, no batch axes: what every batch is compared with. And the oracle agrees."""
    reg = rr.alpha(alpha=alpha, beta=beta, prior=case.prior)
    sol = rr.solve(case.mdp(discount), reg, tol=1e-10)
    sol.raise_if_failed()
    value, policy = oracle.solve(case.P, case.reward, discount, alpha, beta, case.prior)
    np.testing.assert_allclose(np.asarray(sol.value), value, atol=2e-10)
    np.testing.assert_allclose(np.asarray(sol.policy), policy, atol=1e-6)
    return sol


@pytest.fixture(scope="module")
def expected():
    """One solve after the other: value [M,K,S], policy [M,K,S,A]."""
    rows = [[single(replace(CASE, reward=reward), beta) for beta in BETAS] for reward in REWARDS]
    return [np.array([[np.asarray(getattr(s, name)) for s in row] for row in rows]) for name in ("value", "policy")]


def assert_solution(sol, value, policy):
    """Same numbers to the certified tolerance, and every field batched alike."""
    batch = value.shape[:-1]
    sol.raise_if_failed()
    for name, shape in {
        "value": (STATES,), "lower": (STATES,), "upper": (STATES,), "q": (STATES, ACTIONS), "policy": (STATES, ACTIONS),
        "perturbation": (STATES, ACTIONS), "status": (), "steps": (), "objective": (), "converged": (),
    }.items():  # fmt: skip
        assert getattr(sol, name).shape == (*batch, *shape), name
    np.testing.assert_allclose(np.asarray(sol.value), value, atol=2e-10)
    np.testing.assert_allclose(np.asarray(sol.policy), policy, atol=1e-6)


def test_rewards_against_betas(expected):
    """reward [M,1,S,A] with beta [K] gives [M,K]; the transitions are shared."""
    m = rr.mdp(dense(CASE.P), REWARDS[:, None], DISCOUNT, initial=CASE.initial)
    assert m.batch_shape == (3, 1)
    sol = rr.solve(m, rr.alpha(alpha=1.5, beta=BETAS, prior=CASE.prior), tol=1e-10)
    assert_solution(sol, *expected)


@pytest.mark.parametrize("kind", ["successors", "matrix-free"])
def test_other_kinds(kind, expected):
    m = rr.mdp(CASE.transitions(kind), REWARDS[:, None], DISCOUNT, initial=CASE.initial)
    sol = rr.solve(m, rr.alpha(alpha=1.5, beta=BETAS, prior=CASE.prior), tol=1e-10)
    assert_solution(sol, *expected)


def test_every_leaf_may_carry_axes():
    """alpha, beta, discount, initial, prior, termination, state_scale and P, each against all others."""
    cases = all_cases()[:3]
    s = stack(cases)
    alpha, discount = np.array([0.5, 2.0]), np.array([0.8, 0.95])
    for transitions in (dense(s.P[:, None]), successors(s.P[:, None])):
        m = rr.mdp(
            transitions, s.reward[:, None], discount, initial=s.initial[:, None], termination=s.termination[:, None]
        )
        scale = np.linspace(0.5, 1.5, 2 * STATES).reshape(2, STATES)
        reg = rr.alpha(alpha=alpha, beta=np.array([[2.0], [3.0], [4.0]]), prior=s.prior[:, None], state_scale=scale)
        sol = rr.solve(m, reg, tol=1e-10)
        sol.raise_if_failed()
        assert sol.value.shape == (3, 2, STATES)
        for i, j in np.ndindex(3, 2):
            beta = (2.0 + i) * scale[j]
            value, _ = oracle.solve(cases[i].P, cases[i].reward, discount[j], alpha[j], beta, cases[i].prior)
            np.testing.assert_allclose(np.asarray(sol.value[i, j]), value, atol=2e-10)
            np.testing.assert_allclose(float(sol.objective[i, j]), cases[i].initial @ value, atol=2e-10)


def test_batches_without_a_regulariser_axis():
    """Only the MDP has lanes; then only the prior has."""
    m = rr.mdp(dense(CASE.P), REWARDS, DISCOUNT)
    sol = rr.solve(m, rr.kl(beta=3.0), tol=1e-10)
    assert sol.value.shape == (3, STATES)
    priors = np.stack([np.full((1, ACTIONS), 1 / ACTIONS), np.array([[0.5, 0.25, 0.25, 0.0]])])
    both = rr.solve(CASE.mdp(DISCOUNT), rr.kl(beta=3.0, prior=priors), tol=1e-10)
    assert both.value.shape == (2, STATES)
    np.testing.assert_allclose(np.asarray(both.value[0]), np.asarray(sol.value[0]), atol=2e-10)
    prior = np.broadcast_to(priors[1, 0], (STATES, ACTIONS))
    masked, _ = oracle.solve(CASE.P, CASE.reward, DISCOUNT, 1.0, 3.0, prior)
    np.testing.assert_allclose(np.asarray(both.value[1]), masked, atol=2e-10)


SOLVERS = {
    "value iteration": rr.ValueIteration(),
    "policy iteration": rr.ModifiedPolicyIteration(steps=5),
    "newton krylov": rr.Newton(linear="krylov"),
    "newton direct": rr.Newton(linear="direct"),
    "anderson": rr.Anderson(),
}


@pytest.mark.parametrize("solver", [rr.Newton(linear="krylov"), rr.Newton(linear="direct"), rr.Anderson()], ids=str)
def test_vmap_gives_the_same_numbers(solver, expected):
    m = rr.mdp(dense(CASE.P), REWARDS[0], DISCOUNT, initial=CASE.initial)
    mapped = jax.jit(
        jax.vmap(
            lambda reward, beta: rr.solve(
                rr.MDP(m.transitions, reward, m.discount, m.complement, m.initial, m.termination),
                rr.alpha(alpha=1.5, beta=beta, prior=CASE.prior),
                solver,
                tol=1e-10,
            ),
            in_axes=(0, None),
        )
    )
    over_both = jax.vmap(mapped, in_axes=(None, 0), out_axes=1)
    assert_solution(over_both(REWARDS, BETAS), *expected)


def test_native_axes_inside_vmap(expected):
    """The two ways of batching compose."""
    m = rr.mdp(dense(CASE.P), REWARDS[0], DISCOUNT, initial=CASE.initial)
    reg = rr.alpha(alpha=1.5, beta=BETAS, prior=CASE.prior)
    sol = jax.jit(
        jax.vmap(
            lambda reward: rr.solve(
                rr.MDP(m.transitions, reward, m.discount, m.complement, m.initial, m.termination), reg, tol=1e-10
            )
        )
    )(REWARDS)
    assert_solution(sol, *expected)


# Of these solvers KL's programs do: whether lanes meet in a root is not theirs to decide.
OF_KL = (rr.ModifiedPolicyIteration, rr.ValueIteration)


def lanes_of(reward, beta, discount, init, solver):
    """Five lanes of linked components; the plain classes do not look at values, as from inside jit."""
    base = linked().mdp(discount.tolist())
    m = rr.MDP(base.transitions, jnp.asarray(reward), base.discount, base.complement, base.initial, base.termination)
    reg: Any = rr.kl(np.ones(5), CASE.prior) if isinstance(solver, OF_KL) else rr.alpha(1.5, np.ones(5), CASE.prior)
    reg = dataclasses.replace(reg, beta=jnp.asarray(beta))
    return rr.solve(m, reg, solver, tol=1e-6, init=init, max_steps=4000)


def ordinary():
    """reward [5,S,A], beta [5], discount [5], init [5,S]."""
    reward = linked().reward * np.arange(1, 6)[:, None, None]
    return reward, np.full(5, 3.0), np.full(5, 0.9), np.zeros((5, STATES))


def assert_others_unchanged(clean, dirty, lane):
    """Bit for bit, in every field."""
    others = np.delete(np.arange(5), lane)
    for name in ("value", "q", "policy", "perturbation", "lower", "upper", "status", "steps", "objective"):
        a, b = np.asarray(getattr(clean, name)), np.asarray(getattr(dirty, name))
        np.testing.assert_array_equal(a[others], b[others], err_msg=name)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("poison", ["reward nan", "reward inf", "beta nan", "init nan"])
def test_a_poisoned_lane_changes_no_other_bit(name, poison):
    """NaN in lane 2: the others keep their bits, lane 2 reports NONFINITE_INPUT and holds no plausible number."""
    clean = lanes_of(*ordinary(), SOLVERS[name])
    clean.raise_if_failed()
    reward, beta, discount, init = ordinary()
    junk = float(poison[-3:])
    {"reward": reward[2, 3], "beta": beta[2:], "init": init[2]}[poison[:-4]][..., 0] = junk
    dirty = lanes_of(reward, beta, discount, init, SOLVERS[name])
    assert_others_unchanged(clean, dirty, 2)
    assert int(dirty.status[2]) == rr.Status.NONFINITE_INPUT
    assert np.asarray(dirty.converged).tolist() == [True, True, False, True, True]
    assert np.isnan(np.asarray(dirty.value)[2]).all()
    with pytest.raises(rr.SolveError, match="NONFINITE_INPUT"):
        dirty.raise_if_failed()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_hard_lane_changes_no_other_bit(name):
    """The lane that runs longest decides when the loop ends, not what the others return."""
    reward, beta, discount, init = ordinary()
    easy = lanes_of(reward, beta, discount, init, SOLVERS[name])
    discount[1], init[1] = 0.995, 100 * np.arange(STATES)
    hard = lanes_of(reward, beta, discount, init, SOLVERS[name])
    assert int(hard.steps[1]) > np.asarray(easy.steps).max()
    assert_others_unchanged(easy, hard, 1)


def test_a_failing_lane_is_named():
    case = linked()
    sol = rr.solve(
        case.mdp(np.array([0.5, 0.9999])),
        rr.kl(beta=np.full(2, 5.0), prior=case.prior),
        rr.ValueIteration(),
        tol=1e-6,
        max_steps=100,
    )
    assert np.asarray(sol.status).tolist() == [rr.Status.CONVERGED, rr.Status.MAX_STEPS]
    with pytest.raises(rr.SolveError, match="1") as failure:
        sol.raise_if_failed()
    assert "MAX_STEPS" in str(failure.value) and "max_steps" in str(failure.value)


def test_an_ambiguous_reward_is_refused():
    """S == A == B: [S,A,S] or [B,S,A]? Never guessed."""
    P = np.full((3, 3, 3), 1 / 4) + np.eye(3) / 4
    with pytest.raises(ValueError, match="reward"):
        rr.mdp(dense(P), np.zeros((3, 3, 3)), 0.9)


def test_alphas_and_betas_on_axes_of_their_own():
    """Values without batch axes meet every alpha with every beta."""
    alphas, betas, q = np.array([0.5, 1.0, 2.0]), np.array([0.1, 1.0]), np.array([1.1, 0.8, -0.3])
    reg = rr.alpha(alphas[:, None], betas)
    for method in (reg.conjugate, reg.argmax, reg.value, reg.worst_case):
        x = q if method in (reg.conjugate, reg.argmax) else np.array([0.5, 0.3, 0.2])
        found = np.asarray(method(x))
        for i, alpha in enumerate(alphas):
            for k, beta in enumerate(betas):
                one = getattr(rr.alpha(alpha, beta), method.__name__)(x)
                np.testing.assert_allclose(found[i, k], one, rtol=1e-13, atol=1e-15)


def test_what_hardly_ever_happens_costs_nothing_under_vmap():
    """A branch becomes a choice there: chains that no lane needs are not written out for it, S x S for each lane."""
    m = rr.problems.slippery_grid(32, 0.99)
    policies = jnp.broadcast_to(jnp.full((m.n_states, m.n_actions), 1 / m.n_actions), (8, m.n_states, m.n_actions))
    best = {}
    for name, wrap in (("vmap", jax.vmap), ("lanes", lambda f: f)):
        run = jax.jit(wrap(lambda p: rr.evaluate(m, p)))
        jax.block_until_ready(run(policies))
        best[name] = min(timeit.repeat(lambda run=run: jax.block_until_ready(run(policies)), number=1, repeat=7))
    assert best["vmap"] < 4 * best["lanes"]  # 0.8; written out it was 13
