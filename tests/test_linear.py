"""The Krylov solver by itself, with the sums of either kind of device, and what is asked of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr
from robustreg.solvers import evaluation, krylov, linear

SUMS = {"cpu": krylov.sums, "accelerator": krylov.sums_of_blocks}


@pytest.mark.parametrize("lanes", [(), (3,), (2, 3)])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 500])
def test_sums_of_blocks(n, lanes):
    x, y = np.random.default_rng(n).normal(size=(2, n, *lanes))
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 1e-5)):
        found = jax.jit(krylov.sums_of_blocks)(jnp.asarray(x, dtype), jnp.asarray(x * y, dtype))
        assert [a.dtype for a in found] == [dtype] * 2 and found[0].shape == lanes
        for a, b in zip(found, (x, x * y)):
            np.testing.assert_allclose(a, b.sum(0), atol=tolerance * np.abs(b).sum(0).max())


@pytest.mark.parametrize("where", SUMS)
@pytest.mark.parametrize("centred", [True, False])
def test_systems_of_many_lanes(monkeypatch, where, centred):
    """Each lane by itself to its own reduction; if centred, up to a constant; a NaN lane disturbs none."""
    monkeypatch.setattr(krylov, "sums", SUMS[where])
    rng = np.random.default_rng(0)
    n, lanes = 50, krylov.FEW + 2  # so many that a CPU does without blocks
    # All lead to a few states: what is centred is far from it after a product.
    kernel = 0.5 * rng.dirichlet(np.full(n, 0.1), (lanes, n)) + 0.5 * rng.dirichlet(np.full(n, 0.02), (lanes, 1))
    kernel *= np.linspace(0.1, 0.999, lanes)[:, None, None]
    b = rng.normal(size=(n, lanes)) * np.logspace(-8, 8, lanes)
    reduction = np.logspace(-2, -10, lanes)

    @jax.jit
    def solve(b):
        apply = lambda x: jnp.einsum("kst,tk->sk", kernel, x)  # noqa: E731
        return krylov.bicgstab(apply, b, jnp.max(jnp.abs(b), axis=0), jnp.asarray(reduction), 200, 200, centred)

    x = np.asarray(solve(jnp.asarray(b)))
    r = b - (x - np.einsum("kst,tk->sk", kernel, x))
    if centred:
        r, b = r - r.mean(0), b - b.mean(0)
        assert np.abs(x.mean(0)).max() <= 1e-12 * np.abs(x).max()
    assert (np.linalg.norm(r, axis=0) <= 1.01 * reduction * np.linalg.norm(b, axis=0)).all()
    broken = np.asarray(solve(jnp.asarray(b).at[3, 2].set(jnp.nan)))
    others = np.arange(lanes) != 2
    np.testing.assert_array_equal(broken[:, others], np.asarray(solve(jnp.asarray(b)))[:, others])


@pytest.mark.parametrize("where", SUMS)
def test_corners(monkeypatch, where):
    """A zero right-hand side, K = 0, and a half step that is exact leave no NaN."""
    monkeypatch.setattr(krylov, "sums", SUMS[where])
    one = jnp.ones(3 * krylov.FEW)  # the three lanes over and over: so many that a CPU does without blocks
    for k in (0.0, 0.5):
        b = jnp.tile(jnp.asarray([[0.0, 1.0, 1e-300], [0.0, -1.0, 2e-300]]), (1, krylov.FEW))
        x = krylov.bicgstab(lambda x, k=k: k * x, b, jnp.max(jnp.abs(b), axis=0), 1e-12 * one, 50, 50)
        np.testing.assert_allclose(x, b / (1 - k), rtol=1e-11)


def test_an_accelerator_s_sums_solve_as_well(monkeypatch):
    """The whole solver with them: certified, in as many steps."""
    m, reg = rr.problems.slippery_grid(8, 0.99), rr.kl(np.geomspace(0.1, 300, 5))
    plain = rr.solve(m, reg, tol=1e-6)
    monkeypatch.setattr(krylov, "sums", krylov.sums_of_blocks)
    jax.clear_caches()
    blocks = rr.solve(m, reg, tol=1e-6)
    jax.clear_caches()
    assert (np.asarray(blocks.status) == rr.Status.CONVERGED).all()
    assert np.abs(np.asarray(blocks.value) - np.asarray(plain.value)).max() <= 2e-6
    assert np.abs(np.asarray(blocks.steps) - np.asarray(plain.steps)).max() <= 1


@pytest.fixture
def asked(monkeypatch):
    """Systems that came to elimination: whether transposed, and whether a lane of them was to be solved again."""
    asked, eliminated = [], linear._eliminated

    def spy(chain, apply, b, x, error, solved, transpose):
        jax.debug.callback(lambda solved: asked.append((transpose, not solved.all())), solved)
        return eliminated(chain, apply, b, x, error, solved, transpose)

    monkeypatch.setattr(linear, "_eliminated", spy)
    return asked


def test_what_is_as_accurate_as_was_asked_is_not_solved_again(asked):
    """Krylov solves stop by the norm that is believed, forwards and backwards: elimination takes 40 times as long."""
    m = rr.problems.slippery_grid(17, 0.99, dtype=np.float64)  # of a size for which nothing is compiled yet
    for tol in (1e-3, 1e-6, None):
        gradient = jax.grad(
            lambda r, beta, tol=tol: rr.solve(m.replace(reward=r), rr.kl(beta), tol=tol).objective, (0, 1)
        )
        along = jnp.ones_like(m.reward), 1.0
        jax.block_until_ready(jax.jit(lambda r, b, f=gradient, along=along: jax.jvp(f, (r, b), along))(m.reward, 3.0))
        jax.effects_barrier()
        assert {transpose for transpose, _ in asked} == {True, False} and not any(again for _, again in asked), asked


def test_a_value_asked_for_to_a_tolerance_is_not_eliminated_for(asked):
    """A sweep wants the nominal return to the tolerance of its cells, be that a tenth of the value itself."""
    m = rr.problems.slippery_grid(9, 0.99, dtype=np.float32)  # of a size for which nothing is compiled yet
    policy = jnp.full((m.n_states, m.n_actions), 1 / m.n_actions, jnp.float32)
    exact = rr.evaluate(m, policy)
    size = jnp.max(jnp.abs(exact))
    for share in (0.1, 0.01):
        asked.clear()
        value = evaluation.evaluate_from(m, policy, jnp.zeros_like(exact), share * size)
        jax.effects_barrier()
        assert jnp.max(jnp.abs(value - exact)) <= share * size
        assert [again for transposed, again in asked if not transposed] == [False]
