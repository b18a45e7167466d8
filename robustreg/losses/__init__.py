"""Losses whose minimisers are regularised optima, and what the adversary says of the batch that they are given.

**Values and policies** of sampled transitions are fitted by `consistency_loss`, scores by `fenchel_young` (see
`consistency`, which has the two identities).

**Preferences** are fitted by `dpo` and `ipo` (see `preferences`), and `sampled_worst_case` and its like tell the
adversary of a batch from samples alone (see `sampled`).

All are functions of arrays, to be jitted, mapped and differentiated; of 16 bits they are computed in float32. Without
`weights` they return a loss of every sample. With them it is their weighted mean, in which samples of weight 0 count
for nothing and get no gradient, whatever stands there: padding, or lanes that failed (`weights=sol.converged`). For a
plain mean pass `weights=1.0`. (Of residuals of several steps what has no weight has to be finite: windows that begin
earlier may pass there.)
"""

from robustreg.losses.consistency import consistency_loss, consistency_residual, fenchel_young
from robustreg.losses.preferences import dpo, implicit_reward, ipo, log_ratio
from robustreg.losses.sampled import sampled_critical_beta, sampled_guarantee, sampled_slack, sampled_worst_case

__all__ = [
    "consistency_loss",
    "consistency_residual",
    "dpo",
    "fenchel_young",
    "implicit_reward",
    "ipo",
    "log_ratio",
    "sampled_critical_beta",
    "sampled_guarantee",
    "sampled_slack",
    "sampled_worst_case",
]
