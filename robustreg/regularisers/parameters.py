"""What the factories of regularisers make of their arguments: checked leaves of a floating dtype.

**Precision.** Leaves in 16 bits become float32: a policy would lose digits to a rounded prior that it never gets back.

**Priors.** `log_prior` may be log-probabilities or logits: the factory subtracts their logsumexp. `prior` holds
probabilities; what misses a sum of 1 by more than its dtype explains is refused, and what remains is divided out. Both
happen inside `jax.jit` as outside it, differentiably. What would be refused becomes NaN where there is no value to look
at, row by row, so that it cannot pass for an answer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from robustreg._core import checks, containers, forks

# By how many units of its dtype the sum of a prior may miss 1 in 16 bits, where every entry is rounded by up to half
# a unit of itself; and by how much a sum that nobody can look at may, whatever its dtype.
_UNITS, _UNSEEN = 4, 1e-3


def number(name: str, x: ArrayLike) -> Array:
    """Read an array of explicit floating dtype, float32 or more: a weakly typed leaf would compile anew."""
    forks.refuse()
    x = containers.plain(name, x)
    if not isinstance(x, Tracer) and checks.is_traced(x):
        x = jnp.asarray(x)  # a sequence of tracers
    try:
        kind = jnp.result_type(x) if isinstance(x, Tracer) else np.asarray(x).dtype
    except ValueError:
        kind = np.dtype(object)
    if not any(jnp.issubdtype(kind, real) for real in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"{name} must be a number or an array of real numbers, got {x!r}")
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return jnp.asarray(np.asarray(x, jnp.result_type(float)))  # three times as fast as by the dtype alone
    return jnp.asarray(x, working(x.dtype))


def working(dtype: Any) -> np.dtype:
    """Return the dtype in which to compute with numbers of one, as JAX is configured to hold it: float32 at least."""
    forks.refuse()
    if not jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(jnp.result_type(float))
    return np.dtype(jax.dtypes.canonicalize_dtype(np.float32 if jnp.finfo(dtype).bits < 32 else dtype))


def refuse(name: str, x: Array, bad: Callable[[Any], Any], rule: str) -> None:
    """Raise for the first entry of a concrete array that is `bad`; tracers pass."""
    if isinstance(x, Tracer):
        return
    wrong = np.asarray(bad(np.asarray(x)))
    if wrong.any():
        where = checks.first(wrong) or ()
        raise ValueError(f"{_entry(name, where)} is {np.asarray(x)[where]}: {name} {rule}")


def _entry(name: str, where: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(map(str, where))}]" if where else name


def order(x: ArrayLike, name: str = "alpha") -> Array:
    """Read the order alpha, or what is added to it: finite."""
    x = number(name, x)
    refuse(name, x, lambda v: ~np.isfinite(v), "must be finite")
    return x


def strength(name: str, x: ArrayLike) -> Array:
    """Beta, or what multiplies it: positive and finite."""
    x = number(name, x)
    remedy = "must be positive and finite"
    if name == "beta":
        remedy += "; `nominal_optimum` solves without a regulariser, `evaluate` values the prior as a policy"
        if not checks.is_traced(x) and (np.asarray(x, np.float64) < 0).any():
            remedy += (
                ", and a negative beta is the soft minimum: `-reg.conjugate(-q)` and `-solve(...).value` of -reward"
            )
    refuse(name, x, lambda v: ~((v > 0) & np.isfinite(v)), remedy)
    return x


def state_scale(x: ArrayLike | None) -> Array | None:
    """Read `state_scale`: a strength with a state axis."""
    if x is None:
        return None
    scale = strength("state_scale", x)
    if scale.ndim == 0:
        raise ValueError("state_scale needs a state axis, [*B, S]; a scalar belongs into beta")
    return scale


def order_per_state(x: ArrayLike | None) -> Array | None:
    """Read `alpha_per_state`: an order with a state axis."""
    if x is None:
        return None
    own = order(x, "alpha_per_state")
    if own.ndim == 0:
        raise ValueError("alpha_per_state needs a state axis, [*B, S]; a scalar belongs into alpha")
    return own


def log_prior(prior: ArrayLike | None, log_prior: ArrayLike | None) -> Array | None:
    """Read the logarithm of a reference policy, normalised over its last axis, from it or from logits.

    Raises:
        ValueError: both given; no action axis; concrete values that are no distribution, naming the first offender.
    """
    if prior is not None and log_prior is not None:
        raise ValueError("give prior or log_prior, not both")
    if prior is not None:
        # Minus infinity stands for an action that is not there: no fault, for whoever looks for infinities.
        with jax.debug_infs(False):
            return _of_probabilities(containers.plain("prior", prior))
    return None if log_prior is None else _of_logits(log_prior)


def _of_logits(x: ArrayLike) -> Array:
    logits = number("log_prior", x)
    refuse("log_prior", logits, lambda v: np.isnan(v) | np.isposinf(v), "must be below infinity and not NaN")
    _expect_actions(logits)
    if isinstance(logits, Tracer):
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return logits - jnp.where(jnp.isfinite(total), total, jnp.nan)
    exact = np.asarray(logits, np.float64)
    top = exact.max(-1, keepdims=True)
    nothing = checks.first(np.isneginf(top[..., 0]))
    if nothing is not None:
        raise ValueError(
            f"{_entry('log_prior', nothing)} is minus infinity for every action: allow at least one in every state"
        )
    total = top + np.log(np.exp(exact - top).sum(-1, keepdims=True))
    return logits - jnp.asarray(total, logits.dtype)


def _of_probabilities(prior: ArrayLike) -> Array:
    p = number("prior", prior)
    refuse("prior", p, lambda v: ~((v >= 0) & np.isfinite(v)), "must be non-negative and finite")
    _expect_actions(p)
    margin = _margin(prior, p)
    if isinstance(p, Tracer):
        total = jnp.sum(p, axis=-1, keepdims=True)
        proper = (jnp.abs(total - 1) <= max(_UNSEEN, margin)) & jnp.all(p >= 0, axis=-1, keepdims=True)
        return log_of(p) - jnp.log(jnp.where(proper, total, jnp.nan))
    total = np.asarray(p, np.float64).sum(-1)
    index = checks.first(~(np.abs(total - 1) <= margin))
    if index is not None:
        raise ValueError(
            f"{_entry('prior', index)} sums to {total[index]:.6g} over actions, not 1 (tolerance {margin:g}); "
            "divide it by its sum"
        )
    return log_of(p) - jnp.asarray(np.log(total)[..., None], p.dtype)


def _margin(given: ArrayLike, p: Array) -> float:
    """By how much the sum of a prior may miss 1, from the dtype in which it came."""
    came = getattr(given, "dtype", p.dtype)
    if jnp.issubdtype(came, jnp.floating) and jnp.finfo(came).bits < 32:
        return _UNITS * float(jnp.finfo(came).eps)
    return 1e-6 if p.dtype.itemsize <= 4 else 1e-10


def _expect_actions(x: Array) -> None:
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"a prior has shape {list(x.shape)}; expected [A], [S, A] or [*B, S, A], none empty")


def log_of(prior: Array) -> Array:
    """Logarithm of a prior, minus infinity where it is 0, with gradient 0 there."""
    return jnp.where(prior > 0, jnp.log(jnp.where(prior > 0, prior, 1)), -jnp.inf)
