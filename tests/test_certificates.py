"""Certificates hold for anything, are tight for solutions, and do not pass what has been tampered with."""

import dataclasses
import json

import numpy as np
import pytest
from cases import STATES, garnet_case, problem, select, size, suite

import robustreg as rr

FIELDS = ("lower", "upper", "gap", "indifference", "slack", "consistency")


@pytest.fixture(scope="module")
def whole():
    """A third of the suite, solved to the default tolerance and certified."""
    cases, index, value, _ = suite()
    # Per beta and discount four kinds of alpha: 24 lanes.
    keep = np.isin(index["alpha"], (-1.0, 0.5, 1.5, 3.0))
    index, value = select(index, keep), value[:, keep]
    m, reg = problem(cases, index)
    sol = rr.solve(m, reg)
    sol.raise_if_failed()
    return sol, rr.certify(m, reg, sol), index, value


def arrays(certificate):
    return {name: np.asarray(getattr(certificate, name)) for name in FIELDS}


def test_contains_the_oracle_value(whole):
    _, certificate, _, value = whole
    c = arrays(certificate)
    assert (c["lower"] <= value).all() and (value <= c["upper"]).all()


def test_solutions_pass(whole):
    """Small residuals on every count, per state, relative to what the rounding of the value itself allows."""
    certificate, index, value = whole[1:]
    c = arrays(certificate)
    noise = np.finfo(float).eps * size(0 * value[..., None] + 1, index["beta"], value) / (1 - index["discount"])
    for name in FIELDS:
        assert c[name].shape == value.shape, name
        assert np.isfinite(c[name]).all(), name
    np.testing.assert_array_equal(c["gap"], c["upper"] - c["lower"])
    for name in ("gap", "consistency"):
        assert (c[name] >= 0).all()
        assert (c[name] <= 100 * noise[..., None]).all(), (name, (c[name] / noise[..., None]).max())
    ordinary = (index["discount"] <= 0.99) & (index["beta"] <= 10)
    scale = (1 + 1 / index["beta"])[:, None]
    assert (c["indifference"] / scale)[:, ordinary].max() <= 1e-8
    assert (np.abs(c["slack"]) / scale)[:, ordinary].max() <= 1e-9
    certificate.raise_if_loose(100 * float(noise.max()))


@pytest.fixture(scope="module")
def small():
    case = garnet_case(0)
    index = np.array([0.5, 1.0, 1.5, 3.0])
    m, reg = case.mdp(0.97), rr.alpha(alpha=index, beta=np.full(4, 5.0), prior=case.prior)
    sol = rr.solve(m, reg, tol=1e-10)
    sol.raise_if_failed()
    rr.certify(m, reg, sol).raise_if_loose(1e-9)
    return m, reg, sol


def bump(x, size, where=0):
    out = np.array(x)
    out[(slice(None), where)] += size
    return out


@pytest.mark.parametrize("size", [1e-3, -1e-3])
def test_a_tampered_value_is_flagged_and_still_enclosed(small, size):
    m, reg, sol = small
    wrong = dataclasses.replace(sol, value=bump(sol.value, size))
    certificate = rr.certify(m, reg, wrong)
    with pytest.raises(rr.SolveError):
        certificate.raise_if_loose(1e-6)
    truth = np.asarray(sol.value)
    assert (np.asarray(certificate.lower) <= truth + 1e-10).all() and (
        truth <= np.asarray(certificate.upper) + 1e-10
    ).all()
    assert (np.asarray(certificate.upper) - np.asarray(certificate.lower)).max() > 1e-4


def test_a_tampered_policy_is_flagged(small):
    m, reg, sol = small
    policy = np.array(sol.policy)
    policy[:, 2] = 0.5 * policy[:, 2] + 0.5 * policy[:, 2, ::-1]
    wrong = dataclasses.replace(sol, policy=policy)
    certificate = rr.certify(m, reg, wrong)
    with pytest.raises(rr.SolveError):
        certificate.raise_if_loose(1e-6)
    assert np.asarray(certificate.gap).max() > 1e-5


@pytest.mark.parametrize("size", [1e-3, -1e-3])
def test_a_tampered_perturbation_is_flagged(small, size):
    m, reg, sol = small
    wrong = dataclasses.replace(sol, perturbation=bump(sol.perturbation, size, 3))
    certificate = rr.certify(m, reg, wrong)
    with pytest.raises(rr.SolveError):
        certificate.raise_if_loose(1e-6)
    slack = np.asarray(certificate.slack)
    np.testing.assert_allclose(slack[:, 3], -size, atol=1e-8)
    np.testing.assert_allclose(np.delete(slack, 3, 1), 0, atol=1e-8)
    assert np.abs(np.asarray(certificate.consistency)).max() > 1e-5


def test_another_problem_s_solution_is_flagged(small):
    """Certificates look at the problem they are given, not at what the solution says of itself."""
    m, reg, sol = small
    other = garnet_case(5).mdp(0.97)
    certificate = rr.certify(other, reg, sol)
    with pytest.raises(rr.SolveError):
        certificate.raise_if_loose(1e-2)
    truth = np.asarray(rr.solve(other, reg, tol=1e-10).value)
    assert (np.asarray(certificate.lower) <= truth).all() and (truth <= np.asarray(certificate.upper)).all()


def test_not_a_number_is_flagged(small):
    m, reg, sol = small
    value = np.array(sol.value)
    value[1, 0] = np.nan
    with pytest.raises(rr.SolveError):
        rr.certify(m, reg, dataclasses.replace(sol, value=value)).raise_if_loose(1e3)


def test_single_lane_shapes():
    case = garnet_case(0)
    m, reg = case.mdp(0.9), rr.kl(beta=2.0, prior=case.prior)
    certificate = rr.certify(m, reg, rr.solve(m, reg, tol=1e-9))
    for name in FIELDS:
        assert getattr(certificate, name).shape == (STATES,), name
    certificate.raise_if_loose(1e-8)
    with pytest.raises(rr.SolveError):
        certificate.raise_if_loose(1e-16)


def test_files_from_before_the_storage_of_perturbations(whole, tmp_path):
    """A certificate written without it makes no allowance for it."""
    path = rr.save(tmp_path / "proof", whole[1])
    held = dict(np.load(path))
    header = json.loads(str(held["header"]))
    del header["robustreg"]["object"]["fields"]["storage"], held["storage"]
    np.savez(path, **{**held, "header": np.array(json.dumps(header))})
    old = rr.load(path)
    assert (np.asarray(old.storage) == 0).all() and (old.gap == whole[1].gap).all()


@pytest.mark.parametrize("bad", [-np.inf, np.nan])
@pytest.mark.parametrize("ball", [None, (0.01, np.inf, "sa", "exact"), (0.001, 2, "s", "kappa")])
def test_a_reward_that_nobody_can_earn_is_never_looked_at(bad, ball):
    """Of an action with a prior of 0: the same proof as with any other number there, with uncertain transitions too."""
    m, prior = rr.problems.garnets(1, 6, 3, 3, discount=0.9, seed=0), np.full((6, 3), 1 / 3)
    prior[2] = [0.5, 0.5, 0]
    reg, ambiguity = rr.kl(2.0, prior), ball and rr.TransitionBall(*ball)
    proofs = []
    for number in (0.0, bad):
        reward = m.reward.at[..., 2, 2].set(number)
        one = dataclasses.replace(m, reward=reward)
        sol = rr.solve(one, reg, tol=1e-8, ambiguity=ambiguity).raise_if_failed()
        proofs.append(rr.certify(one, reg, sol, ambiguity=ambiguity))
    for name in ("lower", "upper", "indifference", "slack", "consistency"):
        with_number, without = (np.asarray(getattr(proof, name)) for proof in proofs)
        np.testing.assert_allclose(without, with_number, rtol=1e-12, atol=1e-15, err_msg=name)
