"""The adversary of a regulariser: the worst case of a policy, and how far inside the robust set a perturbation lies.

A regulariser `Omega` is the support function of a set of reward perturbations [Brekelmans et al. 2022, prop. 1],

    Omega(p) = max { <p, dr> : dr in R },        R = { dr : Omega*(dr) <= 0 },

state by state, so that the regularised value is the guaranteed value against an adversary who subtracts any `dr` in R
from the reward. `worst_case` is the maximiser for a policy, `slack` tells how far inside R a perturbation lies.
"""

from jax import Array
from jax.typing import ArrayLike

from robustreg._core import checks
from robustreg.regularisers.regulariser import Regulariser


def worst_case(
    reg: Regulariser,
    policy: ArrayLike | None = None,
    *,
    log_policy: ArrayLike | None = None,
    action: ArrayLike | None = None,
) -> Array:
    """Find the perturbation that lowers a policy's return the most within the robust set.

    Args:
        reg: the regulariser, whose strength sets the adversary's budget.
        policy: `[*B, ..., A]`, normalised over its last axis; any policy, optimal or not. That of a solution,
            `[lanes, S, A]`, goes in as it is (see `regularisers.regulariser` on axes).
        log_policy: its logarithm instead of it, `log_softmax` of some logits for example. Give one of the two: where
            probabilities underflow, nothing of the worst case can be told from them.
        action: integers, broadcastable to `[*B, ...]`: the actions that were taken, for their entries alone. They are
            picked before anything is computed: for KL nothing else of a row is looked at, while for alpha the row is
            summed once, for its divergence.

    Returns:
        `Delta_r`, of the policy's shape with the regulariser's batch axes, in reward units:
        `(1/beta) log_alpha(p/p0) + (1 - alpha) D/beta`. Then `<p, Delta_r> = Omega(p)` and `slack` is 0. Minus infinity
        where p = 0 < p0 for KL and alpha <= 1 (`Solution.perturbation` is the finite one at an optimum); 0 on masked
        actions. With `action`, without the last axis.

        Differentiable in everything, as the extension to measures that need not sum to 1. From `log_policy` derivatives
        are right however small the probabilities. From `policy` they are right or NaN: at p = 0 < p0 the slope in p is
        infinite for alpha < 2, and who asks for it gets NaN; entries whose cotangent is 0 do not ask.

    Raises:
        TypeError: a first argument that is no regulariser; actions that are no integers.
        ValueError: none or both of `policy` and `log_policy`; axes that do not fit, or that fit in two ways; a number
            that no action has. (Inside jit, where no values are looked at, the latter is worth NaN.)
    """
    checks.expect_type(reg, Regulariser, "first argument", "kl")
    return reg.worst_case(policy, log_policy=log_policy, action=action)


def slack(reg: Regulariser, perturbation: ArrayLike) -> Array:
    """Measure how far inside the robust set a perturbation lies.

    Args:
        reg: the regulariser.
        perturbation: `dr`, `[*B, ..., A]`, subtracted from the reward; that of a solution, `[lanes, S, A]`, goes in as
            it is (see `regularisers.regulariser` on axes).

    Returns:
        `-Omega*(dr)`, `[*B, ...]`, in reward units. `dr` is in the robust set exactly where this is >= 0, and
        `dr + slack` (the same amount on every action) lies on its boundary.
    """
    checks.expect_type(reg, Regulariser, "first argument", "kl")
    dr = checks.array("perturbation", perturbation)
    if not dr.ndim or 0 in dr.shape:
        raise ValueError(f"perturbation has shape {dr.shape}; expected [*B, ..., A], none empty")
    return -reg.conjugate(dr)
