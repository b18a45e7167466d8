"""From where the loop stopped to a `Solution`: policy and perturbation in the public layout, derivatives, honest words.

The loop hands over a value and the half-width of the error that it has proved. One more backup there gives the policy
and what the adversary takes off; `implicit` attaches the derivatives of the fixed point to it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import loops, pytrees
from robustreg.regularisers.bound import Bound
from robustreg.solvers import implicit, linear
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.solution import Solution, Status
from robustreg.solvers.tolerance import Tolerance


class Stopped(NamedTuple):
    """Where the loop stopped, lane by lane: value `h [S, *B]` and `c [*B]`, and `[*B]` each of the others."""

    h: Array
    c: Array
    half_width: Array
    status: Array
    steps: Array


def finish(
    problem: BoundProblem,
    stopped: Stopped,
    initial: Array,
    tol: Tolerance,
    probe: Array | None,
    method: linear.Method,
    visited: Array | None,
    visits: bool,
) -> Solution:
    """Make a `Solution` of where each lane stopped: one more backup there, in the public layout, with derivatives."""
    # NaN in gives NaN out, everywhere: a lost lane must not look like an answer.
    lost = stopped.status >= int(Status.NONFINITE_INPUT)
    h, c, half_width = (jnp.where(lost, 0, x) for x in (stopped.h, stopped.c, stopped.half_width))
    # A value that errs by w changes log-probabilities by up to 2 beta w: where that was asked for, linear systems of
    # the policy need not be solved more accurately.
    accuracy = jnp.minimum(jnp.max(problem.regulariser.beta, axis=0) * half_width, 1e-3)
    accuracy = jnp.where(tol.given & ~lost, accuracy, 0)
    inexact = implicit.policy_error(problem, half_width)
    toured = implicit.Tour(initial, visited) if visits else None
    found = (problem, h, c, accuracy, probe, *lax.stop_gradient((inexact, lost, toured)))
    h, th, policy, q, known = implicit.attach(method, *loops.alike(found))
    value = h + c[None]
    masked = jnp.isneginf(problem.regulariser.log_prior)
    perturbation = jnp.where(masked, 0, q - th[None])

    def public(x: Array, core: int) -> Array:
        return pytrees.batch_first(implicit.mark(x, lost), core)

    return Solution(
        value=public(value, 1),
        q=public(q + c[None, None], 2),
        policy=public(policy, 2),
        log_policy=public(_log_policy(problem, policy, q, lost), 2),
        perturbation=public(perturbation, 2),
        lower=public(value - half_width[None], 1),
        upper=public(value + half_width[None], 1),
        objective=public(jnp.sum(initial * value, axis=0), 0),
        status=_honest(problem, stopped, tol),
        steps=stopped.steps,
        tol=tol.or_reached(stopped.half_width),
        visits=None if known is None else public(known, 1),
    )


def _log_policy(problem: BoundProblem, policy: Array, q: Array, lost: Array) -> Array:
    """Logarithm of the policy, `[A, S, *B]`, of a harmless one in lanes that are lost: see `implicit`."""
    policy = jnp.where(lost[None, None], 1 / policy.shape[0], policy)
    q = jnp.where(lost[None, None], 0, q)
    regulariser = implicit.harmless(problem, lost).regulariser
    # (Uncertain transitions change q, and so what a regulariser could tell of small probabilities from it.)
    return regulariser.log_policy(policy, q) if problem.ball is None else Bound.log_policy(regulariser, policy, q)


def _honest(problem: BoundProblem, stopped: Stopped, tol: Tolerance) -> Array:
    """Take CONVERGED off lanes that were not told how close, and ended with an interval wider than half their value."""
    size = jnp.max(jnp.abs(stopped.h + stopped.c[None]), axis=0)
    wide = ~tol.given & (stopped.half_width > 0.25 * size) & (problem.magnitudes.reward > 0)
    return jnp.where(wide & (stopped.status == int(Status.CONVERGED)), int(Status.STAGNATED), stopped.status)
