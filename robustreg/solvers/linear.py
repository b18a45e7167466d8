"""Linear systems of policies, `(I - K) x = b` and `(I - K^T) y = b` with `K = g P_pi`, in the kernels' layout.

Solvers of the Bellman equation need x roughly and often:

* `neumann`: the first terms of `b + K b + K^2 b + ...`; m of them make modified policy iteration.
* `inexact`: BiCGSTAB (see `krylov`) for each lane by itself. If no episode ends, `K` maps constants to constants and
  the values only matter up to one, so that it runs on mean-free vectors: the slowest mode, of eigenvalue g, never takes
  part.
* `direct`: LU factors of the matrix written out. O(S^3) per lane.

Derivatives and occupancies need x or y once and well: `solve` and `occupy` repeat Krylov solves for what is left until
rounding ends progress. They are transposes of each other under differentiation, in either direction and to any order,
because `lax.custom_linear_solve` is told of both; nothing differentiates through an iteration.

Lanes are frozen, bit for bit, when they have reached their target; the loop ends with the last of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import loops, pytrees
from robustreg.solvers import bellman, elimination, krylov

Operator = Callable[[Array], Array]
# Caps on the steps of one Krylov solve of `_refined`, and on the solves: two are typical.
KRYLOV_STEPS, _ROUNDS = 1000, 8
# A lane that Krylov solves fail on is eliminated if it is small enough, else swept, at most so often: enough for a
# discount of .9999 in float64.
_SWEEPS = 400_000


def idle_steps(n_states: int) -> int:
    """Krylov steps without progress after which elimination, where it stands by, is the better way to go on."""
    return elimination.idle_steps(n_states, KRYLOV_STEPS)


def neumann(chain: bellman.Chain, b: Array, terms: int) -> Array:
    """Sum the first `terms` terms of the Neumann series of `(I - K)^{-1} b`, `[S, *B]`."""
    return loops.fori_loop(1, terms, lambda _, x: b + chain.apply(x), b, chain)


def direct(chain: bellman.Chain, b: Array, transpose: bool = False) -> Array:
    """Solve `(I - K) x = b`, or `(I - K^T) x = b`, by LU, `[S, *B]`. A matrix not finite gives NaN in its lane."""
    matrix = chain.matrix()
    matrix = jnp.swapaxes(matrix, -1, -2) if transpose else matrix
    system = jnp.eye(b.shape[0], dtype=b.dtype)[None] - matrix.reshape(-1, *matrix.shape[-2:])
    right = jnp.moveaxis(b, 0, -1).reshape(-1, b.shape[0], 1)
    x = jnp.linalg.solve(system, right)[..., 0].reshape(*b.shape[1:], b.shape[0])
    return jnp.moveaxis(x, -1, 0)


def inexact(chain: bellman.Chain, b: Array, size: Array, reduction: Array, max_steps: int, patience: int) -> Array:
    """Solve `(I - K) x = b`, up to a constant if no episode ends, to `reduction` times the residual of x = 0.

    Starts from `b` itself, so that it costs one product and equals value iteration where that suffices, and returns
    nothing whose residual is larger than that, as far as the recursion of the residual can tell.

    Args:
        chain: the operator.
        b: `[S, *B]`.
        size: `max |b|` or so, `[*B]`.
        reduction: `[*B]`, in the 2-norm.
        max_steps: cap on steps, of two products each.
        patience: cap on steps without progress.
    """

    def apply(x: Array) -> Array:
        # A cheap product is otherwise evaluated anew in each of the kernels that read it.
        return lax.optimization_barrier(chain.apply(x))

    return krylov.bicgstab(apply, b, size, reduction, max_steps, patience, not chain.ends)


@pytrees.options
class Method:
    """How `solve` and `occupy` go about it: by LU factors or by Krylov solves."""

    direct: bool = False


def solve(
    chain: bellman.Chain,
    b: Array,
    accuracy: Array,
    probe: Array | None,
    method: Method,
    inexact: Array | float = 0.0,
    visits: Array | None = None,
) -> Array:
    """Solve `(I - K) x = b`, differentiably in the chain and in b; the transpose is an occupancy.

    Args:
        chain: the operator.
        b: `[S, *B]`.
        accuracy: residual of the system relative to b at which to stop, `[*B]`; 0: where rounding ends progress.
        probe: None, or the tangent `[*B]` of an argument that the solution does not depend on. A backward pass can hand
            out numbers as cotangents only: that of the probe is a bound on the relative error of the occupancy.
        method: LU or Krylov.
        inexact: bound on the relative error that the chain itself brings into an occupancy, `[*B]`, for that number.
        visits: None, or an occupancy, `[S, *B]`, multiples of which the transposed system may have for a solution.

    Returns:
        `[S, *B]`; NaN in lanes of which the residual proves no error below `trusted`, or the accuracy asked for.
    """

    chain, b, accuracy, inexact, visits = loops.alike((chain, b, accuracy, inexact, visits), probe)

    def system(x: tuple[Array, ...]) -> tuple[Array, ...]:
        return x[0] - chain.apply(x[0], pytrees.plain_sum), *x[1:]

    def forward(_: object, right: tuple[Array, ...]) -> tuple[Array, ...]:
        return _or_nan(_forward(chain, right[0], accuracy, method)), *right[1:]

    def backward(_: object, right: tuple[Array, ...]) -> tuple[Array, ...]:
        _, error, solved = found = _backward(chain, right[0], accuracy, method, visits)
        return (_or_nan(found), jnp.where(solved, error + inexact, jnp.inf))[: len(right)]

    # Transposition wants every right-hand side linear in what is differentiated, also if b alone is not.
    right = (b,) if probe is None else (b + _nothing_of(probe)[None], probe)
    return lax.custom_linear_solve(system, right, forward, backward)[0]


def _nothing_of(x: Array) -> Array:
    """Zeros that depend linearly on x, and whose cotangents, NaN or not, are zeros again."""
    return lax.custom_linear_solve(
        lambda x: x, x, lambda _, x: jnp.zeros_like(x), transpose_solve=lambda _, ct: jnp.zeros_like(ct)
    )


def longest(chain: bellman.Chain) -> Array:
    """Bound the steps until a chain has ended, `[*B]`, by the largest entry of some `w >= 1 + K w`, `w >= 0`.

    Infinite where no such w was found: where the chain need not end, or is not one for Krylov solves.
    """
    ones = jnp.ones_like(chain.exit_rate)
    accuracy = jnp.full(ones.shape[1:], 1e-2, ones.dtype)
    w = _refined(chain, chain.apply, ones, accuracy, ones, chain.exit_rate, jnp.sum(chain.exit_rate, axis=0)).x
    size = jnp.max(jnp.abs(w), axis=0)
    # `w - K w` is known to some units of w; where it is at least 1 - x, `w/(1 - x)` will do.
    x = jnp.max(1 - (w - chain.apply(w)), axis=0) + 64 * float(jnp.finfo(w.dtype).eps) * size
    found = (x <= 0.5) & (jnp.min(w, axis=0) >= 0)
    return jnp.where(found, size / jnp.where(found, 1 - x, 1), jnp.inf)


def occupy(chain: bellman.Chain, b: Array, accuracy: Array, method: Method, visits: Array | None = None) -> Array:
    """Solve `(I - K^T) y = b`: discounted visits if b is where episodes start.

    Arguments and result are those of `solve`, and so are derivatives.
    """
    chain, b, accuracy, visits = loops.alike((chain, b, accuracy, visits))
    return lax.custom_linear_solve(
        lambda y: y - chain.transpose(y),
        b,
        lambda _, right: _or_nan(_backward(chain, right, accuracy, method, visits)),
        lambda _, right: _or_nan(_forward(chain, right, accuracy, method)),
    )


# Solution, bound on its relative error, and whether that is small enough to hand the solution out.
Solved = tuple[Array, Array, Array]


def _or_nan(found: Solved) -> Array:
    """Hand a solution out, NaN in the lanes that are not solved."""
    x, _, solved = found
    return jnp.where(solved[None], x, jnp.nan)


def _forward(chain: bellman.Chain, b: Array, accuracy: Array, method: Method) -> Solved:
    if method.direct:
        found = _with_residual(chain.apply, b, direct(chain, b))
    else:
        # (I - K) 1 is the exit rate.
        ones, mass = jnp.ones_like(b), jnp.sum(chain.exit_rate, axis=0)
        found = _refined(chain, chain.apply, b, accuracy, ones, chain.exit_rate, mass)
    return _checked(chain, chain.apply, b, found, accuracy, False)


def _backward(chain: bellman.Chain, b: Array, accuracy: Array, method: Method, visits: Array | None = None) -> Solved:
    if method.direct:
        found = _with_residual(chain.transpose, b, direct(chain, b, transpose=True))
    else:
        start = jnp.full_like(b, 1 / b.shape[0])
        # The mass of (I - K^T) y is <exit rate, y>, which is known better than the difference: 1 - g has been rounded.
        mass = jnp.mean(chain.exit_rate, axis=0)
        image = start - chain.transpose(start)
        found = _refined(chain, chain.transpose, b, accuracy, start, image, mass, True, visits)
    return _checked(chain, chain.transpose, b, found, accuracy, True)


def _norm(x: Array, transpose: bool) -> Array:
    """Norm in which `(I - K)^{-1}`, or its transpose, is at most `chain.horizon`: largest entry, or sum, `[*B]`."""
    return jnp.sum(jnp.abs(x), axis=0) if transpose else jnp.max(jnp.abs(x), axis=0)


def trusted(dtype: np.dtype) -> float:
    """Relative error that a solution may have."""
    return 5e-9 if dtype.itemsize > 4 else 2e-3


class _Improved(NamedTuple):
    """A solution and what it leaves of the right-hand side, `[S, *B]` each."""

    x: Array
    r: Array


def _with_residual(apply: Operator, b: Array, x: Array) -> _Improved:
    """Compute what x leaves of the right-hand side."""
    return _Improved(x, b - (x - apply(x)))


def _checked(
    chain: bellman.Chain, apply: Operator, b: Array, found: _Improved, accuracy: Array, transpose: bool
) -> Solved:
    """Read off the residual what a solution is worth, and solve the lanes that it does not prove in another way.

    BiCGSTAB breaks down on chains that are nearly deterministic, and may stagnate on others. Whatever x is, nothing is
    believed of it but what its residual says.
    """
    enough, nothing = trusted(b.dtype), _norm(b, transpose) == 0
    x = jnp.where(nothing[None], 0, found.x)  # also where the chain is NaN: no error where nothing was asked
    error, left = _proved(chain, x, found.r, transpose)
    reached = (accuracy > 0) & (left <= 1.01 * accuracy * _norm(b, transpose))
    solved = (error <= enough) | reached | nothing
    again = _eliminated if b.shape[0] <= elimination.STATES else _swept
    x, error, solved = again(chain, apply, b, x, error, solved, transpose)
    return x, jnp.where(nothing, 0, error), solved


def _proved(chain: bellman.Chain, x: Array, r: Array, transpose: bool) -> tuple[Array, Array]:
    """Bound on the relative error of x by its residual r, and the norm of that, `[*B]`.

    `|x - x*| <= horizon |r|` in the norm of `_norm`, with two roundings of x on top, of the discount and of the
    product: a residual of 0 proves no more than they leave. (What was added to x since the product was formed errs by a
    rounding of x itself, which no horizon enlarges.)
    """
    size, left = _norm(x, transpose), _norm(r, transpose)
    unit = float(jnp.finfo(x.dtype).eps)
    return unit + chain.horizon * (unit + left / jnp.where(size > 0, size, 1)), left


def eliminate(chain: bellman.Chain, b: Array, x: Array, solved: Array) -> tuple[Array, Array]:
    """Solve `(I - K) x = b` by elimination in the lanes that are not `solved` yet, if the chain is small enough.

    Returns:
        x, `[S, *B]`, and which lanes are solved now, `[*B]`.
    """
    b = jnp.broadcast_to(b, x.shape)
    if b.shape[0] > elimination.STATES:
        return x, solved
    x, _, solved = _eliminated(chain, chain.apply, b, x, jnp.zeros_like(b[0]), solved, False)
    return x, solved


def _eliminated(
    chain: bellman.Chain, apply: Operator, b: Array, x: Array, error: Array, solved: Array, transpose: bool
) -> Solved:
    """Solve the lanes that are not `solved` by elimination, one after the other; the others cost and feel nothing."""
    n, unit, enough = b.shape[0], float(jnp.finfo(b.dtype).eps), trusted(b.dtype)
    right = b.reshape(n, -1)

    def one(state: Solved, lane: Array, alone: bellman.Chain) -> Solved:
        x, error, solved = state
        both = jnp.stack([right[:, lane], jnp.abs(right[:, lane])], axis=1)
        found, whole = elimination.solve(alone.matrix()[0], alone.exit_rate[:, 0], both, transpose).T[..., None]
        product = alone.transpose(found) if transpose else alone.apply(found)
        left, size = (_norm(v, transpose)[0] for v in (right[:, lane, None] - (found - product), found))
        # Elimination errs by a few S units in every entry. What the residual says of it (a bound larger by the horizon)
        # is that it is no accident: rounding of the product, and no more.
        proved = left <= 8 * (4 + n**0.5) * unit * (size + _norm(right[:, lane, None], transpose)[0])
        # It errs by units of the solution for |b|. Where that is so much larger that more may be lost than a solution
        # may lose, x is kept if the two agree, having come about in different ways; else there is no solution.
        digits = 2 * unit * _norm(whole, transpose)[0] <= enough * size
        old = x[:, lane, None]
        agree = _norm(found - old, transpose)[0] <= enough * size
        found, proved = jnp.where(digits, found, old), proved & (digits | agree)
        return x.at[:, lane].set(found[:, 0]), error.at[lane].set(4 * n * unit), solved.at[lane].set(proved)

    # What was asked for is lost itself where it is NaN.
    todo = ~solved & jnp.isfinite(_norm(b, transpose))
    state = x.reshape(right.shape), error.reshape(-1), solved.reshape(-1)
    found = elimination.lane_by_lane(one, state, chain, todo, right)
    return found[0].reshape(x.shape), found[1].reshape(error.shape), found[2].reshape(solved.shape)


def _swept(
    chain: bellman.Chain, apply: Operator, b: Array, x: Array, error: Array, solved: Array, transpose: bool
) -> Solved:
    """Add `r + K r + K^2 r + ...` for the residual r of x in the lanes that are not `solved`, if that can help.

    Each term is smaller than the last by a share of `1/horizon`. Lanes that would take too many, and those whose
    rounding alone is too much, are given up at once. (Sweeps `x <- b + apply(x)` would stop at rounding times the
    square of the horizon: what they move by is lost beside x long before they are done.)
    """
    enough, unit = trusted(b.dtype), 0.5 * float(jnp.finfo(b.dtype).eps)
    start = jnp.where(jnp.all(jnp.isfinite(x), axis=0)[None], x, b)
    needed = chain.horizon * jnp.log(8 * chain.horizon / enough)
    worth = ~solved & (needed <= _SWEEPS) & (4 * unit * chain.horizon <= enough)

    def add(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, term, count = state
        return total + term, apply(term), count + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, term, count = state
        small = _norm(term, transpose) * chain.horizon <= 0.1 * enough * _norm(start, transpose)
        return jnp.any(worth & ~small) & (count < _SWEEPS)

    r = jnp.where(worth[None], _with_residual(apply, b, start).r, 0)
    count = jnp.asarray(0, jnp.int32)
    total, *_ = loops.while_loop(unfinished, add, (jnp.zeros_like(b), r, count), chain)
    new = jnp.where(worth[None], start + total, x)

    def proved() -> Array:
        return _proved(chain, *_with_residual(apply, b, new), transpose)[0]

    now = loops.cond(jnp.any(worth), proved, lambda: error, (chain, b))
    return new, jnp.where(worth, now, error), solved | (worth & (now <= enough))


class _Parts(NamedTuple):
    """A solution `y + share mode`, `[S, *B]` and `[*B]`, and what it leaves of the right-hand side, `[S, *B]`."""

    y: Array
    share: Array
    r: Array


def _refined(
    chain: bellman.Chain,
    apply: Operator,
    b: Array,
    accuracy: Array,
    mode: Array,
    image: Array,
    mass: Array,
    transpose: bool = False,
    guess: Array | None = None,
) -> _Improved:
    """Solve `x - apply(x) = b` by Krylov solves for what is left until rounding ends progress.

    Every residual is freed of its sum by a multiple of `mode`, whose image under `I - apply` is `image`, of sum `mass`.
    If no episode ends, this removes the slowest mode of both systems exactly: constants are what `I - K` nearly loses,
    and mass is what `I - K^T` nearly conserves; what remains sums to zero and stays so.

    The multiple is a number of its own until the end: a product with a vector that holds it would round by units of it,
    which the horizon enlarges (1% of x in float32 at .9999), and which no residual formed likewise would show.
    """

    def freed(y: Array, share: Array, r: Array) -> _Parts:
        """Take the sum off the residual r of `y + share mode`."""
        more = jnp.sum(r, axis=0) / mass
        return _Parts(y, share + more, r - more[None] * image)

    def size(r: Array) -> Array:
        # What will be believed of the solution is read off in this norm.
        return _norm(r, transpose)

    def improve(state: _Parts, done: Array) -> tuple[_Parts, Array]:
        r, active = state.r, ~done
        # Of the 2-norm, by a recursion that drifts: a quarter, for another round costs more than the steps in between.
        # Where guesses come from earlier systems, what those were left with comes back several times as large: more
        # accuracy than is asked for saves the next solve its steps.
        aim = 0.25 if guess is None else 0.05
        reduction = jnp.maximum(aim * goal / size(r), floor)
        reduction = jnp.where(active, reduction, 1)
        step = krylov.bicgstab(apply, r, size(r), reduction, KRYLOV_STEPS, idle_steps(b.shape[0]), not chain.ends)
        y = state.y + step
        new = freed(y, state.share, _with_residual(apply, b, y).r - state.share[None] * image)
        better = active & (size(new.r) < size(r))
        # What did not halve what was left has met rounding, or a chain that is not its kind.
        again = better & (size(new.r) < 0.5 * size(r)) & (size(new.r) > goal)
        y, r = jnp.where(better[None], new.y, state.y), jnp.where(better[None], new.r, r)
        return _Parts(y, jnp.where(better, new.share, state.share), r), ~again

    floor = 4 * float(jnp.finfo(b.dtype).eps)
    goal = accuracy * size(b)
    y, r = jnp.zeros_like(b), b
    if guess is not None:
        # Begin at the multiple of the guess that leaves least.
        image_of = guess - apply(guess)
        share = jnp.sum(b * image_of, axis=0) / jnp.sum(image_of * image_of, axis=0)
        share = jnp.where(jnp.isfinite(share), share, 0)[None]
        near = b - share * image_of
        closer = (size(near) < size(b))[None]
        y, r = jnp.where(closer, share * guess, 0), jnp.where(closer, near, b)
    start = freed(y, jnp.zeros_like(mass), r)
    end = loops.until_done(improve, start, ~(size(start.r) > goal), _ROUNDS, (chain, mode, image, mass))
    return _Improved(end.y + end.share[None] * mode, end.r)
