r"""Derivatives of the conjugates of the divergences and of their maximisers: actions on the axis of the reducers.

They never pass through the root finding of `conjugates`. With `w = p e^{-h L} = p0^{alpha-1} p^{2-alpha}` on the
support and 0 off it, `W = sum w`, and every change of `q`, `beta`, `alpha` and `log p0` at once,

    d Omega*  =  <p, dq> + (D/beta^2) dbeta - (dD/dalpha dalpha + dD/dp0 dp0)/beta,
    d p       =  t - w (sum t)/W,      t = p dlog p0 + w (beta dq + eps_h(L) dbeta/beta - deps_h(L)/dh dalpha).

The first line is the envelope theorem, the second the derivative of `log p = log p0 + lam_h(beta (q - psi))` with
`d psi` eliminated by normalisation. Both are differentiable again. At an action on the edge of the support (alpha > 1)
they are one-sided derivatives: of the action's staying at probability 0.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from robustreg._core import pytrees
from robustreg.regularisers.divergences import (
    alpha_divergence,
    deformed_exp,
    deformed_exp_slope,
    divergence_tangent,
    log_ratio,
    weighted,
)


class Change(NamedTuple):
    """A direction in the arguments of a conjugate, in their shapes; None for what does not change."""

    q: Array | None
    beta: Array | None
    log_prior: Array | None
    alpha: Array | None = None


def conjugate_tangent(
    policy: Array,
    log_prior: Array,
    alpha: Array,
    beta: Array,
    change: Change,
    reduce: pytrees.Reducers = pytrees.LANES,
) -> Array:
    """Change of the conjugate of `D_alpha/beta` at its maximiser `policy`, `[...]`."""
    dq, dbeta, dlog_prior, dalpha = change
    total = -divergence_tangent(policy, log_prior, alpha, None, dlog_prior, dalpha, reduce) / beta
    if dq is not None:
        total = total + weighted(policy, dq, reduce.plain_sum)
    if dbeta is not None:
        total = total + alpha_divergence(policy, log_prior, alpha, reduce) * dbeta / beta**2
    return total


def kl_policy_tangent(policy: Array, log_prior: Array, beta: Array, change: Change, reduce: pytrees.Reducers) -> Array:
    """Change of `kl_maximiser`'s `policy`, `[A, ...]`, where no weight differs from p.

    With `z = beta dq + dlog p0 + L dbeta/beta` it is `p (z - <p, z>)`: one pass over p and z, and its own transpose.
    """
    z = jnp.zeros((), policy.dtype)
    if change.q is not None:
        z = z + reduce.over(beta) * jnp.where(policy == 0, 0, change.q)
    if change.log_prior is not None:
        z = z + jnp.where((policy == 0) | jnp.isneginf(log_prior), 0, change.log_prior)
    if change.beta is not None:
        z = z + jnp.where(policy == 0, 0, log_ratio(policy, log_prior)) * reduce.over(change.beta / beta)
    return policy * (z - reduce.over(reduce.plain_sum(policy * z)))


def policy_tangent(
    policy: Array, log_prior: Array, alpha: Array, beta: Array, change: Change, reduce: pytrees.Reducers = pytrees.LANES
) -> Array:
    """Change of the maximiser `policy`, `[A, ...]`."""
    dq, dbeta, dlog_prior, dalpha = change
    h = reduce.over(alpha - 1)
    on = policy != 0  # a policy of NaN has a derivative of NaN
    logs = jnp.log(jnp.where(on, policy, 1))
    ratio = jnp.where(on, logs - jnp.where(on, log_prior, 0), 0)
    # For alpha > 2 the weight of an action is infinite where it enters the support: beyond this cap it has all of it.
    cap = 0.4 * math.log(float(jnp.finfo(policy.dtype).max))
    w = jnp.where(on, jnp.exp(jnp.minimum(logs - h * ratio, cap)), 0)
    z = jnp.zeros_like(policy)
    if dq is not None:
        z = z + reduce.over(beta) * jnp.where(on, dq, 0)
    if dbeta is not None:
        z = z + deformed_exp(ratio, h) * reduce.over(dbeta / beta)
    if dalpha is not None:
        z = z - deformed_exp_slope(ratio, h) * reduce.over(dalpha)
    # A constant in z cancels. Taken relative to the action of largest weight, it does so before rounding.
    z = z - reduce.over(at_heaviest(w, z, reduce))
    t = w * z
    if dlog_prior is not None:
        t = t + policy * jnp.where(on, dlog_prior, 0)
    return t - w * reduce.over(reduce.plain_sum(t) / reduce.plain_sum(w))


def at_heaviest(w: Array, z: Array, reduce: pytrees.Reducers) -> Array:
    """Pick `z` of the action of largest weight, `[...]`: of the first of several in a solve, their mean in a layer."""
    if reduce.axis == -1:  # (a search for an index is a slow reduction over a contiguous axis)
        ties = w == reduce.over(reduce.largest(w))
        return reduce.plain_sum(jnp.where(ties, z, 0)) / reduce.plain_sum(ties.astype(z.dtype))
    heaviest = jnp.argmax(w, axis=0)[None] == jnp.arange(w.shape[0]).reshape((-1,) + (1,) * (w.ndim - 1))
    return jnp.sum(jnp.where(heaviest, z, 0), axis=0)
