r"""Preferences: policies fitted to comparisons of answers, through the reward that they imply.

At a regularised optimum the reward is `f'(p/p0)/beta` up to a constant per state, with the generator f of the
divergence, so that a policy can be fitted to preferences between rewards without any reward model [Rafailov 2023; Wang
et al. 2023]. With `L = log(p/p0)` and `h = alpha - 1`,

    margin  =  ( eps_h(L_chosen) - eps_h(L_rejected) )/beta  =  Delta_r(chosen) - Delta_r(rejected),

where `eps_h(L) = (e^{hL} - 1)/h` is L itself for KL (DPO), and where links of several regularisers add up (chi-PO). The
difference of two implicit rewards is that of two worst cases: the policy is fitted to the adversary that it implies.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustreg._core import checks
from robustreg.losses.samples import common, expect_alike, order_and_strength, reduced, silenced
from robustreg.regularisers.regulariser import Regulariser
from robustreg.regularisers.worst_cases import tilt


def implicit_reward(reg: Regulariser, log_ratio: ArrayLike) -> Array:
    """Compute the reward that a policy implies, up to a constant in every state: `f'(p/p0)/beta`.

    It is the link between policy and reward at a regularised optimum [Rafailov 2023, eq. 5; Wang et al. 2023],
    and differs from the worst case of the policy by the constant `h D/beta`, which a difference of two does not see.

    Args:
        reg: `kl` or `alpha`; its prior does not matter, log-ratios are relative to it. Its batch axes lead.
        log_ratio: `log(p/p0)` of actions, or of whole answers, `[*B, ...]`; minus infinity where p is 0.

    Returns:
        `eps_h(log_ratio)/beta`, `[*B, ...]`, in reward units, of the dtype of the log-ratios, float32 at least:
        `log_ratio/beta` for KL, `(p/p0 - 1)/beta` for alpha = 2.

    Raises:
        TypeError: another regulariser.
        ValueError: axes that do not fit.
    """
    (ratio,) = common(log_ratio=log_ratio)
    order, beta = order_and_strength(reg, ratio.shape)
    order, beta = order.astype(ratio.dtype), beta.astype(ratio.dtype)
    return tilt(ratio, jnp.zeros_like(ratio), order - 1) / beta


def log_ratio(log_prob: ArrayLike, reference: ArrayLike, *, mask: ArrayLike | None = None) -> Array:
    """Compute the log-ratio `log(p/p0)` of sequences, from log-probabilities of their tokens or of the whole.

    Args:
        log_prob: of the policy, `[*B]` of whole sequences, or `[*B, T]` of tokens, with a mask.
        reference: of the reference policy, likewise; no derivative is taken of it.
        mask: None, or which tokens count, `[*B, T]` (true, or 1): the answer's, without prompt and padding, where
            log-probabilities may be anything.

    Returns:
        `[*B]`: the difference, with a mask its sum over tokens, in float32 at least.

    Raises:
        ValueError: shapes that do not fit.
    """
    logs, base, counted = common("mask", log_prob=log_prob, reference=reference, mask=mask)
    logs, base, counted = expect_alike(logs.shape, "the shape of log_prob", log_prob=logs, reference=base, mask=counted)
    base = lax.stop_gradient(base)
    if counted is None:
        return logs - base
    if counted.ndim == 0:
        raise ValueError("log_prob is a scalar; with a mask expected [*B, T], an entry for each token")
    logs, base = (jnp.where(counted != 0, x, 0) for x in (logs, base))
    return jnp.sum(logs - base, axis=-1)


def dpo(
    reg: Regulariser | tuple[Regulariser, ...],
    chosen: ArrayLike,
    rejected: ArrayLike,
    *,
    label_smoothing: ArrayLike = 0.0,
    clip: float | None = None,
    weights: ArrayLike | None = None,
) -> Array:
    """Compute the loss of direct preference optimisation, for KL and for every other divergence of the library.

    The margin of a pair is the difference of the implicit rewards of the two answers, which is that of the worst cases
    of the policy. `sampled_worst_case`, `sampled_slack` and `sampled_critical_beta` take the same log-ratios.

    Args:
        reg: `kl(beta)` is DPO, whose coefficient of KL is `1/beta` [Rafailov 2023, eq. 7]; `alpha(alpha, beta)` is
            f-DPO [Wang et al. 2023]; of several the links add up: `(kl(b), alpha(2.0, b))` is chi-PO, with the
            link `log z + z` [Huang et al. 2024]. Priors do not matter.
        chosen, rejected: log-ratios of the answers preferred and not, `[*B]`: see `log_ratio`.
        label_smoothing: share of preferences that are the wrong way round, below 1/2, `[*B]` (conservative DPO).
        clip: None, or the largest margin that counts, in reward units: `2 R` in chi-PO.
        weights: None, or of the pairs, `[*B]`: see the module.

    Returns:
        `-(1-e) log sigmoid(margin) - e log sigmoid(-margin)`, `[*B]`, or the weighted mean, without units. Where a link
        overflows (`(p/p0)^h` beyond the largest number) in both answers, only a clip can tell which margin it is: NaN.

    Raises:
        TypeError: another regulariser.
        ValueError: shapes that do not fit; a label smoothing or clip out of range.
    """
    margin, weight, smoothing = _margin(reg, chosen, rejected, clip, weights, label_smoothing)
    loss = jax.nn.softplus(-margin)
    return reduced(loss + jnp.where(smoothing == 0, 0, smoothing * margin), weight)


def ipo(
    reg: Regulariser | tuple[Regulariser, ...],
    chosen: ArrayLike,
    rejected: ArrayLike,
    *,
    weights: ArrayLike | None = None,
) -> Array:
    """Compute the loss of identity preference optimisation: margins are fitted to 1/2 instead of made large.

    Args:
        reg, chosen, rejected, weights: as in `dpo`.

    Returns:
        `(margin - 1/2)^2`, `[*B]`, or the weighted mean. For KL it is that of [Azar et al. 2023], with tau =
        `1/beta`, times tau squared.

    Raises:
        TypeError: another regulariser.
        ValueError: shapes that do not fit.
    """
    margin, weight, _ = _margin(reg, chosen, rejected, None, weights, 0.0)
    return reduced((margin - 0.5) ** 2, weight)


def _margin(
    reg: Any, chosen: ArrayLike, rejected: ArrayLike, clip: float | None, weights: Any, smoothing: ArrayLike
) -> tuple[Array, Array | None, Array]:
    """Differences of implicit rewards, weights and label smoothing, in one shape."""
    parts = tuple(reg) if isinstance(reg, list | tuple) else (reg,)
    if not parts:
        raise ValueError("the first argument holds no regulariser; pass one, or several whose links add up")
    checks.require("label_smoothing", smoothing, lambda e: (e >= 0) & (e < 0.5), "a share of 0 or more, below 1/2")
    given = {"chosen": chosen, "rejected": rejected, "weights": weights, "label_smoothing": smoothing}
    best, worst, weight, share = common("weights", **given)
    worst, weight, share = expect_alike(
        best.shape, "the shape of chosen", rejected=worst, weights=weight, label_smoothing=share
    )
    best, worst = silenced(weight, best, worst)
    margins = [_difference(part, best, worst, clip is not None) for part in parts]
    margin = functools.reduce(jnp.add, margins)
    if clip is not None:
        checks.require("clip", clip, lambda c: c > 0, "the largest margin that counts is positive")
        margin = jnp.clip(margin, -clip, clip)
    return margin, weight, share


def _difference(reg: Regulariser, best: Array, worst: Array, ordered: bool) -> Array:
    """Difference of two implicit rewards; `ordered`: infinite, and not unknown, where both are beyond all numbers."""
    high, low = implicit_reward(reg, best), implicit_reward(reg, worst)
    if not ordered:
        return high - low
    alike = jnp.isinf(high) & (high == low)
    order = jnp.where(best == worst, 0, jnp.where(best > worst, jnp.inf, -jnp.inf))
    return jnp.where(alike, order, jnp.where(alike, 0, high) - jnp.where(alike, 0, low))
