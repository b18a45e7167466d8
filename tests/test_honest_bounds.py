"""Bounds as tight as a problem allows, and a status that does not call an empty interval an answer."""

import dataclasses
from typing import Any

import jax
import numpy as np
import oracle
import pytest

import robustreg as rr
from robustreg.solvers import bound_problem

pytestmark = pytest.mark.slow

F = np.float32


def penalised(penalty, dtype, seed=0):
    """Eight states, three actions, the last of which nobody would take."""
    rng = np.random.default_rng(seed)
    P = rng.multinomial(64, np.full(8, 1 / 8), (8, 3)) / 64
    r = rng.integers(0, 65, (8, 3)) / 64
    r[:, 2] = penalty
    return P, r, rr.mdp(P.astype(dtype), r.astype(dtype), 0.99, layout="sas")


@pytest.mark.parametrize("reg", [rr.kl(F(2.0)), rr.alpha(F(1.5), F(2.0)), rr.alpha(F(3.0), F(2.0))])
def test_a_penalty_on_what_nobody_does(reg):
    """It costs next to nothing in the bounds, which still hold the truth, in solve, certify, evaluate and nominal."""
    P, r, m = penalised(-(2.0**20), F)
    sol, free = (
        rr.solve(m, reg),
        rr.solve(m, dataclasses.replace(reg, log_prior=np.log(np.array([0.5, 0.5, 1e-38], F)))),
    )
    order = float(getattr(reg, "alpha", 1.0))
    truth, _ = oracle.solve(P, r, 0.99, order, 2.0, np.full((8, 3), 1 / 3))
    for low, high in ((sol.lower, sol.upper), (lambda c: (c.lower, c.upper))(rr.certify(m, reg, sol))):
        assert (np.asarray(low) <= truth).all() and (truth <= np.asarray(high)).all()
        assert np.asarray(high - low).max() < 0.01, np.asarray(high - low).max()
    assert bool(sol.converged) and int(free.status) != rr.Status.NONFINITE
    optimum = oracle.solve(P[:, :2], r[:, :2], 0.99, 1.0, 1e9, np.full((8, 2), 0.5))[0]
    np.testing.assert_allclose(rr.nominal_optimum(m), optimum, rtol=1e-5)


def test_a_penalty_that_is_paid_counts_in_full():
    """A weak regulariser's policy takes it with some probability: its rounding is part of the value."""
    P, r, m = penalised(-(2.0**20), F)
    for reg, order in ((rr.kl(F(1e-6)), 1.0), (rr.alpha(F(-1.0), F(2.0)), -1.0)):
        sol = rr.solve(m, reg)
        truth, _ = oracle.solve(P, r, 0.99, order, float(reg.beta), np.full((8, 3), 1 / 3))
        assert (np.asarray(sol.lower) <= truth).all() and (truth <= np.asarray(sol.upper)).all()


def corridor(n, g, dtype: Any = np.float64):
    """n steps to the end, whatever one does."""
    P, r, ends = np.zeros((n, 2, n)), np.full((n, 2), -1.0), np.zeros((n, 2))
    P[np.arange(n - 1), :, np.arange(1, n)] = 1
    ends[-1] = 1
    r[:, 1] -= 0.5
    return rr.mdp(P.astype(dtype), r.astype(dtype), g, termination=ends)


def test_episodes_that_end_count_by_their_length():
    """At a discount of 1 - 1e-12 twenty steps are certified to 1e-9; the values are those of the finite sum."""
    for dtype, width in ((np.float64, 1e-9), (F, 1e-2)):
        g = 1 - 1e-12 if dtype == np.float64 else 1 - 1e-6
        m = corridor(20, g, dtype)
        reg = rr.kl(dtype(1.0))
        step = np.log(0.5 * (np.exp(-1.0) + np.exp(-1.5)))
        truth = step * np.arange(20, 0, -1)
        sol = rr.solve(m, reg).raise_if_failed()
        assert float(sol.gap) <= width, float(sol.gap)
        proof = rr.certify(m, reg, sol)
        assert float(proof.gap.max()) <= width
        slack = 400 * (1 - g)
        for low, high in ((sol.lower, sol.upper), (proof.lower, proof.upper)):
            assert (np.asarray(low) - slack <= truth).all() and (truth <= np.asarray(high) + slack).all()


def test_an_episode_that_may_go_on_for_ever_counts_for_ever():
    """If any action that the prior allows avoids the end, the bound is 1/(1-g); if the prior forbids it, it is not."""
    P, ends = np.zeros((2, 2, 2)), np.array([[0.0, 0.0], [1.0, 0.0]])
    P[0, :, 1], P[1, 1, 0] = 1, 1
    m = rr.mdp(P, np.zeros((2, 2)), 1 - 1e-9, termination=ends, layout="sas")
    horizon = lambda reg: float(bound_problem.bind(m, reg).horizon)  # noqa: E731
    assert horizon(rr.kl(1.0)) >= 0.99e9
    assert horizon(rr.kl(1.0, prior=np.array([1.0, 0.0]))) <= 5
    # Geometric endings: the expected length is 1/p.
    slow = rr.mdp(np.full((1, 1, 1), 0.99), np.zeros((1, 1)), 1 - 1e-9, termination=np.full((1, 1), 0.01))
    assert 99 <= float(bound_problem.bind(slow, rr.kl(1.0)).horizon) <= 250
    # Several lanes, each by its own mask and discount.
    many = bound_problem.bind(m, rr.kl(np.ones(2), prior=np.array([[[0.5, 0.5]], [[1.0, 0.0]]]))).horizon
    assert many.shape == (2,) and many[0] >= 0.99e9 and many[1] <= 5


def test_the_horizon_is_a_supersolution():
    """Against the exact longest expected time, by policy iteration on random problems that end."""
    rng = np.random.default_rng(0)
    for seed in range(6):
        n, g = 8, 1 - 1e-5
        ends = np.random.default_rng(seed).choice([0.05, 0.3, 1.0], (n, 2))
        P = rng.dirichlet(np.ones(n), (n, 2)) * (1 - ends)[..., None]
        m = rr.mdp(P, np.zeros((n, 2)), g, termination=ends)
        w = np.ones(n)
        for _ in range(5000):
            w = 1 + g * (P @ w).max(-1)
        found = float(bound_problem.bind(m, rr.kl(1.0)).horizon)
        assert w.max() <= found <= 3 * w.max()


def test_an_empty_interval_is_no_answer():
    """Without tol a lane is CONVERGED only if its interval says something of the value; with tol it is asked for."""
    # Five problems that never meet: their differences are not forgotten.
    P = np.repeat(np.eye(5, dtype=F)[:, None], 2, axis=1)
    r = np.random.default_rng(0).normal(size=(5, 2)).astype(F)
    m, reg = rr.mdp(P, r, 1 - 1e-6, layout="sas"), rr.kl(F(1.0))
    sol = rr.solve(m, reg)
    size = np.abs(np.asarray(sol.value)).max()
    assert float(sol.gap) > 0.5 * size and int(sol.status) == rr.Status.STAGNATED
    with pytest.raises(rr.SolveError, match="STAGNATED"):
        sol.raise_if_failed()
    assert bool(rr.solve(m, reg, tol=float(sol.gap)).converged)
    # A value of zero with certainty is one.
    zero = rr.solve(rr.mdp(P, np.zeros((5, 2), F), 0.9, layout="sas"), reg)
    assert bool(zero.converged) and np.abs(np.asarray(zero.value)).max() < 1e-3


def test_strict_bounds_are_wider_where_sums_are_long():
    """And the same where they are not; certify takes the argument too."""
    for n, longer in ((8, False), (300, True)):
        rng = np.random.default_rng(n)
        m = rr.mdp(rng.dirichlet(np.ones(n), (n, 2)), rng.normal(size=(n, 2)), 0.9, layout="sas")
        reg = rr.kl(2.0)
        plain, strict = rr.solve(m, reg), rr.solve(m, reg, strict=True)
        proofs = rr.certify(m, reg, plain), rr.certify(m, reg, plain, strict=True)
        wider = [
            float(strict.gap) > 1.5 * float(plain.gap),
            float(proofs[1].rounding) > 1.5 * float(proofs[0].rounding),
        ]
        assert wider == [longer, longer]
        assert bool(strict.converged)


def test_programs_without_terminations_pay_nothing_for_them():
    """No loop for the length of episodes where none ends."""
    m = rr.problems.garnet(8, 2, 2)
    text = jax.jit(lambda b: rr.solve(m, rr.kl(b)).value).lower(1.0).as_text()
    ended = dataclasses.replace(m, termination=np.zeros((8, 2)))
    longer = jax.jit(lambda b: rr.solve(ended, rr.kl(b)).value).lower(1.0).as_text()
    assert longer.count("while") == text.count("while") + 1
