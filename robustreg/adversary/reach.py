r"""How far a perturbation can be scaled, or a regulariser weakened, before it leaves the robust set.

The robust set is `R = { x : Omega*(x) <= 0 }`. Because `Omega*` at strength `t beta` is `Omega*_beta(t x)/t`, scaling
the perturbation and scaling beta are one question: which is the largest `t` with

    G(t) = sum_s w(s) Omega*_{t beta(s)}(x(s, .)) <= 0        (one state alone, or several weighted by visits)?

`G` increases in `t`, from the mean `sum w <p0, x>` at 0 to the maximum `sum w max x` at infinity. Hence `t` is infinite
where the maximum is at most 0 (every action that the prior allows loses nothing), 0 where the mean is at least 0 and
the maximum is not, and else the root. `Omega*` being a maximum over policies, `t` is also a smallest ratio of price
to gain,

    t  =  min { sum w Omega(p) / sum w <p, x>  :  sum w <p, x> > 0 },

and Dinkelbach's method for such a ratio, "take the ratio of the policy that is best at the last t", is Newton's
method on the convex `t G(t)`,

    t <- sum w Omega(p_t) / sum w <p_t, x>  =  t (1 - G(t) / sum w <p_t, x>),       p_t = argmax Omega*_{t beta}(x):

it descends to the root from any policy of positive gain, quadratically, and needs no bracket. The first policy mixes
the prior with its restriction to the best actions, so that its ratio is of the root's order both for a mean close to 0
(where t is small) and for a maximum close to 0 (where it is large): about six steps are typical.

**Derivatives** are those of the implicit function theorem, `dt = -dG/G'(t)` at fixed t, and never pass through the
iteration. Where t is 0 or infinite they are 0.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import checks, loops, pytrees, roots
from robustreg.regularisers.bound import Bound, maximise
from robustreg.regularisers.divergences import weighted
from robustreg.regularisers.families import Divergence
from robustreg.regularisers.regulariser import Regulariser

# Six steps are typical. From far right of a nearly quadratic level each step halves t: no bound on the digits needed.
_MAX_STEPS = 100


def implicit_root(
    level: Callable[..., Array],
    slope: Callable[..., Array],
    find: Callable[..., Array],
    exists: Callable[[Array], Array] = jnp.isfinite,
) -> Any:
    """Return a root as a differentiable function of what determines it, to any order, whatever found it.

    Args:
        level: `level(*arguments, t)`, elementwise in the shape of `t`, whose root in `t` is wanted.
        slope: its derivative in `t`, as a function of the same; it need only be right at the root.
        find: `find(*arguments)`, the `t` with level 0, or what stands for there being none.
        exists: tells the one from the other.

    Returns:
        `find` with the derivative `dt = -dlevel/slope`; 0 where there is no root, NaN where `t` is NaN.
    """

    @jax.custom_jvp
    def root(*arguments: Any) -> Array:
        return find(*arguments)

    def root_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        t = root(*primals)
        moves = exists(t)
        at = jnp.where(moves, t, 1)
        change = jax.jvp(lambda *arguments: level(*arguments, at), primals, tangents)[1]
        rate = jnp.where(moves, slope(*primals, at), 1)
        return t, jnp.where(moves, -change / rate, jnp.where(jnp.isnan(t), t, 0))

    root.defjvp(root_jvp)
    return root


def expect_reference(reg: Any, position: str) -> None:
    """Refuse what is no regulariser, and one whose robust sets do not hold 0."""
    checks.expect_type(reg, Regulariser, position, "kl")
    if not reg.has_reference:
        raise TypeError(
            f"the {position} has no reference policy (entropy): its robust sets do not hold 0 and are not nested in "
            "beta, so that nothing can be scaled to their boundary; use kl"
        )


def expect_order(reg: Any) -> None:
    """Refuse what is no divergence of an order alpha: of others the conjugate over all measures is not known."""
    expect_reference(reg, "first argument")
    if not isinstance(reg, Divergence):
        raise TypeError(f"the unnormalised set is known for kl and alpha alone, not for a {type(reg).__name__}")


def _pool(weight: Array | None, x: Array) -> Array:
    """Sum over states (the last axis, kept) with weights, or every state by itself."""
    return x if weight is None else jnp.sum(weight * x, axis=-1, keepdims=True)


def _level(reg: Bound, x: Array, weight: Array | None, t: Array) -> Array:
    return _pool(weight, maximise(reg.scaled(t), x)[0])


def _slope(reg: Bound, x: Array, weight: Array | None, t: Array) -> Array:
    """`dG/dt`: that of `t G` is the gain of the policy, and `G` is 0."""
    return _gain(weight, maximise(reg.scaled(t), x)[1], x) / t


def _gain(weight: Array | None, policy: Array, x: Array) -> Array:
    return _pool(weight, weighted(policy, x))


def _first_ratio(reg: Bound, x: Array, weight: Array | None, top: Array) -> Array:
    """Price over gain of a policy between the prior and its restriction to the best actions, in the shape of t."""
    prior = jnp.exp(reg.log_prior)
    mean = _pool(weight, weighted(prior, x))
    # By how much less than the maximum an action may give and count as one of the best: half of what all states gain.
    all_gain = _pool(weight, top)
    margin = 0.5 * all_gain / _pool(weight, jnp.ones_like(top))
    best = jnp.where(x >= (top - margin)[None], prior, 0)
    best = best / jnp.sum(best, axis=0, keepdims=True)
    gain = _gain(weight, best, x)
    # The mixture gains as much as the prior loses, or half of what the best actions do, whichever is less.
    width = gain - mean
    share, rest = jnp.minimum(-2 * mean, 0.5 * gain - mean) / width, jnp.maximum(gain + mean, 0.5 * gain) / width
    policy = share[None] * best + rest[None] * prior
    return _pool(weight, reg.value(policy)) / _gain(weight, policy, x)


def _find(reg: Bound, x: Array, weight: Array | None) -> Array:
    # Its maximum is to be one of its entries.
    x = pytrees.materialised(x)
    best = jnp.max(jnp.where(jnp.isneginf(reg.log_prior), -jnp.inf, x), axis=0)
    mean = _pool(weight, weighted(jnp.exp(reg.log_prior), x))
    top = _pool(weight, best)
    unlimited, none = top <= 0, (mean >= 0) & (top > 0)
    unit = 2 * float(jnp.finfo(x.dtype).eps)

    def step(t: Array, done: Array) -> tuple[Array, Array]:
        value, policy = maximise(reg.scaled(t), x)
        move = _pool(weight, value) / _gain(weight, policy, x)
        # t descends, but not to 0: any other step is rounding at the root, or NaN.
        done = done | ~((move > 0) & (move < 1))
        return jnp.where(done, t, t * (1 - move)), done | (move <= unit)

    # Only where to start from: there minus infinity may be any loss beyond every other.
    floor = jnp.maximum(x, -(float(jnp.finfo(x.dtype).max) ** 0.5))
    start = jnp.maximum(_first_ratio(reg, floor, weight, best), 0)
    done = unlimited | none | ~((start > 0) & jnp.isfinite(start))
    t = loops.until_done(step, start, done, _MAX_STEPS, (reg, x, weight))

    def level(t: Array) -> Array:
        return _pool(weight, maximise(reg.scaled(t), x)[0])

    # Newton starts from a ratio that may overflow, or so far right that the level there is rounding or not finite.
    # A root is one if the level changes sign close to it.
    near = 0.5 * float(jnp.finfo(x.dtype).eps) ** 0.5
    lost = ~(unlimited | none) & ~((level(t * (1 - near)) <= 0) & (level(t * (1 + near)) > 0))
    t = loops.cond(jnp.any(lost), lambda: jnp.where(lost, _bisected(level, t), t), lambda: t, (reg, x, weight))
    # Beyond a quarter of the largest number, 1/beta may count as 0: what changes sign there is no level.
    t = jnp.where(t >= 0.25 * (1 - 1e-3) * float(jnp.finfo(x.dtype).max), jnp.inf, t)
    t = jnp.where(unlimited, jnp.inf, jnp.where(none, 0, t))
    return jnp.where(jnp.isnan(top) | jnp.isnan(mean), jnp.nan, t)


def _bisected(level: Callable[[Array], Array], like: Array) -> Array:
    """Where an increasing `level` becomes positive, by bisection of the logarithm over all numbers that there are.

    Infinite where it does nowhere, or above 1 only where it is no number any more: it overflows before its root.
    """
    most = (1 - 1e-4) * math.log(float(jnp.finfo(like.dtype).max))

    # Logarithms to one unit of 1: below that, t has no digits.
    ends = jnp.full_like(like, -most), jnp.full_like(like, most)
    low, high = roots.bisect(lambda x: ~(level(jnp.exp(x)) <= 0), *ends, size=1.0)
    # (At the other end, where a level is rounding or its beta no number, the root is 0 for all that can be told.)
    beyond = (high >= jnp.asarray(most, like.dtype)) | ((high > 0) & jnp.isnan(level(jnp.exp(high))))
    return jnp.where(beyond, jnp.inf, jnp.exp(low))


def proper(t: Array) -> Array:
    """Tell whether a reach is a root, neither 0 nor infinite."""
    return jnp.isfinite(t) & (t != 0)


_reach = implicit_root(_level, _slope, lambda *arguments: lax.stop_gradient(_find(*arguments)), proper)


def reach(reg: Bound, x: Array, weight: Array | None = None) -> Array:
    """Find the largest `t` for which `t x` is in the robust set of a bound regulariser.

    Args:
        reg: a bound regulariser whose prior sums to 1.
        x: `[A, ...]`; entries of masked actions are never looked at.
        weight: None, or a non-negative weight per state, broadcastable to `[...]`, the last axis being the states:
            the set is then that of perturbations with `sum_s w(s) Omega*(x(s, .)) <= 0`.

    Returns:
        `[...]`, from 0 to infinity; with weights `[..., 1]`. NaN where x holds NaN. Differentiable in everything.
        For alpha <= 0 any policy pays an infinite price for never taking an action, so that an entry of minus infinity
        makes the result infinite; for alpha > 0 it takes that action out of every policy, at its price.
    """
    x = jnp.where(jnp.isneginf(reg.log_prior), 0, x)
    x = jnp.broadcast_to(x, x.shape[:1] + jnp.broadcast_shapes(x.shape[1:], reg.beta.shape))
    finite = jnp.all(jnp.isfinite(x), axis=0)
    if weight is not None:
        # What is not finite where nobody goes counts for nothing.
        x = jnp.where(((weight == 0) & ~finite)[None], 0, x)
    # Replaced by losses of 1, whose reach is infinite too and has a derivative.
    free = (
        jnp.any(jnp.isneginf(x), axis=0) & ~jnp.any(jnp.isnan(x) | jnp.isposinf(x), axis=0) & reg.needs_every_action()
    )
    if weight is not None:
        free = jnp.any(free, axis=-1, keepdims=True)
    return _reach(reg, jnp.where(free[None], -1, x), weight)
