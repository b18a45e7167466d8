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
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import loops, pytrees, roots
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.divergences import Scales, weighted

# Bisection alone would need about 70 turns, for psi as for log p.
_MAX_TURNS = 90

# Of `noise`: errors met are below 4 (JS, sums of KL and alpha; priors to 1e-12, beta * range to 1e6).
_NOISE = 16.0


class Found(NamedTuple):
    """Hold what a search finds, from which another one nearby may begin.

    Attributes:
        value: the conjugate, `[...]`.
        policy: its maximiser, `[A, ...]`.
        psi: the root, `[...]`.
        logs: of the probabilities there, `[A, ...]`, minus infinity where there is none.
    """

    value: Array
    policy: Array
    psi: Array
    logs: Array


def nothing(q: Array, reduce: pytrees.Reducers) -> Found:
    """Return the start of a search of which nothing is known."""
    none = jnp.full(reduce.without_actions(q), jnp.inf, q.dtype)
    return Found(jnp.zeros_like(none), jnp.zeros_like(q), none, jnp.full_like(q, jnp.nan))


def maximiser(reg: Bound, q: Array) -> tuple[Array, Array]:
    """Compute `Omega*(q)`, `[...]`, and the policy that attains it, `[A, ...]`.

    Args:
        reg: with `marginal` and `value`, the second of p that need not sum to 1, of which the first is the derivative.
        q: `[A, ...]`; entries of masked actions are never looked at.
    """
    found = search(reg, q, nothing(q, reg.reduce))
    return found.value, found.policy


def search(reg: Bound, q: Array, near: Found) -> Found:
    """Do what `maximiser` does, from what was found for a regulariser much like it."""
    reduce = reg.reduce
    masked = jnp.broadcast_to(jnp.isneginf(reg.log_prior), q.shape)
    best = reduce.largest(jnp.where(masked, -jnp.inf, q))
    gap = jnp.where(masked, 0, reduce.over(best) - q)

    def top(marginal: Array) -> Array:
        return reduce.largest(jnp.where(masked, -jnp.inf, -gap - marginal))

    reference = jnp.broadcast_to(jax.nn.log_softmax(reg.log_prior, axis=reduce.axis), q.shape)
    if reg.log_prior.shape[reduce.axis] == 1:  # one number stands for every action
        reference = jnp.full_like(q, -math.log(q.shape[reduce.axis]))
    reference = jnp.where(masked, 0, reference)
    # (One after the other they would be compiled three times.)
    at_floor, at_one, at_reference = jax.vmap(reg.marginal)(
        jnp.stack([jnp.full_like(q, _floor(q.dtype)), jnp.zeros_like(q), reference])
    )
    ends, low, high = (at_floor, at_one), top(at_one), top(at_reference)
    find = functools.partial(_logs, reg, gap, masked, ends)
    hopeless = ~(jnp.isfinite(low) & jnp.isfinite(high))

    def measure(psi: Array, last: _Place) -> tuple[Array, Array, _Place]:
        logs = find(psi, last.logs)
        policy = jnp.exp(logs)
        total, w = reduce.total(policy), reg.yields(policy)
        return -jnp.log(total), reduce.total(w) / total, _Place(psi, logs, w)

    def keep(done: Array, old: _Place, new: _Place) -> _Place:
        return _Place(*(jnp.where(on, a, b) for on, a, b in zip((done, *2 * (reduce.over(done),)), old, new)))

    unit, rough = float(jnp.finfo(q.dtype).eps), jnp.broadcast_to(reg.roughness, best.shape)
    start, logs = jnp.clip(near.psi, low, high), jnp.where(jnp.isnan(near.logs), reference, near.logs)
    psi, logs, w = roots.newton(
        measure,
        start,
        low,
        high,
        close=4 * unit,
        near=lambda psi: unit * (jnp.abs(psi) + 2 * rough),
        turns=_MAX_TURNS,
        hopeless=hopeless,
        carried=_Place(start, logs, jnp.zeros_like(logs)),
        keep=keep,
        like=(reg, gap, near),
    ).carried
    policy = jnp.exp(logs)
    total = reduce.total(policy)
    loss = weighted(policy, gap, reduce.total) + reg.value(policy) - psi * (1 - total)
    policy = _whole(reg, policy, w, gap, psi, find)
    value = jnp.where(hopeless, jnp.nan, best - loss)
    return Found(value, jnp.where(reduce.over(hopeless), jnp.nan, policy), psi, logs)


class _Place(NamedTuple):
    """A psi, what each action's `log p` is there, and `dp/dm`."""

    psi: Array
    logs: Array
    w: Array


def _whole(reg: Bound, policy: Array, w: Array, gap: Array, psi: Array, find: Callable[[Array, Array], Array]) -> Array:
    """The maximiser, with sum 1, from the probabilities at the root, `[A, ...]`."""
    reduce, unit = reg.reduce, float(jnp.finfo(policy.dtype).eps)
    total = reduce.total(policy)
    # One Newton step in policy space: the error of psi moves mass in proportion to dp/dm.
    spread = reduce.total(w)
    moved = jnp.maximum(policy + reduce.over((1 - total) / jnp.where(spread == 0, 1, spread)) * w, 0)
    off, flat = jnp.abs(total - 1), jnp.any((w == 0) & (policy > unit), axis=reduce.axis)
    resolved = (off <= 4 * unit) | ((off < unit**0.5) & ~flat & jnp.all(jnp.isfinite(moved), axis=reduce.axis))

    def between() -> Array:
        """Mix both sides of psi: where a slope is flat to rounding, p jumps from one psi to the next."""
        # (Right on a flat, any p will do for `find`; a little beyond, its end, if one comes from that side.)
        beyond = 4 * unit * (jnp.abs(psi) + reduce.largest(gap) + 1 / reg.beta)
        sides = jnp.stack([psi - beyond, psi + beyond])
        starts = jnp.stack([jnp.zeros_like(gap), jnp.full_like(gap, 0.5 * _floor(gap.dtype))])
        many, few = jnp.exp(lax.map(lambda side: find(*side), (sides, starts)))
        excess, short = reduce.total(many) - 1, 1 - reduce.total(few)
        share = jnp.clip(short / jnp.where(excess + short > 0, excess + short, 1), 0, 1)
        return jnp.where(reduce.over(resolved), moved, few + reduce.over(share) * (many - few))

    policy = loops.cond(jnp.all(resolved), lambda: moved, between)
    return policy / reduce.over(reduce.total(policy))


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
        over = m - ends[0]
        # Of a power of p, `log(m - m(0))` is a line in log p, on which Newton's step ends at the root; a logarithm of p
        # is a line itself.
        power = (rate > 0.1 * over) & (over > 0)
        share = jnp.where(power, (m - target) / jnp.where(power, over, 1), 0)
        bent = power & (jnp.abs(share) > 1e-3) & (share < 1)
        share = jnp.where(bent, share, 0.5)
        return m - target, rate * jnp.where(bent, -share / jnp.log1p(-share), 1), None

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
