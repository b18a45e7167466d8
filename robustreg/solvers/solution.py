"""What a solve returns: arrays with a status and a certified interval per lane, and the words for each status."""

import dataclasses
import enum
import math
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from robustreg._core import checks, extremes, forks, pytrees


class SolveError(RuntimeError):
    """A solve or a certificate fell short; the message lists lanes and remedies."""


class Status(enum.IntEnum):
    """How a lane ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    STAGNATED = 2
    NONFINITE_INPUT = 3
    NONFINITE = 4

    @property
    def remedy(self) -> str:
        """Say what happened and what to do about it, whatever the precision."""
        return self.advise()

    def advise(self, dtype: Any = np.float32, asked: bool = True) -> str:
        """Say what happened and what to do about it.

        Args:
            dtype: precision of the solve: nobody who has float64 is told to take it.
            asked: whether a tol was asked for.
        """
        what, ways = _REMEDIES[self]
        wide = np.dtype(dtype).itemsize >= 8
        fitting = [way for way in ways if not (wide and "float64" in way)]
        if not asked:
            what = what.replace(" before tol", "")
            fitting = [way.replace("loosen tol", "ask for a tol") for way in fitting]
        listed = fitting if len(fitting) < 2 else [", ".join(fitting[:-1]) + f" or {fitting[-1]}"]
        return ": ".join([what, *listed])


_NEWTON = 'take Newton, with linear="direct" where policies run through long cycles'
# What happened, and the ways out of it.
_REMEDIES = {
    Status.CONVERGED: ("the certified error is within tol", ()),
    Status.MAX_STEPS: ("the step limit came first", ("raise max_steps", "loosen tol", _NEWTON)),
    Status.STAGNATED: ("rounding stopped progress before tol", ("loosen tol", _NEWTON, "solve in float64")),
    Status.NONFINITE_INPUT: (
        "the MDP, the regulariser or init holds NaN, infinity or a number out of range, or a prior leaves a state none "
        "of its available actions, or at a discount of 1 episodes need not end (robustreg.problems.endless_states says "
        "from where)",
        ("mend the input",),
    ),
    Status.NONFINITE: ("an intermediate value overflowed", ("rescale rewards", "take float64")),
}


class Answer:
    """Base of all answers with a status per lane."""

    status: Array

    @property
    def converged(self) -> Array:
        """`[*B]` bool: the lane is certified as it was asked to be."""
        forks.refuse()
        return self.status == int(Status.CONVERGED)

    def where_converged(self, x: ArrayLike, fallback: ArrayLike = 0.0) -> Array:
        """Replace what belongs to lanes that did not converge.

        Gradients of the result are those of the lanes that did: a failed lane gets and gives none, also where it
        shares parameters with them. Apply it to fields of the solution before anything else is computed of them.

        Args:
            x: `[*B, ...]`, for example `objective`.
            fallback: what stands in their place, broadcastable to x.
        """
        x = checks.array("x", x)
        kept = self.converged.reshape(self.status.shape + (1,) * (x.ndim - self.status.ndim))
        fallback = jnp.asarray(fallback, x.dtype)
        return jnp.where(kept, x, jnp.broadcast_to(fallback, x.shape))

    def raise_if_failed(self) -> Self:
        """Return the answer if every lane converged.

        Raises:
            SolveError: naming the lanes that did not, their status, and the remedy. Outside jit only.
        """
        status = concrete(self.status, "raise_if_failed")
        if (status == Status.CONVERGED).all():
            return self
        lines = [f"{int((status != Status.CONVERGED).sum())} of {status.size} lanes failed"]
        for code in (s for s in Status if s is not Status.CONVERGED):
            lanes = np.argwhere(status == code)
            if len(lanes):
                first = tuple(int(i) for i in lanes[0])
                where = f"lane {list(first)}" + (f" and {len(lanes) - 1} more" if len(lanes) > 1 else "")
                where = where if status.ndim else "the only lane"
                lines.append(f"  {code.name}: {where} {self._failure(code, first)}")
        raise SolveError("\n".join(lines))

    @property
    def gap(self) -> Array:
        """Width of the certified interval, `[*B]`, in reward units."""
        raise TypeError(f"{type(self).__name__} does not define gap")

    def __repr__(self) -> str:
        forks.refuse()
        first = dataclasses.fields(self)[0].name  # type: ignore[arg-type]  # every answer is a dataclass
        x = getattr(self, first)
        head = f"{type(self).__name__}({first}={x.dtype}{list(x.shape)}"
        if isinstance(self.status, Tracer):
            return f"{head}, traced)"
        status, gap = np.asarray(self.status), np.asarray(self.gap)
        if not status.size:
            return f"{head}, no lanes)"
        names = ", ".join(f"{s.name}: {int((status == s).sum())}" for s in Status if (status == s).any())
        taken = getattr(self, "steps", None)
        steps = "" if taken is None else f", steps<={np.asarray(taken).max()}"
        return f"{head}, {names}{steps}, gap<={gap.max():.3g})"

    def _failure(self, code: Status, lane: tuple[int, ...]) -> str:
        """How far a lane came, in brackets, and what to do about it."""
        raise TypeError(f"{type(self).__name__} does not define _failure")


@pytrees.dataclass
class Guess:
    """Where a solve may begin: a value `[*B, S]` and visits `[*B, S]`, or None. It claims nothing of either."""

    value: Array
    visits: Array | None

    def extrapolated(self, *earlier: "Guess | Solution") -> "Guess":
        """Guess where a solve ends, if parameters go on as they went: see `Solution.extrapolated`."""
        forks.refuse()
        # The polynomial through n points in a row, at the next: n, -n (n - 1)/2, ... for the last, the one before, ...
        weights = [(-1) ** i * math.comb(len(earlier) + 1, i + 1) for i in range(len(earlier) + 1)]

        def ahead(x: Array, *before: Array) -> Array:
            y = sum(weight * past for weight, past in zip(weights, (x, *before)))
            return jnp.where(jnp.isfinite(y), y, x)

        visits, past = self.visits, [known.visits for known in earlier if known.visits is not None]
        if visits is not None and len(past) == len(earlier):
            visits = ahead(visits, *past)
        return Guess(ahead(self.value, *(known.value for known in earlier)), visits)


@pytrees.dataclass
class Solution(Answer):
    """Solution of a regularised MDP, batch axes leading.

    Attributes:
        value: the minimax value V*, `[*B, S]`, in reward units; within `tol` of it where converged.
        q: `r + g P value`, `[*B, S, A]`.
        policy: the robust policy `grad Omega*(q)`, `[*B, S, A]`.
        log_policy: its logarithm, `[*B, S, A]`, exact where entries of the policy underflow: finite for every action
            that is played however rarely, minus infinity for the others; see `Regulariser.log_policy`.
        perturbation: the adversary's worst case Delta_r against that policy, `[*B, S, A]`: the perturbed reward is
            `reward - perturbation`. It is `q - Omega*(q)` (and `Omega*(q)` is `value` up to `tol`), which lies on the
            boundary of the robust set and stays exact where entries of the policy underflow. 0 on masked actions.
        lower, upper: certified bounds on V*, `[*B, S]`, rounding included.
        objective: `<initial, value>`, `[*B]`.
        status: `Status` codes, `[*B]` int32.
        steps: backups until the lane stopped, `[*B]` int32.
        tol: certified half-width that was asked for, `[*B]`; the one reached if none was.
        visits: where `solve` was asked for them, expected discounted visits of the policy from `initial`, `[*B, S]`, as
            accurate as a backward pass wants them; else None. Constants to derivatives: for others see `occupancy`.
    """

    value: Array
    q: Array
    policy: Array
    log_policy: Array
    perturbation: Array
    lower: Array
    upper: Array
    objective: Array
    status: Array
    steps: Array
    tol: Array
    visits: Array | None = None

    @property
    def gap(self) -> Array:
        """Certified uncertainty `max_s upper - lower`, `[*B]`."""
        return extremes.largest(checks.canonical(self.upper - self.lower), -1)

    def extrapolated(self, *earlier: "Solution | Guess") -> Guess:
        """Guess where the next solve ends, if parameters go on as they went until now: for its `init`.

        One earlier solution extends a line, two a parabola, three a cubic. Each value is closer where parameters move
        evenly (a whole gradient, an optimiser with momentum), and multiplies what is noise in their moves, and the
        errors that `tol` allows, by three, seven, fifteen.

        Args:
            earlier: the solutions before this one, the last first, of the same problem but for its numbers. A loop may
                carry guesses instead, which are smaller: `sol.extrapolated()` is one that holds this solution's own.

        Returns:
            value and visits, which a solve checks like any others; those of this solution in lanes of which an earlier
            one failed.
        """
        return Guess(self.value, self.visits).extrapolated(*earlier)

    def _failure(self, code: Status, lane: tuple[int, ...]) -> str:
        width, tol = np.asarray(self.gap)[lane] / 2, np.broadcast_to(np.asarray(self.tol), self.status.shape)[lane]
        scale = np.abs(np.asarray(self.value)[lane]).max() * np.finfo(self.value.dtype).eps
        # Without a tol, `tol` is the half-width reached, and `width` is that again, from two rounded bounds.
        asked = not abs(tol - width) <= 0.01 * width + min(4 * scale, 0.5 * width)
        detail = f"half-width {width:.3g}, tol {tol:.3g}" if asked else f"half-width {width:.3g}"
        return f"({detail}): {code.advise(self.value.dtype, asked)}"


def concrete(x: ArrayLike, caller: str, instead: str = "`status`") -> np.ndarray:
    """Return an array that has values."""
    forks.refuse()
    if isinstance(x, Tracer):
        raise TypeError(f"{caller} reads values, so it cannot run inside jit, vmap or grad; use {instead} there")
    return np.asarray(x)
