"""Certificates: what a solution proves, checked from nothing but the problem and the numbers that are claimed.

A certificate trusts no solver, and no root finder. From `value` and `policy` it recomputes

* `upper`: no policy does better. One backup at `value` [Puterman 1994, sec. 6.6], in which the conjugate is bounded by
  its dual function `psi + max { <p, q - psi> - Omega(p) : p >= 0 }` at the psi that was found; any psi gives a bound.
* `lower`: this policy guarantees that much against every perturbation in the robust set. One evaluation step
  `<p, q> - Omega(p)` of the policy itself at `value`, by the same theorem for its own operator, less what rounding can
  do to `Omega` at a policy that may be anything. It holds for the policy divided by its sum.
* `gap = upper - lower`: the duality gap per state; V* and the policy's guaranteed value both lie in between.
* `slack`: the claimed perturbation is feasible where it is >= 0 (to rounding).
* `indifference`: `|r - dr + g P V - V|`, largest over the actions that the policy takes: against the worst case, the
  agent has no reason to prefer one action to another.
* `consistency`: bound on the distance between `value` and the best value that *any* policy reaches on the perturbed
  reward without a regulariser, which theory says is 0.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import checks, extremes, pytrees
from robustreg.problems.mdps import MDP
from robustreg.regularisers.bound import Bound, maximise
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import ambiguity as balls
from robustreg.solvers import bellman, bound_problem, plain, undiscounted
from robustreg.solvers.ambiguity import TransitionBall
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.evaluation import unlimited
from robustreg.solvers.plain import HardMax
from robustreg.solvers.solution import Solution, SolveError, concrete


@pytrees.dataclass
class Certificate:
    """Hold what was proved, all `[*B, S]` and in reward units, `gap` included.

    Attributes:
        lower: the policy's guaranteed value is at least this, and V* is.
        upper: V* is at most this. Where the two cross, one of them is no bound (a defect of this library, or numbers
            beyond its precision), and both are NaN.
        indifference: largest `|r - dr + g P V - V|` over the support of the policy.
        slack: `-Omega*(dr)`, 0 at a worst case, negative where the perturbation is infeasible.
        consistency: bound on `|W - value|`, W the plain optimal value on `reward - dr`. (At a discount of 1 where some
            policy need not end, W is the best of those that take no more steps than this one on average.)
        rounding: share of floating point in each side of `lower` and `upper`, `[*B]`: of the backups, of `Omega` at
            the policy, and of the storage of `value`, which every solver rounds by `u |value|` and which moves each
            side by `(1+g)/(1-g)` times as much. A converged solution's sides lie within `tol + rounding` of its value.
        storage: what `indifference` and `consistency` may be because rewards and perturbations are stored in their
            dtype, `[*B]`: both look at `Q - dr` unweighted, also at an action that is (almost) never taken, whose
            penalty of -1e6 has a last digit of .06 in float32. The bounds do not depend on it.
    """

    lower: Array
    upper: Array
    indifference: Array
    slack: Array
    consistency: Array
    rounding: Array
    storage: Array

    @property
    def gap(self) -> Array:
        """`upper - lower`: the duality gap per state, `[*B, S]`."""
        return self.upper - self.lower

    def raise_if_loose(self, tol: ArrayLike) -> "Certificate":
        """Return the certificate if everything holds within `tol`.

        Args:
            tol: in reward units, a number or one per lane, `[*B]`. `sol.tol + certificate.rounding` is what a converged
                solution passes. Both bounds lie within `tol` of their middle, `slack` of 0; `indifference` and
                `consistency` are at most `2 tol`, beyond the `storage` of the perturbation.

        Raises:
            SolveError: naming the first quantity, lane and state that does not, or is NaN; a negative gap as well.
            TypeError: inside jit, vmap or grad.
            ValueError: a `tol` of other axes, or negative.
        """
        gap = concrete(self.gap, "raise_if_loose", "the arrays of the certificate")
        limit = concrete(tol, "raise_if_loose", "the arrays of the certificate") if checks.is_traced(tol) else tol
        limit = checks.number("tol", limit)
        if not np.all(limit >= 0):
            raise ValueError(f"tol must not be negative, got {tol}")
        if limit.ndim and limit.shape != gap.shape[:-1]:
            raise ValueError(f"tol has shape {limit.shape}; expected a number or one per lane, {gap.shape[:-1]}")
        limit = np.broadcast_to(limit[..., None], gap.shape)
        stored = 2 * limit + np.broadcast_to(np.asarray(self.storage)[..., None], gap.shape)
        finer = "solve again with a smaller tol"
        if gap.dtype.itemsize < 8:
            finer += " or in float64"
        claims = {
            "gap": (gap, 2 * limit, f"{finer}; `rounding` is what this precision cannot tell"),
            "indifference": (self.indifference, stored, "the perturbation does not belong to the value"),
            "slack": (np.abs(self.slack), limit, "the perturbation is not on the boundary of the robust set"),
            "consistency": (self.consistency, stored, "the perturbed reward does not have this value"),
        }
        for name, (size, most, remedy) in claims.items():
            size = np.asarray(size)
            loose = ~((size >= 0) & (size <= most))
            if loose.any():
                *lane, state = place = tuple(int(i) for i in np.argwhere(loose)[0])
                where = f"lane {lane}, state {state}" if lane else f"state {state}"
                excess = f"{name} is {size[place]:.3g}, not within {most[place]:.3g}"
                raise SolveError(f"certificate: {excess}, at {where}: {remedy}")
        return self


def certify(
    mdp: MDP,
    reg: Regulariser | None,
    sol: Solution,
    *,
    strict: bool = False,
    ambiguity: TransitionBall | None = None,
) -> Certificate:
    """Check a solution against its problem, independently of the solver that made it.

    Args:
        mdp, reg: the problem; a reg of None is the plain maximum.
        sol: a `Solution`, or anything with its `value [*B, S]`, `policy [*B, S, A]` and `perturbation [*B, S, A]`.
        strict: whether rounding is bounded for the worst case, as in `solve`; by default long sums are bounded with a
            probability close to 1.
        ambiguity: noise in the transitions, as in `solve`. Bounds are those of the robust value then, and `slack` that
            of what the perturbation leaves to the reward.

    Returns:
        A `Certificate`; NaN at states whose policy is no distribution over actions (to rounding of its sum), and in
        lanes whose problem is none (a discount or a beta out of range, rows of P that do not sum to 1 - termination).
    """
    reg = plain.regulariser_or_none(mdp, reg)
    checks.expect_type(mdp, MDP, "first argument", "mdp")
    checks.expect_type(reg, Regulariser, "second argument", "kl")
    pairs = (mdp.n_states, mdp.n_actions)
    names = ("value", "policy", "perturbation")
    if not all(hasattr(sol, name) for name in names):
        raise TypeError(f"sol must be a Solution, or have {', '.join(names)}; got {type(sol).__name__}")
    claims = {name: checks.array(f"sol.{name}", getattr(sol, name), mdp.dtype) for name in names}
    for name, x in claims.items():
        core, letters = (pairs[:1], "S") if name == "value" else (pairs, "S, A")
        checks.expect_shape(name, x.shape, core, letters)
    ball = None if ambiguity is None else balls.checked(ambiguity, mdp)
    return _certify(mdp._with_sparsity(), reg, *claims.values(), ball, strict=checks.flag("strict", strict))


class _Claim(NamedTuple):
    """Hold a claimed value V = h + c and policy, and what one step from them is worth.

    Attributes:
        value, h: `[S, *B]`; c: `[*B]`.
        policy: `[A, S, *B]`; NaN where it is no distribution.
        th: `T V - c`, `[S, *B]`.
        q, left: action values less c, and what the worst transitions leave of them, `[A, S, *B]`; 0 where `masked`.
        operator: the operator that faces those transitions.
        masked: actions that the prior forbids.
    """

    value: Array
    h: Array
    c: Array
    policy: Array
    th: Array
    q: Array
    left: Array
    operator: Bound
    masked: Array


class _Pending(NamedTuple):
    """Hold where some policy need not end: which lanes, `[*B]`, and the steps of the claimed one, `[S, *B]`."""

    lanes: Array
    steps: Array


@functools.partial(jax.jit, static_argnames="strict")
def _certify(
    mdp: MDP,
    reg: Regulariser,
    value: Array,
    policy: Array,
    perturbation: Array,
    ball: TransitionBall | None,
    strict: bool,
) -> Certificate:
    others = (value.shape[:-1], policy.shape[:-2], perturbation.shape[:-2])
    problem = bound_problem.bind(mdp, reg, *others, strict=strict, ambiguity=ball)
    n = len(problem.batch)
    v, p, dr = (pytrees.lanes_last(x, n, core) for x, core in ((value, 1), (policy, 2), (perturbation, 2)))
    claim = _claimed(problem, v, p)
    wanted = undiscounted.pending(problem)
    problem, steps = undiscounted.own_horizon(problem, claim.policy)
    pending = None if wanted is None or steps is None else _Pending(wanted, steps)
    shortage = _shortage(problem, claim)
    lower, upper = _bounds(problem, claim, shortage, pending)
    # (What noise in the transitions takes off is in the perturbation: for it the transitions are what they were.)
    bare = problem if ball is None else bound_problem.bind(mdp, reg, *others, strict=strict)
    indifference, consistency = _against(problem, bare, claim, dr, pending)
    feasible = jnp.broadcast_to(dr - (claim.q - claim.left), claim.q.shape)
    slack = -maximise(claim.operator.by_rows(), feasible)[0]
    public = [pytrees.batch_first(x, 1) for x in (lower, upper, indifference, slack, consistency)]
    rounding, storage = _roundings(problem, claim, dr)
    return Certificate(*public, rounding=rounding + jnp.where(jnp.isfinite(shortage), shortage, 0), storage=storage)


def _claimed(problem: BoundProblem, v: Array, policy: Array) -> _Claim:
    """Take one step from what is claimed."""
    c = 0.5 * (jnp.max(v, axis=0) + jnp.min(v, axis=0))
    h = v - c[None]
    worst = bellman.worst_transitions(problem, h, c)
    masked = jnp.isneginf(problem.regulariser.log_prior)
    operator, left = bellman.faced(problem, h, c, worst)
    th = maximise(operator, left)[0]
    q = left if problem.ball is None else bellman.q_values(problem, h, c)
    q, left = (jnp.where(masked, 0, x) for x in (q, left))
    # Rows that are no distribution (beyond rounding of their sum) prove nothing.
    unit = float(jnp.finfo(v.dtype).eps)
    proper = jnp.all(policy >= 0, axis=0) & (jnp.abs(jnp.sum(policy, axis=0) - 1) <= 8 * policy.shape[0] * unit)
    return _Claim(v, h, c, jnp.where(proper[None], policy, jnp.nan), th, q, left, operator, masked)


def _bounds(problem: BoundProblem, at: _Claim, shortage: Array, pending: _Pending | None) -> tuple[Array, Array]:
    """Bound what the policy guarantees from below and V* from above, `[S, *B]` each; NaN where the two cross."""
    own = jnp.sum(at.policy * at.left, axis=0) - at.operator.value(at.policy)
    lower = bellman.value_bounds(problem, at.h, at.c, own, bellman.cost(problem, own, at.q))[0] - shortage[None]
    upper = bellman.value_bounds(problem, at.h, at.c, at.th, bellman.cost(problem, at.th, at.q))[1]
    if pending is not None:
        # The steps of this policy say nothing of the others: see `undiscounted`.
        unit = float(jnp.finfo(problem.dtype).eps)
        z = undiscounted.allowance(problem, at.h, at.c, at.th, at.q)[None] * pending.steps
        proved = undiscounted.above(problem, at.h, at.c, z)
        bound = jnp.where(proved[None], at.value + (1 + 4 * unit) * z, jnp.inf)
        upper = jnp.where(pending.lanes[None], bound, upper)
    wrong = (lower > upper) | ~bellman.sound(problem)[None]
    return jnp.where(wrong, jnp.nan, lower), jnp.where(wrong, jnp.nan, upper)


def _against(
    problem: BoundProblem, bare: BoundProblem, at: _Claim, dr: Array, pending: _Pending | None
) -> tuple[Array, Array]:
    """Compute `indifference` and `consistency` against the perturbation `dr [A, S, *B]`, `[S, *B]` each.

    Args:
        bare: the problem whose transitions are certain.
    """
    perturbed = at.q - dr
    indifference = extremes.largest(jnp.where(at.policy > 0, jnp.abs(perturbed - at.h[None]), 0 * at.policy), 0)
    best = extremes.largest(jnp.where(at.masked, -jnp.inf, perturbed), 0)
    below, above = bellman.value_bounds(bare, at.h, at.c, best, jnp.zeros_like(at.c))
    if pending is not None:
        plain = _plain_bounds(problem, at, dr, pending.steps)
        below, above = (jnp.where(pending.lanes[None], x, y) for x, y in zip(plain, (below, above)))
    return indifference, jnp.maximum(jnp.abs(above - at.value), jnp.abs(below - at.value))


def _plain_bounds(problem: BoundProblem, at: _Claim, dr: Array, steps: Array) -> tuple[Array, Array]:
    """Bounds on the best plain value on the perturbed reward where some policy need not end, `[S, *B]` each.

    Against the worst case every action is worth as much as every other, going on forever included: what earns nothing
    more than x in a step earns no more than x times its steps, and policies that take more of them than this one are
    left out.
    """
    log_prior = jnp.where(at.masked, -jnp.inf, jnp.zeros_like(problem.regulariser.log_prior))
    operator: Any = HardMax(unlimited(problem), log_prior)
    plain = bound_problem.with_operator(problem, operator, problem.reward - jnp.where(jnp.isfinite(dr), dr, 0))
    th, _, q = bellman.backup(plain, at.h, at.c)
    # Above the best there is, below what this policy earns.
    own = jnp.sum(at.policy * jnp.where(at.policy > 0, q, 0), axis=0)
    most, least = (undiscounted.allowance(plain, at.h, at.c, x, q) for x in (th, own))
    v, z = at.h + at.c[None], jnp.maximum(most, least)[None] * steps
    return v - z, v + z


def _roundings(problem: BoundProblem, at: _Claim, dr: Array) -> tuple[Array, Array]:
    """Compute `rounding`, but for the policy's share of it, and `storage` of a `Certificate`, `[*B]` each."""
    unit = float(jnp.finfo(problem.dtype).eps)
    cost = bellman.cost(problem, at.th, at.q)
    noise = bellman.rounding(problem, jnp.max(jnp.abs(at.h), axis=0), at.c, cost)
    stored = 0.5 * unit * jnp.max(jnp.abs(at.value), axis=0) * (1 + problem.discount) * problem.horizon
    # q, the q that the perturbation was made of, and the perturbation are each rounded to half a unit of their size.
    sizes = jnp.where(at.masked | ~jnp.isfinite(dr), 0, 2 * jnp.abs(at.q) + jnp.abs(dr))
    return noise + stored, 0.5 * unit * jnp.max(sizes, axis=(0, 1)) * problem.horizon


def _shortage(problem: BoundProblem, at: _Claim) -> Array:
    """Bound how much lower than computed the policy's value may be: rounding of its cost, and of its sum, `[*B]`."""
    policy, unit = at.policy, 0.5 * float(jnp.finfo(problem.dtype).eps)
    moved = jnp.abs(jnp.sum(policy, axis=0) - 1) + policy.shape[0] * unit
    each = at.operator.value_error(policy) + moved * jnp.abs(jnp.sum(policy * at.q, axis=0))
    # `rounding` counts the reward of an action by what an optimal policy may give it: this one may give it more.
    paid = 3 * unit * jnp.sum(policy * jnp.where(policy == 0, 0, jnp.abs(problem.reward)), axis=0)
    return jnp.max(each + paid, axis=0) * problem.horizon
