"""One trace and one compilation for any beta, alpha, discount, tolerance, reward and starting point."""

import chex
import jax
import numpy as np
import pytest
from cases import KINDS, STATES, garnet_case

import robustreg as rr

CASE = garnet_case(0)
COMPILATIONS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration_secs, **kwargs: COMPILATIONS.append(event) if "backend_compile" in event else None
)

# Everything that people pass for a number; the last ones are weakly typed in JAX.
NUMBERS = (2.0, 3, np.float64(4.0), np.array(5.0), jax.numpy.array(6.0), jax.numpy.asarray(7.0) * 1)
DISCOUNTS = (0.5, 0.9, np.float64(0.95), np.array(0.8), 0.99, 0.0)


@pytest.fixture(autouse=True)
def fresh_counter():
    """chex counts traces per function name, over the whole process."""
    chex.clear_trace_counter()


@pytest.mark.parametrize("solver", [None, rr.Anderson(history=3)])
def test_one_trace_for_any_number(solver):
    @jax.jit
    @chex.assert_max_traces(1)
    def run(m, reg, tol, init):
        return rr.solve(m, reg, solver, tol=tol, init=init).value

    values = []
    for i, number in enumerate(NUMBERS):
        m = CASE.mdp(DISCOUNTS[i])
        reg = rr.alpha(alpha=(0.5, 1, 1.0, np.array(2.0), 3, -1.0)[i], beta=number, prior=CASE.prior)
        values.append(run(m, reg, np.asarray(10.0 ** -(6 + i % 3)), np.full(STATES, float(i))))
    assert len({float(v[0]) for v in values}) == len(NUMBERS)


@pytest.mark.parametrize("factory", [rr.kl, lambda **kw: rr.alpha(alpha=2.0, **kw)], ids=["kl", "alpha"])
def test_one_trace_for_any_regulariser_leaf(factory):
    @jax.jit
    @chex.assert_max_traces(1)
    def run(reg, q):
        return reg.conjugate(q), reg.argmax(q), reg.value(reg.argmax(q)), rr.worst_case(reg, reg.argmax(q))

    for number in NUMBERS:
        run(factory(beta=number, prior=CASE.prior), CASE.reward)


@pytest.mark.parametrize("kind", KINDS)
def test_no_compilation_on_the_second_call(kind):
    """Called as in the README, with no jit around it: the second time, with other numbers, nothing compiles."""

    def run(alpha, beta, discount, tol, seed):
        m = garnet_case(0).mdp(discount, kind)
        reg = rr.alpha(alpha=alpha, beta=beta, prior=garnet_case(seed).prior)
        sol = rr.solve(m, reg, tol=tol)
        if kind == "dense":
            rr.certify(m, reg, sol)
            rr.slack(reg, rr.worst_case(reg, sol.policy))
            jax.block_until_ready((rr.evaluate(m, sol.policy, reg), rr.occupancy(m, sol.policy)))
            jax.block_until_ready((reg.conjugate(sol.q), reg.argmax(sol.q), reg.value(sol.policy)))
        return np.asarray(sol.value)

    before = len(COMPILATIONS)
    first = run(1.5, 2.0, 0.9, 1e-6, 0)
    assert len(COMPILATIONS) > before, "the listener hears nothing: this test would pass in vain"
    before = len(COMPILATIONS)
    second = run(0.5, 20.0, 0.99, 1e-8, 1)
    run(1, 3, 0.5, 1e-3, 2)
    assert len(COMPILATIONS) == before, f"{len(COMPILATIONS) - before} compilations"
    assert not np.allclose(first, second)


def test_leaves_are_strongly_typed():
    """A weakly typed leaf is a second compilation waiting to happen."""
    m, reg = CASE.mdp(0.9), rr.alpha(alpha=1.5, beta=2.0, prior=CASE.prior)
    for tree in (m, rr.kl(beta=1), rr.alpha(alpha=2, beta=3), reg, rr.solve(m, reg, tol=1e-6)):
        for leaf in jax.tree.leaves(tree):
            assert not leaf.weak_type, tree
