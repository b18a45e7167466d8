r"""Choosing beta: the weakest regulariser whose robust set holds the perturbations to fear.

A reward learned from preferences differs from the one that is deployed. Given samples of the difference
`dr = learned - deployed` (from an ensemble of reward models, from held-out labels, from past deployments), one wants
the largest beta, hence the least regularised policy, that is still robust to a new one with a chosen frequency.

Robust sets shrink as beta grows, so that "dr is in the set of beta" reads "beta is at most the critical beta of dr"
(`reach` computes it), and the question is one about a quantile. With N exchangeable samples and a new one, the k-th
smallest of N critical betas lies above that of the new one with a frequency of at most k/(N+1), whatever the
distribution [conformal prediction: Vovk, Gammerman, Shafer 2005]. So

    beta = the k-th smallest critical beta,      k = floor((N+1)(1 - coverage)),

is at most the critical beta of a fresh sample with a frequency of at least `coverage`, over draws of the N samples and
the fresh one together; of exactly `1 - k/(N+1)` where no two critical betas are equal. No beta is safe for k = 0.

Two notions of "in the set". State by state: the deployed reward is in the robust set everywhere, and the guarantee
holds for *every* policy, in particular for the one that solves the MDP with the calibrated beta. Aggregated over the
visits of a given policy: less is asked, beta is larger, and the guarantee is for that policy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import checks, extremes
from robustreg.adversary import reach
from robustreg.problems.mdps import MDP
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers.evaluation import occupancy


def critical_beta(
    reg: Regulariser, perturbation: ArrayLike, *, weights: ArrayLike | None = None, per_state: bool = True
) -> Array:
    """Find the largest beta, hence the weakest regulariser, whose robust set holds a perturbation.

    Args:
        reg: the regulariser; its own beta does not matter (but for its batch axes), its `state_scale` does. Of a sum
            with one reference, the strengths `1/beta` of its parts keep their proportions, and beta is that of all of
            them together, `1/sum(1/beta)`.
        perturbation: `dr`, `[*B, ..., S, A]`, subtracted from the reward; the regulariser's batch axes lead. Without
            reductions over states `[*B, ..., A]` will do for a regulariser without parameters per state. An entry may
            be minus infinity (`worst_case` of a policy that omits the action): with alpha <= 0 beta is then infinite,
            with alpha > 0 it is the limit for an ever larger loss.
        weights: None, or `[*B, ..., S]`, finite and not negative, broadcast against `dr` as in NumPy: the set
            aggregated over states, `sum_s w Omega*(dr) <= 0`, for example with the visits of a policy
            (`occupancy(mdp, policy).sum(-1)`). What is not finite in a state of weight 0 counts for nothing.
        per_state: with False (or weights) one beta for all states: without weights, the smallest of theirs.

    Returns:
        `[*B, ..., S]` or `[*B, ...]`, in 1/reward units. Infinite where no allowed action has a positive entry, or
        where beta times the largest entry would be beyond the largest number of the precision (1e38 in single); 0
        where the prior's mean is not negative (and some entry is positive): then no beta will do. In between
        `slack` at this beta is 0 to rounding of `|dr| + 1/beta`, and the derivative is that of the implicit function
        theorem; at 0 and infinity it is 0. Relative to the prior's mean of dr, beta is as precise as that mean.

    Raises:
        TypeError: for a regulariser without a prior that sums to 1 (`entropy`): its set does not hold 0, and grows
            and moves with beta.
        ValueError: a negative weight; axes that do not broadcast; a reduction over states that are not there.
    """
    reach.expect_reference(reg, "first argument")
    reg, x = checks.canonical((reg, checks.array("perturbation", perturbation)))
    per_state = checks.flag("per_state", per_state)
    if (weights is not None or not per_state) and x.ndim < 2 + len(reg.batch_shape):
        raise ValueError(
            f"perturbation has shape {x.shape}; one beta for all states needs [*B, ..., S, A], with an axis for each "
            f"of the regulariser's batch axes {list(reg.batch_shape)}"
        )
    if weights is not None:
        w = checks.number("weights", weights)
        checks.check_weights("weights", w, x.shape[-2])
        checks.check_batches({"perturbation": x.shape[:-2], "weights": w.shape[:-1]})
        weights = jnp.asarray(w, x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else float)
    return _critical_beta(reg, x, weights, per_state)


@functools.partial(jax.jit, static_argnames="per_state")
def _critical_beta(reg: Any, perturbation: Array, weights: Array | None, per_state: bool) -> Array:
    x = perturbation
    if weights is not None:
        rows = jnp.broadcast_shapes(x.shape[:-1], weights.shape)
        x, weights = jnp.broadcast_to(x, rows + x.shape[-1:]), jnp.broadcast_to(weights, rows)
    bound, x = reg._at_unit_strength()._public(x)
    if weights is not None:
        return reach.reach(bound, x, weights)[..., 0]
    each = reach.reach(bound, x)
    return each if per_state else extremes.smallest(each, -1)


def calibrate(
    reg: Regulariser,
    perturbations: ArrayLike,
    coverage: ArrayLike,
    *,
    mdp: MDP | None = None,
    policy: ArrayLike | None = None,
) -> Array:
    """Beta whose robust set holds a fresh perturbation with a chosen frequency.

    Args:
        reg: the regulariser; its own beta does not matter.
        perturbations: N samples of learned reward - deployed reward, `[*B, N, S, A]`, exchangeable with what is to
            come; the regulariser's batch axes lead.
        coverage: the frequency, `[*B]`, in (0, 1); its axes broadcast against the rest as in NumPy.
        mdp, policy: both or none. With them the sets are aggregated over the policy's visits, and it is this policy's
            guarantee that holds with the frequency. The policy must not depend on the samples.

    Returns:
        Beta, `[*B]`: the k-th smallest critical beta of the samples, `k = floor((N+1)(1 - coverage))`. A fresh
        perturbation is in its robust set with frequency `1 - k/(N+1)` or more, over samples and fresh one. 0 where
        N is too small for the coverage (`N < coverage/(1 - coverage)`) or k samples are in no set; infinite where fewer
        than k leave it for any beta. Differentiable almost everywhere: the quantile is one sample.

        A set holds no perturbation whose mean under the prior is positive in some state (its visits' mean, where sets
        are aggregated): errors that are as often up as down leave beta 0 state by state, unless each sample's mean
        under the prior is subtracted in every state first. The guarantee then leaves that mean out, over the visits.

    Raises:
        TypeError: as `critical_beta`.
        ValueError: coverage out of range, one of mdp and policy without the other, perturbations of another shape.
    """
    reach.expect_reference(reg, "first argument")
    if (mdp is None) != (policy is None):
        raise ValueError("give both mdp and policy (the guarantee of this policy), or neither (that of every policy)")
    x = checks.array("perturbations", perturbations)
    if x.ndim < 3 + len(reg.batch_shape) or 0 in x.shape:
        raise ValueError(
            f"perturbations have shape {x.shape}; expected [*B, N, S, A], N samples of one per state, with an axis for "
            f"each of the regulariser's batch axes {list(reg.batch_shape)}"
        )
    level = checks.number("coverage", coverage)
    if not checks.is_traced(level):
        checks.refuse("coverage", level, ~((level > 0) & (level < 1)), (), "a frequency between 0 and 1, without them")
    weights = None
    if mdp is not None and policy is not None:
        checks.expect_type(mdp, MDP, "argument mdp", "mdp")
        checks.expect_shape("perturbations", x.shape, (mdp.n_states, mdp.n_actions), "S, A")
        weights = jnp.sum(occupancy(mdp, policy), axis=-1)[..., None, :]
    scores = critical_beta(reg, x, weights=weights, per_state=False)
    checks.check_batches({"coverage": level.shape, "perturbations": scores.shape[:-1]})
    return _quantile(scores, jnp.asarray(level, scores.dtype))


@jax.jit
def _quantile(scores: Array, coverage: Array) -> Array:
    """The k-th smallest of N scores (last axis), `k = floor((N+1)(1 - coverage))`; 0 for k = 0."""
    n = scores.shape[-1]
    # 1 - 0.9 is a little less than 0.1: a whole number missed by rounding is that number.
    rank = (n + 1) * (1 - coverage)
    k = jnp.floor(rank + 8 * (n + 1) * float(jnp.finfo(scores.dtype).eps)).astype(jnp.int32)
    batch = jnp.broadcast_shapes(k.shape, scores.shape[:-1])
    k, scores = jnp.broadcast_to(k, batch), jnp.broadcast_to(scores, (*batch, n))
    ranked = jnp.sort(scores, axis=-1)
    kth = jnp.take_along_axis(ranked, jnp.maximum(k - 1, 0)[..., None], axis=-1)[..., 0]
    broken = jnp.any(jnp.isnan(scores), axis=-1)
    return jnp.where(broken, jnp.nan, jnp.where(k > 0, kth, 0))
