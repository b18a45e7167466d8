r"""The maximiser of any regulariser that is a sum over actions, from its marginal alone.

    Omega(p) = sum_a phi_a(p_a),    m_a = phi_a'  increasing          (`Bound.marginal`, of log p)

The best p has `m_a(p_a) = q_a - psi` wherever that has a solution `p_a > 0`, and `p_a = 0` elsewhere, with the one
`psi` for which `sum p = 1`. So it is two searches, one inside the other:

* *for a given psi*, each action's `u = log p`: Newton's method on m, kept in a bracket by bisection; an action whose
  marginal is above `q_a - psi` even at a probability of 1e-154 (1e-19 in float32) gets 0;
* *for psi*, Newton's method on `F = log sum p`, `dF/dpsi = -sum w / sum p` with `w = dp/dm`, in the bracket

      max_a q_a - m_a(1)  <=  psi  <=  max_a q_a - m_a(p0_a),

  for at its left end one action alone has probability 1, and at its right end none has more than a distribution p0.

Where a marginal is flat, p jumps from one psi to the next: then both sides of the jump are mixed so that `sum p = 1`.

**Value.** The dual function at psi, `psi + sum_a max_p [p (q_a - psi) - phi_a(p)]`, of which psi is the minimum: a root
that errs by x costs `x^2`, and an error of p as little.

**Cost.** Some 6 turns for psi of 2 to 4 evaluations of the marginal and its derivative each; `conjugates` has what is
faster for the families that it knows.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import loops, roots
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.divergences import Scales, weighted

# Bisection alone would need about 70 turns, for psi as for log p.
_MAX_TURNS = 90

# Of `noise`: errors met are below 4 (JS, sums of KL and alpha; priors to 1e-12, beta * range to 1e6).
_NOISE = 16.0


def maximiser(reg: Bound, q: Array) -> tuple[Array, Array]:
    """Compute `Omega*(q)`, `[...]`, and the policy that attains it, `[A, ...]`.

    Args:
        reg: with `marginal` and `value`, the second of p that need not sum to 1, of which the first is the derivative.
        q: `[A, ...]`; entries of masked actions are never looked at.
    """
    reduce = reg.reduce
    masked = jnp.broadcast_to(jnp.isneginf(reg.log_prior), q.shape)
    best = reduce.largest(jnp.where(masked, -jnp.inf, q))
    gap = jnp.where(masked, 0, reduce.over(best) - q)

    def top(marginal: Array) -> Array:
        return reduce.largest(jnp.where(masked, -jnp.inf, -gap - marginal))

    reference = jnp.broadcast_to(jax.nn.log_softmax(reg.log_prior, axis=reduce.axis), q.shape)
    if reg.log_prior.shape[reduce.axis] == 1:  # one number stands for every action
        reference = jnp.full_like(q, -math.log(q.shape[reduce.axis]))
    ends = reg.marginal(jnp.full_like(q, _floor(q.dtype))), reg.marginal(jnp.zeros_like(q))
    low, high = top(ends[1]), top(reg.marginal(jnp.where(masked, 0, reference)))
    find = functools.partial(_logs, reg, gap, masked, ends)
    hopeless = ~(jnp.isfinite(low) & jnp.isfinite(high))

    def measure(psi: Array, logs: Array) -> tuple[Array, Array, Array]:
        logs = find(psi, logs)
        policy = jnp.exp(logs)
        total = reduce.total(policy)
        return -jnp.log(total), reduce.total(reg.yields(policy)) / total, logs

    unit, rough = float(jnp.finfo(q.dtype).eps), jnp.broadcast_to(reg.roughness, best.shape)
    end = roots.newton(
        measure,
        high,
        low,
        high,
        close=4 * unit,
        near=lambda psi: unit * (jnp.abs(psi) + 2 * rough),
        turns=_MAX_TURNS,
        hopeless=hopeless,
        carried=jnp.where(masked, 0, reference),
        like=(reg, gap),
    )
    policy = jnp.exp(find(end.x, end.carried))
    total = reduce.total(policy)
    loss = weighted(policy, gap, reduce.total) + reg.value(policy) - end.x * (1 - total)
    # One Newton step in policy space: the error of psi moves mass in proportion to dp/dm.
    w = reg.yields(policy)
    spread = reduce.total(w)
    near = jnp.maximum(policy + reduce.over((1 - total) / jnp.where(spread == 0, 1, spread)) * w, 0)

    def between() -> Array:
        """Mix both sides of psi: where a slope is flat to rounding, p jumps from one psi to the next."""
        # (Right on a flat, any p will do for `find`; a little beyond, its end, if one comes from that side.)
        beyond = 4 * unit * (jnp.abs(end.x) + reduce.largest(gap) + 1 / reg.beta)
        sides = jnp.stack([end.x - beyond, end.x + beyond])
        starts = jnp.stack([jnp.zeros_like(gap), jnp.full_like(gap, 0.5 * _floor(q.dtype))])
        many, few = jnp.exp(lax.map(lambda side: find(*side), (sides, starts)))
        excess, short = reduce.total(many) - 1, 1 - reduce.total(few)
        share = jnp.clip(short / jnp.where(excess + short > 0, excess + short, 1), 0, 1)
        return jnp.where(resolved, near, few + reduce.over(share) * (many - few))

    off, flat = jnp.abs(total - 1), jnp.any((w == 0) & (policy > unit), axis=reduce.axis)
    resolved = (off <= 4 * unit) | ((off < unit**0.5) & ~flat & jnp.all(jnp.isfinite(near), axis=reduce.axis))
    resolved = reduce.over(resolved)
    policy = loops.cond(jnp.all(resolved), lambda: near, between)
    policy = policy / reduce.over(reduce.total(policy))
    return jnp.where(hopeless, jnp.nan, best - loss), jnp.where(reduce.over(hopeless), jnp.nan, policy)


def _logs(reg: Bound, gap: Array, masked: Array, ends: tuple[Array, Array], psi: Array, start: Array) -> Array:
    """`log p` with `m(p) = -gap - psi`, `[A, ...]`, from a guess; minus infinity where there is none, or masked.

    `ends` are the marginals at the least probability that counts, and at 1.
    """
    rough = jnp.broadcast_to(reg.roughness, psi.shape)
    unit, floor = float(jnp.finfo(gap.dtype).eps), _floor(gap.dtype)
    target = -gap - reg.reduce.over(psi)
    absent, full = masked | (ends[0] >= target), ends[1] <= target
    ones = jnp.ones_like(gap)

    def measure(u: Array, _: None) -> tuple[Array, Array, None]:
        m, rate = jax.jvp(reg.marginal, (u,), (ones,))
        return m - target, rate, None

    u = roots.newton(
        measure,
        jnp.where(jnp.isfinite(start), jnp.clip(start, floor, 0), 0.5 * floor),
        jnp.full_like(gap, floor),
        jnp.zeros_like(gap),
        close=2 * unit * reg.reduce.over(rough),
        near=lambda u: unit * (1 + jnp.abs(u)),
        turns=_MAX_TURNS,
        hopeless=absent | full | jnp.isnan(target),
        like=(reg, gap, psi),
    ).x
    return jnp.where(absent, -jnp.inf, jnp.where(full, 0, u))


def _floor(dtype: np.dtype) -> float:
    """Least logarithm of a probability that counts: the square of its inverse, in second derivatives, is a number."""
    return 0.5 * math.log(float(jnp.finfo(dtype).tiny))


def noise(scales: Scales, parts: int = 1) -> Array:
    """Bound the rounding of `maximiser`'s value, in units of u and of rewards, `[*b]`.

    Every `phi_a` is taken to err by a few u of the numbers that it is made of, which are of the size of 1/beta and of
    what the regulariser takes off; `p/p0` errs by u times its logarithms.
    """
    return _NOISE * parts * (scales.logs + scales.log_prior) * (scales.temperature + scales.cost)
