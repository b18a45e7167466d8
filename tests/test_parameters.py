"""What the factories make of priors: the same inside `jax.jit` as outside it, normalised, in no less than float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr

RNG = np.random.default_rng(0)
FACTORIES = {"kl": rr.kl, "alpha": lambda beta, **kw: rr.alpha(1.5, beta, **kw)}
LOGITS = 3 * RNG.normal(size=(4, 6))
LOGITS[1, 2] = LOGITS[3, 0] = -np.inf


def log_softmax(x):
    x = np.asarray(x, float)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", FACTORIES)
def test_logits_are_normalised_inside_jit_as_outside(name):
    make = lambda x: FACTORIES[name](2.0, log_prior=x)  # noqa: E731
    for dtype, rtol in ((np.float64, 1e-13), (np.float32, 2e-6)):
        x = LOGITS.astype(dtype)
        for reg in (make(x), make(jnp.asarray(x)), jax.jit(make)(x)):
            assert reg.log_prior.dtype == dtype
            np.testing.assert_allclose(reg.log_prior, log_softmax(x), rtol=rtol)
        np.testing.assert_allclose(make(x + dtype(5)).conjugate(np.zeros_like(x)), 0, atol=20 * rtol)
        inside = jax.jit(lambda x, q: make(x).conjugate(q))(x, np.zeros_like(x))
        np.testing.assert_allclose(inside, 0, atol=20 * rtol)


def test_a_constant_in_the_logits_has_no_gradient():
    q = jnp.asarray(RNG.normal(size=6))
    for make in FACTORIES.values():
        f = lambda x: make(2.0, log_prior=x).conjugate(q)  # noqa: B023, E731
        g = jax.grad(f)(jnp.asarray(LOGITS[0]))
        step = 1e-6
        wanted = [(f(LOGITS[0] + step * e) - f(LOGITS[0] - step * e)) / (2 * step) for e in np.eye(6)]
        np.testing.assert_allclose(g, wanted, atol=1e-8)
        np.testing.assert_allclose(g.sum(), 0, atol=1e-15)
        # Of a prior, the same: what it misses of a sum of 1 is divided out.
        p = jax.nn.softmax(LOGITS[0])
        f = lambda p: make(2.0, prior=p).conjugate(q)  # noqa: B023, E731
        np.testing.assert_allclose(jax.grad(f)(p) @ p, 0, atol=1e-15)


def test_rows_without_an_action():
    none = np.array([[0.0, 1.0], [-np.inf, -np.inf]])
    with pytest.raises(ValueError, match=r"log_prior\[1\] is minus infinity for every action"):
        rr.kl(1.0, log_prior=none)
    found = jax.jit(lambda x: rr.kl(1.0, log_prior=x).conjugate(np.zeros((2, 2))))(none)
    np.testing.assert_allclose(found, [0, np.nan], atol=1e-15)
    with pytest.raises(ValueError, match=r"log_prior\[0, 1\] is inf"):
        rr.kl(1.0, log_prior=np.array([[0.0, np.inf]]))
    found = jax.jit(lambda x: rr.kl(1.0, log_prior=x).log_prior)(np.array([[0.0, np.inf], [0.0, np.nan], [0.0, 0.0]]))
    assert (np.isnan(found).all(-1) == [True, True, False]).all()


BAD = np.array([[0.5, 0.498], [0.5, 0.5], [1.5, -0.5], [np.nan, 1.0], [0.0, 0.0], [0.5, 0.4995]])


def test_improper_priors_are_refused_outside_and_nan_inside():
    for i, message in ((0, "sums to 0.998 over actions, not 1"), (2, "is -0.5"), (3, "is nan"), (4, "sums to 0")):
        with pytest.raises(ValueError, match=message):
            rr.kl(1.0, BAD[i])
    for dtype in (float, np.float32):
        found = np.asarray(jax.jit(lambda p: rr.kl(1.0, p).log_prior)(BAD.astype(dtype)))
        assert (np.isnan(found).all(-1) == [True, False, True, True, True, False]).all()
        np.testing.assert_allclose(np.exp(found[[1, 5]]).sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits(dtype):
    """Priors in 16 bits miss 1 by their own rounding; they are kept in float32, and so are strengths."""
    x = jnp.asarray(RNG.normal(size=(8, 200)), dtype)
    p = jax.nn.softmax(x)
    assert float(abs(np.asarray(p, float).sum(-1) - 1).max()) > 1e-5
    for make in (lambda: rr.kl(jnp.asarray(2.0, dtype), p), lambda: rr.kl(dtype(2.0), log_prior=jax.nn.log_softmax(x))):
        for reg in (make(), jax.jit(make)()):
            assert reg.log_prior is not None and reg.beta.dtype == reg.log_prior.dtype == np.float32
            np.testing.assert_allclose(np.exp(np.asarray(reg.log_prior, float)).sum(-1), 1, rtol=1e-6)
    reg = rr.alpha(jnp.asarray(1.5, dtype), jnp.asarray(2.0, dtype), p, state_scale=jnp.ones(8, dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(reg)} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="sums to 0.9"):
        rr.kl(1.0, p * dtype(0.95))
    # Traced, a sum may miss 1 by what its dtype explains, and no more.
    inside = jax.jit(lambda p: rr.kl(1.0, p).log_prior)
    assert not np.isnan(inside(p)).any() and np.isnan(inside(p * dtype(0.95))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_values_in_sixteen_bits_are_computed_with_in_float32(dtype):
    """What comes back is the float32 result, rounded once."""
    q = jnp.asarray(RNG.normal(size=(8, 200)), dtype)
    p = jnp.asarray(jax.nn.softmax(q.astype(np.float32)), dtype)
    log_prior = RNG.normal(size=200).astype(np.float32)
    for make in FACTORIES.values():
        reg = make(np.float32(20.0), log_prior=log_prior)
        for method, x in ((reg.argmax, q), (reg.conjugate, q), (reg.value, p), (reg.worst_case, p)):
            got, wanted = method(x), method(x.astype(np.float32))
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, wanted.astype(dtype))
        assert reg.worst_case(log_policy=jax.nn.log_softmax(q)).dtype == dtype
        assert rr.slack(reg, q).dtype == dtype
        assert jax.grad(lambda q: reg.conjugate(q).sum())(q).dtype == dtype  # noqa: B023


def test_foreign_bytes_and_containers_of_tracers():
    q = np.array([1.0, 2.0, 4.0])
    for name in ("conjugate", "argmax"):
        method = getattr(rr.kl(1.0), name)
        np.testing.assert_array_equal(method(q.astype(">f8")), method(q))
        np.testing.assert_array_equal(method(q.astype(">f4")), method(q.astype("f4")))
    found = jax.jit(lambda a: rr.kl([a, 2 * a]).conjugate(q))(1.0)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(found, rr.kl(np.array([1.0, 2.0])).conjugate(q), rtol=1e-15)


def test_priors_of_a_grid():
    """Checked and normalised by the factory, whatever their dtype: the same as one by one."""
    m = rr.problems.chain(discount=0.9)
    p = jnp.asarray([[0.3, 0.7], [0.85, 0.15]], jnp.bfloat16)
    assert float(abs(np.asarray(p, float).sum(-1) - 1).max()) > 1e-4
    table = rr.sweep(m, rr.kl(1.0), {"prior": p}, outputs=["objective"], tol=1e-9)
    exact = np.asarray(p, float) / np.asarray(p, float).sum(-1, keepdims=True)
    wanted = [float(rr.solve(m, rr.kl(1.0, q), tol=1e-9).objective) for q in exact]
    np.testing.assert_allclose(table["objective"], wanted, atol=1e-8)
    with pytest.raises(ValueError, match="sums to 0.9"):
        rr.sweep(m, rr.kl(1.0), {"prior": np.array([[0.5, 0.4]])})
