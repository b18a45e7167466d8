"""Checks of transitions that are a function: by what it returns for a few values, on the host."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from robustreg._core import checks
from robustreg.problems.matrix_free import MatrixFree
from robustreg.regularisers import masks


def checked(kernel: MatrixFree, termination: Any, normalise: bool, dtype: Any, available: Any) -> MatrixFree:
    """Check a kernel that is a function: its row sums are `expect(1)`.

    Args:
        kernel: the functions and their sizes.
        termination: `[*B, S, A]` or None.
        normalise: whether rows were to be rescaled, which a function cannot be.
        dtype: working precision.
        available: mask `[*B, S, A]` or None.

    Raises:
        ValueError: rows that do not sum to `1 - termination`, a function that is not linear, a wrong transpose.
    """
    if normalise:
        raise ValueError("normalise=True needs transitions as an array; divide by expect(ones) in your function")
    if kernel.n_states < 1 or kernel.n_actions < 1:
        raise ValueError(f"{kernel!r} has no states or no actions; pass the sizes that expect works on")
    sums = kernel.expect(jnp.ones((kernel.n_states,), dtype))
    if checks.is_traced(sums, termination, available):
        return kernel
    ends, margin, sums = termination is not None, checks.tolerance(sums), np.asarray(sums, np.float64)
    rule = "expect must return finite values"
    checks.refuse("transitions.expect(ones)", sums, ~np.isfinite(sums), ("s", "a"), rule)
    rows = masks.fill(sums, available, [[1.0]])
    checks.check_rows(rows, 1.0 - termination if ends else 1.0, ends, margin, False)
    _check_linear(kernel, dtype)
    if kernel.transpose is not None:
        _check_transpose(kernel, dtype)
    return kernel


def _check_linear(kernel: MatrixFree, dtype: Any) -> None:
    """`expect(2u - v) = 2 expect(u) - expect(v)` for one random pair shows a function that is not linear."""
    u, v = np.random.default_rng(1).random((2, kernel.n_states))
    both, first, second = (np.asarray(kernel.expect(jnp.asarray(x, dtype)), np.float64) for x in (2 * u - v, u, v))
    wrong = np.abs(both - (2 * first - second)) > 100 * float(jnp.finfo(dtype).eps) * kernel.n_states**0.5
    checks.refuse("transitions.expect(2u - v)", both, wrong, ("s", "a"), "expect must be linear in v")


def _check_transpose(kernel: MatrixFree, dtype: Any) -> None:
    """`<mu, expect(v)> = <push(mu), v>` for one random pair shows a wrong push."""
    rng = np.random.default_rng(0)
    v, mu = rng.random(kernel.n_states), rng.random((kernel.n_states, kernel.n_actions))
    forward = np.vdot(mu, np.asarray(kernel.expect(jnp.asarray(v, dtype))))
    backward = np.vdot(np.asarray(kernel.push(jnp.asarray(mu, dtype))), v)
    if not abs(forward - backward) <= 100 * float(jnp.finfo(dtype).eps) * mu.size:
        raise ValueError(
            "transitions.push is not the transpose of expect: "
            f"<mu, expect(v)> = {checks.show(forward, backward)} but "
            f"<push(mu), v> = {checks.show(backward, forward)}; pass push=None to have it derived"
        )
