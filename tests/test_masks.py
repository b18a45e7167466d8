"""A mask is part of the problem: actions that do not exist are never played and never looked at.

The reference for `available` is the same problem with a prior of 0 at the same places, itself tested against the
oracle elsewhere, and for values by hand.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import robustreg as rr

S, A, G = 5, 3, 0.9
RNG = np.random.default_rng(3)
P = RNG.dirichlet(np.ones(S), (S, A))
R = RNG.random((S, A))
MASK = np.ones((S, A), bool)
MASK[0, 0] = MASK[2, 1:] = MASK[4, 2] = False
PRIOR = MASK / MASK.sum(-1, keepdims=True)
REGS = {
    "kl": (rr.kl(3.0), rr.kl(3.0, PRIOR)),
    "alpha": (rr.alpha(0.5, 3.0, np.full(A, 1 / A)), rr.alpha(0.5, 3.0, PRIOR)),
    "sparse": (rr.alpha(2.0, 3.0, np.array([0.5, 0.3, 0.2])), None),
    "entropy": (rr.entropy(3.0), rr.entropy(3.0, available=MASK)),
}


def spoiled(how):
    """Transitions and rewards with rubbish where there is no action."""
    p, r = P.copy(), R.copy()
    p[~MASK] = {"zeros": 0.0, "nan": np.nan, "negative": -3.0}[how]
    r[~MASK] = {"zeros": -np.inf, "nan": np.nan, "negative": np.inf}[how]
    return p, r


def as_lists(p):
    indices = np.broadcast_to(np.arange(S, dtype=np.int32), (S, A, S)).copy()
    indices[~MASK] = -7
    return rr.Successors(jnp.asarray(indices), jnp.asarray(p))


KINDS = {
    "dense": lambda p: p,
    "ass": lambda p: p,
    "successors": as_lists,
    "sparse": lambda p: [sp.csr_matrix(p[:, a]) for a in range(A)],
}


@pytest.mark.parametrize("how", ["zeros", "nan", "negative"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_there_is_not_looked_at(kind, how):
    p, r = spoiled(how)
    layout = "ass" if kind == "ass" else None
    m = rr.mdp(KINDS[kind](p.swapaxes(0, 1) if layout else p), r, G, available=MASK, layout=layout)
    assert np.array_equal(m.available, MASK) and np.isfinite(m.reward).all()
    rows = np.asarray(m.transitions.expect(np.eye(S))).transpose(1, 2, 0)
    np.testing.assert_allclose(rows, np.where(MASK[..., None], P, np.eye(S)[:, None]), atol=1e-12)
    assert (np.asarray(m.reward)[~MASK] == 0).all()
    np.testing.assert_allclose(
        rr.solve(m, rr.kl(3.0)).value, rr.solve(rr.mdp(P, R, G), REGS["kl"][1]).value, rtol=1e-12
    )


def masked_mdp(**options: Any):
    p, r = spoiled("zeros")
    return rr.mdp(p, r, G, available=MASK, **options)


def plain_mdp(**options: Any):
    """The same problem without a mask of its own; what it says of masked actions is tempting."""
    return rr.mdp(P, np.where(MASK, R, 50.0), G, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", REGS)
def test_everything_sees_the_mask(name):
    """solve, certify, game, occupancy, guarantee and the optimum, against a prior of 0 at the same places."""
    reg, other = REGS[name]
    m, plain = masked_mdp(), plain_mdp()
    if other is None:
        prior = np.array([0.5, 0.3, 0.2]) * MASK
        other = rr.alpha(2.0, 3.0, prior / prior.sum(-1, keepdims=True))
    one, two = rr.solve(m, reg), rr.solve(plain, other)
    for field in ("value", "policy", "perturbation", "objective"):
        np.testing.assert_allclose(getattr(one, field), getattr(two, field), rtol=1e-9, atol=1e-11, err_msg=field)
    assert (np.asarray(one.policy)[~MASK] == 0).all() and (np.asarray(one.perturbation)[~MASK] == 0).all()
    proof = rr.certify(m, reg, one)
    assert float(jnp.max(proof.gap)) < 1e-9 and float(jnp.max(jnp.abs(proof.slack))) < 1e-9
    assert float(jnp.max(proof.consistency)) < 1e-9
    np.testing.assert_allclose(rr.evaluate(m, one.policy, reg), one.value, rtol=1e-11)
    np.testing.assert_allclose(rr.guarantee(m, reg, one.policy).guaranteed, one.objective, rtol=1e-11)
    np.testing.assert_allclose(rr.occupancy(m, one.policy), rr.occupancy(plain, one.policy), atol=1e-11)
    # What takes a regulariser alone takes it restricted.
    own = rr.restricted(reg, m.available)
    taken = np.asarray(one.policy) > 0
    worst = np.where(taken, rr.worst_case(own, one.policy), 0)
    np.testing.assert_allclose(worst, np.where(taken, one.perturbation, 0), atol=1e-8)
    np.testing.assert_allclose(rr.slack(own, one.perturbation), 0, atol=1e-9)
    best = rr.nominal_optimum(m)
    for also in (rr.nominal_optimum(m, reg), rr.nominal_optimum(plain, other)):
        np.testing.assert_allclose(also, best, rtol=1e-12)
    assert float(rr.nominal_optimum(plain)[0]) > 100


def test_a_game_is_played_with_what_there_is():
    m, reg = masked_mdp(), rr.kl(3.0)
    game = rr.solve_game(m, reg, steps=40)
    assert (np.asarray(game.policy)[~MASK] == 0).all() and (np.asarray(game.perturbation)[~MASK] == 0).all()
    objective = float(rr.solve(m, reg).objective)
    assert float(game.primal) <= objective <= float(game.dual) and float(game.relative_gap) < 1e-9


def test_the_optimum_does_not_play_what_the_prior_forbids():
    """A bandit of three whose best arm has prior 0; priors with axes of lanes; strengths add none."""
    m = rr.problems.bandit([1.0, 2.0, 10.0])
    assert float(rr.nominal_optimum(m)[0]) == 10
    assert float(rr.nominal_optimum(m, rr.kl(3.0, prior=np.array([0.5, 0.5, 0])))[0]) == 2
    priors = np.array([[[0.5, 0.5, 0.0]], [[0.5, 0.0, 0.5]], [[1.0, 0.0, 0.0]]])
    np.testing.assert_array_equal(rr.nominal_optimum(m, rr.kl(np.array([1.0, 2.0, 3.0]), priors)), [[2], [10], [1]])
    assert rr.nominal_optimum(m, rr.alpha(np.array([0.5, 2.0]), 1.0)).shape == (1,)
    p = 1 / (1 + np.exp(3.0))
    table = rr.sweep(m, rr.kl(3.0, prior=np.array([0.5, 0.5, 0])), {"beta": [3.0]}, outputs=["price_of_robustness"])
    np.testing.assert_allclose(table["price_of_robustness"], [2 - (p + 2 * (1 - p))], rtol=1e-12)


@pytest.mark.slow
def test_a_sweep_keeps_the_mask():
    """One mask, masks in a batch of MDPs, a grid of rewards that are minus infinity where there is no action."""
    m = masked_mdp()
    outputs = ("value", "price_of_robustness", "worst_case_return", "objective")
    table = rr.sweep(m, rr.kl(1.0), {"beta": [1.0, 3.0]}, outputs=outputs)
    np.testing.assert_allclose(table["value"], rr.solve(m, rr.kl(np.array([1.0, 3.0]))).value, rtol=1e-10)
    np.testing.assert_allclose(table["worst_case_return"], table["objective"], rtol=1e-9)
    best = float(rr.nominal_optimum(m).mean())
    policies = rr.solve(m, rr.kl(np.array([1.0, 3.0]))).policy
    price = [best - float(rr.evaluate(m, policy).mean()) for policy in policies]
    np.testing.assert_allclose(table["price_of_robustness"], price, rtol=1e-8)
    masks = np.stack([MASK, np.ones_like(MASK), np.roll(MASK, 1, 0)])
    many = rr.mdp(P, R, G, available=masks)
    assert many.batch_shape == (3,) and many.transitions.batch_shape == () and np.isfinite(many.reward).all()
    table = rr.sweep(many, rr.kl(3.0), {"beta": [3.0]}, outputs=("value",))
    alone = [rr.solve(rr.mdp(P, R, G, available=mask), rr.kl(3.0)).value for mask in masks]
    np.testing.assert_allclose(table["value"][:, 0], alone, rtol=1e-10)
    np.testing.assert_allclose(rr.solve(many, rr.kl(3.0)).value, alone, rtol=1e-10)
    rewards = np.where(MASK, np.stack([R, 2 * R]), -np.inf)
    table = rr.sweep(m, rr.kl(3.0), {"reward": rewards}, outputs=("value",))
    np.testing.assert_allclose(table["value"][0], rr.solve(m, rr.kl(3.0)).value, rtol=1e-10)
    with pytest.raises(ValueError, match="reward"):
        rr.sweep(plain_mdp(), rr.kl(3.0), {"reward": rewards})


def test_a_lane_may_lack_what_another_has():
    """A row is looked at if one lane that shares it has the action."""
    masks = np.stack([MASK, np.ones_like(MASK)])
    p, r = spoiled("zeros")
    with pytest.raises(ValueError, match=r"reward\[s=0, a=0\] is -inf"):
        rr.mdp(P, r, G, available=masks)
    with pytest.raises(ValueError, match=r"transitions\[s=0, a=0\] sum to 0, .*available="):
        rr.mdp(p, R, G, available=masks)
    lanes = rr.mdp(np.stack([p, P]), np.stack([r, R]), G, available=masks)
    alone = [rr.solve(m, rr.kl(3.0)).value for m in (rr.mdp(p, r, G, available=MASK), rr.mdp(P, R, G))]
    np.testing.assert_allclose(rr.solve(lanes, rr.kl(3.0)).value, alone, rtol=1e-10)
    with pytest.raises(ValueError, match=r"batch axes do not broadcast: available \[3\]"):
        rr.mdp(np.stack([p, P]), R, G, available=np.stack([MASK] * 3))


def test_endings_rewards_by_successor_and_functions():
    p, r = spoiled("zeros")
    end = np.where(MASK, 0.25, 9.0)
    m = rr.mdp(0.75 * p, r, G, termination=end, available=MASK)
    plain = rr.mdp(0.75 * P, R, G, termination=np.full((S, A), 0.25))
    np.testing.assert_allclose(rr.solve(m, rr.kl(3.0)).value, rr.solve(plain, REGS["kl"][1]).value, rtol=1e-11)
    by_successor = np.where(MASK[..., None], R[..., None] + np.zeros(S), np.nan)
    m = rr.mdp(p, by_successor, G, available=MASK)
    np.testing.assert_allclose(m.reward, np.where(MASK, R, 0), atol=1e-12)
    table = jnp.asarray(p)

    def expect(v):
        return jnp.einsum("sat,t->sa", table, v)

    free = rr.mdp(rr.MatrixFree(expect, n_states=S, n_actions=A), r, G, available=MASK)
    np.testing.assert_allclose(rr.solve(free, rr.kl(3.0)).value, rr.solve(masked_mdp(), rr.kl(3.0)).value, rtol=1e-10)


@pytest.mark.slow
def test_traced_masks_and_leaves():
    """The factory inside jit and vmap, with the mask traced or what it masks; derivatives see no action that is not."""
    p, r = spoiled("zeros")
    right = np.asarray(rr.solve(masked_mdp(), rr.kl(3.0)).value)

    def value(p, r, mask):
        return rr.solve(rr.mdp(p, r, G, available=mask), rr.kl(3.0)).value

    np.testing.assert_allclose(jax.jit(value)(p, r, MASK), right, rtol=1e-11)
    np.testing.assert_allclose(jax.jit(lambda mask: value(p, r, mask))(MASK), right, rtol=1e-11)
    np.testing.assert_allclose(jax.jit(lambda r: value(p, r, MASK))(r), right, rtol=1e-11)
    masks = np.stack([MASK, np.roll(MASK, 1, 0)])
    each = jax.jit(jax.vmap(lambda mask: value(P, R, mask)))(masks)
    np.testing.assert_allclose(each, rr.solve(rr.mdp(P, R, G, available=masks), rr.kl(3.0)).value, rtol=1e-10)
    gradient = jax.jit(jax.grad(lambda r: value(p, r, MASK).sum()))(r)
    assert (np.asarray(gradient)[~MASK] == 0).all() and (np.asarray(gradient)[MASK] > 0).all()
    prior = jax.jit(jax.grad(lambda x: rr.solve(masked_mdp(), rr.kl(3.0, log_prior=x)).objective))
    assert np.isfinite(prior(np.full(A, -np.log(A)))).all()
    with pytest.raises(TypeError, match="booleans"):
        jax.jit(value)(p, r, MASK.astype(float))


def test_the_leaf_travels(tmp_path):
    """Files, replaced leaves, shards with padding; without a mask the leaf is None."""
    m = masked_mdp()
    back = rr.load(rr.save(tmp_path / "m", m))
    assert np.array_equal(back.available, MASK) and back.available.dtype == bool
    assert rr.load(rr.save(tmp_path / "plain", plain_mdp())).available is None
    assert rr.mdp(P, R, G, available=np.ones((S, A), int)).available is None
    better = rr.solve(dataclasses.replace(m, reward=jnp.where(MASK, 2 * R, jnp.nan)), rr.kl(1.5))
    np.testing.assert_allclose(better.value, 2 * rr.solve(m, rr.kl(3.0)).value, rtol=1e-10)
    assert np.isfinite(better.q).all()
    np.testing.assert_allclose(
        rr.solve(dataclasses.replace(rr.mdp(P, R, G), available=jnp.asarray(MASK)), rr.kl(3.0)).value,
        rr.solve(m, rr.kl(3.0)).value,
        rtol=1e-11,
    )
    wide = rr.shard(m, jax.devices()[:1], pad=True)
    assert wide.available is not None and np.array_equal(wide.available, MASK)
    assert wide.available.sharding == wide.reward.sharding


# ---- refusals


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (MASK[:, :2], ValueError, r"available has shape \(5, 2\); expected \[\*B, S, A\]"),
        (MASK * 0.5, TypeError, "available must be an array of booleans"),
        (np.zeros((S, A), bool), ValueError, r"available\[s=0\] allows no action; .*termination 1"),
        (np.stack([MASK, MASK & (np.arange(S) != 3)[:, None]]), ValueError, r"available\[lane=1, s=3\] allows no"),
    ],
)
def test_masks_that_are_none(mask, error, message):
    with pytest.raises(error, match=message):
        rr.mdp(P, R, G, available=mask)


def test_rows_of_zeros_and_rewards_of_minus_infinity_are_told_of_available():
    p, r = spoiled("zeros")
    with pytest.raises(ValueError, match=r"transitions\[s=0, a=0\] sum to 0, not 1 .*pass available=\[S, A\]"):
        rr.mdp(p, R, G)
    with pytest.raises(ValueError, match=r"transitions\[s=0, a=0\] sum to 0, .*pass available=\[S, A\]"):
        rr.mdp(p, R, G, normalise=True)
    with pytest.raises(ValueError, match=r"sum to 0, not 0.75 .*pass available=\[S, A\]"):
        rr.mdp(0.75 * p, R, G, termination=np.full((S, A), 0.25))
    with pytest.raises(ValueError, match=r"reward\[s=0, a=0\] is -inf; .*prior 0 .*pass available=\[S, A\]"):
        rr.mdp(P, r, G)


def test_a_policy_of_actions_that_are_not():
    """Refused where it has values; NaN inside jit, or minus infinity where its cost is infinite."""
    m, wrong = masked_mdp(), np.full((S, A), 1 / A)
    for call in (rr.evaluate, rr.occupancy, lambda m, p: rr.evaluate(m, p, rr.kl(1.0))):
        with pytest.raises(ValueError, match=r"policy\[s=0, a=0\] is 0.3333; that action is not available"):
            call(m, wrong)
    assert np.isnan(jax.jit(rr.evaluate)(m, wrong)).all()
    assert np.isnan(jax.jit(rr.occupancy)(m, wrong)).all()
    assert np.isneginf(jax.jit(rr.evaluate)(m, wrong, rr.kl(1.0))).all()
    assert np.isneginf(jax.jit(rr.evaluate)(m, wrong, rr.entropy(1.0))).all()
    assert not (np.asarray(jax.jit(rr.evaluate)(m, wrong, rr.alpha(0.5, 1.0))) > -np.inf).any()
    lanes = jax.jit(rr.evaluate)(m, np.stack([wrong, PRIOR]))
    assert np.isnan(lanes[0]).all() and np.isfinite(lanes[1]).all()


def test_a_prior_that_leaves_nothing_is_no_answer():
    prior = np.where(np.arange(A) == 0, 1.0, 0.0)
    sol = rr.solve(masked_mdp(), rr.kl(1.0, prior))
    assert sol.status == rr.Status.NONFINITE_INPUT and np.isnan(sol.value).all()
    with pytest.raises(rr.SolveError, match="a prior leaves a state none of its available actions"):
        sol.raise_if_failed()
    with pytest.raises(ValueError, match="prior is over 2 actions, the mask over 3"):
        rr.restricted(rr.kl(1.0, np.array([0.5, 0.5])), MASK)


# ---- policies off the support of the prior


def corridor(n, discount):
    """Two actions that both lead one state on; the last state stays."""
    p = np.zeros((n, 2, n))
    p[np.arange(n), :, np.minimum(np.arange(n) + 1, n - 1)] = 1
    return rr.mdp(p, np.ones((n, 2)), discount)


@pytest.mark.parametrize("order", [1.0, 2.0, 0.0])
def test_infinite_costs_reach_back_and_no_further(order):
    """States before one of infinite cost are worth minus infinity, those after it what they are worth anyway."""
    m = corridor(6, 0.9)
    reg = rr.alpha(order, 1.0, np.array([0.5, 0.5])) if order <= 0 else rr.alpha(order, 1.0, np.array([1.0, 0.0]))
    safe, bad = ([0.5, 0.5], [0.0, 1.0]) if order <= 0 else ([1.0, 0.0], [0.5, 0.5])
    policy = np.broadcast_to(safe, (6, 2)).copy()
    right = np.asarray(rr.evaluate(m, policy, reg))
    np.testing.assert_allclose(right, 10, rtol=1e-12)
    policy[2] = bad
    assert np.isposinf(np.asarray(reg.value(policy))[2])
    value = np.asarray(rr.evaluate(m, policy, reg))
    assert np.isneginf(value[:3]).all()
    np.testing.assert_allclose(value[3:], right[3:], rtol=1e-12)
    # Nothing is reached at discount 0, nor by an action that is not taken.
    alone = np.asarray(rr.evaluate(corridor(6, 0.0), policy, reg))
    assert np.isneginf(alone[2]) and np.isfinite(np.delete(alone, 2)).all()
    # A loss that masks those states has a gradient for the others.
    gradient = jax.grad(lambda p: jnp.where(jnp.isfinite(v := rr.evaluate(m, p, reg)), v, 0).sum())(policy)
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[3:] != 0).any()
    assert np.abs(np.asarray(gradient)[:3]).max() < 1e-12


def test_lanes_of_infinite_cost_leave_others_alone():
    m = rr.problems.bandit([1.0, 2.0])
    policies = np.array([[[0.0, 1.0]], [[1.0, 0.0]]])
    value = rr.evaluate(m, policies, rr.kl(1.0, prior=np.array([1.0, 0.0])))
    assert np.isneginf(value[0, 0]) and value[1, 0] == 1
    promise = rr.guarantee(m, rr.kl(1.0, prior=np.array([1.0, 0.0])), policies, m.reward - 1)
    assert np.isneginf(promise.guaranteed[0]) and not promise.covered.any()


def test_entropy_pays_for_playing_on():
    """What its docstring says: the same policies where no episode ends, others where one does; goals are worth much."""
    endless = rr.problems.garnet(6, 4, 3, G)
    one, two = rr.solve(endless, rr.entropy(2.0)), rr.solve(endless, rr.kl(2.0))
    np.testing.assert_allclose(one.policy, two.policy, atol=1e-10)
    np.testing.assert_allclose(one.value - two.value, np.log(4) / 2 / (1 - G), rtol=1e-10)
    end = np.broadcast_to(np.array([0.0, 0.3, 0.9]), (S, A))
    ends = rr.mdp(P * (1 - end)[..., None], R, G, termination=end)
    longer, other = rr.solve(ends, rr.entropy(2.0)), rr.solve(ends, rr.kl(2.0))
    assert (np.asarray(longer.policy - other.policy)[:, 0] > 0.01).all()
    assert (np.asarray(longer.value - other.value) < np.log(A) / 2 / (1 - G)).all()
    goal = rr.solve(rr.problems.grid_world(["S.G"], 0.99), rr.entropy(1.0)).value[2]
    np.testing.assert_allclose(goal, np.log(4) / 0.01, rtol=1e-10)
    assert float(rr.solve(rr.problems.grid_world(["S.G"], 0.99), rr.kl(1.0)).value[2]) == pytest.approx(0, abs=1e-10)
    masked = rr.entropy(2.0, available=np.array([True, True, False, True]))
    right = np.log(np.exp([2, 4, 6]).sum()) / 2
    np.testing.assert_allclose(masked.conjugate(np.array([1.0, 2.0, 9.0, 3.0])), right, rtol=1e-12)
    assert masked.argmax(np.array([1.0, 2.0, 9.0, 3.0]))[2] == 0
    with pytest.raises(ValueError, match="allows no action"):
        rr.entropy(1.0, available=np.array([[True, True], [False, False]]))
