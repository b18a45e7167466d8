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
from jax.typing import ArrayLike

from robustreg._core import loops, pytrees
from robustreg.regularisers import masks, parameters
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.divergences import Scales, weighted
from robustreg.regularisers.regulariser import Regulariser, counting

# Newton's method on a convex function: 4 to 8 turns are typical.
_MAX_TURNS = 60


@pytrees.dataclass
class BoundNorm(Bound):
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

    def _dual(self, policy: Array) -> Array:
        """`||p||_q`, `[...]`."""
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
        return jnp.where(escaped, jnp.inf, self._dual(policy) / self.beta)

    def marginal(self, log_policy: Array) -> Array:
        """Compute `(p/||p||_q)^(q-1)/beta`, `[A, ...]`: a gradient, or one of several."""
        policy = jnp.exp(log_policy)
        if math.isinf(self.p):
            slope = jnp.ones_like(policy)
        elif self.p == 1:
            best = policy >= self.reduce.over(self.reduce.largest(policy))
            slope = best / self.reduce.over(self.reduce.total(best.astype(policy.dtype)))
        else:
            slope = (policy / self.reduce.over(self._dual(policy))) ** (1 / (self.p - 1))
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

    def policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        """Compute the change of the maximiser, `[A, ...]`: of `d^(p-1)/sum d^(p-1)` with `d = (Q - x)_+`."""
        if self.p == 1 or math.isinf(self.p):  # constant but where an action enters
            return jnp.zeros_like(policy)
        reduce, on = self.reduce, policy > 0
        logs = jnp.log(jnp.where(on, policy, 1))
        depth = jnp.where(on, self.marginal(jnp.where(on, logs, -jnp.inf)), 1)  # Q - x: the marginal is at the root
        moved = jnp.zeros_like(policy) if dq is None else jnp.where(on, dq, 0)
        dradius = jnp.zeros_like(self.beta) if pytrees.given(change.beta) is None else -change.beta / self.beta**2
        dx = weighted(policy, moved, reduce.plain_sum) - self._dual(policy) * dradius
        t = jnp.where(on, (self.p - 1) * policy * (moved - reduce.over(dx)) / depth, 0)
        return t - policy * reduce.over(reduce.plain_sum(t))

    def noise(self, scales: Scales) -> Array:
        """Bound the rounding of the conjugate: a root that is as large as the radius."""
        return 8 * scales.logs * (scales.temperature + scales.cost)

    def value_error(self, policy: Array) -> Array:
        """Bound the rounding of `value`, `[...]`."""
        n, unit = policy.shape[self.reduce.axis], 0.5 * float(jnp.finfo(policy.dtype).eps)
        moved = jnp.abs(self.reduce.total(policy) - 1) + n * unit
        return (unit * (16 + min(n, 4 * n**0.5)) + moved) * self._dual(policy) / self.beta


def _first(best: Array, reduce: pytrees.Reducers) -> Array:
    """The first of the best actions, `[A, ...]`."""
    place = jnp.argmax(best, axis=reduce.axis)
    index = jnp.arange(best.shape[reduce.axis]).reshape((-1, *[1] * (best.ndim - 1)) if reduce.axis == 0 else (-1,))
    return reduce.over(place) == index


def _root(gap: Array, radius: Array, p: float, reduce: pytrees.Reducers) -> Array:
    """The depth y with `||(y - gap)_+||_p = radius`, `[...]`, for gaps `[A, ...]` of which the least is 0."""
    unit = float(jnp.finfo(gap.dtype).eps)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        y, done, count = state
        ahead = jnp.maximum(reduce.over(y) - gap, 0)
        top = jnp.where(y > 0, y, 1)  # the largest of them
        share = ahead / reduce.over(top)
        power = jnp.where(share > 0, share ** (p - 1), 0)
        total, slope = reduce.total(power * share), reduce.total(power)
        norm = total ** (1 / p)
        # d norm/dy = sum share^(p-1) / norm^(p-1).
        new = y - (norm * top - radius) * norm ** (p - 1) / jnp.where(slope > 0, slope, 1)
        new = jnp.minimum(jnp.maximum(new, 0), y)
        return jnp.where(done, y, new), done | ~(y - new > 2 * unit * y), count + 1

    start = (radius, ~(jnp.isfinite(radius) & (radius > 0)), jnp.zeros((), jnp.int32))
    y = loops.while_loop(lambda s: ~jnp.all(s[1]) & (s[2] < _MAX_TURNS), step, start, (gap, radius))[0]
    return jnp.where(jnp.any(jnp.isnan(gap), axis=reduce.axis), jnp.nan, y)


@pytrees.dataclass
class NormBall(Regulariser):
    """`Omega(p) = radius ||p||_q`. Build it with `norm_ball`, which validates.

    Attributes:
        radius: of the ball of reward perturbations, in reward units, `[*B]`.
        log_prior: None, or 0 and minus infinity: which actions there are.
        state_scale: divides the radius per state, `[*B, S]`, or None.
        p: norm of the ball.
    """

    has_reference = False

    radius: Array
    log_prior: Array | None = None
    state_scale: Array | None = None
    p: float = pytrees.static(default=2.0)

    @property
    def beta(self) -> Array:  # type: ignore[override]
        """1/radius, `[*B]`, the largest number for a radius of 0."""
        tiny = jnp.finfo(self.radius.dtype).tiny
        return 1 / jnp.maximum(self.radius, tiny)

    def _bound(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> BoundNorm:
        return BoundNorm(beta, log_prior, self.p)

    def _rearrange(self, place: Any, dtype: Any, n_actions: int, last: bool = False) -> Any:
        return Regulariser._rearrange(counting(self, dtype, n_actions), place, dtype, n_actions, last)

    def _at_unit_strength(self) -> Any:
        raise TypeError("a norm ball has no reference: nothing can be scaled to the boundary of its set")


def norm_ball(
    radius: ArrayLike, p: float = 2, *, radius_per_state: ArrayLike | None = None, available: ArrayLike | None = None
) -> NormBall:
    """Make the regulariser of rewards that are uncertain within a ball of a p-norm in every state.

    Args:
        radius: in reward units, `[*B]`, finite and not negative; 0 is no regulariser at all.
        p: norm of the ball, from 1 to infinity: with 1 the adversary moves the reward of one action, with infinity that
            of all by as much.
        radius_per_state: `[*B, S]`, positive; multiplies the radius per state.
        available: which actions there are, as in `entropy`. (An MDP with a mask of its own needs none here.)

    Returns:
        A regulariser for `solve` and the rest: `solve` gives the best policy against the worst reward in the ball
        [Derman, Geist and Mannor 2021], `worst_case` that reward's difference from the nominal one.

    Raises:
        TypeError, ValueError: a radius or p out of range; a mask that is none.
    """
    size = parameters.number("radius", radius)
    parameters.refuse("radius", size, lambda v: ~((v >= 0) & (v < jnp.inf)), "must be finite and not negative")
    if not isinstance(p, (int, float)) or not p >= 1:
        raise ValueError(f"p must be a number from 1 to infinity, got {p!r}")
    scale = None if radius_per_state is None else 1 / parameters.state_scale(radius_per_state)  # type: ignore[operator]
    reg = NormBall(size, None, scale, float(p))
    _ = reg._leaves.batch, reg._leaves.states
    return reg if available is None else masks.restricted(reg, available)
