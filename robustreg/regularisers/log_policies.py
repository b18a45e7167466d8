r"""The logarithm of the policy that a regulariser chooses, where the policy itself underflows too.

The maximiser of `<p, q> - D_alpha[p0 : p]/beta` fulfils, on its support and for some `psi`,

    e^{h L_a}  =  1 + h beta (q_a - psi),        L = log(p/p0),  h = alpha - 1       (L_a = beta (q_a - psi) for KL),

so that any action whose probability is known tells that of all others: with a reference action r,

    L_a  =  L_r + lam_h( -beta (q_r - q_a) e^{-h L_r} ),

where `lam_h(x) = log(1 + h x)/h`. Probabilities that can be represented are taken as they are, and the others from the
best of them. Nothing is searched for, and nothing is lost to `q - psi`, whose two terms may be 1e8/beta.

**Derivatives** are those of the equation, with `psi` eliminated by `sum p = 1`. With `w = p e^{-hL}`,

    dlog p  =  dlog p0 + e^{-hL} (z - m),    z = beta dq + eps_h(L) dbeta/beta - deps_h(L)/dh dalpha,
    m       =  sum (p dlog p0 + w z) / sum w,

in which p is the exponential of the logarithm. (For h > 0 an action whose probability underflows may have a weight w
that does not: what is left of it in p is 0.) An action outside the support, or masked, stays there: its derivative is
0. Where `e^{-hL}` is beyond the largest number there is no derivative to return, and it is NaN for who asks for it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import pytrees
from robustreg.regularisers.conjugates import ratios
from robustreg.regularisers.divergences import deformed_exp, deformed_exp_slope
from robustreg.regularisers.tangents import at_heaviest


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def of_maximiser(
    policy: Array,
    q: Array,
    beta: Array,
    log_prior: Array,
    alpha: Array | None = None,
    reduce: pytrees.Reducers = pytrees.LANES,
) -> Array:
    """Take the logarithm of a maximiser, differentiable in everything that determines it, to any order.

    Args:
        policy: the maximiser for `q`, `[A, ...]`; its own derivative is not used.
        q: action values, `[A, ...]`; entries of masked actions are never looked at.
        beta: broadcastable to `[...]`.
        log_prior: broadcastable to `[A, ...]`.
        alpha: broadcastable to `[...]`; None is 1, KL.
        reduce: maxima over actions.

    Returns:
        `log p`, `[A, ...]`: minus infinity on masked actions and outside the support.
    """
    masked = jnp.isneginf(log_prior)
    # Above this a probability has all its digits.
    least = 16 * float(jnp.finfo(policy.dtype).tiny)
    known = (policy >= least) & ~masked
    logs = jnp.log(jnp.where(policy > 0, policy, 1))
    top = reduce.largest(jnp.where(known, q, -jnp.inf))
    level = reduce.largest(jnp.where(known & (q == reduce.over(top)), logs - log_prior, -jnp.inf))
    gap = jnp.where(masked, 0, reduce.over(beta) * (reduce.over(top) - q))
    ratio = reduce.over(level) - gap if alpha is None else ratios(level, gap, alpha - 1, reduce)[0]
    far = jnp.where(masked, 0, log_prior) + ratio
    # What should not have underflowed and is 0 all the same lies on the edge of the support.
    far = jnp.where(far > math.log(least) + 1, jnp.where(policy > 0, logs, -jnp.inf), far)
    out = jnp.where(known, logs, jnp.where(masked, -jnp.inf, far))
    return jnp.where(jnp.isnan(policy), jnp.nan, out)


def _jvp(reduce: pytrees.Reducers, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    policy, q, beta, log_prior, alpha = primals
    _, dq, dbeta, dprior, dalpha = (None if t is None else pytrees.given(t) for t in tangents)
    out = of_maximiser(*primals, reduce)
    on = ~jnp.isneginf(out) & ~jnp.isneginf(log_prior)
    logs = jnp.where(on, out, 0)
    ratio = jnp.where(on, logs - jnp.where(on, log_prior, 0), 0)
    h = jnp.zeros_like(ratio) if alpha is None else jnp.broadcast_to(reduce.over(alpha - 1), ratio.shape)
    slope = jnp.exp(-h * ratio)
    lost = jnp.isinf(slope)
    slope, p = jnp.where(on & ~lost, slope, 0), jnp.where(on, jnp.exp(logs), 0)
    cap = 0.4 * math.log(float(jnp.finfo(p.dtype).max))
    w = jnp.where(on, jnp.exp(jnp.minimum(logs - h * ratio, cap)), 0)
    # Each change of z is taken times `slope`, for log p, and times `w`, for the mean that normalisation subtracts.
    change, weighted = jnp.zeros_like(out), jnp.zeros_like(out)
    if dq is not None:
        dq = jnp.where(on, dq, 0)
        # A constant in dq cancels. Taken relative to the action of largest weight, it does so before rounding.
        dz = reduce.over(beta) * (dq - reduce.over(at_heaviest(w, dq, reduce)))
        change, weighted = change + slope * dz, weighted + w * dz
    if dbeta is not None:
        rate = reduce.over(dbeta / beta)
        change, weighted = change + _tilt(ratio, h, 1, slope) * rate, weighted + _tilt(ratio, h, p, w) * rate
    if dalpha is not None:
        rate = reduce.over(dalpha)
        change, weighted = change - _bend(ratio, h, 1, slope) * rate, weighted - _bend(ratio, h, p, w) * rate
    if dprior is not None:
        dprior = jnp.where(on, dprior, 0)
        change, weighted = change + dprior, weighted + p * dprior
    mean = reduce.plain_sum(weighted) / reduce.plain_sum(w)
    total = jnp.where(on, change - slope * reduce.over(mean), 0)
    return out, pytrees.gate(jnp.where(jnp.isnan(out), jnp.nan, total), lost & on)


of_maximiser.defjvp(_jvp, symbolic_zeros=True)


def _tilt(ratio: Array, h: Array, one: Array | int, power: Array) -> Array:
    """`power eps_h(L)` of a `power` that is `one e^{-hL}`, also where that under- or overflows."""
    steep = jnp.abs(h * ratio) > 1
    far = (one - power) / jnp.where(steep, h, 1)
    return jnp.where(steep, far, one * deformed_exp(jnp.where(steep, 0, ratio), -h))


def _bend(ratio: Array, h: Array, one: Array | int, power: Array) -> Array:
    """`power deps_h(L)/dh` likewise."""
    y = h * ratio
    steep = jnp.abs(y) > 1
    far = (one * (y - 1) + power) / jnp.where(steep, h, 1) ** 2
    inside, order = jnp.where(steep, 0, ratio), jnp.where(steep, 0, h)
    return jnp.where(steep, far, one * jnp.exp(-order * inside) * deformed_exp_slope(inside, order))
