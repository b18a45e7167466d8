"""Arguments of losses: arrays of one dtype and shape, the parameters of a regulariser in it, weights, and means."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from robustreg._core import checks
from robustreg.adversary import reach
from robustreg.regularisers import parameters
from robustreg.regularisers.families import Divergence


def common(*optional: str, **given: Any) -> tuple[Any, ...]:
    """Read arguments as arrays of the widest floating dtype among them, float32 or more; optional ones may stay None.

    Raises:
        TypeError, ValueError: an argument that is no array of real numbers, named.
    """
    read = {name: x for name, x in given.items() if x is not None or name not in optional}
    arrays = {name: checks.canonical(checks.array(name, x)) for name, x in read.items()}
    strong = [x.dtype for x in arrays.values() if jnp.issubdtype(x.dtype, jnp.floating) and not x.weak_type and x.ndim]
    strong = strong or [x.dtype for x in arrays.values() if jnp.issubdtype(x.dtype, jnp.floating) and not x.weak_type]
    dtype = parameters.working(max(strong, key=lambda d: jnp.finfo(d).bits)) if strong else jnp.result_type(float)
    return tuple(arrays[name].astype(dtype) if name in arrays else None for name in given)


def expect_alike(shape: tuple[int, ...], what: str, **given: Array | None) -> tuple[Any, ...]:
    """Broadcast what is given to a shape, or refuse it by name; `what` names the axes of the shape."""
    for name, x in given.items():
        if x is not None and (x.ndim > len(shape) or any(n not in (1, m) for n, m in zip(x.shape[::-1], shape[::-1]))):
            raise ValueError(f"{name} has shape {list(x.shape)}; expected {what} = {list(shape)}, or what broadcasts")
    return tuple(None if x is None else jnp.broadcast_to(x, shape) for x in given.values())


def order_and_strength(reg: Any, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Alpha and beta of a KL or alpha regulariser, broadcast to the shape of some samples.

    Raises:
        TypeError: another regulariser.
        ValueError: axes that do not fit.
    """
    reach.expect_reference(reg, "first argument")
    if not isinstance(reg, Divergence):
        raise TypeError(
            f"a {type(reg).__name__} has no order alpha: of log-ratios alone only kl and alpha can tell a perturbation"
        )
    beta, order = reg.beta, reg.order
    scale, own = reg.state_scale, getattr(reg, "alpha_per_state", None)
    if scale is not None or own is not None:
        beta = beta[..., None] * (1 if scale is None else scale)
        order = order[..., None] + (0 if own is None else own)
    # The regulariser's axes lead, as everywhere.
    beta, order = (leading(x, len(shape)) for x in (beta, order))
    beta, order = expect_alike(shape, "the shape of log_ratio", beta=beta, alpha=order)
    return order, beta


def leading(leaf: Array, rank: int) -> Array:
    """Return a leaf with axes of 1 behind its own, up to a rank."""
    return leaf.reshape(leaf.shape + (1,) * (rank - leaf.ndim))


def silenced(weight: Array | None, *arrays: Array | None) -> tuple[Any, ...]:
    """Put 0 where there is no weight: nothing that stands there has a share in values or derivatives."""
    if weight is None:
        return arrays
    return tuple(None if x is None else jnp.where(weight == 0, 0, x) for x in arrays)


def reduced(loss: Array, weight: Array | None) -> Array:
    """Return every loss, or the weighted mean; 0 if there is no weight at all."""
    if weight is None:
        return loss
    weight = jnp.broadcast_to(weight, loss.shape)
    total = jnp.sum(weight)
    return jnp.sum(jnp.where(weight == 0, 0, weight * loss)) / jnp.where(total == 0, 1, total)
