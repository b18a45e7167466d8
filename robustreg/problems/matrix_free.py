"""Transitions as a function of the caller's, which are never written down."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import closures, pytrees
from robustreg.problems.transitions import Transitions


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
