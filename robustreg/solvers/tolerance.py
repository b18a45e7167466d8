"""The accuracy that was asked for in each lane; where none was, that is an array too, `given`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import checks, pytrees


@pytrees.dataclass
class Tolerance:
    """The accuracy that was asked for, in the lanes in which one was.

    One compiled program serves both kinds of lanes, so that `given` is an array as well.

    Attributes:
        value: the number asked for, `[*B]`, in the units of the error that it bounds; 0 where none was given.
        given: whether one was, `[*B]` or one for all. Where not, a lane goes on as far as the precision supports.
    """

    value: Array
    given: Array | np.ndarray

    @classmethod
    def read(cls, tol: ArrayLike | None, dtype: Any) -> "Tolerance":
        """Read the argument `tol` of a public function, `[*B]` or a number; None is none."""
        return cls(checks.operand("tol", 0 if tol is None else tol, dtype), np.asarray(tol is not None))

    @property
    def shape(self) -> tuple[int, ...]:
        """Batch axes."""
        return self.value.shape

    def broadcast(self, batch: tuple[int, ...]) -> "Tolerance":
        """Repeat along batch axes."""
        return Tolerance(jnp.broadcast_to(self.value, batch), jnp.broadcast_to(self.given, batch))

    def or_reached(self, reached: Array) -> Array:
        """Return the number asked for, and the one reached where none was, `[*B]`."""
        return jnp.where(self.given, self.value, reached)
