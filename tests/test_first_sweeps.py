"""Plain sweeps before Newton's method, and several Krylov steps between two looks: what accelerators do, run here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import written_out
from oracle import solve as by_hand

import robustreg as rr
from robustreg.problems import generators
from robustreg.solvers import first_sweeps, krylov, methods


class Accelerated:
    """`jax.lax` on a platform that is no CPU."""

    def __init__(self, lax):
        self._lax = lax

    def __getattr__(self, name):
        return getattr(self._lax, name)

    @staticmethod
    def platform_dependent(*args, default, **platforms):
        return default(*args)


@pytest.fixture
def accelerated(monkeypatch):
    """Let first sweeps and Krylov solves take the branches for accelerators."""
    monkeypatch.setattr(first_sweeps, "lax", Accelerated(first_sweeps.lax))
    monkeypatch.setattr(krylov, "steps_per_turn", lambda: 4)
    jax.clear_caches()
    yield
    jax.clear_caches()


def products(mdp, betas, **options):
    """Products with chains of policies that each lane takes by itself."""
    counts = []

    def spied(apply, *rest):
        def counted(x):
            jax.debug.callback(lambda: counts.append(1))
            return apply(x)

        return bicgstab(counted, *rest)

    bicgstab = krylov.bicgstab
    krylov.bicgstab = spied
    jax.clear_caches()  # programs of others are not spied upon
    try:
        run = jax.jit(lambda beta: rr.solve(mdp, rr.kl(beta), rr.Newton(**options), tol=1e-6))
        each = []
        for beta in betas:
            counts.clear()
            found = jax.block_until_ready(run(beta))
            jax.effects_barrier()
            assert int(found.status) == 0
            each.append(len(counts))
    finally:
        krylov.bicgstab = bicgstab
        jax.clear_caches()
    return np.array(each)


def test_sweeps_save_products():
    grid = generators.slippery_grid(16, 0.99)
    betas = np.geomspace(0.1, 300, 6)
    without, with_sweeps = (products(grid, betas, sweeps=n) for n in (0, 64))
    assert with_sweeps.mean() < 0.6 * without.mean()
    assert with_sweeps.max() < 0.8 * without.max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_accelerator_gives_certified_values(accelerated, dtype):
    grid = generators.slippery_grid(5, 0.99, dtype=dtype)
    betas = np.array([0.1, 2.0, 300.0], dtype)
    rows, reward = written_out(grid.transitions), np.asarray(grid.reward, float)
    for order in (1.0, 1.5) if dtype == np.float32 else (1.0,):
        found = rr.solve(grid, rr.kl(betas) if order == 1 else rr.alpha(dtype(order), betas))
        assert (np.asarray(found.status) == int(rr.Status.CONVERGED)).all()
        for lane, beta in enumerate(betas):
            value = by_hand(rows, reward, float(grid.discount), order, float(beta), np.full((25, 4), 0.25))[0]
            assert (np.asarray(found.lower[lane], float) <= value + 1e-9).all()
            assert (np.asarray(found.upper[lane], float) >= value - 1e-9).all()
    # A start of one's own is taken as it is.
    warm = rr.solve(grid, rr.kl(betas), init=rr.solve(grid, rr.kl(betas)))
    assert int(warm.steps.max()) <= 3


def test_lanes_that_overflow_or_are_broken_leave_the_others_alone(accelerated):
    grid = generators.slippery_grid(4, 0.99)
    huge = jnp.full_like(grid.reward, 1e307)
    rewards = jnp.stack([grid.reward, grid.reward.at[0, 0].set(jnp.nan), huge, grid.reward])
    found = rr.solve(dataclasses.replace(grid, reward=rewards), rr.kl(2.0))
    alone = rr.solve(dataclasses.replace(grid, reward=rewards[:1]), rr.kl(2.0))
    assert found.status[1] == int(rr.Status.NONFINITE_INPUT)
    plain = rr.solve(dataclasses.replace(grid, reward=huge), rr.kl(2.0), rr.Newton(sweeps=0))
    assert int(found.status[2]) == int(plain.status) != 0
    for lane in (0, 3):
        assert found.status[lane] == 0
        np.testing.assert_array_equal(found.value[lane], found.value[0])
    np.testing.assert_allclose(found.value[0], alone.value[0], atol=float(found.upper[0, 0] - found.lower[0, 0]))


def test_sweeps_are_steps(accelerated):
    grid, far = generators.slippery_grid(4, 0.99), generators.slippery_grid(4, 0.5)
    plain, own = (rr.solve(grid, rr.kl(2.0), rr.Newton(sweeps=n), tol=1e-6) for n in (0, 10))
    default = rr.solve(grid, rr.kl(2.0), tol=1e-6)
    assert 10 < int(own.steps) < 10 + int(plain.steps)
    assert 16 < int(default.steps) < 16 + int(plain.steps)
    # Two horizons are enough, and a cap on steps is one on sweeps.
    assert int(rr.solve(far, rr.kl(2.0), tol=1e-6).steps) < 4 + int(plain.steps)
    short = rr.solve(grid, rr.kl(2.0), tol=1e-6, max_steps=5)
    assert int(short.steps) == 5
    assert int(short.status) == int(rr.Status.MAX_STEPS)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="sweeps >= 0"):
        rr.Newton(sweeps=-1)


@pytest.mark.parametrize("most", [1, 6, 7, 200])
def test_krylov_steps_between_two_looks_change_nothing(accelerated, monkeypatch, most):
    rng = np.random.default_rng(0)
    chain = jnp.asarray(rng.dirichlet(np.full(30, 0.1), 30) * 0.99)
    b = jnp.asarray(rng.standard_normal((30, 3)))
    size, reduction = jnp.max(jnp.abs(b), axis=0), jnp.asarray([1e-1, 1e-4, 1e-12])

    def solve():
        return krylov.bicgstab(lambda x: chain @ x, b, size, reduction, most, most)

    several = solve()
    monkeypatch.setattr(krylov, "steps_per_turn", lambda: 1)
    one = solve()
    np.testing.assert_allclose(several, one, rtol=1e-13, atol=1e-13)


def test_a_user_s_own_solver_does_not_sweep():
    assert methods.chosen(None, warm=True) == rr.Newton(sweeps=0)
    assert methods.chosen(rr.Newton(sweeps=3), warm=True) == rr.Newton(sweeps=3)
    assert methods.chosen(rr.ValueIteration(), warm=True) == rr.ValueIteration()
