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
from typing import Any

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
    c = 0.5 * (jnp.max(v, axis=0) + jnp.min(v, axis=0))
    h = v - c[None]
    worst = bellman.worst_transitions(problem, h, c)
    th, q = bellman.backup(problem, h, c, worst)[0], bellman.q_values(problem, h, c)
    masked = jnp.isneginf(problem.regulariser.log_prior)
    q = jnp.where(masked, 0, q)
    # Rows that are no distribution (beyond rounding of their sum) prove nothing.
    unit = float(jnp.finfo(mdp.dtype).eps)
    proper = jnp.all(p >= 0, axis=0) & (jnp.abs(jnp.sum(p, axis=0) - 1) <= 8 * p.shape[0] * unit)
    p = jnp.where(proper[None], p, jnp.nan)
    operator, left = bellman.faced(problem, h, c, worst)
    left = jnp.where(masked, 0, left)
    own = jnp.sum(p * left, axis=0) - operator.value(p)
    wanted = undiscounted.pending(problem)
    problem, steps = undiscounted.own_horizon(problem, p)
    shortage = _shortage(problem, operator, p, q)
    lower = bellman.value_bounds(problem, h, c, own, bellman.cost(problem, own, q))[0] - shortage[None]
    cost = bellman.cost(problem, th, q)
    upper = bellman.value_bounds(problem, h, c, th, cost)[1]
    if wanted is not None and steps is not None:
        # The steps of this policy say nothing of the others: see `undiscounted`.
        z = undiscounted.allowance(problem, h, c, th, q)[None] * steps
        proved = undiscounted.above(problem, h, c, z)
        upper = jnp.where(wanted[None], jnp.where(proved[None], v + (1 + 4 * unit) * z, jnp.inf), upper)
    wrong = (lower > upper) | ~bellman.sound(problem)[None]
    lower, upper = (jnp.where(wrong, jnp.nan, x) for x in (lower, upper))
    perturbed = q - dr
    indifference = extremes.largest(jnp.where(p > 0, jnp.abs(perturbed - h[None]), 0 * p), 0)
    best = extremes.largest(jnp.where(masked, -jnp.inf, perturbed), 0)
    # (What noise in the transitions takes off is in the perturbation: for it the transitions are what they were.)
    bare = problem if ball is None else bound_problem.bind(mdp, reg, *others, strict=strict)
    below, above = bellman.value_bounds(bare, h, c, best, jnp.zeros_like(c))
    if wanted is not None and steps is not None:
        plain = _plain_bounds(problem, h, c, dr, p, steps)
        below, above = (jnp.where(wanted[None], x, y) for x, y in zip(plain, (below, above)))
    consistency = jnp.maximum(jnp.abs(above - v), jnp.abs(below - v))
    feasible = -maximise(operator.by_rows(), jnp.broadcast_to(dr - (q - left), q.shape))[0]
    noise = bellman.rounding(problem, jnp.max(jnp.abs(h), axis=0), c, cost)
    stored = 0.5 * unit * jnp.max(jnp.abs(v), axis=0) * (1 + problem.discount) * problem.horizon
    # q, the q that the perturbation was made of, and the perturbation are each rounded to half a unit of their size.
    sizes = jnp.where(masked | ~jnp.isfinite(dr), 0, 2 * jnp.abs(q) + jnp.abs(dr))
    storage = 0.5 * unit * jnp.max(sizes, axis=(0, 1)) * problem.horizon
    public = [pytrees.batch_first(x, 1) for x in (lower, upper, indifference, feasible, consistency)]
    noise = noise + jnp.where(jnp.isfinite(shortage), shortage, 0) + stored
    return Certificate(*public, rounding=noise, storage=storage)


def _plain_bounds(
    problem: BoundProblem, h: Array, c: Array, dr: Array, policy: Array, steps: Array
) -> tuple[Array, Array]:
    """Bounds on the best plain value on the perturbed reward where some policy need not end, `[S, *B]` each.

    Against the worst case every action is worth as much as every other, going on forever included: what earns nothing
    more than x in a step earns no more than x times its steps, and policies that take more of them than this one are
    left out.
    """
    masked = jnp.where(
        jnp.isneginf(problem.regulariser.log_prior), -jnp.inf, jnp.zeros_like(problem.regulariser.log_prior)
    )
    operator: Any = HardMax(unlimited(problem), masked)
    plain = bound_problem.with_operator(problem, operator, problem.reward - jnp.where(jnp.isfinite(dr), dr, 0))
    th, _, q = bellman.backup(plain, h, c)
    # Above the best there is, below what this policy earns.
    own = jnp.sum(policy * jnp.where(policy > 0, q, 0), axis=0)
    most, least = (undiscounted.allowance(plain, h, c, x, q) for x in (th, own))
    v, z = h + c[None], jnp.maximum(most, least)[None] * steps
    return v - z, v + z


def _shortage(problem: BoundProblem, operator: Bound, policy: Array, q: Array) -> Array:
    """How much lower than computed a policy's value may be: rounding of its cost, and of its sum, `[*B]`."""
    unit = 0.5 * float(jnp.finfo(policy.dtype).eps)
    moved = jnp.abs(jnp.sum(policy, axis=0) - 1) + policy.shape[0] * unit
    each = operator.value_error(policy) + moved * jnp.abs(jnp.sum(policy * q, axis=0))
    # `rounding` counts the reward of an action by what an optimal policy may give it: this one may give it more.
    paid = 3 * unit * jnp.sum(policy * jnp.where(policy == 0, 0, jnp.abs(problem.reward)), axis=0)
    return jnp.max(each + paid, axis=0) * problem.horizon
