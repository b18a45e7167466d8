"""Linear systems of policies, `(I - K) x = b` and `(I - K^T) y = b` with `K = g P_pi`, in the kernels' layout.

Solvers of the Bellman equation need x roughly and often:

* `neumann`: the first terms of `b + K b + K^2 b + ...`; m of them make modified policy iteration.
* `krylov`: BiCGSTAB [van der Vorst 1992] for each lane by itself. If no episode ends, `K` maps constants to
  constants and the values only matter up to one, so that it runs on mean-free vectors: the slowest mode, of
  eigenvalue g, never takes part.
* `direct`: LU factors of the matrix written out. O(S^3) per lane.

Derivatives and occupancies need x or y once and well: `solve` and `occupy` repeat Krylov solves for what is left until
rounding ends progress. They are transposes of each other under differentiation, in either direction and to any order,
because `lax.custom_linear_solve` is told of both; nothing differentiates through an iteration.

Lanes are frozen, bit for bit, when they have reached their target; the loop ends with the last of them.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg import _tree, bellman

Operator = Callable[[Array], Array]
# Caps on the steps of one Krylov solve of `_refined`, and on the solves: two are typical.
_KRYLOV_STEPS, _ROUNDS = 1000, 8
# States of a block of `_sums_of_blocks`, and lanes from which on a CPU does without.
_ROWS, _FEW = 8, 16


def neumann(chain: bellman.Chain, b: Array, terms: int) -> Array:
    """The first `terms` terms of the Neumann series of `(I - K)^{-1} b`, `[S, *B]`."""
    return lax.fori_loop(1, terms, lambda _, x: b + chain.apply(x), b)


def direct(chain: bellman.Chain, b: Array, transpose: bool = False) -> Array:
    """`(I - K)^{-1} b`, or `(I - K^T)^{-1} b`, by LU, `[S, *B]`. A matrix that is not finite gives NaN in its lane."""
    matrix = chain.matrix()
    matrix = jnp.swapaxes(matrix, -1, -2) if transpose else matrix
    system = jnp.eye(b.shape[0], dtype=b.dtype)[None] - matrix.reshape(-1, *matrix.shape[-2:])
    right = jnp.moveaxis(b, 0, -1).reshape(-1, b.shape[0], 1)
    x = jnp.linalg.solve(system, right)[..., 0].reshape(*b.shape[1:], b.shape[0])
    return jnp.moveaxis(x, -1, 0)


def krylov(chain: bellman.Chain, b: Array, size: Array, reduction: Array, max_steps: int) -> Array:
    """`(I - K)^{-1} b`, up to a constant if no episode ends, to a residual of `reduction` times that of x = 0.

    Starts from `b` itself, so that it costs one product and equals value iteration where that suffices, and returns
    nothing whose residual is larger than that, as far as the recursion of the residual can tell.

    Args:
        chain: the operator.
        b: `[S, *B]`.
        size: `max |b|` or so, `[*B]`.
        reduction: `[*B]`, in the 2-norm.
        max_steps: cap on steps, of two products each.
    """

    # A cheap product is otherwise evaluated anew in each of the kernels that read it.
    return bicgstab(lambda x: lax.optimization_barrier(chain.apply(x)), b, size, reduction, max_steps, not chain.ends)


@_tree.options
class Method:
    """How `solve` and `occupy` go about it: by LU factors or by Krylov solves."""

    direct: bool = False


def solve(chain: bellman.Chain, b: Array, accuracy: Array, probe: Array | None, method: Method) -> Array:
    """`(I - K)^{-1} b`, `[S, *B]`, differentiable in the chain and in b; its transpose is an occupancy.

    Args:
        chain: the operator.
        b: `[S, *B]`.
        accuracy: residual of the system relative to b at which to stop, `[*B]`; 0: where rounding ends progress.
        probe: None, or a tangent `[*B]` of nothing at all. Backwards its cotangent is the error bound of `_backward`,
            a number that a backward pass has no other way to hand out.
        method: LU or Krylov.
    """

    def system(x: tuple[Array, ...]) -> tuple[Array, ...]:
        return x[0] - chain.apply(x[0], _tree.plain_sum), *x[1:]

    def forward(_: object, right: tuple[Array, ...]) -> tuple[Array, ...]:
        return _forward(chain, right[0], accuracy, method), *right[1:]

    def backward(_: object, right: tuple[Array, ...]) -> tuple[Array, ...]:
        return _backward(chain, right[0], accuracy, method)[: len(right)]

    # Transposition wants every right-hand side linear in what is differentiated, also if b alone is not.
    right = (b,) if probe is None else (b + 0 * probe[None], probe)
    return lax.custom_linear_solve(system, right, forward, backward)[0]


def occupy(chain: bellman.Chain, b: Array, accuracy: Array, method: Method) -> Array:
    """`(I - K^T)^{-1} b`, `[S, *B]`: discounted visits if b is where episodes start. Differentiable like `solve`."""
    return lax.custom_linear_solve(
        lambda y: y - chain.transpose(y),
        b,
        lambda _, right: _backward(chain, right, accuracy, method)[0],
        lambda _, right: _forward(chain, right, accuracy, method),
    )


def _forward(chain: bellman.Chain, b: Array, accuracy: Array, method: Method) -> Array:
    if method.direct:
        return direct(chain, b)
    # (I - K) 1 is the exit rate.
    return _refined(chain, chain.apply, b, accuracy, jnp.ones_like(b), chain.leave)[0]


def _backward(chain: bellman.Chain, b: Array, accuracy: Array, method: Method) -> tuple[Array, Array]:
    """The solution, and a bound on its relative error in the 1-norm, `[*B]`: the residual over the least exit rate."""
    if method.direct:
        y = direct(chain, b, transpose=True)
        r = b - (y - chain.transpose(y))
    else:
        start = jnp.full_like(b, 1 / b.shape[0])
        y, r = _refined(chain, chain.transpose, b, accuracy, start, start - chain.transpose(start))
    size = jnp.sum(jnp.abs(y), axis=0)
    error = jnp.sum(jnp.abs(r), axis=0) / jnp.min(chain.leave, axis=0)
    return y, jnp.where(size > 0, error / jnp.where(size > 0, size, 1), error)


def _refined(
    chain: bellman.Chain, apply: Operator, b: Array, accuracy: Array, mode: Array, image: Array
) -> tuple[Array, Array]:
    """Solution and residual of `x - apply(x) = b`, by Krylov solves for what is left until rounding ends progress.

    Every residual is first freed of its sum by a multiple of `mode`, whose image under `I - apply` is `image`. If no
    episode ends, this removes the slowest mode of both systems exactly: constants are what `I - K` nearly loses, and
    mass is what `I - K^T` nearly conserves; what remains sums to zero and stays so.
    """

    def balance(x: Array, r: Array) -> tuple[Array, Array]:
        share = (jnp.sum(r, axis=0) / jnp.sum(image, axis=0))[None]
        return x + share * mode, r - share * image

    def size(r: Array) -> Array:
        return jnp.sum(jnp.abs(r), axis=0)

    def improve(state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, r, active, count = state
        reduction = jnp.maximum(0.5 * goal / size(r), floor)  # of the 2-norm, by a recursion that drifts
        reduction = jnp.where(active, reduction, 1)
        step = bicgstab(apply, r, size(r), reduction, _KRYLOV_STEPS, not chain.ends)
        new, new_r = x + step, b - ((x + step) - apply(x + step))
        new, new_r = balance(new, new_r)
        better = active & (size(new_r) < size(r))
        x, r = jnp.where(better[None], new, x), jnp.where(better[None], new_r, r)
        return x, r, better & (size(new_r) > goal) & (count < _ROUNDS - 1), count + 1

    floor = 4 * float(jnp.finfo(b.dtype).eps)
    goal = accuracy * size(b)
    x, r = balance(jnp.zeros_like(b), b)
    start = (x, r, size(r) > goal, jnp.asarray(0, jnp.int32))
    x, r, *_ = lax.while_loop(lambda state: jnp.any(state[2]), improve, start)
    return x, r


def bicgstab(apply: Operator, b: Array, scale: Array, reduction: Array, max_steps: int, centred: bool = False) -> Array:
    """Solve `(I - K) x = b` for each lane, where `apply(x) = K x`.

    Args:
        apply: the operator K on `[S, *B]`, each lane by itself.
        b: `[S, *B]`.
        scale: a norm of b, `[*B]`: squares of the residual must neither overflow nor vanish, whatever the unit of b.
        reduction: `[*B]`, the 2-norm of the residual to reach, relative to that of b.
        max_steps: cap on steps, of two products each.
        centred: whether to solve `C (I - K) x = C b` with `C x = x - mean x` instead, by vectors of mean 0 throughout.

    Returns:
        the best iterate met, `[S, *B]`; the first is `b`, centred.
    """

    def mean(total: Array) -> Array:
        return total / b.shape[0] if centred else jnp.zeros_like(total)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, r, p, rho, best, best_x, done, count = state
        # Vectors of mean 0 do not see what centring takes off a product u, so that all inner products with it are one
        # pass over it, together with its mean.
        u = p - apply(p)
        hu, total = _sums(shadow * u, u)
        a, v = rho / hu, u - mean(total)[None]
        s = r - a[None] * v
        u = s - apply(s)
        us, uu, ss, hu, hs, total = _sums(u * s, u * u, s * s, shadow * u, shadow * s, u)
        t, tt = u - mean(total)[None], uu - mean(total) * total
        # An exact half step leaves s = 0 and t = 0: nothing more is to be taken off.
        w = jnp.where(tt > 0, us / jnp.where(tt > 0, tt, 1), 0)
        x = x + a[None] * p + w[None] * s
        r = s - w[None] * t
        # <shadow, r> and |r|^2, the latter from <r, t> = 0.
        new_rho, size = hs - w * hu, jnp.maximum(ss - w * us, floor * ss)
        p = r + (new_rho / rho * a / w)[None] * (p - w[None] * v)
        better = ~done & (size < best)
        best_x = jnp.where(better[None], x, best_x)
        best = jnp.where(better, size, best)
        # Breakdowns (a vanishing inner product) show as NaN or infinity here: the lane keeps its best and stops.
        done = done | (size <= target) | ~jnp.isfinite(size + new_rho)
        return x, r, p, new_rho, best, best_x, done, count + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        return ~jnp.all(state[6]) & (state[7] < max_steps)

    floor = 4 * float(jnp.finfo(b.dtype).eps)
    scale = jnp.where(scale > 0, scale, 1)
    b = (b - mean(*_sums(b))[None]) / scale[None]
    shadow = apply(b)
    shadow = shadow - mean(*_sums(shadow))[None]
    whole, size = _sums(b * b, shadow * shadow)
    target = reduction**2 * whole
    done = (size <= target) | ~jnp.isfinite(size)
    start = (b, shadow, shadow, size, size, b, done, jnp.asarray(0, jnp.int32))
    return scale[None] * lax.while_loop(unfinished, step, start)[5]


def _sums(*xs: Array) -> list[Array]:
    """Sums over states of arrays `[S, *B]`.

    A CPU adds up vectors of states, or of many lanes, by itself. For a few lanes it adds one number after the other,
    which takes up to twice as long as the whole step should, and an accelerator has work for as many threads as lanes.
    """
    lanes = xs[0].shape[1:]
    if lanes and int(np.prod(lanes)) < _FEW:
        return _sums_of_blocks(*xs)
    return lax.platform_dependent(*xs, cpu=lambda *xs: [jnp.sum(x, axis=0) for x in xs], default=_sums_of_blocks)


def _sums_of_blocks(*xs: Array) -> list[Array]:
    """`_sums` in one pass over all arrays, of a few states first and then of those sums.

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
