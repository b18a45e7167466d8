r"""Norms of the policy: the regulariser of rewards that are uncertain within a ball.

An adversary who may change the rewards of a state by any `dr` of norm at most `radius` takes [Derman, Geist and Mannor
2021, thm. 3.1; Kumar, Levy, Wang and Mannor 2022]

    Omega(p) = radius ||p||_q = max { <p, dr> : ||dr||_p <= radius },        1/p + 1/q = 1.

Its conjugate is the x with `||(Q - x)_+||_p = radius`: of all actions, those count that are worth more than x, by what
they are worth more. The policy is `(Q - x)_+^(p-1)`, normalised: uniform over the best few for p = 1, in proportion to
the advantage for p = 2, greedy for p = infinity (where Omega is the same for every policy).

**Root.** `x -> ||(Q - x)_+||_p` is convex and falls, from at least the radius at `max Q - radius`: Newton's method from
there rises to the root and never passes it. For p = 1 it is piecewise linear, and Newton ends on the last piece.

**Worst case.** `dr = radius (p/||p||_q)^(q-1)`, all of it positive: no policy is free of cost, there is no reference,
and strengths do not nest the sets around 0 as a divergence does (`Omega*(0) = -radius A^(-1/p)`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import loops, pytrees
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.divergences import Scales, weighted
from robustreg.regularisers.least import Least

# Newton's method on a convex function: 4 to 8 turns are typical.
_MAX_TURNS = 60


@pytrees.dataclass
class BoundNorm(Least):
    """`Omega(p) = ||p||_q / beta`.

    Attributes:
        beta: 1/radius, broadcastable to `[...]`.
        log_prior: 0, or minus infinity for an action that does not exist.
        p: of the ball; the policy is measured in its dual norm q.
    """

    has_reference = False

    beta: Array
    log_prior: Array
    p: float = pytrees.static()
    reduce: pytrees.Reducers = pytrees.reducers()

    def dual(self, policy: Array) -> Array:
        """Compute `||p||_q`, `[...]`."""
        if self.p == 1:
            return self.reduce.largest(policy)
        if math.isinf(self.p):
            return self.reduce.total(policy)
        q = self.p / (self.p - 1)
        # Relative to the largest: small powers underflow.
        top = self.reduce.largest(jax.lax.stop_gradient(policy))
        safe = jnp.where(top > 0, top, 1)
        return safe * self.reduce.total((policy / self.reduce.over(safe)) ** q) ** (1 / q)

    def value(self, policy: Array) -> Array:
        """Compute `||p||_q/beta`, `[...]`."""
        escaped = jnp.any((policy > 0) & jnp.isneginf(self.log_prior), axis=self.reduce.axis)
        return jnp.where(escaped, jnp.inf, self.dual(policy) / self.beta)

    def slopes(self, policy: Array) -> Array:
        """Compute `(p/||p||_q)^(q-1)/beta`, `[A, ...]`: a gradient, or one of several."""
        if math.isinf(self.p):
            slope = jnp.ones_like(policy)
        elif self.p == 1:
            best = (policy >= self.reduce.over(self.reduce.largest(policy))).astype(policy.dtype)
            slope = best / self.reduce.over(self.reduce.total(best))
        else:
            slope = self._power(policy)
        return slope / self.reduce.over(self.beta)

    def maximiser(self, q: Array) -> tuple[Array, Array]:
        """Compute the conjugate by its root, `[...]`, and the policy, `[A, ...]`."""
        reduce, masked = self.reduce, jnp.isneginf(self.log_prior)
        best = reduce.largest(jnp.where(masked, -jnp.inf, q))
        gap = jnp.where(masked, jnp.inf, reduce.over(best) - q)
        radius = jnp.broadcast_to(1 / self.beta, best.shape)
        if math.isinf(self.p):
            first = _first(gap == 0, reduce)
            return best - radius, jnp.where(jnp.isnan(reduce.over(best)), jnp.nan, first.astype(q.dtype))
        depth = _root(gap, radius, self.p, reduce)
        policy = self._shape_of(jnp.maximum(reduce.over(depth) - gap, 0), gap)
        return best - depth, jnp.where(jnp.isnan(reduce.over(depth)), jnp.nan, policy)

    def _shape_of(self, advantage: Array, gap: Array) -> Array:
        """The policy in proportion to `advantage^(p-1)`."""
        # A radius that is lost beside the gap leaves the best actions.
        ahead = jnp.where((gap == 0) & (advantage == 0), 1, advantage)
        ahead = ahead / self.reduce.over(self.reduce.largest(ahead))
        weight = jnp.where(ahead > 0, ahead ** (self.p - 1), 0)
        return weight / self.reduce.over(self.reduce.total(weight))

    def _power(self, policy: Array) -> Array:
        """`(p/||p||_q)^(q-1)`, `[A, ...]`, with derivatives at 0, where a root has none."""
        on = policy > 0
        share = jnp.where(on, policy, 1) / self.reduce.over(self.dual(policy))
        return jnp.where(on, share ** (1 / (self.p - 1)), 0)

    @property
    def searched(self) -> bool:
        """Whether it is the least of `Scaled`."""
        return 1 < self.p < math.inf

    def bracket(self, like: Array) -> tuple[Array, Array, Array]:
        """Return the logarithms of the norms of a uniform distribution and of one action, after their middle."""
        top = jnp.zeros_like(self.reduce.largest(like))
        least = top - math.log(like.shape[self.reduce.axis]) / self.p
        return 0.5 * least, least, top

    def best(self, policy: Array) -> Array:
        """Return the logarithm of the norm, `[...]`."""
        return jnp.log(self.dual(policy))

    def beyond(self, policy: Array, log_s: Array) -> Array:
        """Measure s against the norm of the policy, `[...]`."""
        return log_s - self.best(policy)

    def bend(self, policy: Array) -> tuple[Array, Array]:
        """Find how the norm's own change bends the marginals."""
        return 1 / ((self.p - 1) * self.beta * self.dual(policy)), self._power(policy)

    def at(self, log_s: Array) -> "Scaled":
        """Return what the norm is the least of, over s."""
        return Scaled(jnp.exp(log_s), self.beta, self.log_prior, self.p, self.reduce)

    def policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        """Compute the change of the maximiser, `[A, ...]`: of `d^(p-1)/sum d^(p-1)` with `d = (Q - x)_+`."""
        if self.p == 1 or math.isinf(self.p):  # constant but where an action enters
            return jnp.zeros_like(policy)
        reduce, on = self.reduce, policy > 0
        logs = jnp.log(jnp.where(on, policy, 1))
        depth = jnp.where(on, self.marginal(jnp.where(on, logs, -jnp.inf)), 1)  # Q - x: the marginal is at the root
        moved = jnp.zeros_like(policy) if dq is None else jnp.where(on, dq, 0)
        dradius = jnp.zeros_like(self.beta) if pytrees.given(change.beta) is None else -change.beta / self.beta**2
        dx = weighted(policy, moved, reduce.plain_sum) - self.dual(policy) * dradius
        t = jnp.where(on, (self.p - 1) * policy * (moved - reduce.over(dx)) / depth, 0)
        return t - policy * reduce.over(reduce.plain_sum(t))

    def noise(self, scales: Scales) -> Array:
        """Bound the rounding of the conjugate: a root that is as large as the radius."""
        return 8 * scales.logs * (scales.temperature + scales.cost)

    def value_error(self, policy: Array) -> Array:
        """Bound the rounding of `value`, `[...]`."""
        n, unit = policy.shape[self.reduce.axis], 0.5 * float(jnp.finfo(policy.dtype).eps)
        moved = jnp.abs(self.reduce.total(policy) - 1) + n * unit
        return (unit * (16 + min(n, 4 * n**0.5)) + moved) * self.dual(policy) / self.beta


def _first(best: Array, reduce: pytrees.Reducers) -> Array:
    """The first of the best actions, `[A, ...]`."""
    place = jnp.argmax(best, axis=reduce.axis)
    shape = [1] * best.ndim
    shape[reduce.axis] = -1
    index = jnp.arange(best.shape[reduce.axis]).reshape(shape)
    return reduce.over(place) == index


def _root(gap: Array, radius: Array, p: float, reduce: pytrees.Reducers) -> Array:
    """The depth y with `||(y - gap)_+||_p = radius`, `[...]`, for gaps `[A, ...]` of which the least is 0."""
    unit = float(jnp.finfo(gap.dtype).eps)

    def step(y: Array, done: Array) -> tuple[Array, Array]:
        ahead = jnp.maximum(reduce.over(y) - gap, 0)
        top = jnp.where(y > 0, y, 1)  # the largest of them
        share = ahead / reduce.over(top)
        power = jnp.where(share > 0, share ** (p - 1), 0)
        total, slope = reduce.total(power * share), reduce.total(power)
        norm = total ** (1 / p)
        # d norm/dy = sum share^(p-1) / norm^(p-1).
        new = y - (norm * top - radius) * norm ** (p - 1) / jnp.where(slope > 0, slope, 1)
        new = jnp.minimum(jnp.maximum(new, 0), y)
        return jnp.where(done, y, new), done | ~(y - new > 2 * unit * y)

    done = ~(jnp.isfinite(radius) & (radius > 0))
    y = loops.until_done(step, radius, done, _MAX_TURNS, (gap, radius))
    return jnp.where(jnp.any(jnp.isnan(gap), axis=reduce.axis), jnp.nan, y)


@pytrees.dataclass
class Scaled(Bound):
    """`(s^(1-q) sum p^q / q + (1 - 1/q) s) / beta`: a sum over actions, at least the norm, and that at `s = ||p||_q`.

    Attributes:
        s: broadcastable to `[...]`.
        beta, log_prior, p, reduce: as in `BoundNorm`, with 1 < p < infinity.
    """

    has_reference = False

    s: Array
    beta: Array
    log_prior: Array
    p: float = pytrees.static()
    reduce: pytrees.Reducers = pytrees.reducers()

    def value(self, policy: Array) -> Array:
        """Compute it, `[...]`."""
        q = self.p / (self.p - 1)
        total = self.reduce.total((policy / self.reduce.over(self.s)) ** q)
        return self.s * (total / q + 1 - 1 / q) / self.beta

    def marginal(self, log_policy: Array) -> Array:
        """Compute `(p/s)^(q-1)/beta`, `[A, ...]`."""
        return jnp.exp((log_policy - jnp.log(self.reduce.over(self.s))) / (self.p - 1)) / self.reduce.over(self.beta)
