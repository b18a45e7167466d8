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

import robustreg as rr
from robustreg.solvers import elimination, linear

pytestmark = pytest.mark.slow

S, A = 7, ACTIONS
ALPHAS = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
LANES = len(ALPHAS)
KINDS = ("dense", "successors", "matrix free")


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
    return {name: jnp.asarray(x) for name, x in leaves().items()}


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
    return {name: jnp.asarray(x) for name, x in out.items()}


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


@functools.cache
def gradient_of_the_objective(kind="successors", solver=None):
    """Compiled: the gradient of the lanes' objectives in every leaf of a dict."""
    return jax.jit(jax.grad(lambda x: rr.solve(*build(x, kind), solver).objective.sum()))


def difference(f, x, d, step=1e-4):
    """Central difference of fourth order of a dict of outputs along `d`."""

    def at(k):
        return f({name: x[name] + k * step * d[name] for name in x})

    return jax.tree.map(lambda a, b, c, e: (8 * (a - b) - (c - e)) / (12 * step), at(1), at(-1), at(2), at(-2))


def close(got, wanted, tolerance, what: object = ""):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert np.isfinite(got).all(), what
    worst = np.abs(got - wanted).max() / (np.abs(wanted).max() + 1e-3)
    assert worst <= tolerance, (what, worst)


@pytest.fixture(scope="module")
def tangents():
    """Compiled: outputs, and their tangents along a direction."""
    return jax.jit(outputs), jax.jit(lambda x, d: jax.jvp(outputs, (x,), (d,))[1])


@pytest.mark.parametrize("name", list(leaves()))
def test_forward_mode_agrees_with_differences(name, tangents):
    f, tangent = tangents
    x, d = arrays(), directions()
    d = {other: d[other] if other == name else jnp.zeros_like(d[other]) for other in d}
    got, wanted = tangent(x, d), difference(f, x, d)
    for output in got:
        close(got[output], wanted[output], 1e-6, (name, output))


def test_reverse_mode_is_the_transpose_of_forward_mode(tangents):
    """`<ct, jvp(d)> = <vjp(ct), d>` for every output by itself and every leaf."""
    x, d = arrays(), directions()
    rng = np.random.default_rng(1)
    forward = tangents[1](x, d)
    weights = {name: jnp.asarray(rng.normal(size=y.shape)) for name, y in forward.items()}
    pull = jax.jit(lambda x, w: jax.vjp(outputs, x)[1](w)[0])
    for output, w in weights.items():
        only = {name: w if name == output else jnp.zeros_like(weights[name]) for name in weights}
        back = pull(x, only)
        total = sum(float(jnp.vdot(back[name], d[name])) for name in d)
        assert np.isclose(total, float(jnp.vdot(w, forward[output])), rtol=1e-8, atol=1e-9), output


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms(kind):
    """Gradients of the objective against their formulas; that in the reward is the occupancy to rounding."""
    got = {name: np.asarray(g) for name, g in gradient_of_the_objective(kind)(arrays()).items()}
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
    point = {"ends": jnp.asarray(rng.uniform(0, 0.3, (S, A))), "scale": jnp.asarray(rng.uniform(0.5, 2, S))}
    along = {name: jnp.asarray(0.1 * rng.normal(size=v.shape)) for name, v in point.items()}

    @jax.jit
    def f(y):
        rows = (1 - y["ends"])[..., None] * kernel
        m = rr.mdp(rows, reward, 0.9, x["initial"][0], termination=y["ends"])
        sol = rr.solve(m, rr.alpha(1.5, 2.0, state_scale=y["scale"]))
        return {"objective": sol.objective, "policy": sol.policy, "visits": rr.occupancy(m, sol.policy)}

    got, wanted = jax.jit(lambda y, d: jax.jvp(f, (y,), (d,))[1])(point, along), difference(f, point, along)
    for name in got:
        close(got[name], wanted[name], 1e-6, name)
    slope = jax.jit(jax.grad(lambda y: f(y)["objective"]))(point)
    total = sum(float(jnp.vdot(slope[name], along[name])) for name in point)
    assert np.isclose(total, float(got["objective"]), rtol=1e-9)


def test_second_order(tangents):
    """Products with the Hessian of the objective in all leaves at once against differences of the gradient."""
    x, d = arrays(), directions()

    def gradient(x):
        x = x | {"log_prior": jax.nn.log_softmax(x["log_prior"])}
        return jax.grad(lambda y: rr.solve(*build(y)).objective.sum())(x)

    along = {name: v for name, v in d.items() if name != "log_prior"} | {"log_prior": jnp.zeros((LANES, S, A))}
    got = jax.jit(lambda x, d: jax.jvp(gradient, (x,), (d,))[1])(x, along)
    wanted = difference(jax.jit(gradient), x, along)
    for name in got:
        close(got[name], wanted[name], 1e-6, name)


def test_hessian_in_the_reward_is_symmetric_and_positive_semidefinite():
    """Forward over reverse and reverse over forward, every alpha: V* is convex in the reward."""
    x = arrays()

    def objective(r, alpha):
        m, reg = build({**x, "reward": r, "alpha": alpha, "beta": jnp.asarray(2.0), "discount": jnp.asarray(0.9)})
        m = dataclasses.replace(m, initial=x["initial"][0])
        return rr.solve(m, dataclasses.replace(reg, log_prior=x["log_prior"][0])).objective

    hessians = [
        jax.jit(jax.vmap(second, (None, 0)))(x["reward"][0], x["alpha"])
        for second in (jax.jacfwd(jax.jacrev(objective)), jax.jacrev(jax.jacfwd(objective)))
    ]
    for h in hessians:
        h = np.asarray(h).reshape(LANES, S * A, S * A)
        assert np.abs(h - h.swapaxes(-1, -2)).max() <= 1e-10 * np.abs(h).max()
        eigenvalues = np.linalg.eigvalsh(h)
        assert (eigenvalues >= -1e-10 * eigenvalues.max()).all()
        assert (eigenvalues.max(-1) > 1e-3).all()
    close(hessians[0], hessians[1], 1e-10)


def test_conjugate_has_exact_second_derivatives():
    """Through `stop_gradient(argmax)` the gradient would be right and the Hessian 0."""
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.normal(size=5))
    for alpha in ALPHAS:
        reg = rr.alpha(alpha, 2.0, prior=jnp.asarray(rng.dirichlet(np.ones(5))))
        close(jax.grad(reg.conjugate)(q), reg.argmax(q), 1e-12)
        hessian = jax.hessian(reg.conjugate)(q)
        step = 1e-5
        rows = [(reg.argmax(q + step * e) - reg.argmax(q - step * e)) / (2 * step) for e in jnp.eye(5)]
        close(hessian, jnp.stack(rows), 1e-7, alpha)
        third = jax.jvp(jax.hessian(reg.conjugate), (q,), (jnp.ones(5),))[1]
        assert np.abs(third).max() <= 1e-9 * np.abs(hessian).max(), alpha  # shifts change nothing


def test_alpha_one_is_kl_to_rounding():
    x = arrays()
    kl = jax.jit(jax.grad(lambda b, lp: rr.solve(build(x)[0], rr.kl(b, log_prior=lp)).objective.sum(), (0, 1)))
    at = gradient_of_the_objective()(x | {"alpha": jnp.ones(LANES)})
    for a, b in zip(kl(x["beta"], x["log_prior"]), (at["beta"], at["log_prior"])):
        close(a, b, 1e-12)


def one_lane(**changes):
    """A function of (reward, log_prior, alpha, beta, discount) to the objective, and such arguments."""
    x = {name: jnp.asarray(v if name == "P" else v[4]) for name, v in leaves().items()} | changes

    def objective(reward, log_prior, alpha, beta, discount):
        changed = {"reward": reward, "log_prior": log_prior, "alpha": alpha, "beta": beta, "discount": discount}
        return rr.solve(*build(x | changed)).objective

    return objective, tuple(jnp.asarray(x[n]) for n in ("reward", "log_prior", "alpha", "beta", "discount"))


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
def corner_gradient():
    objective, _ = one_lane()
    return jax.jit(jax.value_and_grad(objective, argnums=tuple(range(5))))


@pytest.mark.parametrize("name", CORNERS)
def test_corners_are_finite_and_right(name):
    """Gradients exist, that in the reward is the occupancy, and steps along it change the value as it says."""
    _, point = one_lane(**{k: jnp.asarray(v) for k, v in CORNERS[name].items()})
    value, gradient = corner_gradient()(*point)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient), name
    discount = float(point[4])
    assert np.isclose(np.asarray(gradient[0]).sum() * (1 - discount), 1, rtol=1e-9)
    reward, log_prior, alpha, beta, discount = point
    x = {n: jnp.asarray(v if n == "P" else v[4]) for n, v in leaves().items()}
    changed = {"reward": reward, "log_prior": log_prior, "alpha": alpha, "beta": beta, "discount": discount}
    m, reg = build(x | changed)
    sol = rr.solve(m, reg)
    close(gradient[0], rr.occupancy(m, sol.policy), 1e-8, name)
    if "masked" in name:
        assert (np.asarray(gradient[0])[:, 0] == 0).all() and (np.asarray(gradient[1])[:, 0] == 0).all()


def test_edge_of_the_support():
    """alpha = 2 with an action exactly on the threshold: the value is C^1, the policy's derivative one-sided."""
    reg = rr.alpha(2.0, 10.0)
    q = jnp.linspace(0.0, 1.0, 6)
    policy = reg.argmax(q)
    close(jax.grad(reg.conjugate)(q), policy, 1e-14)
    jacobian = np.asarray(jax.jacrev(reg.argmax)(q))
    assert np.isfinite(jacobian).all()
    # Rounding decides on which side of the edge the fourth action is; the derivative is that of this side.
    edge = 1.0 if policy[3] > 0 else -1.0
    direction = jnp.zeros(6).at[3].set(edge)
    for step in (1e-4, 1e-5):
        close(jacobian @ direction, (reg.argmax(q + step * direction) - policy) / step, 1e-6)
    other = (reg.argmax(q - 1e-5 * direction) - policy) / -1e-5
    assert np.abs(other - jacobian @ direction).max() > 0.1  # there is a kink


def test_a_lost_lane_keeps_its_trouble_to_itself():
    x, gradient = arrays(), gradient_of_the_objective()
    clean = gradient(x)
    broken = gradient(x | {"reward": x["reward"].at[2, 0, 0].set(jnp.nan)})
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


@pytest.mark.parametrize("solver", [rr.ValueIteration(), rr.Newton(linear="direct")])
def test_every_solver_has_the_same_gradient(solver):
    """Also one that takes hundreds of steps: nothing is differentiated through them."""
    x = arrays()
    got, wanted = gradient_of_the_objective(solver=solver)(x), gradient_of_the_objective()(x)
    for name in x:
        close(got[name], wanted[name], 1e-9, name)


def test_warm_starts_are_not_differentiated():
    x = arrays()
    m, reg = build(x)
    sol = rr.solve(m, reg)

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(beta, init):
        return rr.solve(m, dataclasses.replace(reg, beta=beta), init=init).objective.sum()

    warm, nothing = gradient(x["beta"], sol.value)
    cold, _ = gradient(x["beta"], jnp.zeros_like(sol.value))
    close(warm, cold, 1e-10)
    assert (np.asarray(nothing) == 0).all()


def test_the_adjoint_reports_its_error(monkeypatch):
    """A gradient of zeros that is the relative error of the occupancy: small, or large where the solve was cut."""
    x = arrays()

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def differentiated(y, probe):
        return rr.solve(*build(y), adjoint_error=probe).objective.sum()

    probe = jnp.zeros(LANES)
    value, (gradient, error) = differentiated(x, probe)
    # That of the policy counts, optimal but for rounding: stiff for alpha < 0, by a root for alpha > 2.
    assert (0 <= np.asarray(error)).all() and (np.asarray(error) <= 1e-4).all()
    assert (np.asarray(error)[(ALPHAS >= 0) & (ALPHAS <= 2)] <= 1e-9).all()
    assert value == differentiated(x, probe + 1)[0]
    jax.clear_caches()
    monkeypatch.setattr(linear, "KRYLOV_STEPS", 1)
    monkeypatch.setattr(linear, "_ROUNDS", 1)
    other = differentiated(x, probe)[1][0]
    np.testing.assert_allclose(other["reward"], gradient["reward"], rtol=1e-8, atol=1e-10)
    # With no other way left either, there is no gradient.
    monkeypatch.setattr(elimination, "STATES", 0)
    monkeypatch.setattr(linear, "_SWEEPS", 0)
    jax.clear_caches()
    _, (poor, error) = differentiated(x, probe)
    jax.clear_caches()
    # (The gradient of an action that is never taken is 0 whatever the occupancy.)
    never = np.asarray(gradient["reward"]) == 0
    assert np.isinf(np.asarray(error)).all() and np.isnan(np.asarray(poor["reward"])[~never]).all()


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
    x = {name: jnp.asarray(v, jnp.float32) for name, v in leaves().items()}
    rows = x["P"].sum(-1, keepdims=True)
    x["P"] = x["P"] / rows
    got = gradient_of_the_objective()(x)
    wanted = gradient_of_the_objective()({n: v.astype(float) for n, v in x.items()})
    for name in got:
        assert got[name].dtype == jnp.float32
        close(got[name], wanted[name], 3e-5, name)
