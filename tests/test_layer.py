"""The one-step layer on arrays of a user's own, actions last: float32 against float64, layouts against each other.

Truth is the oracle's bisection in double precision, of the numbers that the layer was given in single.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import robustreg as rr
from robustreg._core import pytrees
from robustreg.regularisers import bound as kernels

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


@jax.jit
def both_layouts(at, along):
    """Values and derivatives of the layer's kernels, and of the solver's."""

    def solver(reg, q):
        bound = reg.bind(0, q.dtype, q.shape[-1])
        value, policy = kernels.maximise(bound, q.T)
        return value, policy.T, bound.value(policy), bound.worst_case(policy).T

    def layer(reg, q):
        policy = reg.argmax(q)
        return reg.conjugate(q), policy, reg.value(policy), reg.worst_case(policy)

    return [jax.jvp(f, at, along) for f in (layer, solver)]


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
    leaves = jax.tree.map(lambda x: 1e-1 * rng.normal(size=x.shape), reg)
    leaves = dataclasses.replace(leaves, log_prior=np.where(prior > 0, leaves.log_prior, 0))
    for got, expected in zip(*both_layouts((reg, q), (leaves, direction)), strict=True):
        for x, y in zip(got, expected, strict=True):
            keep = np.isfinite(np.asarray(y))
            np.testing.assert_array_equal(np.isfinite(np.asarray(x)), keep)
            np.testing.assert_allclose(np.asarray(x)[keep], np.asarray(y)[keep], rtol=1e-10, atol=1e-11)
    bound, x = reg._public(jnp.asarray(q), reduce=pytrees.LAST)
    assert x.shape == q.shape and bound.log_prior.shape == q.shape and bound.reduce is pytrees.LAST


def test_kl_derivatives_are_softmax_s():
    """`p (g - <p, g>)` backwards, its own transpose, and the same once more; one number stands for no prior."""
    q, log_prior, beta = draw(4, 50)
    rng = np.random.default_rng(2)
    g, direction = rng.normal(size=(2, *q.shape)).astype(np.float32)
    for reg, logs in ((per_row(None, beta, log_prior), log_prior), (rr.kl(np.float32(1), state_scale=beta), 0.0)):
        policy = (reg.argmax, lambda q, logs=logs: jax.nn.softmax(logs + beta[:, None] * q, axis=-1))
        value = (reg.conjugate, lambda q, logs=logs: jax.nn.logsumexp(logs + beta[:, None] * q, axis=-1) / beta)
        for pair, ct in ((policy, g), (value, g[:, 0])):
            for got, wanted, units in zip(*(slopes(f, ct, q, direction) for f in pair), (8, 32, 32), strict=True):
                np.testing.assert_allclose(got, wanted, atol=units * EPS)


def slopes(f, ct, q, direction):
    """The vector-Jacobian product of a function, and derivatives of that in both modes; one program."""

    def pulled(f, ct):
        return lambda q: jax.vjp(f, q)[1](ct)[0]

    def all_three(q, ct, direction):
        first = pulled(f, ct)
        return first(q), jax.jvp(first, (q,), (direction,))[1], pulled(first, direction)(q)

    return jax.jit(all_three)(q, ct, direction)


def test_kl_moves_what_softmax_moves():
    """No transposition, no kernel more than a few: bytes accessed and scratch memory, in units of the input."""
    q = np.zeros((8, 128000), np.float32)
    g = jnp.ones_like(q)
    reg = rr.kl(np.float32(0.5))
    prior, beta = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), q.shape, q.dtype)), jnp.full(8, 0.5, q.dtype)
    own = rr.kl(np.float32(1), log_prior=prior, state_scale=beta)
    for f, most in (
        (reg.argmax, 4),
        (lambda q: jax.vjp(reg.argmax, q)[1](g)[0], 4),
        (jax.grad(lambda q: reg.conjugate(q).sum()), 4),
        (jax.value_and_grad(lambda q: own.conjugate(q).sum()), 4.01),
    ):
        compiled = jax.jit(f).lower(q).compile()
        assert not re.search(r"[\]}] transpose\(", str(compiled.as_text()))
        memory: Any = compiled.memory_analysis()
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= most * q.nbytes


HARD = {
    "tiny priors": lambda q, p: (q, np.where(np.arange(q.shape[-1]) % 3 == 0, 1e-12, p)),
    "the best has a tiny prior": lambda q, p: (q, np.where(q == q.max(-1, keepdims=True), 1e-12, p)),
    "masks": lambda q, p: (q, np.where(np.arange(q.shape[-1]) % 2 == 0, 0, p)),
    "ties": lambda q, p: (np.round(q), p),
    "all alike": lambda q, p: (np.zeros_like(q) + 3, p),
    "one allowed": lambda q, p: (q, np.where(np.arange(q.shape[-1]) == 5, 1, 0) * np.ones_like(p)),
    "range 1e8": lambda q, p: (1e8 / 6 * q, p),
    "range 1e-6": lambda q, p: (1e-6 * q, p),
    "an offset": lambda q, p: (q + 1e4, p),
}


@pytest.mark.parametrize(
    "alpha", [None, -3.0, -1e-3, 0.0, 1e-3, 0.5, 0.9, 0.9999, 1.0001, 1.2, 1.5, 1.7, 2.0, 3.0, 6.0]
)
def test_hard_rows(alpha):
    """Float32: value and policy attain the maximum, of every hard kind of row, alone and beside the others."""
    q, log_prior, _ = draw(4, 40, seed=3)
    cases = [make(q, np.exp(log_prior)) for make in HARD.values()]
    q = np.stack([x for x, _ in cases]).astype(np.float32)
    prior = np.stack([p / p.sum(-1, keepdims=True) for _, p in cases])
    with np.errstate(divide="ignore"):
        reg = family(alpha, np.float32(1), log_prior=np.log(prior).astype(np.float32))
    order = 1.0 if alpha is None else float(np.float32(alpha))
    exact = prior_of(reg.log_prior)
    value, _ = oracle.best_response(order, 1.0, exact, q.astype(float))
    got, policy = np.asarray(reg.conjugate(q)), np.asarray(reg.argmax(q)).astype(float)
    logs = 2 - np.log(np.where(exact > 0, exact, 1)).min(-1)
    size = np.where(exact > 0, np.abs(q), 0).max(-1) + np.minimum(1, np.ptp(q, -1))
    assert (np.abs(got - value) / (size * logs)).max() <= 4 * EPS
    assert (policy[exact == 0] == 0).all() and np.abs(policy.sum(-1) - 1).max() <= 8 * EPS
    # A policy that underflows has no divergence to compare where alpha <= 0.
    policy /= policy.sum(-1, keepdims=True)
    kept = ((policy > 0) | (exact == 0)).all(-1) | (order > 0)
    cost = oracle.divergence(np.full(value.shape, order), exact, policy)
    primal = (policy * np.where(exact > 0, q, 0)).sum(-1) - cost
    assert (np.abs(primal - value) / (size * logs))[kept].max() <= 4 * EPS


@jax.jit
def answers(reg, x, g):
    """Policy and value of rows, the vector-Jacobian product of each, and a worst case of KL."""
    policy, pull = jax.vjp(reg.argmax, x)
    value, slope = jax.vjp(reg.conjugate, x)
    logs = jax.nn.log_softmax(x.astype(jnp.float32)).astype(x.dtype)
    worst = reg.worst_case(log_policy=logs) if isinstance(reg, rr.KL) else value
    return policy, pull(g)[0], value, slope(g[:, 0])[0], worst


@pytest.mark.parametrize("alpha", [None, 0.5, 1.5, 1.7, 2.0])
def test_bfloat16_is_the_rounded_float32_answer(alpha):
    """Computed in float32 and rounded once: within a unit in the last place, derivatives too."""
    q, log_prior, beta = draw(5, 300, seed=4)
    reg = per_row(alpha, beta, log_prior)
    half = jnp.asarray(q, jnp.bfloat16)
    g = jnp.asarray(np.random.default_rng(5).normal(size=q.shape), jnp.bfloat16)

    found, exact = answers(reg, half, g), answers(reg, half.astype(jnp.float32), g.astype(jnp.float32))
    for x, y in zip(found[:4], exact[:4], strict=True):
        assert x.dtype == jnp.bfloat16 and y.dtype == jnp.float32
        x, y = np.asarray(x.astype(jnp.float32)), np.asarray(y)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(y), 1e-30))) - 7)
        assert (np.abs(x - y) <= unit + 1e-30).all()


def test_an_order_of_each_row():
    """One alpha per row as per call: the general form and the products agree."""
    q, log_prior, _ = draw(4, 30, seed=6)
    orders = np.array([2.0, 1.5, 0.5, 1.0], np.float32)
    together = rr.alpha(orders, np.float32(0.7), log_prior=log_prior[:, None])
    for i, order in enumerate(orders):
        alone = rr.alpha(order, np.float32(0.7), log_prior=log_prior[i])
        row = q[:, None][i]
        np.testing.assert_allclose(together.argmax(q[:, None])[i], alone.argmax(row), atol=16 * EPS)
        np.testing.assert_allclose(together.conjugate(q[:, None])[i], alone.conjugate(row), atol=16 * EPS)


def test_few_turns_settle_every_row():
    """Rounding does not keep a row from settling: two to four turns and the last pass for alpha <= 2, whatever A."""
    from robustreg.regularisers import layer

    @jax.jit
    def turns(reg, q):
        found, search = [], layer._search

        def counted(*args):
            end, policy = search(*args)
            found.append(end.count)
            return end, policy

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "_search", counted)
            bound, x = reg._public(q, reduce=pytrees.LAST)
            bound.maximiser(x)
        return found[-1]

    for rows, actions in ((2000, 8), (64, 1000), (2, 100_000)):
        q = draw(rows, actions, seed=7)[0]
        for order in (0.5, 1.2, 1.5, 1.7, 2.0):
            assert 0 < int(turns(rr.alpha(np.float32(order), np.float32(0.5)), q)) <= 5, (rows, actions, order)


@pytest.mark.parametrize("order", [1.5, 1.7, 2.0])
def test_large_rows_need_little_memory(order):
    """At A = 128,000: scratch space and results of a policy, a value and their derivatives, in units of the logits."""
    q = np.zeros((8, 128000), np.float32)
    reg = rr.alpha(np.float32(order), np.float32(0.5))

    def both(f: Any, q: Any) -> Any:
        y, pull = jax.vjp(f, q)
        return y, pull(jnp.ones_like(y))[0]

    for f in (reg.argmax, reg.conjugate):
        for g in (f, lambda q, f=f: both(f, q)[1], lambda q, f=f: both(f, q)):
            memory: Any = jax.jit(g).lower(q).compile().memory_analysis()
            assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 4.1 * q.nbytes


def test_the_benchmark_runs(tmp_path):
    """In its small size: every row is there, and what it compares agrees."""
    script = Path(__file__).parent.parent / "benchmarks" / "layer.py"
    line = [sys.executable, str(script), "--shapes", "4x32", "--repeats", "1", "--json", str(tmp_path / "rows")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(text) for text in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) == 8 and all(row["error"] <= 1e-5 for row in rows)


@pytest.mark.parametrize("alpha", [None, -3.0, 1.5, 1.7, 3.0])
def test_a_row_is_alone(alpha):
    """What stands in another row (NaN, numbers that overflow every product) changes no bit of this one."""
    q, log_prior, _ = draw(6, 30, seed=8)
    reg = family(alpha, np.float32(1), log_prior=log_prior)
    for trouble in (np.nan, np.float32(3e37), -np.inf):
        other = q.copy()
        other[2, 4] = trouble
        for f in (reg.conjugate, reg.argmax):
            np.testing.assert_array_equal(np.delete(f(other), 2, 0), np.delete(f(q), 2, 0))
