"""Losses whose minimisers are regularised optima, and what the adversary says of the batch that they are given.

**Path consistency.** With `Delta_r` the worst case of the policy, a policy and a value are optimal exactly where

    r(s, a) + g E V(s') - Delta_r(s, a; pi) - V(s)  =  0        for every state and action that the prior allows

(<= 0 outside the support of the policy, for alpha > 1), and so for every sum along a path [Nachum et al. 2017 for
KL; Chow et al. 2018 for alpha = 2; Brekelmans et al. 2022]: once the adversary has taken its share, the agent is
indifferent. `consistency_residual` is the left side, `consistency_loss` half its square.

**Fenchel and Young.** `Omega*(q) + Omega(t) - <t, q> >= 0`, and 0 exactly where the target t is `argmax(q)`
[Blondel et al. 2020]: by how much t's guaranteed one-step return falls short of the best. Its gradient in q is
`argmax(q) - t`.

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
