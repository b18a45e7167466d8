"""Transitions as an array, and its products with values and with masses.

Products read the array in the order in which it lies in memory: as the first factor where its last axis is summed over,
else as the second. In any other order the compiler copies all of it first, which takes ten to twenty times as long as
the product.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import pytrees
from robustreg.problems.transitions import Transitions

# Products in the precision of their factors, also where a GPU has a faster one.
_EXACT = lax.Precision.HIGHEST
# Lanes that share a kernel, from which moving mass through a copy of it, transposed, takes less time than without.
_MANY = 32


@pytrees.dataclass
class Dense(Transitions):
    """A kernel as an array.

    Attributes:
        probabilities: `[*B, S, A, S]`, row-stochastic over the last axis (up to termination).
    """

    probabilities: Array

    @property
    def n_states(self) -> int:
        return self.probabilities.shape[-1]

    @property
    def n_actions(self) -> int:
        return self.probabilities.shape[-2]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.probabilities.shape[:-3]

    @property
    def dtype(self) -> Any:
        """Floating dtype of the probabilities."""
        return self.probabilities.dtype

    def bind(self, batch_ndim: int, dtype: Any) -> "Dense":
        p = self.probabilities.astype(dtype)
        return Dense(p.reshape((1,) * (batch_ndim - len(self.batch_shape)) + p.shape))

    def _induced(self, policy: Array) -> "tuple[Dense, Array, None]":
        if self.n_actions == 1 or pytrees.more_than(math.prod(self.batch_shape), policy.shape[2:]):
            return self, policy, None
        return Dense(self._mixed(policy)[..., None, :]), jnp.ones((1,) * policy.ndim, policy.dtype), None

    def _take_lanes(self, index: tuple[Array, ...]) -> "Dense":
        p, own = self._of_own_lanes()
        return Dense(p[tuple(index[i] for i in own)] if own else p[None])

    def _by_lane(self, change: Callable[[Array, int], Array]) -> "Dense":
        return Dense(change(self.probabilities, self.probabilities.ndim - 4))

    def _row_sums(self, ndim: int, dtype: Any) -> tuple[Array, Array]:
        p = jnp.moveaxis(self.probabilities, (-2, -3), (0, 1))
        return jnp.sum(p, axis=-1), jnp.sum(jnp.abs(p), axis=-1)

    def _silenced(self, lost: Array) -> "Dense":
        where = pytrees.shared_by(lost, self.batch_shape)
        return Dense(jnp.where(where[..., None, None, None], 0, self.probabilities))

    def _lane_axes(self, ndim: int) -> tuple[int, ...]:
        return self.batch_shape

    def _add_lane_axis(self) -> "Dense":
        return Dense(self.probabilities.reshape(*self.batch_shape, 1, *self.probabilities.shape[-3:]))

    def _expect(self, v: Array) -> Array:
        p, own, v = self._factors(v, 1)
        n = len(own)
        found = lax.dot_general(p, v, (((n + 2,), (0,)), (tuple(range(n)), tuple(1 + i for i in own))), _EXACT)
        return self._lanes_last(found, own, (n + 1, n), n + 2)

    def _push(self, mu: Array) -> Array:
        p, own, mu = self._factors(mu, 2)
        n = len(own)
        lanes, alike = tuple(range(n)), tuple(2 + i for i in own)
        if pytrees.more_than(_MANY * math.prod(self.batch_shape), mu.shape[2:]):
            found = lax.dot_general(p, mu, (((n, n + 1), (1, 0)), (lanes, alike)), _EXACT)
            return self._lanes_last(found, own, (n,), n + 1)
        found = lax.dot_general(mu, p, (((1, 0), (n, n + 1)), (alike, lanes)), _EXACT)
        return self._lanes_last(found, own, (found.ndim - 1,), n)

    def _written_out(self, policy: Array) -> Array:
        if policy.shape[2:] == self.batch_shape:
            return jnp.moveaxis(self._mixed(policy), (-2, -1), (0, 1))
        p, own, policy = self._factors(policy, 2)
        lanes = "bcdefghijk"[: len(self.batch_shape)]
        spec = f"{''.join(lanes[i] for i in own)}sat,as{lanes}->st{lanes}"
        return jnp.einsum(spec, p, policy, precision=_EXACT)

    def _rows(self, ndim: int, dtype: Any) -> Array:
        return jnp.moveaxis(self.probabilities.astype(dtype), (-2, -3, -1), (0, 1, 2))

    def _mixed(self, policy: Array) -> Array:
        """Average over actions by a policy of the kernel's own lanes, `[*b, S, S]`."""
        weight = jnp.moveaxis(policy, (1, 0), (-2, -1))
        return jnp.sum(weight[..., None] * self.probabilities, axis=-2)

    def _factors(self, x: Array, core: int) -> tuple[Array, tuple[int, ...], Array]:
        """Return the kernel as `_of_own_lanes` has it, and x for all lanes."""
        if x.ndim - core != len(self.batch_shape):
            raise ValueError(f"expected {len(self.batch_shape)} batch axes, got shape {x.shape}")
        p, own = self._of_own_lanes()
        return p, own, jnp.broadcast_to(x, x.shape[:core] + jnp.broadcast_shapes(x.shape[core:], self.batch_shape))

    def _of_own_lanes(self) -> tuple[Array, tuple[int, ...]]:
        """Return the kernel without the batch axes that lanes share, and the numbers of those that it has."""
        own = tuple(i for i, n in enumerate(self.batch_shape) if n > 1)
        return self.probabilities.reshape(tuple(self.batch_shape[i] for i in own) + self.probabilities.shape[-3:]), own

    def _lanes_last(self, x: Array, own: tuple[int, ...], core: tuple[int, ...], shared: int) -> Array:
        """Reorder a product: axes at `core`, then lanes, whose own ones lead in it; shared ones begin at `shared`."""
        places, others = dict(zip(own, range(len(own)))), itertools.count(shared)
        lanes = [places[i] if i in places else next(others) for i in range(len(self.batch_shape))]
        return jnp.transpose(x, (*core, *lanes))

    def _expect_tangent(self, change: "Dense", v: Array) -> Array | None:
        dp = pytrees.given(change.probabilities)
        return None if dp is None else Dense(dp)._expect(v)
