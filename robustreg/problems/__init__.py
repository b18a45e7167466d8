"""Markov decision processes: what is solved.

`mdps` has the class and its factory, `transitions` and `successors` the representations of P with one operator and its
transpose, `sparsity` what successor lists look like from the other end. `generators` makes problems to try things on;
`tables`, `gymnasium`, `prism` and `cassandra` read those that people have; `handles` are for training loops; `stacking`
makes one batch of problems of different sizes, `sharding` splits one over devices. `episodes` tells whether they end.
"""

from robustreg.problems.cassandra import from_cassandra
from robustreg.problems.dense import Dense
from robustreg.problems.episodes import endless_states
from robustreg.problems.generators import (
    CELLS,
    MOVES,
    bandit,
    chain,
    garnet,
    garnets,
    grid_marks,
    grid_world,
    ring,
    slippery_cells,
    slippery_grid,
)
from robustreg.problems.gymnasium import from_gymnasium, from_scipy
from robustreg.problems.handles import trainable
from robustreg.problems.matrix_free import MatrixFree
from robustreg.problems.mdps import MDP, mdp
from robustreg.problems.prism import from_prism
from robustreg.problems.problem import Problem
from robustreg.problems.sharding import shard
from robustreg.problems.stacking import stack
from robustreg.problems.successors import Successors
from robustreg.problems.tables import from_table
from robustreg.problems.transitions import Transitions

__all__ = [
    "CELLS",
    "Dense",
    "MDP",
    "MOVES",
    "MatrixFree",
    "Problem",
    "Successors",
    "Transitions",
    "bandit",
    "chain",
    "endless_states",
    "from_cassandra",
    "from_gymnasium",
    "from_prism",
    "from_scipy",
    "from_table",
    "garnet",
    "garnets",
    "grid_marks",
    "grid_world",
    "mdp",
    "ring",
    "shard",
    "slippery_cells",
    "slippery_grid",
    "stack",
    "trainable",
]
