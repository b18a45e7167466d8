"""Certified bounds on the optimum of a regularised occupancy, from any V.

Whatever V is, weak duality makes F(V) an upper bound, and a policy a lower one: the conditional of mu is
played, its own occupancy computed, and that pays its own cost. The errors of both are of second order in that of V. The
occupancy comes by elimination, every entry with a relative error of some S roundings, which is what bounds the error of
the divergence (`lower`); beyond 2,048 states its residual bounds the error.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from robustreg.regularisers import divergences
from robustreg.solvers import bellman, elimination, linear
from robustreg.solvers.joint_dual import Dual


def conditional(mu: Array, otherwise: Array) -> Array:
    """Take the policy of an occupancy `[A, S, *B]`, another one where a state is not visited."""
    visits = jnp.sum(mu, axis=0)
    seen = visits > float(jnp.finfo(mu.dtype).tiny) / float(jnp.finfo(mu.dtype).eps)
    return jnp.where(seen[None], mu / jnp.where(seen, visits, 1)[None], otherwise)


def bounds(problem: Dual, v: Array) -> tuple[Array, Array, Array]:
    """Bound the optimum from below and above, and what rounding adds to that, `[*B]` each."""
    unit, n_pairs = 0.5 * float(jnp.finfo(v.dtype).eps), math.prod(problem.kept.shape[:2])
    level, mu = problem.conjugate(v)
    logs = problem.regulariser.log_prior.reshape(mu.shape)
    size = jnp.max(jnp.abs(v), axis=0)
    reward = jnp.where(problem.kept, problem.reward, 0)
    largest, beta = jnp.max(jnp.abs(reward), axis=(0, 1)), problem.regulariser.beta[0]
    terms = 8 + problem.transitions.fan_out**0.5 * 4
    upper = problem.dual(v, level)
    span = jnp.max(jnp.abs(problem.perturbed(v)), axis=(0, 1))
    deepest = -jnp.min(jnp.where(problem.kept, logs, 0), axis=(0, 1))
    above = unit * (terms * size + 4 * largest + (4 + n_pairs**0.5) * jnp.minimum(span + jnp.abs(level), 4 * span))
    scales = divergences.Scales(
        unit=unit,
        logs=2 + float(np.log(n_pairs)),
        log_prior=deepest,
        temperature=1 / beta,
        cost=jnp.max(jnp.where(problem.kept, problem.perturbed(v), -jnp.inf), axis=(0, 1)) - level - problem.offset,
        reach=2 * span,
    )
    above = above + unit * (problem.regulariser.noise(scales) + 8 / beta + jnp.abs(problem.offset))

    inside = jnp.where(problem.kept, jnp.exp(logs), 0)
    policy = conditional(jnp.where(problem.kept, mu, 0), conditional(inside, jnp.full_like(mu, 1 / mu.shape[0])))
    own, relative = _own_occupancy(problem, policy)
    flat = own.reshape(-1, 1, *own.shape[2:])
    cost = problem.regulariser.value(flat)[0] + problem.offset
    # An entry that errs by a share moves <mu, r> - D/beta by that share of mu times its derivative.
    order = problem.regulariser.order
    order = jnp.broadcast_to(order, (1, *own.shape[2:]))[0]
    ratio = jnp.where(own > 0, jnp.log(jnp.where(own > 0, own, 1)) - jnp.where(problem.kept, logs, 0), 0)
    tilt = jnp.abs(divergences.deformed_exp(ratio, jnp.broadcast_to(order[None, None] - 1, ratio.shape))) + 2
    paid = jnp.sum(own * (jnp.abs(reward) + tilt / beta[None, None]), axis=(0, 1))
    below = 2 * relative * paid + problem.regulariser.value_error(flat)[0] + unit * (2 + n_pairs**0.5) * paid
    lower = jnp.sum(own * reward, axis=(0, 1)) - cost
    return lower - below, upper + above, above + below


def _own_occupancy(problem: Dual, policy: Array) -> tuple[Array, Array]:
    """A policy's own normalised occupancy, `[A, S, *B]`, and its relative error entry by entry, `[*B]`."""
    unit, n, batch = 0.5 * float(jnp.finfo(policy.dtype).eps), policy.shape[1], policy.shape[2:]
    rate = jnp.broadcast_to(problem.complement[None], policy.shape[1:])
    transitions, p, backwards = problem.transitions._induced(policy)
    longest = 1 / jnp.broadcast_to(problem.complement, problem.discount.shape)
    chain = bellman.Chain(transitions, p, problem.discount, rate, longest, backwards, False)
    start = problem.complement[None] * problem.initial
    if n <= elimination.STATES:
        matrix = chain.matrix().reshape(-1, n, n)
        right = jnp.moveaxis(start, 0, -1).reshape(-1, n, 1)
        exits = jnp.moveaxis(rate, 0, -1).reshape(-1, n)
        solve = functools.partial(elimination.solve, transpose=True)
        visits = jnp.moveaxis(jax.vmap(solve)(matrix, exits, right).reshape(*batch, n), -1, 0)
        error = jnp.full(batch, (4 * n + 16) * unit, policy.dtype)
    else:
        visits = linear.occupy(chain, start, jnp.zeros(batch, policy.dtype), linear.Method())
        visits = jnp.maximum(visits, 0)
        left = jnp.sum(jnp.abs(start - (visits - chain.transpose(visits))), axis=0) / jnp.min(rate, axis=0)
        least = jnp.min(jnp.where(jnp.any(problem.kept, axis=0) & (visits > 0), visits, jnp.inf), axis=0)
        error = (left + 8 * unit) / jnp.minimum(least, 1)
    return policy * visits[None], error
