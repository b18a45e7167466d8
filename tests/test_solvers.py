"""Fixed points: every solver, transition kind and regulariser agrees with the oracle within its own certificate."""

import jax
import numpy as np
import oracle
import pytest
from cases import ALPHAS, KINDS, STATES, Case, all_cases, lanes, linked, size, stack, suite

import robustreg as rr

CASES = all_cases()
SOLVERS = {
    "automatic": None,
    "value iteration": rr.ValueIteration(),
    "policy iteration 10": rr.ModifiedPolicyIteration(steps=10),
    "policy iteration 2": rr.ModifiedPolicyIteration(steps=2),
    "newton krylov": rr.Newton(linear="krylov"),
    "newton direct": rr.Newton(linear="direct"),
    "anderson 5": rr.Anderson(history=5),
    "anderson 2": rr.Anderson(history=2),
}
# Methods that only average take 1/(1 - discount) sweeps where a problem does not mix.
PATIENT = ("automatic", "newton krylov", "newton direct")

solve = rr.solve


def stacked_mdp(cases: Case, discount, P=None):
    """All cases at once, [M,1] against lanes [L]."""
    return rr.mdp(
        rr.Dense(cases.P[:, None]) if P is None else P,
        cases.reward[:, None],
        discount,
        initial=cases.initial[:, None],
        termination=cases.termination[:, None],
    )


def check(sol, value, tol, where=""):
    """Converged, bounds that hold the truth and are as tight as promised, a midpoint within tol."""
    status = np.asarray(sol.status)
    lower, upper, answer = (np.asarray(x) for x in (sol.lower, sol.upper, sol.value))
    tol = np.broadcast_to(tol, status.shape)[..., None]
    assert (status == rr.Status.CONVERGED).all(), (where, np.argwhere(status != 0)[:5], status[status != 0][:5])
    assert (lower <= value).all() and (value <= upper).all(), (
        where,
        np.argwhere((lower > value) | (value > upper))[:5],
    )
    assert (upper - lower <= 2 * tol * (1 + 1e-12)).all(), where
    assert (np.abs(answer - value) <= tol).all(), where
    assert (lower <= answer).all() and (answer <= upper).all(), where


@pytest.fixture(scope="module")
def quick():
    """A subset that value iteration can do too: discounts up to .99, alpha from -1 to 3."""
    cases, index, value, _ = suite()
    keep = (index["discount"] <= 0.99) & np.isin(index["alpha"], (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0))
    return cases, {k: v[keep] for k, v in index.items()}, value[:, keep]


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_matches_the_oracle(name, quick):
    cases, index, value = quick
    reg = rr.alpha(alpha=index["alpha"], beta=index["beta"], prior=cases.prior[:, None])
    sol = solve(stacked_mdp(cases, index["discount"]), reg, SOLVERS[name], tol=1e-8, max_steps=20_000)
    check(sol, value, 1e-8, name)


@pytest.mark.parametrize("name", PATIENT)
def test_slow_discounts_and_stiff_alphas(name):
    """The whole suite, up to 1 - 1e-6, to the default tolerance: a small multiple of what rounding allows."""
    cases, index, value, policy = suite()
    reg = rr.alpha(alpha=index["alpha"], beta=index["beta"], prior=cases.prior[:, None])
    sol = solve(stacked_mdp(cases, index["discount"]), reg, SOLVERS[name])
    tol = np.asarray(sol.tol)
    check(sol, value, tol, name)
    attainable = np.finfo(float).eps * size(cases.reward[:, None], index["beta"], value) / (1 - index["discount"])
    assert (tol <= 1e3 * attainable).all(), (tol / attainable).max()
    assert (np.asarray(sol.steps) <= 60).all()
    smooth = (index["alpha"] <= 2) & (index["beta"] <= 10) & (index["discount"] <= 0.9999)
    np.testing.assert_allclose(np.asarray(sol.policy)[:, smooth], policy[:, smooth], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_transitions(kind):
    """One problem at a time, lanes over the regulariser only, to 1e-10."""
    _, index, value, _ = suite()
    keep = (index["discount"] <= 0.99) & (np.abs(index["alpha"]) <= 3)
    index = {k: v[keep] for k, v in index.items()}
    for case, expected in zip(CASES, value[:, keep], strict=True):
        reg = rr.alpha(alpha=index["alpha"], beta=index["beta"], prior=case.prior)
        sol = solve(case.mdp(index["discount"], kind), reg, tol=1e-10)
        check(sol, expected, 1e-10, f"{kind} {case.name}")


@pytest.mark.parametrize("name", ["automatic", "value iteration", "newton krylov", "newton direct", "anderson 5"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_other_kinds_under_every_solver(kind, name):
    """One lane, no batch axes at all: the shape that most people run."""
    case = CASES[1]
    value, policy = oracle.solve(case.P, case.reward, 0.95, 1.5, 2.0, case.prior)
    sol = solve(case.mdp(0.95, kind), rr.alpha(alpha=1.5, beta=2.0, prior=case.prior), SOLVERS[name], tol=1e-9)
    check(sol, value, 1e-9, f"{kind} {name}")
    assert sol.value.shape == (STATES,) and sol.status.shape == () and sol.objective.shape == ()
    np.testing.assert_allclose(np.asarray(sol.policy), policy, atol=1e-8)


def test_kl_and_fields_of_the_solution():
    """KL under the default solver; q, policy, perturbation and objective belong to the value."""
    cases = stack(CASES)
    index = lanes(beta=(1e-3, 1.0, 100.0, 1e4), discount=(0.0, 0.9, 0.99))
    value, policy = oracle.solve(
        cases.P[:, None], cases.reward[:, None], index["discount"], np.ones(12), index["beta"], cases.prior[:, None]
    )
    m = stacked_mdp(cases, index["discount"])
    reg = rr.kl(beta=index["beta"], prior=cases.prior[:, None])
    sol = solve(m, reg, tol=1e-10)
    check(sol, value, 1e-10)
    q = cases.reward[:, None] + index["discount"][:, None, None] * np.einsum("mxsat,mlt->mlsa", cases.P[:, None], value)
    live = np.broadcast_to(cases.prior[:, None] > 0, q.shape)
    np.testing.assert_allclose(np.asarray(sol.q)[live], q[live], atol=2e-10)
    np.testing.assert_allclose(np.asarray(sol.perturbation)[live], (q - value[..., None])[live], atol=4e-10)
    assert (np.asarray(sol.perturbation)[~live] == 0).all()
    assert np.isfinite(np.asarray(sol.perturbation)).all()
    np.testing.assert_allclose(np.asarray(sol.policy), policy, atol=1e-5)
    np.testing.assert_allclose(np.asarray(sol.objective), (cases.initial[:, None] * value).sum(-1), atol=1e-10)
    assert np.asarray(sol.converged).all() and sol.converged.dtype == bool
    sol.raise_if_failed()


@pytest.mark.parametrize("name", SOLVERS)
def test_discount_zero_is_one_step(name):
    case = CASES[0]
    expected, policy = oracle.best_response(1.5, 3.0, case.prior, case.reward)
    sol = solve(case.mdp(0.0), rr.alpha(alpha=1.5, beta=3.0, prior=case.prior), SOLVERS[name], tol=1e-13)
    check(sol, expected, 1e-13, name)
    assert int(sol.steps) <= 2
    np.testing.assert_allclose(np.asarray(sol.policy), policy, atol=1e-13)


def test_very_different_lanes_together():
    """One batch from discount 0 to 1 - 1e-6 and from beta 1e-3 to 1e8."""
    case = linked()
    index = lanes(discount=(0.0, 0.5, 0.999, 1 - 1e-6), beta=(1e-3, 1.0, 1e4, 1e8))
    value, _ = oracle.solve(case.P, case.reward, index["discount"], np.ones(16), index["beta"], case.prior)
    sol = solve(case.mdp(index["discount"]), rr.kl(beta=index["beta"], prior=case.prior))
    check(sol, value, np.asarray(sol.tol))
    assert np.isfinite(np.asarray(sol.perturbation)).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_warm_start(name):
    """From the answer nothing is left to do; from far away the answer is the same."""
    case = CASES[0]
    reg = rr.alpha(alpha=0.5, beta=5.0, prior=case.prior)
    m = case.mdp(0.97)
    value, _ = oracle.solve(case.P, case.reward, 0.97, 0.5, 5.0, case.prior)
    cold = solve(m, reg, SOLVERS[name], tol=1e-8, init=np.zeros(STATES))
    warm = solve(m, reg, SOLVERS[name], tol=1e-8, init=value)
    far = solve(m, reg, SOLVERS[name], tol=1e-8, init=1e3 * np.random.default_rng(0).normal(size=STATES))
    for sol in (cold, warm, far):
        check(sol, value, 1e-8, name)
    assert int(warm.steps) <= 1 < int(cold.steps)


def test_steps_differ_between_solvers():
    """Each solver does what its name says: Newton needs few steps on linked components, averaging many."""
    case = linked()
    m, reg = case.mdp(0.999), rr.kl(beta=5.0, prior=case.prior)
    steps = {name: int(solve(m, reg, solver, tol=1e-6, max_steps=50_000).steps) for name, solver in SOLVERS.items()}
    assert max(steps["newton krylov"], steps["newton direct"], steps["automatic"]) <= 15, steps
    assert steps["value iteration"] > 4 * steps["policy iteration 10"] > 8 * steps["newton direct"], steps
    assert steps["value iteration"] > 2 * steps["policy iteration 2"] > steps["policy iteration 10"], steps
    assert steps["anderson 5"] < steps["value iteration"], steps


@pytest.mark.parametrize("name", SOLVERS)
def test_max_steps(name):
    """The cap is reported as such; the bounds hold all the same, and the failure names the lanes."""
    case = linked()
    value, _ = oracle.solve(case.P, case.reward, 0.9999, 1.5, 5.0, case.prior)
    sol = solve(case.mdp(0.9999), rr.alpha(alpha=1.5, beta=5.0, prior=case.prior), SOLVERS[name], tol=1e-6, max_steps=2)
    assert int(sol.status) == rr.Status.MAX_STEPS and int(sol.steps) == 2
    assert not bool(sol.converged)
    assert (np.asarray(sol.lower) <= value).all() and (value <= np.asarray(sol.upper)).all()
    assert np.asarray(sol.upper - sol.lower).max() > 2e-6
    with pytest.raises(rr.SolveError, match="MAX_STEPS"):
        sol.raise_if_failed()


@pytest.mark.parametrize("name", SOLVERS)
def test_unreachable_tolerance_stagnates(name):
    case = CASES[0]
    value, _ = oracle.solve(case.P, case.reward, 0.99, 1.5, 5.0, case.prior)
    sol = solve(
        case.mdp(0.99), rr.alpha(alpha=1.5, beta=5.0, prior=case.prior), SOLVERS[name], tol=1e-30, max_steps=20_000
    )
    assert int(sol.status) == rr.Status.STAGNATED, rr.Status(int(sol.status))
    assert int(sol.steps) < 2_000
    assert (np.asarray(sol.lower) <= value).all() and (value <= np.asarray(sol.upper)).all()
    np.testing.assert_allclose(np.asarray(sol.value), value, atol=1e-10)
    with pytest.raises(rr.SolveError, match="STAGNATED"):
        sol.raise_if_failed()


def test_beta_limits():
    """beta to 0 gives the prior's value, beta to infinity the plain optimum within D_max / (beta (1 - g))."""
    case, discount = CASES[0], 0.9
    betas = np.array([1e-6, 1e6])
    for alpha in (-1.0, 0.5, 1.0, 2.0):
        sol = solve(case.mdp(discount), rr.alpha(alpha=alpha, beta=betas, prior=case.prior), tol=1e-8)
        value = np.asarray(sol.value)
        np.testing.assert_allclose(value[0], oracle.evaluate(case.P, case.reward, discount, case.prior), atol=1e-4)
        plain = oracle.optimal_value(case.P, case.reward, discount)
        assert (value[1] <= plain + 1e-8).all()
        if alpha > 0:
            vertex = oracle.deformed_log(alpha - 1, -np.log(case.prior.min())) / alpha
            assert (plain - value[1]).max() <= vertex / (betas[1] * (1 - discount)) + 1e-8


def test_known_values():
    """Ties cost nothing; an absorbing state of reward c is worth c / (1 - g); a sure end is worth its reward."""
    names = [c.name for c in CASES]
    case, discount = CASES[names.index("ties")], 0.99
    sol = solve(case.mdp(discount), rr.alpha(alpha=np.array(ALPHAS), beta=5.0, prior=case.prior))
    plain = oracle.evaluate(case.P, case.reward, discount, case.prior)
    np.testing.assert_allclose(np.asarray(sol.value), np.tile(plain, (15, 1)), atol=1e-10)
    np.testing.assert_allclose(np.asarray(sol.policy), np.tile(case.prior, (15, 1, 1)), atol=1e-8)
    np.testing.assert_allclose(np.asarray(sol.perturbation), 0, atol=1e-9)
    case = CASES[names.index("absorbing")]
    sol = solve(case.mdp(discount), rr.alpha(alpha=np.array(ALPHAS), beta=5.0, prior=case.prior))
    np.testing.assert_allclose(np.asarray(sol.value)[:, 0], 0, atol=1e-9)
    np.testing.assert_allclose(np.asarray(sol.value)[:, 5], 50, atol=1e-9)
    case = CASES[names.index("terminating")]
    sol = solve(case.mdp(discount), rr.alpha(alpha=np.array(ALPHAS), beta=5.0, prior=case.prior))
    q = np.asarray(sol.q)
    over = np.broadcast_to(case.termination == 1, q.shape)
    assert over.any()
    np.testing.assert_allclose(q[over], np.broadcast_to(case.reward, q.shape)[over], atol=1e-12)


def test_state_scale_in_a_solve():
    case = CASES[0]
    scale = np.linspace(0.5, 2.0, STATES)
    value, _ = oracle.solve(case.P, case.reward, np.array(0.97), 1.5, 3.0 * scale, case.prior)
    sol = solve(case.mdp(0.97), rr.alpha(alpha=1.5, beta=3.0, prior=case.prior, state_scale=scale), tol=1e-10)
    check(sol, value, 1e-10)


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
    rng = np.random.default_rng(0)
    more = case.reward + rng.random(case.reward.shape)
    tau = np.array([1.0, 0.25, 0.625])
    rewards = np.stack([case.reward, more, (case.reward + more) / 2])
    m = rr.mdp(rr.Dense(case.P), rewards, 0.95, layout=None)
    value = np.asarray(solve(m, rr.alpha(alpha=1.5, beta=1 / tau, prior=case.prior), tol=1e-10).value)
    assert (value[0] + 1e-9 < value[1]).all()
    assert (value[2] <= (value[0] + value[1]) / 2 + 1e-9).all()
    betas = np.geomspace(1e-2, 1e2, 9)
    ladder = np.asarray(solve(case.mdp(0.95), rr.alpha(alpha=0.5, beta=betas, prior=case.prior), tol=1e-10).value)
    assert (np.diff(ladder, axis=0) >= -1e-9).all() and ladder[-1].min() > ladder[0].min()
