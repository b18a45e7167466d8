"""Loops and branches that also run inside `jax.shard_map` with its default checks.

There the type of an array says over which axes of the mesh its content varies. A constant varies over none, whereas
what a loop makes of it varies as the arrays do that the loop reads; JAX wants a loop's state to keep its type, and both
branches of a condition to agree. `alike` gives arrays one type; the functions here do as those of the same name in
`jax.lax`, after the state has been given the type of what it will become; `until_done` and `until_stable` are the two
loops that are needed most.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

_T = TypeVar("_T")


def _axes(x: Any) -> frozenset[str]:
    """Axes of the mesh over which an array varies, inside `jax.shard_map`; elsewhere none."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def alike(tree: _T, *sources: Any) -> _T:
    """Let every leaf of a tree vary over all the axes over which one of them, or a leaf of the sources, does."""
    axes = frozenset().union(*map(_axes, jax.tree.leaves((tree, sources))))
    if not axes:
        return tree

    def spread(x: Any) -> Any:
        missing = axes - _axes(x)
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(spread, tree)


def while_loop(condition: Callable[[Any], Array], body: Callable[[Any], Any], start: _T, like: Any = ()) -> _T:
    """Run `lax.while_loop`; `like` is what the body reads besides its state."""
    return lax.while_loop(condition, body, alike(start, like))


def until_done(
    step: Callable[[_T, Array], tuple[_T, Array]], start: _T, done: Array, most: int | Array, like: Any = ()
) -> _T:
    """Repeat `x, done = step(x, done)` until all of `done` is true, and `most` times at most; return x.

    Args:
        step: of the state and what is done; that lanes which are done keep theirs is its own affair.
        start: the first state.
        done: what need not be begun, Booleans of any shape.
        most: turns.
        like: what `step` reads besides.
    """

    def unfinished(state: tuple[_T, Array, Array]) -> Array:
        _, done, count = state
        return ~jnp.all(done) & (count < most)

    def turn(state: tuple[_T, Array, Array]) -> tuple[_T, Array, Array]:
        x, done, count = state
        return *step(x, done), count + 1

    x, _, _ = while_loop(unfinished, turn, (start, done, jnp.asarray(0, jnp.int32)), like)
    return x


def until_stable(update: Callable[[Array], Array], members: Array, like: Any = ()) -> Array:
    """Apply `update` to a set, an array of Booleans, until that changes nothing; the empty set is left alone."""

    def turn(state: tuple[Array, Array]) -> tuple[Array, Array]:
        members, _ = state
        new = update(members)
        return new, jnp.any(new != members)

    def changing(state: tuple[Array, Array]) -> Array:
        _, changed = state
        return changed

    members, _ = while_loop(changing, turn, (members, jnp.any(members)), like)
    return members


def fori_loop(low: int, high: Any, body: Callable[[Any, Any], Any], start: _T, like: Any = ()) -> _T:
    """Run `lax.fori_loop`; `like` is what the body reads besides its state."""
    return lax.fori_loop(low, high, body, alike(start, like))


def scan(
    body: Callable[[Any, Any], Any],
    start: _T,
    xs: Any,
    like: Any = (),
    unroll: int = 1,
    length: int | None = None,
    reverse: bool = False,
) -> tuple[_T, Any]:
    """Run `lax.scan`; `like` is what the body reads besides its state and `xs`."""
    return lax.scan(body, alike(start, xs, like), xs, unroll=unroll, length=length, reverse=reverse)


def cond(condition: Array, then: Callable[[], _T], otherwise: Callable[[], _T], like: Any = ()) -> _T:
    """Run `lax.cond` of two functions of nothing; `like` is what either of them reads."""
    return lax.cond(condition, lambda: alike(then(), like), lambda: alike(otherwise(), like))
