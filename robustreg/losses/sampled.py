r"""The adversary of a batch: worst cases, robust sets and guarantees from samples, without an MDP.

All that a regulariser says of one state is said of the distribution of a pair under its reference p0: the log-ratio
`L = log(p/p0)` of the policy, and a perturbation dr. Samples stand for that distribution. Drawn from p0 they have equal
weights; drawn from the policy they have the weights `e^{-L}`, divided by their sum. With `h = alpha - 1`,

    worst case    Delta_r = (eps_h(L) - h D)/beta                         of every sample (L/beta for KL)
    divergence    D       = E_p[ (alpha + (1-alpha) e^{-L} - e^{hL}) / (alpha (1-alpha)) ]
    slack         -Omega*(dr), with the samples in the place of the actions and their weights in that of the prior
    guarantee     E_p[ return - Delta_r ]    (= E_p[return] - Omega(p), for E_p[Delta_r] = D/beta)

[Brekelmans et al. 2022, prop. 1]. No term of D is negative: for KL it is `L + e^{-L} - 1`. Axes: samples are on the
last one, everything before it is a problem of its own, such as a prompt with N answers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustreg.adversary import calibration, reach
from robustreg.adversary.perturbations import slack
from robustreg.losses.samples import common, expect_alike, leading, order_and_strength
from robustreg.regularisers.divergences import divergence_terms
from robustreg.regularisers.families import KL
from robustreg.regularisers.regulariser import Regulariser, Sum
from robustreg.regularisers.worst_cases import tilt


def sampled_worst_case(
    reg: Regulariser, log_ratio: ArrayLike, *, divergence: ArrayLike | None = None, weights: ArrayLike | None = None
) -> Array:
    """Compute the worst case of a policy at samples of its own, from their log-ratios.

    Args:
        reg: `kl` or `alpha`; its prior does not matter. Its batch axes lead.
        log_ratio: `log(p/p0)` of the samples, `[*B, ..., N]`.
        divergence: `D_alpha[p0 : p]` where it is known, `[*B, ...]`, `beta * reg.value(policy)` for example; None: it
            is estimated from the samples, which must then be drawn from the policy. KL needs none.
        weights: of the samples in that estimate, `[*B, ..., N]`; 0 leaves out padding.

    Returns:
        `Delta_r`, `[*B, ..., N]`, in reward units, to be subtracted from the reward [Brekelmans et al. 2022, prop. 1].

    Raises:
        TypeError: another regulariser.
        ValueError: axes that do not fit.
    """
    given = {"log_ratio": log_ratio, "divergence": divergence, "weights": weights}
    ratio, known, weight = common("divergence", "weights", **given)
    _expect_samples(ratio)
    order, beta = (x.astype(ratio.dtype) for x in order_and_strength(reg, ratio.shape))
    if isinstance(reg, KL):
        return ratio / beta
    if known is None:
        known = _mean(divergence_terms(jnp.ones_like(ratio), jnp.exp(-ratio), order, ratio), weight, ratio.shape)
    else:
        (known,) = expect_alike(ratio.shape[:-1], "[*B, ...]", divergence=known)
    # (What alpha = 1 multiplies by 0 may be infinite.)
    offset = (order - 1) * jnp.where(order == 1, 0, known[..., None])
    return (tilt(ratio, jnp.zeros_like(ratio), order - 1) - offset) / beta


def _expect_samples(x: Array) -> None:
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"log_ratio has shape {list(x.shape)}; expected [*B, ..., N], N samples, none empty")


def _mean(x: Array, weight: Array | None, shape: tuple[int, ...]) -> Array:
    """Mean over the last axis; a weight of 0 silences whatever stands there."""
    if weight is None:
        return jnp.mean(x, axis=-1)
    (share,) = expect_alike(shape, "the shape of the samples", weights=weight)
    return jnp.sum(share * jnp.where(share == 0, 0, x), axis=-1) / jnp.sum(share, axis=-1)


def _empirical(reg: Any, perturbation: ArrayLike, log_ratio: Any, weights: Any) -> tuple[Any, Array]:
    """Return the regulariser with samples as actions and their weights as its prior, and the samples `[..., 1, N]`."""
    reach.expect_reference(reg, "first argument")
    given = {"perturbation": perturbation, "log_ratio": log_ratio, "weights": weights}
    samples, ratio, weight = common("log_ratio", "weights", **given)
    _expect_samples(samples)
    ratio, weight = expect_alike(samples.shape, "the shape of the perturbation", log_ratio=ratio, weights=weight)
    logs = jnp.zeros_like(samples) if ratio is None else -ratio
    if weight is not None:
        logs = jnp.where(weight > 0, logs + jnp.log(jnp.where(weight > 0, weight, 1)), -jnp.inf)
    rank = samples.ndim - 1
    if isinstance(reg, Sum):
        raise TypeError("a sum of regularisers has several references: estimate the slack of one of its parts")
    leaves: dict[str, Any] = {name: leading(getattr(reg, name), rank) for name in reg._scalars}
    for name in ("state_scale", "alpha_per_state"):
        if (own := getattr(reg, name, None)) is not None:
            leaves[name] = leading(own, rank)[..., None]
    prior = jax.nn.log_softmax(logs, axis=-1)[..., None, :]
    return dataclasses.replace(reg, **leaves, log_prior=prior), samples[..., None, :]


def sampled_slack(
    reg: Regulariser, perturbation: ArrayLike, *, log_ratio: ArrayLike | None = None, weights: ArrayLike | None = None
) -> Array:
    """Estimate how far inside the robust set a perturbation lies, from its values at samples.

    Args:
        reg: the regulariser; its prior is what the samples stand for, and does not matter. Its batch axes lead.
        perturbation: `dr` of the samples, `[*B, ..., N]`, in reward units, subtracted from the reward: a learned reward
            less the deployed one, or the `sampled_worst_case` of another policy.
        log_ratio: `log(p/p0)` of the samples, `[*B, ..., N]`, where they are drawn from a policy; None: they are drawn
            from the reference.
        weights: `[*B, ..., N]`, not negative, of the samples besides that; 0 leaves out padding.

    Returns:
        `-Omega*(dr)` of the samples, `[*B, ...]`, in reward units, >= 0 where dr is in the robust set. It converges to
        that of the distribution as N grows, from above on average: a rare large dr is easily missed.

    Raises:
        TypeError: no regulariser, or one without a reference.
        ValueError: axes that do not fit.
    """
    return slack(*_empirical(reg, perturbation, log_ratio, weights))[..., 0]


def sampled_critical_beta(
    reg: Regulariser, perturbation: ArrayLike, *, log_ratio: ArrayLike | None = None, weights: ArrayLike | None = None
) -> Array:
    """Estimate the largest beta, hence weakest regulariser, whose robust set holds a perturbation, from samples.

    The strength at which a policy would have to be regularised in order to be robust to it is the inverse.

    Args:
        reg: the regulariser; its own beta and prior do not matter.
        perturbation, log_ratio, weights: as in `sampled_slack`.

    Returns:
        `[*B, ...]`, in 1/reward units; infinite where no sample has a positive dr, 0 where their mean is not negative:
        see `critical_beta`. Of the worst case of the policy itself it is the beta that it was computed with, but for
        what the samples miss: a number far from it says that they do not tell the policy's distribution.

    Raises:
        TypeError: no regulariser, or one without a reference.
        ValueError: axes that do not fit.
    """
    return calibration.critical_beta(*_empirical(reg, perturbation, log_ratio, weights))[..., 0]


def sampled_guarantee(
    reg: Regulariser,
    returns: ArrayLike,
    log_ratio: ArrayLike,
    *,
    divergence: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Array:
    """Estimate the return that a policy keeps under every reward in the robust set, from samples of its own.

    Args:
        reg: `kl` or `alpha`; its prior does not matter. Its batch axes lead.
        returns: of the samples, `[*B, ..., N]`, in reward units.
        log_ratio: `log(p/p0)` of the samples, `[*B, ..., N]`. Of trajectories it is, for KL, the sum over steps (each
            discounted as its reward); for alpha every sample has to be one decision.
        divergence, weights: as in `sampled_worst_case`.

    Returns:
        The mean of `returns - Delta_r`, `[*B, ...]`.

    Raises:
        TypeError: another regulariser.
        ValueError: axes that do not fit.
    """
    given = {"returns": returns, "log_ratio": log_ratio, "divergence": divergence, "weights": weights}
    ret, ratio, known, weight = common("divergence", "weights", **given)
    _expect_samples(ratio)
    (ret,) = expect_alike(ratio.shape, "the shape of log_ratio", returns=ret)
    return _mean(ret - sampled_worst_case(reg, ratio, divergence=known, weights=weight), weight, ratio.shape)
