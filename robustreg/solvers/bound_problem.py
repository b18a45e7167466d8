"""A regularised MDP as the kernels read it: actions first, lanes last, with what is known of its numbers.

`bind` turns batch axes into lanes, and measures once per solve what the certificate needs to know: ranges, horizons and
what rounding grows with (`ranges`, `lifetimes`).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import loops, pytrees
from robustreg.problems.mdps import MDP
from robustreg.problems.transitions import Transitions
from robustreg.regularisers import masks
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import lifetimes, ranges
from robustreg.solvers.ambiguity import Balls, TransitionBall


@pytrees.dataclass
class BoundProblem:
    """A regularised MDP in the kernels' layout: actions first, lanes last, every leaf aligned with `[A, S, *B]`.

    Attributes:
        transitions, regulariser: bound to the layout.
        reward: `[A, S, *b]`.
        exit_rate: exit rate `(1-g) + g termination`, `[A, S, *b]` with axes of 1 where nothing depends on them.
        discount, complement: g and 1 - g, `[*b]`.
        horizon: bound on the discounted steps of an episode, at most 1/(1-g), `[*b]`; infinite where none is known.
        deviation: largest share by which a row of P misses `1 - termination`, beyond rounding, `[*b]`.
        valid: whether discount, strength, rows and prior are in range, `[*b]`.
        magnitudes: what rounding grows with.
        proved: whether the horizon is one of every policy, `[*b]`; None where every discount is less than 1.
        steps: elsewhere the expected steps of the reference policy, or more, `[S, *b]`, infinite where it need not end
            either; None likewise.
        ends: whether termination is part of the problem (else T commutes with constants up to g).
        strict: whether rounding is bounded for the worst case (else long sums count by the root of their length).
        averaged: whether c is the gain of an average-reward problem, of which h is the bias; see `average`.
        ball: noise in the transitions, or None; see `ambiguity`.
    """

    transitions: Transitions
    regulariser: Bound
    reward: Array
    exit_rate: Array
    discount: Array
    complement: Array
    horizon: Array
    deviation: Array
    valid: Array
    magnitudes: ranges.Magnitudes
    proved: Array | None
    steps: Array | None
    batch: tuple[int, ...] = pytrees.static()
    ends: bool = pytrees.static()
    strict: bool = pytrees.static(default=False)
    averaged: bool = pytrees.static(default=False)
    ball: Balls | None = None

    @property
    def n_states(self) -> int:
        """S."""
        return self.reward.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """Working precision."""
        return self.reward.dtype


def bind(
    mdp: MDP,
    regulariser: Regulariser,
    *others: tuple[int, ...],
    strict: bool = False,
    steps: int | None = None,
    averaged: bool = False,
    ambiguity: TransitionBall | None = None,
) -> BoundProblem:
    """Lay an MDP and a regulariser out for the kernels.

    Args:
        mdp: any batch axes.
        regulariser: any batch axes.
        *others: batch shapes of further arrays (a policy, an initial value) that broadcast with them.
        strict: see `BoundProblem`.
        steps: after which every episode is over; None: only when it ends by itself. The discount may then be 1.
        averaged: see `BoundProblem`. The MDP's discount is ignored, and no episode ends.
        ambiguity: noise in the transitions; None is none.

    Raises:
        ValueError: batch axes that do not broadcast.
    """
    batch = _batch_of(mdp, regulariser, others if ambiguity is None else (*others, ambiguity.batch_shape))
    mdp, regulariser = loops.alike((mdp._canonical(), regulariser))
    laid = _laid_out(mdp, regulariser, len(batch), averaged)
    given = lax.stop_gradient(laid)
    ends = mdp.termination is not None
    horizon, proved, expected = _horizons(mdp, given, steps, averaged)
    contracts = steps is None and not averaged
    deviation, valid = ranges.validity(given, ends, None if proved is None else horizon, contracts)
    ball = None if ambiguity is None else ambiguity.bind(len(batch), mdp.dtype, laid.transitions)
    if ball is not None:
        modulus = lax.stop_gradient(ball.contraction(laid.discount, mdp.n_states))
        horizon, valid = 1 / jnp.where(modulus < 1, 1 - modulus, 1), valid & (modulus < 1)
        ends = ends or not ball.keeps_constants  # they are no null direction of the residual then
    return BoundProblem(
        **laid._asdict(),
        horizon=horizon,
        deviation=deviation,
        valid=valid,
        # A bias is as large as some steps between any two states are worth.
        magnitudes=ranges.magnitudes(given.regulariser, given.reward, horizon * mdp.n_states if averaged else horizon),
        proved=proved,
        steps=expected,
        batch=batch,
        ends=ends,
        strict=strict,
        averaged=averaged,
        ball=ball,
    )


def _batch_of(mdp: MDP, regulariser: Regulariser, others: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    shapes = [mdp.batch_shape, regulariser.batch_shape, *others]
    try:
        return jnp.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(f"batch axes do not broadcast: MDP, regulariser, others have {shapes}") from None


def _laid_out(mdp: MDP, regulariser: Regulariser, n: int, averaged: bool) -> ranges.Given:
    """Move n batch axes behind the others, and put rewards of 0 where an action is masked."""
    dtype = mdp.dtype
    bound = masks.restricted(regulariser, mdp.available).bind(n, dtype, mdp.n_actions)
    sizes = {bound.log_prior.shape[1], *(shape[0] for shape in bound.shapes)}
    if sizes - {1, mdp.n_states}:
        raise ValueError(f"the regulariser has per-state parameters for another number of states than {mdp.n_states}")
    discount, complement = (pytrees.lanes_last(x, n, 0) for x in (mdp.discount, _complement(mdp)))
    if averaged:  # c, the gain, is then taken off in full at every step
        discount, complement = jnp.ones_like(discount), jnp.ones_like(discount)
    exit_rate = complement[None, None]
    if mdp.termination is not None:
        exit_rate = exit_rate + discount[None, None] * pytrees.lanes_last(mdp.termination.astype(dtype), n, 2)
    reward = pytrees.lanes_last(mdp.reward, n, 2)
    if mdp.available is not None:
        reward = jnp.where(pytrees.lanes_last(mdp.available, n, 2), reward, 0)
    return ranges.Given(mdp.transitions.bind(n, dtype), bound, reward, exit_rate, discount, complement)


def _horizons(
    mdp: MDP, given: ranges.Given, steps: int | None, averaged: bool
) -> tuple[Array, Array | None, Array | None]:
    """Bound how long episodes last: `horizon`, `proved` and `steps` of a `BoundProblem`."""
    horizon = 1 / given.complement
    if steps is not None:
        return jnp.minimum(horizon, steps), None, None
    if mdp.termination is not None:
        horizon = ranges.horizon(given)
    return lifetimes.of_all(given, horizon) if not averaged and mdp._may_not_discount() else (horizon, None, None)


def with_operator(problem: BoundProblem, operator: Bound, reward: Array) -> BoundProblem:
    """Put another bound regulariser and another reward in the place of a problem's own."""
    problem, operator, reward = loops.alike((problem, operator, reward))
    known = ranges.magnitudes(*lax.stop_gradient((operator, reward)), problem.horizon)
    return dataclasses.replace(problem, regulariser=operator, reward=reward, magnitudes=known)


def _complement(mdp: MDP) -> Array:
    """`1 - g` as precisely as the MDP knows it: its own leaf, unless `discount` was replaced without it."""
    difference = 1 - mdp.discount
    fits = jnp.abs(difference - mdp.complement) <= jnp.finfo(mdp.dtype).eps
    return jnp.where(fits, mdp.complement, difference)
