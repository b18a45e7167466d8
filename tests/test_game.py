"""The explicit game: play that knows no closed form meets `solve`, and restricted adversaries meet a convex program.

The reference for a set without a closed form is `min <initial, V>` over V, dr and what else the set needs, subject to
`V >= r - dr + g P V` and membership: SciPy's sequential quadratic programming on problems of three states.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import ACTIONS, STATES, all_cases, garnet_case, lanes, problem, stack
from scipy.optimize import minimize

import robustreg as rr

INDEX = lanes(alpha=(0.5, 1.0, 2.0), beta=(0.5, 5.0, 50.0), discount=(0.95,))
CELLS = [
    "..........", "..######..", "..#....#..", ".....~....", "S....~...G",
    ".....~....", "..#....#..", "..######..", "..........",
]  # fmt: skip
OPTIMISTIC = optax.optimistic_gradient_descent(0.2)
GENTLE = optax.sgd(0.3)


def check(game, objective, tol):
    """Bounds hold at every look, tighten, and meet at the closed form."""
    objective = np.asarray(objective)
    rounding = 1e-9 * (1 + np.abs(objective))
    primals, duals = np.asarray(game.primals), np.asarray(game.duals)
    assert (primals <= (objective + rounding)[..., None]).all()
    assert (duals >= (objective - rounding)[..., None]).all()
    assert (np.diff(primals) >= 0).all() and (np.diff(duals) <= 0).all()
    assert (np.asarray(game.gap) <= tol * np.abs(objective) + rounding).all()
    assert np.array_equal(primals[..., -1], game.primal) and np.array_equal(duals[..., -1], game.dual)
    assert (np.asarray(game.gaps)[..., 0] > 1e-3 * np.abs(objective)).any()


@pytest.fixture(scope="module")
def cases():
    """Nine kinds of problem under nine regularisers: the stack, and its closed forms."""
    m, reg = problem(stack(all_cases()), INDEX)
    return m, reg, rr.solve(m, reg)


@pytest.fixture(scope="module")
def played(cases):
    return rr.solve_game(*cases[:2], steps=160, record=20)


def test_play_meets_the_closed_form(cases, played):
    """Strong duality in every kind of problem (masks, ties, endings), found by play; honest bounds."""
    m, reg, sol = cases
    check(played, sol.objective, 1e-6)
    start = np.asarray(m.initial)
    guarantee = (start * np.asarray(rr.evaluate(m, played.policy, reg))).sum(-1)
    np.testing.assert_allclose(guarantee, played.primal, atol=1e-8)
    assert (np.asarray(rr.slack(reg, played.perturbation)) >= -1e-9).all()
    assert (np.asarray(played.rounds) == np.arange(0, 161, 20)).all() and (np.asarray(played.steps) == 160).all()
    # The dual by code that knows no regulariser.
    all_c = all_cases()
    for i, lane in ((0, 4), (4, 7), (5, 2)):
        c = all_c[i]
        plain = oracle.optimal_value(c.P, c.reward - np.asarray(played.perturbation)[i, lane], 0.95, c.prior > 0)
        np.testing.assert_allclose((c.initial * plain).sum(), played.dual[i, lane], atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "simultaneous", "agent": GENTLE, "responses": 1},
        {"scheme": "simultaneous", "agent": OPTIMISTIC, "response": GENTLE, "responses": 1},
        {"scheme": "extragradient", "agent": GENTLE, "responses": 2},
        {"link": "softmax", "agent": optax.chain(optax.clip(1.0), optax.sgd(0.2))},
        {
            "agent": optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.7)),
            "response": optax.adam(0.05),
            "record": 7,
        },
    ],
    ids=["simultaneous", "optimistic", "extragradient", "softmax", "others"],
)
def test_every_option(options):
    """Other schemes, links and transformations: slower, to the same value; `record` that does not divide `steps`."""
    index = lanes(alpha=(1.0, 2.0) if "link" not in options else (1.0,), beta=(0.5, 4.0), discount=(0.9,))
    m, reg = problem(stack([garnet_case(1)]), index)
    game = rr.solve_game(m, reg, steps=300, tol=1e-4, **options).raise_if_failed()
    check(game, rr.solve(m, reg).objective, 1e-4)
    assert (np.asarray(game.steps) <= 300).all() and (np.asarray(game.relative_gap) <= 1e-4).all()


def test_batches_freeze_and_lost_lanes():
    """A batch is its single games; done lanes stop; a lane of NaN is reported and changes no other; jit and vmap."""
    index = lanes(alpha=(0.5, 2.0), beta=(0.5, 20.0), discount=(0.9,))
    m, reg = problem(stack([garnet_case(2)]), index)
    game = rr.solve_game(m, reg, tol=1e-6, record=1)
    assert game.converged.all() and np.unique(np.asarray(game.steps)).size > 1
    broken = dataclasses.replace(reg, beta=reg.beta.at[1].set(jnp.nan))
    lost = rr.solve_game(m, broken, tol=1e-6, record=1)
    assert lost.status[0, 1] == rr.Status.NONFINITE_INPUT and np.isnan(lost.primal[0, 1])
    keep = np.array([0, 2, 3])
    for name in ("policy", "perturbation", "primal", "dual", "steps", "status", "primals"):
        assert np.array_equal(np.asarray(getattr(game, name))[:, keep], np.asarray(getattr(lost, name))[:, keep]), name
    with pytest.raises(rr.SolveError, match=r"NONFINITE_INPUT: lane \[0, 1\]"):
        lost.raise_if_failed()
    one = jax.tree.map(lambda x: x[3], (reg.alpha, reg.beta))
    single = dataclasses.replace(reg, alpha=one[0], beta=one[1])
    alone = rr.solve_game(m, single, tol=1e-6, record=1)
    assert int(alone.steps[0, 0]) == int(game.steps[0, 3])
    np.testing.assert_allclose(alone.policy[0, 0], game.policy[0, 3], atol=1e-9)
    with pytest.raises(rr.SolveError, match="MAX_STEPS"):
        rr.solve_game(m, reg, tol=1e-12, steps=1).raise_if_failed()


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


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["box", "features", "budget"])
def test_restricted_adversaries_against_a_convex_program(kind, seed):
    """Bounds enclose SLSQP's answer, and close to the accuracy that the set allows."""
    P, reward, initial, prior = small(seed)
    g, betas = 0.8, np.array([0.5, 3.0])
    m = rr.mdp(P, reward, g, initial=initial)
    reg = rr.kl(beta=betas, prior=prior)
    rng = np.random.default_rng(10 + seed)
    contrast = reward - (prior * reward).sum(-1, keepdims=True)
    features = np.stack([contrast, rng.normal(size=(3, 2)), np.ones((3, 2))], -1)
    weights = rng.uniform(0.5, 1.5, 3)
    adversary, extra = {
        "box": (rr.Box(0.3), 0.3),
        "features": (rr.Features(features), features),
        "budget": (rr.SharedBudget(0.4, weights), (0.4, weights)),
    }[kind]
    game = rr.solve_game(m, reg, adversary=adversary, steps=1000 if kind == "box" else 2000, record=50)
    truth = np.array([reference(P, reward, initial, prior, beta, g, kind, extra) for beta in betas])
    assert np.isfinite(truth).all()
    assert (np.asarray(game.primals) <= truth[:, None] + 1e-6).all()
    assert (np.asarray(game.duals) >= truth[:, None] - 1e-6).all()
    assert (np.asarray(game.gap) <= (1e-2 if kind == "features" else 1e-6) * (1 + np.abs(truth))).all()
    whole = np.asarray(rr.solve(m, reg).objective)
    assert (truth >= whole - 1e-7).all() if kind != "budget" else (truth <= whole + 1e-7).all()
    dr = np.asarray(game.perturbation)
    excess = -np.asarray(rr.slack(reg, dr))
    if kind == "budget":
        assert (np.maximum(excess, 0) @ weights <= 0.4 + 1e-9).all()
    else:
        assert excess.max() <= 1e-9
    if kind == "box":
        assert np.abs(dr).max() <= 0.3 + 1e-12
    if kind == "features":
        plain = initial @ oracle.optimal_value(P, reward, g, prior > 0)
        assert (truth < plain - 5e-4).all() and truth[0] < truth[1] - 1e-3
        phi = features.reshape(6, 3)
        w = np.linalg.lstsq(phi, dr.reshape(2, 6).T, rcond=None)[0]
        np.testing.assert_allclose(phi @ w, dr.reshape(2, 6).T, atol=1e-9)


def test_smaller_sets_are_worth_more_to_the_agent():
    """Whole set <= larger box <= smaller box <= states only = nominal optimum; no budget is the whole set; per lane."""
    cases = stack([garnet_case(3), all_cases()[5]])
    m, _ = problem(cases, lanes(alpha=(1.0,), beta=(2.0,), discount=(0.9,)))
    reg = rr.kl(beta=np.array([0.5, 2.0, 4.0]), prior=cases.prior[:, None])
    sol = rr.solve(m, reg)
    bounds = np.array([0.05, 0.4, 3.0])[:, None, None, None, None]
    boxes = rr.solve_game(m, reg, adversary=rr.Box(bounds), steps=400, record=100)
    value, gap = np.asarray(boxes.primal), np.asarray(boxes.gap)
    assert value.shape == (3, 2, 3) and (gap <= 1e-3).all() and (gap >= -1e-9).all()
    assert (np.diff(value, axis=0) <= gap[1:] + 1e-9).all() and (value[0] - value[1]).max() > 1e-2
    assert (value + gap >= np.asarray(sol.objective) - 1e-9).all()
    states = rr.solve_game(m, reg, adversary=rr.StatesOnly(), steps=100, tol=1e-6)
    assert states.converged.all() and (np.asarray(states.dual) >= value[0] - 1e-9).all()
    for i, c in enumerate((garnet_case(3), all_cases()[5])):
        plain = (c.initial * oracle.optimal_value(c.P, c.reward, 0.9, c.prior > 0)).sum()
        np.testing.assert_allclose(states.dual[i], plain, atol=1e-9)
    assert (np.asarray(states.perturbation) == 0).all()
    none = rr.solve_game(m, reg, adversary=rr.SharedBudget(0.0, np.ones(STATES)), steps=60, record=30)
    np.testing.assert_allclose(none.primal, sol.objective, atol=1e-5)


def test_errors_name_the_remedy():
    m, reg = rr.problems.chain(4), rr.kl(2.0)
    constant = np.ones((4, 2, 1))
    wrong = [
        (TypeError, "first argument must be an MDP", (reg, reg), {}),
        (TypeError, "optax transformation of its steps is `response`", (m, reg), {"adversary": optax.sgd(1.0)}),
        (TypeError, "agent must be an optax transformation", (m, reg), {"agent": 0.1}),
        (TypeError, "response must be an optax transformation", (m, reg), {"response": "adam"}),
        (ValueError, "scheme must be one of 'alternating'", (m, reg), {"scheme": "other"}),
        (ValueError, "link must be one of 'matched'", (m, reg), {"link": "other"}),
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


def test_float32_keeps_its_precision():
    m, reg = problem(stack([garnet_case(1)]), lanes(alpha=(1.0, 2.0), beta=(2.0,), discount=(0.9,)), dtype=np.float32)
    game = rr.solve_game(m, reg, steps=40)
    assert game.primal.dtype == np.float32 and (np.asarray(game.gap) <= 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lake", "grid", "garnets"])
def test_defaults_reach_a_relative_gap_of_1e_4(name):
    """The problems of the configuration files, all nine regularisers in one batch, 200 steps at most."""
    if name == "lake":
        gymnasium = pytest.importorskip("gymnasium")
        m = rr.from_gymnasium(gymnasium.make("FrozenLake-v1", map_name="8x8"), discount=0.99)
    elif name == "grid":
        m = rr.problems.grid_world(CELLS, 0.99, slip=0.05, step=-0.1, water=-1.0, goal=5.0)
    else:
        m = rr.problems.garnets(64, 64, 4, 5, 0.99)
    column = (slice(None), None) if name == "garnets" else slice(None)
    reg = rr.alpha(alpha=INDEX["alpha"][column], beta=INDEX["beta"][column])
    game = rr.solve_game(m, reg, tol=1e-4).raise_if_failed()
    objective = np.asarray(rr.solve(m, reg).objective)
    assert (np.asarray(game.gap) <= 1e-4 * np.abs(objective)).all()
    check(game, objective, 1e-4)
    assert game.policy.shape == (*objective.shape, m.n_states, ACTIONS)
