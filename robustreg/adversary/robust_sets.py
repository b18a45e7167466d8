r"""Sets of reward perturbations: the robust set of a regulariser and three others beside it.

A set of perturbations `dr` (subtracted from the reward, state by state) has a *support function*: the most that a
member takes from a policy, `max { <p, dr> : dr in the set }`. Four of them belong to one regulariser and policy:

    Orthant             dr <= worst_case(pi)           what is below the worst case of one policy
    UnnormalisedSet     (Omega over all p >= 0)*(dr) <= 0
    RobustSet           Omega*(dr) <= 0                that is <p, dr> <= Omega(p) for every policy p
    HalfSpace           <pi, dr> <= Omega(pi)          what that says of one policy

The first and the second lie in the third, the third in the fourth, and all but the second touch where dr is the worst
case of pi [Brekelmans et al. 2022, prop. 1, app.]. The second is the third for KL and smaller for every other alpha:
its support function is a deformation of the price, `(1/beta) eps_h(lam_{alpha h}(D))` with `h = alpha - 1`, that is
`(1 - Z^{1/alpha})/(beta (1-alpha))` with `Z = sum p0^{1-alpha} p^alpha`, below `D/beta`. Strong duality needs the
third.

Every one is convex and closed under decreasing dr, and adding the same amount to every action leads out of it. That
amount is the `slack`, so that `x + slack(x)` projects any x to the boundary. **Uniform samples** use the same shear:
`(y, c) -> y + (slack(y) - c)` preserves volume, so that differences between actions drawn uniformly from a ball and a
depth c drawn uniformly from an interval give a perturbation that is uniform, exactly and with no rejection, within the
members of such differences and depth. (A set unbounded below has no uniform distribution as a whole.)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustreg._core import checks, extremes, pytrees, roots
from robustreg.adversary import perturbations, reach
from robustreg.regularisers.bound import Bound, maximise
from robustreg.regularisers.divergences import alpha_divergence, deformed_exp, deformed_log, log_ratio, weighted
from robustreg.regularisers.regulariser import Regulariser


class PerturbationSet:
    """A convex set of perturbations per state, closed under decreasing them. Sets are pytrees.

    A subclass gives `slack`, `support` and `radius`. Perturbations and policies are `[*B, ..., A]`, the batch axes of
    the regulariser leading; entries of masked actions are ignored.
    """

    def slack(self, perturbation: ArrayLike) -> Array:
        """Tell how much may be added to every action within the set, `[*B, ...]` in reward units; negative outside."""
        raise TypeError(f"{type(self).__name__} does not define slack")

    def support(self, policy: ArrayLike) -> Array:
        """Return the most that a member takes from a policy in expectation, `[*B, ...]` in reward units."""
        raise TypeError(f"{type(self).__name__} does not define support")

    def radius(self, direction: ArrayLike) -> Array:
        """Find the largest `t >= 0` with `t * direction` in the set, `[*B, ...]`; infinite where there is no end."""
        raise TypeError(f"{type(self).__name__} does not define radius")

    def contains(self, perturbation: ArrayLike, tol: ArrayLike = 0.0) -> Array:
        """Tell whether a perturbation is in the set, `[*B, ...]`; `tol` forgives rounding on the boundary."""
        slack = self.slack(perturbation)
        return slack >= -jnp.asarray(tol, slack.dtype)

    def project(self, perturbation: ArrayLike) -> Array:
        """Shift a perturbation by the same amount in every action to the boundary, `[*B, ..., A]`."""
        slack = self.slack(perturbation)
        x = jnp.asarray(perturbation, slack.dtype)
        return jnp.broadcast_to(x, slack.shape + x.shape[-1:]) + slack[..., None]


@pytrees.dataclass
class RobustSet(PerturbationSet):
    """`{dr : Omega*(dr) <= 0}`: what every policy's regularised value is guaranteed against."""

    regulariser: Regulariser

    def slack(self, perturbation: ArrayLike) -> Array:
        """Compute `-Omega*(dr)`; see `adversary.slack`."""
        return perturbations.slack(self.regulariser, perturbation)

    def support(self, policy: ArrayLike) -> Array:
        """Compute `Omega(p)`, attained at `worst_case`."""
        return _price(self.regulariser, policy)

    def worst_case(self, policy: ArrayLike) -> Array:
        """Return the member that takes `support`, `[*B, ..., A]`; see `adversary.worst_case`."""
        return perturbations.worst_case(self.regulariser, policy)

    def radius(self, direction: ArrayLike) -> Array:
        """Find the largest `t >= 0` with `t * direction` in the set, `[*B, ...]`.

        Infinite where no allowed action has a positive entry; 0 where the prior's mean is not negative (and some
        entry positive): 0 is a boundary point at which the prior is the outward normal. Not for `entropy`.
        """
        reach.expect_reference(self.regulariser, "first argument")
        return _kernel(_reach, self.regulariser, direction)

    def boundary(self, share: ArrayLike) -> Array:
        """Return the boundary for two actions, in closed form.

        Args:
            share: `[*B, ...]` in [0, 1]: probability of the first action of the policy whose worst case is wanted.

        Returns:
            `[*B, ..., 2]`: the boundary points with outward normal `(share, 1 - share)`. For alpha <= 1 the ends 0 and
            1 are at infinity; for alpha > 1 they are points, from which the boundary goes on to minus infinity in the
            action that is never taken.
        """
        share = jnp.asarray(share, checks.canonical(self.regulariser.beta).dtype)
        checks.require("share", share, lambda x: (x >= 0) & (x <= 1), "a probability lies between 0 and 1")
        return perturbations.worst_case(self.regulariser, jnp.stack([share, 1 - share], axis=-1))

    def sample(self, key: Array, shape: tuple[int, ...], spread: ArrayLike = 1.0, depth: ArrayLike = 0.0) -> Array:
        """Uniform members of a bounded part of the set, exactly and without rejection.

        The part is `{dr : ||dr - mean(dr)||_2 <= spread/beta, 0 <= slack(dr) <= depth/beta}`, mean and norm over the
        actions that the prior allows. Depth 0 gives boundary points, uniform as seen along the diagonal.

        Args:
            key: a random key.
            shape: of the result, `[*B, ..., A]`.
            spread, depth: in units of 1/beta (with state_scale), broadcastable to `shape[:-1]`; not negative.

        Returns:
            Perturbations in reward units, of the given shape; 0 on masked actions.

        Raises:
            ValueError: a shape with which the regulariser does not broadcast; a negative spread or depth.
        """
        checks.expect_type(self.regulariser, Regulariser, "first argument", "kl")
        for name, x in (("spread", spread), ("depth", depth)):
            checks.require(name, x, lambda x: (x >= 0) & (x < jnp.inf), "finite and not negative, in units of 1/beta")
        return _sample(self.regulariser, key, spread, depth, shape=tuple(shape))


@pytrees.dataclass
class UnnormalisedSet(PerturbationSet):
    """The set of the conjugate over all `p >= 0` instead of distributions: the robust set for KL, else smaller.

    Its methods refuse everything but `kl` and `alpha`.
    """

    regulariser: Regulariser

    def slack(self, perturbation: ArrayLike) -> Array:
        """Tell how much may be added to every action, `[*B, ...]`: the root of an increasing function."""
        reach.expect_order(self.regulariser)
        return _kernel(_shift, self.regulariser, perturbation)

    def support(self, policy: ArrayLike) -> Array:
        """Compute `(1/beta) eps_h(lam_{alpha h}(D))`, at most `Omega(p)`; equal for KL."""
        reach.expect_order(self.regulariser)
        return _kernel(_unnormalised_support, self.regulariser, policy)

    def worst_case(self, policy: ArrayLike) -> Array:
        """Return the member that takes `support`, `[*B, ..., A]`: `(1/beta) log_alpha(Z^{-1/alpha} p/p0)`."""
        reach.expect_order(self.regulariser)
        return jnp.moveaxis(_kernel(_unnormalised_worst, self.regulariser, policy), 0, -1)

    def radius(self, direction: ArrayLike) -> Array:
        """Find the largest `t >= 0` with `t * direction` in the set, `[*B, ...]`; 0 and infinite likewise."""
        reach.expect_order(self.regulariser)
        return _kernel(_unnormalised_reach, self.regulariser, direction)


@pytrees.dataclass
class HalfSpace(PerturbationSet):
    """`{dr : <pi, dr> <= Omega(pi)}`: everything against which the regulariser's value holds for this one policy."""

    regulariser: Regulariser
    policy: Array

    def slack(self, perturbation: ArrayLike) -> Array:
        """Compute `Omega(pi) - <pi, dr>`."""
        return _price(self.regulariser, self.policy) - _mean(self.policy, perturbation)

    def support(self, policy: ArrayLike) -> Array:
        """Compute `Omega(pi)` for `pi` itself, infinite for every other distribution (compared to rounding)."""
        own = checks.canonical(jnp.asarray(self.policy))
        unit = 8 * float(jnp.finfo(own.dtype).eps)
        off = extremes.largest(jnp.abs(jnp.asarray(policy, own.dtype) - own), -1)
        return jnp.where(off <= unit, _price(self.regulariser, own), jnp.inf * off)

    def radius(self, direction: ArrayLike) -> Array:
        """Compute `Omega(pi)/<pi, direction>`, infinite where the direction costs the policy nothing."""
        price, gain = _price(self.regulariser, self.policy), _mean(self.policy, direction)
        return jnp.where(gain > 0, price / jnp.where(gain > 0, gain, 1), jnp.where(jnp.isnan(gain), gain, jnp.inf))


@pytrees.dataclass
class Orthant(PerturbationSet):
    """`{dr : dr <= worst_case(pi)}`: the largest set of rewards lowered independently that the robust set holds at pi.

    Empty where the worst case is minus infinity (alpha <= 1 and a policy that omits an action that the prior allows).
    """

    regulariser: Regulariser
    policy: Array

    def slack(self, perturbation: ArrayLike) -> Array:
        """Compute `min_a (worst_case - dr)` over the actions that the prior allows."""
        corner, allowed = self._corner()
        room = jnp.where(allowed, corner - jnp.asarray(perturbation, corner.dtype), jnp.inf)
        return extremes.smallest(room, -1)

    def support(self, policy: ArrayLike) -> Array:
        """Compute `<p, worst_case(pi)>`."""
        corner, _ = self._corner()
        return _mean(jnp.asarray(policy, corner.dtype), corner)

    def radius(self, direction: ArrayLike) -> Array:
        """Find the largest `t >= 0` with `t * direction` in the set, `[*B, ...]`; minus infinity where there is none.

        The orthant holds 0 only for the policy that is the prior: every other worst case raises some reward.
        """
        corner, allowed = self._corner()
        x = jnp.asarray(direction, corner.dtype)
        ratio = corner / jnp.where(x == 0, 1, x)
        high = jnp.min(jnp.where(allowed & (x > 0), ratio, jnp.inf), axis=-1)
        low = jnp.max(jnp.where(allowed & (x < 0), ratio, 0), axis=-1)
        stuck = jnp.any(allowed & (x == 0) & (corner < 0), axis=-1)
        t = jnp.where(stuck | (high < low), -jnp.inf, high)
        return jnp.where(jnp.any(allowed & jnp.isnan(x), axis=-1), jnp.nan, t)

    def _corner(self) -> tuple[Array, Array]:
        """The worst case and the actions that the prior allows."""
        corner = perturbations.worst_case(self.regulariser, self.policy)
        allowed = jnp.moveaxis(_kernel(_allowed, self.regulariser, self.policy), 0, -1)
        return corner, allowed


def _price(reg: Regulariser, policy: ArrayLike) -> Array:
    """`Omega(p)`."""
    checks.expect_type(reg, Regulariser, "first argument", "kl")
    return reg.value(policy)


def _mean(policy: ArrayLike, x: ArrayLike) -> Array:
    """`<p, x>` over the last axis; probability 0 silences an infinite x."""
    p = checks.canonical(jnp.asarray(policy))
    x = jnp.asarray(x, p.dtype)
    return jnp.sum(p * jnp.where(p == 0, 0, x), axis=-1)


@functools.partial(jax.jit, static_argnames="kernel")
def _kernel(kernel: Any, reg: Regulariser, x: ArrayLike) -> Array:
    """A function of a bound regulariser and an array with actions leading, on an array in the public layout."""
    bound, x = reg._public(x, refuse=True)
    return kernel(bound, x)


def _reach(reg: Bound, x: Array) -> Array:
    return reach.reach(reg, x)


def _allowed(reg: Bound, x: Array) -> Array:
    return jnp.broadcast_to(~jnp.isneginf(reg.log_prior), x.shape)


# ---------------------------------------------------------------------------------------------------------------
# the conjugate over all p >= 0


def _excess(reg: Any, x: Array, closed: bool = False) -> Array:
    """Conjugate over all `p >= 0`, `(1/beta) sum p0 eps_alpha(lam_h(beta x))`, `[...]`.

    For alpha < 1 it is infinite where some `beta x >= 1/(1 - alpha)`; with `closed` and alpha < 0, it is what it tends
    to from inside.
    """
    order = reg.order
    h = (order - 1)[None]
    x = jnp.where(jnp.isneginf(reg.log_prior), 0, reg.beta[None] * x)
    inside = 1 + h * x > 0
    terms = deformed_exp(deformed_log(jnp.where(inside, x, 0), h), order[None])
    ends = h > 0
    ends = ends | (order < 0)[None] if closed else ends
    edge = jnp.where(ends, -1 / jnp.where(ends, order[None], 1), jnp.inf)
    return weighted(jnp.exp(reg.log_prior), jnp.where(inside, terms, edge)) / reg.beta


def _edge(reg: Any) -> Array:
    """For alpha < 0 the conjugate is finite up to the end of its domain, at this x, which can bound the set."""
    order = reg.order
    return jnp.where(order < 0, 1 / (reg.beta * jnp.where(order < 0, 1 - order, 1)), jnp.inf)


def _excess_slope(reg: Any, x: Array, dx: Array) -> Array:
    return jax.jvp(lambda y: _excess(reg, y), (x,), (jnp.broadcast_to(dx, x.shape),))[1]


def _find_shift(reg: Bound, x: Array) -> Array:
    """The constant that brings x to the boundary: at least to below 0, at most to that of the robust set."""
    x = jnp.where(jnp.isneginf(reg.log_prior), -jnp.inf, x)
    low, high = -jnp.max(x, axis=0), -maximise(reg, x)[0]
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    ends = roots.bisect(lambda c: _excess(reg, x + c[None]) > 0, low, jnp.maximum(high, low), size, (reg, x))
    return jnp.where(jnp.isnan(high), jnp.nan, 0.5 * (ends[0] + ends[1]))


def _shift(reg: Bound, x: Array) -> Array:
    masked = jnp.isneginf(reg.log_prior)
    top = jnp.max(jnp.where(masked, -jnp.inf, x), axis=0)
    x = jnp.where(masked, 0, x)
    shift = jnp.where(jnp.isinf(_edge(reg)), 0, _edge(reg)) - top
    bounded = jnp.isfinite(_edge(reg)) & (_excess(reg, x + shift[None], closed=True) <= 0)
    return jnp.where(bounded, shift, _shift_root(reg, jnp.where(bounded[None], 0, x)))


_shift_root = reach.implicit_root(
    lambda reg, x, c: _excess(reg, x + c[None]),
    lambda reg, x, c: _excess_slope(reg, x + c[None], jnp.ones_like(x)),
    lambda reg, x: lax.stop_gradient(_find_shift(reg, x)),
)


def _find_unnormalised_reach(reg: Bound, x: Array) -> Array:
    """As for the robust set, which holds this one."""
    high = reach.reach(reg, x)
    top = jnp.where(reach.proper(high), high, 1)
    ends = roots.bisect(lambda t: _excess(reg, t[None] * x) > 0, jnp.zeros_like(top), top, like=(reg, x))
    return jnp.where(reach.proper(high), 0.5 * (ends[0] + ends[1]), high)


_unnormalised_reach_root = reach.implicit_root(
    lambda reg, x, t: _excess(reg, t[None] * x),
    lambda reg, x, t: _excess_slope(reg, t[None] * x, x),
    lambda reg, x: lax.stop_gradient(_find_unnormalised_reach(reg, x)),
    reach.proper,
)


def _unnormalised_reach(reg: Bound, x: Array) -> Array:
    masked = jnp.isneginf(reg.log_prior)
    top = jnp.max(jnp.where(masked, -jnp.inf, x), axis=0)
    x = jnp.where(masked, 0, x)
    limited = (top > 0) & jnp.isfinite(_edge(reg))
    t = jnp.where(limited, _edge(reg), 1) / jnp.where(limited, top, 1)
    bounded = limited & (_excess(reg, t[None] * x, closed=True) <= 0)
    return jnp.where(bounded, t, _unnormalised_reach_root(reg, jnp.where(bounded[None], 0, x)))


def _renyi(reg: Any, policy: Array) -> Array:
    """Renyi divergence `log Z/(alpha (alpha-1))`, `[...]`: `lam_{alpha h}(D)`."""
    order = reg.order
    return deformed_log(alpha_divergence(policy, reg.log_prior, order), order * (order - 1))


def _unnormalised_support(reg: Any, policy: Array) -> Array:
    return deformed_exp(_renyi(reg, policy), reg.order - 1) / reg.beta


def _unnormalised_worst(reg: Any, policy: Array) -> Array:
    h = reg.order - 1
    tilt = deformed_exp(log_ratio(policy, reg.log_prior) - (h * _renyi(reg, policy))[None], h[None])
    return jnp.where(jnp.isneginf(reg.log_prior) & (policy == 0), 0, tilt / reg.beta[None])


# ---------------------------------------------------------------------------------------------------------------
# samples


@functools.partial(jax.jit, static_argnames="shape")
def _sample(reg: Regulariser, key: Array, spread: ArrayLike, depth: ArrayLike, shape: tuple[int, ...]) -> Array:
    bound, blank = reg._public(jnp.zeros(shape, reg.beta.dtype))
    if blank.shape[1:] != shape[:-1]:
        raise ValueError(f"shape is {shape}; the regulariser asks for [*B, ..., A] = {blank.shape[1:] + shape[-1:]}")
    allowed = ~jnp.isneginf(bound.log_prior)
    count = jnp.sum(jnp.broadcast_to(allowed, blank.shape).astype(blank.dtype), axis=0)
    keys = jax.random.split(key, 3)
    # Uniform in a ball of the hyperplane sum = 0: a normal direction, and a radius U^{1/dimension}.
    normal = jnp.where(allowed, jax.random.normal(keys[0], blank.shape, blank.dtype), 0)
    normal = jnp.where(allowed, normal - (jnp.sum(normal, axis=0) / count)[None], 0)
    length = jnp.sqrt(jnp.sum(normal**2, axis=0))
    size = jax.random.uniform(keys[1], count.shape, blank.dtype) ** (1 / jnp.maximum(count - 1, 1))
    size = size * jnp.asarray(spread, blank.dtype) / bound.beta
    y = normal * (jnp.where(count > 1, size, 0) / jnp.where(length > 0, length, 1))[None]
    below = jax.random.uniform(keys[2], count.shape, blank.dtype) * jnp.asarray(depth, blank.dtype) / bound.beta
    x = y - (maximise(bound, y)[0] + below)[None]
    return jnp.moveaxis(jnp.where(allowed, x, 0), 0, -1)
