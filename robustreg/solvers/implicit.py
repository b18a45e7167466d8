"""Derivatives of fixed points, by the implicit function theorem.

The fixed point `V = T(V; theta)` of the regularised Bellman operator changes with its parameters by

    dV = (I - K)^{-1} d_theta T(V),        K = dT/dV = g P_pi,
    d_theta T = <pi, dr + dg P V + g dP V> + d_theta Omega*,

and the policy with V and theta as the regulariser knows. Backwards, `(I - K^T)^{-1}` of a cotangent is a discounted
occupancy `d`, from which the gradients in all leaves follow at once: `dJ/dr = d pi`, `dJ/dP = g d pi V`, and so on. One
linear system whatever the number of leaves, one pass over each leaf, and nothing that grows with the number of
iterations of any solver.

The derivatives are those of `V = Omega*(r + g P V)` as it is written: in P they hold along directions that keep rows
normalised, with the constant in the successor that this formula gives; `termination` and `complement` do not occur in
it (what ends an episode is missing from the rows of P), so that the derivative in `discount` is the whole of it.

**Lanes that failed.** A lane that only missed its tolerance (MAX_STEPS, STAGNATED) keeps its value and its gradients.
One without a finite fixed point (NONFINITE, NONFINITE_INPUT) has no derivative, and must not spoil that of what it
shares with the others. A NaN in such a lane would, times a cotangent of 0. So their linear map is that of a harmless
problem, and `mark`, at the very end, makes NaN of whatever somebody does want to know of them: of outputs, of tangents,
and of cotangents that are not 0.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from robustreg._core import pytrees
from robustreg.problems.transitions import Transitions
from robustreg.solvers import bellman, linear
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.linear import Method

Optimum = tuple[Array, Array, Array, Array, Array | None]


class Tour(NamedTuple):
    """Which visits are wanted: from where episodes start, `initial [S, *B]`, sought from those of the last solution."""

    initial: Array
    last: Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attach(
    method: Method,
    problem: BoundProblem,
    h: Array,
    c: Array,
    accuracy: Array,
    probe: Array | None,
    inexact: Array,
    lost: Array,
    toured: "Tour | None" = None,
) -> Optimum:
    """One backup at a fixed point found elsewhere, with the derivatives of the fixed point attached.

    Args:
        method: how to solve the linear systems of the derivatives.
        problem: the lanes, whose every leaf may be differentiated.
        h, c: the fixed point `V = h + c`, `[S, *B]` and `[*B]`; where the search for it started has no influence.
        accuracy: of the linear systems, see `linear.solve`.
        probe: None or zeros `[*B]`, see `linear.solve`.
        inexact: what the error of `V` brings into an occupancy, `[*B]`, see `policy_error`.
        lost: lanes without a fixed point, `[*B]`, in which h and c are 0. Apply `mark` to what comes of the outputs.
        toured: which visits of the policy are wanted, None: none.

    Returns:
        `h` as it came, `T V - c [S, *B]`, the policy `[A, S, *B]`, `q - c [A, S, *B]`, and visits `[S, *B]` or None.
        Derivatives are those of V, its policy and q, in both modes and to any order; visits are constants.
    """
    th, policy, left = bellman.backup(problem, h, c)
    q = left if problem.ball is None else bellman.q_values(problem, h, c)
    visits = None
    if toured is not None:
        # The backward pass's linear system at a cotangent of the objective. It cannot hand on what it finds, whereas
        # these go out with the solution; it begins at them, and they at those of the last one.
        played = jnp.where(lost[None, None], 1 / policy.shape[0], policy)
        whole = harmless(problem, lost)
        chain = bellman.chain(whole, played, bellman.worst_transitions(whole, h, c))
        found = linear.occupy(chain, jnp.broadcast_to(toured.initial, h.shape), accuracy, method, toured.last)
        visits = jnp.where(lost[None], 0, found)
    return h, th, policy, q, visits


def _attach_jvp(method: Method, primals: tuple, tangents: tuple) -> tuple[Optimum, Optimum]:
    problem, h, c, accuracy, probe, inexact, lost, toured = primals
    change, *_, dprobe, _, _, _ = tangents
    # By the differentiable function itself: the rule can then be differentiated in turn.
    h, th, policy, q, visits = found = attach(method, problem, h, c, accuracy, probe, inexact, lost, toured)
    still = None if visits is None else jnp.zeros_like(visits)
    problem = harmless(problem, lost)
    policy = jnp.where(lost[None, None], 1 / policy.shape[0], policy)
    q = jnp.where(lost[None, None], 0, q)
    chain = bellman.chain(problem, policy, bellman.worst_transitions(problem, h, c))
    dprobe = None if dprobe is None else pytrees.given(dprobe)
    if problem.ball is not None:
        # The operator as a whole: what the worst transitions take off depends on V too.
        v, moving = h + c[None], pytrees.given_or_zero(change, problem)
        dth = jax.jvp(lambda x: bellman.backup(x, v, jnp.zeros_like(c)), (problem,), (moving,))[1][0]
        dh = linear.solve(chain, jnp.broadcast_to(dth, h.shape), accuracy, dprobe, method, inexact, visits)

        def policy_and_q(x: BoundProblem, v: Array) -> tuple[Array, Array]:
            return bellman.backup(x, v, jnp.zeros_like(c))[1], bellman.q_values(x, v, jnp.zeros_like(c))

        return found, (dh, dh, *jax.jvp(policy_and_q, (problem, v), (moving, dh))[1], still)
    dq = explicit(problem, change, h + c[None])
    dth = problem.regulariser.conjugate_tangent(policy, q + c[None, None], dq, change.regulariser)
    dh = linear.solve(chain, jnp.broadcast_to(dth, h.shape), accuracy, dprobe, method, inexact, visits)
    ahead = problem.discount[None, None] * problem.transitions._expect(dh)
    dq = ahead if dq is None else dq + ahead
    dpolicy = jnp.broadcast_to(problem.regulariser.policy_tangent(policy, dq, change.regulariser), policy.shape)
    # dT V = dV at the fixed point.
    return found, (dh, dh, dpolicy, jnp.broadcast_to(dq, q.shape), still)


def explicit(problem: BoundProblem, change: BoundProblem, v: Array) -> Array | None:
    """Change of `r + g P v` at fixed v, `[A, S, *B]`; None if nothing in it changes."""
    terms = []
    if (dr := pytrees.given(change.reward)) is not None:
        terms.append(dr)
    if (dg := pytrees.given(change.discount)) is not None:
        terms.append(dg[None, None] * problem.transitions._expect(v))
    if (dpv := problem.transitions._expect_tangent(change.transitions, v)) is not None:
        terms.append(problem.discount[None, None] * dpv)
    return functools.reduce(jnp.add, terms) if terms else None


attach.defjvp(_attach_jvp, symbolic_zeros=True)


@jax.custom_jvp
def step(problem: BoundProblem, h: Array, c: Array) -> tuple[Array, Array, Array]:
    """One backup of any value, `bellman.backup`, with derivatives in h and in every leaf of the problem, c a constant.

    They are those of `Omega*(r + g P V)` as it is written, like those of `attach`.
    """
    return bellman.backup(problem, h, c)


def _step_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    problem, h, c = primals
    change, dh, _ = tangents
    th, policy, q = found = step(problem, h, c)
    # Lanes that overflow have no derivative, and must not spoil that of what they share.
    broken = ~jnp.all(jnp.isfinite(th), axis=0)
    policy = jnp.where(broken[None, None], 1 / policy.shape[0], policy)
    q = jnp.where(broken[None, None], 0, q)
    dq = explicit(problem, change, h + c[None])
    if pytrees.given(dh) is not None:
        ahead = problem.discount[None, None] * problem.transitions._expect(dh)
        dq = ahead if dq is None else dq + ahead
    dth = problem.regulariser.conjugate_tangent(policy, q + c[None, None], dq, change.regulariser)
    dpolicy = problem.regulariser.policy_tangent(policy, dq, change.regulariser)
    tangent = (dth, dpolicy, jnp.zeros_like(q) if dq is None else dq)
    return found, tuple(jnp.broadcast_to(t, x.shape) for t, x in zip(tangent, found))


step.defjvp(_step_jvp, symbolic_zeros=True)


@jax.custom_jvp
def mark(x: Array, lost: Array) -> Array:
    """Make NaN of what is lost; `x [..., *B]` and `lost [*B]`.

    Its tangents there are NaN, and so are cotangents that are not 0, whereas one of 0 stays 0.
    """
    return jnp.where(lost.reshape((1,) * (x.ndim - lost.ndim) + lost.shape), jnp.nan, x)


def _mark_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    (x, lost), (dx, _) = primals, tangents
    return mark(x, lost), pytrees.gate(dx, lost.reshape((1,) * (x.ndim - lost.ndim) + lost.shape))


mark.defjvp(_mark_jvp)


def harmless(problem: BoundProblem, lost: Array) -> BoundProblem:
    """Put an empty problem into the lanes that are lost, `[*B]`: finite numbers, discount 0."""

    def put(x: Array, value: float) -> Array:
        return pytrees.put_in_lanes(x, lost, value)

    def silence(x: Any) -> Any:
        return x._silenced(lost) if isinstance(x, Transitions) else put(x, 0.0)

    values = {"log_prior": -float(np.log(problem.reward.shape[0])), "cost": 0.0}
    calm = jax.tree_util.tree_map_with_path(
        lambda path, x: put(x, values.get(getattr(path[-1], "name", ""), 1.0)), problem.regulariser
    )
    return dataclasses.replace(
        problem,
        transitions=problem.transitions._silenced(lost),
        regulariser=calm,
        reward=put(problem.reward, 0.0),
        exit_rate=put(problem.exit_rate, 1.0),
        discount=put(problem.discount, 0.0),
        complement=put(problem.complement, 1.0),
        horizon=put(problem.horizon, 1.0),
        ball=jax.tree.map(silence, problem.ball, is_leaf=lambda x: isinstance(x, Transitions)),
    )


def policy_error(problem: BoundProblem, half_width: Array) -> Array:
    """Bound the relative error of an occupancy, in the 1-norm, that is due to the error of V, `[*B]`.

    Action values that err by `g w` move a policy by at most some x in the 1-norm, as its regulariser says. With another
    policy P, `d' - d = (I - K'^T)^{-1} (K' - K)^T d`, so that states are visited otherwise by at most `g x horizon` of
    all visits, and actions by x more.
    """
    moved = problem.regulariser.policy_change(problem.discount * half_width)
    moved = jnp.where(half_width == 0, 0, moved)
    return moved * (1 + problem.discount * problem.horizon)
