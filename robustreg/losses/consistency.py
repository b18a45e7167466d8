r"""Residuals and losses that vanish at a regularised optimum: path consistency, and Fenchel and Young's inequality.

**Path consistency.** With `Delta_r` the worst case of the policy, a policy and a value are optimal exactly where

    r(s, a) + g E V(s') - Delta_r(s, a; pi) - V(s)  =  0        for every state and action that the prior allows

(<= 0 outside the support of the policy, for alpha > 1), and so for every sum along a path [Nachum et al. 2017 for
KL; Chow et al. 2018 for alpha = 2; Brekelmans et al. 2022]: once the adversary has taken its share, the agent is
indifferent. `consistency_residual` is the left side, `consistency_loss` half its square.

**Fenchel and Young.** `Omega*(q) + Omega(t) - <t, q> >= 0`, and 0 exactly where the target t is `argmax(q)`
[Blondel et al. 2020]: by how much t's guaranteed one-step return falls short of the best. Its gradient in q is
`argmax(q) - t`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustreg._core import checks, loops, pytrees
from robustreg.losses.samples import common, expect_alike, reduced, silenced
from robustreg.regularisers import actions, axes
from robustreg.regularisers.regulariser import Regulariser

# ---- path consistency


def consistency_residual(
    reg: Regulariser,
    *,
    value: ArrayLike,
    next_value: ArrayLike,
    reward: ArrayLike,
    discount: ArrayLike,
    log_policy: ArrayLike | None = None,
    action: ArrayLike | None = None,
    perturbation: ArrayLike | None = None,
    steps: int | None = 1,
) -> Array:
    """Compute the residual of path consistency of sampled transitions: 0 at the regularised optimum.

    Args:
        reg: the regulariser, whose batch axes lead; a prior per state has to be that of the sampled states.
        value: `V(s)`, `[*B]`, in reward units; `[*B, T]` along paths.
        next_value: `V(s')`, likewise, of where the transitions lead.
        reward: `r(s, a)`, likewise.
        discount: a number, or one of every transition, likewise: 0 where the episode ends there, and for padding.
        log_policy: `log pi(.|s)`, `[*B, A]`. Without `action` every action counts, in arrays `[*B, A]` of rewards and
            next values, with `value` `[*B]` and `steps` 1.
        action: which actions were taken, `[*B]` integers.
        perturbation: `Delta_r` of the actions taken instead of log_policy, `[*B]`: see `sampled_worst_case`, which
            makes it of their log-ratios.
        steps: the number of steps n of a residual; the time is then the last axis of all arrays, and windows end with
            the path. None: to the end of the path, as with a reward-to-go.

    Returns:
        `r + g V(s') - Delta_r - V(s)`, `[*B]` (`[*B, A]` without `action`), and with n steps from s_t
        `sum_{i<n} g^i (r - Delta_r)_{t+i} + g^n V(s_{t+n}) - V(s_t)`, in reward units
        [Nachum et al. 2017; Brekelmans et al. 2022].

    Raises:
        TypeError: no regulariser; actions that are no integers.
        ValueError: both or none of `log_policy` and `perturbation`; shapes that do not fit; steps below 1.
    """
    arrays = {"value": value, "next_value": next_value, "reward": reward, "discount": discount}
    return _consistency(reg, arrays, log_policy, action, perturbation, steps, None)[0]


def consistency_loss(
    reg: Regulariser,
    *,
    value: ArrayLike,
    next_value: ArrayLike,
    reward: ArrayLike,
    discount: ArrayLike,
    log_policy: ArrayLike | None = None,
    action: ArrayLike | None = None,
    perturbation: ArrayLike | None = None,
    steps: int | None = 1,
    weights: ArrayLike | None = None,
) -> Array:
    """Compute half the square of `consistency_residual`, whose arguments these are [Nachum et al. 2017].

    For alpha > 1 an action outside the support may have a negative residual at the optimum; weigh such transitions
    with 0, or take actions from the policy.

    Args:
        reg, value, next_value, reward, discount, log_policy, action, perturbation, steps: as there.
        weights: None, or of the residuals, broadcastable to them: see the module.

    Returns:
        The loss of every transition, or their weighted mean, in squared reward units.

    Raises:
        TypeError, ValueError: as there.
    """
    arrays = {"value": value, "next_value": next_value, "reward": reward, "discount": discount}
    residual, weight = _consistency(reg, arrays, log_policy, action, perturbation, steps, weights)
    return reduced(0.5 * residual**2, weight)


def _consistency(
    reg: Regulariser, given: dict[str, Any], logs: Any, action: Any, perturbation: Any, steps: int | None, weights: Any
) -> tuple[Array, Array | None]:
    """Compute residuals, and their weights in the same shape."""
    checks.expect_type(reg, Regulariser, "first argument", "kl")
    if (logs is None) == (perturbation is None):
        raise ValueError("give log_policy, or the perturbation of the actions taken, one of the two")
    given = {**given, "log_policy": logs, "perturbation": perturbation, "weights": weights}
    *arrays, logs, taken, weight = common("log_policy", "perturbation", "weights", **given)
    every = action is None and taken is None
    if every and (steps != 1 or jnp.ndim(logs) == 0):
        raise ValueError("without actions expected log_policy [*B, A] and steps=1; along a path, pass action=")
    if every:
        arrays[0] = arrays[0][..., None]
    rows: Any = taken if logs is None else logs
    shape = rows.shape if every or logs is None else rows.shape[:-1]
    named = dict(zip(given, arrays), perturbation=taken, weights=weight)
    value, ahead, reward, discount, taken, weight = expect_alike(shape, "the shape of the transitions", **named)
    (value,) = silenced(weight, value)
    if steps == 1:  # longer windows may pass where none begins
        ahead, reward, discount, taken = silenced(weight, ahead, reward, discount, taken)
        logs = logs if logs is None else _silenced_rows(weight, logs, every)
    if logs is not None:
        taken = reg.worst_case(log_policy=logs, action=action)
    return _telescoped(reward - taken, discount, ahead, steps) - value, weight


def _silenced_rows(weight: Array | None, logs: Array, every: bool) -> Array:
    """Log-policies of states, 0 in those of which nothing has weight; `every`: weights are those of all actions."""
    if weight is None:
        return logs
    return jnp.where(jnp.all(weight == 0, axis=-1, keepdims=True) if every else weight[..., None] == 0, 0, logs)


def _telescoped(reward: Array, discount: Array, ahead: Array, steps: int | None) -> Array:
    """Return of n steps from every one of `[..., T]`, and the value where they lead; None: of all that are left."""
    if steps == 1:
        return reward + discount * ahead
    if reward.ndim == 0:
        raise ValueError("a residual of several steps needs the time as the last axis of its arrays, got scalars")
    first = [jnp.moveaxis(x, -1, 0) for x in (reward, discount, ahead)]
    if steps is None:
        back: Any = lambda later, x: (x[0] + x[1] * later,) * 2  # noqa: E731
        return jnp.moveaxis(loops.scan(back, first[2][-1], tuple(x[::-1] for x in first[:2]))[1][::-1], 0, -1)

    def longer(later: Array, _: Array) -> tuple[Array, None]:
        # A window that would pass the end of the path stops there.
        return first[0] + first[1] * jnp.concatenate([later[1:], first[2][-1:]]), None

    start = first[0] + first[1] * first[2]
    return jnp.moveaxis(loops.scan(longer, start, jnp.arange(checks.count("steps", steps) - 1), first)[0], 0, -1)


# ---- Fenchel and Young


def fenchel_young(reg: Regulariser, q: ArrayLike, target: ArrayLike, *, weights: ArrayLike | None = None) -> Array:
    """Compute the Fenchel-Young loss of action values, or scores, against a target policy.

    For KL with a uniform prior and a target that is one action it is the cross entropy of `softmax(beta q)` over beta.

    Args:
        reg: the regulariser, whose batch axes lead.
        q: action values, `[*B, ..., A]`, in reward units; entries of masked actions are ignored.
        target: distributions, `[*B, ..., A]`, or actions, `[*B, ...]` integers. No action that the prior masks.
        weights: None, or of the rows, broadcastable to `[*B, ...]`: see the module.

    Returns:
        `Omega*(q) + Omega(t) - <t, q>`, `[*B, ...]`, or the weighted mean, in reward units; never negative, 0 exactly
        where `argmax(q)` is the target [Blondel et al. 2020]. The gradient in q is `argmax(q) - t`. Infinite
        for a target that masked actions are part of and, with alpha <= 0, for one that omits an action.

    Raises:
        TypeError: no regulariser.
        ValueError: shapes that do not fit; numbers that no action has.
    """
    checks.expect_type(reg, Regulariser, "first argument", "kl")
    wanted = checks.array("target", target)
    numbers = jnp.issubdtype(wanted.dtype, jnp.integer)
    values, weight, t = common("weights", "target", q=q, weights=weights, target=None if numbers else wanted)
    if values.ndim == 0 or 0 in values.shape:
        raise ValueError(f"q has shape {list(values.shape)}; expected [*B, ..., A], none empty")
    place = axes.align(reg._leaves, values.shape, True).shape
    bound, x = reg._public(values, refuse=True, reduce=pytrees.LAST)
    if numbers:
        t = _one_hot(actions.checked("target", wanted, values.shape[:-1], x.shape[-1]), x)
    (t,) = expect_alike(values.shape, "the shape of q", target=t)
    (weight,) = expect_alike(x.shape[:-1], "one for each row", weights=weight)
    prior, t = jnp.broadcast_to(bound.log_prior, x.shape), jnp.broadcast_to(t.reshape(place), x.shape)
    return reduced(_fenchel_young(reg, prior, x, t, weight), weight)


def _one_hot(action: Array, like: Array) -> Array:
    """The policy that always takes an action; NaN where there is no such action."""
    there = (action >= 0) & (action < like.shape[-1])
    return jnp.where(there[..., None], jax.nn.one_hot(action, like.shape[-1], dtype=like.dtype), jnp.nan)


def _fenchel_young(reg: Regulariser, log_prior: Array, q: Array, target: Array, weight: Array | None) -> Array:
    """The loss of every row; one without weight is replaced by one of which the loss is 0."""
    q = jnp.where(jnp.isneginf(log_prior), 0, q)
    if weight is not None:
        silent = weight[..., None] == 0
        q, target = jnp.where(silent, 0, q), jnp.where(silent, lax.stop_gradient(jnp.exp(log_prior)), target)
    # (What the target never does may be worth anything.)
    excess = jnp.where((target == 0) & ~jnp.isfinite(q), 0, q - reg.conjugate(q)[..., None])
    loss = reg.value(target) - jnp.sum(target * excess, axis=-1)
    # Rounding alone makes it negative.
    return loss + lax.stop_gradient(jnp.maximum(-loss, 0))
