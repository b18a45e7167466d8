"""Roots of one increasing function per lane, each in a bracket that never lets go of it.

`bisect` wants the sign alone and is for functions that rounding or a jump may spoil; `newton` wants the slope too, and
halves the bracket wherever Newton's step leaves it or does not become short; `secant` is that with slopes from
differences, for functions whose slope costs as much as they do. All three run until every lane is done, and a lane that
is done stays as it is.
(The roots that nearly all time goes to are elsewhere, with rules of their own: `regularisers.conjugates` and `layer`.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from robustreg._core import loops


def bisect(
    above: Callable[[Array], Array], low: Array, high: Array, size: Array | float = 0.0, like: Any = ()
) -> tuple[Array, Array]:
    """Halve brackets until they are as narrow as rounding allows.

    Args:
        above: whether a point is beyond the root, `[...]` bool.
        low, high: the brackets, `[...]`.
        size: what the root is to be known to, by a unit of its rounding; else to one of its own.
        like: what `above` reads besides its argument (see `loops`).

    Returns:
        The ends of the brackets, `[...]` each.
    """
    unit = float(jnp.finfo(low.dtype).eps)

    def wide(low: Array, high: Array) -> Array:
        middle = 0.5 * (low + high)
        return (high - low > unit * jnp.maximum(size, jnp.abs(middle))) & (middle > low) & (middle < high)

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        beyond, on = above(middle), wide(low, high)
        return jnp.where(on & ~beyond, middle, low), jnp.where(on & beyond, middle, high)

    return loops.while_loop(lambda ends: jnp.any(wide(*ends)), halve, (low, high), like)


class Search(NamedTuple):
    """Where `newton` stands.

    Attributes:
        x: the place, `[...]`.
        low, high: its bracket.
        seen: whether the function was looked at where the bracket begins, and where it ends.
        moved, before: lengths of the last step and of the one before it.
        exact: whether the function is 0 there for all that counts.
        carried: what the last evaluation left for the next one.
    """

    x: Array
    low: Array
    high: Array
    seen: tuple[Array, Array]
    moved: Array
    before: Array
    exact: Array
    carried: Any


def newton(
    measure: Callable[[Array, Any], tuple[Array, Array, Any]],
    start: Array,
    low: Array,
    high: Array,
    *,
    close: Array | float,
    near: Callable[[Array], Array],
    turns: int,
    hopeless: Array | None = None,
    carried: Any = None,
    keep: Callable[[Array, Any, Any], Any] = lambda done, old, new: new,
    like: Any = (),
) -> Search:
    """Find roots by Newton's method, kept in a bracket by bisection.

    Newton's step is taken where it stays in the bracket and is at most half as long as the one before the last, else
    the middle. (From a middle the root may be as far as the step there was long: beside that alone, Newton's next step
    would be refused, and so for ever.) A step beyond an end ends there, the first time: many roots lie on one.

    Args:
        measure: of a place and what the last evaluation carried: the function, its slope and what to carry on.
        start: the first place, `[...]`.
        low, high: the brackets.
        close: values of the function that count as 0: the search stays there.
        near: length of a step that is none any more at a place. Such a last step is taken.
        turns: most of them.
        hopeless: lanes not to wait for, `[...]` bool; None is none.
        carried: what the first evaluation is given.
        keep: of lanes that are done, of what they carried and of what would take its place: what to carry.
        like: what `measure` reads besides (see `loops`).
    """

    def turn(s: Search, done: Array) -> tuple[Search, Array]:
        value, slope, carried = measure(s.x, s.carried)
        below, above = value < 0, value > 0
        low, high = jnp.where(below, s.x, s.low), jnp.where(above, s.x, s.high)
        seen = s.seen[0] | below, s.seen[1] | above
        step, margin = s.x - value / slope, near(s.x)
        length = jnp.abs(step - s.x)
        # (A step that rounding leaves no length of ends on the bracket, not in it. Infinite slopes make none.)
        arrived = (length <= margin) & jnp.isfinite(slope)
        good = ((step > low) & (step < high) & (length <= 0.5 * s.before)) | arrived
        good = good | ((step <= low) & ~seen[0]) | ((step >= high) & ~seen[1])
        x = jnp.where(good, jnp.clip(step, low, high), 0.5 * (low + high))
        moved, exact = jnp.abs(x - s.x), jnp.abs(value) <= close
        short = (moved <= margin) | (high - low <= 2 * margin)
        kept = jnp.where(done | exact, s.x, x)
        carried = keep(done, s.carried, carried)
        return Search(kept, low, high, seen, moved, s.moved, s.exact | exact, carried), done | exact | short

    none = jnp.zeros(start.shape, bool)
    endless = jnp.full_like(start, jnp.inf)
    begun = Search(start, low, high, (none, none), endless, endless, none, carried)
    return loops.until_done(turn, begun, none if hopeless is None else hopeless, turns, like)


def secant(
    measure: Callable[[Array, Any], tuple[Array, Any]],
    start: Array,
    low: Array,
    high: Array,
    *,
    slope: float,
    close: float,
    turns: int,
    carried: Any,
    keep: Callable[[Array, Any, Any], Any],
    like: Any = (),
) -> Search:
    """Find roots as `newton` does, by slopes between the last two places.

    Args:
        measure: of a place and what the last evaluation carried: the function, and what to carry on.
        slope: of the function at the first place, about.
        close: values of the function that count as 0, and lengths of steps that are none, relative to a place beyond 1.
        start, low, high, turns, carried, keep, like: as in `newton`.
    """

    def near(x: Array) -> Array:
        return close * jnp.maximum(jnp.abs(x), 1)

    def differenced(x: Array, last: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        value, carried = measure(x, last[2])
        rise, run = value - last[1], x - last[0]
        found = jnp.where(rise * run > 0, rise / jnp.where(run == 0, 1, run), 0)
        # A slope between places far apart says little about a root near one of them: no step is shorter than this.
        shortest = 1e-6 * jnp.abs(run)
        found = jnp.where(found * shortest > jnp.abs(value), jnp.abs(value) / shortest, found)
        found = jnp.where(jnp.isnan(last[0]), slope, found)
        value = jnp.where(jnp.abs(value) <= near(x), 0, value)
        return value, found, (x, value, carried)

    unknown = jnp.full_like(start, jnp.nan)
    end = newton(
        differenced,
        start,
        low,
        high,
        close=0.0,
        near=near,
        turns=turns,
        carried=(unknown, unknown, carried),
        keep=lambda done, old, new: (new[0], new[1], keep(done, old[2], new[2])),
        like=like,
    )
    return end._replace(carried=end.carried[2])
