"""Worst cases from probabilities and from their logarithms: values, and derivatives that are right or NaN, never 0.

The reference is the definition, written out for logarithms: `log_alpha(p/p0) + (1-alpha) D` with the extension of D to
measures that need not sum to 1, differentiated by JAX where nothing underflows, by formula where something does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr

pytestmark = pytest.mark.slow

ALPHAS = (-2.0, 0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 4.0)
BETA = 1.7
RNG = np.random.default_rng(0)
LOGITS, PRIOR_LOGITS = jnp.asarray(2 * RNG.normal(size=6)), jnp.asarray(RNG.normal(size=6))
WEIGHT = jnp.asarray(RNG.normal(size=6))
F, TINY = jnp.float32, float(np.finfo(np.float32).tiny)


def defined(log_policy, log_prior, alpha, beta):
    """The worst case as it is defined, `[A]`; alpha is a Python float."""
    ratio, p, p0 = log_policy - log_prior, jnp.exp(log_policy), jnp.exp(log_prior)
    if alpha == 1:
        return ratio / beta
    if alpha == 0:
        divergence = jnp.sum(p - p0 - p0 * ratio)
    else:
        mixed = jnp.exp(alpha * log_policy + (1 - alpha) * log_prior)
        divergence = jnp.sum(alpha * p + (1 - alpha) * p0 - mixed) / (alpha * (1 - alpha))
    h = alpha - 1
    return ((jnp.exp(h * ratio) - 1) / h + (1 - alpha) * divergence) / beta


def from_logs(z, z0, alpha, beta):
    return rr.worst_case(rr.alpha(alpha, beta, log_prior=z0), log_policy=jax.nn.log_softmax(z))


def from_probabilities(z, z0, alpha, beta):
    return rr.worst_case(rr.alpha(alpha, beta, log_prior=z0), jax.nn.softmax(z))


def wanted(z, z0, alpha, beta):
    return defined(jax.nn.log_softmax(z), jax.nn.log_softmax(z0), alpha, beta)


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@functools.cache
def by_definition(alpha):
    """Value, slopes in the policy, the prior and beta, slope in alpha by differences, and the Hessian."""

    def at(z, z0, b):
        return wanted(z, z0, alpha, b)

    @jax.jit
    def everything(z, z0, beta):
        step = 1e-5
        sides = [wanted(z, z0, alpha + s, beta) for s in (step, -step)]
        second = jax.hessian(lambda z, z0: at(z, z0, beta) @ WEIGHT, (0, 1))(z, z0)
        return at(z, z0, beta), jax.jacfwd(at, (0, 1, 2))(z, z0, beta), (sides[0] - sides[1]) / (2 * step), second

    return everything(LOGITS, PRIOR_LOGITS, BETA)


@pytest.mark.parametrize("f", [from_logs, from_probabilities])
def test_values_and_derivatives_are_those_of_the_definition(f):
    """In the policy, the prior, alpha and beta, in both modes, and once more."""

    @jax.jit
    def everything(alpha):
        along = jax.jacfwd(f, (0, 1, 2, 3))(LOGITS, PRIOR_LOGITS, alpha, BETA)
        back = jax.jacrev(f, (0, 1, 2, 3))(LOGITS, PRIOR_LOGITS, alpha, BETA)
        second = jax.hessian(lambda z, z0: f(z, z0, alpha, BETA) @ WEIGHT, (0, 1))(LOGITS, PRIOR_LOGITS)
        return f(LOGITS, PRIOR_LOGITS, alpha, BETA), along, back, second

    for alpha in ALPHAS:
        value, along, back, second = everything(alpha)
        exact, slopes, slope_in_alpha, hessian = by_definition(alpha)
        close(value, exact, 1e-11)
        for got in (along, back):
            for i, j in enumerate((0, 1, 3)):
                close(got[j], slopes[i])
            if alpha not in (0, 1):
                close(got[2], slope_in_alpha, 1e-6)
        jax.tree.map(lambda a, b: close(a, b, 1e-8), second, hessian)


def test_derivatives_are_those_of_the_extension():
    """Along directions that do not keep the policy normalised."""
    log_policy, log_prior = jax.nn.log_softmax(LOGITS), jax.nn.log_softmax(PRIOR_LOGITS)
    f = jax.jit(jax.jacrev(lambda x, alpha: rr.alpha(alpha, BETA, log_prior=log_prior).worst_case(log_policy=x)))
    for alpha in ALPHAS:
        close(f(log_policy, alpha), jax.jacrev(lambda x: defined(x, log_prior, alpha, BETA))(log_policy))  # noqa: B023


CONFIDENT = jnp.asarray([200.0, 0.0, -3.0], F)  # softmax underflows in float32


def test_a_confident_policy_of_kl():
    """Linear in the logarithm: `(log p - log p0)/beta`, however small p."""
    for reg, log_prior in ((rr.kl(F(2.0)), np.full(3, -np.log(3))), (rr.entropy(F(2.0)), np.zeros(3))):
        f = lambda z: rr.worst_case(reg, log_policy=jax.nn.log_softmax(z))  # noqa: B023, E731
        exact = np.array([0.0, -200.0, -203.0])
        close(f(CONFIDENT), (exact - log_prior) / 2, 1e-6)
        close(jax.jacrev(f)(CONFIDENT), (np.eye(3) - np.array([1.0, 0.0, 0.0])) / 2, 1e-6)
        close(jax.jacfwd(f)(CONFIDENT), (np.eye(3) - np.array([1.0, 0.0, 0.0])) / 2, 1e-6)
    beta = jax.grad(lambda b: rr.kl(b).worst_case(log_policy=jax.nn.log_softmax(CONFIDENT)).sum())(F(2.0))
    close(beta, -(-403 + 3 * np.log(3)) / 4, 1e-5)


@pytest.mark.parametrize("alpha", [-0.2, 0.8, 1.1, 1.5, 3.0])
def test_a_confident_policy_of_alpha(alpha):
    """The slope is `p^h/p0^h` in log p, formed in the exponent, against float64 that does not underflow."""
    z, z0 = np.asarray(CONFIDENT) * (0.3 if alpha < 0 else 1), np.array([0.0, 0.5, -1.0])
    against_float64(alpha, z.astype(float), z0)


@pytest.mark.parametrize("alpha", [-1.0, 2.0, 2.5])
def test_small_priors_and_ratios_of_both_signs(alpha):
    """`p^alpha p0^(1-alpha)` where one factor overflows and the other underflows, in float32."""
    against_float64(alpha, np.array([0.0, -150.0, -120.0]), np.array([0.0, -120.0, -150.0]))


def against_float64(alpha, z, z0):
    """Values and their slopes in the log-probabilities, in float32, by the definition in float64."""
    log_policy, log_prior = (jax.nn.log_softmax(jnp.asarray(x)) for x in (z, z0))
    exact = defined(log_policy, log_prior, alpha, 2.0)
    slope = jax.jacrev(lambda x: defined(x, log_prior, alpha, 2.0))(log_policy)
    reg = rr.alpha(F(alpha), F(2.0), log_prior=log_prior.astype(F))
    f = lambda x: rr.worst_case(reg, log_policy=x)  # noqa: E731
    for got, value in ((f, exact), (jax.jacrev(f), slope)):
        # One unit of log p is 1.5e-5 of a number that goes with its exponential.
        np.testing.assert_allclose(got(log_policy.astype(F)), value, rtol=2e-4, atol=TINY)


UNDERFLOWN = jnp.asarray([200.0, 0.0, 0.5], F)


@pytest.mark.parametrize("make", [rr.kl, rr.entropy, lambda b: rr.alpha(F(0.5), b), lambda b: rr.alpha(F(1.5), b)])
def test_a_softmax_that_underflows_has_no_gradient_of_0(make):
    """Right is something; unknown is NaN; 0 for every logit would say that nothing depends on them."""
    f = lambda z, b: rr.worst_case(make(b), jax.nn.softmax(z))  # noqa: E731
    got = jax.grad(lambda z, b: f(z, b) @ jnp.asarray([0.1, 0.2, 0.3], F), (0, 1))(UNDERFLOWN, F(2.0))
    assert np.isnan(got[0]).all()
    assert np.isnan(jax.jvp(f, (UNDERFLOWN, F(2.0)), (jnp.ones(3, F), F(0.0)))[1][1:]).all()


def test_entries_that_nobody_asks_for_poison_nothing():
    """A cotangent of exactly 0 stays 0: the entry of the action that is taken has its gradient."""
    for make in (rr.kl, rr.entropy, lambda b: rr.alpha(F(1.5), b)):
        f = lambda z, b: rr.worst_case(make(b), jax.nn.softmax(z))[0]  # noqa: B023, E731
        got = jax.grad(f, (0, 1))(UNDERFLOWN, F(2.0))
        assert np.isfinite(got[0]).all() and np.isfinite(got[1])
    p = jnp.asarray([0.5, 0.5, 0.0])
    for alpha in (1.0, 1.5, 2.0, 3.0):
        reg = rr.alpha(alpha, 2.0)
        mean = lambda p: jnp.sum(p * jnp.where(p == 0, 0, rr.worst_case(reg, p)))  # noqa: B023, E731
        close(jax.grad(mean)(p)[:2], jax.grad(lambda p: mean(jnp.append(p, 0.0)))(p[:2]))  # noqa: B023


def test_slopes_at_probability_0():
    """`p^(h-1) p0^-h`: infinite for h < 1, 1/p0 at 1, 0 beyond; that of D is `eps_h(-inf)`."""
    p, p0 = jnp.asarray([0.25, 0.75, 0.0]), np.array([0.5, 0.25, 0.25])
    up = jnp.asarray([0.0, 0.0, 1.0])
    for alpha in (0.5, 1.0, 1.5, 2.0, 2.5, 4.0):
        reg, h = rr.alpha(alpha, 2.0, p0), alpha - 1
        along = jax.jvp(lambda p: rr.worst_case(reg, p), (p,), (up,))[1]  # noqa: B023
        back = jax.jacrev(lambda p: rr.worst_case(reg, p))(p)[:, 2]  # noqa: B023
        shared = 0.0 if alpha == 1 else (np.nan if alpha < 1 else (1 - alpha) * (-1 / h) / 2)
        own = np.nan if h < 1 else ((1 / p0[2] if h == 1 else 0) / 2 + shared)
        close(along, [shared, shared, own])
        close(back, [shared, shared, own])


def test_curvatures_at_probability_0():
    """`(h-1) p^(h-2) p0^-h - h p^(h-1) p0^-h`: infinite below h = 2 but for h = 1."""
    p, p0 = jnp.asarray([0.25, 0.75, 0.0]), np.array([0.5, 0.25, 0.25])
    for alpha, wanted in ((1.5, np.nan), (2.0, -4 / 2), (2.5, np.nan), (3.0, 16 / 2), (4.0, 0)):
        reg = rr.alpha(alpha, 2.0, p0)
        for outer in (jax.jacfwd, jax.jacrev):
            close(outer(jax.grad(lambda p: rr.worst_case(reg, p)[2]))(p)[2, 2], wanted)  # noqa: B023


def test_values_at_probability_0_and_masks_are_the_same_in_both_forms():
    p0 = np.array([0.5, 0.25, 0.25, 0.0])
    rows = np.array([[0.25, 0.75, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], p0])
    with np.errstate(divide="ignore"):
        logs = np.log(rows)
    for alpha in ALPHAS:
        reg = rr.alpha(alpha, 2.0, p0)
        direct, logarithmic = rr.worst_case(reg, rows), rr.worst_case(reg, log_policy=logs)
        np.testing.assert_allclose(direct, logarithmic, rtol=1e-12, atol=1e-13)
        assert (np.asarray(direct)[[0, 2, 3], 3] == 0).all()
        assert np.isneginf(np.asarray(direct)[0, 2]) == (alpha <= 1)
        # Whatever a masked action is given that underflows: a large negative number stands for minus infinity.
        low = np.where(np.isneginf(logs) & (p0 == 0), -1e9, logs)
        np.testing.assert_array_equal(rr.worst_case(reg, log_policy=low), logarithmic)
    assert np.isnan(rr.worst_case(rr.kl(1.0), np.array([np.nan, 1.0]))[0])


def test_value_keeps_its_gradient():
    """`Omega(p)` and its gradient are continuous at 0 for alpha > 0: nothing is lost there."""
    for reg in (rr.kl(F(2.0)), rr.alpha(F(1.5), F(2.0)), rr.alpha(F(3.0), F(2.0))):
        assert not np.isnan(jax.grad(lambda z: reg.value(jax.nn.softmax(z)))(UNDERFLOWN)).any()  # noqa: B023
    z = jnp.asarray([1.0, 0.0, 0.5])
    got = jax.grad(lambda z: rr.kl(2.0).value(jax.nn.softmax(z)))(z)
    p = jax.nn.softmax(z)
    close(got, p * (jnp.log(p) - jnp.sum(p * jnp.log(p))) / 2)


def test_one_form_of_the_policy_at_a_time():
    reg = rr.kl(1.0)
    for bad in ({}, {"policy": np.ones(1), "log_policy": np.zeros(1)}):
        for f in (lambda **kw: rr.worst_case(reg, **kw), reg.worst_case):
            with pytest.raises(ValueError, match="log_policy, one of the two"):
                f(**bad)
