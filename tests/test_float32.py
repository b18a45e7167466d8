"""In single precision the certified interval still holds the value computed in double precision.

The problems are short binary fractions, so that the float32 problem is the float64 problem; only the arithmetic
differs. The truth comes from the oracle.
"""

import jax
import numpy as np
import oracle
import pytest
from cases import ACTIONS, STATES, Case, all_cases, garnet, lanes, random_reward, random_row, size, stack

import robustreg as rr

EPS = np.finfo(np.float32).eps
DISCOUNTS = (0.9, 0.99, 0.999, 0.9999)
solve = rr.solve


def random_cases(count):
    """Garnets of every branching and reward offset: an offset makes |V| large, which is what rounding feeds on."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        prior = np.stack([random_row(rng, ACTIONS, 256) for _ in range(STATES)])
        reward = random_reward(rng, (STATES, ACTIONS)) * rng.choice([1 / 8, 1, 8]) + rng.choice([0, 1, -16])
        ends = rng.choice([0.0, 0.0, 0.0, 0.125], (STATES, ACTIONS)) * (i % 3 == 0)
        P = garnet(1000 + i, branching=int(rng.integers(2, 6))) * (1 - ends)[..., None]
        out.append(Case(f"random {i}", P, reward, ends, np.full(STATES, 1 / 16) + np.eye(STATES)[0] / 4, prior))
    return out


@pytest.fixture(scope="module")
def problems():
    """25 problems x 20 regularisers and discounts = 500 solves, and their float64 truth."""
    cases = stack(random_cases(16) + all_cases())
    rng = np.random.default_rng(1)
    index = lanes(alpha=(-1.0, 0.5, 1.0, 1.5, 3.0), discount=DISCOUNTS)
    beta = np.float32(10.0 ** rng.uniform(-2, 3, (len(cases.P), index["alpha"].size)))
    value, policy = oracle.solve(
        cases.P[:, None],
        cases.reward[:, None],
        index["discount"],
        index["alpha"],
        beta.astype(float),
        cases.prior[:, None],
    )
    return cases, index, beta, value, policy


def run(problems, solver=None, **kw):
    cases, index, beta, _, _ = problems
    f = np.float32
    m = rr.mdp(
        rr.Dense(cases.P[:, None].astype(f)),
        cases.reward[:, None].astype(f),
        index["discount"],
        initial=cases.initial[:, None].astype(f),
        termination=cases.termination[:, None].astype(f),
    )
    reg = rr.alpha(alpha=index["alpha"].astype(f), beta=beta, prior=cases.prior[:, None].astype(f))
    return m, reg, solve(m, reg, solver, **kw)


def enclosed(lower, upper, value):
    return (np.asarray(lower, float) <= value) & (value <= np.asarray(upper, float))


@pytest.mark.parametrize("solver", [None, rr.Newton(linear="direct")], ids=["automatic", "newton direct"])
def test_interval_contains_the_double_precision_value(problems, solver):
    cases, index, beta, value, policy = problems
    m, reg, sol = run(problems, solver)
    for name in ("value", "q", "policy", "perturbation", "lower", "upper", "objective"):
        assert getattr(sol, name).dtype == np.float32, name
    inside = enclosed(sol.lower, sol.upper, value)
    assert inside.all(), (np.argwhere(~inside)[:5], (~inside).sum())
    # Not by being vacuous: a modest multiple of eps |V| / (1 - g).
    width = (np.asarray(sol.upper, float) - np.asarray(sol.lower, float)).max(-1)
    attainable = EPS * size(cases.reward[:, None], beta, value) / (1 - index["discount"])
    assert (width <= 200 * attainable).all(), (width / attainable).max()
    assert np.median(width / attainable) <= 60
    assert np.asarray(sol.converged).all(), np.unique(np.asarray(sol.status), return_counts=True)
    error = np.abs(np.asarray(sol.value, float) - value).max(-1)
    assert (error <= 0.5 * width * (1 + 1e-6)).all()

    certificate = rr.certify(m, reg, sol)
    inside = enclosed(certificate.lower, certificate.upper, value)
    assert inside.all(), (np.argwhere(~inside)[:5], (~inside).sum())
    assert certificate.lower.dtype == np.float32


def test_interval_holds_wherever_the_solver_stops(problems):
    """Too few steps, or a tolerance out of reach: the status says so, the interval is right all the same."""
    *_, value, _ = problems
    for kw in ({"max_steps": 1}, {"max_steps": 3}, {"tol": 1e-30}):
        _, _, sol = run(problems, rr.ValueIteration(), **{"max_steps": 2000, **kw})
        assert not np.asarray(sol.converged).any()
        inside = enclosed(sol.lower, sol.upper, value)
        assert inside.all(), (kw, np.argwhere(~inside)[:5], (~inside).sum())


def test_stagnated_value_iteration():
    """The textbook failure: the residual is exactly 0 in float32 and the value is off in the fourth digit."""
    case = all_cases()[8]
    reward = (case.reward / 3 + 0.7).astype(np.float32)
    m = rr.mdp(rr.Dense(case.P.astype(np.float32)), reward, 0.99)
    reg = rr.kl(beta=np.float32(5.0))
    truth, _ = oracle.solve(case.P, reward.astype(float), 0.99, 1.0, 5.0, np.full(ACTIONS, 0.25))
    sol = solve(m, reg, rr.ValueIteration(), tol=1e-30, max_steps=20_000)
    assert int(sol.status) == rr.Status.STAGNATED
    assert enclosed(sol.lower, sol.upper, truth).all()


def test_discount_is_not_rounded_to_float32():
    """0.9999 in float32 is 0.99989998...: the value would move by 1e-5 of itself, ten times float32's resolution."""
    case = all_cases()[8]
    discount = 0.9999
    rounded = float(np.float32(discount))
    truth, _ = oracle.solve(case.P, case.reward, discount, 1.0, 5.0, case.prior)
    wrong, _ = oracle.solve(case.P, case.reward, rounded, 1.0, 5.0, case.prior)
    m = case.mdp(discount, dtype=np.float32)
    assert m.complement.dtype == np.float32
    np.testing.assert_allclose(float(m.complement), 1e-4, rtol=1e-7)
    sol = solve(m, rr.kl(beta=np.float32(5.0), prior=case.prior.astype(np.float32)))
    value = np.asarray(sol.value, float)
    assert np.abs(wrong - truth).max() > 10 * np.abs(value - truth).max()


def test_dtype_follows_the_inputs():
    """A Python number adopts the problem's dtype, whatever jax_enable_x64 says; every solver stays in it."""
    case = all_cases()[0]
    m = case.mdp(0.9, dtype=np.float32)
    assert m.dtype == np.float32 and m.reward.dtype == np.float32
    reg = rr.alpha(alpha=np.float32(1.5), beta=np.float32(2.0), prior=case.prior.astype(np.float32))
    truth, _ = oracle.solve(case.P, case.reward, 0.9, 1.5, 2.0, case.prior)
    for solver in (
        rr.ValueIteration(),
        rr.ModifiedPolicyIteration(steps=5),
        rr.Newton(linear="krylov"),
        rr.Anderson(history=5),
    ):
        sol = solve(m, reg, solver, tol=1e-4)
        sol.raise_if_failed()
        assert sol.value.dtype == sol.lower.dtype == sol.policy.dtype == np.float32
        assert enclosed(sol.lower, sol.upper, truth).all()
        assert (np.abs(np.asarray(sol.value, float) - truth) <= 1e-4).all()


def test_tools_in_float32():
    """worst_case, slack, evaluate and occupancy keep the dtype and a float32's worth of digits."""
    case = all_cases()[0]
    f = np.float32
    policy = case.prior[:, ::-1].copy()
    m, reg = case.mdp(0.9, dtype=f), rr.alpha(alpha=f(1.5), beta=f(2.0), prior=case.prior.astype(f))
    for got, expected in (
        (rr.worst_case(reg, policy.astype(f)), oracle.worst_case(1.5, 2.0, case.prior, policy)),
        (rr.evaluate(m, policy.astype(f)), oracle.evaluate(case.P, case.reward, 0.9, policy)),
        (rr.occupancy(m, policy.astype(f)), oracle.occupancy(case.P, case.initial, 0.9, policy)),
        (rr.slack(reg, case.reward.astype(f)), -oracle.conjugate(1.5, 2.0, case.prior, case.reward)),
    ):
        assert got.dtype == np.float32
        np.testing.assert_allclose(np.asarray(got), expected, rtol=3e-5, atol=3e-5)
