r"""The worst case of a policy at strength 1, from probabilities or from their logarithms.

    log_alpha(p/p0) + (1 - alpha) D_alpha  =  eps_h(L) + psi,         L = log(p/p0),  h = alpha - 1,  psi = -h D,

is the gradient of the degree-one extension of `D_alpha` to unnormalised measures, so that its mean over p is `D_alpha`
and the conjugate of it is 0 [Brekelmans et al. 2022]. 0 on masked actions; minus infinity where `p = 0 < p0` and
alpha <= 1.

**Why logarithms.** The probabilities of a confident policy underflow. Its worst case is finite, and linear in `log p`
for KL, but nothing of it can be told from `p = 0`. From `log p` all is told, values and derivatives,

    d eps_h(L) = e^{hL} dL,    dD = sum p eps_h(L) dlog p - sum p0 eps_alpha(L) dlog p0,

the second being that of the extension to measures that need not sum to 1. The product `p^alpha p0^(1-alpha)` is formed
in the exponent, `exp(log p0 + alpha L)`, wherever one of its factors could overflow against the other.

**From probabilities** the same derivatives are divided by p. Where `p = 0 < p0` some are infinite, and what changes p
there may well be a softmax that has underflowed, whose own derivative is then 0: their product is not 0 but unknown,
and `gate` makes it NaN for who asks for it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import pytrees
from robustreg.regularisers import actions
from robustreg.regularisers.divergences import deformed_exp, deformed_exp_slope, log_ratio


def from_log_policy(
    log_policy: Array,
    log_prior: Array,
    alpha: Array | None = None,
    reduce: pytrees.Reducers = pytrees.LANES,
    action: Array | None = None,
) -> Array:
    """Compute the worst case at strength 1 of `exp(log_policy)`, `[A, ...]`, differentiable to any order.

    Args:
        log_policy: `[A, ...]`; minus infinity is an action never taken. Masked actions whose probability underflows
            count as such, whatever is written there.
        log_prior: broadcastable to `[A, ...]`.
        alpha: broadcastable to `[...]`; None is 1, KL, for which D plays no part.
        reduce: sums over actions.
        action: which one is wanted, with an axis of 1 for actions, as has then what is returned; None: all.
    """
    offset = None if alpha is None else reduce.over(_offset(_silent(log_policy, log_prior), log_prior, alpha, reduce))
    if action is not None:
        log_policy, log_prior = (actions.take(x, action, reduce.axis) for x in (log_policy, log_prior))
    log_policy = _silent(log_policy, log_prior)
    absent = jnp.isneginf(log_prior) & jnp.isneginf(log_policy)
    if alpha is None or offset is None:
        return jnp.where(absent, 0, _log_tilt(log_policy, log_prior))
    return _together(tilt(log_policy, log_prior, reduce.over(alpha - 1)), offset, absent)


def _silent(log_policy: Array, log_prior: Array) -> Array:
    """Minus infinity for masked actions whose probability underflows."""
    absent = jnp.isneginf(log_prior) & ((jnp.exp(log_policy) == 0) | jnp.isneginf(log_policy))
    return jnp.where(absent, -jnp.inf, log_policy)


def from_policy(
    policy: Array,
    log_prior: Array,
    alpha: Array | None = None,
    reduce: pytrees.Reducers = pytrees.LANES,
    action: Array | None = None,
) -> Array:
    """Compute it from probabilities `policy`; derivatives are right or NaN."""
    offset = None if alpha is None else reduce.over(_offset_of(policy, log_prior, alpha, reduce))
    if action is not None:
        policy, log_prior = (actions.take(x, action, reduce.axis) for x in (policy, log_prior))
    absent = jnp.isneginf(log_prior) & (policy == 0)
    if alpha is None or offset is None:
        total = jnp.where(absent, 0, _log_tilt_of(policy, log_prior))
    else:
        total = _together(_tilt_of(policy, log_prior, reduce.over(alpha - 1)), offset, absent)
    return jnp.where(jnp.isnan(policy), jnp.nan, total)


def _together(own: Array, offset: Array, absent: Array) -> Array:
    # At alpha <= 0 an omitted action makes D infinite, and (1 - alpha) D - inf undefined: the -inf of the omitted
    # action itself is kept, every other entry is +inf.
    total = jnp.where(jnp.isneginf(own), own, own + offset)
    return jnp.where(absent, 0, total)


@jax.custom_jvp
def over(x: Array, beta: Array) -> Array:
    """Compute `x/beta`, whose derivative in beta is lost where x is infinite, for who asks for it. They broadcast."""
    return x / beta


@over.defjvp
def _over_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, beta), (dx, dbeta) = primals, tangents
    lost = jnp.isinf(x)
    rate = over(jnp.where(lost, 1, x), beta)
    return over(x, beta), dx / beta - rate * pytrees.gate(jnp.broadcast_to(dbeta / beta, x.shape), lost)


# ---------------------------------------------------------------------------------------------------------------
# from log-probabilities


def _ratio(log_policy: Array, log_prior: Array) -> Array:
    """`L`, infinite where p or p0 alone is 0, 0 where both are."""
    masked = jnp.isneginf(log_prior)
    inside = log_policy - jnp.where(masked, 0, log_prior)
    return jnp.where(masked, jnp.where(jnp.isneginf(log_policy), 0, jnp.inf), inside)


def _slope(ratio: Array, h: Array) -> tuple[Array, Array]:
    """`e^{hL}`, the derivative of `eps_h`, and where it is infinite (1 is returned there)."""
    finite = jnp.isfinite(ratio)
    inside = jnp.exp(h * jnp.where(finite, ratio, 0))
    edge = jnp.where(jnp.isneginf(ratio), jnp.where(h == 0, 1.0, 0.0), jnp.where(finite, inside, jnp.nan))
    lost = jnp.where(finite, jnp.isinf(inside), (ratio > 0) | (jnp.isneginf(ratio) & (h < 0)))
    return jnp.where(lost, 1, edge), lost


def _order_slope(ratio: Array, h: Array) -> tuple[Array, Array]:
    """`d eps_h(L)/dh`, and where it is infinite (1 is returned there)."""
    finite = jnp.isfinite(ratio)
    inside = deformed_exp_slope(jnp.where(finite, ratio, 0), h)
    limit = jnp.where(h > 0, 1 / jnp.where(h > 0, h, 1) ** 2, 0)  # of eps_h(-inf) = -1/h
    lost = ~jnp.isfinite(inside) | (ratio == jnp.inf) | (jnp.isneginf(ratio) & (h <= 0))
    return jnp.where(lost, 1, jnp.where(finite, inside, jnp.where(jnp.isnan(ratio), jnp.nan, limit))), lost


@jax.custom_jvp
def tilt(log_policy: Array, log_prior: Array, h: Array) -> Array:
    """Compute `eps_h(L)`, `[A, ...]`, of an `h` that broadcasts; derivatives are right or NaN for who asks."""
    return deformed_exp(_ratio(log_policy, log_prior), h)


def _tilt_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (log_policy, log_prior, h), (dlog, dprior, dh) = primals, (pytrees.given(t) for t in tangents)
    out = tilt(*primals)
    ratio = _ratio(log_policy, log_prior)
    masked = jnp.isneginf(log_prior)
    total = _by_order(ratio, h, dh, out)
    slope, lost = _slope(ratio, h)
    moved = [t if sign > 0 else -t for t, sign in ((dlog, 1), (dprior, -1)) if t is not None]
    for t in moved:
        t = jnp.where(masked, 0, jnp.broadcast_to(t, out.shape))
        total = total + slope * pytrees.gate(t, lost & ~masked)
    return out, total


tilt.defjvp(_tilt_jvp, symbolic_zeros=True)


def _log_tilt(log_policy: Array, log_prior: Array) -> Array:
    """Return the same for KL: `L`, linear where it is finite, so that nothing of it needs a rule."""
    masked = jnp.isneginf(log_prior)
    inside = jnp.where(masked, 0, log_policy) - jnp.where(masked, 0, log_prior)
    return jnp.where(masked, jnp.where(jnp.isneginf(log_policy), 0, jnp.inf), inside)


def _by_order(ratio: Array, h: Array, dh: Array | None, out: Array) -> Array:
    if dh is None:
        return jnp.zeros_like(out)
    rate, lost = _order_slope(ratio, h)
    return rate * pytrees.gate(jnp.broadcast_to(dh, out.shape), lost)


def _times_eps(weight: Array, log_prior: Array, ratio: Array, h: Array, alpha: Array) -> Array:
    """`weight eps_h(L)` for `weight e^{hL} = p0 e^{alpha L}`, also where `e^{hL}` overflows and weight underflows.

    A weight of 0 silences an infinite `L`.
    """
    steep = (h * ratio > 1) & jnp.isfinite(ratio)
    product = jnp.exp(jnp.where(steep, log_prior + alpha * jnp.where(steep, ratio, 0), 0))
    far = (product - weight) / jnp.where(steep, h, 1)
    return jnp.where(steep, far, weight * deformed_exp(jnp.where(steep | (weight == 0), 0, ratio), h))


def _divergence(policy: Array, log_prior: Array, alpha: Array, ratio: Array, reduce: pytrees.Reducers) -> Array:
    """`D_alpha`, `[...]`, from the form that is regular at its alpha; see `divergences`."""
    h, upper = alpha - 1, alpha >= 0.5
    weight = jnp.where(reduce.over(upper), policy, jnp.exp(log_prior))
    order = reduce.over(jnp.where(upper, h, alpha))
    terms = _times_eps(weight, log_prior, ratio, order, reduce.over(alpha))
    divergence = reduce.total(terms) / jnp.where(upper, alpha, h)
    escaped = jnp.any(jnp.isposinf(ratio), axis=reduce.axis)
    return jnp.where(escaped, jnp.inf, divergence)


def _psi(divergence: Array, alpha: Array) -> Array:
    return (1 - alpha) * jnp.where((alpha == 1) & jnp.isinf(divergence), 0, divergence)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _offset(log_policy: Array, log_prior: Array, alpha: Array, reduce: pytrees.Reducers) -> Array:
    """`psi = (1 - alpha) D_alpha`, `[...]`."""
    ratio = _ratio(log_policy, log_prior)
    return _psi(_divergence(jnp.exp(log_policy), log_prior, alpha, ratio, reduce), alpha)


def _offset_jvp(reduce: pytrees.Reducers, primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (log_policy, log_prior, alpha), (dlog, dprior, dalpha) = primals, (pytrees.given(t) for t in tangents)
    out = _offset(*primals, reduce)
    policy, ratio = jnp.exp(log_policy), _ratio(log_policy, log_prior)
    h, order = reduce.over(alpha - 1), reduce.over(alpha)
    total = _by_order_of(policy, log_prior, alpha, ratio, dalpha, reduce)
    if dlog is not None:
        total = total - (alpha - 1) * _against(_times_eps(policy, log_prior, ratio, h, order), dlog, reduce)
    if dprior is not None:
        rate = _times_eps(jnp.exp(log_prior), log_prior, ratio, order, order)
        total = total + (alpha - 1) * _against(rate, dprior, reduce)
    return out, pytrees.gate(jnp.broadcast_to(total, out.shape), jnp.isinf(out))


_offset.defjvp(_offset_jvp, symbolic_zeros=True)


def _against(rate: Array, change: Array, reduce: pytrees.Reducers, silent: Array | None = None) -> Array:
    """`sum_a rate change`, lost where a rate is infinite, unless what it is for is `silent` about it."""
    infinite = jnp.isinf(rate)
    lost = infinite if silent is None else infinite & ~silent
    moved = pytrees.gate(jnp.broadcast_to(change, rate.shape), lost)
    return reduce.plain_sum(jnp.where(infinite, 1, rate) * moved)


def _by_order_of(
    policy: Array, log_prior: Array, alpha: Array, ratio: Array, dalpha: Array | None, reduce: pytrees.Reducers
) -> Array:
    """Change of `psi` with alpha, `[...]`, where it is finite."""
    if dalpha is None:
        return jnp.zeros(reduce.without_actions(policy), policy.dtype)
    fixed = lambda a: _divergence(policy, log_prior, a, ratio, reduce)  # noqa: E731
    value, change = jax.jvp(fixed, (alpha,), (dalpha,))
    return (1 - alpha) * change - jnp.where(jnp.isinf(value), 0, value) * dalpha


# ---------------------------------------------------------------------------------------------------------------
# from probabilities


@jax.custom_jvp
def _power(policy: Array, log_prior: Array, a: Array, b: Array) -> Array:
    """`p^a p0^-b`, with derivatives that are right or NaN at `p = 0` too; 0 there for a < 0, and on masked actions."""
    masked = jnp.isneginf(log_prior)
    on = (policy > 0) & ~masked
    prior = jnp.where(masked, 0, log_prior)
    inside = jnp.exp(a * jnp.log(jnp.where(on, policy, 1)) - b * prior)
    return jnp.where(on, inside, jnp.where((a == 0) & ~masked, jnp.exp(-b * prior), 0))


def _power_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (policy, log_prior, a, b), (dp, dprior, da, db) = primals, (pytrees.given(t) for t in tangents)
    out = _power(*primals)
    none = (policy == 0) & ~jnp.isneginf(log_prior)
    total = jnp.zeros_like(out)
    if dp is not None:
        lost = none & (a < 1) & (a != 0)
        total = total + jnp.where(lost, 1, a * _power(policy, log_prior, a - 1, b)) * pytrees.gate(dp, lost)
    prior = jnp.where(jnp.isneginf(log_prior), 0, log_prior)
    if dprior is not None:
        total = total - b * out * jnp.broadcast_to(jnp.where(jnp.isneginf(log_prior), 0, dprior), out.shape)
    if da is not None:
        logs, lost = jnp.log(jnp.where(policy > 0, policy, 1)), none & (a <= 0)
        total = total + jnp.where(lost, 1, logs * out) * pytrees.gate(jnp.broadcast_to(da, out.shape), lost)
    return out, total if db is None else total - prior * out * db


_power.defjvp(_power_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _tilt_of(policy: Array, log_prior: Array, h: Array) -> Array:
    """`eps_h(log(p/p0))`, `[A, ...]`, with derivatives in p: `p^(h-1) p0^-h`, infinite at `p = 0` for h < 1."""
    return deformed_exp(log_ratio(policy, log_prior), h)


def _tilt_of_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (policy, log_prior, h), (dp, dprior, dh) = primals, (pytrees.given(t) for t in tangents)
    out = _tilt_of(*primals)
    ratio = log_ratio(policy, log_prior)
    masked = jnp.isneginf(log_prior)
    total = _by_order(ratio, h, dh, out)
    order = jnp.broadcast_to(h, out.shape)
    if dp is not None:
        rate = _power(policy, log_prior, order - 1, order)
        lost = jnp.isinf(rate) | ((policy == 0) & ~masked & (order < 1)) | ((policy > 0) & masked)
        total = total + jnp.where(lost, 1, rate) * pytrees.gate(dp, lost)
    if dprior is not None:
        slope, lost = _slope(ratio, h)
        dprior = jnp.where(masked, 0, jnp.broadcast_to(dprior, out.shape))
        total = total - slope * pytrees.gate(dprior, lost & ~masked)
    return out, total


_tilt_of.defjvp(_tilt_of_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _log_tilt_of(policy: Array, log_prior: Array) -> Array:
    """Return the same for KL."""
    return log_ratio(policy, log_prior)


def _log_tilt_of_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (policy, log_prior), (dp, dprior) = primals, (pytrees.given(t) for t in tangents)
    out = _log_tilt_of(policy, log_prior)
    masked = jnp.isneginf(log_prior)
    total = jnp.zeros_like(out)
    if dp is not None:
        lost, silent = (policy == 0) ^ masked, (policy == 0) & masked
        rate = jnp.where(lost, 1, jnp.where(silent, 0, 1 / jnp.where(policy == 0, 1, policy)))
        total = total + rate * pytrees.gate(dp, lost)
    if dprior is not None:
        total = total - jnp.where(masked, 0, jnp.broadcast_to(dprior, out.shape))
    return out, total


_log_tilt_of.defjvp(_log_tilt_of_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _offset_of(policy: Array, log_prior: Array, alpha: Array, reduce: pytrees.Reducers) -> Array:
    """`psi = (1 - alpha) D_alpha`, `[...]`."""
    return _psi(_divergence(policy, log_prior, alpha, log_ratio(policy, log_prior), reduce), alpha)


def _offset_of_jvp(
    reduce: pytrees.Reducers, primals: tuple[Array, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    (policy, log_prior, alpha), (dp, dprior, dalpha) = primals, (pytrees.given(t) for t in tangents)
    out = _offset_of(*primals, reduce)
    total = _by_order_of(policy, log_prior, alpha, log_ratio(policy, log_prior), dalpha, reduce)
    # At alpha = 1 nothing of D is left, however steep it is.
    h, none = alpha - 1, reduce.over(alpha == 1)
    if dp is not None:
        total = total - h * _against(_tilt_of(policy, log_prior, reduce.over(h)), dp, reduce, none)
    if dprior is not None:
        rate = jnp.exp(log_prior) * _tilt_of(policy, log_prior, reduce.over(alpha))
        total = total + h * _against(rate, dprior, reduce, none)
    return out, pytrees.gate(jnp.broadcast_to(total, out.shape), jnp.isinf(out))


_offset_of.defjvp(_offset_of_jvp, symbolic_zeros=True)
