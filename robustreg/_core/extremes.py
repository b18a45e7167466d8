"""Largest and smallest numbers that keep NaN, for what is reported: a bound without its NaN is a claim without proof.

`jnp.max` and `jnp.min` promise to keep it. On CPUs some versions of the compiler hand them to kernels that skip it,
depending on shapes, and return minus or plus infinity where there is nothing else.
"""

import jax.numpy as jnp
from jax import Array

Axis = int | tuple[int, ...]


def largest(x: Array, axis: Axis) -> Array:
    """Find the largest entry along `axis`; NaN if any entry is."""
    return jnp.where(jnp.any(jnp.isnan(x), axis), jnp.nan, jnp.max(x, axis))


def smallest(x: Array, axis: Axis) -> Array:
    """Find the smallest entry along `axis`; NaN if any entry is."""
    return -largest(-x, axis)
