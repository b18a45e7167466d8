"""Derivatives: by finite differences, by closed forms, in both modes and to second order, and at the corners."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import ACTIONS, garnet, random_reward
from jax.typing import ArrayLike

import robustreg as rr
from robustreg.solvers import elimination, linear

pytestmark = pytest.mark.slow

S, A = 7, ACTIONS
ALPHAS = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
LANES = len(ALPHAS)


def look_ahead(v, p):
    return jnp.einsum("sat,t->sa", p, v)


@functools.cache
def leaves():
    """One problem per alpha, everything but the transitions its own: a dict of NumPy arrays."""
    rng = np.random.default_rng(0)
    prior = rng.dirichlet(np.ones(A), (LANES, S))
    return {
        "reward": np.stack([random_reward(rng, (S, A)) for _ in ALPHAS]),
        "P": garnet(1, states=S),
        "discount": np.linspace(0.85, 0.95, LANES),
        "initial": rng.dirichlet(np.ones(S), LANES),
        "beta": np.linspace(0.5, 4.0, LANES),
        "alpha": ALPHAS,
        "log_prior": np.log(prior),
    }


def build(x, kind="successors"):
    """MDP and regulariser of a dict of leaves; traced leaves are fine."""
    if kind == "dense":
        transitions = rr.Dense(x["P"])
    elif kind == "successors":
        every = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (S, A, S))
        transitions = rr.Successors(every, x["P"])
    else:
        transitions = rr.MatrixFree(look_ahead, n_states=S, n_actions=A, parameters=x["P"])
    m = rr.mdp(transitions, x["reward"], x["discount"], x["initial"])
    return m, rr.alpha(x["alpha"], x["beta"], log_prior=x["log_prior"])


def arrays():
    return dict(leaves())


def directions(seed=0):
    """A direction per leaf that keeps what must be normalised normalised."""
    rng = np.random.default_rng(seed)
    out = {name: rng.normal(size=x.shape) for name, x in leaves().items()}
    out["P"] *= 0.1 * (leaves()["P"] > 0)
    present = leaves()["P"] > 0
    out["P"] -= present * (out["P"].sum(-1) / present.sum(-1))[..., None]
    out["initial"] = 0.1 * (out["initial"] - out["initial"].mean(-1, keepdims=True))
    out["discount"] *= 0.03
    prior = np.exp(leaves()["log_prior"])
    out["log_prior"] -= (prior * out["log_prior"]).sum(-1, keepdims=True)
    return out


def outputs(x):
    """Everything that is differentiable, of one dict of leaves."""
    # Along a straight line log priors leave the simplex in second order: bring them back.
    x = x | {"log_prior": jax.nn.log_softmax(x["log_prior"])}
    m, reg = build(x)
    sol = rr.solve(m, reg)
    other = jax.nn.softmax(2 * x["reward"])
    return {
        "value": sol.value,
        "q": sol.q,
        "policy": sol.policy,
        "perturbation": sol.perturbation,
        "objective": sol.objective,
        "evaluate": rr.evaluate(m, other, reg),
        "plain": rr.evaluate(m, other),
        "occupancy": rr.occupancy(m, other),
        "worst case": rr.worst_case(reg, other),
        "slack": rr.slack(reg, x["reward"]),
    }


def differentiable(kind="successors", solver=None):
    """Of lanes of leaves, a probe of the adjoint's error and a start: objectives and policies, and all derivatives.

    Returns:
      a compiled function of a dict of leaves to ((sum of objectives, (objectives, policies)), gradients).
    """

    def total(x, probe, init):
        sol = rr.solve(*build(x, kind), solver, adjoint_error=probe, init=init)
        return sol.objective.sum(), (sol.objective, sol.policy)

    program = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))

    def run(x, probe=0.0, init: ArrayLike = 0.0):
        # (One program for all tests that have leaves of one shape and dtype.)
        dtype = x["beta"].dtype
        return program(x, np.full(LANES, probe, dtype), np.broadcast_to(np.asarray(init, dtype), (LANES, S)))

    return run


differentiated = functools.cache(differentiable)


def gradient_of_the_objective(kind="successors", solver=None):
    """The gradient in the leaves alone, as NumPy arrays."""
    return lambda x: {name: np.asarray(g) for name, g in differentiated(kind, solver)(x)[1][0].items()}


def difference(f, x, d, step=1e-4):
    """Central difference of fourth order of a dict of outputs along `d`."""

    def at(k):
        return jax.tree.map(np.asarray, f({name: x[name] + k * step * d[name] for name in x}))

    return jax.tree.map(lambda a, b, c, e: (8 * (a - b) - (c - e)) / (12 * step), at(1), at(-1), at(2), at(-2))


def dot(a, b):
    """Inner product of two dicts."""
    return sum(float(np.vdot(a[name], b[name])) for name in b)


def close(got, wanted, tolerance, what: object = ""):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert np.isfinite(got).all(), what
    worst = np.abs(got - wanted).max() / (np.abs(wanted).max() + 1e-3)
    assert worst <= tolerance, (what, worst)


@functools.cache
def tangents():
    """Compiled: outputs, and their tangents along a direction. Outputs alone are this program's as well."""
    return jax.jit(lambda x, d: jax.jvp(outputs, (x,), (d,)))


@pytest.mark.parametrize("name", list(leaves()))
def test_forward_mode_agrees_with_differences(name):
    x, d = arrays(), directions()
    d = {other: d[other] if other == name else np.zeros_like(d[other]) for other in d}
    got, wanted = tangents()(x, d)[1], difference(lambda y: tangents()(y, d)[0], x, d)
    for output in got:
        close(got[output], wanted[output], 1e-6, (name, output))


def test_reverse_mode_is_the_transpose_of_forward_mode():
    """`<ct, jvp(d)> = <vjp(ct), d>` for every output by itself and every leaf."""
    x, d = arrays(), directions()
    rng = np.random.default_rng(1)
    forward = tangents()(x, d)[1]
    weights = {name: rng.normal(size=y.shape) for name, y in forward.items()}
    pull = jax.jit(lambda x, w: jax.vjp(outputs, x)[1](w)[0])
    for output, w in weights.items():
        only = {name: w if name == output else np.zeros_like(weights[name]) for name in weights}
        total = dot(pull(x, only), d)
        assert np.isclose(total, float(np.vdot(w, forward[output])), rtol=1e-8, atol=1e-9), output


@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        ("successors", None),
        ("dense", rr.Newton(linear="direct")),
        ("matrix free", None),
        ("successors", rr.ValueIteration()),
    ],
)
def test_closed_forms(kind, solver):
    """Gradients of the objective against their formulas; that in the reward is the occupancy to rounding.

    Also by a solver that takes hundreds of steps: nothing is differentiated through them.
    """
    got = gradient_of_the_objective(kind, solver)(arrays())
    total = np.zeros_like(leaves()["P"])
    for i in range(LANES):
        one = {name: v if name == "P" else v[i] for name, v in leaves().items()}
        prior = np.exp(one["log_prior"])
        wanted = oracle.gradients(
            one["P"], one["reward"], one["discount"], one["alpha"], one["beta"], prior, one["initial"]
        )
        assert np.abs(got["reward"][i] - wanted["reward"]).max() <= 1e-10 * wanted["reward"].max()
        for name in ("discount", "initial", "beta", "alpha"):
            close(got[name][i], wanted[name], 1e-8, (kind, name, one["alpha"]))
        # The factory normalises the prior: a constant in its logarithm changes nothing.
        slope = wanted["prior"] - (prior * wanted["prior"]).sum(-1, keepdims=True)
        close(got["log_prior"][i] / prior, slope, 1e-8, (kind, "prior", one["alpha"]))
        total += wanted["P"]
    close(got["P"], total, 1e-9, (kind, "P"))
    assert got["P"].shape == (S, A, S)  # shared by the lanes: their sum, not a copy for each


def test_episodes_that_end_and_strengths_per_state():
    """A probability of ending is missing from the rows of P: through them its gradient is whole."""
    x = arrays()
    kernel, reward = x["P"], x["reward"][0]
    rng = np.random.default_rng(3)
    point = {"ends": rng.uniform(0, 0.3, (S, A)), "scale": rng.uniform(0.5, 2, S)}
    along = {name: 0.1 * rng.normal(size=v.shape) for name, v in point.items()}

    def f(y):
        rows = (1 - y["ends"])[..., None] * kernel
        m = rr.mdp(rows, reward, 0.9, x["initial"][0], termination=y["ends"])
        sol = rr.solve(m, rr.alpha(1.5, 2.0, state_scale=y["scale"]))
        return {"objective": sol.objective, "policy": sol.policy, "visits": rr.occupancy(m, sol.policy)}

    forward = jax.jit(lambda y, d: jax.jvp(f, (y,), (d,)))
    got, wanted = forward(point, along)[1], difference(lambda y: forward(y, along)[0], point, along)
    for name in got:
        close(got[name], wanted[name], 1e-6, name)
    slope = jax.jit(jax.grad(lambda y: f(y)["objective"]))(point)
    assert np.isclose(dot(slope, along), float(got["objective"]), rtol=1e-9)


@pytest.fixture(scope="module")
def seconds():
    """Products with the Hessian of the lanes' objectives along each entry of the reward, all lanes at once.

    Forward over reverse mode in every leaf, and at last along all of them; reverse over forward in the reward alone.
    """
    x, d = arrays(), directions()

    def objective(x):
        return rr.solve(*build(x)).objective.sum()

    def over_reverse(d):
        def gradient(y):
            return jax.grad(objective)(y | {"log_prior": jax.nn.log_softmax(y["log_prior"])})

        return jax.jvp(gradient, (x,), (d,))[1]

    def over_forward(d):
        return jax.grad(lambda r: jax.jvp(lambda r: objective(x | {"reward": r}), (r,), (d,))[1])(x["reward"])

    along = {name: np.concatenate([np.zeros((S * A, *v.shape)), v[None]]) for name, v in d.items()}
    along["log_prior"][:] = 0
    along["reward"][:-1] = np.eye(S * A).reshape(S * A, 1, S, A)
    products = jax.jit(jax.vmap(over_reverse))(along)
    return products, jax.jit(jax.vmap(over_forward))(along["reward"][:-1]), along


def test_second_order(seconds):
    """Products with the Hessian of the objective in all leaves at once against differences of the gradient."""
    products, _, along = seconds
    d = {name: v[-1] for name, v in along.items()}
    gradient = gradient_of_the_objective()
    wanted = difference(gradient, arrays(), d)
    for name in wanted:
        close(products[name][-1], wanted[name], 1e-6, name)


def test_hessian_in_the_reward_is_symmetric_and_positive_semidefinite(seconds):
    """Forward over reverse and reverse over forward, every alpha: V* is convex in the reward."""
    blocks = seconds[0]["reward"][:-1], seconds[1]
    hessians = [np.asarray(h).reshape(S * A, LANES, S * A).swapaxes(0, 1) for h in blocks]
    for h in hessians:
        assert (np.abs(h - h.swapaxes(-1, -2)).max((-1, -2)) <= 1e-10 * np.abs(h).max((-1, -2))).all()
        eigenvalues = np.linalg.eigvalsh(h)
        assert (eigenvalues >= -1e-10 * eigenvalues.max(-1, keepdims=True)).all()
        assert (eigenvalues.max(-1) > 1e-3).all()
    close(hessians[0], hessians[1], 1e-10)


def test_conjugate_has_exact_second_derivatives():
    """Through `stop_gradient(argmax)` the gradient would be right and the Hessian 0."""
    rng = np.random.default_rng(2)
    q, priors = rng.normal(size=5), rng.dirichlet(np.ones(5), LANES)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def derivatives(alpha, prior, q):
        reg = rr.alpha(alpha, 2.0, prior=prior)
        hessian = jax.hessian(reg.conjugate)
        third = jax.jvp(hessian, (q,), (jnp.ones(5),))[1]
        return reg.argmax(q), jax.grad(reg.conjugate)(q), hessian(q), third

    at = functools.partial(derivatives, ALPHAS, priors)
    policy, gradient, hessian, third = (np.asarray(x) for x in at(q))
    step = 1e-5
    ahead, behind = (np.stack([at(q + s * e)[0] for e in np.eye(5)], 1) for s in (step, -step))
    for k, alpha in enumerate(ALPHAS):
        close(gradient[k], policy[k], 1e-12, alpha)
        close(hessian[k], (ahead - behind)[k] / (2 * step), 1e-7, alpha)
        assert np.abs(third[k]).max() <= 1e-9 * np.abs(hessian[k]).max(), alpha  # shifts change nothing


def test_alpha_one_is_kl_to_rounding():
    x = arrays()
    kl = jax.jit(jax.grad(lambda b, lp: rr.solve(build(x)[0], rr.kl(b, log_prior=lp)).objective.sum(), (0, 1)))
    at = gradient_of_the_objective()(x | {"alpha": np.ones(LANES)})
    for a, b in zip(kl(x["beta"], x["log_prior"]), (at["beta"], at["log_prior"])):
        close(a, b, 1e-12)


CORNERS = {
    "alpha 1 + 1e-12": {"alpha": 1 + 1e-12},
    "alpha 1e-12": {"alpha": 1e-12},
    "beta range 1e8": {"beta": 1e8},
    "beta range 1e8, KL": {"beta": 1e8, "alpha": 1.0},
    "beta range 1e8, alpha 3": {"beta": 1e8, "alpha": 3.0},
    "beta 1e-6": {"beta": 1e-6},
    "ties": {"reward": np.ones((S, A))},
    "discount 0": {"discount": 0.0},
    "discount .9999": {"discount": 0.9999},
    "tiny prior": {"log_prior": np.log(np.tile([1e-12, 0.5, 0.25, 0.25 - 1e-12], (S, 1)))},
    "masked": {"log_prior": np.log(np.tile([1.0, 0.5, 0.25, 0.25], (S, 1))) - np.array([np.inf, 0, 0, 0])},
}


@functools.cache
def corners():
    """One problem in a lane for each corner, in as many calls of the gradient's program as it takes.

    Returns:
      name of the corner to its leaves, value, gradient, and the occupancy of its policy.
    """
    names, found = list(CORNERS), {}
    for start in range(0, len(names), LANES):
        some = (names[start:] + names)[:LANES]
        x = {n: v if n == "P" else np.repeat(v[4:5], LANES, 0) for n, v in leaves().items()}
        for lane, name in enumerate(some):
            for leaf, v in CORNERS[name].items():
                x[leaf][lane] = v
        (_, (value, policy)), (gradient, _, _) = jax.tree.map(np.asarray, differentiated()(x))
        visits = np.asarray(rr.occupancy(build(x)[0], policy))
        for lane, name in enumerate(some):
            one = {n: v if n == "P" else v[lane] for n, v in x.items()}
            slope = {n: g[lane] for n, g in gradient.items() if n != "P"}
            found[name] = one, value[lane], slope, visits[lane]
    return found


@pytest.mark.parametrize("name", CORNERS)
def test_corners_are_finite_and_right(name):
    """Gradients exist, that in the reward is the occupancy, and steps along it change the value as it says."""
    x, value, gradient, visits = corners()[name]
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient.values()), name
    assert np.isclose(gradient["reward"].sum() * (1 - x["discount"]), 1, rtol=1e-9)
    close(gradient["reward"], visits, 1e-8, name)
    if "masked" in name:
        assert (gradient["reward"][:, 0] == 0).all() and (gradient["log_prior"][:, 0] == 0).all()


def test_edge_of_the_support():
    """alpha = 2 with an action exactly on the threshold: the value is C^1, the policy's derivative one-sided."""
    reg = rr.alpha(2.0, 10.0)
    q = np.linspace(0.0, 1.0, 6)
    at = jax.jit(lambda q: (reg.argmax(q), jax.grad(reg.conjugate)(q), jax.jacrev(reg.argmax)(q)))
    policy, gradient, jacobian = (np.asarray(x) for x in at(q))
    close(gradient, policy, 1e-14)
    assert np.isfinite(jacobian).all()
    # Rounding decides on which side of the edge the fourth action is; the derivative is that of this side.
    direction = np.eye(6)[3] * (1.0 if policy[3] > 0 else -1.0)
    for step in (1e-4, 1e-5):
        close(jacobian @ direction, (at(q + step * direction)[0] - policy) / step, 1e-6)
    other = (at(q - 1e-5 * direction)[0] - policy) / -1e-5
    assert np.abs(other - jacobian @ direction).max() > 0.1  # there is a kink


def test_a_lost_lane_keeps_its_trouble_to_itself():
    x, gradient = arrays(), gradient_of_the_objective()
    clean = gradient(x)
    spoiled = x["reward"].copy()
    spoiled[2, 0, 0] = np.nan
    broken = gradient(x | {"reward": spoiled})
    others = np.arange(LANES) != 2
    for name in ("reward", "beta", "alpha", "discount", "log_prior"):
        assert np.isnan(np.asarray(broken[name][2])).any(), name
        assert (np.asarray(clean[name])[others] == np.asarray(broken[name])[others]).all(), name


def test_vmap_of_grad_is_grad_of_the_batch():
    x = arrays()
    together = gradient_of_the_objective()(x)
    shared = x.pop("P")
    each = jax.jit(jax.vmap(jax.grad(lambda y: rr.solve(*build(y | {"P": shared})).objective)))(x)
    for name in x:
        close(each[name], together[name], 1e-10, name)


def test_warm_starts_are_not_differentiated():
    x = arrays()
    m, reg = build(x)
    warm, _, nothing = differentiated()(x, init=rr.solve(m, reg).value)[1]
    cold = gradient_of_the_objective()(x)
    for name in cold:
        close(warm[name], cold[name], 1e-10, name)
    assert (np.asarray(nothing) == 0).all()


def test_memory_does_not_hold_a_copy_of_shared_transitions():
    """256 lanes over one dense kernel: the gradient's scratch space stays below a kernel per lane by far."""
    n, lanes = 64, 256
    m = rr.problems.garnet(n_states=n, n_actions=4, branching=8)
    kernel = np.zeros((n, 4, n))
    lists: Any = m.transitions
    np.put_along_axis(kernel, np.asarray(lists.indices), np.asarray(lists.probabilities), -1)

    def objective(p, betas):
        return rr.solve(rr.mdp(rr.Dense(p), m.reward, 0.9), rr.kl(betas), tol=1e-6).objective.sum()

    p, betas = jnp.asarray(kernel), jnp.linspace(0.1, 10, lanes)
    compiled = jax.jit(jax.grad(objective)).lower(p, betas).compile()
    assert compiled(p, betas).shape == p.shape
    analysis: Any = compiled.memory_analysis()
    assert analysis.temp_size_in_bytes < 0.25 * lanes * p.size * 8


def test_exports_for_accelerators():
    """Lowers for cuda, rocm and tpu on a machine that has none of them."""
    m = rr.problems.garnet(n_states=20, n_actions=3, branching=4)

    def objective(reward, beta):
        return rr.solve(dataclasses.replace(m, reward=reward), rr.kl(beta), tol=1e-6).objective

    for f in (objective, jax.grad(objective, (0, 1))):
        exported = jax.export.export(jax.jit(f), platforms=("cuda", "rocm", "tpu"))(m.reward, jnp.asarray(2.0))
        assert set(exported.platforms) == {"cuda", "rocm", "tpu"}


def test_float32_gradients():
    """A float32 problem has float32 gradients, right to its precision."""
    x = {name: v.astype(np.float32) for name, v in leaves().items()}
    x["P"] = x["P"] / x["P"].sum(-1, keepdims=True)
    got = gradient_of_the_objective()(x)
    wanted = gradient_of_the_objective()({n: v.astype(float) for n, v in x.items()})
    for name in got:
        assert got[name].dtype == jnp.float32
        close(got[name], wanted[name], 3e-5, name)


def test_the_adjoint_reports_its_error(monkeypatch):
    """A gradient of zeros that is the relative error of the occupancy: small, or large where the solve was cut."""
    x = arrays()
    (value, _), (gradient, error, _) = differentiated()(x)
    # That of the policy counts, optimal but for rounding: stiff for alpha < 0, by a root for alpha > 2.
    assert (0 <= np.asarray(error)).all() and (np.asarray(error) <= 1e-4).all()
    assert (np.asarray(error)[(ALPHAS >= 0) & (ALPHAS <= 2)] <= 1e-9).all()
    assert value == differentiated()(x, probe=1.0)[0][0]
    # (Last in this file: other programs are dropped with these.)
    jax.clear_caches()
    monkeypatch.setattr(linear, "KRYLOV_STEPS", 1)
    monkeypatch.setattr(linear, "_ROUNDS", 1)
    other = differentiable()(x)[1][0]
    np.testing.assert_allclose(other["reward"], gradient["reward"], rtol=1e-8, atol=1e-10)
    # With no other way left either, there is no gradient.
    monkeypatch.setattr(elimination, "STATES", 0)
    monkeypatch.setattr(linear, "_SWEEPS", 0)
    jax.clear_caches()
    _, (poor, error, _) = differentiable()(x)
    jax.clear_caches()
    # (The gradient of an action that is never taken is 0 whatever the occupancy.)
    never = np.asarray(gradient["reward"]) == 0
    assert np.isinf(np.asarray(error)).all() and np.isnan(np.asarray(poor["reward"])[~never]).all()
