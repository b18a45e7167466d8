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
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from robustreg import _tree, bellman, linear
from robustreg.linear import Method

Optimum = tuple[Array, Array, Array, Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attach(method: Method, problem: bellman.Lanes, h: Array, c: Array, accuracy: Array, probe: Array | None) -> Optimum:
    """One backup at a fixed point found elsewhere, with the derivatives of the fixed point attached.

    Args:
        method: how to solve the linear systems of the derivatives.
        problem: the lanes, whose every leaf may be differentiated.
        h, c: the fixed point `V = h + c`, `[S, *B]` and `[*B]`; where the search for it started has no influence.
        accuracy: of the linear systems, see `linear.solve`.
        probe: None or zeros `[*B]`, see `linear.solve`.

    Returns:
        `h` as it came, `T V - c [S, *B]`, the policy `[A, S, *B]` and `q - c [A, S, *B]`. Derivatives are those of V,
        its policy and q, in both modes and to any order.
    """
    th, policy, q = bellman.backup(problem, h, c)
    return h, th, policy, q


def _attach_jvp(method: Method, primals: tuple, tangents: tuple) -> tuple[Optimum, Optimum]:
    problem, h, c, accuracy, probe = primals
    change, *_, dprobe = tangents
    # By the differentiable function itself: the rule can then be differentiated in turn.
    h, th, policy, q = attach(method, problem, h, c, accuracy, probe)
    chain = bellman.chain(problem, policy)
    dprobe = None if dprobe is None else _tree.given(dprobe)
    dq = _explicit(problem, change, h + c[None])
    dth = problem.regulariser._conjugate_tangent(policy, q + c[None, None], dq, change.regulariser)
    dh = linear.solve(chain, jnp.broadcast_to(dth, h.shape), accuracy, dprobe, method)
    ahead = problem.discount[None, None] * problem.transitions._expect(dh)
    dq = ahead if dq is None else dq + ahead
    dpolicy = jnp.broadcast_to(problem.regulariser._policy_tangent(policy, dq, change.regulariser), policy.shape)
    # dT V = dV at the fixed point.
    return (h, th, policy, q), (dh, dh, dpolicy, jnp.broadcast_to(dq, q.shape))


def _explicit(problem: bellman.Lanes, change: bellman.Lanes, v: Array) -> Array | None:
    """Change of `r + g P v` at fixed v, `[A, S, *B]`; None if nothing in it changes."""
    terms = []
    if (dr := _tree.given(change.reward)) is not None:
        terms.append(dr)
    if (dg := _tree.given(change.discount)) is not None:
        terms.append(dg[None, None] * problem.transitions._expect(v))
    if (dpv := problem.transitions._expect_tangent(change.transitions, v)) is not None:
        terms.append(problem.discount[None, None] * dpv)
    return functools.reduce(jnp.add, terms) if terms else None


attach.defjvp(_attach_jvp, symbolic_zeros=True)
