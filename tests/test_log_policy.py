"""Logarithms of policies, and worst cases of the actions that were taken: exact where probabilities underflow.

The reference solves for the log-ratio of the best action by bisection, in float64, and knows no probability.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr

ALPHAS = (-1.0, 0.0, 0.5, 0.999, 1.0, 1.1, 1.5, 2.0, 3.0)
RNG = np.random.default_rng(0)


def family(alpha, beta, **kw) -> Any:
    """KL for None, or alpha of an order."""
    return rr.kl(beta, **kw) if alpha is None else rr.alpha(alpha, beta, **kw)


def reference(alpha, beta, log_prior, q):
    """`log argmax(q)` of one row, float64."""
    h = (1.0 if alpha is None else alpha) - 1
    gap = beta * (q.max() - q)

    def logs(level):
        if h == 0:
            return log_prior + level - gap
        inside = -h * gap * np.exp(-h * level)
        with np.errstate(divide="ignore"):
            return log_prior + level + np.log1p(np.maximum(inside, -1)) / h

    low, high = 0.0, -log_prior[np.argmax(q)]
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.exp(logs(middle)).sum() < 1 else (low, middle)
    return logs(0.5 * (low + high))


def rows(spread):
    """Values and log-priors, `[4, 5]`: the last row has a prior of 1e-12."""
    q, log_prior = spread * RNG.normal(size=(4, 5)), np.log(RNG.dirichlet(np.ones(5), 4))
    log_prior[3] = np.log([0.25, 0.25, 1e-12, 0.25, 0.25 - 1e-12])
    return q, log_prior


@pytest.mark.parametrize("alpha", [None, *ALPHAS])
def test_logarithms_are_those_of_the_reference(alpha):
    """Where probabilities are ordinary, small, and below the smallest number, in both precisions."""
    for spread in (1.0, 50.0, 5e3):
        q, log_prior = rows(spread)
        wanted = np.stack([reference(alpha, 2.0, *x) for x in zip(log_prior, q)])
        for dtype, tolerance in ((np.float64, 1e-11), (np.float32, 3e-4)):
            order = None if alpha is None else dtype(alpha)
            reg = family(order, dtype(2), log_prior=log_prior.astype(dtype))
            x = q.astype(dtype)
            got = np.asarray(reg.log_policy(x))
            assert got.dtype == dtype
            # What is on the edge of the support in one precision need not be so in the other.
            inside = np.isfinite(got) & np.isfinite(wanted)
            assert inside.any(-1).all() and (np.exp(wanted[np.isneginf(got)]) < 1e-6).all()
            assert (np.isfinite(got) == np.isfinite(wanted)).all() or dtype == np.float32
            if alpha is None or alpha <= 2:
                # An entry near the edge, 1 + h x of nearly 0, has lost the digits of that difference.
                lost = 1e-7 if dtype == np.float64 else 0.2
                close = np.exp(wanted) < lost if alpha is not None and alpha > 1 else np.zeros_like(inside)
                np.testing.assert_allclose(got[inside & ~close], wanted[inside & ~close], tolerance, tolerance)
            policy = np.asarray(reg.argmax(x))
            np.testing.assert_allclose(np.exp(got), policy, rtol=200 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_masked_actions_are_minus_infinity_and_give_no_gradient(alpha):
    """Whatever stands in their place; the others are as without them."""
    reg = family(alpha, 2.0, prior=[0.5, 0.0, 0.5])
    for trouble in (np.nan, np.inf, 1e300):
        q = jnp.asarray([1.0, trouble, 1.5])
        got, slope = jax.value_and_grad(lambda q: reg.log_policy(q)[0])(q)
        np.testing.assert_allclose(got, family(alpha, 2.0).log_policy(q[::2])[0], rtol=1e-13)
        assert np.isfinite(slope).all() and slope[1] == 0
        assert np.isneginf(reg.log_policy(q)[1])
    assert (np.asarray(jax.jacrev(reg.log_policy)(jnp.asarray([1.0, 0.0, 1.5])))[1] == 0).all()


WEIGHT = RNG.normal(size=4)
DIRECTIONS = tuple(RNG.normal(size=shape) for shape in (4, (), (), 4))


def combined(q, beta, order, logits):
    """One number of all finite logarithms."""
    reg = rr.kl(beta, log_prior=logits) if order is None else rr.alpha(order, beta, log_prior=logits)
    logs = reg.log_policy(q)
    return jnp.where(jnp.isneginf(logs), 0, logs) @ WEIGHT


@jax.jit
def derivatives(*at):
    """In both modes, and once more in q; `order` None is KL."""
    leaves = tuple(i for i, x in enumerate(at) if x is not None)
    back = jax.grad(combined, leaves)(*at)
    given = tuple(None if x is None else d for x, d in zip(at, DIRECTIONS))
    some = lambda *x: combined(*(x if at[2] is not None else (*x[:2], None, x[2])))  # noqa: E731
    moving, along = (tuple(x for x in y if x is not None) for y in (at, given))
    along = jax.jvp(some, moving, along)[1]
    turned = jax.jvp(lambda q: jax.grad(combined)(q, *at[1:]), (at[0],), (DIRECTIONS[0],))[1]
    return back, along, turned


@pytest.mark.parametrize("alpha", [None, -1.0, 0.0, 0.5, 1.0, 1.1, 1.5, 2.0])
def test_derivatives_are_those_of_the_reference(alpha):
    """In q, beta, alpha and the prior, in both modes, entries that underflow among them; and once more in q."""
    lowest = {None: -900.0, -1.0: -200.0, 0.0: -200.0, 0.5: -200.0, 1.0: -20.0}  # of KL: exp(-1800)
    q, logits = np.array([3.0, 2.8, 2.1, lowest.get(alpha, 1.9)]), np.array([0.3, -0.5, 0.1, 0.4])

    def slow(q, beta, order, logits):
        logs = reference(order, beta, logits - np.log(np.exp(logits).sum()), q)
        return np.where(np.isneginf(logs), 0, logs) @ WEIGHT

    at = (q, 2.0, alpha, logits)
    back, along, turned = derivatives(*at)
    which = [i for i, x in enumerate(at) if x is not None]
    for i, slope in zip(which, back):
        ends = []
        for step in (1e-5, -1e-5):
            ends.append(slow(*(x + step * DIRECTIONS[i] if i == j else x for j, x in enumerate(at))))
        np.testing.assert_allclose(np.sum(slope * DIRECTIONS[i]), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-6)
    total = sum(np.sum(slope * DIRECTIONS[i]) for i, slope in zip(which, back))
    np.testing.assert_allclose(along, total, rtol=1e-10)
    ends = [np.asarray(derivatives(q + s * DIRECTIONS[0], *at[1:])[0][0]) for s in (1e-5, -1e-5)]
    np.testing.assert_allclose(turned, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_derivatives_in_float32_of_what_underflows():
    """Finite and right where the probability is 0, NaN where the derivative is beyond the largest number."""
    q = jnp.asarray([300.0, 0.0, 1.0], jnp.float32)
    reg = rr.kl(np.float32(1))
    assert reg.argmax(q)[1] == 0
    np.testing.assert_array_equal(jax.jacrev(reg.log_policy)(q)[1], [-1, 1, 0])
    power = rr.alpha(np.float32(-1), np.float32(1), log_prior=np.array([0.0, -80, -80], np.float32))
    low = jnp.asarray([0.0, -1e30, -2e30], jnp.float32)
    assert power.argmax(low)[2] == 0
    slope = np.asarray(jax.jacrev(power.log_policy)(low))
    # log p = const - log(2 gap)/2, to first order in 1/gap.
    np.testing.assert_allclose(slope[1:, 0], [-0.5e-30, -0.25e-30], rtol=1e-4)
    steep = rr.alpha(np.float32(1.01), np.float32(1))
    edge = jnp.asarray([0.0, -63.0, -1.0], jnp.float32)  # log p is -103: the slope e^{-hL} is 3 there, no more
    assert np.isfinite(jax.jacrev(steep.log_policy)(edge)).all()


def test_any_layout_dtype_and_transformation():
    """Axes as `argmax` has them; bfloat16 in float32 and rounded once; vmap changes nothing."""
    q = RNG.normal(size=(2, 3, 4, 5))
    reg = rr.alpha(1.5, np.array([1.0, 2.0])[:, None], RNG.dirichlet(np.ones(5), (2, 1, 4)))
    got = reg.log_policy(q)
    np.testing.assert_allclose(np.exp(got), reg.argmax(q), rtol=1e-13)
    one = rr.kl(2.0)
    np.testing.assert_allclose(jax.vmap(one.log_policy)(q[0, 0]), one.log_policy(q[0, 0]), rtol=1e-13)
    half = jnp.asarray(q[0, 0], jnp.bfloat16)
    got, exact = (rr.kl(np.float32(2)).log_policy(x) for x in (half, half.astype(jnp.float32)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="q is a scalar|this argument is a scalar"):
        one.log_policy(1.0)


M = rr.problems.garnet(n_states=6, n_actions=3, branching=2, discount=0.9, seed=0)
PRIOR = np.array([0.5, 0.25, 0.25])


def test_a_solution_has_it():
    """Every lane, and what underflows: that of its action values, by the perturbation."""
    alpha, beta = np.array([0.5, 0.5, 1.0, 1.0, 1.5]), np.array([2.0, 3e8, 2.0, 3e4, 30.0])
    reg = rr.alpha(alpha, beta, PRIOR)
    sol = rr.solve(M, reg)
    ends = np.isneginf(sol.log_policy)
    wanted = np.stack([[reference(a, b, np.log(PRIOR), q) for q in rows] for a, b, rows in zip(alpha, beta, sol.q)])
    np.testing.assert_array_equal(np.isneginf(wanted), ends)
    np.testing.assert_allclose(np.where(ends, 0, sol.log_policy), np.where(ends, 0, wanted), rtol=1e-6, atol=1e-9)
    assert ends[4].any() and not ends[:4].any() and (np.asarray(sol.policy)[3] == 0).any()
    ratio = np.asarray(sol.log_policy)[2:4] - np.log(PRIOR)
    np.testing.assert_allclose(ratio, beta[2:4, None, None] * np.asarray(sol.perturbation)[2:4], rtol=1e-9, atol=1e-8)


def test_the_gradient_through_a_solve():
    direction = RNG.normal(size=M.reward.shape)

    @jax.jit
    def f(t, beta):
        logs = rr.solve(rr.MDP(M.transitions, M.reward + t * direction, *rest(M)), rr.kl(beta, PRIOR)).log_policy
        return logs[3, 1] - 0.3 * logs[2, 0]

    slopes = jax.grad(f, (0, 1))(0.0, 2.0)
    for slope, step in zip(slopes, ((1e-5, 0), (0, 1e-5))):
        ends = f(step[0], 2.0 + step[1]), f(-step[0], 2.0 - step[1])
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def rest(m):
    """Leaves of an MDP behind transitions and reward."""
    return [getattr(m, field.name) for field in dataclasses.fields(m)][2:]


def test_a_failed_lane_spoils_no_gradient():
    """The gradient is that of the lane that did not fail, by the same program without the failure."""
    m = rr.problems.chain(discount=0.9)

    @jax.jit
    @jax.value_and_grad
    def f(beta, scale, weight):
        sol = rr.solve(rr.MDP(m.transitions, m.reward[None] * scale[:, None, None], *rest(m)), rr.kl(beta))
        return weight @ jnp.sum(sol.where_converged(sol.log_policy), axis=(1, 2))

    got = f(2.0, np.array([1.0, np.nan]), np.ones(2))
    np.testing.assert_allclose(got, f(2.0, np.ones(2), np.array([1.0, 0.0])), rtol=1e-9)


def test_files_keep_it_and_old_ones_say_what_they_know(tmp_path):
    sol = rr.solve(rr.problems.chain(discount=0.9), rr.kl(400.0))
    path = rr.save(tmp_path / "sol", sol)
    np.testing.assert_array_equal(rr.load(path).log_policy, sol.log_policy)
    arrays = dict(np.load(path))
    header = json.loads(str(arrays["header"]))
    del header["robustreg"]["object"]["fields"]["log_policy"], arrays["log_policy"]
    np.savez(path, **{**arrays, "header": np.array(json.dumps(header))})
    old, gone = np.asarray(rr.load(path).log_policy), np.asarray(sol.policy) == 0
    assert gone.any() and np.isnan(old[gone]).all()
    np.testing.assert_allclose(old[~gone], np.asarray(sol.log_policy)[~gone], rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------
# worst cases of the actions that were taken

TAKEN = np.array([[0, 3, 1], [2, 2, 4]])


@pytest.mark.parametrize("reg", [rr.kl(2.0), rr.entropy(2.0), rr.alpha(0.5, 2.0), rr.alpha(1.5, 2.0)])
def test_the_entry_of_the_action_that_is_taken(reg):
    """Values and gradients are those of the whole row, at that entry."""
    z = jnp.asarray(RNG.normal(size=(2, 3, 5)))

    def picked(z):
        return rr.worst_case(reg, log_policy=jax.nn.log_softmax(z), action=TAKEN)

    def whole(z):
        return jnp.take_along_axis(rr.worst_case(reg, log_policy=jax.nn.log_softmax(z)), TAKEN[..., None], -1)[..., 0]

    np.testing.assert_allclose(picked(z), whole(z), rtol=1e-13)
    weight = RNG.normal(size=(2, 3))
    slopes = (jax.grad(lambda z: jnp.sum(weight * f(z)))(z) for f in (picked, whole))  # noqa: B023
    np.testing.assert_allclose(*slopes, rtol=1e-10, atol=1e-13)
    probabilities = rr.worst_case(reg, jax.nn.softmax(z), action=TAKEN)
    np.testing.assert_allclose(probabilities, whole(z), rtol=1e-11, atol=1e-13)


def test_actions_with_priors_and_batches():
    """A beta of each lane, a prior of each state, an action for all lanes, masked and omitted actions."""
    prior = np.array([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]])
    reg = rr.alpha(1.5, np.array([1.0, 2.0, 3.0, 4.0]), prior)
    policy = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    whole = np.asarray(rr.worst_case(reg, policy[None]))
    for action in ([2, 0], [1, 1]):
        for given in (np.array(action), np.array([action])):
            got = rr.worst_case(reg, policy[None], action=given)
            np.testing.assert_array_equal(got, whole[:, [0, 1], action])
    half = jnp.asarray(np.log([0.25, 0.75]), jnp.bfloat16)
    assert rr.worst_case(rr.kl(np.float32(2)), log_policy=half, action=1).dtype == jnp.bfloat16


def test_a_confident_policy_keeps_its_gradient():
    """The case of a softmax that has underflowed: right from logarithms, though the entry of p is 0."""
    z = jnp.asarray([200.0, 0.0, -3.0], jnp.float32)
    f = lambda z: rr.worst_case(rr.kl(np.float32(2)), log_policy=jax.nn.log_softmax(z), action=1)  # noqa: E731
    np.testing.assert_allclose(jax.grad(f)(z), [-0.5, 0.5, 0.0], atol=1e-7)


def test_kl_looks_at_the_action_alone():
    """Arithmetic grows with the rows, not with the actions; alpha sums each row once."""
    logs, action = jnp.zeros((64, 4096), jnp.float32), np.zeros(64, np.int32)

    def work(reg):
        compiled = jax.jit(lambda x: rr.worst_case(reg, log_policy=x, action=action)).lower(logs).compile()
        costs: Any = compiled.cost_analysis()
        return costs["flops"]

    assert work(rr.kl(np.float32(2))) <= 32 * 64
    assert work(rr.alpha(np.float32(2), np.float32(2))) > 64 * 4096


def test_wrong_actions_are_refused():
    logs = jnp.log(jnp.full((2, 3), 1 / 3))
    call = lambda action: rr.worst_case(rr.kl(1.0), log_policy=logs, action=action)  # noqa: E731
    with pytest.raises(TypeError, match="action must hold integers"):
        call(np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"action has shape \[3\]; expected \[2\]"):
        call(np.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"action\[1\] is 3; actions are numbered from 0 to 2"):
        call(np.array([0, 3]))
    with pytest.raises(ValueError, match=r"action\[0\] is -100; .* give padding any action, and no weight"):
        call(np.array([-100, 0]))
    unseen = np.asarray(jax.jit(call)(np.array([-1, 3])))
    assert np.isnan(unseen).all()
