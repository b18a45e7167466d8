"""One step of the search for a level, the log-ratio `l` of the best action (see `conjugates`), for every layout.

Newton's method on the power mean of the mass, a function that is nearly linear, within the two sides that the signs met
so far have shown, and by halving where a step did not bring the mass half as close. When to stop is for who calls:
solves want the last digit, a layer of many rows the time.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from robustreg.regularisers.divergences import deformed_exp, deformed_log


class Move(NamedTuple):
    """Where the search for a level goes next.

    Attributes:
        level: the next one.
        low, high: between which the root lies, by the signs met so far.
        slow: whether the last step did not halve the excess.
        outside: whether Newton's step leaves the two sides.
    """

    level: Array
    low: Array
    high: Array
    slow: Array
    outside: Array


def moved(level: Array, excess: Array, slope: Array, low: Array, high: Array, last: Array, h: Array) -> Move:
    """Take Newton's step for the root of the mass in the deformed exponential of the level, or halve instead.

    Args:
        level: where the mass was measured.
        excess: the logarithm of the mass, over what it should be.
        slope: the mean of 1/rho, which is minus its derivative.
        low, high: between which the root lies, so far.
        last: the size of the excess before, infinite where halving came before.
        h: `alpha - 1`; see `divergences.deformed_exp`.
    """
    low, high = jnp.where(excess < 0, level, low), jnp.where(excess > 0, level, high)
    newton = level + deformed_log(deformed_exp(-excess, h) / slope, h)
    slow = jnp.abs(excess) > 0.5 * last
    outside = ~((newton > low) & (newton < high))
    # Next to the prior the root is 0 to rounding, and so is the first step: not to be bisected for.
    at_prior = (newton <= 0) & (low == 0) & ~slow
    new = jnp.where(outside | slow, jnp.where(at_prior, 0, 0.5 * (low + high)), newton)
    return Move(new, low, high, slow, outside)


def resolution(dtype: np.dtype) -> float:
    """Find the largest logarithm of the sum at a root that counts as resolved."""
    return float(jnp.finfo(dtype).eps) ** 0.6
