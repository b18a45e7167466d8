"""Actions that were taken: arrays of their numbers, checked, and what stands there in arrays over actions."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import checks


def checked(name: str, action: ArrayLike, shape: tuple[Any, ...], n_actions: int) -> Array:
    """Read the numbers of actions for an array `[*shape, A]`.

    Args:
        name: what to call them in a message.
        action: integers, broadcastable to `shape`; values are checked where they exist.
        shape: what they are to have.
        n_actions: A.

    Raises:
        TypeError: no integers.
        ValueError: another shape; a number that no action has.
    """
    found = checks.array(name, action)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers, the numbers of the actions that were taken, got {found.dtype}")
    try:
        fits = np.broadcast_shapes(found.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {list(found.shape)}; expected {list(shape)}, one action for each row of {n_actions}"
        )
    if not checks.is_traced(found):
        numbers = np.asarray(found)
        wrong = checks.first((numbers < 0) | (numbers >= n_actions))
        if wrong is not None:
            raise ValueError(
                f"{name}{list(wrong) or ''} is {numbers[wrong]}; actions are numbered from 0 to {n_actions - 1}; "
                "give padding any action, and no weight"
            )
    return jnp.broadcast_to(found, shape)


def take(x: Array, action: Array, axis: int) -> Array:
    """Entries of an array over actions at those taken, on an axis of 1; NaN where there is no such action.

    Args:
        x: an array over actions on `axis`, broadcastable to `action` on the others. One number stands for all actions.
        action: an array of as many axes, with 1 for actions.
        axis: that of the actions.
    """
    if x.shape[axis] == 1:
        return x
    # Negative numbers would count from the end.
    there = jnp.where(action < 0, x.shape[axis], action)
    return jnp.take_along_axis(x, there, axis=axis, mode="fill", fill_value=jnp.nan)
