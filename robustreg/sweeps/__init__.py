"""Grids over the leaves of a problem, solved in chunks of lanes on every device, and streamed to disk.

`plan` lays a grid out, `runner` solves it chunk by chunk (`sweep`), `outputs` lists what can be reported of a cell.
`store` keeps finished chunks and joins them, `table` is what comes back, `cluster` lets several processes share a grid.
"""

from robustreg.sweeps.outputs import OUTPUTS, OUTPUTS_BY_DEFAULT
from robustreg.sweeps.runner import prepare, sweep
from robustreg.sweeps.store import SweepError, join
from robustreg.sweeps.table import Table

__all__ = ["OUTPUTS", "OUTPUTS_BY_DEFAULT", "SweepError", "Table", "join", "prepare", "sweep"]
