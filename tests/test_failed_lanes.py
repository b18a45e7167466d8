"""A lane that fails has no gradient, and takes none from the lanes that share parameters with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr

pytestmark = pytest.mark.slow

S, A = 6, 3
RNG = np.random.default_rng(0)
P = RNG.dirichlet(np.ones(S), (2, S, A))
R = RNG.normal(size=(2, S, A))
START = RNG.dirichlet(np.ones(S))


def shared():
    """What both lanes have in common, and what each has of its own."""
    return {"scale": jnp.asarray(1.0), "initial": jnp.asarray(START), "reward": jnp.asarray(R), "P": jnp.asarray(P)} | {
        "beta": jnp.asarray([2.0, 2.0]),
        "discount": jnp.asarray([0.9, 0.9]),
        "log_prior": jnp.asarray(np.full((2, S, A), -np.log(A))),
    }


def problem(x):
    # The scale, which lanes share, meets no NaN out here: what the program around a solve multiplies is its own affair.
    m = rr.MDP(rr.Dense(x["P"]), x["reward"] + x["scale"] * R[:1], x["discount"], 1 - x["discount"], x["initial"])
    return m, rr.Alpha(jnp.asarray(1.5) * x["scale"], x["beta"], x["log_prior"])


def solved(x):
    m, reg = problem(x)
    return rr.solve(m, reg)


@jax.jit
def gradient(x, kept, asked):
    """Gradient of what lanes that converged say, weighted by lane, and of three results whatever became of them.

    And the status. One program for all tests: a weight of 0 leaves its part out.
    """

    def total(x):
        sol = solved(x)
        policy, value = sol.where_converged(sol.policy), sol.where_converged(sol.value)
        lanes = sol.where_converged(sol.objective, 3.0) + (policy**2).sum((1, 2)) + value.sum(1)
        others = sol.objective.sum(), sol.policy[1, 0, 0], sol.lower[1].sum()
        return kept @ lanes + sum(w * y for w, y in zip(asked, others)), sol.status

    return jax.grad(total, has_aux=True)(x)


BOTH, FIRST, NOTHING = np.ones(2), np.array([1.0, 0.0]), np.zeros(3)


FAILURES = {
    "reward": ("reward", (1, 0, 0), np.nan),
    "reward infinite": ("reward", (1, 0, 0), np.inf),
    "beta negative": ("beta", (1,), -2.0),
    "beta NaN": ("beta", (1,), np.nan),
    "P": ("P", (1, 2, 1, 0), np.nan),
    "rows": ("P", (1, 2, 1, 0), 7.0),
    "discount": ("discount", (1,), 1.5),
    "prior": ("log_prior", (1, 3, 0), np.nan),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_cotangent_of_zero_is_a_gradient_of_zero(how):
    """Gradients of what the other lane says are those of that lane alone, in every leaf, shared or not."""
    leaf, index, value = FAILURES[how]
    x = shared()
    broken = x | {leaf: x[leaf].at[index].set(value)}
    (found, status), (truth, _) = gradient(broken, BOTH, NOTHING), gradient(x, FIRST, NOTHING)
    assert int(status[0]) == rr.Status.CONVERGED and int(status[1]) == rr.Status.NONFINITE_INPUT
    for name in x:
        np.testing.assert_allclose(found[name], truth[name], atol=1e-9, err_msg=name)


def test_what_is_asked_of_a_failed_lane_is_nan():
    x = shared()
    broken = x | {"reward": x["reward"].at[1, 0, 0].set(np.nan)}

    for weights in np.eye(3):
        assert np.isnan(gradient(broken, np.zeros(2), weights)[0]["scale"])
        assert np.isfinite(gradient(x, np.zeros(2), weights)[0]["scale"])
    assert np.isfinite(gradient(broken, np.zeros(2), NOTHING)[0]["scale"])
    tangent = jax.jvp(lambda b: solved(broken | {"beta": b}).objective, (x["beta"],), (jnp.ones(2),))[1]
    assert np.isfinite(tangent[0]) and np.isnan(tangent[1])


@pytest.mark.parametrize("name", ["evaluate", "regularised", "occupancy", "optimum"])
def test_values_and_visits_of_other_lanes(name):
    """`evaluate`, `occupancy` and `nominal_optimum` in the same way."""

    def run(x):
        m, reg = problem(x)
        policy = jax.nn.softmax(jnp.broadcast_to(x["scale"] * jnp.arange(A, dtype=float), (S, A)))
        if name == "evaluate":
            return rr.evaluate(m, policy)
        if name == "regularised":
            return rr.evaluate(m, policy, reg)
        return rr.occupancy(m, policy).sum(-1) if name == "occupancy" else rr.nominal_optimum(m)

    x = shared()
    weights = jnp.asarray(RNG.normal(size=S))

    @jax.jit
    def safe(x):
        def first(x):
            found = run(x)
            return jnp.where(jnp.isnan(found), 0, found)[0] @ weights, found

        return jax.grad(first, has_aux=True)(x)

    truth, whole = safe(x)
    assert np.isfinite(whole).all()
    cases = [("P", (1, 2, 1, 0), np.nan), ("discount", (1,), 1.5)]
    cases += [] if name == "occupancy" else [("reward", (1, 0, 0), np.nan)]
    for leaf, index, value in cases:
        broken = x | {leaf: x[leaf].at[index].set(value)}
        found, out = safe(broken)
        assert np.isnan(out[1]).all() and np.isfinite(out[0]).all()
        for key in x:
            np.testing.assert_allclose(found[key], truth[key], atol=1e-9, err_msg=key)


def test_vmapped_and_forward_over_reverse():
    """A mask inside vmap, and the Hessian of what is left."""
    x = shared()

    def one(scale, reward):
        sol = solved(x | {"scale": scale, "reward": jnp.broadcast_to(reward, (2, S, A))})
        return sol.where_converged(sol.objective)[0]

    @jax.jit
    def twice(scale, rewards):
        slope = jax.grad(lambda s: jax.vmap(one, (None, 0))(s, rewards).sum())
        return jax.jvp(slope, (scale,), (jnp.ones_like(scale),))

    bad = R.copy()
    bad[1, 0, 0] = np.nan
    found = np.asarray(twice(1.0, bad))
    # Of two lanes that are alike, half: by the same program without the failure, and by differences of its slopes.
    alike = np.stack([R[0], R[0]])
    np.testing.assert_allclose(found, 0.5 * np.asarray(twice(1.0, alike)), atol=1e-8)
    up, down = (float(twice(1.0 + step, alike)[0]) for step in (1e-5, -1e-5))
    np.testing.assert_allclose(found[1], 0.5 * (up - down) / 2e-5, rtol=1e-5)


def test_the_number_that_bounds_a_gradient_taken_too_early():
    """At MAX_STEPS the occupancy is that of another policy: the bound holds, readable inside jit, and tightens."""
    m = rr.problems.garnet(8, 3, 3, 0.9)

    @jax.jit
    def run(reward, beta, alpha, steps):
        def objective(r, probe):
            mm = dataclasses.replace(m, reward=r)
            return rr.solve(mm, rr.alpha(alpha, beta), max_steps=steps, adjoint_error=probe).objective

        return jax.grad(objective, (0, 1))(reward, jnp.zeros(()))

    for alpha, beta in ((1.0, 2.0), (1.5, 10.0), (0.5, 1.0), (3.0, 2.0)):
        truth, settled = (np.asarray(x) for x in run(m.reward, beta, alpha, jnp.asarray(1000)))
        assert settled <= (1e-9 if alpha <= 2 else 200)
        for steps in (1, 2, 3, 5):
            gradient, bound = (np.asarray(x) for x in run(m.reward, beta, alpha, jnp.asarray(steps)))
            error = np.abs(gradient - truth).sum() / np.abs(truth).sum()
            assert error <= bound, (alpha, steps, error, bound)
