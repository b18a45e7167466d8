"""Transition kernels as padded successor lists: a gather and a weighted sum, O(S A K) whatever S.

What a policy makes of a kernel, its chain, is multiplied with vectors far more often than the kernel itself. Where the
indices have a pattern (see `robustreg.problems.sparsity`), it is a kernel of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import checks, loops, pytrees
from robustreg.problems import sparsity
from robustreg.problems.dense import Dense
from robustreg.problems.transitions import Transitions

_UNROLL = 8  # successor slots per pass, see `BoundSuccessors`


@pytrees.dataclass
class Successors(Transitions):
    """A kernel as padded successor lists.

    Attributes:
        indices: `[S, A, K]` integers, the successors; shared by all lanes. (Lanes with lists of their own,
            `[*B, S, A, K]`, as `jax.tree.map(jnp.stack, ...)` makes them, are joined in one list before they are used.)
        probabilities: `[*B, S, A, K]`; padding has probability 0. Repeated successors add up.
        pattern: of these indices, see `robustreg.problems.sparsity`; `_with_sparsity` finds it, leave it alone.
        raw: whether indices are a leaf of integers, as the library's own programs take it (see `_core.discrete`).
    """

    indices: Array = pytrees.discrete(int)
    probabilities: Array
    pattern: sparsity.Pattern | None = None
    raw: bool = pytrees.static(default=False, repr=False)

    @property
    def n_states(self) -> int:
        return self.indices.shape[-3]

    @property
    def n_actions(self) -> int:
        return self.indices.shape[-2]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return jnp.broadcast_shapes(self.indices.shape[:-3], self.probabilities.shape[:-3])

    @property
    def dtype(self) -> Any:
        """Floating dtype of the probabilities."""
        return self.probabilities.dtype

    @property
    def fan_out(self) -> int:
        """See `Transitions`."""
        return self.indices.shape[-1]

    def _with_sparsity(self, dtype: Any) -> Transitions:
        """With the pattern of its indices."""
        if self.indices.ndim > 3:
            return self._joined()._with_sparsity(dtype)
        prepared = self.prepared()
        pattern = prepared.pattern and dataclasses.replace(prepared.pattern, raw=True)
        return Successors(self.indices, self.probabilities, pattern, raw=True)

    def prepared(self) -> "Successors":
        """Find the pattern of the indices, where they are concrete, and keep it with the kernel; see `Transitions`."""
        if self.indices.ndim > 3:
            return self
        traced = checks.is_traced(self.indices)
        pattern = self.pattern if traced else sparsity.find(self.indices)
        return dataclasses.replace(self, pattern=pattern and dataclasses.replace(pattern, raw=self.raw))

    def _joined(self) -> Transitions:
        """The kernel of lanes whose lists differ: with lists of the successors of all, or written out where shorter."""
        batch, n_states = self.batch_shape, self.n_states
        flat = math.prod(batch)
        indices, p = (jnp.broadcast_to(x, batch + x.shape[-3:]) for x in (self.indices, self.probabilities))
        indices, p = (x.reshape(flat, *x.shape[-3:]) for x in (indices, p))
        if not checks.is_traced(indices):
            lists = union(np.asarray(indices), None if checks.is_traced(p) else np.asarray(p) != 0)
            if 2 * lists.shape[-1] <= n_states:
                return Successors(jnp.asarray(lists), by_list(indices, p, lists).reshape(*batch, *lists.shape))
        return Dense(written_out(indices, p).reshape(*batch, *p.shape[1:3], n_states))

    def bind(self, batch_ndim: int, dtype: Any) -> "Transitions":
        if self.indices.ndim > 3:
            return self._joined().bind(batch_ndim, dtype)
        p = self.probabilities.astype(dtype)
        p = jnp.moveaxis(p, (-1, -2, -3), (0, 1, 2))
        p = p.reshape(p.shape[:3] + (1,) * (batch_ndim - len(self.batch_shape)) + p.shape[3:])
        if self.pattern is None or self.pattern.slot is None:
            return BoundSuccessors(jnp.transpose(self.indices, (2, 1, 0)), p, self.pattern)
        return BoundSuccessors(self.pattern.neighbours[:, None], _by_neighbour(p, self.pattern), self.pattern)


def union(indices: np.ndarray, used: np.ndarray | None) -> np.ndarray:
    """List the successors that a state and action have in any lane.

    Args:
        indices: `[B, S, A, K]`.
        used: which of them count, of the same shape; None: all.

    Returns:
        int32 `[S, A, U]`, ascending; padding repeats the last.
    """
    _, n_states, n_actions, _ = indices.shape
    lists = np.moveaxis(indices, 0, -2).reshape(n_states, n_actions, -1).astype(np.int64)
    # What does not count becomes the first that does: nothing new.
    if used is not None:
        counts = np.moveaxis(used, 0, -2).reshape(lists.shape)
        first = np.take_along_axis(lists, counts.argmax(-1)[..., None], -1)
        lists = np.where(counts, lists, first)
    lists = np.sort(lists, axis=-1)
    new = np.diff(lists, axis=-1, prepend=-1) != 0
    width = int(new.sum(-1).max())
    order = np.argsort(~new, axis=-1, kind="stable")[..., :width]
    kept, there = np.take_along_axis(lists, order, -1), np.take_along_axis(new, order, -1)
    return np.where(there, kept, kept.max(-1, keepdims=True)).astype(np.int32)


def by_list(indices: Array, p: Array, lists: np.ndarray) -> Array:
    """Probabilities at other lists, which hold every successor that counts.

    Args:
        indices, p: `[B, S, A, K]`.
        lists: `[S, A, U]`, ascending; padding repeats the last.

    Returns:
        `[B, S, A, U]`, 0 at padding.
    """
    n = lists.shape[-1]

    def row(successors: Array, chances: Array, found: Array) -> Array:
        # The first place of a successor: padding comes after it.
        at = jnp.searchsorted(found, successors)
        there = found[jnp.minimum(at, n - 1)] == successors
        return jnp.zeros(n, chances.dtype).at[at].add(jnp.where(there, chances, 0), mode="drop")

    over_rows = jax.vmap(jax.vmap(row))
    return jax.vmap(over_rows, (0, 0, None))(indices, p, jnp.asarray(lists))


def written_out(indices: Array, p: Array) -> Array:
    """Write lists out as rows of a table.

    Args:
        indices, p: `[B, S, A, K]`.

    Returns:
        `[B, S, A, S]`.
    """
    lanes, n_states, n_actions, _ = p.shape
    b, s, a = jnp.ix_(*(jnp.arange(n) for n in (lanes, n_states, n_actions)))
    full = jnp.zeros((lanes, n_states, n_actions, n_states), p.dtype)
    return full.at[b[..., None], s[..., None], a[..., None], indices].add(p)


def _by_neighbour(p: Array, pattern: sparsity.Pattern) -> Array:
    """Probabilities `[K, A, S, *b]` of successors as those of neighbours, `[U, A, S, *b]`."""
    assert pattern.slot is not None
    # Where a caller closes over the kernel, this is not to be evaluated while compiling.
    p = lax.optimization_barrier(p)
    slot = pattern.slot.reshape(pattern.slot.shape + (1,) * (p.ndim - 3))
    number = jnp.arange(pattern.neighbours.shape[0], dtype=slot.dtype).reshape((-1,) + (1,) * (p.ndim - 1))
    parts = (jnp.where(slot[k][None] == number, p[k][None], 0) for k in range(p.shape[0]))
    return functools.reduce(jnp.add, parts)


@pytrees.dataclass
class BoundSuccessors(Transitions):
    """Successor lists in the kernels' layout: `indices [K, A, S]`, `probabilities [K, A, S, *B]`.

    With an axis of 1 in the place of A, the actions of a state share its list: of neighbours, if there is a `pattern`.

    One successor slot after the other: a gather of whole rows of lanes, fused with its product. Eight slots share a
    pass over the sum, which halves the time of a many-lane product; unrolling all of them would let compile time grow
    with K, and one reduction over the slots axis is up to ten times slower (the gather is then no longer by rows).
    """

    indices: Array
    probabilities: Array
    pattern: sparsity.Pattern | None = None

    @property
    def n_states(self) -> int:
        return self.indices.shape[2]

    @property
    def fan_out(self) -> int:
        """See `Transitions`."""
        return self.indices.shape[0]

    def _take_lanes(self, index: tuple[Array, ...]) -> "BoundSuccessors":
        return BoundSuccessors(self.indices, pytrees.pick_lanes(self.probabilities, index), self.pattern)

    def _by_lane(self, change: Callable[[Array, int], Array]) -> "BoundSuccessors":
        p = self.probabilities
        return BoundSuccessors(self.indices, change(p, p.ndim - 1), self.pattern)

    def _row_sums(self, ndim: int, dtype: Any) -> tuple[Array, Array]:
        return pytrees.total(self.probabilities), pytrees.total(jnp.abs(self.probabilities))

    def _silenced(self, lost: Array) -> "BoundSuccessors":
        where = pytrees.shared_by(lost, self.probabilities.shape[3:])
        return BoundSuccessors(self.indices, jnp.where(where[None, None, None], 0, self.probabilities), self.pattern)

    def _lane_axes(self, ndim: int) -> tuple[int, ...]:
        return self.probabilities.shape[3:]

    def _add_lane_axis(self) -> "BoundSuccessors":
        return BoundSuccessors(self.indices, self.probabilities[..., None])

    def _induced(self, policy: Array) -> "tuple[BoundSuccessors, Array, Collected | None]":
        lanes, pattern = policy.shape[2:], self.pattern
        alone = not pytrees.more_than(math.prod(self.probabilities.shape[3:]), lanes)
        if pattern is None or not (alone or pattern.neighbours.shape[0] <= 2 * policy.shape[0]):
            return self, policy, None
        if pattern.slot is None:
            weights = (policy[None] * self.probabilities).reshape(-1, self.n_states, *lanes)
            return self, policy, _collected(weights, pattern)
        # The averaged kernel has one "action" per neighbour, whose only successor is that neighbour.
        weights = pytrees.total(policy[None] * self.probabilities, axis=1)
        certain = jnp.ones((1,) * (1 + weights.ndim), weights.dtype)
        return BoundSuccessors(pattern.neighbours[None], certain), weights, _collected(weights, pattern)

    def _expect(self, v: Array) -> Array:
        shape = jnp.broadcast_shapes(self.probabilities.shape[1:], self.indices.shape[1:] + v.shape[1:])

        def add(total: Array, slot: tuple[Array, Array]) -> tuple[Array, None]:
            index, probability = slot
            picked = v.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
            return total + probability * picked, None

        return loops.scan(add, jnp.zeros(shape, v.dtype), (self.indices, self.probabilities), v, _UNROLL)[0]

    def _push(self, mu: Array) -> Array:
        lanes = jnp.broadcast_shapes(self.probabilities.shape[3:], mu.shape[2:])

        def add(total: Array, slot: tuple[Array, Array]) -> tuple[Array, None]:
            index, probability = slot
            moved = probability * mu
            moved = moved if index.shape[0] == moved.shape[0] else jnp.sum(moved, axis=0, keepdims=True)
            return total.at[index].add(moved, mode="promise_in_bounds", wrap_negative_indices=False), None

        zeros = jnp.zeros((self.n_states, *lanes), mu.dtype)
        return loops.scan(add, zeros, (self.indices, self.probabilities), mu, _UNROLL)[0]

    def _written_out(self, policy: Array) -> Array:
        weights = jnp.broadcast_to(policy[None] * self.probabilities, (self.fan_out, *policy.shape))
        indices = jnp.broadcast_to(self.indices, weights.shape[:3])
        column = jnp.arange(self.n_states, dtype=indices.dtype)[None]

        def add(total: Array, slot: tuple[Array, Array]) -> tuple[Array, None]:
            index, weight = slot
            there = (index[:, None] == column).reshape(total.shape[:2] + (1,) * (weight.ndim - 1))
            return total + jnp.where(there, weight[:, None], 0), None

        # No scatter: on a GPU it adds up in any order, and every lane would have to wait for it.
        slots = indices.reshape(-1, self.n_states), weights.reshape(-1, *weights.shape[2:])
        zeros = jnp.zeros((self.n_states, self.n_states, *policy.shape[2:]), policy.dtype)
        return loops.scan(add, zeros, slots, (policy, self.probabilities))[0]

    def _expect_tangent(self, change: "BoundSuccessors", v: Array) -> Array | None:
        dp = pytrees.given(change.probabilities)
        return None if dp is None else BoundSuccessors(self.indices, dp)._expect(v)


@pytrees.dataclass
class Collected(Transitions):
    """The chain of one policy from the other end, where every state collects from its sources.

    Attributes:
        sources: `[D, 1, S]` lists of them.
        weights, origins, targets: `[M, *B]` and `[M]`: what is not in the lists, to be scattered (see `sparsity`).
    """

    sources: BoundSuccessors
    weights: Array
    origins: Array
    targets: Array

    def _push(self, mu: Array) -> Array:
        listed = self.sources._expect(mu[0])[0]
        return listed.at[self.targets].add(self.weights * mu[0][self.origins], mode="promise_in_bounds")


def _collected(weights: Array, pattern: sparsity.Pattern) -> Collected:
    """From `weights [U, S, *B]` of neighbours, looked up once and not at every product."""
    listed, sources = sparsity.picked(weights, pattern.sources)
    overflow, origins = sparsity.picked(weights, pattern.overflow)
    return Collected(BoundSuccessors(sources[:, None], listed[:, None]), overflow, origins, pattern.overflow_targets)
