"""Actions that do not exist in every state: the mask of an MDP, and what it does to its leaves and to a regulariser.

A mask is `available [*B, S, A]`, true where a state has an action. It does two things. The factory puts something inert
where there is no action (the state stays, for no reward), so that whatever stood there, a row of zeros or a reward of
minus infinity, is never computed with. And every function that takes the MDP with a regulariser takes the regulariser
`restricted` to the mask: its prior is 0 at the actions that are not there, and conditioned on the others.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import checks
from robustreg.regularisers.regulariser import Regulariser, Sum


def restricted(reg: Regulariser, available: ArrayLike | None) -> Any:
    """Restrict a regulariser to the actions that exist.

    `solve` and everything else that takes an MDP do this by themselves. Do it for what takes a regulariser alone and
    not the MDP: `worst_case(restricted(reg, m.available), policy)`, and likewise `slack` and `critical_beta`.

    Args:
        reg: from `robustreg.kl`, `robustreg.alpha` or `robustreg.entropy`.
        available: `[A]`, `[S, A]` or `[*B, S, A]`, true where an action exists; None: everywhere.

    Returns:
        The same kind of regulariser. Its prior is the old one given that the action exists, and NaN in a state whose
        available actions all have prior 0. (The counting measure of `entropy` only loses the other actions.)

    Raises:
        TypeError: what is no regulariser, or no mask of booleans.
        ValueError: a state without any action; a mask of another number of actions than the prior's.
    """
    checks.expect_type(reg, Regulariser, "first argument", "kl")
    if available is None:
        return reg
    if isinstance(reg, Sum):
        return Sum(tuple(restricted(part, available) for part in reg.parts), reg.shared)
    allowed = jnp.asarray(checked(available, None))
    logs: Any = reg.log_prior
    if logs is None:
        # All alike: what is left is normalised below.
        logs = jnp.zeros((allowed.shape[-1],), checks.canonical(reg.beta).dtype)
    if logs.shape[-1] != allowed.shape[-1]:
        raise ValueError(f"the prior is over {logs.shape[-1]} actions, the mask over {allowed.shape[-1]}")
    shape = jnp.broadcast_shapes(logs.shape, allowed.shape)
    # Minus infinity is meant, for whoever looks for infinities.
    with jax.debug_infs(False):
        logs = jnp.where(jnp.broadcast_to(allowed, shape), jnp.broadcast_to(checks.canonical(logs), shape), -jnp.inf)
        if reg.has_reference:
            logs = logs - jax.nn.logsumexp(logs, axis=-1, keepdims=True)
    regulariser: Any = reg  # of a class that is a dataclass, as all are
    return dataclasses.replace(regulariser, log_prior=logs)


def checked(available: Any, core: tuple[int, int] | None) -> Any:
    """Read a mask as a boolean NumPy array or tracer.

    Args:
        available: booleans, or the numbers 0 and 1; `[*B, S, A]`.
        core: (S, A); None: any, and `[A]` will do.

    Raises:
        TypeError: other values than these; a tracer of numbers.
        ValueError: another shape; a state without any action.
    """
    traced = checks.is_traced(available)
    mask: Any = jnp.asarray(available) if traced else np.asarray(available)
    if core is not None:
        checks.expect_shape("available", mask.shape, core, "S, A", "whether state s has action a")
    elif mask.ndim == 0 or mask.shape[-1] == 0:
        raise ValueError(f"available has shape {mask.shape}; expected [A], [S, A] or [*B, S, A]")
    if mask.dtype != bool:
        if traced or not np.isin(checks.number("available", mask), (0, 1)).all():
            raise TypeError("available must be an array of booleans, such as transitions.sum(-1) > 0")
        mask = mask.astype(bool)
    if not traced:
        none = checks.first(~mask.any(-1))
        if none is not None:
            state = checks.place("available", none, ("s",) if mask.ndim > 1 else ())
            raise ValueError(
                f"{state} allows no action; a state in which nothing can be done is the end of an episode: allow one "
                "action there and give it termination 1, or have it lead back to the state for reward 0"
            )
    return mask


def missing(available: Any, batch: tuple[int, ...], xp: Any = np) -> Any:
    """Tell where an action exists in none of the lanes that a leaf with batch axes `batch` serves, `[*batch, S, A]`."""
    own = available.shape[:-2]
    checks.check_batches({"available": own, "the others": batch})
    extra = len(own) - len(batch)
    some = available.any(tuple(range(max(extra, 0)))) if extra > 0 else available
    shared = tuple(i for i, n in enumerate(batch[len(batch) - (some.ndim - 2) :]) if n == 1)
    some = some.any(shared, keepdims=True) if shared else some
    return xp.broadcast_to(~some, batch + some.shape[-2:])


def fill(x: Any, available: Any, inert: Any, core: int = 2) -> Any:
    """Put something inert into a leaf where there is no action.

    Args:
        x: `[*b, S, A, ...]` with `core` axes from S on; NumPy or traced.
        available: `[*B, S, A]` or None.
        inert: broadcastable to the core of x, with as many axes.
    """
    if available is None:
        return x
    xp: Any = jnp if checks.is_traced(x, available) else np
    x = xp.asarray(x)
    gone = missing(available, x.shape[: x.ndim - core], xp)
    gone = gone.reshape(gone.shape + (1,) * (core - 2))
    inert = xp.asarray(inert, x.dtype).reshape((1,) * (x.ndim - core) + np.shape(inert))
    return xp.where(gone, inert, x)


def refuse_missing(policy: Any, available: Any) -> None:
    """Refuse a concrete policy that plays an action which does not exist."""
    if available is None or checks.is_traced(policy, available):
        return
    p, allowed = np.broadcast_arrays(np.asarray(policy, np.float64), np.asarray(available))
    rule = "that action is not available there: give it probability 0 and divide the rest by its sum"
    checks.refuse("policy", p, (p > 0) & ~allowed, ("s", "a"), rule)


def plays_missing(policy: Array, allowed: Array) -> Array:
    """Tell where a policy plays an action that does not exist, `[S, *B]`; the mask may have axes of 1."""
    return jnp.any((policy > 0) & ~allowed, axis=0)
