"""Roots of one increasing function per lane, each in a bracket that never lets go of it.

`bisect` wants the sign alone and is for functions that rounding or a jump may spoil; `newton` wants the slope too, and
halves the bracket wherever Newton's step leaves it or does not become short; `secant` wants no slope, for functions
whose slope costs as much as they do. All three run until every lane is done, and a lane that is done stays as it is.
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
        moved, before: lengths of the last step and of the one before it.
        exact: whether the function is 0 there for all that counts.
        carried: what the last evaluation left for the next one.
    """

    x: Array
    low: Array
    high: Array
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
    like: Any = (),
) -> Search:
    """Find roots by Newton's method, kept in a bracket by bisection.

    Newton's step is taken where it stays in the bracket and is at most half as long as the one before the last, else
    the middle. (From a middle the root may be as far as the step there was long: beside that alone, Newton's next step
    would be refused, and so for ever.)

    Args:
        measure: of a place and what the last evaluation carried: the function, its slope and what to carry on.
        start: the first place, `[...]`.
        low, high: the brackets.
        close: values of the function that count as 0: the search stays there.
        near: length of a step that is none any more at a place. Such a last step is taken.
        turns: most of them.
        hopeless: lanes not to wait for, `[...]` bool; None is none.
        carried: what the first evaluation is given.
        like: what `measure` reads besides (see `loops`).
    """

    def turn(s: Search, done: Array) -> tuple[Search, Array]:
        value, slope, carried = measure(s.x, s.carried)
        low, high = jnp.where(value < 0, s.x, s.low), jnp.where(value > 0, s.x, s.high)
        step, margin = s.x - value / slope, near(s.x)
        length = jnp.abs(step - s.x)
        # (A step that rounding leaves no length of ends on the bracket, not in it. Infinite slopes make none.)
        arrived = (length <= margin) & jnp.isfinite(slope)
        good = ((step > low) & (step < high) & (length <= 0.5 * s.before)) | arrived
        x = jnp.where(good, jnp.clip(step, low, high), 0.5 * (low + high))
        moved, exact = jnp.abs(x - s.x), jnp.abs(value) <= close
        short = (moved <= margin) | (high - low <= 2 * margin)
        kept = jnp.where(done | exact, s.x, x)
        return Search(kept, low, high, moved, s.moved, s.exact | exact, carried), done | exact | short

    none = jnp.zeros(start.shape, bool)
    endless = jnp.full_like(start, jnp.inf)
    begun = Search(start, low, high, endless, endless, none, carried)
    return loops.until_done(turn, begun, none if hopeless is None else hopeless, turns, like)


def secant(
    measure: Callable[[Array], Array],
    low: Array,
    high: Array,
    *,
    close: float,
    turns: int,
    first: float = 0.5,
    like: Any = (),
) -> Array:
    """Find roots by the regula falsi, of which an end that stays twice counts half (the Illinois rule), `[...]`.

    Args:
        measure: the function; never asked at the ends (to look there would compile it twice more).
        low, high: the brackets, `[...]`. Of a root beyond them, the nearer end.
        close: values of the function, and lengths of the bracket, that count as 0.
        turns: most of them.
        first: share of the bracket at which to look first.
        like: what `measure` reads besides (see `loops`).
    """

    def turn(s: _Falsi, done: Array) -> tuple[_Falsi, Array]:
        fall = s.at_high - s.at_low
        share = jnp.where(fall > 0, -s.at_low / jnp.where(fall > 0, fall, 1), 0.5)
        x = jnp.clip(s.low + share * (s.high - s.low), s.low, s.high)
        value = measure(x)
        below = value < 0
        new = _Falsi(
            x=jnp.where(done, s.x, x),
            low=jnp.where(below, x, s.low),
            high=jnp.where(below, s.high, x),
            at_low=jnp.where(below, value, jnp.where(s.side < 0, 0.5 * s.at_low, s.at_low)),
            at_high=jnp.where(below, jnp.where(s.side > 0, 0.5 * s.at_high, s.at_high), value),
            side=jnp.where(below, 1.0, -1.0).astype(x.dtype),
        )
        return new, done | (jnp.abs(value) <= close) | (s.high - s.low <= close) | jnp.isnan(value)

    middle = 0.5 * (low + high)
    one = jnp.ones_like(middle)
    begun = _Falsi(middle, low, high, -first * one, (1 - first) * one, jnp.zeros_like(middle))
    return loops.until_done(turn, begun, jnp.zeros(middle.shape, bool), turns, like).x


class _Falsi(NamedTuple):
    """Where `secant` stands: place, bracket, the function at its ends, the end that moved last."""

    x: Array
    low: Array
    high: Array
    at_low: Array
    at_high: Array
    side: Array
