"""BiCGSTAB [van der Vorst 1992] for every lane by itself: each has its own step lengths, its own end, its own best.

The method solves `A x = b` with `A = I - K` by two products a step and needs no transpose. With `r = b - A x` and a
fixed *shadow* residual s0, here `K b`:

    v = A p,  a = <s0, r>/<s0, v>,     s = r - a v       the half step of bi-conjugate gradients
    t = A s,  w = <t, s>/<t, t>,       r = s - w t       the step of least residual along s
    x += a p + w s,                    p = r + (<s0, r>'/<s0, r>)(a/w)(p - w v)

**Centred.** Where no episode ends, constants are the slowest mode of K, and their share is known otherwise: the method
then runs on `C A C` with `C x = x - mean x`, by vectors of mean 0 throughout, and the mode never takes part.

**Failures.** On nearly deterministic chains the inner products vanish or the residual stands still. Then the best
iterate met is returned: what it is worth, the caller has to read off its true residual (`linear`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import loops, pytrees

Operator = Callable[[Array], Array]
# States of a block of `sums_of_blocks`, and lanes from which on a CPU does without.
_ROWS, FEW = 8, 16


class Iterate(NamedTuple):
    """Where the method stands, lane by lane.

    Attributes:
        x, residual, direction: `[S, *B]`: x, r and p of the recursion.
        rho: `<shadow, residual>`, `[*B]`.
        best, best_x: the least squared residual met, `[*B]`, and where, `[S, *B]`.
        mark: the squared residual when it last halved, `[*B]`.
        since: steps since then, `[*B]`.
        done: lanes that take no further part, `[*B]`.
        count: steps so far.
    """

    x: Array
    residual: Array
    direction: Array
    rho: Array
    best: Array
    best_x: Array
    mark: Array
    since: Array
    done: Array
    count: Array


def bicgstab(
    apply: Operator, b: Array, scale: Array, reduction: Array, max_steps: int, patience: int, centred: bool = False
) -> Array:
    """Solve `(I - K) x = b` for each lane, where `apply(x) = K x`.

    Args:
        apply: the operator K on `[S, *B]`, each lane by itself.
        b: `[S, *B]`.
        scale: a norm of b, `[*B]`: squares of the residual must neither overflow nor vanish, whatever the unit of b.
        reduction: `[*B]`, the 2-norm of the residual to reach, relative to that of b.
        max_steps: cap on steps, of two products each.
        patience: cap on steps in which the residual has not come down to .7 of what it was. On a chain that is nearly
            deterministic nothing may happen for S steps, and all the other lanes of a batch wait for it.
        centred: whether to solve `C (I - K) x = C b` with `C x = x - mean x` instead, by vectors of mean 0 throughout.

    Returns:
        the best iterate met, `[S, *B]`; the first is `b`, centred.
    """

    def mean(total: Array) -> Array:
        return total / b.shape[0] if centred else jnp.zeros_like(total)

    def step(at: Iterate) -> Iterate:
        p = at.direction
        # A vector of mean 0 has the same inner product with u and with C u = u - mean u: all of them, and the mean
        # itself, come from one pass over a product u that has not been centred yet.
        u = p - apply(p)
        hu, total = sums(shadow * u, u)
        a, v = at.rho / hu, u - mean(total)[None]
        s = at.residual - a[None] * v
        u = s - apply(s)
        us, uu, ss, hu, hs, total = sums(u * s, u * u, s * s, shadow * u, shadow * s, u)
        # <t, t> = <u, u> - S (mean u)^2
        t, tt = u - mean(total)[None], uu - mean(total) * total
        # An exact half step leaves s = 0 and t = 0: nothing more is to be taken off.
        w = jnp.where(tt > 0, us / jnp.where(tt > 0, tt, 1), 0)
        x, r = at.x + a[None] * p + w[None] * s, s - w[None] * t
        # <shadow, r> = <shadow, s> - w <shadow, t>, and |r|^2 = |s|^2 - w <s, t> because r is orthogonal to t. Neither
        # needs a pass over r. By rounding the difference may fall below 0, where it only says "small".
        rho, size = hs - w * hu, jnp.maximum(ss - w * us, floor * ss)
        p = r + (rho / at.rho * a / w)[None] * (p - w[None] * v)
        return judged(at, x, r, p, rho, size)

    def judged(at: Iterate, x: Array, r: Array, p: Array, rho: Array, size: Array) -> Iterate:
        better = ~at.done & (size < at.best)
        best = jnp.where(better, size, at.best)
        lower = best <= 0.5 * at.mark
        since = jnp.where(lower, 0, at.since + 1)
        # Breakdowns (a vanishing inner product) show as NaN or infinity here: the lane keeps its best and stops.
        done = at.done | (size <= target) | ~jnp.isfinite(size + rho) | (since >= patience)
        done = done | (at.count + 1 >= max_steps)
        best_x, mark = jnp.where(better[None], x, at.best_x), jnp.where(lower, best, at.mark)
        return Iterate(x, r, p, rho, best, best_x, mark, since, done, at.count + 1)

    def unfinished(at: Iterate) -> Array:
        return ~jnp.all(at.done)

    def turn(at: Iterate) -> Iterate:
        # (Lanes that are done keep their best, whatever becomes of the rest of them.)
        return lax.fori_loop(0, steps, lambda _, at: step(at), at, unroll=True) if steps > 1 else step(at)

    floor, steps = 4 * float(jnp.finfo(b.dtype).eps), steps_per_turn()
    scale = jnp.where(scale > 0, scale, 1)
    b = (b - mean(*sums(b))[None]) / scale[None]
    # From x = b on: the residual is then K b, which is the shadow as well.
    shadow = apply(b)
    shadow = shadow - mean(*sums(shadow))[None]
    whole, size = sums(b * b, shadow * shadow)
    target = reduction**2 * whole
    done = (size <= target) | ~jnp.isfinite(size)
    never, count = jnp.zeros(size.shape, jnp.int32), jnp.asarray(0, jnp.int32)
    start = Iterate(b, shadow, shadow, size, size, b, size, never, done, count)
    return scale[None] * loops.while_loop(unfinished, turn, start).best_x


def steps_per_turn() -> int:
    """Steps between two looks at whether all lanes are done, for the devices of this process.

    An accelerator's host waits for every look, longer than a step takes; a CPU has the answer at hand.
    """
    return 1 if jax.default_backend() == "cpu" else 4


def sums(*xs: Array) -> list[Array]:
    """Sums over states of arrays `[S, *B]`.

    A CPU adds up vectors of states, or of many lanes, by itself. For a few lanes it adds one number after the other,
    which takes up to twice as long as the whole step should, and an accelerator has work for as many threads as lanes.
    """
    lanes = xs[0].shape[1:]
    if lanes and not pytrees.more_than(FEW - 1, lanes):
        return sums_of_blocks(*xs)
    return lax.platform_dependent(*xs, cpu=lambda *xs: [jnp.sum(x, axis=0) for x in xs], default=sums_of_blocks)


def sums_of_blocks(*xs: Array) -> list[Array]:
    """Compute `sums` in one pass over all arrays, of a few states first and then of those sums.

    Over devices that share the states only the plain sum at the end adds up; they know no other.
    """

    def add(xs: tuple[Array, ...], axis: int) -> tuple[Array, ...]:
        zeros = tuple(jnp.zeros((), x.dtype) for x in xs)
        return lax.reduce(xs, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (axis,))

    whole = xs[0].shape[0] // _ROWS * _ROWS
    parts = [add(tuple(x[:whole].reshape(-1, _ROWS, *x.shape[1:]) for x in xs), 1)] if whole else []
    if whole < xs[0].shape[0]:
        parts.append(tuple(x[None] for x in add(tuple(x[whole:] for x in xs), 0)))
    return [functools.reduce(jnp.add, (jnp.sum(x, axis=0) for x in part)) for part in zip(*parts)]
