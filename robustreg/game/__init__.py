"""The game itself, played step by step: agent against adversary, with both bounds on its value.

`minimax` plays it (`solve_game`) by the `moves` of both sides. `sets` has what the adversary may choose from, state by
state; in those of `coupled_sets` states share a constraint.
"""

from robustreg.game.coupled_sets import Features, SharedBudget
from robustreg.game.minimax import Game, solve_game
from robustreg.game.sets import Adversary, Box, StatesOnly

__all__ = ["Adversary", "Box", "Features", "Game", "SharedBudget", "StatesOnly", "solve_game"]
