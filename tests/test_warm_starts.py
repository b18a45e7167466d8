"""Solves that begin where others ended: at a value, at a whole solution and its visits, at a guess of the next one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import written_out

import robustreg as rr
from robustreg.solvers import krylov, linear

GRID = rr.problems.slippery_grid(6, 0.95, dtype=np.float64)
REG = rr.kl(4.0)


def moved(by, m=GRID):
    """A problem whose reward is another one by about `by`."""
    noise = np.random.default_rng(0).normal(size=m.reward.shape)
    return m.replace(reward=m.reward + by * noise)


@pytest.mark.parametrize("reg", [REG, rr.alpha(1.5, 4.0)], ids=["kl", "alpha"])
def test_visits_are_the_occupancy_of_the_policy(reg):
    sol: Any = rr.solve(GRID, reg, visits=True)
    rows, start = written_out(GRID.transitions), np.asarray(GRID.initial)
    right = oracle.occupancy(rows, start, 0.95, np.asarray(sol.policy)).sum(-1)
    np.testing.assert_allclose(sol.visits, right, rtol=1e-10)
    assert rr.solve(GRID, reg).visits is None


def test_lanes_have_visits_of_their_own_and_failed_ones_none():
    reward = np.stack([GRID.reward, moved(0.1).reward, np.full(GRID.reward.shape, np.nan)])
    sol: Any = jax.jit(lambda reward: rr.solve(GRID.replace(reward=reward), REG, visits=True))(reward)
    for i in range(2):
        alone: Any = rr.solve(GRID.replace(reward=reward[i]), REG, visits=True)
        np.testing.assert_allclose(sol.visits[i], alone.visits, rtol=1e-10)
    assert np.isnan(sol.visits[2]).all()
    # Nor do the visits of a lane that had failed spoil the next solve of it.
    again: Any = rr.solve(GRID, REG, init=dataclasses.replace(sol, value=jnp.nan_to_num(sol.value)))
    assert bool(again.converged.all())
    np.testing.assert_allclose(again.visits, jnp.broadcast_to(again.visits[:1], (3, 36)), rtol=1e-9)


@pytest.mark.parametrize("tol", [1e-6, None])
@pytest.mark.parametrize("start", ["value", "solution", "guess", "wrong"])
def test_gradients_do_not_depend_on_where_a_solve_began(start, tol):
    """Of the objective, whose backward pass begins at the visits, and of a loss that it does not begin well for."""
    first, second = (rr.solve(moved(by), REG, tol=tol, visits=True) for by in (0.0, 0.01))
    wild = jnp.asarray(np.random.default_rng(1).normal(size=36) * 1e6)
    init = {
        "value": second.value,
        "solution": second,
        "guess": second.extrapolated(first),
        "wrong": dataclasses.replace(second, visits=wild),
    }[start]

    def losses(reward, init):
        sol = rr.solve(GRID.replace(reward=reward), REG, tol=tol, init=init)
        return jnp.stack([sol.objective, jnp.sum(sol.policy[:, 0] ** 2), sol.value[3] - sol.value[30]])

    reward = moved(0.02).reward
    warm, cold = (jax.jit(jax.jacrev(losses))(reward, x) for x in (init, None))
    np.testing.assert_allclose(warm, cold, atol=(1e-3 if tol else 1e-9) * np.abs(cold).max())
    # The other mode, which has nothing to begin at, and nothing of the start is differentiated.
    forward = jax.jit(jax.jacfwd(losses))(reward, init)
    np.testing.assert_allclose(forward, cold, atol=(1e-3 if tol else 1e-9) * np.abs(cold).max())
    slopes = jax.grad(lambda x: losses(reward, x)[0], allow_int=True)(init)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(slopes) if x.dtype != jax.dtypes.float0)


def test_a_training_loop_carries_solutions_and_saves_products(monkeypatch):
    """One trace for all steps; from the same parameters neither value nor gradient takes more than a product."""
    counted, real = [], krylov.bicgstab

    def spy(apply, *arguments, **options):
        def counting(x):
            jax.debug.callback(lambda: counted.append(1))
            return apply(x)

        return real(counting, *arguments, **options)

    monkeypatch.setattr(linear.krylov, "bicgstab", spy)
    grid, traces = rr.problems.slippery_grid(7, 0.95, dtype=np.float64), []  # of a size nothing is compiled for

    @jax.jit
    def step(reward, last):
        traces.append(1)

        def loss(reward):
            sol = rr.solve(grid.replace(reward=reward), REG, tol=1e-6, init=last)
            return sol.objective, sol

        return jax.value_and_grad(loss, has_aux=True)(reward)

    def products(reward, last):
        counted.clear()
        (_, sol), slope = jax.block_until_ready(step(reward, last))
        jax.effects_barrier()
        return len(counted), sol, slope

    start = jax.tree.map(jnp.zeros_like, rr.solve(grid, REG, tol=1e-6, visits=True))
    cold, sol, right = products(grid.reward, start)
    again, same, slope = products(grid.reward, sol)
    near, _, _ = products(moved(1e-5, grid).reward, same)
    assert len(traces) == 1 and again <= 1 < near < 0.75 * cold
    np.testing.assert_allclose(slope, right, atol=1e-4 * np.abs(right).max())
    assert jax.tree.structure(same) == jax.tree.structure(start)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_guesses_continue_the_polynomial_through_what_they_are_given(degree):
    """A loop may carry guesses instead of solutions; parameters that move evenly are foreseen the better."""
    solve = lambda by: rr.solve(moved(by), REG, visits=True)  # noqa: E731
    *earlier, next_one = (solve(0.005 * i) for i in range(degree + 2))
    points = np.arange(degree + 1.0)
    last, *before = reversed(earlier)
    guess: Any = last.extrapolated(*before)
    carried: Any = last.extrapolated().extrapolated(*(known.extrapolated() for known in before))
    for name in ("value", "visits"):
        known = np.stack([np.asarray(getattr(x, name)) for x in earlier])
        right = [np.polyval(np.polyfit(points, column, degree), degree + 1) for column in known.T]
        np.testing.assert_allclose(getattr(guess, name), right, rtol=1e-9)
        np.testing.assert_array_equal(getattr(carried, name), getattr(guess, name))
    miss = [np.abs(x.value - next_one.value).max() for x in (last, guess)]
    assert miss[1] < 0.1**degree * miss[0] or degree == 0


def test_guesses_are_linear_and_leave_out_what_failed():
    one: Any = rr.solve(GRID, REG, visits=True)
    two: Any = rr.solve(moved(0.1), REG, visits=True)
    guess = two.extrapolated(one)
    np.testing.assert_allclose(guess.value, 2 * two.value - one.value)
    np.testing.assert_allclose(guess.visits, 2 * two.visits - one.visits)
    failed = dataclasses.replace(one, value=jnp.full_like(one.value, jnp.nan), visits=None)
    guess = two.extrapolated(failed)
    np.testing.assert_array_equal(guess.value, two.value)
    np.testing.assert_array_equal(guess.visits, two.visits)
    assert rr.solve(moved(0.1), REG).extrapolated(one).visits is None


def test_what_is_no_start_is_refused():
    with pytest.raises(ValueError, match=r"init must be \[\*B, S\] with S = 36"):
        rr.solve(GRID, REG, init=rr.solve(rr.problems.chain(), REG))
    with pytest.raises(TypeError, match="visits must be True or False"):
        rr.solve(GRID, REG, visits=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init.visits"):
        rr.solve(GRID, REG, init=dataclasses.replace(rr.solve(GRID, REG), visits=jnp.zeros(5)))
