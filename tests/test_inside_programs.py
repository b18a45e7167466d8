"""Inside the caller's program: shard_map with its checks, exported programs, closures over tracers, forks."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import written_out
from jax import export
from jax.sharding import Mesh, PartitionSpec

import robustreg as rr
from robustreg._core import forks

RNG = np.random.default_rng(0)
P = RNG.dirichlet(np.ones(6), (6, 2))
REWARD = RNG.normal(size=(6, 2))
BETAS = np.array([0.5, 2.0])


def _expect(v, p):
    return jnp.einsum("sat,t->sa", p, v)


KINDS = {
    "dense": lambda: rr.mdp(P, REWARD, 0.9),
    "successors": lambda: rr.problems.garnet(6, 2, 3, 0.9),
    "function": lambda: rr.mdp(rr.MatrixFree(_expect, n_states=6, n_actions=2, parameters=jnp.asarray(P)), REWARD, 0.9),
    "ends": lambda: rr.mdp(0.8 * P, REWARD, 0.95, termination=np.full((6, 2), 0.2)),
}


def sharded(function):
    """The function of an array, its leading axis over the devices, under JAX's default checks."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=True)
    )


def agree(function, argument, atol=1e-9, reference=None):
    """Sharded results are those of a reference, if there is none those without devices."""
    reference = jax.jit(function)(argument) if reference is None else reference
    found = sharded(function)(argument)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(got, want, atol=atol)


def by_oracle(m, beta, alpha: Any = 1.0, scale: Any = 1.0):
    """Value, policy and objective of each strength or scale of the reward, for which nothing is compiled."""
    beta, alpha, scale = np.broadcast_arrays(beta, alpha, scale)
    reward, g = scale[:, None, None] * np.asarray(m.reward), np.broadcast_to(np.asarray(m.discount), beta.shape)
    prior = np.full((m.n_states, m.n_actions), 1 / m.n_actions)
    value, policy = oracle.solve(written_out(m.transitions), reward, g, alpha, beta, prior)
    return value, policy, value @ np.asarray(m.initial)


@pytest.mark.parametrize("kind", ["successors", "ends"])
def test_shard_map_over_strengths(kind):
    """Solve, its gradient and its certificate where the strengths vary over devices, and the MDP does not."""
    m = KINDS[kind]()

    def objective(beta):
        return rr.solve(m, rr.kl(beta)).objective

    def everything(beta):
        s = rr.solve(m, rr.kl(beta))
        return s.value, s.policy, jax.vmap(jax.grad(objective))(beta), rr.certify(m, rr.kl(beta), s).lower

    value, policy, _ = by_oracle(m, BETAS)
    slope = (by_oracle(m, BETAS + 1e-4)[2] - by_oracle(m, BETAS - 1e-4)[2]) / 2e-4
    agree(everything, BETAS, 1e-7, (value, policy, slope, value))


def test_shard_map_over_rewards():
    """The MDP itself varies over devices: alpha, fixed policies, visits, the unregularised optimum."""
    m = KINDS["dense"]()
    policy = jnp.full((6, 2), 0.5)

    def everything(scale):
        mine = dataclasses.replace(m, reward=scale[:, None, None] * m.reward[None])
        s = rr.solve(mine, rr.alpha(2.0, 1.5))
        fixed = rr.evaluate(mine, policy), rr.evaluate(mine, policy, rr.kl(1.0)), rr.nominal_optimum(mine)
        return s.objective, *fixed, rr.occupancy(mine, s.policy), rr.guarantee(mine, rr.kl(1.0), s.policy)

    scale = np.array([0.5, 1.0])
    _, best, objective = by_oracle(m, 1.5, 2.0, scale)
    g, initial, rewards = np.full(2, 0.9), np.asarray(m.initial), scale[:, None, None] * REWARD
    fixed = oracle.evaluate(P, rewards, g, np.full((2, 6, 2), 0.5))
    optimum = np.stack([oracle.optimal_value(P, reward, 0.9) for reward in rewards])
    promise = rr.guarantee(dataclasses.replace(m, reward=jnp.asarray(rewards)), rr.kl(1.0), best)
    # (The uniform policy is the prior, and costs nothing.)
    reference = objective, fixed, fixed, optimum, oracle.occupancy(P, initial, g, best), promise
    agree(everything, scale, 1e-7, reference)


def test_shard_map_of_one_step_and_the_game():
    m = KINDS["dense"]()
    agree(lambda v: m.transitions.expect(v), np.ones((2, 6)))
    agree(lambda v: KINDS["function"]().transitions.expect(v), np.ones((2, 6)))
    agree(lambda mu: KINDS["successors"]().transitions.push(mu), np.ones((2, 6, 2)))
    agree(lambda x: (rr.critical_beta(rr.alpha(1.0, 1.5), x), rr.slack(rr.kl(2.0), x)), RNG.normal(size=(2, 6, 2)))
    agree(lambda beta: rr.solve_game(m, rr.kl(beta), tol=1e-2).primal, BETAS)


def test_a_program_of_an_mdp_is_exported_and_read_again():
    """Serialised with an MDP as its argument, names and all, and a Solution as its result."""
    pytest.importorskip("flatbuffers")
    rows = [
        ("a", "go", "b", 1.0, 1.0),
        ("b", "go", "c", 1.0, 0.0),
        ("b", "stay", "b", 1.0, 0.1),
        ("c", "go", "a", 1.0, 0),
    ]
    m = rr.from_table(rows, 0.9)
    reg = rr.kl(BETAS)
    program = export.export(jax.jit(rr.solve))(m, reg)
    again = export.deserialize(program.serialize())
    found, direct = again.call(m, reg), rr.solve(m, reg)
    assert isinstance(found, rr.Solution)
    np.testing.assert_allclose(found.value, direct.value, rtol=1e-12)
    grid = rr.problems.slippery_grid(3, 0.9)
    text = export.export(jax.jit(lambda m: m))(grid).serialize()
    back: Any = export.deserialize(text).call(grid)
    assert back.grid == (3, 3)


@pytest.mark.parametrize("kind", ["dense", "successors", "ends"])
def test_a_program_for_any_number_of_lanes(kind):
    m = KINDS[kind]()
    (n,) = export.symbolic_shape("n")
    lanes = jax.ShapeDtypeStruct((n,), BETAS.dtype)
    program = export.export(jax.jit(lambda beta: rr.solve(m, rr.kl(beta)).objective))(lanes)
    for beta in (BETAS, np.linspace(0.1, 3, 7)):
        np.testing.assert_allclose(program.call(beta), by_oracle(m, beta)[2], rtol=1e-9)


def test_functions_that_close_over_traced_arrays():
    """A MatrixFree made inside jit and grad from traced arrays, whole numbers among them, with and without its push."""

    def objective(p, order, push):
        function = rr.MatrixFree(
            lambda v: jnp.einsum("sat,t->sa", p, v[order]),
            (lambda mu: jnp.zeros(6, p.dtype).at[order].add(jnp.einsum("sat,sa->t", p, mu))) if push else None,
            n_states=6,
            n_actions=2,
        )
        return rr.solve(rr.MDP(function, *(getattr(m, name) for name in names)), rr.kl(1.0)).objective

    m, order = KINDS["dense"](), np.array([3, 1, 2, 0, 4, 5])
    names = ("reward", "discount", "complement", "initial")
    moved = np.zeros_like(P)
    moved[..., order] = P
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want, slope = jax.value_and_grad(lambda p: rr.solve(rr.mdp(p, REWARD, 0.9), rr.kl(1.0)).objective)(moved)
    both = jax.value_and_grad(objective)
    for push in (False, True):
        # (Of the two, one inside jit as well.)
        run = jax.jit(both, static_argnums=2) if push else both
        found, got = run(jnp.asarray(P), jnp.asarray(order), push)
        np.testing.assert_allclose(found, want, rtol=1e-9)
        np.testing.assert_allclose(got, np.asarray(slope)[..., order], rtol=1e-7, atol=1e-10)
    lanes = jax.jit(jax.vmap(lambda p: objective(p, order, False)))(np.stack([P, P[:, ::-1]]))
    np.testing.assert_allclose(lanes[0], want, rtol=1e-9)


def test_masks_pass_where_infinities_are_looked_for():
    certain = np.array([1.0, 0.0])
    with jax.debug_infs(True):
        m = rr.problems.bandit([1.0, 2.0])
        for reg in (rr.kl(1.0, prior=certain), rr.alpha(1.0, 1.5, prior=certain)):
            assert rr.solve(m, reg).converged
            reg.log_policy(np.array([1.0, 2.0]))
        mask = np.array([[True, False], [True, True]])
        assert rr.solve(rr.mdp(np.full((2, 2, 2), 0.5), np.ones((2, 2)), 0.9, available=mask), rr.kl(1.0)).converged


def test_a_forked_process_is_told_so_instead_of_waiting_for_ever(monkeypatch, tmp_path):
    """What a child of this process would meet: each public function says so before it asks JAX for anything."""
    m, reg, r = rr.problems.bandit([1.0, 2.0]), rr.kl(1.0), np.array([1.0, 2.0])
    sol = rr.solve(m, reg)
    monkeypatch.setattr(forks, "_forked", False)
    forks._in_child()
    calls = [
        lambda: rr.solve(m, reg),
        lambda: rr.sweep(m, reg, {"beta": [1.0, 2.0]}, out=tmp_path / "sweep"),
        lambda: rr.solve_average(m, reg),
        lambda: rr.solve_horizon(m, reg, 3),
        lambda: rr.solve_occupancy(m, reg, reference=np.full((1, 2), 0.5)),
        lambda: rr.solve_game(m, reg),
        lambda: rr.certify(m, reg, sol),
        lambda: rr.guarantee(m, reg, sol.policy),
        lambda: rr.calibrate(reg, np.ones((3, 1, 2)), 0.5),
        lambda: rr.evaluate(m, sol.policy),
        lambda: rr.occupancy(m, sol.policy),
        lambda: rr.nominal_optimum(m),
        lambda: rr.slack(reg, sol.perturbation),
        lambda: rr.worst_case(reg, sol.policy),
        lambda: rr.aggregated_slack(m, reg, sol.policy, sol.perturbation),
        lambda: rr.critical_beta(reg, sol.perturbation),
        lambda: rr.stack([(m, reg), (m, reg)]),
        lambda: rr.shard(m),
        lambda: rr.restricted(reg, np.array([True, False])),
        lambda: rr.kl(2.0),
        lambda: rr.alpha(2.0, 0.5),
        lambda: rr.entropy(1.0),
        lambda: rr.tsallis(1.0, 2.0),
        lambda: rr.norm_ball(1.0),
        lambda: rr.from_table([(0, 0, 0, 1.0, 1.0)], discount=0.9),
        lambda: rr.losses.fenchel_young(reg, r, 0),
        lambda: rr.losses.log_ratio(r, r),
        lambda: reg.conjugate(r),
        lambda: m.replace(reward=np.ones((1, 2))),
        rr.problems.chain,
        lambda: sol.gap,
        lambda: sol.converged,
        lambda: repr(sol),
        sol.raise_if_failed,
        lambda: sol.where_converged(sol.objective),
        lambda: sol.extrapolated(sol),
    ]
    with jax.transfer_guard("disallow_explicit"):  # in a real child, what would wait for ever
        for call in calls:
            with pytest.raises(RuntimeError, match="spawn"):
                call()
