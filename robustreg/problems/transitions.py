"""Transition kernels: three representations behind one operator and its transpose.

A kernel `P(s' | s, a)` is used in two ways only: `expect` averages a value over successors (every Bellman operator),
and `push` moves mass forward (every occupancy). They are transposes of each other,
`<mu, expect(v)> = <push(mu), v>`, which the tests assert for every representation.

* `Dense` (in `dense`): one matrix product. A kernel without batch axes serves any number of lanes as one matrix-matrix
  product.
* `Successors` (in `successors`): padded successor lists, a gather and a weighted sum; O(S A K) whatever S.
* `MatrixFree` (in `matrix_free`): the caller's function.

Each class implements the two operators in the kernels' layout (`[S, *B]` and `[A, S, *B]`, see `pytrees`);
the public `expect` and `push` wrap them in the public, batch-first one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import checks, pytrees


class Transitions:
    """Hold what the solvers need of a transition kernel: sizes, and one operator with its transpose."""

    @property
    def n_states(self) -> int:
        """S."""
        raise TypeError(f"{type(self).__name__} does not define n_states")

    @property
    def n_actions(self) -> int:
        """A."""
        raise TypeError(f"{type(self).__name__} does not define n_actions")

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch axes of the kernel's own arrays."""
        return ()

    @property
    def fan_out(self) -> int:
        """Most summands of one expectation."""
        return self.n_states

    def bind(self, batch_ndim: int, dtype: Any) -> "Transitions":
        """Lay the kernel out for lanes with `batch_ndim` batch axes, computing in `dtype`."""
        raise TypeError(f"{type(self).__name__} does not define bind")

    def _expect(self, v: Array) -> Array:
        """`[S, *B]` to `[A, S, *B]`; only on a bound kernel."""
        raise TypeError(f"{type(self).__name__} does not define _expect")

    def _push(self, mu: Array) -> Array:
        """`[A, S, *B]` to `[S, *B]`; only on a bound kernel."""
        raise TypeError(f"{type(self).__name__} does not define _push")

    def _take_lanes(self, index: tuple[Array, ...]) -> "Transitions":
        """Some lanes of a bound kernel, as one batch axis; `index` holds an array `[n]` per batch axis."""
        raise TypeError(f"{type(self).__name__} does not define _take_lanes")

    def _by_lane(self, change: Callable[[Array, int], Array]) -> "Transitions":
        """A bound kernel whose arrays with lanes' axes are put through `change(array, where the last of them is)`."""
        raise TypeError(f"{type(self).__name__} does not define _by_lane")

    def _expect_tangent(self, change: "Transitions", v: Array) -> Array | None:
        """Change of `_expect(v)` with the kernel's own, `[A, S, *B]`; None if it does not change. Only when bound."""
        raise TypeError(f"{type(self).__name__} does not define _expect_tangent")

    def _add_lane_axis(self) -> "Transitions":
        """A bound kernel for lanes with one more, trailing, batch axis."""
        raise TypeError(f"{type(self).__name__} does not define _add_lane_axis")

    def _row_sums(self, ndim: int, dtype: Any) -> tuple[Array, Array]:
        """Sums of a bound kernel's rows, and of their absolute values, `[A, S, *b]` with `ndim` axes of lanes."""
        # A function shows its sums only.
        sums = self._expect(jnp.ones((self.n_states, *(1,) * ndim), dtype))
        return sums, jnp.abs(sums)

    def _silenced(self, lost: Array) -> Any:
        """A bound kernel without transitions in the lanes that are `lost`, `[*B]`; also where it is NaN there."""
        raise TypeError(f"{type(self).__name__} does not define _silenced")

    def _lane_axes(self, ndim: int) -> tuple[int, ...]:
        """Sizes of a bound kernel's own lanes' axes, of which there are `ndim`; 1 where lanes share it."""
        return (1,) * ndim

    def _induced(self, policy: Array) -> "tuple[Transitions, Array, Transitions | None]":
        """Return a cheaper kernel and policy that induce the same chain P_pi as `policy` does on this kernel.

        Kernels that can average over actions first return one with fewer entries. The third result is P_pi once more,
        as a kernel of one action that is cheap to multiply from the left (`_push`), or None where there is none.
        What is returned takes no more memory than this kernel or than a few policies.
        """
        return self, policy, None

    def _written_out(self, policy: Array) -> Array:
        """Write the chain of a policy `[A, S, *B]` out: `P_pi [S, S, *B]` (row: state, column: successor)."""
        return jnp.sum(policy[:, :, None] * self._rows(policy.ndim - 2, policy.dtype), axis=0)

    def _rows(self, ndim: int, dtype: Any) -> Array:
        """Write a bound kernel out, `[A, S, S, *b]` with `ndim` axes of lanes."""
        n, lanes = self.n_states, self._lane_axes(ndim)
        unit = jnp.eye(n, dtype=dtype).reshape((n,) + (1,) * ndim + (n,))
        rows = self._add_lane_axis()._expect(jnp.broadcast_to(unit, (n, *lanes, n)))
        return jnp.moveaxis(rows, -1, 2)

    def prepared(self) -> "Transitions":
        """Find out what can be while arrays are concrete, and keep it with the kernel; see `MDP.prepared`."""
        return self

    def _with_sparsity(self, dtype: Any) -> "Transitions":
        """Return the same kernel, to be used in `dtype`, as a program may take it; `solve` and its like see to it."""
        return self

    def expect(self, v: ArrayLike) -> Array:
        """Expected value of the successor.

        Args:
            v: values, `[*B, S]`; leading axes broadcast against the kernel's own.

        Returns:
            `sum_{s'} P(s' | s, a) v(s')`, `[*B, S, A]`.
        """
        return _expect(self, v)

    def push(self, mu: ArrayLike) -> Array:
        """Mass after one step, the transpose of `expect`.

        Args:
            mu: mass on state-action pairs, `[*B, S, A]`; leading axes broadcast against the kernel's own.

        Returns:
            `sum_{s,a} mu(s, a) P(s' | s, a)`, `[*B, S]`.
        """
        return _push(self, mu)

    def _lanes(self, x: ArrayLike, core_ndim: int) -> tuple[Array, int]:
        x = checks.canonical(jnp.asarray(x))
        core = (self.n_states, self.n_actions)[:core_ndim]
        if x.shape[x.ndim - core_ndim :] != core:
            raise ValueError(f"expected [..., {', '.join(map(str, core))}], got shape {x.shape}")
        batch = jnp.broadcast_shapes(x.shape[: x.ndim - core_ndim], self.batch_shape)
        x = jnp.broadcast_to(x, batch + core)
        return pytrees.lanes_last(x, len(batch), core_ndim), len(batch)


@jax.jit
def _expect(transitions: Transitions, v: ArrayLike) -> Array:
    transitions = checks.canonical(transitions)
    v, batch_ndim = transitions._lanes(v, 1)
    return pytrees.batch_first(transitions.bind(batch_ndim, v.dtype)._expect(v), 2)


@jax.jit
def _push(transitions: Transitions, mu: ArrayLike) -> Array:
    transitions = checks.canonical(transitions)
    mu, batch_ndim = transitions._lanes(mu, 2)
    return pytrees.batch_first(transitions.bind(batch_ndim, mu.dtype)._push(mu), 1)
