r"""Gaussian elimination without subtractions, for the linear systems of Markov chains that end or are discounted.

`I - K` with `K >= 0` and exit rates `e = (I - K) 1 >= 0`, not all 0 in any set of states that is never left, is a
diagonally dominant M-matrix. Its diagonal follows from the rest, `1 - K(s,s) = e(s) + sum_{t != s} K(s,t)`, and that
sum has no cancellation. Eliminating states one after the other keeps both properties: to leave out state k is to let
the chain run on until it is elsewhere,

    K(s,t) += K(s,k) K(k,t) / d(k),      e(s) += K(s,k) e(k) / d(k),      d(k) = e(k) + sum_{t > k} K(k,t),

for s, t > k. Only sums, products and quotients of non-negative numbers occur, so that every entry of the inverse comes
out to a relative error of a few S units of rounding, *whatever the discount and however the chain is reducible*
[Grassmann, Taksar and Heyman 1985; O'Cinneide 1996; Alfa, Xue and Ye 2002]. LU factors of `I - K` lose a factor
1/(1-g) instead: in float32 at g = 1 - 1e-6 nothing is left of them, while this keeps six digits.

States are eliminated in blocks, as matrix products: what is said above of a state holds of a block J, with the inverse
of `D - K(J,J)` in the place of 1/d. 2 S^3 operations, S^2 memory; a chain of 2,000 states takes .25 s on two cores.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import loops

# States up to which a chain is written out to be eliminated: a matrix of 32 MiB in float64.
STATES = 2048
# States eliminated together: enough to make the updates matrix products, few enough for the loop inside a block.
_BLOCK = 32

_T = TypeVar("_T")

_product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def solve(chain: Array, exits: Array, b: Array, transpose: bool = False) -> Array:
    """Solve `(I - K) x = b`, or `(I - K^T) x = b`, for one chain.

    Args:
        chain: `K >= 0`, `[S, S]`. Its diagonal is never looked at: it follows from the exit rates.
        exits: `(I - K) 1`, `[S]`, which the caller knows better than the difference does; positive, or 0 in states that
            lead to others where it is (the answer is infinite or NaN where none does).
        b: `[S, N]`, of any sign.
        transpose: which of the two systems.

    Returns:
        `x [S, N]`, entry by entry to a few S units of rounding of `(I - K)^{-1} |b|`.
    """
    n = b.shape[0]
    if n <= _BLOCK:
        inverse = _inverse(chain, exits)
        return _product(inverse.T if transpose else inverse, b)
    count = -(-n // _BLOCK)
    # Padding is states that nothing leads to and that nothing leaves.
    extra = count * _BLOCK - n
    chain, exits, b = (
        jnp.pad(chain, ((0, extra), (0, extra))),
        jnp.pad(exits, (0, extra), constant_values=1),
        jnp.pad(b, ((0, extra), (0, 0))),
    )
    number = jnp.arange(count * _BLOCK, dtype=jnp.int32)

    def parts(chain: Array, k: Array) -> tuple[Array, Array, Array]:
        """Block k of the chain, its transitions to later blocks `[block, S]`, and theirs to it `[S, block]`."""
        later = number >= (k + 1) * _BLOCK
        rows = lax.dynamic_slice_in_dim(chain, k * _BLOCK, _BLOCK, 0)
        columns = lax.dynamic_slice_in_dim(chain, k * _BLOCK, _BLOCK, 1)
        own = lax.dynamic_slice_in_dim(rows, k * _BLOCK, _BLOCK, 1)
        return own, jnp.where(later[None], rows, 0), jnp.where(later[:, None], columns, 0)

    def take(x: Array, k: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, k * _BLOCK, _BLOCK)

    def leave_out(k: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        chain, exits, b, inverses = state
        own, rows, columns = parts(chain, k)
        inverse = _inverse(own, take(exits, k) + jnp.sum(rows, axis=1))
        through = _product(columns, inverse)
        right = _product(rows.T, _product(inverse.T, take(b, k))) if transpose else _product(through, take(b, k))
        exits = exits + _product(through, take(exits, k))
        return chain + _product(through, rows), exits, b + right, inverses.at[k].set(inverse)

    def put_back(i: Array, x: Array) -> Array:
        k = count - 1 - i
        _, rows, columns = parts(chain, k)
        if transpose:
            found = _product(inverses[k].T, take(b, k) + _product(columns.T, x))
        else:
            found = _product(inverses[k], take(b, k) + _product(rows, x))
        return lax.dynamic_update_slice_in_dim(x, found, k * _BLOCK, 0)

    inverses = jnp.zeros((count, _BLOCK, _BLOCK), chain.dtype)
    chain, exits, b, inverses = loops.fori_loop(0, count, leave_out, (chain, exits, b, inverses))
    return loops.fori_loop(0, count, put_back, jnp.zeros_like(b), (chain, b))[:n]


def idle_steps(n_states: int, most: int) -> int:
    """Return after how many Krylov steps without progress elimination is better; `most` where S is too large for it."""
    return max(32, n_states // 8) if n_states <= STATES else most


def lane_by_lane(one: Callable[[_T, Array, Any], _T], state: _T, chain: Any, todo: Array, like: Any = ()) -> _T:
    """Let `one` take some lanes of a `chains.Chain` one after the other; what is not to do costs next to nothing.

    Args:
        one: of the state, the number of a lane and its chain, with one lane: the next state.
        state: the first one.
        chain: of all lanes.
        todo: which lanes to take, `[*B]`.
        like: what `one` reads besides.

    Returns:
        the last state.
    """

    def unfinished(state: tuple[_T, Array]) -> Array:
        _, todo = state
        return jnp.any(todo)

    def turn(state: tuple[_T, Array]) -> tuple[_T, Array]:
        x, todo = state
        lane = jnp.argmax(todo)
        alone = chain.pick(tuple(i[None] for i in jnp.unravel_index(lane, batch)))
        # With one lane, or under vmap, its matrix would not depend on the turn, and the compiler would write it out
        # before the loop, at every call. So it is made to depend on it.
        policy, pull = jax.tree.map(lambda x: jnp.where(todo[lane], x, 0), (alone.policy, alone.pull))
        alone = dataclasses.replace(alone, policy=policy, pull=pull)
        return one(x, lane, alone), todo.at[lane].set(False)

    batch, start = todo.shape, (state, todo.reshape(-1))
    then = functools.partial(loops.while_loop, unfinished, turn, start, (chain, like))
    return loops.cond(jnp.any(todo), then, lambda: start, (chain, like))[0]


def _inverse(chain: Array, exits: Array) -> Array:
    """`(D - K)^{-1}` of a small block with the diagonal D for which `(D - K) 1 = exits`: one state after the other."""
    n = exits.shape[0]
    number = jnp.arange(n, dtype=jnp.int32)

    def leave_out(k: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        chain, exits, x, pivots = state
        later = number > k
        row = jnp.where(later, chain[k], 0)
        pivot = exits[k] + jnp.sum(row)
        through = (jnp.where(later, chain[:, k], 0) / pivot)[:, None]
        chain, x = chain + through * row[None], x + through * x[k][None]
        return chain, exits + through[:, 0] * exits[k], x, pivots.at[k].set(pivot)

    start = (chain, exits, jnp.eye(n, dtype=chain.dtype), jnp.ones_like(exits))
    chain, _, x, pivots = loops.fori_loop(0, n, leave_out, start)

    def put_back(i: Array, x: Array) -> Array:
        k = n - 1 - i
        row = jnp.where(number > k, chain[k], 0)
        return x.at[k].set((x[k] + _product(row, x)) / pivots[k])

    return loops.fori_loop(0, n, put_back, x)
