r"""KL and alpha-divergences, their conjugates and their gradients: pure functions, actions on one axis.

Arrays over actions are `[A, ...]`, or `[..., A]` where the reducers say so; `alpha`, `beta` and `h` have as many axes
as `...` and broadcast against it.

With a prior `p0` and `h = alpha - 1`, write `eps_h(x) = (e^{h x} - 1)/h` and its inverse `lam_h(x) = log(1 + h x)/h`
(both the identity at `h = 0`), so that `log_alpha(u) = eps_h(log u)` and `log exp_alpha(x) = lam_h(x)`.
The alpha-divergence of Cichocki and Amari, for normalised arguments and `L = log(p/p0)`, is

    D_alpha[p0 : p] = (1/alpha) sum p eps_h(L)                   (alpha >= 1/2)
                    = (1/(alpha-1)) sum p0 eps_alpha(L)          (alpha <= 1/2)

in which alpha = 0 (reverse KL) and alpha = 1 (KL) are no special points. What is computed is its extension to measures
that need not sum to one, which is smooth in everything, convex and never negative,

    D_alpha[p0 : p] = sum (alpha p + (1-alpha) p0 - p0^(1-alpha) p^alpha) / (alpha (1-alpha))
                    = (1/alpha)     sum (p eps_h(L)      + p0 - p)          (alpha >= 1/2)
                    = (1/(alpha-1)) sum (p0 eps_alpha(L) + p0 - p)          (alpha <= 1/2),

with `p0 - p` from L, without cancellation. Its slope vanishes with L, so that rounding of p is not felt near the
prior, where `sum p eps_h(L)` alone errs by a unit of rounding and D is of second order.

**Derivatives** are `dD/dp = eps_h(L)` and `dD/dp0 = -eps_alpha(L)`. Where p = 0 and the slope is infinite
(alpha <= 1), it counts as 0: no policy that a regulariser chooses is moved there.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import pytrees


class Scales(NamedTuple):
    """Hold what the rounding of a conjugate grows with: per lane, `[*b]`, in reward units unless said otherwise.

    Attributes:
        unit: u, a number.
        logs: `2 + log A`, a number.
        log_prior: largest `|log p0|`.
        temperature: largest `1/beta`.
        cost: largest `max q - Omega*(q)` over states, rounded up.
        reach: bound on `|q|` relative to the lane's offset.
    """

    unit: float
    logs: float
    log_prior: Array
    temperature: Array
    cost: Array
    reach: Array


@jax.custom_jvp
def deformed_exp(x: Array, h: Array) -> Array:
    """Compute `(exp(h x) - 1)/h`, continuous at `h = 0` where it is `x`. Broadcasts; shape of `x` with `h`.

    Where `x` is infinite, the derivatives in `x` count as 0.
    """
    small, safe = _nonzero(h)
    return jnp.where(small, x, jnp.expm1(safe * x) / safe)


def _eps_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, h), (dx, dh) = primals, (pytrees.given(t) for t in tangents)
    out = deformed_exp(x, h)
    finite = jnp.isfinite(x)
    x = jnp.where(finite, x, 0)
    total = jnp.zeros_like(out)
    if dx is not None:
        total = total + jnp.where(finite, jnp.exp(h * x), 0) * dx
    if dh is not None:
        limit = jnp.where(h > 0, 1 / jnp.where(h > 0, h, 1) ** 2, 0)  # of eps_h(-inf) = -1/h
        total = total + jnp.where(finite, deformed_exp_slope(x, h), limit) * dh
    return out, total


deformed_exp.defjvp(_eps_jvp, symbolic_zeros=True)


def deformed_exp_slope(x: Array, h: Array) -> Array:
    """Compute `d eps_h(x)/dh = x^2 f(h x)` with `f(y) = (y e^y - e^y + 1)/y^2`, for finite x; a series near `y = 0`."""
    y = h * x
    near = jnp.abs(y) < 1
    small, far = jnp.where(near, y, 0), jnp.where(near, 1, y)
    series = jnp.zeros_like(y)
    for k in range(19, -1, -1):
        series = series * small + (k + 1) / math.factorial(k + 2)
    return x**2 * jnp.where(near, series, (far * jnp.exp(far) - jnp.expm1(far)) / far**2)


@jax.custom_jvp
def deformed_log(x: Array, h: Array) -> Array:
    """Compute `log(1 + h x)/h`, continuous at `h = 0` where it is `x`; minus infinity where `h x <= -1`, `h > 0`.

    Where it is infinite, its derivatives count as 0.
    """
    small, safe = _nonzero(h)
    return jnp.where(small, x, jnp.log1p(jnp.maximum(safe * x, -1)) / safe)


def _lam_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, h), (dx, dh) = primals, (pytrees.given(t) for t in tangents)
    out = deformed_log(x, h)
    infinite = jnp.isinf(out)
    inside = jnp.where(infinite, 0, out)
    total = jnp.zeros_like(out)
    if dx is not None:
        total = total + dx
    if dh is not None:
        total = total - deformed_exp_slope(inside, h) * dh  # of x = eps_h(lam)
    return out, jnp.where(infinite, 0, jnp.exp(-h * inside) * total)


deformed_log.defjvp(_lam_jvp, symbolic_zeros=True)


def _nonzero(h: Array) -> tuple[Array, Array]:
    """Where `h` counts as 0, and `h` made safe to divide by. At the square of the rounding unit `eps_h(x)` differs
    from `x` by less than rounding for all `|x|` up to the unit's inverse, while `h x` does not underflow yet."""
    small = jnp.abs(h) < jnp.finfo(h.dtype).eps ** 2
    return small, jnp.where(small, 1, h)


def log_ratio(policy: Array, log_prior: Array) -> Array:
    """Compute `log(p/p0)`, 0 where the prior and `p` are both 0, infinite where just one of them is. Shape `[A, ...]`.

    Its derivative counts as 0 where it is infinite or masked.
    """
    masked = jnp.isneginf(log_prior)
    both = (policy > 0) & ~masked
    inside = jnp.log(jnp.where(both, policy, 1)) - jnp.where(both, log_prior, 0)
    return jnp.where(both, inside, jnp.where(policy > 0, jnp.inf, jnp.where(masked, 0, -jnp.inf)))


def weighted(weight: Array, x: Array, add: Callable[[Array], Array] = pytrees.total) -> Array:
    """Compute `sum_a weight x` where weight 0 silences an infinite `x`; `add` is `pytrees.plain_sum` for tangents."""
    return add(weight * jnp.where(weight == 0, 0, x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def alpha_divergence(policy: Array, log_prior: Array, alpha: Array, reduce: pytrees.Reducers = pytrees.LANES) -> Array:
    """Compute `D_alpha[p0 : p]` for every real alpha (the KL divergence `KL(p : p0)` at 1, `KL(p0 : p)` at 0).

    Args:
        policy: `p`, `[A, ...]`, normalised over axis 0 (to rounding, or not: see the module docstring).
        log_prior: `log p0`, broadcastable to `[A, ...]`; minus infinity masks an action.
        alpha: broadcastable to `[...]`.
        reduce: sums over actions.

    Returns:
        `[...]`; infinite where `p` puts mass on a masked action, and where alpha <= 0 and `p` omits an unmasked one.
    """
    return alpha_divergence_at(policy, log_prior, alpha, log_ratio(policy, log_prior), reduce)


def alpha_divergence_at(
    policy: Array, log_prior: Array, alpha: Array, ratio: Array, reduce: pytrees.Reducers = pytrees.LANES
) -> Array:
    """Compute `alpha_divergence` with `log(p/p0)` from a caller who knows it better than `log p` does (underflow)."""
    prior = jnp.exp(log_prior)
    upper, order, scale = _regular_form(alpha)
    heavy = jnp.where(reduce.over(upper), policy, prior)
    divergence = weighted(heavy, deformed_exp(ratio, reduce.over(order)), reduce.total) + reduce.total(
        missing(policy, prior, ratio)
    )
    divergence = divergence / scale
    escaped = jnp.any((policy > 0) & jnp.isneginf(log_prior), axis=reduce.axis)
    return jnp.where(escaped, jnp.inf, divergence)


def _regular_form(alpha: Array) -> tuple[Array, Array, Array]:
    """Which of the two forms of `D_alpha` does not divide by a number near 0: whether the one weighted by p, and its
    order and divisor."""
    upper = alpha >= 0.5
    return upper, jnp.where(upper, alpha - 1, alpha), jnp.where(upper, alpha, alpha - 1)


def divergence_terms(policy: Array, prior: Array, alpha: Array, ratio: Array) -> Array:
    """List what `alpha_divergence_at` is the sum of, action by action, where no mass is on masked actions.

    Args:
        policy, prior, ratio: `p`, `p0` and `log(p/p0)`, arrays over actions.
        alpha: broadcastable to them.
    """
    upper, order, scale = _regular_form(alpha)
    heavy = jnp.where(upper, policy, prior)
    return (heavy * deformed_exp(jnp.where(heavy == 0, 0, ratio), order) + missing(policy, prior, ratio)) / scale


def rounding(policy: Array, log_prior: Array, alpha: Array) -> Array:
    """Bound on the rounding of `alpha_divergence` at any policy, and on how far normalising the policy moves it.

    The terms err by a few u, by u times their exponents, and by the rounding of `L = log(p/p0)` times their slopes,
    which vanish with L. A policy whose sum is `1 + d` has a divergence that differs by `d sum p |eps_h(L)|`.

    Returns:
        `[...]`, in units of D; NaN or infinite where D is.
    """
    prior, ratio = jnp.exp(log_prior), log_ratio(policy, log_prior)
    taken = (policy > 0) & ~jnp.isneginf(log_prior)
    ratio, h = jnp.where(taken, ratio, 0), alpha - 1
    upper = alpha >= 0.5
    order, scale = jnp.where(upper, h, alpha)[None], jnp.abs(jnp.where(upper, alpha, h))
    heavy = jnp.where(taken, jnp.where(upper[None], policy, prior), 0)
    powers = heavy * jnp.exp(order * ratio)
    logs = jnp.where(taken, jnp.abs(jnp.log(jnp.where(taken, policy, 1))) + jnp.abs(log_prior) + jnp.abs(ratio), 0)
    n = policy.shape[0]
    few = 6 + min(n, 4 * n**0.5)
    terms = few * (heavy * jnp.abs(deformed_exp(ratio, order)) + jnp.abs(policy - prior)) + powers * jnp.abs(ratio)
    slopes = logs * jnp.abs(powers - jnp.minimum(policy, prior))
    unit = 0.5 * float(jnp.finfo(policy.dtype).eps)
    moved = jnp.abs(pytrees.total(policy) - 1) + n * unit
    tilt = pytrees.total(jnp.where(taken, policy * jnp.abs(deformed_exp(ratio, h[None])), 0))
    # At the prior itself only the square of the rounding of logarithms is left.
    square = pytrees.total((policy + prior) * jnp.where(taken, 2 + logs, 0) ** 2) * (unit * (2 + jnp.abs(alpha))) ** 2
    return unit * pytrees.total(terms + jnp.where(taken, slopes, 0)) / scale + moved * tilt + square


def missing(policy: Array, prior: Array, ratio: Array) -> Array:
    """Compute `p0 - p` from `log(p/p0)`, relative to rounding of the difference, `[A, ...]`."""
    up = ratio > 0
    # The larger of the two, NaN where either is.
    heavy = jnp.where(up, policy, -jnp.maximum(prior, policy))
    return heavy * jnp.expm1(jnp.where(up, -ratio, ratio))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def kl_divergence(policy: Array, log_prior: Array, reduce: pytrees.Reducers = pytrees.LANES) -> Array:
    """Compute `sum p log(p/p0)` of a normalised `p` and a `p0` of any mass. Shapes as in `alpha_divergence`."""
    return weighted(policy, log_ratio(policy, log_prior), reduce.total)


def divergence_tangent(
    policy: Array,
    log_prior: Array,
    alpha: Array,
    dp: Array | None,
    dlog_prior: Array | None,
    dalpha: Array | None,
    reduce: pytrees.Reducers = pytrees.LANES,
) -> Array:
    """Change of `D_alpha` with its arguments, `[...]`; None for one that does not change."""
    ratio = log_ratio(policy, log_prior)
    terms = []
    if dp is not None:
        h = alpha - 1
        edge = reduce.over(jnp.where(h > 0, -1 / jnp.where(h > 0, h, 1), 0))
        slope = jnp.where(
            jnp.isneginf(ratio), edge, deformed_exp(jnp.where(jnp.isneginf(ratio), 0, ratio), reduce.over(h))
        )
        terms.append(reduce.plain_sum(slope * dp))
    if dlog_prior is not None:
        moved = deformed_exp(ratio, reduce.over(alpha))
        moved = jnp.where(jnp.isfinite(moved), moved, 0)
        terms.append(-reduce.plain_sum(jnp.exp(log_prior) * moved * dlog_prior))
    if dalpha is not None:
        at = lambda a: alpha_divergence_at(policy, log_prior, a, ratio, reduce)  # noqa: E731
        terms.append(jax.jvp(at, (alpha,), (dalpha,))[1])
    return sum(terms, jnp.zeros((), policy.dtype))


def _divergence_jvp(
    reduce: pytrees.Reducers, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    policy, log_prior, alpha = primals
    value = alpha_divergence(policy, log_prior, alpha, reduce)
    dp, dlog_prior, dalpha = (pytrees.given(t) for t in tangents)
    change = divergence_tangent(policy, log_prior, alpha, dp, dlog_prior, dalpha, reduce)
    return value, jnp.broadcast_to(change, value.shape)


def _kl_jvp(
    reduce: pytrees.Reducers, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    value = kl_divergence(*primals, reduce)
    dp, dlog_prior = (pytrees.given(t) for t in tangents)
    change = divergence_tangent(*primals, jnp.ones_like(value), dp, dlog_prior, None, reduce)
    return value, jnp.broadcast_to(change, value.shape)


alpha_divergence.defjvp(_divergence_jvp, symbolic_zeros=True)
kl_divergence.defjvp(_kl_jvp, symbolic_zeros=True)
