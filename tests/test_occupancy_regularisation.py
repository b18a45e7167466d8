"""Regularised joint occupancies: optimality proved in NumPy by weak duality, and what follows from it.

A feasible occupancy whose value is that of the dual at some V is optimal, and nothing of the library is needed to see
it: flow, divergence and conjugate are the oracle's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import optimize

import robustreg as rr
from robustreg.solvers import joint_bounds, joint_dual

S, A, G = 5, 3, 0.9
ALPHA = np.array([1.0, 0.5, 1.5, 2.0, 0.0, 3.0, 1.0, 1.0])
BETA = np.array([1.0, 2.0, 3.0, 1.0, 1.0, 2.0, 30.0, 300.0])


def drawn(seed=0):
    """P `[S, A, S]`, reward `[S, A]`, initial `[S]` and reference `[S, A]`."""
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(S, 0.5), (S, A))
    return P, rng.normal(size=(S, A)), rng.dirichlet(np.ones(S)), rng.dirichlet(np.ones(S * A)).reshape(S, A)


def problem(P, reward, initial, dtype: type = np.float64):
    return rr.mdp(rr.Dense(jnp.asarray(P, dtype)), reward.astype(dtype), G, initial=initial.astype(dtype))


def regulariser(dtype: type = np.float64):
    return rr.alpha(alpha=ALPHA.astype(dtype), beta=BETA.astype(dtype))


def primal(mu, reward, mu0):
    """`<mu, r> - D[mu0 : mu]/beta` of each lane."""
    flat = mu.reshape(len(mu), -1)
    return (flat * reward.ravel()).sum(-1) - oracle.divergence(ALPHA, mu0.ravel(), flat) / BETA


def ahead(P, reward, value):
    """`r + g P V - V` of each lane, `[B, S, A]`."""
    return reward + G * np.einsum("sat,bt->bsa", P, value) - value[..., None]


def dual(P, reward, initial, mu0, value):
    x = ahead(P, reward, value).reshape(len(value), -1)
    return (1 - G) * value @ initial + oracle.conjugate(ALPHA, BETA, mu0.ravel(), x)


def flow(P, initial, mu):
    """By how much each state's balance is off."""
    return mu.sum(-1) - (1 - G) * initial - G * np.einsum("bsa,sat->bt", mu, P)


@pytest.fixture(scope="module")
def solved():
    P, reward, initial, mu0 = drawn()
    m, reg = problem(P, reward, initial), regulariser()
    return P, reward, initial, mu0, m, reg, rr.solve_occupancy(m, reg, mu0).raise_if_failed()


def test_optimal_by_weak_duality(solved):
    P, reward, initial, mu0, _, _, sol = solved
    mu, value = np.asarray(sol.occupancy), np.asarray(sol.value)
    assert np.abs(flow(P, initial, mu)).max() <= 1e-12 and (mu >= 0).all()
    assert np.abs(mu.sum((-1, -2)) - 1).max() <= 1e-13
    best, least = primal(mu, reward, mu0), dual(P, reward, initial, mu0, value)
    assert np.abs(best - least).max() <= 1e-11
    assert np.abs(np.asarray(sol.objective) - least).max() <= 1e-11
    assert (np.asarray(sol.lower) <= least + 1e-14).all() and (np.asarray(sol.upper) >= best - 1e-14).all()
    assert np.asarray(sol.gap).max() <= 1e-11
    assert np.abs(np.asarray(sol.policy) - mu / mu.sum(-1, keepdims=True)).max() <= 1e-12
    # The constant of V.
    assert np.abs((1 - G) * value @ initial - least).max() <= 1e-11


def test_a_solver_of_another_kind_finds_the_same(solved):
    P, reward, initial, mu0, _, _, sol = solved
    balance = (np.eye(S)[:, None] - G * P).reshape(S * A, S).T
    constraint = {"type": "eq", "fun": lambda x: balance @ x - (1 - G) * initial, "jac": lambda x: balance}
    start = oracle.occupancy(P[None], initial, np.array([G]), np.full((1, S, A), 1 / A)).ravel() * (1 - G)
    for k in (0, 1, 2, 3):

        def loss(x, k=k):
            cost = oracle.divergence(ALPHA[k], mu0.ravel(), np.maximum(x, 0)) / BETA[k]
            return float(cost - x @ reward.ravel())

        found = optimize.minimize(
            loss, start, method="SLSQP", bounds=[(1e-12, 1)] * (S * A), constraints=[constraint],
            options={"maxiter": 300, "ftol": 1e-14},
        )  # fmt: skip
        assert abs(-found.fun - float(sol.objective[k])) <= 1e-6


def test_the_perturbation_is_the_coupled_worst_case(solved):
    P, reward, _, mu0, _, _, sol = solved
    mu, dr, value = (np.asarray(x) for x in (sol.occupancy, sol.perturbation, sol.value))
    flat, pairs = mu.reshape(len(mu), -1), dr.reshape(len(mu), -1)
    worst = oracle.worst_case(ALPHA, BETA, mu0.ravel(), flat)
    assert np.abs((pairs - worst)[flat > 1e-9]).max() <= 1e-8
    # On the boundary of the set, and it takes off what the divergence costs.
    assert np.abs(oracle.conjugate(ALPHA, BETA, mu0.ravel(), pairs)).max() <= 1e-10
    assert np.abs((flat * pairs).sum(-1) - oracle.divergence(ALPHA, mu0.ravel(), flat) / BETA).max() <= 1e-10
    # Indifference: perturbed, every pair is worth nothing more than its state, and every policy earns the optimum.
    assert np.abs(ahead(P, reward, value) - dr).max() <= 1e-11
    policy = np.random.default_rng(1).dirichlet(np.ones(A), (8, S))
    visits = oracle.occupancy(P, drawn()[2], np.full(8, G), policy) * (1 - G)
    assert np.abs((visits * (reward - dr)).sum((-1, -2)) - np.asarray(sol.objective)).max() <= 1e-11
    # KL in closed form.
    logs = np.log((mu0 * np.exp(BETA[0] * (ahead(P, reward, value)[0]))).sum()) / BETA[0]
    assert abs(logs) <= 1e-12 and np.abs(dr[0] - np.log(mu[0] / mu0) / BETA[0]).max() <= 1e-11


def test_reference_with_zeros():
    """Pairs left out, a state nobody comes to and one that leads nowhere; with alpha <= 0 no pair may be spared."""
    P, reward, initial, mu0 = drawn(1)
    initial[4] = 0
    initial /= initial.sum()
    P[:4, :, 4] = 0
    mu0[2, 1] = 0
    # Whoever does 0 in state 1 comes to state 3, where the reference has nothing.
    mu0[3], initial[3] = 0, 0
    P[:, 1:, 3], P[(0, 2), 0, 3], P[1, 0, 3] = 0, 0, 0.5
    P, initial, mu0 = P / P.sum(-1, keepdims=True), initial / initial.sum(), mu0 / mu0.sum()
    sol = rr.solve_occupancy(problem(P, reward, initial), regulariser(), mu0)
    fine = ALPHA > 0
    assert np.asarray(sol.converged).tolist() == fine.tolist()
    assert (np.asarray(sol.status)[~fine] == rr.Status.NONFINITE_INPUT).all()
    assert np.isnan(np.asarray(sol.value)[~fine]).all()
    mu = np.where(fine[:, None, None], np.asarray(sol.occupancy), 0)
    out = np.zeros((S, A), bool)
    out[2, 1] = out[1, 0] = True
    out[3:] = True
    assert (mu[:, out] == 0).all() and np.abs(flow(P, initial, mu))[fine].max() <= 1e-12
    best = primal(np.asarray(sol.occupancy), reward, mu0)[fine]
    assert np.abs(best - np.asarray(sol.objective)[fine]).max() <= 1e-10
    assert (np.asarray(sol.lower)[fine] <= best + 1e-13).all() and (np.asarray(sol.upper)[fine] >= best - 1e-13).all()
    # Unvisited: the reference's conditional, and uniform where it has none.
    policy = np.asarray(sol.policy)[0]
    assert policy[4] == pytest.approx(mu0[4] / mu0[4].sum()) and policy[3] == pytest.approx(np.full(A, 1 / A))
    # No policy stays inside.
    nowhere = mu0.copy()
    nowhere[0] = 0
    lost = rr.solve_occupancy(problem(P, reward, np.eye(S)[0]), regulariser(), nowhere / nowhere.sum())
    assert (np.asarray(lost.status) == rr.Status.NONFINITE_INPUT).all() and np.isnan(np.asarray(lost.upper)).all()
    with pytest.raises(rr.SolveError, match="give the reference every state"):
        lost.raise_if_failed()


def test_gradients(solved):
    P, _, initial, mu0, m, reg, sol = solved
    rng = np.random.default_rng(2)
    weight = {name: rng.normal(size=np.shape(getattr(sol, name)[0])) for name in ("value", "policy", "perturbation")}
    keep = jnp.asarray([1, 1, 1, 0, 1, 0, 1, 0], float)  # lanes in which no pair comes or goes on the way

    def outputs(reward, beta, P, mu0, discount):
        mdp = rr.mdp(rr.Dense(P), reward, discount, initial=jnp.asarray(initial))
        x = rr.solve_occupancy(mdp, dataclasses.replace(reg, beta=beta), mu0)
        mixed = sum(jnp.sum(getattr(x, name) * w[None], axis=tuple(range(1, w.ndim + 1))) for name, w in weight.items())
        return jnp.sum(keep * (mixed + x.objective))

    leaves = (m.reward, reg.beta, jnp.asarray(P), jnp.asarray(mu0), jnp.asarray(G))
    ways = [rng.normal(size=x.shape) for x in leaves]
    ways[2] = P * (ways[2] - (P * ways[2]).sum(-1, keepdims=True))
    ways[3] = mu0 * (ways[3] - (mu0 * ways[3]).sum())
    program = jax.jit(jax.value_and_grad(outputs, (0, 1, 2, 3, 4)))
    gradients = program(*leaves)[1]
    for i, way in enumerate(ways):
        step = 1e-5 if i < 4 else 1e-6
        up, down = (program(*(x + t * way if i == j else x for j, x in enumerate(leaves)))[0] for t in (step, -step))
        slope = float(up - down) / (2 * step)
        assert float(jnp.vdot(gradients[i], way)) == pytest.approx(slope, rel=1e-4, abs=1e-6), i


def test_first_and_second_derivatives_of_the_optimum(solved):
    """The gradient in the reward is the occupancy, and the Hessian symmetric and positive semidefinite."""
    _, reward, initial, mu0, m, _, _ = solved

    def optimum(reward):
        return rr.solve_occupancy(m.replace(reward=reward), rr.kl(2.0), mu0).objective

    hessian = np.asarray(jax.jit(jax.hessian(optimum))(m.reward)).reshape(S * A, S * A)
    assert np.abs(hessian - hessian.T).max() <= 1e-10 and np.linalg.eigvalsh(hessian).min() >= -1e-10
    slope = jax.jit(jax.grad(optimum))
    visits = rr.solve_occupancy(m, rr.kl(2.0), mu0).occupancy
    assert np.abs(np.asarray(slope(m.reward) - visits)).max() <= 1e-12
    step = 1e-5 * np.eye(S * A)[4].reshape(S, A)
    change = (slope(m.reward + step) - slope(m.reward - step)) / 2e-5
    assert np.abs(np.asarray(change).ravel() - hessian[4]).max() <= 1e-7
    assert np.abs(hessian.sum(1)).max() <= 1e-10  # a constant reward changes no occupancy


def test_float32_bounds_hold_the_truth(solved):
    P, reward, initial, mu0, _, _, _ = solved
    sol = rr.solve_occupancy(problem(P, reward, initial, np.float32), regulariser(np.float32), mu0.astype(np.float32))
    assert sol.value.dtype == sol.upper.dtype == jnp.float32
    # The problem that was solved: its numbers are rounded.
    P, reward, initial, mu0 = (np.asarray(x.astype(np.float32), float) for x in (P, reward, initial, mu0))
    P, initial, mu0 = P / P.sum(-1, keepdims=True), initial / initial.sum(), mu0 / mu0.sum()
    exact = rr.solve_occupancy(problem(P, reward, initial), regulariser(), mu0).raise_if_failed()
    assert (np.asarray(sol.lower, float) <= np.asarray(exact.upper)).all()
    assert (np.asarray(sol.upper, float) >= np.asarray(exact.lower)).all()
    assert np.asarray(sol.gap).max() <= 1e-4 and np.asarray(sol.converged).sum() >= 7


def test_batches_and_tolerance(solved):
    """Rewards against regularisers, against each alone; a lane in company has the same bits."""
    P, reward, initial, mu0, _, reg, sol = solved
    more = np.stack([reward, 2 * reward, -reward])[:, None]
    m = rr.mdp(rr.Dense(jnp.asarray(P)), more, G, initial=initial)
    both = rr.solve_occupancy(m, reg, mu0, tol=1e-9).raise_if_failed()
    assert both.value.shape == (3, 8, S) and both.occupancy.shape == (3, 8, S, A)
    assert np.abs(np.asarray(both.objective[0] - sol.objective)).max() <= 2e-9 and (np.asarray(both.gap) <= 2e-9).all()
    mu = np.asarray(both.occupancy)
    for i in range(3):
        assert np.abs(primal(mu[i], more[i, 0], mu0) - np.asarray(both.objective[i])).max() <= 1e-10
    # One step does not do, and says so; its bounds hold all the same.
    early = rr.solve_occupancy(m, reg, mu0, tol=1e-9, max_steps=1)
    assert (np.asarray(early.status) == rr.Status.MAX_STEPS).any()
    assert (np.asarray(early.lower) <= np.asarray(both.upper)).all()
    assert (np.asarray(early.upper) >= np.asarray(both.lower)).all()


@pytest.mark.parametrize("states, written", [(40, True), (100, True), (40, False)])
def test_many_states(monkeypatch, states, written):
    """Bounds from the policy's own occupancy: by elimination in blocks, and where the chain is not written out."""
    if not written:
        monkeypatch.setattr(joint_bounds.elimination, "STATES", 0)
        states += 1  # another shape, so another program
    rng = np.random.default_rng(3)
    P, reward = rng.dirichlet(np.full(states, 0.05), (states, A)), rng.normal(size=(states, A))
    initial, mu0 = rng.dirichlet(np.ones(states)), np.full((states, A), 1 / (states * A))
    sol = rr.solve_occupancy(problem(P, reward, initial), regulariser(), mu0).raise_if_failed()
    best = primal(np.asarray(sol.occupancy), reward, mu0)
    least = dual(P, reward, initial, mu0, np.asarray(sol.value))
    assert np.abs(best - least).max() <= 1e-8 and np.asarray(sol.gap).max() <= 1e-6
    assert (np.asarray(sol.lower) <= least + 1e-12).all() and (np.asarray(sol.upper) >= best - 1e-12).all()


def test_conjugate_gradients_where_there_are_many_states(monkeypatch, solved):
    *_, sol = solved
    P, reward, initial, mu0 = drawn()
    monkeypatch.setattr(joint_dual, "_DENSE", 0)
    reg = rr.alpha(alpha=ALPHA[:7], beta=BETA[:7])  # another shape, so another program
    found = rr.solve_occupancy(problem(P, reward, initial), reg, mu0, tol=1e-8).raise_if_failed()
    assert np.abs(np.asarray(found.objective) - np.asarray(sol.objective)[:7]).max() <= 2e-8


def test_arguments(solved, tmp_path):
    P, reward, initial, mu0, m, reg, sol = solved
    assert rr.load(rr.save(tmp_path / "x", sol)).objective.tolist() == sol.objective.tolist()
    with pytest.raises(ValueError, match="pass prior=None"):
        rr.solve_occupancy(m, rr.kl(1.0, prior=np.full(A, 1 / A)), mu0)
    with pytest.raises(ValueError, match="state_scale=None"):
        rr.solve_occupancy(m, rr.kl(1.0, state_scale=np.ones(S)), mu0)
    with pytest.raises(TypeError, match=r"rr\.kl"):
        rr.solve_occupancy(m, rr.entropy(1.0), mu0)
    with pytest.raises(ValueError, match="divide it by its sum"):
        rr.solve_occupancy(m, reg, 2 * mu0)
    with pytest.raises(ValueError, match="reference"):
        rr.solve_occupancy(m, reg, mu0.T)
    with pytest.raises(ValueError, match="must not be negative"):
        rr.solve_occupancy(m, reg, mu0 - 2 * mu0.max() * np.eye(S)[:, :A])
    with pytest.raises(ValueError, match="termination"):
        ends = rr.mdp(rr.Dense(jnp.asarray(P / 2)), reward, G, termination=np.full((S, A), 0.5))
        rr.solve_occupancy(ends, reg, mu0)
