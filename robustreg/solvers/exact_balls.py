r"""Transitions that stay probabilities: the worst row within a ball around each row of P.

For every pair, with rows p of P that sum to 1 - termination, and values v of the successors,

    min <x, v>      such that     x >= 0,  sum x = sum p,  ||x - p|| <= b.

*p = 1* (twice the total variation): mass b/2 goes from the best successors to the worst state, the very best first.
*p = infinity* (an interval around every entry): the lowest values get what they may have, the very lowest first.
*p = 2*: `x = (p - s (v - w))_+` for the w that keeps the mass and the s for which the ball ends; s by Newton's
method, w by dropping entries below it [Michelot 1986]. In these balls any state may be a successor, also one that P
never leads to.
*p = "kl"* has the relative entropy `sum x log(x/p) <= b` for a norm: `x ~ p exp(-s v)`, s by Newton's method.

T is a minimum of operators of Markov chains: monotone, a contraction by g, and it commutes with constants up to g, so
that the certificate is that of `bellman` as it stands. K is the chain of the worst rows. Rows of P are written out:
memory and time of a backup grow with the square of S. Here are p = 2 and "kl"; p = 1 and infinity, which need no row of
their own, in `greedy_balls`; rows that are short lists of successors, but for p = 2, in `listed_balls`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import loops, pytrees, roots
from robustreg.problems.transitions import Transitions
from robustreg.regularisers.bound import Bound
from robustreg.solvers.chains import Written, written


class Stochastic:
    """Base of sets whose rows stay probabilities: whatever is chosen, T keeps constants up to g and contracts by it."""

    keeps_constants = True

    @property
    def terms(self) -> int:
        """Count the numbers that are added up for a row."""
        raise NotImplementedError

    def contraction(self, discount: Array, n_states: int) -> Array:
        """Return the modulus of the operator, g."""
        return discount

    def rounding(self, discount: Array, size: Array) -> Array:
        """Bound what the cost of a value of that size errs by, in units of u: two sums."""
        return 8 * (4 + min(self.terms, 4 * self.terms**0.5)) * discount * size

    def operator(self, reg: Bound, discount: Array, worst: Any) -> Bound:
        """Return the regulariser: each pair has its own worst row, whatever the policy."""
        return reg

    def expected(self, transitions: Transitions, h: Array, worst: Any) -> Array:
        """Compute what the worst rows lead to expect of h, `[A, S, *B]`."""
        return transitions._expect(h) - worst.taken


class Worst(NamedTuple):
    """The worst rows at a value: less the rows, `[A, S, S, *B]`, and what that takes off `<p, h>`, `[A, S, *B]`."""

    noise: Array
    taken: Array


@pytrees.dataclass
class ExactBall(Stochastic):
    """Balls around rows in the kernels' layout.

    Attributes:
        radius: `[A or 1, S or 1, *b]`.
        rows: of P, `[A, S, S, *b]`.
        p: 2 or "kl".
    """

    radius: Array
    rows: Array
    p: float | str = pytrees.static()

    @property
    def terms(self) -> int:
        """Count the states."""
        return self.rows.shape[2]

    def worst(self, h: Array, c: Array) -> Any:
        """Find the worst rows at a value."""
        noise = _WORST[self.p](self.rows, self.radius, h) - self.rows
        over = h - lax.stop_gradient(jnp.min(h, axis=0, keepdims=True))
        return Worst(noise, -jnp.sum(noise * over[None, None], axis=2))

    def noise(self, policy: Array, worst: Any) -> Array:
        """Write out the noise that costs a policy most, `[A, S, S, *B]`."""
        return worst.noise

    def pull(self, policy: Array, discount: Array, worst: Any) -> Written:
        """Find what K loses against that of P."""
        lost = -discount[None, None] * jnp.sum(policy[:, :, None] * self.noise(policy, worst), axis=0)
        return written(jnp.moveaxis(lost, (0, 1), (-2, -1)))


def some(radius: Array) -> Array:
    """Make a radius positive: at 0, where a minimum meets a maximum, derivatives are those of the least one."""
    return radius + 1024 * jnp.finfo(radius.dtype).tiny


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def strength(size: Callable[[Array, Array, Array], Array], p: Array, v: Array, radius: Array) -> Array:
    """Find the s at which the ball ends, 0 where nothing is to be moved, `[A, S, *B]`.

    In units of 1/range it lies between what moves nothing and what leaves the lowest value alone.

    Args:
        size: how far the row moves at `(s, p, v)`; grows with s.
        p, v: rows and the values of their successors, `[A, S, n, *B]`.
        radius: `[A, S, *B]`.
    """
    width, about = jnp.max(v, axis=2) - jnp.min(v, axis=2), jnp.finfo(radius.dtype)
    scale = jnp.where(width > 0, 1 / jnp.where(width > 0, width, 1), 0)
    low, high = jnp.full_like(radius, -0.98 * about.nmant), jnp.full_like(radius, 0.7 * about.nmant)

    def measure(x: Array, _: None) -> tuple[Array, Array, None]:
        """In logarithms of both, where a small ball is a straight line."""
        s = jnp.exp(x) * scale
        moved, slope = jax.jvp(lambda s: size(s, p, v), (s,), (s,))
        moved = jnp.maximum(moved, about.tiny)
        return jnp.log(moved) - jnp.log(jnp.maximum(radius, about.tiny)), slope / moved, None

    # (Where all that can move does not fill the ball, the root is beyond the bracket, and its end is found.)
    found = roots.newton(
        measure,
        jnp.zeros_like(radius),
        low,
        high,
        close=0.0,
        near=lambda x: 4 * float(about.eps) * (1 + jnp.abs(x)),
        turns=100,
        hopeless=(radius == 0) | (scale == 0),
        like=(p, v),
    )
    return jnp.where(radius > 0, jnp.exp(found.x) * scale, 0)


@strength.defjvp
def _strength_jvp(size: Any, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Where the ball binds, `size(s, p, v) = radius` on both sides of a change."""
    p, v, radius = primals
    s = strength(size, *primals)
    # (By differentiable functions of s, so that the rule can be differentiated in turn.)
    reached, moved = jax.jvp(lambda p, v: size(s, p, v), primals[:2], tangents[:2])
    slope = jax.jvp(lambda s: size(s, p, v), (s,), (jnp.ones_like(s),))[1]
    # A ball that holds the lowest value alone does not bind.
    binds = (reached >= radius * (1 - 1e-3)) & (s > 0) & (slope > 0)
    return s, jnp.where(binds, (tangents[2] - moved) / jnp.where(binds, slope, 1), 0)


def _projected(rows: Array, radius: Array, h: Array) -> Array:
    """The worst rows in the 2-norm: projections of `p - s v`."""
    # From the lowest value: w is then of the size of p, and not of that of s v, in which p would be lost.
    p, over = jnp.broadcast_arrays(rows, (h - jnp.min(h, axis=0, keepdims=True))[None, None])
    s = strength(_distance, p, over, jnp.broadcast_to(radius, p.shape[:2] + p.shape[3:]))
    return p + projection(s, p, over)


def projection(s: Array, p: Array, v: Array) -> Array:
    """Find what to add to p for the probabilities, with its mass, that are closest to `p - s v`."""
    y, mass = lax.stop_gradient((p - s[:, :, None] * v, jnp.sum(p, axis=2, keepdims=True)))

    def above(left: Array) -> Array:
        """Drop entries below the level at which those that are left have the mass. (It rises, and never passes w.)"""
        count = jnp.maximum(jnp.sum(left, axis=2, keepdims=True, dtype=p.dtype), 1)
        return left & (y > (jnp.sum(jnp.where(left, y, 0), axis=2, keepdims=True) - mass) / count)

    left = loops.until_stable(above, jnp.ones_like(y, bool), y)
    # On what is left of the row all move by `-s v - w`, the rest goes; no p is in it that a small s v would be lost in.
    moved = jnp.where(left, s[:, :, None] * v, p)
    w = -jnp.sum(moved, axis=2, keepdims=True) / jnp.maximum(jnp.sum(left, axis=2, keepdims=True), 1).astype(p.dtype)
    return -moved - jnp.where(left, w, 0)


def _distance(s: Array, p: Array, v: Array) -> Array:
    """How far that is from p, in the 2-norm."""
    moved = jnp.sum(projection(s, p, v) ** 2, axis=2)
    return jnp.where(moved > 0, jnp.sqrt(jnp.where(moved > 0, moved, 1)), 0)


def tilted(rows: Array, radius: Array, values: Array) -> Array:
    """Find the worst rows by relative entropy, `p exp(-s v)` with the mass of p, `[A, S, n, *B]`.

    Args:
        rows: `[A, S, n, *b]`, of n successors.
        radius: `[A or 1, S or 1, *b]`.
        values: of the successors, `[A or 1, S or 1, n, *b]`.
    """
    p, v = jnp.broadcast_arrays(rows, values)
    s = strength(entropy, p, v, jnp.broadcast_to(radius, p.shape[:2] + p.shape[3:]))
    return p * jnp.exp(log_tilt(s, p, v))


def log_tilt(s: Array, p: Array, v: Array) -> Array:
    """Find the logarithms of what entries of p are multiplied by, `[A, S, n, *B]`."""
    fall = v - lax.stop_gradient(jnp.min(jnp.where(p > 0, v, jnp.inf), axis=2, keepdims=True))
    # (An entry of 0 stays 0, at whatever value.)
    tilt = -s[:, :, None] * jnp.where(p > 0, fall, 0)
    mass = jnp.sum(p, axis=2)
    kept, lost = (
        jnp.where(mass > 0, jnp.sum(p * x, axis=2) / jnp.where(mass > 0, mass, 1), none)
        for x, none in ((jnp.exp(tilt), 1), (jnp.expm1(tilt), 0))
    )
    # (The logarithm of a number close to 1, or close to 0, by what is close to 0.)
    near = lost > -0.5
    logs = jnp.where(near, jnp.log1p(jnp.where(near, lost, 0)), jnp.log(jnp.where(near, 1, kept)))
    return tilt - logs[:, :, None]


def entropy(s: Array, p: Array, v: Array) -> Array:
    """Measure the relative entropy of such a row to p."""
    logs = log_tilt(s, p, v)
    # (x log x - x + 1 in the place of x log x, for the sum of x is that of 1; near x = 1 by its series.)
    small = jnp.abs(logs) < 1e-2
    near = jnp.where(small, logs, 0)
    near = near**2 * (0.5 + near * (1 / 3 + near * (1 / 8 + near * (1 / 30 + near / 144))))
    far = jnp.where(small, 0, logs)
    return jnp.sum(p * jnp.where(small, near, far * jnp.exp(far) - jnp.expm1(far)), axis=2)


_WORST: dict[float | str, Callable[[Array, Array, Array], Array]] = {
    2: _projected,
    "kl": lambda rows, radius, h: tilted(rows, radius, h[None, None]),
}
KINDS = tuple(_WORST)
