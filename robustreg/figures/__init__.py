"""Pictures, and the numbers behind them.

`solution_figures` draws a solution and `sweep_figures` a sweep; the figures of the paper are computed by
`paper_numbers` and drawn by `paper_figures`. All of them draw with `style`.
"""

from robustreg.figures.solution_figures import (
    decision_bars,
    directions,
    heat_map,
    perturbation_maps,
    policy_map,
    value_map,
    write,
)

__all__ = ["decision_bars", "directions", "heat_map", "perturbation_maps", "policy_map", "value_map", "write"]
