"""What `mdp` makes of its arguments: transitions, termination, initial distribution and discount, each checked.

Every function takes what a person gave, or a tracer, whose values are not looked at, and refuses what cannot be by
naming the first offending entry and the remedy. Arithmetic is in double precision on the host; `cast` comes last.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import checks, containers
from robustreg.problems import function_checks
from robustreg.problems.dense import Dense
from robustreg.problems.matrix_free import MatrixFree
from robustreg.problems.successors import Successors
from robustreg.problems.transitions import Transitions
from robustreg.regularisers import masks


def cast(x: Any, dtype: np.dtype) -> Array:
    """One array with an explicit dtype: a weakly typed leaf would retrace."""
    return lax.convert_element_type(x, dtype) if checks.is_traced(x) else jnp.asarray(x.astype(dtype))


def cast_kernel(kernel: Any, dtype: np.dtype) -> Transitions:
    """Cast the probabilities of a kernel to a dtype; a function has none."""
    if isinstance(kernel, Dense):
        return Dense(cast(kernel.probabilities, dtype))
    if isinstance(kernel, Successors):
        return Successors(cast(kernel.indices, np.dtype(np.int32)), cast(kernel.probabilities, dtype))
    return kernel


def at_hand(kernel: Any) -> Any:
    """Return a kernel with its probabilities in NumPy, where they are concrete."""
    p = getattr(kernel, "probabilities", None)
    if p is None or checks.is_traced(p):
        return kernel
    return dataclasses.replace(kernel, probabilities=np.asarray(p, np.float64))


# ---- transitions


def kernel_of(came: containers.Kernel, layout: str | None, available: Any) -> tuple[Any, tuple[float, str], Any]:
    """Return a kernel whose arrays are float64 or tracers, entries checked, the tolerance on its rows, and the mask.

    (A mask without a single False is None.)
    """
    kernel, data = _read(came, layout)
    if available is not None:
        available = masks.checked(available, (kernel.n_states, kernel.n_actions))
        available = None if not checks.is_traced(available) and available.all() else available
    return _checked(kernel, available), checks.tolerance(data), available


def _read(came: containers.Kernel, layout: str | None) -> tuple[Any, Any]:
    """A kernel whose arrays are float64 or tracers, of the right shapes, and the data that it was made of."""
    transitions = came.data
    if layout not in (None, "sas", "ass"):
        raise ValueError(f'layout must be "sas" ([S, A, S]) or "ass" ([A, S, S]), got {layout!r}')
    if isinstance(transitions, Dense):
        return _dense(transitions.probabilities, "sas"), transitions.probabilities
    if isinstance(transitions, Successors):
        return _successors(transitions), transitions.probabilities
    if isinstance(transitions, MatrixFree):
        return transitions, None
    if hasattr(transitions, "tocoo"):
        raise ValueError("transitions is one sparse matrix; pass a list with one [S, S] matrix per action")
    if isinstance(transitions, (list, tuple)) and any(hasattr(p, "tocoo") for p in transitions):
        packed: Any = checks.pack_sparse(transitions)
        return _successors(Successors(*packed)), transitions
    return _dense(transitions, "ass" if came.per_action else layout), transitions


def _dense(p: Any, layout: str | None) -> Dense:
    p = checks.number("transitions", p)
    layout = checks.layout_of(p, layout)
    return Dense(p.swapaxes(-3, -2) if layout == "ass" else p)


def _successors(kernel: Successors) -> Successors:
    indices: Any = kernel.indices if checks.is_traced(kernel.indices) else np.asarray(kernel.indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"transitions.indices has dtype {indices.dtype}; successors are state numbers: use int32")
    if indices.ndim != 3 or 0 in indices.shape:
        raise ValueError(f"transitions.indices has shape {indices.shape}; expected [S, A, K], shared by all lanes")
    p = checks.number("transitions.probabilities", kernel.probabilities)
    checks.expect_shape("transitions.probabilities", p.shape, indices.shape, "S, A, K", "one per entry of indices")
    return Successors(indices, p)


def _checked(kernel: Any, available: Any) -> Any:
    """A kernel without impossible entries; where there is no action, the state stays."""
    if isinstance(kernel, Dense):
        p = masks.fill(kernel.probabilities, available, np.eye(kernel.n_states)[:, None], 3)
        checks.refuse_improper("transitions", p, ("s", "a", "s'"))
        return Dense(p)
    if not isinstance(kernel, Successors):
        return kernel
    n = kernel.n_states
    indices: Any = masks.fill(kernel.indices, available, np.arange(n)[:, None, None], 3)
    if not checks.is_traced(indices):
        rule = f"successors are 0..{n - 1}; pad a row with index 0 and probability 0"
        outside = (indices < 0) | (indices >= n)
        checks.refuse("transitions.indices", indices, outside, ("s", "a", "k"), rule)
    first = np.eye(1, indices.shape[-1])[None]
    p = masks.fill(kernel.probabilities, available, first, 3)
    checks.refuse_improper("transitions.probabilities", p, ("s", "a", "k"))
    return Successors(indices, p)


def stochastic(kernel: Any, termination: Any, margin: Any, normalise: bool, dtype: Any, available: Any) -> Any:
    """Return the kernel with rows that sum to `1 - termination` to rounding; refuses rows not close to it."""
    if isinstance(kernel, MatrixFree):
        return function_checks.checked(kernel, termination, normalise, dtype, available)
    p = kernel.probabilities
    if termination is not None:
        checks.check_batches({"transitions": p.shape[:-3], "termination": termination.shape[:-2]})
    if checks.is_traced(p, termination):
        if not normalise:
            return kernel
        p = cast(p, dtype)
        termination = None if termination is None else cast(termination, dtype)
        rescaled = _rescaled(jnp, p, p.sum(-1), termination)
    else:
        target = 1.0 if termination is None else 1.0 - termination
        sums = p.sum(-1)
        checks.check_rows(sums, target, termination is not None, margin, normalise)
        if np.size(target) > sums.size and not normalise:
            return kernel  # rows shared by lanes stay shared: within tolerance they meet every lane's target
        rescaled = _rescaled(np, p, sums, termination)
    return Dense(rescaled) if isinstance(kernel, Dense) else Successors(kernel.indices, rescaled)


def _rescaled(xp: Any, p: Any, sums: Any, termination: Any) -> Any:
    factor = 1.0 / xp.where(sums > 0, sums, 1.0)
    if termination is not None:
        factor, termination = xp.broadcast_arrays(factor, termination)
        factor = factor * (1.0 - termination)
    factor = factor[..., None]
    return p.reshape((1,) * (factor.ndim - p.ndim) + p.shape) * factor


# ---- reward, termination, initial, discount


def termination_of(termination: Any, kernel: Any, available: Any) -> Any:
    """Read probabilities that an episode ends, of pairs or states, as `[*B, S, A]`; None where none ends."""
    if termination is None:
        return None
    margin, _ = checks.tolerance(termination)
    termination = checks.number("termination", termination)
    core = (kernel.n_states, kernel.n_actions)
    if termination.shape == core[:1]:
        termination = termination[:, None] + np.zeros((1, core[1]), termination.dtype)
    checks.expect_shape("termination", termination.shape, core, "S, A", "one probability per (s, a), or [S]")
    termination = masks.fill(termination, available, [[0.0]])
    if checks.is_traced(termination):
        return termination
    checks.refuse_improper("termination", termination, ("s", "a"))
    above = termination > 1 + margin
    checks.refuse("termination", termination, above, ("s", "a"), "a probability is at most 1; clip or correct it")
    return np.minimum(termination, 1.0) if termination.any() else None


def initial_of(initial: Any, n_states: int, normalise: bool) -> Any:
    """Read where episodes start, `[*B, S]`: a distribution, rescaled if asked; None is the uniform one."""
    if initial is None:
        return np.full((n_states,), 1.0 / n_states)
    margin, said = checks.tolerance(initial)
    initial = checks.number("initial", initial)
    checks.expect_shape("initial", initial.shape, (n_states,), "S", "a distribution over states, or None for uniform")
    traced = checks.is_traced(initial)
    if traced and not normalise:
        return initial
    sums = initial.sum(-1)
    if not traced:
        checks.refuse_improper("initial", initial, ("s",))
        bad = sums <= 0 if normalise else np.abs(sums - 1) > margin
        lane = checks.first(bad)
        if lane is not None:
            total = f"{checks.place('initial', lane, ())} sums to {checks.show(sums[lane], 1.0)}"
            raise ValueError(f"{total}, not 1 ({said}); divide by the sum, or pass normalise=True")
    return initial / sums[..., None]


def discount_of(discount: Any, dtype: np.dtype, ends: bool = False) -> tuple[Array, Array]:
    """Return the discount and its complement, the latter from double precision where the discount has it.

    1 itself is a discount where there is a termination (`ends`); `episodes` looks whether that suffices.
    """
    g = checks.number("discount", discount)
    if checks.is_traced(g):
        g = cast(g, dtype)
        return g, 1 - g
    rule = (
        "it must lie in [0, 1): use 0.999 for a long horizon, and termination for episodes that end; solve_average "
        "needs none, solve_horizon takes its own"
    )
    checks.refuse("discount", g, ~((g >= 0) & ((g < 1) | (ends & (g == 1)))), (), rule)
    rule = f"in {dtype} that is 1: pass float64 arrays with jax_enable_x64 on, or a smaller discount"
    checks.refuse("discount", g, (g.astype(dtype) >= 1) & (g < 1), (), rule)
    return cast(g, dtype), cast(1.0 - g, dtype)
