"""robustreg: policy-regularised MDPs as minimax games, solved exactly, with a certificate on every answer.

    import robustreg as rr

    mdp = rr.mdp(P, reward, discount=0.99)        # or rr.from_gymnasium(env), rr.problems.garnet(...)
    reg = rr.kl(beta=5.0)                         # or rr.alpha(alpha=2.0, beta=5.0)
    sol = rr.solve(mdp, reg, tol=1e-8)            # value, policy, worst-case perturbation, bounds, status

`robustreg.solvers.bellman` states the mathematics in a page.
"""

from robustreg._core import interrupts

interrupts.watch_command_line()  # before JAX is imported, which takes longer than some people wait

from robustreg import adversary, losses, problems
from robustreg._core.names import Names
from robustreg.adversary import attacks as baselines
from robustreg.adversary.calibration import calibrate, critical_beta
from robustreg.adversary.certificates import Certificate, certify
from robustreg.adversary.guarantees import Guarantee, aggregated_slack, guarantee
from robustreg.adversary.perturbations import slack, worst_case
from robustreg.adversary.robust_sets import HalfSpace, Orthant, RobustSet, UnnormalisedSet
from robustreg.adversary.worst_models import worst_model
from robustreg.archive import load, save
from robustreg.game.coupled_sets import Features, SharedBudget
from robustreg.game.minimax import Game, solve_game
from robustreg.game.sets import Box, StatesOnly
from robustreg.problems.cassandra import from_cassandra
from robustreg.problems.dense import Dense
from robustreg.problems.gymnasium import from_gymnasium
from robustreg.problems.handles import trainable
from robustreg.problems.matrix_free import MatrixFree
from robustreg.problems.mdps import MDP, mdp
from robustreg.problems.prism import from_prism
from robustreg.problems.sharding import shard
from robustreg.problems.stacking import stack
from robustreg.problems.successors import Successors
from robustreg.problems.tables import from_table
from robustreg.problems.transitions import Transitions
from robustreg.regularisers.balls import NormBall, norm_ball
from robustreg.regularisers.entropies import Entropy, Tsallis, entropy, tsallis
from robustreg.regularisers.families import KL, Alpha, alpha, kl
from robustreg.regularisers.masks import restricted
from robustreg.regularisers.regulariser import Regulariser, Sum
from robustreg.regularisers.separable import Separable
from robustreg.solvers.ambiguity import TransitionBall
from robustreg.solvers.average import Average, solve_average
from robustreg.solvers.evaluation import evaluate, nominal_optimum, occupancy
from robustreg.solvers.horizon import Horizon, solve_horizon
from robustreg.solvers.joint import OccupancySolution, solve_occupancy
from robustreg.solvers.loop import solve
from robustreg.solvers.methods import Anderson, ModifiedPolicyIteration, Newton, ValueIteration
from robustreg.solvers.solution import Solution, SolveError, Status
from robustreg.sweeps.runner import sweep
from robustreg.sweeps.store import SweepError
from robustreg.sweeps.table import Table

__version__ = "0.1.0"

__all__ = [
    "worst_model",
    "TransitionBall",
    "KL",
    "MDP",
    "Alpha",
    "Anderson",
    "Average",
    "Box",
    "Certificate",
    "Dense",
    "Entropy",
    "Features",
    "Game",
    "Guarantee",
    "HalfSpace",
    "Horizon",
    "MatrixFree",
    "ModifiedPolicyIteration",
    "Names",
    "Newton",
    "OccupancySolution",
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
    "solve_average",
    "solve_game",
    "solve_horizon",
    "solve_occupancy",
    "stack",
    "sweep",
    "trainable",
    "worst_case",
    "NormBall",
    "norm_ball",
    "Tsallis",
    "tsallis",
    "Sum",
    "Separable",
]
