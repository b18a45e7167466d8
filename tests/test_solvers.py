"""Fixed points: every solver, transition kind and regulariser agrees with the oracle within its own certificate."""

import functools
import re

import jax
import numpy as np
import oracle
import pytest
from cases import ACTIONS, ALPHAS, STATES, all_cases, lanes, linked, problem, replace, size, solve, stack, suite, truth

import robustreg as rr

# Many compilations: the run on the oldest releases leaves this file out.
pytestmark = pytest.mark.slow

CASES = all_cases()
NAMES = [case.name for case in CASES]
SOLVERS = {
    "newton krylov": rr.Newton(linear="krylov"),
    "newton direct": rr.Newton(linear="direct"),
    "value iteration": rr.ValueIteration(),
    "policy iteration": rr.ModifiedPolicyIteration(steps=10),
    "anderson": rr.Anderson(history=5),
}
every_solver = pytest.mark.parametrize("name", SOLVERS)


def check(sol, value, tol, where=""):
    """Converged, bounds that hold the truth and are as tight as promised, a midpoint within tol."""
    status = np.asarray(sol.status)
    lower, upper, answer = (np.asarray(x) for x in (sol.lower, sol.upper, sol.value))
    tol = np.broadcast_to(tol, status.shape)[..., None]
    failed = status != rr.Status.CONVERGED
    assert not failed.any(), (where, np.argwhere(failed)[:5], status[failed][:5])
    outside = (lower > value) | (value > upper)
    assert not outside.any(), (where, np.argwhere(outside)[:5])
    assert (upper - lower <= 2 * tol * (1 + 1e-12)).all(), where
    assert (np.abs(answer - value) <= tol).all(), where
    assert ((lower <= answer) & (answer <= upper)).all(), where


# These take hundreds of steps, each of the same backup: every alpha once, and discounts up to .9.
AVERAGING = ("value iteration", "policy iteration", "anderson")


@functools.cache
def quick(name=""):
    """Lanes for every solver, alpha from -1 to 3 and one of discount 0, and the oracle's values."""
    cases = stack(CASES)
    alphas = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    if name in AVERAGING:
        beta = np.array([1e-3, 0.3, 10.0, 10.0, 0.3, 10.0, 0.3, 3.0])
        index = {"alpha": np.append(alphas, 1.0), "beta": beta, "discount": np.append(np.full(7, 0.9), 0.0)}
        return cases, index, truth(cases, index)[0]
    pairs = ((1e-3, 0.9), (0.3, 0.99), (10.0, 0.99))
    index = lanes(alpha=tuple(alphas), pair=np.arange(3))
    beta, discount = np.array(pairs)[index["pair"]].T
    index = {
        "alpha": np.concatenate([index["alpha"], [-1.0, 1.0, 1.5]]),
        "beta": np.concatenate([beta, np.full(3, 3.0)]),
        "discount": np.concatenate([discount, np.zeros(3)]),
    }
    return cases, index, truth(cases, index)[0]


@functools.cache
def solved(name):
    """All of them, to 1e-8 from zero."""
    cases, index, _ = quick(name)
    return solve(cases, index, SOLVERS[name], tol=1e-8, init=np.zeros(STATES), max_steps=20_000)


@every_solver
def test_matches_the_oracle(name):
    _, index, value = quick(name)
    sol = solved(name)
    check(sol, value, 1e-8, name)
    assert (np.asarray(sol.steps)[:, index["discount"] == 0] <= 2).all()


@every_solver
def test_warm_start(name):
    """From the answer nothing is left to do; from far away the answer is the same."""
    cases, index, value = quick(name)
    warm = solve(cases, index, SOLVERS[name], tol=1e-8, init=value, max_steps=20_000)
    check(warm, value, 1e-8, name)
    assert (np.asarray(warm.steps) <= 1).all()
    away = 1e3 * np.random.default_rng(0).normal(size=STATES)
    far = solve(cases, index, SOLVERS[name], tol=1e-8, init=away, max_steps=20_000)
    check(far, value, 1e-8, name)
    assert np.asarray(far.steps).max() > 2


@every_solver
def test_max_steps(name):
    """The cap is reported as such; the bounds hold all the same, and the failure names the lanes."""
    cases, index, value = quick(name)
    sol = solve(cases, index, SOLVERS[name], tol=1e-8, init=np.zeros(STATES), max_steps=2)
    status, steps = np.asarray(sol.status), np.asarray(sol.steps)
    capped = status == rr.Status.MAX_STEPS
    assert capped[:, index["discount"] > 0][NAMES.index("linked")].all()
    assert np.isin(status, (rr.Status.CONVERGED, rr.Status.MAX_STEPS)).all()
    assert (steps[capped] == 2).all() and (steps <= 2).all()
    lower, upper = np.asarray(sol.lower), np.asarray(sol.upper)
    assert ((lower <= value) & (value <= upper)).all()
    assert ((upper - lower).max(-1)[capped] > 2e-8).all()
    assert (np.asarray(sol.converged) == ~capped).all()
    with pytest.raises(rr.SolveError, match="MAX_STEPS"):
        sol.raise_if_failed()


@every_solver
def test_unreachable_tolerance_stagnates(name):
    """Rounding ends the run, long before the cap, with bounds that hold and the best value that there is."""
    cases, index, value = quick(name)
    sol = solve(cases, index, SOLVERS[name], tol=1e-30, init=np.zeros(STATES), max_steps=20_000)
    status = np.asarray(sol.status)
    assert (status == rr.Status.STAGNATED).all(), np.unique(status, return_counts=True)
    lower, upper = np.asarray(sol.lower), np.asarray(sol.upper)
    assert ((lower <= value) & (value <= upper)).all()
    attainable = np.finfo(float).eps * size(cases.reward[:, None], index["beta"], value) / (1 - index["discount"])
    assert (np.abs(np.asarray(sol.value) - value).max(-1) <= 100 * attainable).all()
    with pytest.raises(rr.SolveError, match="STAGNATED"):
        sol.raise_if_failed()


def test_steps_differ_between_solvers():
    """Each does what its name says: on linked components Newton needs few steps, averaging many."""
    steps = {}
    for name in SOLVERS:
        _, index, _ = quick(name)
        lane = np.flatnonzero((index["alpha"] == 1) & (index["beta"] == 10))[0]
        steps[name] = int(solved(name).steps[NAMES.index("linked"), lane])
    assert max(steps["newton krylov"], steps["newton direct"]) <= 15, steps
    assert steps["value iteration"] > 4 * steps["policy iteration"] > 8 * steps["newton direct"], steps
    assert steps["anderson"] < steps["value iteration"] / 4, steps


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["krylov", "direct"])
def test_slow_discounts_and_stiff_alphas(linear):
    """The whole suite, up to 1 - 1e-6, to the default tolerance: a small multiple of what rounding allows."""
    cases, index, value, policy = suite()
    sol = solve(cases, index, rr.Newton(linear=linear))
    width = (np.asarray(sol.upper) - np.asarray(sol.lower)).max(-1)
    check(sol, value, 0.5 * width * (1 + 1e-9), linear)
    attainable = np.finfo(float).eps * size(cases.reward[:, None], index["beta"], value) / (1 - index["discount"])
    assert (width <= 1e3 * attainable).all(), (width / attainable).max()
    assert (np.asarray(sol.steps) <= 60).all()
    smooth = (index["alpha"] <= 2) & (index["beta"] <= 10) & (index["discount"] <= 0.999)
    np.testing.assert_allclose(np.asarray(sol.policy)[:, smooth], policy[:, smooth], atol=1e-6)


@pytest.mark.parametrize("name", ["newton krylov", "newton direct", "value iteration"])
def test_successor_lists(name):
    """Padded lists shared by the whole stack, to 1e-10 of the truth, hence of the dense answer."""
    cases, index, value = quick(name)
    sol = solve(cases, index, SOLVERS[name], kind="successors", tol=1e-10, max_steps=20_000)
    check(sol, value, 1e-10, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["newton krylov", "newton direct", "anderson"])
def test_matrix_free(name):
    """One problem at a time: the caller's function has no batch axes; lanes over regulariser and discount."""
    _, index, value = quick()
    for case, expected in zip(CASES, value, strict=True):
        reg = rr.alpha(alpha=index["alpha"], beta=index["beta"], prior=case.prior)
        sol = rr.solve(case.mdp(index["discount"], "matrix-free"), reg, SOLVERS[name], tol=1e-10, max_steps=20_000)
        check(sol, expected, 1e-10, f"{name} {case.name}")


@pytest.mark.parametrize(
    "solver",
    [None, rr.ModifiedPolicyIteration(steps=2), rr.Anderson(history=2), rr.Newton(forcing=1e-6, inner_steps=30)],
)
def test_options_and_no_batch_axes(solver):
    """One problem, no lanes: the shape that most people run, under the options the other tests leave alone."""
    case = CASES[1]
    value, policy = oracle.solve(case.P, case.reward, 0.95, 1.5, 2.0, case.prior)
    sol = rr.solve(case.mdp(0.95), rr.alpha(alpha=1.5, beta=2.0, prior=case.prior), solver, tol=1e-10)
    check(sol, value, 1e-10)
    assert sol.value.shape == sol.lower.shape == (STATES,) and sol.policy.shape == sol.q.shape == (STATES, ACTIONS)
    assert sol.status.shape == sol.objective.shape == sol.steps.shape == ()
    np.testing.assert_allclose(np.asarray(sol.policy), policy, atol=1e-8)


def test_the_solver_s_own_cap():
    case = linked()
    m, reg = case.mdp(0.999), rr.kl(beta=5.0, prior=case.prior)
    for cap in (3, 7):
        sol = rr.solve(m, reg, rr.ValueIteration(max_steps=cap), tol=1e-9)
        assert int(sol.steps) == cap and int(sol.status) == rr.Status.MAX_STEPS


def test_kl_and_fields_of_the_solution():
    """KL under the default solver; q, policy, perturbation and objective belong to the value."""
    cases = stack(CASES)
    index = lanes(beta=(1e-3, 1.0, 100.0, 1e4), discount=(0.0, 0.9, 0.99))
    value, policy = truth(cases, {**index, "alpha": np.ones(12)})
    m, _ = problem(cases, {**index, "alpha": np.ones(12)})
    sol = rr.solve(m, rr.kl(beta=index["beta"], prior=cases.prior[:, None]), tol=1e-10)
    check(sol, value, 1e-10)
    q = cases.reward[:, None] + index["discount"][:, None, None] * np.einsum("mxsat,mlt->mlsa", cases.P[:, None], value)
    live = np.broadcast_to(cases.prior[:, None] > 0, q.shape)
    np.testing.assert_allclose(np.asarray(sol.q)[live], q[live], atol=2e-10)
    dr = np.asarray(sol.perturbation)
    np.testing.assert_allclose(dr[live], (q - value[..., None])[live], atol=4e-10)
    assert (dr[~live] == 0).all() and np.isfinite(dr).all()
    assert (policy[live] < 1e-300).any(), "no probability underflows: the line above shows nothing"
    np.testing.assert_allclose(np.asarray(sol.policy), policy, atol=1e-5)
    np.testing.assert_allclose(np.asarray(sol.objective), (cases.initial[:, None] * value).sum(-1), atol=1e-10)
    assert np.asarray(sol.converged).all() and sol.converged.dtype == bool
    sol.raise_if_failed()


def test_very_different_lanes_together():
    """One batch from discount 0 to 1 - 1e-6 and from beta 1e-3 to 1e8."""
    cases = stack([linked(), CASES[0]])
    index = lanes(discount=(0.0, 0.5, 0.999, 1 - 1e-6), beta=(1e-3, 1.0, 1e4, 1e8), alpha=(1.0,))
    value, _ = truth(cases, index)
    sol = solve(cases, index, SOLVERS["newton krylov"])
    check(sol, value, 0.5 * (np.asarray(sol.upper) - np.asarray(sol.lower)).max(-1) * (1 + 1e-9))
    assert np.isfinite(np.asarray(sol.perturbation)).all()


def test_a_tolerance_per_lane():
    cases, index, value = quick("value iteration")
    tol = np.geomspace(1e-1, 1e-9, len(index["alpha"]))
    sol = solve(cases, index, SOLVERS["value iteration"], tol=tol, init=np.zeros(STATES), max_steps=20_000)
    check(sol, value, tol)
    np.testing.assert_allclose(np.asarray(sol.tol)[0], tol)
    assert (np.asarray(sol.upper) - np.asarray(sol.lower)).max() > 1e-3, "loose lanes did as much as strict ones"


def test_beta_limits():
    """beta to 0 gives the prior's value, beta to infinity the plain optimum within D_max / (beta (1 - g))."""
    case, discount = CASES[0], 0.9
    index = lanes(beta=(1e-6, 1e6), alpha=(-1.0, 0.5, 1.0, 2.0), discount=(discount,))
    sol = solve(stack([case]), index, SOLVERS["newton krylov"], tol=1e-7, init=np.zeros(STATES))
    weak, strong = np.asarray(sol.value)[0].reshape(2, 4, STATES)
    passive = oracle.evaluate(case.P, case.reward, discount, case.prior)
    np.testing.assert_allclose(weak, np.tile(passive, (4, 1)), atol=1e-4)
    plain = oracle.optimal_value(case.P, case.reward, discount)
    assert (strong <= plain + 1e-7).all()
    for alpha, value in zip((0.5, 1.0, 2.0), strong[1:], strict=True):
        vertex = oracle.deformed_log(alpha - 1, -np.log(case.prior.min())) / alpha
        assert (plain - value).max() <= vertex / (1e6 * (1 - discount)) + 2e-7


def test_known_values():
    """Ties cost nothing; an absorbing state of reward c is worth c / (1 - g); a sure end is worth its reward."""
    discount = 0.99
    index = lanes(alpha=ALPHAS, beta=(5.0,), discount=(discount,))
    sol = solve(stack(CASES), index, SOLVERS["newton krylov"], tol=1e-10, init=np.zeros(STATES))
    value, policy, dr, q = (np.asarray(x) for x in (sol.value, sol.policy, sol.perturbation, sol.q))
    tied, k = CASES[NAMES.index("ties")], NAMES.index("ties")
    plain = oracle.evaluate(tied.P, tied.reward, discount, tied.prior)
    np.testing.assert_allclose(value[k], np.tile(plain, (len(ALPHAS), 1)), atol=1e-10)
    np.testing.assert_allclose(policy[k], np.tile(tied.prior, (len(ALPHAS), 1, 1)), atol=1e-8)
    np.testing.assert_allclose(dr[k], 0, atol=1e-9)
    np.testing.assert_allclose(value[NAMES.index("absorbing"), :, 0], 0, atol=1e-10)
    np.testing.assert_allclose(value[NAMES.index("absorbing"), :, 5], 50, atol=1e-10)
    ends = CASES[NAMES.index("terminating")]
    over = np.broadcast_to(ends.termination == 1, q[0].shape)
    assert over.any()
    final = q[NAMES.index("terminating")][over]
    np.testing.assert_allclose(final, np.broadcast_to(ends.reward, q[0].shape)[over], atol=1e-12)


def test_state_scale_in_a_solve():
    cases, index, _ = quick()
    scale = np.linspace(0.5, 2.0, STATES)
    value, _ = truth(cases, {**index, "beta": index["beta"][:, None] * scale})
    m, reg = problem(cases, index, state_scale=scale)
    check(rr.solve(m, reg, tol=1e-9), value, 1e-9)


def test_defaults_of_the_factory():
    """No termination, no initial distribution, no prior: uniform, and the plain [S,A,S] array."""
    case = CASES[0]
    m = rr.mdp(case.P, case.reward, discount=0.9, layout="sas")
    value, _ = oracle.solve(case.P, case.reward, 0.9, 1.0, 5.0, np.full(4, 0.25))
    sol = rr.solve(m, rr.kl(beta=5.0), tol=1e-10)
    check(sol, value, 1e-10)
    np.testing.assert_allclose(float(sol.objective), value.mean(), atol=1e-10)


def test_monotone_and_convex():
    """V grows with the reward and with beta, and is convex in (reward, 1/beta)."""
    case = CASES[0]
    more = case.reward + np.random.default_rng(0).random(case.reward.shape)
    cases = stack([replace(case, reward=r) for r in (case.reward, more, (case.reward + more) / 2)])
    tau = np.concatenate([[1.0, 0.25, 0.625], np.geomspace(1e2, 1e-2, 9)])
    index = {"beta": 1 / tau, "alpha": np.full(12, 0.5), "discount": np.full(12, 0.95)}
    value = np.asarray(solve(cases, index, SOLVERS["newton krylov"], tol=1e-10, init=np.zeros(STATES)).value)
    assert (value[0] + 1e-9 < value[1]).all()
    assert (value[2, 2] <= (value[0, 0] + value[1, 1]) / 2 + 1e-9).all()
    ladder = value[0, 3:]
    assert (np.diff(ladder, axis=0) >= -1e-9).all() and ladder[-1].min() > ladder[0].min()
    # As it should, the same test tells concave from convex.
    assert (value[2, 2] < (value[0, 0] + value[1, 1]) / 2 - 1e-6).any()


def test_krylov_survives_an_exact_half_step():
    """One state whose episode may end: BiCGSTAB is done after half a step, with nothing left to divide by."""
    ends = np.array([[0.0, 0.3, 0.5, 0.1]])
    m = rr.mdp((1 - ends)[..., None], [[0.8, 1.0, 0.2, 0.3]], 0.99, termination=ends)
    np.testing.assert_allclose(rr.nominal_optimum(m), [80.0], rtol=1e-12)
    krylov, direct = (rr.solve(m, rr.kl(1e6), rr.Newton(linear=kind)) for kind in ("krylov", "direct"))
    assert bool(krylov.converged) and abs(float(krylov.value[0] - direct.value[0])) <= 1e-9
    ends = np.array([[0.01, 0.01]])
    m = rr.mdp(0.99 * np.ones((1, 2, 1)), [[1.0, 0.5]], 0.99, termination=ends)
    np.testing.assert_allclose(rr.evaluate(m, np.array([[0.5, 0.5]])), [0.75 / (1 - 0.99**2)], rtol=1e-12)


def test_a_start_far_away_ends_as_close_as_any():
    """What rounding says of the start is no reason to stop: without a tol, and with one."""
    m = rr.mdp(np.ones((1, 3, 1)), [[1.0, 2.0, 3.0]], 0.0)
    near = rr.solve(m, rr.kl(5.0))
    for init in (np.array([1e6]), np.array([1e12])):
        far = rr.solve(m, rr.kl(5.0), init=init)
        assert bool(far.converged) and float(far.gap) <= 10 * float(near.gap)
        assert bool(rr.solve(m, rr.kl(5.0), init=init, tol=1e-10).converged)
    chain = rr.problems.chain(discount=0.9)
    far = rr.solve(chain, rr.kl(5.0), init=np.full(6, 1e20))
    assert bool(far.converged) and float(far.gap) <= 1e-10


def test_closing_over_the_problem_is_no_slower():
    """Arrays that a caller's jit closes over are constants; the compiler must not lay them out in the loop."""
    m = rr.problems.slippery_grid(16, 0.99)
    closed = jax.jit(lambda beta: rr.solve(m, rr.kl(beta), tol=1e-6).value)
    text = closed.lower(1.0).compile().as_text()
    assert text is not None
    inner = text[: text.index("\nENTRY")] + text[text.index("\n}", text.index("\nENTRY")) :]
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* constant\(", inner)
    assert max((np.prod([int(n) for n in shape.split(",")]) for shape in shapes), default=0) < m.n_states * m.n_actions
