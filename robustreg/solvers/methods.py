"""Solvers: how to choose the next value from the residual `d = T V - V` and the derivative `K` at `V`.

Every one of them proposes `V + M d` with some `M` between the identity and `(I - K)^{-1}`, which would be the exact
correction if the policy did not change. The loop (in `solve`) owns counting, stopping, status and the certificate.

| solver | M | cost of a step | worth it when |
|---|---|---|---|
| `ValueIteration` | I | one backup | the chain mixes within a few steps, or g is small |
| `ModifiedPolicyIteration(m)` | I + K + ... + K^(m-1) | a backup, m-1 products | the chain mixes moderately fast |
| `Newton` | (I - K)^{-1} | a backup, a linear solve | always; the only one that is uniformly good |
| `Anderson(m)` | learnt from m past steps | a backup, m dot products | products with K are dear |

Newton's method here is regularised policy iteration: its linear system is the evaluation of the current policy,
written for the correction so that no digits are lost to the size of V. It converges quadratically, so the early
systems are solved loosely (inexact Newton, [Dembo, Eisenstat and Steihaug 1982]): the Krylov solver starts from the
value-iteration step and stops at once where that already reduces the residual enough. On an accelerator plain sweeps
come first (`first_sweeps`).
"""

import dataclasses
from typing import Any, Literal, Protocol

import jax.numpy as jnp
from jax import Array

from robustreg._core import pytrees
from robustreg.solvers import bellman, linear

# Forcing of Newton's method at a discount of 1.
_EXACT = 1e-8


@pytrees.dataclass
class Step:
    """Hold what a solver sees of the current iterate `V = h + c`; if no episode ends, `d` is centred and c adjusted.

    Attributes:
        h, c: `[S, *B]`, `[*B]`.
        residual: `d = T V - V`, `[S, *B]`.
        size: `max |d|`, `[*B]`.
        chain: derivative of T at V.
        half_width: certified half-width of the error that `d` allows, `[*B]`, in reward units.
        goal: the half-width at which the lane will stop, `[*B]`.
        count: steps so far, `[*B]`.
    """

    h: Array
    c: Array
    residual: Array
    size: Array
    chain: bellman.Chain
    half_width: Array
    goal: Array
    count: Array


class Solver(Protocol):
    """Options of a solver, hashable, and two functions."""

    @property
    def max_steps(self) -> int:
        """Default cap on steps."""
        ...

    def init(self, h: Array) -> Any:
        """Memory between steps, a pytree whose leaves end in the lanes' axes `[..., *B]`."""
        ...

    def propose(self, step: Step, memory: Any) -> tuple[Array, Any]:
        """Correction to V, `[S, *B]` (up to a constant if no episode ends), and the new memory."""
        ...


@pytrees.options
class ValueIteration:
    """`V <- T V`. Contracts by g times the mixing of the chain, in the span seminorm that the loop stops on."""

    max_steps: int = 1_000_000

    def init(self, h: Array) -> tuple[()]:
        """Nothing to remember."""
        return ()

    def propose(self, step: Step, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        """Return the residual itself."""
        return step.residual, memory


@pytrees.options
class ModifiedPolicyIteration:
    """One backup, then evaluation of its policy by `steps` sweeps in all [Puterman and Shin 1978].

    Attributes:
        steps: sweeps per backup, 1 is value iteration.
    """

    steps: int = 10
    max_steps: int = 100_000

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"ModifiedPolicyIteration needs steps >= 1, got {self.steps}")

    def init(self, h: Array) -> tuple[()]:
        """Nothing to remember."""
        return ()

    def propose(self, step: Step, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        """Return the first terms of the Neumann series."""
        return linear.neumann(step.chain, step.residual, self.steps), memory


@pytrees.options
class Newton:
    """Regularised policy iteration, exact or inexact.

    Attributes:
        linear: "krylov" (any size) or "direct" (LU, O(S^3), for S up to a few hundred).
        forcing: residual of the linear system relative to that of the equation (krylov only). A lane whose
            certificate a step did not halve solves ten times more accurately from then on: where policies are
            almost deterministic, a loose evaluation can lead from one poor policy to another, an exact one cannot.
        inner_steps: cap on Krylov steps, of two products each.
        patience: cap on Krylov steps without progress; permutations of n states show none before the n-th.
        sweeps: plain sweeps before the first step, counted as steps; `max_steps` is for those after. None: on a CPU, or
            where an `init` is given, none; on an accelerator four times the square root of the number of states, up to
            4,096 of them.
    """

    linear: Literal["krylov", "direct"] = "krylov"
    forcing: float = 0.1
    inner_steps: int = 200
    patience: int = 200
    max_steps: int = 200
    sweeps: int | None = None

    def __post_init__(self) -> None:
        if self.linear not in ("krylov", "direct"):
            raise ValueError(f"Newton's linear solver must be 'krylov' or 'direct', got {self.linear!r}")
        if not 0 < self.forcing < 1:
            raise ValueError(f"Newton's forcing must lie strictly between 0 and 1, got {self.forcing}")
        for name in ("inner_steps", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"Newton needs {name} >= 1, got {getattr(self, name)}")
        if self.sweeps is not None and self.sweeps < 0:
            raise ValueError(f"Newton needs sweeps >= 0, got {self.sweeps}")

    def init(self, h: Array) -> tuple[Array, Array]:
        """Each lane's forcing, and its last half-width."""
        lanes = h.shape[1:]
        return jnp.full(lanes, self.forcing, h.dtype), jnp.full(lanes, jnp.inf, h.dtype)

    def propose(self, step: Step, memory: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        """Solution of the policy's linear system, loosely at first."""
        if self.linear == "direct":
            return linear.direct(step.chain, step.residual), memory
        forcing, last = memory
        floor = 10 * float(jnp.finfo(step.h.dtype).eps)
        forcing = jnp.where(step.half_width > 0.5 * last, jnp.maximum(0.1 * forcing, floor), forcing)
        if step.chain.ends:
            # Without a discount a policy that was evaluated loosely may be followed by one whose episodes never end.
            # After an exact evaluation none is (see `undiscounted`).
            forcing = jnp.where(step.chain.discount == 1, min(_EXACT, self.forcing), forcing)
        # The linear residual becomes the next residual of the equation, up to the change of policy: no use in making
        # it smaller than what the lane may stop on, nor in anything for a lane that stops now.
        reduction = jnp.maximum(forcing, 0.25 * step.goal / step.half_width)
        reduction = jnp.where(step.half_width <= step.goal, 1, reduction)
        caps = self.inner_steps, min(self.patience, self.inner_steps)
        return linear.inexact(step.chain, step.residual, step.size, reduction, *caps), (forcing, step.half_width)


@pytrees.options
class Anderson:
    """Anderson acceleration of value iteration [Anderson 1965; Walker and Ni 2011], safeguarded.

    The next value combines the last `history` steps so that their residuals would cancel if T were affine. A lane
    whose residual outgrew the best so far, or has not improved on it for a while, returns to `T V` of that best and
    starts its history anew: value iteration contracts, so that every such round makes progress.

    Attributes:
        history: number of past steps remembered.
    """

    history: int = 5
    max_steps: int = 100_000

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"Anderson needs history >= 1, got {self.history}")

    def init(self, h: Array) -> tuple[Array, ...]:
        """Past differences of values and residuals, the last of each, best half-width, its `T V`, steps since."""
        past, lanes = jnp.zeros((self.history, *h.shape), h.dtype), h.shape[1:]
        return past, past, h, h, jnp.full(lanes, jnp.inf, h.dtype), h, jnp.zeros(lanes, jnp.int32)

    def propose(self, step: Step, memory: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        """Return the residual, less what the past differences explain of it; or the way back to the best value met."""
        dv, dd, last_v, last_d, best, best_tv, idle = memory
        # Constants matter if episodes end; if none does, they would only drown the digits of h.
        v, d = (step.h + step.c[None] if step.chain.ends else step.h), step.residual
        better = step.half_width < best
        idle = jnp.where(better, 0, idle + 1)
        failed = ~(step.half_width <= 1.5 * best) | (idle > 2 * self.history)
        fresh = (failed | (step.count == 0))[None, None]
        slots = jnp.arange(self.history, dtype=jnp.int32).reshape(-1, *[1] * v.ndim)
        slot = (step.count % self.history)[None, None] == slots
        dv = jnp.where(fresh, 0, jnp.where(slot, (v - last_v)[None], dv))
        dd = jnp.where(fresh, 0, jnp.where(slot, (d - last_d)[None], dd))
        x = d - jnp.sum(_least_squares(dd, d)[:, None] * (dv + dd), axis=0)
        x = jnp.where(jnp.all(jnp.isfinite(x), axis=0)[None], x, d)
        x = jnp.where(failed[None], best_tv - v, x)
        best_tv = jnp.where(better[None], v + d, best_tv)
        best = jnp.where(better, step.half_width, best)
        return x, (dv, dd, v, d, best, best_tv, jnp.where(failed, 0, idle))


def _least_squares(columns: Array, b: Array) -> Array:
    """Weights `[m, *B]` that minimise `|b - sum_i w_i columns_i|` per lane, for columns `[m, S, *B]`; `b [S, *B]`.

    Normal equations on columns of unit length with a ridge at the square root of the rounding unit: columns become
    parallel as the iteration converges, and only directions above rounding should count.
    """
    length = jnp.sqrt(jnp.sum(columns**2, axis=1, keepdims=True))
    unit = columns / jnp.where(length > 0, length, 1)
    gram = jnp.moveaxis(jnp.sum(unit[:, None] * unit[None], axis=2), (0, 1), (-2, -1))
    right = jnp.moveaxis(jnp.sum(unit * b[None], axis=1), 0, -1)
    ridge = 10 * float(jnp.finfo(b.dtype).eps)
    eye = jnp.eye(columns.shape[0], dtype=b.dtype)
    # An empty column has no length; a one on its diagonal leaves it out.
    empty = jnp.moveaxis(length[:, 0] == 0, 0, -1)
    gram = gram + jnp.where(empty, 1.0, ridge)[..., None] * eye.reshape((1,) * (gram.ndim - 2) + eye.shape)
    weights = jnp.moveaxis(jnp.linalg.solve(gram, right[..., None])[..., 0], -1, 0)
    return weights / jnp.where(length[:, 0] > 0, length[:, 0], 1)


def chosen(solver: Solver | None, warm: bool) -> Solver:
    """Return the solver to use where `solver` was asked for.

    Args:
        solver: None is Newton's method, the only one good on every problem measured so far.
        warm: whether a start is given, which takes the place of plain sweeps.
    """
    solver = Newton() if solver is None else solver
    if warm and isinstance(solver, Newton) and solver.sweeps is None:
        return dataclasses.replace(solver, sweeps=0)
    return solver
