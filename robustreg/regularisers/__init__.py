"""The convex cost of a policy: its value, its conjugate, the maximiser of that, and the worst case it stands for.

What users hold is a `Regulariser` (`regulariser`, with sums), what computes is a `Bound` (`bound`). `families` has KL
and alpha, `entropies` what has no reference, `separable` f-divergences of your own, `balls` norms.

Below them: `divergences` and `worst_cases` (formulas), `conjugates` (maximisers in the layout of the solvers), `layer`
(the same by the row, for one-step problems), `marginals` (the maximiser of anything that is a sum over actions),
`sums`, `norms` and what they are the `least` of. `parameters`, `axes` and `masks` say what the arguments may be and
which axes meet.
"""

from robustreg.regularisers.bound import maximise
from robustreg.regularisers.entropies import Entropy, entropy
from robustreg.regularisers.families import KL, Alpha, alpha, kl
from robustreg.regularisers.masks import restricted
from robustreg.regularisers.regulariser import Regulariser

__all__ = ["Alpha", "Entropy", "KL", "Regulariser", "alpha", "entropy", "kl", "maximise", "restricted"]
