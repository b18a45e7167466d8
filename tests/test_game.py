"""The explicit game: play that knows no closed form meets `solve`, and restricted adversaries meet a convex program.

The reference for a set without a closed form is `min <initial, V>` over V, dr and what else the set needs, subject to
`V >= r - dr + g P V` and membership: SciPy's sequential quadratic programming on problems of three states.
"""

import dataclasses
import functools
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import ACTIONS, STATES, all_cases, garnet_case, lanes, problem, stack, truth
from scipy.optimize import minimize

import robustreg as rr

# Many compilations: the run on the oldest releases leaves this file out.
pytestmark = pytest.mark.slow

INDEX = lanes(alpha=(0.5, 1.0, 2.0), beta=(0.5, 5.0, 50.0), discount=(0.95,))
CELLS = [
    "..........", "..######..", "..#....#..", ".....~....", "S....~...G",
    ".....~....", "..#....#..", "..######..", "..........",
]  # fmt: skip
OPTIMISTIC = optax.optimistic_gradient_descent(0.2)
GENTLE = optax.sgd(0.3)
# Gap relative to 1 + |value| after 600 rounds.
TIGHT = {"box": 1e-6, "features": 1e-4, "budget": 1e-6}


def check(game, objective, tol):
    """Bounds hold at every look, tighten, and meet at the closed form, in every problem (along the first axis)."""
    objective = np.asarray(objective)
    rounding = 1e-9 * (1 + np.abs(objective))
    primals, duals = np.asarray(game.primals), np.asarray(game.duals)
    assert (primals <= (objective + rounding)[..., None]).all()
    assert (duals >= (objective - rounding)[..., None]).all()
    assert (np.diff(primals) >= 0).all() and (np.diff(duals) <= 0).all()
    wide = np.asarray(game.gap) > tol * np.abs(objective) + rounding
    assert not wide.any(), np.argwhere(wide)
    assert np.array_equal(primals[..., -1], game.primal) and np.array_equal(duals[..., -1], game.dual)
    assert (np.asarray(game.gaps)[..., 0] > 1e-3 * np.abs(objective)).any()


# Options that a compiled program depends on, the same for the tests on the stack: one program serves them all.
PLAY: dict[str, Any] = {"steps": 160, "record": 20}


# Every kind of problem meets every alpha and every beta, though not every pair of them: three lanes each.
KINDS = np.arange(9)[:, None]
ALPHA, BETA = (
    np.array([0.5, 1.0, 2.0])[(KINDS + np.arange(3)) % 3],
    np.array([0.5, 5.0, 50.0])[(KINDS // 3 + np.arange(3)) % 3],
)


@pytest.fixture(scope="module")
def cases():
    """Nine kinds of problem under three regularisers each: the stack, and its values by the oracle."""
    stacked = stack(all_cases())
    m, _ = problem(stacked, lanes(alpha=(1.0,), beta=(1.0, 1.0, 1.0), discount=(0.95,)))
    reg = rr.alpha(alpha=ALPHA, beta=BETA, prior=stacked.prior[:, None])
    g = np.full(ALPHA.shape, 0.95)
    value = oracle.solve(stacked.P[:, None], stacked.reward[:, None], g, ALPHA, BETA, stacked.prior[:, None])[0]
    return m, reg, (stacked.initial[:, None] * value).sum(-1)


@pytest.fixture(scope="module")
def played(cases):
    return rr.solve_game(*cases[:2], **PLAY)


def guaranteed(c, policy, alpha, beta, g):
    """Return of a policy less the divergence that it pays, from its occupancy."""
    flow = np.linalg.solve(np.eye(STATES) - g * np.einsum("sa,sat->ts", policy, c.P), c.initial)
    paid = oracle.divergence(np.full(STATES, alpha), c.prior, policy) / beta
    return flow @ ((policy * np.where(c.prior > 0, c.reward, 0)).sum(-1) - paid)


def test_play_meets_the_closed_form(cases, played):
    """Strong duality in every kind of problem (masks, ties, endings), found by play; honest bounds."""
    _, reg, objective = cases
    check(played, objective, 1e-6)
    assert (np.asarray(rr.slack(reg, played.perturbation)) >= -1e-9).all()
    assert (np.asarray(played.rounds) == np.arange(0, 161, 20)).all() and (np.asarray(played.steps) == 160).all()
    assert played.converged.all() and np.array_equal(played.tol, played.relative_gap)
    # Both bounds by code that knows no game.
    policy, dr = np.asarray(played.policy), np.asarray(played.perturbation)
    for i, c in enumerate(all_cases()):
        for lane, (alpha, beta) in enumerate(zip(ALPHA[i], BETA[i])):
            low = guaranteed(c, policy[i, lane], alpha, beta, 0.95)
            np.testing.assert_allclose(low, played.primal[i, lane], atol=1e-8)
        plain = oracle.optimal_value(c.P, c.reward - dr[i, lane], 0.95, c.prior > 0)
        np.testing.assert_allclose((c.initial * plain).sum(), played.dual[i, lane], atol=1e-8)


def test_lanes_freeze_and_are_lost_alone(cases):
    """Done lanes stop; a lane of NaN is reported; neither that nor other lanes' strengths change a bit of a lane."""
    m, reg, objective = cases
    game = rr.solve_game(m, reg, tol=1e-6, **PLAY)
    check(game, objective, 1e-6)
    steps = np.asarray(game.steps)
    assert game.converged.all() and np.unique(steps).size > 1 and (steps <= 160).all()
    late = np.asarray(game.primals)[..., -1:] == np.asarray(game.primals)
    assert late[np.asarray(game.rounds) >= steps[..., None]].all()
    # Other strengths and a tolerance out of reach in the first lanes, NaN in the second.
    other, tol = BETA.copy(), np.array([1e-300, 1e-6, 1e-6])
    other[:, 0], other[:, 1] = 0.4 * BETA[:, 0], np.nan
    lost = rr.solve_game(m, dataclasses.replace(reg, beta=jnp.asarray(other)), tol=tol, **PLAY)
    status = np.asarray(lost.status)
    assert (status[:, 1] == rr.Status.NONFINITE_INPUT).all() and np.isnan(lost.primal[:, 1]).all()
    for name in ("policy", "perturbation", "primal", "dual", "steps", "status", "primals"):
        assert np.array_equal(np.asarray(getattr(game, name))[:, 2], np.asarray(getattr(lost, name))[:, 2]), name
    capped = status == rr.Status.MAX_STEPS
    assert capped[:, 0].any() and not capped[:, 1:].any() and (np.asarray(lost.steps)[capped] == 160).all()
    with pytest.raises(rr.SolveError, match=r"NONFINITE_INPUT: lane \[0, 1\]"):
        lost.raise_if_failed()
    with pytest.raises(rr.SolveError, match="MAX_STEPS"):
        lost.raise_if_failed()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_tol_only_rounding_is_convergence(dtype):
    """A game that has played all its steps has not converged by that: two steps leave a gap of 42% in one lane.

    In the other they are all that it takes.
    """
    m, reg = rr.problems.chain(discount=0.9, dtype=dtype), rr.alpha(*np.array([[1, 2], [2, 50]], dtype))
    short = rr.solve_game(m, reg, steps=2)
    gap, status = np.asarray(short.relative_gap), np.asarray(short.status)
    assert gap[0] > 0.4 and status[0] == rr.Status.MAX_STEPS
    assert gap[1] < 1000 * np.finfo(dtype).eps and status[1] == rr.Status.CONVERGED
    assert np.asarray(short.converged).tolist() == [False, True]
    with pytest.raises(
        rr.SolveError, match=r"MAX_STEPS: lane \[0\] \(relative gap 0.42\d?\): play more steps, or give"
    ):
        short.raise_if_failed()
    assert np.array_equal(short.tol, short.relative_gap) and (np.asarray(short.steps) == 2).all()


def test_float32_keeps_its_precision():
    """Also at a strength at which one step leaves a gap of 30%."""
    m = rr.problems.chain(discount=0.9, dtype=np.float32)
    game = rr.solve_game(m, rr.alpha(*np.array([[1, 1, 2], [50, 2, 2]], np.float32)), steps=60).raise_if_failed()
    assert game.primal.dtype == np.float32 and (np.asarray(game.gap) <= 1e-4).all()
    assert (np.asarray(game.relative_gap) < 1000 * np.finfo(np.float32).eps).all()
    assert np.array_equal(game.tol, game.relative_gap) and (np.asarray(game.steps) == 60).all()


# The last ones are those of two tests: a look after every round, and a tolerance.
OPTIONS: dict[str, dict[str, Any]] = {
    "optimistic": {"scheme": "simultaneous", "agent": OPTIMISTIC, "response": GENTLE, "responses": 1, "record": 7},
    "simultaneous": {"scheme": "simultaneous", "agent": GENTLE, "responses": 1},
    "extragradient": {"scheme": "extragradient", "agent": GENTLE, "responses": 2},
    "norms and momentum": {
        "agent": optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.7)),
        "response": optax.sgd(0.5, momentum=0.3),
        "record": 1,
    },
}


@functools.cache
def tried(name):
    """Four lanes of one problem under some options, and their values by the oracle."""
    index = lanes(alpha=(1.0, 2.0), beta=(0.5, 4.0), discount=(0.9,))
    stacked = stack([garnet_case(1)])
    m, reg = problem(stacked, index)
    game = rr.solve_game(m, reg, steps=300, tol=1e-4, **OPTIONS[name]).raise_if_failed()
    return index, game, (stacked.initial * truth(stacked, index)[0]).sum(-1)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name):
    """Other schemes and transformations: slower, to the same value; `record` that does not divide `steps`."""
    _, game, objective = tried(name)
    check(game, objective, 1e-4)
    assert (np.asarray(game.steps) <= 300).all() and (np.asarray(game.relative_gap) <= 1e-4).all()


@pytest.mark.slow
def test_a_batch_is_its_single_games():
    """One lane alone, under jit, and as an element of a vmap."""
    index, game, _ = tried("norms and momentum")
    c = garnet_case(1)
    plain = c.mdp(0.9)

    def alone(order, beta):
        reg = rr.alpha(alpha=order, beta=beta, prior=c.prior)
        return rr.solve_game(plain, reg, steps=300, tol=1e-4, **OPTIONS["norms and momentum"])

    alpha, beta = index["alpha"], index["beta"]
    one = jax.tree.map(lambda x: np.asarray(x)[None], jax.jit(alone)(alpha[0], beta[0]))
    for single in (jax.jit(jax.vmap(alone))(alpha, beta), one):
        n = single.steps.shape[0]
        assert np.array_equal(single.steps, game.steps[0, :n])
        np.testing.assert_allclose(single.policy, game.policy[0, :n], atol=1e-9)
        np.testing.assert_allclose(single.primal, game.primal[0, :n], atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------
# sets without a closed form


def small(seed):
    """Three states, two actions: P [3,2,3], reward [3,2], initial [3], prior [3,2]."""
    rng = np.random.default_rng(seed)
    P, prior = rng.dirichlet(np.ones(3), (3, 2)), rng.dirichlet([3, 3], 3)
    return P, rng.normal(size=(3, 2)), rng.dirichlet(np.ones(3)), prior


def reference(P, reward, initial, prior, beta, g, kind, extra):
    """`min <initial, V>` over (V, parameters of dr): KL, by SLSQP from several starts."""
    S, A = reward.shape
    n = {"box": S * A, "features": 0 if kind != "features" else extra.shape[-1], "budget": S * A + S}[kind]

    def dr(x):
        return np.einsum("saf,f->sa", extra, x[S:]) if kind == "features" else x[S : S + S * A].reshape(S, A)

    def inside(x):
        excess = np.log((prior * np.exp(beta * dr(x))).sum(-1)) / beta
        if kind != "budget":
            return -excess
        budget, weights = extra
        c = x[S + S * A :]
        return np.concatenate([c - excess, c, [budget - weights @ c]])

    def above(x):
        v = x[:S]
        return (v[:, None] - (reward - dr(x)) - g * P @ v).ravel()

    bounds = [(None, None)] * (S + n)
    if kind == "box":
        bounds[S:] = [(-extra, extra)] * n
    rng = np.random.default_rng(0)
    best = np.inf
    for scale in (0.0, 0.01, 0.1):
        x0 = np.concatenate([np.full(S, 10.0), scale * rng.normal(size=n)])
        limits = [{"type": "ineq", "fun": above}, {"type": "ineq", "fun": inside}]
        out = minimize(
            lambda x: initial @ x[:S], x0, constraints=limits, bounds=bounds, options={"ftol": 1e-12, "maxiter": 2000}
        )
        if out.success and min(above(out.x).min(), inside(out.x).min()) > -1e-8:
            best = min(best, out.fun)
    return best


@pytest.mark.parametrize("kind", ["box", "features", "budget"])
def test_restricted_adversaries_against_a_convex_program(kind):
    """Bounds enclose SLSQP's answer and close on it: two problems, two strengths."""
    g, betas, seeds = 0.8, np.array([0.5, 3.0]), (0, 1)
    P, reward, initial, prior = (np.stack(x) for x in zip(*map(small, seeds)))
    m = rr.mdp(P[:, None], reward[:, None], g, initial=initial[:, None])
    reg = rr.kl(beta=betas, prior=prior[:, None])
    rng = np.random.default_rng(10)
    contrast = reward - (prior * reward).sum(-1, keepdims=True)
    features = np.stack([contrast, rng.normal(size=contrast.shape), np.ones_like(contrast)], -1)
    weights = rng.uniform(0.5, 1.5, (2, 3))
    adversary, extra = {
        "box": (rr.Box(0.3), [0.3, 0.3]),
        "features": (rr.Features(features[:, None]), features),
        "budget": (rr.SharedBudget(0.4, weights[:, None]), [(0.4, w) for w in weights]),
    }[kind]
    game = rr.solve_game(m, reg, adversary=adversary, steps=600, record=50)
    truth = np.array(
        [[reference(P[i], reward[i], initial[i], prior[i], beta, g, kind, extra[i]) for beta in betas] for i in seeds]
    )
    assert np.isfinite(truth).all()
    assert (np.asarray(game.primals) <= truth[..., None] + 1e-6).all()
    assert (np.asarray(game.duals) >= truth[..., None] - 1e-6).all()
    assert (np.asarray(game.gap) <= TIGHT[kind] * (1 + np.abs(truth))).all()
    whole = np.asarray(rr.solve(m, reg).objective)
    assert (truth >= whole - 1e-7).all() if kind != "budget" else (truth <= whole + 1e-7).all()
    dr = np.asarray(game.perturbation)
    excess = -np.asarray(rr.slack(reg, dr))
    if kind == "budget":
        assert ((np.maximum(excess, 0) * weights[:, None]).sum(-1) <= 0.4 + 1e-9).all()
    else:
        assert excess.max() <= 1e-9
    if kind == "box":
        assert np.abs(dr).max() <= 0.3 + 1e-12
    if kind == "features":
        for i in seeds:
            plain = initial[i] @ oracle.optimal_value(P[i], reward[i], g, prior[i] > 0)
            assert (truth[i] < plain - 1e-4).all()
            phi = features[i].reshape(6, 3)
            w = np.linalg.lstsq(phi, dr[i].reshape(2, 6).T, rcond=None)[0]
            np.testing.assert_allclose(phi @ w, dr[i].reshape(2, 6).T, atol=1e-9)


@pytest.mark.slow
def test_smaller_sets_are_worth_more_to_the_agent():
    """Whole set <= larger box <= smaller box <= states only = nominal optimum; no budget is the whole set; per lane."""
    cases = stack([garnet_case(3), all_cases()[5]])
    m, _ = problem(cases, lanes(alpha=(1.0,), beta=(2.0,), discount=(0.9,)))
    reg = rr.kl(beta=np.array([0.5, 2.0, 4.0]), prior=cases.prior[:, None])
    sol = rr.solve(m, reg)
    bounds = np.array([0.05, 0.4, 3.0])[:, None, None, None, None]
    boxes = rr.solve_game(m, reg, adversary=rr.Box(bounds), steps=1600, record=400)
    value, gap = np.asarray(boxes.primal), np.asarray(boxes.gap)
    assert value.shape == (3, 2, 3) and (gap >= -1e-9).all()
    # Slow where the box binds on all actions (see `Box`), or where its edge meets an action of prior 2^-20: one lane of
    # each, at the weakest bound on what the agent loses, beta = 0.5. The other lanes are at rounding.
    assert (gap[..., 0] <= 3e-5).all() and (gap[..., 1:] <= 1e-8).all()
    assert (np.diff(value, axis=0) <= gap[1:] + 1e-9).all() and (value[0] - value[1]).max() > 1e-2
    assert (value + gap >= np.asarray(sol.objective) - 1e-9).all()
    # Nothing regularises the agent: a worse action fades by exp(-beta x) a round and unit of step, x worse.
    bold = optax.sgd(50.0)
    states = rr.solve_game(m, reg, bold, rr.StatesOnly(), steps=200, tol=1e-6)
    assert states.converged.all() and (np.asarray(states.dual) >= value[0] - 1e-9).all()
    for i, c in enumerate((garnet_case(3), all_cases()[5])):
        plain = (c.initial * oracle.optimal_value(c.P, c.reward, 0.9, c.prior > 0)).sum()
        np.testing.assert_allclose(states.dual[i], plain, rtol=1e-6)
    assert (np.asarray(states.perturbation) == 0).all()
    none = rr.solve_game(m, reg, adversary=rr.SharedBudget(0.0, np.ones(STATES)), steps=60, record=30)
    np.testing.assert_allclose(none.primal, sol.objective, atol=1e-6)


def test_errors_name_the_remedy():
    m, reg = rr.problems.chain(4), rr.kl(2.0)
    constant = np.ones((4, 2, 1))
    wrong = [
        (TypeError, "first argument must be an MDP", (reg, reg), {}),
        (TypeError, "optax transformation of its steps is `response`", (m, reg), {"adversary": optax.sgd(1.0)}),
        (TypeError, "agent must be an optax transformation", (m, reg), {"agent": 0.1}),
        (TypeError, "response must be an optax transformation", (m, reg), {"response": "adam"}),
        (ValueError, "scheme must be one of 'alternating'", (m, reg), {"scheme": "other"}),
        (ValueError, "steps must be at least 1", (m, reg), {"steps": 0}),
        (TypeError, "record must be an integer", (m, reg), {"record": 1.5}),
        (ValueError, "responses must be at least 1", (m, reg), {"responses": 0}),
        (ValueError, "tol must be positive", (m, reg), {"tol": 0.0}),
        (ValueError, "pass adversary=None", (m, reg), {"adversary": rr.Box(0.0)}),
        (ValueError, "bound\\[:, None, None\\]", (m, reg), {"adversary": rr.Box(np.ones(3))}),
        (ValueError, "append one", (m, reg), {"adversary": rr.Features(np.arange(8.0).reshape(4, 2, 1))}),
        (ValueError, "expected \\[\\*B, S, A, F\\]", (m, reg), {"adversary": rr.Features(constant[..., 0])}),
        (ValueError, "features must be finite", (m, reg), {"adversary": rr.Features(constant * np.nan)}),
        (ValueError, "one weight per state", (m, reg), {"adversary": rr.SharedBudget(1.0, np.ones(3))}),
        (ValueError, "taken from without limit", (m, reg), {"adversary": rr.SharedBudget(1.0, np.arange(4.0))}),
        (ValueError, "at least 0", (m, reg), {"adversary": rr.SharedBudget(-1.0, np.ones(4))}),
    ]
    for kind, text, arguments, options in wrong:
        with pytest.raises(kind, match=text):
            rr.solve_game(*arguments, **options)


@pytest.mark.slow
def test_defaults_reach_a_relative_gap_of_1e_4():
    """Problems of the configuration files, all nine regularisers in one batch, 200 steps at most."""
    problems = [
        rr.from_gymnasium(gymnasium.make("FrozenLake-v1", map_name="8x8"), discount=0.99),
        rr.problems.grid_world(CELLS, 0.99, slip=0.05, step=-0.1, water=-1.0, goal=5.0),
        *(rr.problems.garnet(64, ACTIONS, 5, 0.99, seed=seed) for seed in range(6)),
    ]
    # (Of different sizes: padded to the largest.)
    stacked = rr.stack([(m, rr.kl(1.0)) for m in problems]).mdp
    lists: Any = stacked.transitions
    m = jax.tree.map(lambda x: x[:, None], stacked)
    m = dataclasses.replace(m, transitions=rr.Successors(lists.indices, lists.probabilities[:, None]))
    reg = rr.alpha(alpha=INDEX["alpha"], beta=INDEX["beta"])
    game = rr.solve_game(m, reg, tol=1e-4).raise_if_failed()
    objective = np.asarray(rr.solve(m, reg).objective)
    assert (np.asarray(game.gap) <= 1e-4 * np.abs(objective)).all()
    check(game, objective, 1e-4)
    assert game.policy.shape == (8, 9, 90, ACTIONS)
