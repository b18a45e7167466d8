"""The convex cost of a policy: its value, its conjugate, the maximiser of that, and the worst case it stands for.

`families` has the classes and factories of KL and alpha, `entropies` that of the entropy. They rest on `divergences`
and `worst_cases` (formulas), `conjugates` (maximisers in the layout of the solvers) and `layer` (the same by the row,
for one-step problems). `parameters`, `axes` and `masks` say what the arguments may be and which axes meet.
"""

from robustreg.regularisers.bound import maximise
from robustreg.regularisers.entropies import Entropy, entropy
from robustreg.regularisers.families import KL, Alpha, alpha, kl
from robustreg.regularisers.masks import restricted
from robustreg.regularisers.regulariser import Regulariser

__all__ = ["Alpha", "Entropy", "KL", "Regulariser", "alpha", "entropy", "kl", "maximise", "restricted"]
