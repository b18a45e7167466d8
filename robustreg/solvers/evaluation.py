"""Values and occupancies of fixed policies, and the best value without a regulariser.

**Evaluation is a solve.** The value of a fixed policy is the fixed point of an affine T, the best unregularised value
that of a maximum: both are "regularisers" whose conjugate is trivial, and the loop of `solve` treats them like any
other, certificate included.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from robustreg._core import checks, loops, pytrees
from robustreg.problems.mdps import MDP
from robustreg.regularisers import masks
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import ambiguity as balls
from robustreg.solvers import bellman, bound_problem, elimination, implicit, linear, methods, readings, undiscounted
from robustreg.solvers.ambiguity import TransitionBall
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.loop import Loop, iterate
from robustreg.solvers.methods import Solver
from robustreg.solvers.plain import FixedPolicy, no_regulariser
from robustreg.solvers.solution import Status
from robustreg.solvers.tolerance import Tolerance


def unlimited(problem: BoundProblem) -> Array:
    """Return an endless beta, for an operator that has no logarithms to round, laid out as the problem's own."""
    return jnp.full_like(problem.regulariser.beta, jnp.finfo(problem.dtype).max)


def evaluate(
    mdp: MDP,
    policy: ArrayLike,
    reg: Regulariser | None = None,
    reward: ArrayLike | None = None,
    ambiguity: TransitionBall | None = None,
) -> Array:
    """Compute the value of a fixed policy.

    Args:
        mdp: the MDP.
        policy: `[*B, S, A]`, normalised over actions.
        reg: with a regulariser, the regularised value `E sum g^t (r - Omega(p))`, which is the policy's guaranteed
            value against every perturbation in the robust set; None: the plain value.
        reward: another reward, `[*B, S, A]`, for example the deployed or the perturbed one.
        ambiguity: noise in the transitions, a `TransitionBall`: the value is then that against the worst of them. None
            is none.

    Returns:
        `[*B, S]`, in reward units, to the working precision; NaN in lanes where that failed (input that is not
        finite, overflow, or a certified error above half the digits). With a regulariser, minus infinity in states
        from which the policy comes to one where its cost is infinite (an action of prior 0, or with alpha <= 0 an
        action omitted).

    Raises:
        ValueError: a policy or reward of another shape, a policy that is no distribution over actions or plays one that
            is not available. (Inside jit, where no values are looked at, the latter is worth NaN or minus infinity.)
    """
    policy = _policy(mdp, policy)
    if reg is not None:
        checks.expect_type(reg, Regulariser, "third argument", "kl")
    if reward is not None:
        reward = checks.array("reward", reward, mdp.dtype)
        checks.expect_shape("reward", reward.shape, (mdp.n_states, mdp.n_actions), "S, A")
    readings.refuse_states_as_lanes(mdp, reg, *(readings.shape_of(x, 2) for x in (policy, reward)))
    ball = None if ambiguity is None else balls.checked(ambiguity, mdp)
    return _evaluate(mdp._with_sparsity(), policy, reg, reward, ball=ball)


def evaluate_from(mdp: MDP, policy: Array, start: Array, tol: Array | None) -> Array:
    """Compute the value of a policy as `evaluate` does, `[*B, S]`, to within `tol`, from a guess `[*B, S]` of it.

    None, or a tolerance that the precision does not support, is as accurate as `evaluate`.
    """
    return _evaluate(mdp._with_sparsity(), policy, None, None, start, tol)


@jax.jit
def _evaluate(
    mdp: MDP,
    policy: Array,
    reg: Regulariser | None,
    reward: Array | None,
    start: Array | None = None,
    tol: Array | None = None,
    ball: TransitionBall | None = None,
) -> Array:
    others = (policy.shape[:-2],) + (() if reward is None else (reward.shape[:-2],))
    problem = bound_problem.bind(mdp, no_regulariser(mdp) if reg is None else reg, *others, ambiguity=ball)
    n = len(problem.batch)
    p = jnp.broadcast_to(pytrees.lanes_last(policy, n, 2), policy.shape[:-3:-1] + problem.batch)
    cost, ruined = _cost(problem, p, reg is None)
    if mdp.available is not None:
        wrong = masks.plays_missing(p, pytrees.lanes_last(mdp.available, n, 2))
        cost = jnp.where(wrong & ~ruined, jnp.nan, cost)
    # Actions never taken are masked: a perturbed reward may be infinite there.
    reward = problem.reward if reward is None else pytrees.lanes_last(reward, n, 2)
    fixed = FixedPolicy(p, cost, unlimited(problem), jnp.where(p == 0, -jnp.inf, 0).astype(p.dtype))
    value = fixed_point(problem, fixed, reward, None if start is None else pytrees.lanes_last(start, n, 1), tol)
    return value if reg is None else jnp.where(pytrees.batch_first(ruined, 1), -jnp.inf, value)


def _cost(problem: BoundProblem, policy: Array, free: bool) -> tuple[Array, Array]:
    """Cost of a policy `[S, *B]`, and the states from which it comes to one of infinite cost, where it is 0 instead.

    Where no cost is infinite, which is nearly always, the loop below does not turn once.
    """
    if free:
        zero = jnp.zeros((1,) * (policy.ndim - 1), policy.dtype)
        return zero, zero > 0
    infinite = jnp.isposinf(problem.regulariser.value(lax.stop_gradient(policy)))
    onwards = (policy > 0) & (problem.discount > 0)[None, None]

    def spread(ruined: Array) -> Array:
        # Products of probabilities may underflow to 0: an action and a successor count by being possible at all.
        leads = problem.transitions._expect(ruined.astype(policy.dtype)) > 0
        return ruined | jnp.any(onwards & leads, axis=0)

    ruined = loops.until_stable(spread, infinite, (onwards, problem.transitions))
    # The derivative there is that of another policy, which has one: a gradient that nobody asks for is then 0, not NaN.
    prior = jax.nn.softmax(jnp.broadcast_to(lax.stop_gradient(problem.regulariser.log_prior), policy.shape), axis=0)
    cost = problem.regulariser.value(jnp.where(ruined[None], prior, policy))
    return jnp.where(ruined, 0, cost), ruined


def nominal_optimum(mdp: MDP, reg: Regulariser | None = None) -> Array:
    """Find the best value without a regulariser: policy iteration, to the working precision.

    `<initial, nominal_optimum - evaluate(policy)>` is the price of a policy's robustness.

    Args:
        mdp: the MDP; actions that are not available are not played.
        reg: with a regulariser, actions that its prior forbids are not played either; its strength does not matter.

    Returns:
        `[*B, S]`, in reward units; the batch axes are those of the MDP and the prior. NaN as in `evaluate`.
    """
    checks.expect_type(mdp, MDP, "first argument", "mdp")
    if reg is not None:
        checks.expect_type(reg, Regulariser, "second argument", "kl")
    readings.refuse_states_as_lanes(mdp)
    return _nominal_optimum(mdp._with_sparsity(), None if reg is None else reg.log_prior)


@jax.jit
def _nominal_optimum(mdp: MDP, log_prior: Array | None) -> Array:
    problem = bound_problem.bind(mdp, dataclasses.replace(no_regulariser(mdp), log_prior=log_prior))
    return fixed_point(problem, problem.regulariser, problem.reward)


def fixed_point(
    problem: BoundProblem,
    operator: Bound,
    reward: Array,
    start: Array | None = None,
    tol: ArrayLike | None = None,
) -> Array:
    """Find the fixed point of an operator in the place of the regulariser, `[*B, S]`.

    Args:
        problem: the lanes.
        operator: bound as the problem's own regulariser is.
        reward: bound likewise.
        start: where to begin, `[S, *B]`; None: at what one step is worth.
        tol: error to stop at, a number; None: as small as the precision supports.
    """
    single = isinstance(operator, FixedPolicy)
    if single:
        problem, _ = undiscounted.own_horizon(problem, operator.policy)
    problem = bound_problem.with_operator(problem, operator, reward)
    goal = Tolerance.read(tol, problem.dtype).broadcast(problem.batch)
    chosen = start is not None
    start = jnp.broadcast_to(start, (problem.n_states, *problem.batch)) if chosen else bellman.of_one_step(problem)
    begun, start, wanted = undiscounted.begin(problem, start, chosen)
    if single:  # no other policy has to end
        begun, wanted = problem, None
    problem, fixed = begun, lax.stop_gradient(begun)
    loop = lax.stop_gradient(search(fixed, undiscounted.asked(wanted, goal), start))
    problem, half_width, lost = undiscounted.settle(problem, wanted, loop.h, loop.c, loop.half_width)
    status = undiscounted.verdict(loop.status, wanted, lost, half_width, goal)
    fixed = dataclasses.replace(fixed, horizon=lax.stop_gradient(problem.horizon))
    h, c, failed = _settled(fixed, dataclasses.replace(loop, half_width=half_width, status=status), goal)
    h, c, zero = (jnp.where(failed, 0, x) for x in (h, c, jnp.zeros_like(c)))
    found = loops.alike((problem, h, c, zero, None, zero, failed))
    h = implicit.attach(linear.Method(), *found)[0]
    return pytrees.batch_first(implicit.mark(h + c[None], failed), 1)


def search(problem: BoundProblem, tol: Tolerance, start: Array) -> Loop:
    """Run the loop on a problem whose regulariser may be one policy, from a start `[S, *B]`; see `loop.iterate`."""
    single = isinstance(problem.regulariser, FixedPolicy)
    solver = _evaluation(problem) if single else methods.chosen(None, warm=True)
    return iterate(problem, solver, tol, jnp.asarray(10_000, jnp.int32), start)


def _evaluation(problem: BoundProblem) -> Solver:
    """Newton's method for the operator of one policy, which is affine: one linear system, solved well at once.

    A step or two more take off what rounding left. Where `_settled` can eliminate, a chain that needs many is not its
    kind.
    """
    few = problem.n_states <= elimination.STATES
    return methods.Newton(
        forcing=100 * float(jnp.finfo(problem.dtype).eps),
        inner_steps=linear.KRYLOV_STEPS,
        patience=linear.idle_steps(problem.n_states),
        max_steps=6 if few else 200,
        sweeps=0,
    )


def _settled(problem: BoundProblem, loop: Loop, tol: Tolerance) -> tuple[Array, Array, Array]:
    """The fixed point `h + c` that a loop found, and the lanes in which it found none, `[*B]`.

    No status goes with a bare value: one that missed half its digits must not pass for one that has them. The value of
    a policy is the solution of one linear system, which elimination solves to all of them where the loop cannot.
    """
    h, c, size = loop.h, loop.c, jnp.max(jnp.abs(loop.h + loop.c[None]), axis=0)
    lost = loop.status >= int(Status.NONFINITE_INPUT)
    half = float(jnp.finfo(problem.dtype).eps) ** 0.5
    poor = (loop.status != int(Status.CONVERGED)) & (loop.half_width > half * size)
    if isinstance(problem.regulariser, FixedPolicy) and problem.ball is None:
        reward, policy = problem.regulariser.maximiser(problem.reward)
        # A lane that ended for want of steps, or of progress, may have digits left that rounding does not take.
        converged = loop.status == int(Status.CONVERGED)
        fine = converged | (loop.half_width <= 2 * loop.noise)
        certain = lost | (fine & (loop.half_width <= min(half, linear.trusted(problem.dtype)) * size))
        certain = certain | (converged & tol.given)  # no more was asked for
        value = h + c[None]
        exact, solved = linear.eliminate(bellman.chain(problem, policy), reward, value, certain)
        better = solved & ~certain
        h, c = jnp.where(better[None], exact, h), jnp.where(better, 0, c)
        # A rounding bound is that of the worst case, some ten times what happens. Beyond that only elimination helps.
        poor = ~better & (poor | (~certain & (loop.half_width > 10 * linear.trusted(problem.dtype) * size)))
    return h, c, lost | poor


def occupancy(mdp: MDP, policy: ArrayLike) -> Array:
    """Discounted state-action occupancy of a policy, unnormalised.

    Args:
        mdp: the MDP, whose `initial` starts the episodes.
        policy: `[*B, S, A]`, normalised over actions.

    Returns:
        `mu(s, a) = sum_t g^t Pr(s_t = s, a_t = a)`, `[*B, S, A]`; sums to 1/(1-g) if no episode ends, and
        to the expected steps of an episode at a discount of 1 (NaN where the policy's need not end). It is the
        gradient of the return in the reward.
    """
    policy = _policy(mdp, policy)
    readings.refuse_states_as_lanes(mdp, None, readings.shape_of(policy, 2))
    return _occupancy(mdp._with_sparsity(), policy)


def _policy(mdp: MDP, policy: ArrayLike) -> Array:
    """A policy of an MDP as an array; values are checked where they exist."""
    checks.expect_type(mdp, MDP, "first argument", "mdp")
    policy = checks.array("policy", policy, mdp.dtype)
    checks.check_policy(policy, (mdp.n_states, mdp.n_actions), "S, A")
    masks.refuse_missing(policy, mdp.available)
    return policy


@jax.jit
def _occupancy(mdp: MDP, policy: Array) -> Array:
    problem = bound_problem.bind(mdp, no_regulariser(mdp), policy.shape[:-2])
    n = len(problem.batch)
    p = jnp.broadcast_to(pytrees.lanes_last(policy, n, 2), policy.shape[:-3:-1] + problem.batch)
    if mdp.available is not None:
        wrong = masks.plays_missing(p, pytrees.lanes_last(mdp.available, n, 2))
        p = jnp.where(wrong[None], jnp.nan, p)
    initial = jnp.broadcast_to(pytrees.lanes_last(mdp.initial, n, 1), p.shape[1:])
    problem, _ = undiscounted.own_horizon(problem, p)
    lost = lax.stop_gradient(~bellman.sound(problem) | ~jnp.all(jnp.isfinite(p), axis=(0, 1)))
    problem, p = implicit.harmless(problem, lost), jnp.where(lost[None, None], 1 / p.shape[0], p)
    chain = bellman.chain(problem, p)
    states = linear.occupy(chain, initial, jnp.zeros(problem.batch, mdp.dtype), linear.Method())
    # Rounding leaves states that nobody visits at either side of 0; the derivative there is that of the system.
    states = states + lax.stop_gradient(jnp.maximum(states, 0) - states)
    return pytrees.batch_first(implicit.mark(p * states[None], lost), 2)
