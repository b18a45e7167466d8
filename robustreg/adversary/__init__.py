"""The other player: worst cases, the sets they are taken from, and what follows from them for a policy.

`perturbations` has the worst case of a policy and the slack of a perturbation, `robust_sets` the sets, `reach` how far
something can be scaled before it leaves one. `certificates` proves a solution, `guarantees` a policy's return under
rewards it was not made for, `calibration` chooses beta for the perturbations to fear, `attacks` are for comparison.
"""

from robustreg.adversary.attacks import Decision, norm_attack, random_attack, single_decision
from robustreg.adversary.calibration import calibrate, critical_beta
from robustreg.adversary.certificates import Certificate, certify
from robustreg.adversary.guarantees import Guarantee, aggregated_slack, guarantee
from robustreg.adversary.perturbations import slack, worst_case
from robustreg.adversary.robust_sets import HalfSpace, Orthant, PerturbationSet, RobustSet, UnnormalisedSet
from robustreg.solvers.evaluation import evaluate, nominal_optimum, occupancy

__all__ = [
    "Certificate",
    "Decision",
    "Guarantee",
    "HalfSpace",
    "Orthant",
    "PerturbationSet",
    "RobustSet",
    "UnnormalisedSet",
    "aggregated_slack",
    "calibrate",
    "certify",
    "critical_beta",
    "evaluate",
    "guarantee",
    "nominal_optimum",
    "norm_attack",
    "occupancy",
    "random_attack",
    "single_decision",
    "slack",
    "worst_case",
]
