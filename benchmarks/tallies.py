"""What `honesty.py` counts: the claims with the rounding that is allowed, lanes by claim, and a batch under test.

Notation: u is half the unit of the working precision, g the discount, |r| the largest allowed reward, |V| and span V
the size and the range of a value over states, D the policy's divergence and sum|D| the sizes of what it is a sum of.
Each check says how far an answer lies beyond what its claim and rounding allow; beyond 0 is a violation. The
reference's own error is always taken into account.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import reference
from draws import Draw

CLAIMS = {
    "solve: lower <= V* <= upper": "no allowance",
    "solve: CONVERGED, upper - lower <= 2 tol": "8 u |V| for writing the bounds down",
    "solve to tol: lower <= V* <= upper": "no allowance",
    "solve to tol: upper - lower <= 2 tol": "8 u |V|",
    "evaluate, random policy": "32 u (|r| + span V)/(1-g) + 16 u |V|",
    "evaluate, solution's policy": "the same",
    "evaluate regularised, random policy": "and ((16 + 4 |alpha log p/p0| + 4 |log p0|) u sum|D|/beta + N)/(1-g)",
    "evaluate regularised, solution's policy": "the same",
    "occupancy, random policy": "1e-8 (float64) or 2e-3 (float32), relative in the 1-norm",
    "occupancy, solution's policy": "the same, and 2 |sum p - 1|/(1-g)",
    "certify: lower <= policy's guarantee": "|sum p - 1| (|r| + span V + (1 + |alpha|) D/beta)/(1-g)",
    "certify: V* <= upper": "no allowance",
    "certify: lower <= upper": "no allowance",
    "certify, random policy: lower <= guarantee": "no allowance",
    "certify, random policy: V* <= upper": "no allowance",
    "certify: CONVERGED passes tol + rounding": "no allowance",
    "guarantee: total_slack": "occupancy's, times the largest slack, and slack's",
    "guarantee: actual >= bound": "evaluate's and total_slack's",
    "guarantee: covered, so margin >= 0": "64 u (|guaranteed| + |actual|), evaluate's and total_slack's",
    "slack": "(128 + 4 (1 + |alpha - 1|) |log p0|) u |dr| + N, N = 64 (u (1 + |log p0|))^2/beta",
    "critical_beta: Omega* changes sign": "1e-4 (float32) or 1e-9 (float64) of beta, and slack's",
    "gradient in the reward = occupancy": "occupancy's, and what beta (upper - lower) moves the policy, at most 1e-3",
    "derivative along a direction, forwards": "the same",
    "game: primal <= value <= dual": "32 u (|r| + span V)/(1-g) + 16 u |V|",
}


@dataclass
class Tally:
    """Counts of one claim: lanes tried, not checked, unanswered (NaN), violated; and the worst violation."""

    tried: int = 0
    unchecked: int = 0
    unanswered: int = 0
    violated: int = 0
    worst: float = 0.0
    example: str = ""


@dataclass
class Table:
    """The tally of every claim."""

    tallies: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in CLAIMS})

    @property
    def violated(self) -> int:
        """Claims violated, over all lanes."""
        return sum(tally.violated for tally in self.tallies.values())


@dataclass
class Batch:
    """One batch under test: the problem, the library's objects for it, what the reference says, where to write.

    Attributes:
        rr: the library (or a stand-in for it, in tests of this campaign).
        where: the batch in words, for examples.
        precise: double precision.
    """

    rr: Any
    table: Table
    draw: Draw
    mdp: Any
    reg: Any
    sol: Any
    truth: reference.Answer
    where: str
    precise: bool

    @property
    def unit(self) -> float:
        """u."""
        return float(np.finfo(self.draw.P.dtype).eps) / 2

    @property
    def close(self) -> float:
        """What the sum of a policy's visits may be wrong by."""
        return 1e-8 if self.precise else 2e-3

    @property
    def reward(self) -> np.ndarray:
        """|r|, `[B]`."""
        return np.abs(self.draw.exact.reward).max((1, 2)).astype(float)

    def record(
        self, claim: str, beyond: Any, size: Any, answered: Any = True, checked: Any = True, applies: Any = True
    ):
        """Count one claim over the lanes.

        Args:
            claim: key of `CLAIMS`.
            beyond: how far the answer is beyond what is allowed, `[B]`; NaN where answered and checked is a violation.
            size: what that is relative to in the table, `[B]`.
            answered, checked, applies: `[B]` each: the library gave numbers; the reference's own error is at
                most half of what the check can see; the claim is made of this lane at all.
        """
        beyond = np.asarray(beyond, float)
        answered, checked, applies = (np.broadcast_to(x, beyond.shape) for x in (answered, checked, applies))
        tally = self.table.tallies[claim]
        tally.tried += int(applies.sum())
        tally.unanswered += int((applies & ~answered).sum())
        # A reference that is too wide to confirm an answer may still prove it false.
        false = (beyond > 0) | (checked & np.isnan(beyond))
        tally.unchecked += int((applies & answered & ~checked & ~false).sum())
        bad = applies & answered & false
        tally.violated += int(bad.sum())
        if bad.any():
            relative = np.where(np.isnan(beyond), np.inf, beyond / np.maximum(np.asarray(size, float), 1e-300))
            lane = int(np.where(bad, relative, -1).argmax())
            if relative[lane] > tally.worst:
                tally.worst = float(relative[lane])
                tally.example = f"{self.where}, lane {lane}: {self.draw.describe(lane)}"


def finite(*arrays: Any) -> np.ndarray:
    """Whether all entries of a lane are finite numbers, `[B]`."""
    ok = [np.isfinite(np.asarray(x)).reshape(len(x), -1).all(-1) for x in arrays]
    return np.logical_and.reduce(ok)


def extent(x: np.ndarray) -> np.ndarray:
    """Range over states, `[B]`."""
    return (x.max(-1) - x.min(-1)).astype(float)
