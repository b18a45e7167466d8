r"""Balls of rewards, as users hold them: `norm_ball`. The mathematics is in `norms`."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import pytrees
from robustreg.regularisers import masks, parameters
from robustreg.regularisers.norms import BoundNorm
from robustreg.regularisers.regulariser import Regulariser, counting


@pytrees.dataclass
class NormBall(Regulariser):
    """`Omega(p) = radius ||p||_q`. Build it with `norm_ball`, which validates.

    Attributes:
        radius: of the ball of reward perturbations, in reward units, `[*B]`.
        log_prior: None, or 0 and minus infinity: which actions there are.
        state_scale: divides the radius per state, `[*B, S]`, or None.
        p: norm of the ball.
    """

    has_reference = False
    _is_norm = True

    radius: Array
    log_prior: Array | None = None
    state_scale: Array | None = None
    p: float = pytrees.static(default=2.0)

    @property
    def beta(self) -> Array:  # type: ignore[override]
        """1/radius, `[*B]`, the largest number for a radius of 0."""
        tiny = jnp.finfo(self.radius.dtype).tiny
        return 1 / jnp.maximum(self.radius, tiny)

    @property
    def _scalars(self) -> tuple[str, ...]:
        return ("radius",)

    def _bound(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> BoundNorm:
        return BoundNorm(beta, log_prior, self.p)

    def _rearrange(self, place: Any, dtype: Any, n_actions: int, last: bool = False) -> Any:
        return Regulariser._rearrange(counting(self, dtype, n_actions), place, dtype, n_actions, last)

    def _at_unit_strength(self) -> Any:
        raise TypeError("a norm ball has no reference: nothing can be scaled to the boundary of its set")


def norm_ball(
    radius: ArrayLike, p: float = 2, *, radius_per_state: ArrayLike | None = None, available: ArrayLike | None = None
) -> NormBall:
    """Make the regulariser of rewards that are uncertain within a ball of a p-norm in every state.

    Args:
        radius: in reward units, `[*B]`, finite and not negative; 0 is no regulariser at all.
        p: norm of the ball, from 1 to infinity: with 1 the adversary moves the reward of one action, with infinity that
            of all by as much.
        radius_per_state: `[*B, S]`, positive; multiplies the radius per state.
        available: which actions there are, as in `entropy`. (An MDP with a mask of its own needs none here.)

    Returns:
        A regulariser for `solve` and the rest: `solve` gives the best policy against the worst reward in the ball
        [Derman, Geist and Mannor 2021], `worst_case` that reward's difference from the nominal one.

    Raises:
        TypeError, ValueError: a radius or p out of range; a mask that is none.
    """
    size = parameters.number("radius", radius)
    parameters.refuse("radius", size, lambda v: ~((v >= 0) & (v < jnp.inf)), "must be finite and not negative")
    if not isinstance(p, (int, float)) or not p >= 1:
        raise ValueError(f"p must be a number from 1 to infinity, got {p!r}")
    scale = None if radius_per_state is None else 1 / parameters.state_scale(radius_per_state)  # type: ignore[operator]
    reg = NormBall(size, None, scale, float(p))
    _ = reg._leaves.batch, reg._leaves.states
    return reg if available is None else masks.restricted(reg, available)
