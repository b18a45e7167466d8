"""In single precision the certified interval still holds the value computed in double precision.

The problems are short binary fractions, so that the float32 problem is the float64 problem; only the arithmetic
differs. The truth comes from the oracle.
"""

import numpy as np
import oracle
import pytest
from cases import (
    ACTIONS,
    STATES,
    Case,
    all_cases,
    dense,
    garnet,
    lanes,
    problem,
    random_reward,
    random_row,
    size,
    stack,
)

import robustreg as rr

F = np.float32
EPS = np.finfo(F).eps
SOLVERS = {
    "newton krylov": rr.Newton(linear="krylov"),
    "newton direct": rr.Newton(linear="direct"),
    "policy iteration": rr.ModifiedPolicyIteration(steps=20),
    "anderson": rr.Anderson(history=5),
    "value iteration": rr.ValueIteration(),
}


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
    """25 problems x 20 lanes, beta drawn for each of the 500, in float32; and their float64 truth."""
    cases = stack(random_cases(16) + all_cases())
    index = lanes(alpha=(-1.0, 0.5, 1.0, 1.5, 3.0), discount=(0.9, 0.99, 0.999, 0.9999))
    beta = (10.0 ** np.random.default_rng(1).uniform(-2, 3, (len(cases.P), index["alpha"].size))).astype(F)
    index = {**index, "beta": beta}
    value, _ = oracle.solve(
        cases.P[:, None],
        cases.reward[:, None],
        np.broadcast_to(index["discount"], beta.shape),
        np.broadcast_to(index["alpha"], beta.shape),
        beta.astype(float),
        cases.prior[:, None],
    )
    attainable = EPS * size(cases.reward[:, None], beta, value) / (1 - index["discount"])
    return *problem(cases, index, dtype=F), value, attainable


def assert_encloses(lower, upper, value):
    """Every state of every lane; the bounds are compared as the numbers they are."""
    outside = ~((np.asarray(lower, float) <= value) & (value <= np.asarray(upper, float)))
    assert not outside.any(), (outside.sum(), np.argwhere(outside)[:5])


@pytest.mark.parametrize("name", SOLVERS)
def test_interval_contains_the_double_precision_value(name, problems):
    """Whether the lane converges or, like plain averaging at .9999, is stopped: the interval is right."""
    m, reg, value, attainable = problems
    assert m.dtype == F
    sol = rr.solve(m, reg, SOLVERS[name], max_steps=60)
    for field in ("value", "q", "policy", "perturbation", "lower", "upper", "objective"):
        assert getattr(sol, field).dtype == F, field
    assert_encloses(sol.lower, sol.upper, value)
    converged = np.asarray(sol.converged)
    if name.startswith("newton"):
        assert converged.all(), np.unique(np.asarray(sol.status), return_counts=True)
        # Not by being vacuous: a modest multiple of eps (|V| + |r| + 1/beta) / (1 - g).
        width = (np.asarray(sol.upper, float) - np.asarray(sol.lower, float)).max(-1)
        assert (width <= 200 * attainable).all(), (width / attainable).max()
        assert np.median(width / attainable) <= 60
        # The value is the middle, up to its own last bit.
        error = np.abs(np.asarray(sol.value, float) - value).max(-1)
        assert (error <= 0.5 * width + EPS * np.abs(value).max(-1)).all()
        certificate = rr.certify(m, reg, sol)
        assert certificate.lower.dtype == F
        assert_encloses(certificate.lower, certificate.upper, value)
    else:
        assert 0 < converged.mean() < 1


def test_interval_holds_wherever_the_solver_stops(problems):
    """A handful of steps, or a tolerance out of reach: the status says so, the interval is right all the same."""
    m, reg, value, _ = problems
    for cap in (1, 2, 5):
        sol = rr.solve(m, reg, SOLVERS["value iteration"], max_steps=cap)
        assert (np.asarray(sol.status) == rr.Status.MAX_STEPS).mean() > 0.5
        assert_encloses(sol.lower, sol.upper, value)
    sol = rr.solve(m, reg, SOLVERS["newton direct"], tol=1e-30)
    assert (np.asarray(sol.status) == rr.Status.STAGNATED).all(), np.unique(np.asarray(sol.status), return_counts=True)
    assert_encloses(sol.lower, sol.upper, value)


def test_stagnated_value_iteration():
    """The textbook failure: the residual of a bandit vanishes in float32 long before the value is right."""
    case = all_cases()[8]
    reward = (case.reward / 3 + 0.7).astype(F)
    m = rr.mdp(dense(case.P, F), reward, 0.99)
    reg = rr.kl(beta=F(5.0), prior=case.prior.astype(F))
    truth, _ = oracle.solve(case.P, reward.astype(float), 0.99, 1.0, 5.0, case.prior)
    sol = rr.solve(m, reg, rr.ValueIteration(), tol=1e-30, max_steps=20_000)
    assert int(sol.status) == rr.Status.STAGNATED
    assert_encloses(sol.lower, sol.upper, truth)
    assert np.asarray(sol.upper - sol.lower).max() < 0.5


def test_discount_is_not_rounded_to_float32():
    """1 - 0.9999 is off by 5e-4 of itself once the discount is rounded to float32: the complement is kept apart."""
    case = all_cases()[0]
    for discount in (0.9999, np.float64(0.9999)):
        m = case.mdp(discount, dtype=F)
        assert m.dtype == m.complement.dtype == F
        np.testing.assert_allclose(float(m.complement), 1 - 0.9999, rtol=1e-7)
    truth, rounded = (oracle.solve(case.P, case.reward, g, 1.0, 5.0, case.prior)[0] for g in (0.9999, float(F(0.9999))))
    sol = rr.solve(case.mdp(0.9999, dtype=F), rr.kl(beta=F(5.0), prior=case.prior.astype(F)))
    # A mixing problem: V = h + c with small h, so the answer is nearly as good as float32 can write it down.
    assert np.abs(np.asarray(sol.value, float) - truth).max() < 0.1 * np.abs(rounded - truth).max()


def test_tools_in_float32():
    """worst_case, slack, evaluate and occupancy keep the dtype and a float32's worth of digits."""
    case = all_cases()[0]
    policy = case.prior[:, ::-1].copy()
    m, reg = case.mdp(0.9, dtype=F), rr.alpha(alpha=F(1.5), beta=F(2.0), prior=case.prior.astype(F))
    for got, expected in (
        (rr.worst_case(reg, policy.astype(F)), oracle.worst_case(1.5, 2.0, case.prior, policy)),
        (rr.evaluate(m, policy.astype(F)), oracle.evaluate(case.P, case.reward, 0.9, policy)),
        (rr.occupancy(m, policy.astype(F)), oracle.occupancy(case.P, case.initial, 0.9, policy)),
        (rr.slack(reg, case.reward.astype(F)), -oracle.conjugate(1.5, 2.0, case.prior, case.reward)),
    ):
        assert got.dtype == F
        np.testing.assert_allclose(np.asarray(got), expected, rtol=3e-5, atol=3e-5)
