"""Linear systems of policies, `(I - K) x = b` with `K = g P_pi`, in the kernels' layout.

Three ways to approach `x = (I - K)^{-1} b`:

* `neumann`: the first terms of `b + K b + K^2 b + ...`; m of them make modified policy iteration.
* `krylov`: BiCGSTAB [van der Vorst 1992] for each lane by itself. If no episode ends, `K` maps constants to
  constants and the values only matter up to one, so that it runs on mean-free vectors: the slowest mode, of
  eigenvalue g, never takes part.
* `direct`: LU factors of the matrix written out. O(S^3) per lane.

Lanes are frozen, bit for bit, when they have reached their target; the loop ends with the last of them.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from robustreg import bellman

Operator = Callable[[Array], Array]


def neumann(chain: bellman.Chain, b: Array, terms: int) -> Array:
    """The first `terms` terms of the Neumann series of `(I - K)^{-1} b`, `[S, *B]`."""
    return lax.fori_loop(1, terms, lambda _, x: b + chain.apply(x), b)


def direct(chain: bellman.Chain, b: Array) -> Array:
    """`(I - K)^{-1} b` by LU, `[S, *B]`. A matrix with entries that are not finite gives NaN in its lane alone."""
    matrix = chain.matrix()
    system = jnp.eye(b.shape[0], dtype=b.dtype)[None] - matrix.reshape(-1, *matrix.shape[-2:])
    right = jnp.moveaxis(b, 0, -1).reshape(-1, b.shape[0], 1)
    x = jnp.linalg.solve(system, right)[..., 0].reshape(*b.shape[1:], b.shape[0])
    return jnp.moveaxis(x, -1, 0)


def krylov(chain: bellman.Chain, b: Array, reduction: Array, max_steps: int) -> Array:
    """`(I - K)^{-1} b`, up to a constant if no episode ends, to a residual of `reduction` times that of x = 0.

    Starts from `b` itself, so that it costs one product and equals value iteration where that suffices, and never
    returns anything with a larger residual than that.

    Args:
        chain: the operator.
        b: `[S, *B]`.
        reduction: `[*B]`, in the 2-norm.
        max_steps: cap on steps, of two products each.
    """

    def centre(x: Array) -> Array:
        return x if chain.ends else x - jnp.mean(x, axis=0, keepdims=True)

    return bicgstab(lambda x: centre(chain.apply(x)), centre(b), reduction, max_steps)


def bicgstab(apply: Operator, b: Array, reduction: Array, max_steps: int) -> Array:
    """Solve `(I - K) x = b` for each lane, where `apply(x) = K x`.

    Args:
        apply: the operator K on `[S, *B]`, each lane by itself.
        b: `[S, *B]`.
        reduction: `[*B]`, the 2-norm of the residual to reach, relative to that of b.
        max_steps: cap on steps, of two products each.

    Returns:
        the best iterate met, `[S, *B]`; the first is `b`.
    """

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, r, p, rho, best, best_x, done, count = state
        v = p - apply(p)
        a = rho / _dot(shadow, v)
        s = r - a[None] * v
        t = s - apply(s)
        ts, tt = _dots((t, s), (t, t))
        w = ts / tt
        x = x + a[None] * p + w[None] * s
        r = s - w[None] * t
        new_rho, size = _dots((shadow, r), (r, r))
        p = r + (new_rho / rho * a / w)[None] * (p - w[None] * v)
        better = ~done & (size < best)
        best_x = jnp.where(better[None], x, best_x)
        best = jnp.where(better, size, best)
        # Breakdowns (a vanishing inner product) show as NaN or infinity here: the lane keeps its best and stops.
        done = done | (size <= target) | ~jnp.isfinite(size + new_rho)
        return x, r, p, new_rho, best, best_x, done, count + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        return ~jnp.all(state[6]) & (state[7] < max_steps)

    # Squares of the norm must neither overflow nor vanish, whatever the unit of the rewards.
    scale = jnp.max(jnp.abs(b), axis=0)
    scale = jnp.where(scale > 0, scale, 1)
    b = b / scale[None]
    target = reduction**2 * _dot(b, b)
    shadow = apply(b)
    size = _dot(shadow, shadow)
    done = (size <= target) | ~jnp.isfinite(size)
    start = (b, shadow, shadow, size, size, b, done, jnp.asarray(0, jnp.int32))
    return scale[None] * lax.while_loop(unfinished, step, start)[5]


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=0)


def _dots(*pairs: tuple[Array, Array]) -> tuple[Array, ...]:
    """Inner products by one reduction: the compiler makes three kernels of every separate one."""
    return tuple(jnp.sum(jnp.stack([a * b for a, b in pairs]), axis=1))
