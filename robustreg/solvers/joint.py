"""Regularised joint occupancies: the front of `joint_dual`, which has the mathematics."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from robustreg._core import checks, pytrees
from robustreg.problems.mdps import MDP
from robustreg.regularisers.families import KL, Alpha, BoundAlpha
from robustreg.solvers import implicit, joint_bounds, joint_dual
from robustreg.solvers.joint_bounds import conditional
from robustreg.solvers.joint_dual import RUNNING, Dual
from robustreg.solvers.solution import Answer, Status
from robustreg.solvers.tolerance import Tolerance

# Default cap on Newton's steps.
_STEPS = 200


@pytrees.dataclass
class OccupancySolution(Answer):
    """Solution of an MDP whose joint occupancy is regularised, batch axes leading.

    Attributes:
        value: the multiplier V of the flow, `[*B, S]`, in reward units, with the constant for which `(1-g) <initial,
            value>` is the optimum; 0 in states that no policy inside the reference comes to.
        occupancy: the optimal mu, `[*B, S, A]`, sums to 1.
        policy: its conditional, `[*B, S, A]`; the reference's where a state is not visited (uniform where the reference
            has nothing either).
        perturbation: the worst case of the reward, which couples the states, `[*B, S, A]`: `r + g P V - V`, that is
            `log_alpha(mu/mu0)/beta + psi` where mu is positive; 0 where the reference is 0 and where nobody comes.
        objective: the optimum `<mu, r> - D[mu0 : mu]/beta` (per step: mu is normalised), `[*B]`.
        lower, upper: certified bounds on it, `[*B]`: what `policy` guarantees, and the dual at `value`.
        status: `Status` codes, `[*B]` int32.
        steps: Newton's steps, `[*B]` int32.
        tol: half of the gap that was asked for, `[*B]`; of the one reached if none was.
    """

    value: Array
    occupancy: Array
    policy: Array
    perturbation: Array
    objective: Array
    lower: Array
    upper: Array
    status: Array
    steps: Array
    tol: Array

    @property
    def gap(self) -> Array:
        """Certified uncertainty `upper - lower`, `[*B]`."""
        return self.upper - self.lower

    def _failure(self, code: Status, lane: tuple[int, ...]) -> str:
        remedy = code.advise(self.value.dtype)
        if code == Status.NONFINITE_INPUT:
            remedy = f"{remedy}, or give the reference every state that its own actions and `initial` lead to"
        return f"(gap {float(np.asarray(self.gap)[lane]):.3g}): {remedy}"


def solve_occupancy(
    mdp: MDP,
    reg: KL | Alpha,
    reference: ArrayLike,
    *,
    tol: ArrayLike | None = None,
    max_steps: int | None = None,
) -> OccupancySolution:
    """Solve an MDP whose joint occupancy of states and actions is regularised, with a certificate.

    Any leaf of `mdp`, `reg` and the reference may carry leading batch axes; they broadcast as in NumPy.

    Args:
        mdp: without `termination`: the occupancy of episodes that end has no fixed sum. (Give the end a state of its
            own, which leads to itself.)
        reg: `robustreg.kl(beta)` or `robustreg.alpha(alpha, beta)` without prior or scales of states.
        reference: mu0, a distribution over pairs `[*B, S, A]`; 0 forbids a pair.
        tol: half of the certified gap at which a lane counts as converged, `[*B]` or a number, in units of the
            objective; None: as tight as the precision supports.
        max_steps: cap on Newton's steps; None: 200.

    Returns:
        An `OccupancySolution`: `lower <= optimum <= upper` whatever the status, and `upper - lower <= 2 tol` where it
        is CONVERGED. `value`, `occupancy`, `policy`, `perturbation` and `objective` are differentiable in every leaf of
        `mdp` and `reg` and in the reference, in both modes and to any order. NONFINITE_INPUT where no policy stays
        inside the reference, or with alpha <= 0 leaves out no pair of it.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or shape, a prior, a termination, a reference that is no
            distribution.
    """
    checks.expect_type(mdp, MDP, "first argument", "mdp")
    if type(reg) not in (KL, Alpha):
        raise TypeError(f"solve_occupancy takes rr.kl(beta) or rr.alpha(alpha, beta), got {type(reg).__name__}")
    names = {"log_prior": "prior", "state_scale": "state_scale", "alpha_per_state": "alpha_per_state"}
    for field, name in names.items():
        if getattr(reg, field, None) is not None:
            raise ValueError(f"reg has a {name}, but the reference occupancy stands in its place: pass {name}=None")
    if mdp.termination is not None:
        raise ValueError(
            "solve_occupancy takes no termination, with which occupancies do not sum to 1: lead episodes that end to a "
            "state of reward 0 that leads to itself"
        )
    reference = checks.array("reference", reference, mdp.dtype)
    checks.expect_shape("reference", reference.shape, (mdp.n_states, mdp.n_actions), "S, A")
    if not checks.is_traced(reference):
        mass = np.asarray(reference, np.float64)
        checks.refuse_improper("reference", mass, ("s", "a"))
        total, margin = mass.sum((-2, -1)), 1e-4 if reference.dtype.itemsize <= 4 else 1e-8
        rule = f"a distribution over pairs sums to 1 (tolerance {margin:g}): divide it by its sum"
        checks.refuse("sum of reference", total, np.abs(total - 1) > margin, (), rule)
    checks.check_tol(tol, "None asks for what the precision supports")
    asked = Tolerance.read(tol, mdp.dtype)
    limit = checks.operand("max_steps", checks.count("max_steps", _STEPS if max_steps is None else max_steps), np.int32)
    with jax.debug_infs(False):
        return _solve(mdp._with_sparsity(), reg, reference, asked, limit)


@jax.jit
def _solve(mdp: MDP, reg: Any, reference: Array, tol: Tolerance, limit: Array) -> OccupancySolution:
    batch: Any = jnp.broadcast_shapes(mdp.batch_shape, reg.batch_shape, reference.shape[:-2], tol.shape)
    problem, sound = joint_dual.bind(mdp, reg, reference, batch)
    tol = tol.broadcast(batch)
    fixed = lax.stop_gradient(problem)
    v, steps, status = joint_dual.minimise(fixed, sound, limit)
    lower, upper, noise = joint_bounds.bounds(fixed, v)
    lost = ~sound | ~jnp.isfinite(upper) | jnp.isnan(lower)
    reached = upper - lower <= jnp.where(tol.given, 2 * tol.value, 16 * noise)
    status = jnp.where(reached, int(Status.CONVERGED), jnp.where(status == RUNNING, int(Status.STAGNATED), status))
    status = jnp.where(lost, jnp.where(sound, int(Status.NONFINITE), int(Status.NONFINITE_INPUT)), status)
    v = joint_dual.attach(_harmless(problem, lost), jnp.where(lost[None], 0, v))
    return _public(_harmless(problem, lost), v, reference, lost, lower, upper, status.astype(jnp.int32), steps, tol)


def _harmless(problem: Dual, lost: Array) -> Dual:
    """An empty problem in the lanes that are lost: see `implicit`."""

    def put(x: Array, value: float) -> Array:
        return pytrees.put_in_lanes(x, lost, value)

    reg = problem.regulariser
    pairs = math.prod(problem.kept.shape[:2])
    leaves = {"beta": put(reg.beta, 1.0), "log_prior": put(reg.log_prior, -float(np.log(pairs)))}
    if isinstance(reg, BoundAlpha):
        leaves["alpha"] = put(reg.alpha, 1.0)
    return Dual(
        problem.transitions._silenced(lost),
        dataclasses.replace(reg, **leaves),
        put(problem.reward, 0.0),
        put(problem.discount, 0.0),
        put(problem.complement, 1.0),
        put(problem.initial, 1.0 / problem.initial.shape[0]),
        problem.kept | lost[None, None],
        put(problem.offset, 0.0),
    )


def _public(
    problem: Dual,
    v: Array,
    reference: Array,
    lost: Array,
    lower: Array,
    upper: Array,
    status: Array,
    steps: Array,
    tol: Tolerance,
) -> OccupancySolution:
    """The answer in the public layout, V's constant fixed; NaN in lanes that are lost."""
    level, mu = problem.conjugate(v)
    mu = jnp.where(problem.kept, mu, 0)
    # C(x - (1-g) c) = C(x) - (1-g) c = 0
    known = jnp.any(problem.kept, axis=0)
    value = jnp.where(known, v + (level / problem.complement)[None], 0)
    perturbation = jnp.where(problem.kept, problem.perturbed(v) - level[None, None], 0)
    n = lost.ndim
    mu0 = jnp.broadcast_to(pytrees.lanes_last(reference, n, 2), mu.shape)
    policy = conditional(mu, conditional(mu0, jnp.full_like(mu, 1 / mu.shape[0])))
    objective = problem.dual(v, level)

    def public(x: Array, core: int) -> Array:
        return pytrees.batch_first(implicit.mark(x, lost), core)

    return OccupancySolution(
        value=public(value, 1),
        occupancy=public(mu, 2),
        policy=public(policy, 2),
        perturbation=public(perturbation, 2),
        objective=public(objective, 0),
        lower=jnp.where(lost, jnp.nan, lower),
        upper=jnp.where(lost, jnp.nan, upper),
        status=status,
        steps=steps,
        tol=tol.or_reached(0.5 * (upper - lower)),
    )
