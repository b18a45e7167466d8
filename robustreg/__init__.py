"""robustreg: policy-regularised MDPs as minimax games, solved exactly, with a certificate on every answer.

    import robustreg as rr

    mdp = rr.mdp(P, reward, discount=0.99)        # or rr.from_gymnasium(env), rr.problems.garnet(...)
    reg = rr.kl(beta=5.0)                         # or rr.alpha(alpha=2.0, beta=5.0)
    sol = rr.solve(mdp, reg, tol=1e-8)            # value, policy, worst-case perturbation, bounds, status

`robustreg.bellman` states the mathematics in a page.
"""

from robustreg import adversary, baselines, losses, problems
from robustreg.adversary import evaluate, nominal_optimum, occupancy, slack, worst_case
from robustreg.archive import load, save
from robustreg.baselines import Entropy, entropy
from robustreg.budgets import Box, StatesOnly
from robustreg.calibration import calibrate, critical_beta
from robustreg.cassandra_files import from_cassandra
from robustreg.certificates import Certificate, certify
from robustreg.game import Game, solve_game
from robustreg.guarantees import Guarantee, aggregated_slack, guarantee
from robustreg.interop import from_gymnasium
from robustreg.masks import restricted
from robustreg.mdp import MDP, mdp
from robustreg.names import Names
from robustreg.pooled import Features, SharedBudget
from robustreg.prism_files import from_prism
from robustreg.regularisers import KL, Alpha, Regulariser, alpha, kl
from robustreg.robust_sets import HalfSpace, Orthant, RobustSet, UnnormalisedSet
from robustreg.sharding import shard
from robustreg.solution import Solution, SolveError, Status
from robustreg.solve import solve
from robustreg.solvers import Anderson, ModifiedPolicyIteration, Newton, ValueIteration
from robustreg.stacking import stack
from robustreg.store import SweepError
from robustreg.successors import Successors
from robustreg.sweep import sweep
from robustreg.table import Table
from robustreg.table_input import from_table
from robustreg.transitions import Dense, MatrixFree, Transitions

__version__ = "0.1.0"

__all__ = [
    "KL",
    "MDP",
    "Alpha",
    "Anderson",
    "Box",
    "Certificate",
    "Dense",
    "Entropy",
    "Features",
    "Game",
    "Guarantee",
    "HalfSpace",
    "MatrixFree",
    "ModifiedPolicyIteration",
    "Names",
    "Newton",
    "Orthant",
    "Regulariser",
    "RobustSet",
    "SharedBudget",
    "Solution",
    "SolveError",
    "StatesOnly",
    "Status",
    "Successors",
    "SweepError",
    "Table",
    "Transitions",
    "UnnormalisedSet",
    "ValueIteration",
    "adversary",
    "aggregated_slack",
    "alpha",
    "baselines",
    "calibrate",
    "certify",
    "critical_beta",
    "entropy",
    "evaluate",
    "from_cassandra",
    "from_gymnasium",
    "from_prism",
    "from_table",
    "guarantee",
    "kl",
    "load",
    "losses",
    "mdp",
    "nominal_optimum",
    "occupancy",
    "problems",
    "restricted",
    "save",
    "shard",
    "slack",
    "solve",
    "solve_game",
    "stack",
    "sweep",
    "worst_case",
]
