r"""Transitions that stay probabilities, where rows are short lists of successors: see `exact_balls` for the sets.

A worst row differs from a row p in its K successors and, in the sets that let a pair go where it never went, in the few
states of the lowest values, the same for all rows. So nothing is written out, and a backup costs K^2 for each row,
whatever S. With values v of the successors and w of the lowest states:

*p = 1*: b/2 is taken from the highest successors on, and put at the lowest state.
*p = infinity*: every entry gives up `m = min(p, b)`, which fills what room there is, `m + b` or b, from the lowest
state on. The K lowest states are enough, for each of them has room for an entry's share.
*p = "kl"*: `x ~ p exp(-s v)` on the list itself.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import pytrees
from robustreg.problems.successors import BoundSuccessors
from robustreg.solvers import exact_balls
from robustreg.solvers.chains import Moved

KINDS = (1, math.inf, "kl")


class Worst(NamedTuple):
    """Mass that the worst rows of a set move.

    Attributes:
        lost: by each successor, `[K, A, S, *B]`.
        gained: by each of the lowest states, `[R, A, S, *B]`.
        lowest: which they are, `[R, *B]`.
        taken: what that takes off `<p, h>`, `[A, S, *B]`.
    """

    lost: Array
    gained: Array
    lowest: Array
    taken: Array


@pytrees.dataclass
class ListedBall(exact_balls.Stochastic):
    """Balls around rows of successors in the kernels' layout.

    Attributes:
        radius: `[A or 1, S or 1, *b]`.
        indices: of successors, `[K, A or 1, S, 1...]`, with an axis of 1 for each of lanes.
        probabilities: `[K, A, S, *b]`; those of one successor are together in its first place.
        p: 1, infinity or "kl".
    """

    radius: Array
    indices: Array
    probabilities: Array
    p: float | str = pytrees.static()

    @property
    def terms(self) -> int:
        """Count the successors of a list, and as many lowest states."""
        return 2 * self.indices.shape[0]

    def noise(self, policy: Array, worst: Worst) -> Array:
        """Write out the noise that costs a policy most, `[A, S, S, *B]`."""
        n_states, lanes = policy.shape[1], policy.ndim - 2
        taken = BoundSuccessors(self._index, worst.lost)._rows(lanes, policy.dtype)
        states = jnp.arange(n_states, dtype=worst.lowest.dtype).reshape((1, -1) + (1,) * lanes)
        there = (worst.lowest[:, None] == states)[:, None, None]
        return jnp.sum(jnp.where(there, worst.gained[:, :, :, None], 0), axis=0) - taken

    def pull(self, policy: Array, discount: Array, worst: Worst) -> Moved:
        """Find what K loses against that of P."""
        weight = discount[None, None] * policy
        lost = BoundSuccessors(self._index, weight[None] * worst.lost)
        return Moved(lost, worst.lowest, jnp.sum(weight[None] * worst.gained, axis=1))

    @property
    def _index(self) -> Array:
        return self.indices.reshape(self.indices.shape[:3])

    def _ahead(self, h: Array) -> Array:
        """Values of the successors, `[K, A or 1, S, *B]`."""
        return h.at[self._index].get(mode="promise_in_bounds", wrap_negative_indices=False)

    def worst(self, h: Array, c: Array) -> Worst:
        """Find what the worst rows at a value move."""
        p, v = jnp.broadcast_arrays(self.probabilities, self._ahead(h))
        b = jnp.broadcast_to(self.radius, p.shape[1:])
        lost, gained, lowest = {1: _shifted, math.inf: _filled, "kl": _tilted}[self.p](p, v, b, h)
        low = lax.stop_gradient(jnp.min(h, axis=0, keepdims=True))
        moved = jnp.sum(lost * (v - low[None, None]), axis=0)
        found = jnp.take_along_axis(h, lowest, axis=0) - low
        return Worst(lost, gained, lowest, moved - jnp.sum(gained * found[:, None, None], axis=0))


def listed(radius: Array, rows: BoundSuccessors, p: float | str) -> ListedBall:
    """Make the balls around rows of successors, of which those that a list has twice are put together."""
    lanes = rows.probabilities.ndim - 3
    same = rows.indices[:, None] == rows.indices[None]  # [j, k, A or 1, S]
    place = jnp.arange(rows.fan_out)
    earlier = place[:, None] < place[None]
    first = ~jnp.any(same & earlier[:, :, None, None], axis=0)
    take = (same & first[None]).reshape(same.shape + (1,) * lanes)
    together = jnp.sum(jnp.where(take, rows.probabilities[:, None], 0), axis=0)
    return ListedBall(radius, rows.indices.reshape(rows.indices.shape + (1,) * lanes), together, p)


def _before(mass: Array, v: Array, descending: bool) -> Array:
    """Sum the masses of a row, `[K, A, S, *B]`, that come before each in the order of values, or of places at a tie."""
    place = jnp.arange(v.shape[0]).reshape((-1,) + (1,) * (v.ndim - 1))
    one, other = v[:, None], v[None]
    ahead = one > other if descending else one < other
    ahead = ahead | ((one == other) & (place[:, None] < place[None]))
    return jnp.sum(jnp.where(ahead, mass[:, None], 0), axis=0)


def _shifted(p: Array, v: Array, b: Array, h: Array) -> tuple[Array, Array, Array]:
    """Take half the radius from the highest values, to be put at the lowest."""
    taken = jnp.clip(0.5 * exact_balls.some(b)[None] - _before(p, v, True), 0, p)
    lowest = jnp.argmin(h, axis=0).astype(jnp.int32)[None]
    return taken, jnp.sum(taken, axis=0)[None], lowest


def _filled(p: Array, v: Array, b: Array, h: Array) -> tuple[Array, Array, Array]:
    """Take from every entry what it may give up, to fill the lowest values: first what it was, then b more."""
    b = exact_balls.some(b)[None]
    m = jnp.minimum(p, b)
    whole, reach = jnp.sum(m, axis=0, keepdims=True), min(v.shape[0], h.shape[0])
    fall, lowest = lax.top_k(-jnp.moveaxis(lax.stop_gradient(h), 0, -1), reach)
    w, lowest = jnp.moveaxis(-fall, -1, 0)[:, None, None], jnp.moveaxis(lowest, -1, 0)
    lower = jnp.sum((w[:, None] < v[None]).astype(v.dtype), axis=0)
    kept = jnp.clip(whole - _before(m, v, False) - b * lower, 0, m)
    below = jnp.sum(jnp.where(v[None] <= w[:, None], m[None], 0), axis=1)
    rank = jnp.arange(reach, dtype=v.dtype).reshape((-1,) + (1,) * (v.ndim - 1))
    return m - kept, jnp.clip(whole - below - b * rank, 0, b), lowest


def _tilted(p: Array, v: Array, b: Array, h: Array) -> tuple[Array, Array, Array]:
    """Tilt rows towards low values."""
    x = jnp.moveaxis(exact_balls.tilted(jnp.moveaxis(p, 0, 2), b, jnp.moveaxis(v, 0, 2)), 2, 0)
    return p - x, jnp.zeros((0, *p.shape[1:]), p.dtype), jnp.zeros((0, *h.shape[1:]), jnp.int32)
