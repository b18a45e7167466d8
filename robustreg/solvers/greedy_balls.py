"""Transitions that stay probabilities, where mass moves in the order of values: no row is sorted, none written out.

Sets of `exact_balls` for two norms. Mass is taken, state by state in an order of their values, until there is enough.
*p = 1*: b/2, from the highest value on, to be put at the lowest. *p = infinity*: the lowest values get all that they
may have, `min(p, b) + b` more than the least, the very lowest first, until what all entries can give up,
`sum min(p, b)`, is spent. Which states are taken whole, and what part of the one at which a row stops, is all there is
to know of a row. It is found from sums over some sqrt(S) buckets of states that are neighbours in that order, which are
one product of matrices.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import loops, pytrees
from robustreg.problems.dense import Dense
from robustreg.problems.transitions import Transitions
from robustreg.solvers import exact_balls
from robustreg.solvers.chains import Written, written

KINDS: tuple[float | str, ...] = (1, math.inf)

# Terms in which a sum over actions is written out: one kernel then reads them all, in a quarter of the time of a sum
# along an axis.
_TERMS = 32


class Taken(NamedTuple):
    """Where rows stop to take mass.

    Attributes:
        rank: of each state in the order in which mass is taken, `[*B, S]`.
        end: the rank at which a row stops, `[*B, S, A]`.
        part: what is taken there, `[*B, S, A]`.
        moved: the sum of `m (v - min v)` over what is taken, `[*B, S, A]`.
    """

    rank: Array
    end: Array
    part: Array
    moved: Array


@pytrees.dataclass
class GreedyBall(exact_balls.Stochastic):
    """Balls around rows written out, in the kernels' layout.

    Attributes:
        radius: positive, `[A or 1, S or 1, *b]`.
        mass: what entries can give up, `[*b, S, A, S]`: all that they have, or (infinity) no more than the radius.
        p: 1 or infinity.
        kept: for infinity, what they cannot, likewise.
        total: for infinity, the sum of what a row can give up, `[A, S, *b]`.
    """

    radius: Array
    mass: Dense
    p: float | str = pytrees.static()
    kept: Dense | None = None
    total: Array | None = None

    @property
    def terms(self) -> int:
        """Count the states."""
        return self.mass.n_states

    def noise(self, policy: Array, worst: Taken) -> Array:
        """Write out the noise that costs a policy most, `[A, S, S, *B]`."""
        lost = self._put(self._lost(worst, slice(None)), worst.rank[..., None, None, :])
        return -jnp.moveaxis(lost, (-2, -3, -1), (0, 1, 2))

    def pull(self, policy: Array, discount: Array, worst: Taken) -> Written:
        """Find what K loses against that of P."""
        weight = _rows_first(policy * discount[None, None])
        n_actions = weight.shape[-1]
        step = -(-n_actions // _TERMS)
        some = [slice(first, first + step) for first in range(0, n_actions, step)]
        lost = [jnp.sum(weight[..., few, None] * self._lost(worst, few), axis=-2) for few in some]
        return written(self._put(functools.reduce(jnp.add, lost), worst.rank[..., None, :]))

    def expected(self, transitions: Transitions, h: Array, worst: Taken) -> Array:
        """Compute what the worst rows lead to expect of h, `[A, S, *B]`.

        For infinity from what entries keep: where few states are taken, that is the only product.
        """
        moved = _actions_first(worst.moved)
        if self.kept is None or self.total is None:  # it is put at the lowest value, which counts as 0
            return transitions._expect(h) - moved
        low = jnp.min(h, axis=0, keepdims=True)[None]
        return self.kept._expect(h) + low * self.total + moved

    def worst(self, h: Array, c: Array) -> Taken:
        """Find where the worst rows at a value stop to take mass."""
        mass, b, v = self.mass.probabilities, _rows_first(self.radius), jnp.moveaxis(h, 0, -1)
        v = v - jnp.min(v, axis=-1, keepdims=True)
        if self.total is None:
            return _taken(mass, jnp.zeros_like(b), 0.5 * b, v, True)
        return _taken(mass, b, _rows_first(self.total), v, False)

    def _lost(self, taken: Taken, actions: slice) -> Array:
        """Compute what entries lose, `[*B, S, actions, S]`, before `_put`."""
        mass, end, part = self.mass.probabilities[..., actions, :], taken.end[..., actions], taken.part[..., actions]
        most = mass
        if self.p != 1:
            most = mass + jnp.broadcast_to(_rows_first(self.radius), taken.end.shape)[..., actions, None]
        rank, end, part = taken.rank[..., None, None, :], end[..., None], part[..., None]
        moved = jnp.where(rank < end, most, jnp.where(rank == end, part, 0))
        return moved if self.p == 1 else mass - moved

    def _put(self, lost: Array, rank: Array) -> Array:
        """For p = 1, put what rows `[..., S]` lose at the state that comes last, which has the lowest value."""
        if self.p != 1:
            return lost
        return lost - jnp.where(rank == rank.shape[-1] - 1, jnp.sum(lost, axis=-1, keepdims=True), 0)


def greedy(radius: Array, rows: Dense, p: float | str) -> GreedyBall:
    """Make the balls of a radius `[A or 1, S or 1, *b]` around rows written out, as they lie in memory."""
    radius = exact_balls.some(radius)
    if p == 1:
        return GreedyBall(radius, rows, p)
    mass = jnp.minimum(rows.probabilities, _rows_first(radius)[..., None])
    return GreedyBall(radius, Dense(mass), p, Dense(rows.probabilities - mass), _actions_first(jnp.sum(mass, axis=-1)))


def _rows_first(x: Array) -> Array:
    """Reorder `[A, S, *B]` to `[*B, S, A]`, the axes of rows as they lie in memory."""
    return jnp.moveaxis(x, (1, 0), (-2, -1))


def _actions_first(x: Array) -> Array:
    """Reorder `[*B, S, A]` to `[A, S, *B]`."""
    return jnp.moveaxis(x, (-1, -2), (0, 1))


def _taken(mass: Array, more: Array, limit: Array, v: Array, descending: bool) -> Taken:
    """Take `m = mass + more` from states in the order of v, until there is as much as a limit.

    States are put together by their rank into some sqrt(S) buckets, whose sums are one product of matrices. Only in the
    bucket in which a row reaches its limit are its entries looked at one by one. Where `more` alone fills the limits of
    all rows within the first bucket, as it does for rows of few successors and for large intervals, there is no need
    for the sums.

    Args:
        mass: `[*B, S, A, S]`, not negative.
        more: the same for all entries of a row, `[*B, S, A]`.
        limit: `[*B, S, A]`.
        v: values, `[*B, S]`.
        descending: whether the highest come first.
    """
    n = v.shape[-1]
    # (Eight at a time: their two columns each fill the registers of a matrix product, which else takes thrice as long.)
    width = -(-n // (8 * max(round(math.sqrt(n) / 8), 1)))
    count = -(-n // width)
    fixed = lax.stop_gradient(v)
    order = jnp.argsort(-fixed if descending else fixed, axis=-1)
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    member = jax.nn.one_hot(rank // width, count, dtype=v.dtype)
    limit = jnp.broadcast_to(limit, v.shape[:-1] + mass.shape[-3:-1])

    def there(x: Array, bucket: Array) -> Array:
        """Read entries of `[*B, S]` in a bucket, by rank, `[*B, S, A, width]`; the last state's beyond it."""
        x = jnp.take_along_axis(x, order, axis=-1)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * width - n)], mode="edge")
        x = x.reshape(*x.shape[:-1], 1, 1, count, width)
        return jnp.take_along_axis(x, bucket[..., None, None], axis=-2, mode="promise_in_bounds")[..., 0, :]

    def read(states: Array) -> Array:
        return _alone(jnp.take_along_axis(mass, states, axis=-1, mode="promise_in_bounds"))

    def first() -> tuple[Array, Array, Array]:
        states, values = (
            jnp.broadcast_to(x[..., None, None, :width], (*limit.shape, width))
            for x in (order, jnp.take_along_axis(v, order, axis=-1))
        )
        none = jnp.zeros_like(limit)
        return _one_by_one(read(states), more, values, n, none.astype(jnp.int32), limit, none)

    def any_bucket() -> tuple[Array, Array, Array]:
        bucket, left, moved = _whole_buckets(mass, more, limit, member, member * v[..., None])
        places = jnp.broadcast_to(jnp.arange(n).reshape((1,) * (v.ndim - 1) + (n,)), v.shape)
        entries, values = read(there(places, bucket)), _alone(there(v, bucket))
        return _one_by_one(entries, more, values, n, bucket * width, left, moved)

    if descending:
        return Taken(rank, *any_bucket())
    near = jnp.all(lax.stop_gradient(limit < (width - 0.01) * more))
    return Taken(rank, *loops.cond(near, first, any_bucket, (mass, more, limit, v)))


def _one_by_one(
    entries: Array, more: Array, values: Array, n: int, rank: Array, left: Array, moved: Array
) -> tuple[Array, Array, Array]:
    """Take entries, `[*B, S, A, k]`, of the states from a rank on, until nothing is left of a limit.

    Returns:
        The rank of the state at which a row stops, what is taken there, and the sum of `m v` over all that is taken.
    """
    going, part, full = True, jnp.zeros_like(left), jnp.zeros_like(rank)
    for k in range(entries.shape[-1]):
        m = jnp.where(rank + k < n, entries[..., k] + more, 0)
        every = going & (m <= left)
        some = jnp.where(going & ~every, left, 0)
        taken = jnp.where(every, m, some)
        left, part, full, going = left - taken, part + some, full + every.astype(full.dtype), every
        moved = moved + taken * values[..., k]
    return _alone(rank + full), _alone(part), _alone(moved)


def _whole_buckets(mass: Array, more: Array, limit: Array, member: Array, worth: Array) -> tuple[Array, Array, Array]:
    """Take buckets of states, one after the other, that fit into what is left of a limit; never the last one.

    Args:
        mass, more, limit: as in `_taken`.
        member, worth: 1 and the value where a state is in a bucket, else 0, `[*B, S, buckets]`.

    Returns:
        The first bucket that is not taken, what is left of the limit, and the sum of `m v` over what is taken,
        `[*B, S, A]`.
    """
    columns, count = jnp.concatenate([member, worth], axis=-1), member.shape[-1]
    sums = jnp.matmul(mass, columns[..., None, :, :], precision=lax.Precision.HIGHEST)
    own, worths = ([sums[..., first + k] for k in range(count)] for first in (0, count))
    shares = jnp.sum(columns, axis=-2)[..., None, None, :]
    left, bucket, moved, going = limit, jnp.zeros(limit.shape, jnp.int32), jnp.zeros_like(limit), True
    # (Written out, the loop is one kernel that reads these sums once; along an axis it takes ten times as long.)
    for k in range(count - 1):
        m = own[k] + more * shares[..., k]
        going = going & (m <= left)
        left, bucket = jnp.where(going, left - m, left), bucket + going.astype(bucket.dtype)
        moved = moved + jnp.where(going, worths[k] + more * shares[..., count + k], 0)
    return _alone(bucket), _alone(left), _alone(moved)


@jax.custom_jvp
def _alone(x: Array) -> Array:
    """Compute x in a kernel of its own: one that reads it would compute it anew for each number that it makes of x."""
    return lax.optimization_barrier(x)


@_alone.defjvp
def _alone_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _alone(*primals), tangents[0]
