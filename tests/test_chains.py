"""Linear systems of deterministic and nearly deterministic chains: right, or NaN, never wrong without a word.

On such chains Krylov solvers break down or stagnate. The reference is a dense solve in extended precision.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr
from robustreg.solvers import bellman, bound_problem, elimination, evaluation, krylov, linear, methods
from robustreg.solvers.plain import no_regulariser

DISCOUNTS = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6)
# Relative errors that a solution may have; the first discounts apart, which float32 holds to fewer digits.
LIMITS = {np.float64: 1e-8, np.float32: 2e-3}


def deterministic(successor):
    """`[N, S, S]` of successors `[N, S]`."""
    count, n = successor.shape
    P = np.zeros((count, n, n))
    P[np.arange(count)[:, None], np.arange(n)[None], successor] = 1
    return P


def families(seed, n, count):
    """Chains `[F count, S, S]` of every family; rows are short binary fractions that sum to one."""
    rng = np.random.default_rng(seed)
    here = np.broadcast_to(np.arange(n), (count, n))
    cycle, back = deterministic((here + 1) % n), deterministic(np.maximum(here - 1, 0))
    leak = 2.0 ** -rng.integers(1, 20, (count, 1, 1))
    half = deterministic(np.where(here < n // 2, (here + 1) % max(n // 2, 1), np.minimum(here + 1, n - 1)))
    return np.concatenate(
        [
            deterministic(np.stack([rng.permutation(n) for _ in range(count)])),
            deterministic(rng.integers(0, n, (count, n))),
            cycle,
            back,
            deterministic(np.minimum(here ^ 1, n - 1)),
            (1 - leak) * cycle + leak * deterministic(np.zeros_like(here)),
            (1 - leak) * deterministic(rng.integers(0, n, (count, n)))
            + leak * deterministic(rng.permuted(here, axis=1)),
            0.75 * deterministic(np.minimum(here + 1, n - 1)) + 0.25 * back,
            (1 - leak) * half + leak * cycle,
            # An ordinary one among them.
            np.full((count, n, n), 1 / 2 ** int(np.log2(n))) * (np.arange(n) < 2 ** int(np.log2(n))),
        ]
    )


def exact(P, g, b, transpose):
    """`(I - g P) x = b` by elimination in extended precision, `[N, S]`; rows of P sum to one."""
    x = np.array(b, np.longdouble)
    K = np.asarray(g, np.longdouble)[:, None, None] * np.asarray(P, np.longdouble)
    A = np.eye(P.shape[-1], dtype=np.longdouble) - (np.swapaxes(K, 1, 2) if transpose else K)
    n = P.shape[-1]
    for k in range(n):
        factor = A[:, k + 1 :, k] / A[:, k, k][:, None]
        A[:, k + 1 :] -= factor[..., None] * A[:, k, None]
        x[:, k + 1 :] -= factor * x[:, k, None]
    for k in reversed(range(n)):
        x[:, k] = (x[:, k] - np.sum(A[:, k, k + 1 :] * x[:, k + 1 :], axis=-1)) / A[:, k, k]
    return x


def relative(x, truth, order):
    size = np.linalg.norm(truth.astype(float), order, axis=-1)
    return np.linalg.norm((np.asarray(x) - truth).astype(float), order, axis=-1) / np.where(size > 0, size, 1)


def problem(n, dtype, seed=0, count=4, ends=0.0):
    """All families at all discounts, one lane each, and a reward."""
    P = np.tile(families(seed, n, count), (len(DISCOUNTS), 1, 1))
    g = np.repeat(DISCOUNTS, len(P) // len(DISCOUNTS))
    reward = np.random.default_rng(seed + 1).integers(-64, 65, (len(P), n, 1)) / 64
    m = rr.mdp(P[:, :, None].astype(dtype), reward.astype(dtype), g.tolist(), layout="sas")
    return P, g, reward, m


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [1, 2, pytest.param(12, marks=pytest.mark.slow)])
def test_occupancy_value_and_gradients(n, dtype):
    P, g, reward, m = problem(n, dtype)
    ones, start = np.ones((len(P), n, 1), dtype), np.full((len(P), n), 1 / n)
    visits, value = exact(P, g, start, True), exact(P, g, reward[..., 0], False)

    def objective(reward):
        return rr.solve(dataclasses.replace(m, reward=reward), rr.kl(dtype(1.0))).objective

    found = {
        "occupancy": relative(rr.occupancy(m, ones)[..., 0], visits, 1),
        "evaluate": relative(rr.evaluate(m, ones), value, np.inf),
        "gradient": relative(jax.grad(lambda r: objective(r).sum())(m.reward)[..., 0], visits, 1),
    }
    tangent = np.asarray(jax.jvp(objective, (m.reward,), (m.reward,))[1])
    scale = np.sum(np.abs(visits * reward[..., 0]), axis=-1).astype(float)
    found["tangent"] = np.abs(tangent - np.sum(visits * reward[..., 0], axis=-1)).astype(float) / np.maximum(
        scale, 1e-9
    )
    for name, error in found.items():
        # A tangent or a value may be what is left of terms a million times as large: nothing, in float32. It says so.
        lost = np.isnan(error) & ((name in ("tangent", "evaluate")) & (dtype == np.float32) & (g > 0.9999))
        assert not np.isnan(error[~lost]).any(), (name, np.flatnonzero(np.isnan(error)))
        assert lost.sum() <= 0.1 * len(g)
        assert (error[~lost] <= LIMITS[dtype]).all(), (name, np.nanmax(error), g[np.nanargmax(error)])


def test_a_lane_that_breaks_down_costs_the_others_nothing():
    """Bit for bit the same beside an ordinary lane and beside one that Krylov solves fail on."""
    P = families(0, 12, 1)
    others = np.flatnonzero([np.isclose(p, p[0]).all() for p in P])
    ordinary, broken = P[others[-1]], deterministic(np.array([[2, 0, 3, 5, 4, 4, 6, 7, 8, 9, 10, 11]]))[0]
    ones = np.ones((2, 12, 1))
    beside = [rr.mdp(np.stack([ordinary, x])[:, :, None], np.zeros((12, 1)), 0.99) for x in (ordinary, broken)]
    first, second = (np.asarray(rr.occupancy(m, ones)) for m in beside)
    np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_large_chains_are_swept(monkeypatch, dtype):
    """Where a matrix would not fit: sweeps as long as they can help, else NaN."""
    monkeypatch.setattr(elimination, "STATES", 8)
    jax.clear_caches()
    P, g, reward, m = problem(13, dtype)
    visits = exact(P, g, np.full((len(P), 13), 1 / 13), True)
    error = relative(rr.occupancy(m, np.ones((len(P), 13, 1), dtype))[..., 0], visits, 1)
    jax.clear_caches()
    answered = ~np.isnan(error)
    assert (error[answered] <= LIMITS[dtype]).all()
    # In float32 rounding is amplified by 1/(1-g): what it leaves no digits of is not handed out.
    assert answered[g <= (0.9999 if dtype == np.float64 else 0.999)].all()


def test_without_any_other_way_there_is_no_number(monkeypatch):
    """What neither way solves is NaN: in an occupancy, in a gradient, and in its error bound, which is infinite."""
    monkeypatch.setattr(elimination, "STATES", 0)
    for name, value in (("_SWEEPS", 0), ("KRYLOV_STEPS", 1), ("_ROUNDS", 1)):
        monkeypatch.setattr(linear, name, value)
    jax.clear_caches()
    P = deterministic(np.array([[2, 0, 3, 5, 4, 4]]))[0]
    m = rr.mdp(P[:, None], np.arange(6.0)[:, None], 0.99)

    def objective(reward, probe):
        return rr.solve(dataclasses.replace(m, reward=reward), rr.kl(1.0), adjoint_error=probe).objective

    visits = np.asarray(rr.occupancy(m, np.ones((6, 1))))
    gradient, error = jax.grad(objective, (0, 1))(m.reward, jnp.asarray(0.0))
    truth = exact(P[None], np.array([0.99]), np.full((1, 6), 1 / 6), True)[0]
    jax.clear_caches()
    assert np.isnan(visits).all()
    wrong = relative(np.asarray(gradient)[None, :, 0], truth[None], 1)[0]
    assert (np.isnan(np.asarray(gradient)).all() and np.isinf(error)) or wrong <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_two_thousand_states(dtype):
    n = 2000
    rng = np.random.default_rng(0)
    successor = np.stack([rng.permutation(n), rng.integers(0, n, n), (np.arange(n) + 1) % n])[:, :, None, None]
    ones, g = np.ones((n, 1), dtype), 0.9999
    for indices in successor:
        m = rr.mdp(rr.Successors(jnp.asarray(indices), jnp.ones((n, 1, 1), dtype)), np.zeros((n, 1), dtype), g)
        P = deterministic(indices[None, :, 0, 0])[0]
        visits = np.linalg.solve(np.eye(n) - g * P.T, np.full(n, 1 / n))
        error = relative(np.asarray(rr.occupancy(m, ones))[None, :, 0], visits[None], 1)[0]
        assert error <= LIMITS[dtype], error


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 70])
def test_elimination_keeps_every_digit(n, transpose):
    """Entry by entry in float32, at a discount of 1 - 1e-6, whatever the chain: LU factors keep none."""
    P = families(n, n, 1)
    g = np.full(len(P), 1 - 1e-6)
    b = np.random.default_rng(n).integers(0, 65, (len(P), n)) / 64
    truth = exact(P, g, b, transpose)
    # (I - K) 1 is 1 - g, which float32 holds to seven digits; it has to be that of the chain handed over.
    chain = (g[:, None, None] * P).astype(np.float32)
    exits = np.full((len(P), n), 1e-6, np.float32)
    x = jax.vmap(lambda k, e, b: elimination.solve(k, e, b[:, None], transpose)[:, 0])(chain, exits, b.astype("f"))
    assert x.dtype == np.float32
    error = np.abs(np.asarray(x) - truth).astype(float)
    assert (error <= 8 * (n + 2) * np.finfo(np.float32).eps * truth.astype(float)).all()


def test_no_product_rounds_by_the_slowest_mode():
    """Dense rows of 128, float32 at .9999: sums of 128 products err by a hundredth of their size times the horizon."""
    n, g, lanes = 128, 0.9999, 40
    P = np.tile(families(0, n, 1)[-1:], (lanes, 1, 1))
    b = np.random.default_rng(0).integers(-64, 100, (lanes, n)) / 64
    m = rr.mdp(P[:, :, None].astype(np.float32), np.zeros((n, 1), np.float32), g, layout="sas")
    chain = bellman.chain(bound_problem.bind(m, no_regulariser(m)), jnp.ones((1, n, lanes), np.float32))
    ones, right = jnp.ones((n, lanes), np.float32), jnp.asarray(b.T, np.float32)
    zero, mass = jnp.zeros(lanes, np.float32), jnp.sum(chain.exit_rate, axis=0)
    solved = linear._refined(chain, chain.apply, right, zero, ones, chain.exit_rate, mass)
    x, r = (np.asarray(part, float).T for part in solved)
    truth = exact(P, np.full(lanes, g), b, False).astype(float)
    left = b - (x - g * np.einsum("bst,bt->bs", P, x))
    size = np.abs(truth).max(-1, keepdims=True)
    assert (np.abs(x - truth) <= 2e-5 * size).all()
    # What is said to be left is left, to the rounding of x itself.
    assert (np.abs(left - r) <= 2 * np.finfo(np.float32).eps * size).all()


def test_what_cancels_to_nothing_is_no_number():
    """Two states in turn, worth 1 and -1: of a million visits to each hardly two rewards are left."""
    leak = 2.0**-18
    P, reward = np.array([[[leak, 1 - leak], [1.0, 0.0]]]), np.array([[15 / 16], [-15 / 16]])
    truth = exact(P, np.array([1 - 1e-6]), reward.T, False)[0].astype(float)
    for dtype in (np.float32, np.float64):
        m = rr.mdp(P[0][:, None].astype(dtype), reward.astype(dtype), 1 - 1e-6, layout="sas")
        value = np.asarray(rr.evaluate(m, np.ones((2, 1), dtype)))
        if dtype == np.float64:
            np.testing.assert_allclose(value, truth, rtol=1e-8)
        else:
            assert np.isnan(value).all()


def test_the_horizon_bounds_the_inverse():
    """`(I - K)^{-1} 1` is at most `Chain.horizon`, with episodes that end and without."""
    P = families(3, 7, 2)
    ends = np.random.default_rng(0).choice([0.0, 0.25, 1.0], (len(P), 7, 1))
    for termination in (None, ends):
        rows = P if termination is None else P * (1 - termination)
        m = rr.mdp(rows[:, :, None], np.zeros((7, 1)), 0.9999, termination=termination)
        chain = bellman.chain(bound_problem.bind(m, no_regulariser(m)), jnp.ones((1, 7, len(P))))
        steps = exact(rows, np.full(len(P), 0.9999), np.ones((len(P), 7)), False)
        assert (steps.max(-1) <= np.asarray(chain.horizon) * (1 + 1e-9)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_value_that_the_loop_knows_to_three_digits_is_eliminated_for(seed):
    """float32, cycles of 200 states with exits of 1/2 to 2^-20: no value is given up as NaN that can be had."""
    n, count = 200, 60
    rng, here = np.random.default_rng(seed), np.broadcast_to(np.arange(n), (60, n))
    leak = 2.0 ** -(np.arange(count) % 20 + 1)[:, None, None]
    P = (1 - leak) * deterministic((here + 1) % n) + leak * deterministic(np.zeros_like(here))
    reward = np.round(rng.normal(size=(count, n, 1)) * 64) / 64
    m = rr.mdp(P[:, :, None].astype(np.float32), reward.astype(np.float32), 0.99, layout="sas")
    value = np.asarray(rr.evaluate(m, np.ones((count, n, 1), np.float32)))
    truth = np.linalg.solve(np.eye(n) - 0.99 * P, reward)[..., 0]
    assert (np.abs(value - truth).max(-1) <= 2e-3 * np.abs(truth).max(-1)).all()


def test_a_search_that_was_cut_short_is_finished_by_elimination(monkeypatch):
    """float32: what the loop knows to four digits, where rounding leaves six, is not handed out as it is."""
    hasty = methods.Newton(forcing=0.02, max_steps=3)
    monkeypatch.setattr(evaluation, "_evaluation", lambda problem: hasty)
    rng, n, count = np.random.default_rng(0), 30, 40
    P = rng.dirichlet(np.ones(n), (count, n)).astype(np.float32)
    P[: count // 2] = deterministic(np.argsort(rng.random((count // 2, n)), -1))
    reward, g = rng.normal(size=(count, n)).astype(np.float32), 0.95
    m = rr.mdp(P[:, :, None], reward[:, :, None], g, layout="sas")
    jax.clear_caches()
    found = np.asarray(rr.evaluate(m, np.ones((count, n, 1), np.float32)))
    jax.clear_caches()
    truth = np.linalg.solve(np.eye(n) - g * P.astype(float), reward[..., None].astype(float))[..., 0]
    size = np.abs(truth).max(-1)
    assert (np.abs(found - truth).max(-1) <= 16 * np.finfo(np.float32).eps / (1 - g) * size).all()


def test_a_lane_that_krylov_steps_do_not_help_holds_up_no_other(monkeypatch):
    """A cycle with an exit among ordinary chains: products by the batch stay those of few steps, and all are right."""
    n, count = 200, 32
    P = np.random.default_rng(0).dirichlet(np.ones(n), (count, n))
    P[1] = np.eye(n)[(np.arange(n) + 1) % n] * (1 - 2.0**-10)
    P[1, :, 0] += 2.0**-10
    m = rr.mdp(P[:, :, None], np.zeros((count, n, 1)), 0.999, layout="sas")
    chain = bellman.chain(bound_problem.bind(m, no_regulariser(m)), jnp.ones((1, n, count)))
    asked: list[int] = []
    real: Any = vars(krylov)["bicgstab"]

    def counted(apply, *arguments):
        def noted(x):
            jax.debug.callback(lambda: asked.append(1))
            return apply(x)

        return real(noted, *arguments)

    monkeypatch.setattr(krylov, "bicgstab", counted)
    start = jnp.full((n, count), 1 / n)
    found = linear.occupy(chain, start, jnp.zeros(count), linear.Method())
    jax.effects_barrier()
    want = np.linalg.solve(np.eye(n) - 0.999 * np.swapaxes(P, 1, 2), np.full((count, n, 1), 1 / n))[..., 0]
    np.testing.assert_allclose(found.T, want, rtol=1e-8)
    # A patient solver asks for 2,000.
    assert len(asked) < 256
