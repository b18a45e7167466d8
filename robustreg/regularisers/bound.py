"""A regulariser in the axes that solvers compute in, and the maximum over policies that everything rests on.

What users hold is a `Regulariser`: leaves with batch axes in front. `Regulariser.bind` makes a `Bound` of it, whose
leaves broadcast against arrays with actions on one axis, `[A, S, *B]` in a solve. That is what solvers, adversaries and
certificates compute with.

A family of regularisers gives three functions of one state's action distribution, and a number that says how far
rounding goes (`noise`); all else follows here:

    value(p)         Omega(p)
    maximiser(q)     max_p <p, q> - Omega(p)  over normalised p, and the p that does it
    marginal(log p)  m(p) = dOmega/dp, of any extension of Omega to p that need not sum to 1

**Worst case.** `dr = m - <p, m> + Omega(p)` is the perturbation in the robust set that costs p the most: its mean is
Omega(p), and any other policy p' has `Omega(p') >= Omega(p) + <p' - p, m> = <p', dr>` [Brekelmans et al. 2022].

**Tangents.** With `w = dp/dm` (m is one function of each p: Omega is a sum over actions) and any change of q and of the
regulariser's own leaves,

    d Omega*  =  <p, dq> - d_leaves Omega(p)                          (envelope theorem)
    d p       =  t - w (sum t)/(sum w),    t = w (dq - d_leaves m)    (m(p) = q - psi, and sum p = 1 gives dpsi).

A family whose maximiser is no function of that kind, or that knows something better, says so itself.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from robustreg._core import pytrees
from robustreg.regularisers import actions, conjugates
from robustreg.regularisers.divergences import Scales, weighted


class Bound:
    """Base of all bound regularisers: functions of arrays with actions on the axis of `reduce`, `[A, ...]`.

    Attributes:
        beta: inverse strength, broadcastable to `[...]`.
        log_prior: logarithm of the reference policy, broadcastable to `[A, ...]`; minus infinity masks an action.
        reduce: how it sums over actions, and which axis they are on.
        has_reference: whether the cost is that of leaving a distribution, and 0 there.
    """

    beta: Array
    log_prior: Array
    reduce = pytrees.LANES
    has_reference = True

    def value(self, policy: Array) -> Array:
        """Compute `Omega(p)`, `[...]`, of normalised policies `[A, ...]`."""
        raise TypeError(f"{type(self).__name__} does not define value")

    def maximiser(self, q: Array) -> tuple[Array, Array]:
        """Compute `Omega*(q)`, `[...]`, and the policy that attains it, `[A, ...]`; see `maximise`."""
        raise TypeError(f"{type(self).__name__} does not define maximiser")

    def marginal(self, log_policy: Array) -> Array:
        """Compute the derivative of Omega in each probability, in reward units, `[A, ...]`."""
        raise TypeError(f"{type(self).__name__} does not define marginal")

    def noise(self, scales: Scales) -> Array:
        """Bound the rounding of the conjugate, in units of u and of rewards, `[*b]`.

        Here that of a given policy's cost: near the prior `D ~ L^2/2` errs by some `u |L|`, `L = log(p/p0)`.
        """
        return 2 * scales.logs * jnp.minimum(scales.temperature, jnp.sqrt(2 * scales.cost * scales.temperature))

    def value_error(self, policy: Array) -> Array:
        """Bound the rounding of `value` at any policy, in reward units, `[...]`."""
        return 4 * jnp.finfo(policy.dtype).eps * (2 + float(np.log(policy.shape[0]))) / self.beta

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the leaves without actions, which broadcast to `[...]`."""
        return (self.beta.shape,)

    def conjugate(self, q: Array) -> Array:
        """Compute `Omega*(q)`, `[...]`."""
        return maximise(self, q)[0]

    def guess(self, q: Array) -> Array:
        """Estimate `Omega*(q)`, `[...]`, at little cost: by KL's, without a root to find."""
        return conjugates.kl_maximiser(q, self.beta, self.log_prior, self.reduce)[0]

    def argmax(self, q: Array) -> Array:
        """Find the policy that attains it, `[A, ...]`."""
        return maximise(self, q)[1]

    def log_argmax(self, q: Array) -> Array:
        """Find its logarithm, `[A, ...]`."""
        return self.log_policy(maximise(self, q)[1], q)

    def log_policy(self, policy: Array, q: Array) -> Array:
        """Compute `log p` of the maximiser `policy` for `q`, `[A, ...]`; here to what a probability can hold."""
        return jnp.where(policy == 0, -jnp.inf, jnp.log(jnp.where(policy == 0, 1, policy)))

    def worst_case(self, policy: Array, action: Array | None = None) -> Array:
        """Find the perturbation in the robust set that costs `policy` the most, `[A, ...]`; 0 on masked actions.

        With `action`, an array of indices with an axis of 1 for actions, the entries of those alone.
        """
        logs = jnp.where(policy > 0, jnp.log(jnp.where(policy > 0, policy, 1)), -jnp.inf)
        return self.worst_case_of_logs(logs, action)

    def worst_case_of_logs(self, log_policy: Array, action: Array | None = None) -> Array:
        """Find it from log-probabilities."""
        policy = jnp.exp(log_policy)
        marginal = self.marginal(log_policy)
        offset = self.value(policy) - weighted(policy, marginal, self.reduce.total)
        absent = jnp.isneginf(self.log_prior) & (policy == 0)
        lost = jnp.isneginf(marginal)  # where the slope is infinite, it is kept, and not added to
        out = jnp.where(absent, 0, jnp.where(lost, marginal, marginal + self.reduce.over(offset)))
        return out if action is None else actions.take(out, action, self.reduce.axis)

    def needs_every_action(self) -> Array:
        """Tell whether never taking an allowed action costs infinitely much, broadcastable to `[...]`."""
        return jnp.zeros((), bool)

    @property
    def roughness(self) -> Array:
        """Size of numbers whose rounding a marginal has beside that of its own, broadcastable to `[...]`."""
        return jnp.zeros((), self.beta.dtype)

    def policy_change(self, dq: Array) -> Array:
        """Bound the change of the maximiser in the 1-norm where no action value changes by more than `dq`, `[*B]`."""
        return jnp.full_like(dq, 2)

    def largest_weight(self, reward: Array, gap: Array) -> Array:
        """Bound the probability of an action worth less than that of the largest `reward` by `gap`, all `[A, ...]`."""
        return jnp.ones_like(gap)

    def excess(self, q: Array, th: Array) -> Array:
        """Compute `max_a q - th`, `[...]`: how far values that are averaged lie apart."""
        return pytrees.largest(jnp.where(jnp.isneginf(self.log_prior), -jnp.inf, q)) - th

    def curvature(self, policy: Array) -> Array:
        """Compute `w/beta`: how far each probability moves with `beta q`, `[A, ...]`; 0 off the support."""
        return self.yields(policy) / self.reduce.over(self.beta)

    def rate(self, log_policy: Array) -> Array:
        """Compute `dm/dlog p`, `[A, ...]`."""
        return jax.jvp(self.marginal, (log_policy,), (jnp.ones_like(log_policy),))[1]

    def yields(self, policy: Array) -> Array:
        """Compute `w = dp/dm`: how far each probability moves with its action value, `[A, ...]`; 0 off the support."""
        on = policy != 0  # a policy of NaN has one of NaN
        logs = jnp.log(jnp.where(on, policy, 1))
        rate = self.rate(logs)
        # (Of a probability that hardly is one, the rate may be beyond all numbers.)
        known = on & (rate > 0) & jnp.isfinite(rate)
        return jnp.where(known, policy / jnp.where(known, rate, 1), jnp.where(jnp.isnan(policy), policy, 0))

    def conjugate_tangent(self, policy: Array, q: Array, dq: Array | None, change: Any) -> Array:
        """Compute the change of `Omega*(q)` at its maximiser, `[...]`; `change` is the regulariser's, leaf by leaf."""
        total = jnp.zeros((), policy.dtype) if dq is None else weighted(policy, dq, self.reduce.plain_sum)
        return total if _still(change) else total - self._explicit(change, lambda reg: reg.value(policy))

    def policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        """Compute the change of the maximiser, `[A, ...]`."""
        w = self.yields(policy)
        t = w * self.forces(policy, dq, change)
        return t - w * self.reduce.over(self.reduce.plain_sum(t) / self.reduce.plain_sum(w))

    def forces(self, policy: Array, dq: Array | None, change: Any) -> Array:
        """Compute `dq - d_leaves m`, `[A, ...]`: what moves a policy; 0 off its support."""
        on = policy != 0
        z = jnp.zeros_like(policy) if dq is None else dq
        if not _still(change):
            logs = jnp.log(jnp.where(on, policy, 1))
            z = z - self._explicit(change, lambda reg: reg.marginal(logs))
        return jnp.where(on, z, 0)

    def _explicit(self, change: Any, function: Any) -> Array:
        """Change of a function of the regulariser itself."""
        return jax.jvp(function, (self,), (pytrees.given_or_zero(change, self),))[1]

    def scaled(self, t: Array) -> Any:
        """Return the same at `t` times its beta."""
        return dataclasses.replace(self, beta=self.beta * t)  # type: ignore[type-var]  # all of them are dataclasses

    def with_reduce(self, reduce: pytrees.Reducers) -> Any:
        """Return the same with actions where `reduce` has them."""
        own = any(field.name == "reduce" for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return dataclasses.replace(self, reduce=reduce) if own else self  # type: ignore[type-var]

    def by_rows(self) -> Any:
        """Return the same, seeing each row of actions as a problem of its own, whatever the lanes."""
        return self.with_reduce(pytrees.ROWS)


def _still(change: Any) -> bool:
    """Whether nothing of a regulariser changes."""
    leaves = jax.tree.leaves(change, is_leaf=pytrees.is_symbolic_zero)
    return all(pytrees.given(leaf) is None for leaf in leaves)


@jax.custom_jvp
def maximise(reg: Bound, q: Array) -> tuple[Array, Array]:
    """Compute `Omega*(q)`, `[...]`, and its maximiser, `[A, ...]`, differentiable to any order.

    Nothing is differentiated through the search for the maximiser.
    """
    return reg.maximiser(q)


def _maximise_jvp(primals: tuple[Any, Array], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (reg, q), (change, dq) = primals, tangents
    value, policy = maximise(reg, q)
    dq = pytrees.given(dq)
    dvalue = jnp.broadcast_to(reg.conjugate_tangent(policy, q, dq, change), value.shape)
    return (value, policy), (dvalue, jnp.broadcast_to(reg.policy_tangent(policy, dq, change), policy.shape))


maximise.defjvp(_maximise_jvp, symbolic_zeros=True)
