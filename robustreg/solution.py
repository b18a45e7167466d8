"""Another path to the names of `robustreg.solvers.solution`, for those who know it from earlier releases."""

from robustreg.solvers.solution import Solution, SolveError, Status

__all__ = ["Solution", "SolveError", "Status"]
