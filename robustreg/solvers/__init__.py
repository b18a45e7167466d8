"""The regularised value: the fixed point, its derivative, and the proof that comes with it.

`bellman` is the page to read first: the operator, its derivative, and what one residual proves. `bound_problem` lays a
problem out for it. `methods` chooses the next value (on accelerators after `first_sweeps`), `loop` runs a method and
stops it (`solve`), `answers` makes a `solution` of where it stopped. `linear` solves the systems `(I - K) x = b` of
Newton's method and of gradients, with `elimination` where Krylov methods fail; `implicit` attaches derivatives to the
fixed point. `evaluation` is the same loop for one policy, `average` the same loop for the reward per step in the long
run; `horizon` takes the same backup a fixed number of times. `ambiguity` is noise in the transitions (where rows stay
probabilities: `exact_balls`, `listed_balls`, `shared_balls`). `ranges` measures the numbers of a problem for its
rounding bound, `lifetimes` the steps of episodes without a discount; `undiscounted` says what is proved where they need
not end. `joint` regularises the joint occupancy of states and actions instead (`joint_dual`, `joint_bounds`).
`resident` and `resident_kernel` are `solve` as one kernel on a CUDA device.
"""

from robustreg.solvers.average import Average, solve_average
from robustreg.solvers.evaluation import evaluate, nominal_optimum, occupancy
from robustreg.solvers.horizon import Horizon, solve_horizon
from robustreg.solvers.joint import OccupancySolution, solve_occupancy
from robustreg.solvers.loop import solve
from robustreg.solvers.methods import Anderson, ModifiedPolicyIteration, Newton, Solver, Step, ValueIteration
from robustreg.solvers.solution import Solution, SolveError, Status

__all__ = [
    "Anderson",
    "Average",
    "Horizon",
    "ModifiedPolicyIteration",
    "Newton",
    "OccupancySolution",
    "Solution",
    "SolveError",
    "Solver",
    "Status",
    "Step",
    "ValueIteration",
    "evaluate",
    "nominal_optimum",
    "occupancy",
    "solve",
    "solve_average",
    "solve_horizon",
    "solve_occupancy",
]
