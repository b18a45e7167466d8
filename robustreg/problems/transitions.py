"""Transition kernels: three representations behind one operator and its transpose.

A kernel `P(s' | s, a)` is used in two ways only: `expect` averages a value over successors (every Bellman operator),
and `push` moves mass forward (every occupancy). They are transposes of each other,
`<mu, expect(v)> = <push(mu), v>`, which the tests assert for every representation.

* `Dense`: one matrix product. A kernel without batch axes serves any number of lanes as one matrix-matrix product.
* `Successors` (in `successors`): padded successor lists, a gather and a weighted sum; O(S A K) whatever S.
* `MatrixFree`: the caller's function.

Each class implements the two operators in the kernels' layout (`[S, *B]` and `[A, S, *B]`, see `pytrees`);
the public `expect` and `push` wrap them in the public, batch-first one.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustreg._core import checks, closures, pytrees


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
        lanes = "bcdefghijk"[: len(self.batch_shape)]
        spec = f"{lanes}sat,as{lanes}->{lanes}st"
        rows = jnp.einsum(spec, self.probabilities, policy, precision=lax.Precision.HIGHEST)
        return Dense(rows[..., None, :]), jnp.ones((1,) * policy.ndim, policy.dtype), None

    def _take_lanes(self, index: tuple[Array, ...]) -> "Dense":
        lanes_last = jnp.moveaxis(self.probabilities, (-3, -2, -1), (0, 1, 2))
        return Dense(jnp.moveaxis(pytrees.pick_lanes(lanes_last, index), -1, 0))

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
        return self._contract("sat", v, "t", "as")

    def _push(self, mu: Array) -> Array:
        return self._contract("sat", mu, "as", "t")

    def _written_out(self, policy: Array) -> Array:
        return self._contract("sat", policy, "as", "st")

    def _expect_tangent(self, change: "Dense", v: Array) -> Array | None:
        dp = pytrees.given(change.probabilities)
        return None if dp is None else Dense(dp)._expect(v)

    def _contract(self, kernel: str, x: Array, contracted: str, out: str) -> Array:
        """One contraction in which a batch axis of size 1 of the kernel is shared by all lanes, never copied."""
        lanes = "bcdefghijk"[: len(self.batch_shape)]
        own = [i for i, n in enumerate(self.batch_shape) if n > 1]
        p = self.probabilities.reshape(tuple(self.batch_shape[i] for i in own) + self.probabilities.shape[-3:])
        spec = f"{''.join(lanes[i] for i in own)}{kernel},{contracted}{lanes}->{out}{lanes}"
        if x.ndim - len(contracted) != len(lanes):
            raise ValueError(f"expected {len(lanes)} batch axes, got shape {x.shape}")
        x = jnp.broadcast_to(
            x, x.shape[: len(contracted)] + jnp.broadcast_shapes(x.shape[len(contracted) :], self.batch_shape)
        )
        return jnp.einsum(spec, p, x, precision=lax.Precision.HIGHEST)


@jax.tree_util.register_pytree_node_class
class MatrixFree(Transitions):
    """A kernel as a function, for MDPs whose transitions are never written down.

    Keep the function object alive between calls: it is part of the compiled program, so that a lambda written
    anew at each call compiles anew.

    Args:
        expect: `expect(v)` or, with `parameters`, `expect(v, parameters)`: `[S] -> [S, A]`, linear in `v`.
        push: its transpose, `[S, A] -> [S]` (with `parameters` likewise); None derives it by linear transposition.
        n_states: S.
        n_actions: A.
        parameters: any pytree of arrays; derivatives flow to it. Shared by all lanes (`jax.vmap` over solves
            gives lanes their own).
    """

    def __init__(
        self,
        expect: Callable[..., Array],
        push: Callable[..., Array] | None = None,
        *,
        n_states: int,
        n_actions: int,
        parameters: Any = None,
    ):
        self._set(expect, push, n_states, n_actions, parameters)

    def _set(self, *fields: Any) -> None:
        self.function, self.transpose, self._n_states, self._n_actions, self.parameters = fields

    @property
    def n_states(self) -> int:
        return self._n_states

    @property
    def n_actions(self) -> int:
        return self._n_actions

    def tree_flatten(self) -> tuple[tuple[Any], tuple[Any, ...]]:
        """Split into leaves, the parameters, and what belongs to the compiled program: functions and sizes."""
        return (self.parameters,), (self.function, self.transpose, self.n_states, self.n_actions)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: tuple[Any]) -> "MatrixFree":
        """Rebuild without any check: leaves may be tracers or placeholders."""
        new = object.__new__(cls)
        new._set(*static, *leaves)
        return new

    def __repr__(self) -> str:
        return f"MatrixFree(n_states={self.n_states}, n_actions={self.n_actions})"

    @property
    def dtype(self) -> Any:
        """Floating dtype of the parameters, or None: a function computes in the dtype that it is given."""
        leaves = [x for x in jax.tree.leaves(self.parameters) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
        return jnp.result_type(*leaves) if leaves else None

    def bind(self, batch_ndim: int, dtype: Any) -> "MatrixFree":
        return self

    def _with_sparsity(self, dtype: Any) -> "MatrixFree":
        """With the traced arrays that the functions close over among the parameters.

        Functions are static to the programs of the library, and such a program must not hold what is traced outside.
        """
        own = () if self.parameters is None else (self.parameters,)
        sizes = (self.n_states,), (self.n_states, self.n_actions)
        held: list[tuple[Any, tuple[Array, ...]]] = [
            (None, ()) if function is None else closures.explicit(function, jax.ShapeDtypeStruct(size, dtype), *own)
            for function, size in zip((self.function, self.transpose), sizes)
        ]
        if not any(traced for _, traced in held):
            return self
        (expect, first), (push, second) = held
        static = (
            lambda v, parameters: expect(v, *parameters[0], *parameters[1]),
            push and (lambda mu, parameters: push(mu, *parameters[0], *parameters[2])),
            self.n_states,
            self.n_actions,
        )
        return self.tree_unflatten(static, ((own, first, second),))

    def _silenced(self, lost: Array) -> "MatrixFree":
        def put(x: Any) -> Any:
            return jnp.where(jnp.all(lost), 0, x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

        static = self.tree_flatten()[1]
        return self.tree_unflatten(static, (jax.tree.map(put, self.parameters),))

    def _take_lanes(self, index: tuple[Array, ...]) -> "MatrixFree":
        return self

    def _by_lane(self, change: Callable[[Array, int], Array]) -> "MatrixFree":
        return self

    def _add_lane_axis(self) -> "MatrixFree":
        return self

    def _expect(self, v: Array) -> Array:
        return self._over_lanes(self._with_parameters(self.function), v, 1)

    def _push(self, mu: Array) -> Array:
        if self.transpose is not None:
            return self._over_lanes(self._with_parameters(self.transpose), mu, 2)
        like = jax.ShapeDtypeStruct((self.n_states,), mu.dtype)
        transposed = jax.linear_transpose(self._with_parameters(self.function), like)
        return self._over_lanes(lambda m: transposed(m)[0], mu, 2)

    def _expect_tangent(self, change: "MatrixFree", v: Array) -> Array | None:
        if all(pytrees.given(t) is None for t in jax.tree.leaves(change.parameters, is_leaf=pytrees.is_symbolic_zero)):
            return None
        tangent = pytrees.given_or_zero(change.parameters, self.parameters)

        def along(parameters: Any) -> Array:
            return self.tree_unflatten(self.tree_flatten()[1], (parameters,))._expect(v)

        return jax.jvp(along, (self.parameters,), (tangent,))[1]

    def _with_parameters(self, function: Callable[..., Array]) -> Callable[[Array], Array]:
        return function if self.parameters is None else lambda x: function(x, self.parameters)

    def _over_lanes(self, function: Callable[[Array], Array], x: Array, core_ndim: int) -> Array:
        """Apply a function of one lane in the public layout to all lanes in the kernels' layout."""
        lanes = x.shape[core_ndim:]
        flat = pytrees.batch_first(x.reshape(x.shape[:core_ndim] + (-1,)), core_ndim)
        out = jax.vmap(function)(flat)
        core = (self.n_states, self.n_actions)[: 3 - core_ndim]
        if out.shape[1:] != core:
            raise ValueError(f"a MatrixFree function must return shape {list(core)}, got {list(out.shape[1:])}")
        out = pytrees.lanes_last(out, 1, len(core))
        return out.reshape(out.shape[: len(core)] + lanes)
