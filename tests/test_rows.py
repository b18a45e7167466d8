"""Rows of P that do not sum to `1 - termination` are noticed inside jit, where no factory can look at them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr
from robustreg.solvers import bound_problem

S, A = 6, 2
REG = rr.kl(2.0)


def rows(seed=0):
    """Short binary fractions, `[S, A, S]`: they sum to one exactly."""
    counts = np.random.default_rng(seed).multinomial(64, np.full(S, 1 / S), (S, A))
    return counts / 64


def reward(seed=1):
    return np.random.default_rng(seed).normal(size=(S, A))


def fixed_point(P, r, g, beta=2.0):
    """The value of the problem as it is written, by plain soft value iteration."""
    v = np.zeros(S)
    for _ in range(int(60 / (1 - g))):
        q = r + g * P @ v
        v = q.max(-1) + np.log(np.mean(np.exp(beta * (q - q.max(-1, keepdims=True))), -1)) / beta
    return v


def expect(v, p):
    return p @ v


def kernel(kind, P):
    if kind == "dense":
        return rr.Dense(P)
    if kind == "successors":
        return rr.Successors(jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (S, A, S)), P)
    return rr.MatrixFree(expect, n_states=S, n_actions=A, parameters=P)


def build(kind, P, r, g, dtype: Any = np.float64):
    """Inside jit or by the class itself: nobody checks."""
    g, complement, initial = (jnp.asarray(x, dtype) for x in (g, 1 - g, np.full(S, 1 / S)))
    return rr.MDP(kernel(kind, jnp.asarray(P, dtype)), jnp.asarray(r, dtype), g, complement, initial)


@functools.cache
def program(kind):
    """Solve, certify, and everything else of a fixed policy, as one function of P and the reward, inside jit."""

    @jax.jit
    def run(P, r):
        m = build(kind, P, r, 0.9)
        policy = jnp.full((S, A), 0.5)
        sol = rr.solve(m, REG)
        proof = rr.certify(m, REG, sol)
        fixed = rr.evaluate(m, policy), rr.evaluate(m, policy, REG), rr.occupancy(m, policy), rr.nominal_optimum(m)
        return sol, proof, fixed

    return run


@pytest.mark.parametrize("kind", ["dense", "successors", "matrix free"])
def test_what_is_no_probability_is_refused(kind):
    """Everywhere, and for the reason that it is the input; a proper problem of the same program is not."""

    def run(P):
        sol, proof, fixed = program(kind)(P, reward())
        return sol.status, sol.value, (*fixed, proof.lower, proof.upper)

    status, value, others = run(rows())
    assert int(status) == rr.Status.CONVERGED and all(np.isfinite(x).all() for x in (value, *others))
    np.testing.assert_allclose(value, fixed_point(rows(), reward(), 0.9), atol=1e-9)
    negative = rows()
    negative[2, 1, :2] += [-0.5, 0.5]
    bad = [0.99 * rows(), 0.9 * rows(), 2 * rows(), 1.01 * rows(), np.where(np.arange(S) == 0, np.nan, rows())]
    bad += [negative] if kind != "matrix free" else []  # a function shows no single probability
    for P in bad:
        status, value, others = run(P)
        assert int(status) == rr.Status.NONFINITE_INPUT
        for x in (value, *others):
            assert np.isnan(x).all()


@pytest.mark.parametrize("kind", ["dense", "successors", "matrix free"])
@pytest.mark.parametrize("missing", [1e-9, 1e-6, 1e-4, -1e-4])
def test_small_deviations_widen_the_bounds(kind, missing):
    """By what they cost: the interval holds the value of the problem as it is written, and is wider for it."""
    P = rows() * (1 - missing)
    sol, proof, _ = program(kind)(P, 5 + reward())
    before, *_ = program(kind)(rows(), 5 + reward())
    truth = fixed_point(P, 5 + reward(), 0.9)
    for low, high in ((sol.lower, sol.upper), (proof.lower, proof.upper)):
        assert (low <= truth).all() and (truth <= high).all()
        # Not by being vacuous: a small multiple of what the deviation moves the value by.
        assert (high - low).max() <= 20 * np.abs(truth - np.asarray(before.value)).max()
    assert float(sol.gap) > 1e3 * float(before.gap)


def test_a_deviation_that_the_discount_does_not_allow():
    """At .9999 a row of 1.0001 does not contract any more."""
    m = build("dense", rows() * (1 + 1e-4), reward(), 0.9999)
    assert int(rr.solve(m, REG).status) == rr.Status.NONFINITE_INPUT


def test_a_softmax_in_half_precision():
    """What a network in bfloat16 makes of logits: refused or in bounds, never certified and wrong."""
    logits = np.random.default_rng(3).normal(size=(S, A, S)) * 3
    P = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.bfloat16)).astype(jnp.float32))
    run = jax.jit(lambda P, g: rr.solve(build("dense", P, 1 + reward(), g, np.float32), REG))
    for g in (0.9, 0.99):
        sol = run(P, g)
        truth = fixed_point(P.astype(float), 1 + reward(), g)
        if bool(sol.converged):
            assert (np.asarray(sol.lower) <= truth).all() and (truth <= np.asarray(sol.upper)).all()
        else:
            assert int(sol.status) == rr.Status.NONFINITE_INPUT


def test_one_bad_lane_leaves_the_others_alone():
    P = np.stack([rows(0), 0.99 * rows(1), rows(2)])
    m = build("dense", P, reward(), 0.9)
    sol = rr.solve(m, REG)
    assert [int(x) for x in sol.status] == [0, rr.Status.NONFINITE_INPUT, 0]
    alone = rr.solve(build("dense", rows(2), reward(), 0.9), REG)
    np.testing.assert_allclose(sol.value[2], alone.value, atol=1e-12)
    table = rr.sweep(build("dense", 0.99 * rows(), reward(), 0.9), REG, {"beta": [1.0, 2.0]})
    assert (table["status"] == rr.Status.NONFINITE_INPUT).all()
    game = rr.solve_game(build("dense", 0.99 * rows(), reward(), 0.9), REG, steps=2)
    assert int(game.status) == rr.Status.NONFINITE_INPUT and np.isnan(game.primal)


def test_termination_is_part_of_the_sum():
    """Rows that sum to `1 - termination` are proper, one that ends with a probability above 1 is not."""
    ends = np.random.default_rng(5).choice([0.0, 0.25, 1.0], (S, A))
    P = rows() * (1 - ends)[..., None]
    m = dataclasses.replace(build("dense", P, reward(), 0.99), termination=jnp.asarray(ends))
    assert bool(rr.solve(m, REG).converged)
    for wrong in (ends + 0.01, np.full((S, A), 1.5), -np.ones((S, A))):
        bad = dataclasses.replace(m, termination=jnp.asarray(wrong))
        assert int(rr.solve(bad, REG).status) == rr.Status.NONFINITE_INPUT
    # Without it, rows that sum to less are a mistake.
    assert int(rr.solve(build("dense", P, reward(), 0.99), REG).status) == rr.Status.NONFINITE_INPUT


def test_rounding_is_no_deviation():
    """Rows normalised in double precision and stored in float32 miss 1 by rounding: the bounds are as tight as ever."""
    rng = np.random.default_rng(7)
    deviation = jax.jit(lambda m: bound_problem.bind(m, REG).deviation)
    for n in (3, 50, 400):
        P = rng.dirichlet(np.full(n, 0.3), (n, 2))
        m = rr.mdp(P.astype(np.float32) / 1, rng.normal(size=(n, 2)).astype(np.float32), 0.9, normalise=True)
        assert float(deviation(m)) == 0
        unnormalised = dataclasses.replace(m, transitions=rr.Dense(jnp.asarray(P.astype(np.float32))))
        assert float(deviation(unnormalised)) == 0
        wrong = dataclasses.replace(m, transitions=rr.Dense(jnp.asarray((1.001 * P).astype(np.float32))))
        assert float(deviation(wrong)) > 5e-4
