r"""Transitions that stay probabilities: the worst row within a ball around each row of P.

For every pair, with rows p of P that sum to 1 - termination, and values v of the successors,

    min <x, v>      such that     x >= 0,  sum x = sum p,  ||x - p|| <= b.

*p = 1* (total variation): mass b/2 goes from the best successors to the worst state, the very best first.
*p = 2*: `x = (p - s (v - w))_+` for the w that keeps the mass and the s for which the ball ends; s by bisection, w by
sorting. Any state may be a successor, also one that P never leads to.

T is a minimum of operators of Markov chains: monotone, a contraction by g, and it commutes with constants up to g, so
that the certificate is that of `bellman` as it stands. K is the chain of the worst rows. Rows are written out: memory
and time of a backup grow with the square of S.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import pytrees, roots
from robustreg.problems.transitions import Transitions
from robustreg.regularisers.bound import Bound
from robustreg.solvers.chains import Written


def written_out(transitions: Transitions, batch_ndim: int, dtype: Any) -> Array:
    """Write bound transitions out, `[A, S, S, *b]`."""
    n, lanes = transitions.n_states, transitions._lane_axes(batch_ndim)
    unit = jnp.eye(n, dtype=dtype).reshape((n,) + (1,) * batch_ndim + (n,))
    rows = transitions._add_lane_axis()._expect(jnp.broadcast_to(unit, (n, *lanes, n)))
    return jnp.moveaxis(rows, -1, 2)


@pytrees.dataclass
class ExactBall:
    """Balls around rows in the kernels' layout.

    Attributes:
        radius: `[A or 1, S or 1, *b]`.
        rows: of P, `[A, S, S, *b]`.
        p: 1 or 2.
    """

    radius: Array
    rows: Array
    p: float = pytrees.static()

    keeps_constants = True

    def contraction(self, discount: Array, n_states: int) -> Array:
        """Return the modulus of the operator, g."""
        return discount

    def rounding(self, discount: Array, size: Array) -> Array:
        """Bound what the cost of a value of that size errs by, in units of u: two sums over S states."""
        n = self.rows.shape[2]
        return 8 * (4 + min(n, 4 * n**0.5)) * discount * size

    def step(self, reg: Bound, q: Array, discount: Array, h: Array, c: Array) -> tuple[Bound, Array]:
        """Return the regulariser, and the action values that the worst transitions leave."""
        plain = jnp.sum(self.rows * h[None, None], axis=2)
        return reg, q - discount[None, None] * (plain - self._least(h))

    def noise(self, policy: Array, h: Array, c: Array) -> Array:
        """Find the noise that costs most, `[A, S, S, *B]`."""
        return self._worst(h)[0] - self.rows

    def pull(self, policy: Array, discount: Array, h: Array, c: Array) -> Written:
        """Find what K loses against that of P."""
        lost = self.rows - self._worst(h)[0]
        return Written(discount[None, None] * jnp.sum(policy[:, :, None] * lost, axis=0))

    def _worst(self, h: Array) -> tuple[Array, Array, Array]:
        """The worst rows `[A, S, S, *B]`, and the multipliers of ball and mass `[A, S, *B]`, as constants."""
        fixed = lax.stop_gradient((self.rows, self.radius, h))
        if self.p == 1:
            x = _shifted(*fixed)
            return x, jnp.zeros_like(x[:, :, 0]), jnp.zeros_like(x[:, :, 0])
        return lax.stop_gradient(_projected(*fixed))

    def _least(self, h: Array) -> Array:
        """`<x, h>` of the worst rows, `[A, S, *B]`, with its derivatives.

        In the 1-norm x is piecewise linear in p and b; in the 2-norm the multipliers tell (envelope theorem).
        """
        if self.p == 1:
            return jnp.sum(_shifted(self.rows, self.radius, lax.stop_gradient(h)) * h[None, None], axis=2)
        x, force, price = self._worst(h)
        square, mass = jnp.sum((x - self.rows) ** 2, axis=2), jnp.sum(self.rows, axis=2)
        distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        # Both brackets are 0, or their multipliers are: what counts is how they move.
        moves = force * (distance - self.radius) + price * mass
        least = jnp.sum(x * h[None, None], axis=2) + moves - lax.stop_gradient(moves)
        # (A radius of 0 leaves nothing to choose: the row itself.)
        return jnp.where(self.radius > 0, least, jnp.sum(self.rows * h[None, None], axis=2))


def _shifted(rows: Array, radius: Array, h: Array) -> Array:
    """The worst rows in the 1-norm, `[A, S, S, *B]`: from the highest values to the lowest."""
    shape = jnp.broadcast_shapes(rows.shape, h.shape)
    order = jnp.broadcast_to(jnp.argsort(-h, axis=0)[None, None], shape)
    p = jnp.take_along_axis(jnp.broadcast_to(rows, shape), order, axis=2)
    # What lies at the lowest value stays there.
    high = p.at[:, :, -1].set(0)
    before = jnp.cumsum(high, axis=2) - high
    gone = jnp.clip(jnp.broadcast_to(0.5 * radius[:, :, None], shape) - before, 0, high)
    x = (high - gone).at[:, :, -1].set(p[:, :, -1] + jnp.sum(gone, axis=2))
    return jnp.take_along_axis(x, jnp.argsort(order, axis=2), axis=2)


def _projected(rows: Array, radius: Array, h: Array) -> tuple[Array, Array, Array]:
    """The worst rows in the 2-norm, projections of `p - s v` for the s that the ball allows, and both multipliers."""
    shape = jnp.broadcast_shapes(rows.shape, h.shape)
    p, v = jnp.broadcast_to(rows, shape), jnp.broadcast_to(h[None, None], shape)
    mass = jnp.sum(p, axis=2)
    radius = jnp.broadcast_to(radius, mass.shape)
    spread = jnp.max(v, axis=2) - jnp.min(v, axis=2)
    scale = 1 / jnp.where(spread > 0, spread, 1)
    n = jnp.arange(1, shape[2] + 1, dtype=p.dtype).reshape((1, 1, -1) + (1,) * (p.ndim - 3))

    def at(s: Array) -> tuple[Array, Array, Array]:
        y = p - s[:, :, None] * v
        down = -jnp.sort(-y, axis=2)
        level = (jnp.cumsum(down, axis=2) - mass[:, :, None]) / n
        count = jnp.maximum(jnp.sum(down > level, axis=2, keepdims=True), 1)
        w = jnp.take_along_axis(level, count - 1, axis=2)
        x = jnp.maximum(y - w, 0)
        return x, w[:, :, 0], jnp.sqrt(jnp.sum((x - p) ** 2, axis=2))

    # In units of 1/range, s between what moves nothing and what leaves the lowest value alone.
    digits = jnp.finfo(p.dtype).nmant
    start = (jnp.full_like(mass, -1.4 * digits * 0.7), jnp.full_like(mass, 0.7 * digits))
    low, _ = roots.bisect(lambda s: at(jnp.exp(s) * scale)[2] > radius, *start, size=1.0, like=(p, v))
    s = jnp.where((radius > 0) & (spread > 0), jnp.exp(low) * scale, 0)
    x, w, distance = at(s)
    active = (distance >= radius * (1 - 1e-3)) & (s > 0)
    force = jnp.where(active, radius / jnp.where(s > 0, s, 1), 0)
    # On the support x = p - s v - w: the price of mass is -w/s, and the value itself where nothing moves.
    top = jnp.argmax(x, axis=2)[:, :, None]
    still = jnp.take_along_axis(v, top, axis=2)[:, :, 0]
    return x, force, jnp.where(active, -w / jnp.where(s > 0, s, 1), still)
