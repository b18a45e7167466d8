"""The one-step layer on arrays of a user's own, actions last: float32 against float64, layouts against each other.

Truth is the oracle's bisection in double precision, of the numbers that the layer was given in single.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import robustreg as rr
from robustreg import _tree, regularisers

EPS = float(np.finfo(np.float32).eps)


def draw(rows, actions, seed=0, spread=3.0):
    """Values and log-priors of rows, `[rows, actions]` float32, and a beta of each row."""
    rng = np.random.default_rng(seed)
    q = (spread * rng.normal(size=(rows, actions))).astype(np.float32)
    logits = rng.normal(size=(rows, actions))
    log_prior = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    return q, log_prior, rng.uniform(0.2, 2, rows).astype(np.float32)


def prior_of(log_prior):
    """What a stored log-prior stands for, float64: divided by its sum."""
    prior = np.exp(np.asarray(log_prior, float))
    return prior / prior.sum(-1, keepdims=True)


def family(alpha, *args, **kw) -> Any:
    """KL, or alpha of an order."""
    return rr.kl(*args, **kw) if alpha is None else rr.alpha(np.float32(alpha), *args, **kw)


def per_row(alpha, beta, log_prior):
    """A regulariser with a beta and a prior of each row of `[rows, A]`: rows are states."""
    return family(alpha, np.float32(1), log_prior=log_prior, state_scale=beta)


FAMILIES = (None, -1.0, 0.0, 0.5, 0.999, 1.0, 1.001, 1.5, 1.7, 2.0, 3.0)


@pytest.mark.parametrize("alpha", FAMILIES)
@pytest.mark.parametrize("shape", [(7, 2), (5, 64), (3, 1000)])
def test_rows_match_the_oracle(alpha, shape):
    """Beta and prior of each row, float32: value, policy, and cost."""
    q, log_prior, beta = draw(*shape)
    reg, order = per_row(alpha, beta, log_prior), 1.0 if alpha is None else float(np.float32(alpha))
    value, policy = oracle.best_response(order, beta.astype(float), prior_of(log_prior), q.astype(float))
    size = np.abs(q).max(-1) + 1 / beta
    logs = 2 + np.abs(log_prior).max()
    got = np.asarray(reg.conjugate(q))
    assert got.dtype == np.float32
    assert (np.abs(got - value) / size).max() <= 8 * EPS
    chosen = np.asarray(reg.argmax(q))
    # What rounding of the exponents, which are log p0 and beta times a gap, does to a probability.
    noise = logs + beta * np.ptp(q, -1)
    # For alpha > 2 the policy has slopes without bound at the edge of its support; its value has not.
    if order <= 2:
        assert (np.abs(chosen - policy).max(-1) / noise).max() <= 8 * EPS
    primal = (chosen.astype(float) * q).sum(-1)
    cost = oracle.divergence(np.full(shape[0], order), prior_of(log_prior), chosen.astype(float)) / beta
    assert (np.abs(primal - cost - value) / (size * logs)).max() <= 8 * EPS
    assert np.abs(chosen.sum(-1) - 1).max() <= 4 * EPS


@pytest.mark.parametrize("alpha", [None, -1.0, 0.5, 1.5, 1.7, 2.0, 3.0])
def test_layouts_agree(alpha):
    """The layer's kernels, actions last, and the solver's, actions leading: one definition, in values and slopes."""
    rng = np.random.default_rng(1)
    q, prior = 3 * rng.normal(size=(6, 9)), rng.dirichlet(np.ones(9), 6)
    prior[2, 3], q[3, 5] = 0.0, q[3].max()
    prior /= prior.sum(-1, keepdims=True)
    beta = rng.uniform(0.2, 2, 6)
    reg: Any = rr.kl(1.0, prior, state_scale=beta)
    reg = reg if alpha is None else rr.alpha(alpha, 1.0, prior, state_scale=beta)
    direction = rng.normal(size=q.shape)
    leaves = jax.tree.map(lambda x: jnp.asarray(1e-1 * rng.normal(size=x.shape)), reg)
    leaves = dataclasses.replace(leaves, log_prior=jnp.where(prior > 0, leaves.log_prior, 0))

    def solver(reg, q):
        bound = reg.bind(0, q.dtype, q.shape[-1])
        value, policy = regularisers.maximise(bound, q.T)
        return value, policy.T, bound._value(policy), bound._worst_case(policy).T

    def layer(reg, q):
        policy = reg.argmax(q)
        return reg.conjugate(q), policy, reg.value(policy), reg.worst_case(policy)

    for got, expected in zip(*(jax.jvp(f, (reg, q), (leaves, direction)) for f in (layer, solver)), strict=True):
        for x, y in zip(got, expected, strict=True):
            keep = np.isfinite(np.asarray(y))
            np.testing.assert_array_equal(np.isfinite(np.asarray(x)), keep)
            np.testing.assert_allclose(np.asarray(x)[keep], np.asarray(y)[keep], rtol=1e-10, atol=1e-11)
    bound, x = reg._public(jnp.asarray(q), reduce=_tree.LAST)
    assert x.shape == q.shape and bound.log_prior.shape == q.shape and bound.reduce is _tree.LAST


def test_kl_derivatives_are_softmax_s():
    """`p (g - <p, g>)` backwards, its own transpose, and the same once more; one number stands for no prior."""
    q, log_prior, beta = draw(4, 50)
    rng = np.random.default_rng(2)
    g, direction = rng.normal(size=(2, *q.shape)).astype(np.float32)
    for reg, logs in ((per_row(None, beta, log_prior), log_prior), (rr.kl(np.float32(1), state_scale=beta), 0.0)):
        policy = (reg.argmax, lambda q, logs=logs: jax.nn.softmax(logs + beta[:, None] * q, axis=-1))
        value = (reg.conjugate, lambda q, logs=logs: jax.nn.logsumexp(logs + beta[:, None] * q, axis=-1) / beta)
        for pair, ct in ((policy, g), (value, g[:, 0])):
            first = [pulled(f, ct) for f in pair]
            np.testing.assert_allclose(*(f(q) for f in first), atol=8 * EPS)
            np.testing.assert_allclose(*(jax.jvp(f, (q,), (direction,))[1] for f in first), atol=32 * EPS)
            np.testing.assert_allclose(*(pulled(f, direction)(q) for f in first), atol=32 * EPS)


def pulled(f, ct):
    """The vector-Jacobian product of a function as a function."""
    return lambda q: jax.vjp(f, q)[1](ct)[0]


def test_kl_moves_what_softmax_moves():
    """No transposition, no kernel more than a few: bytes accessed and scratch memory, in units of the input."""
    q = np.zeros((8, 128000), np.float32)
    g = jnp.ones_like(q)
    reg = rr.kl(np.float32(0.5))
    for f, most in (
        (reg.argmax, 4),
        (lambda q: jax.vjp(reg.argmax, q)[1](g)[0], 4),
        (jax.grad(lambda q: reg.conjugate(q).sum()), 4),
    ):
        compiled = jax.jit(f).lower(q).compile()
        assert not re.search(r"[\]}] transpose\(", str(compiled.as_text()))
        memory: Any = compiled.memory_analysis()
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= most * q.nbytes
