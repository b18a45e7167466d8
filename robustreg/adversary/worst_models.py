"""The worst model: the reward and the transitions that an adversary of both picks against a policy."""

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import checks, pytrees
from robustreg.problems.mdps import MDP
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import ambiguity as balls
from robustreg.solvers import bellman, bound_problem, plain
from robustreg.solvers.ambiguity import TransitionBall
from robustreg.solvers.solution import Solution


def worst_model(mdp: MDP, reg: Regulariser | None, sol: Solution, ambiguity: TransitionBall) -> tuple[Array, Array]:
    """Find the reward and the transitions within both uncertainty sets that hurt a solution's policy the most.

    Args:
        mdp, reg, ambiguity: the problem that was solved.
        sol: its solution, or anything with its `value [*B, S]` and `policy [*B, S, A]`.

    Returns:
        The reward, `[*B, S, A]`, and the transitions written out, `[*B, S, A, S]`. In this model the policy is worth
        exactly the robust value. Rows of the transitions are probabilities (form "exact"), sum to what they did
        ("kappa") or not ("r2"), and may have negative entries: neither closed form knows that they are probabilities.

    Raises:
        TypeError, ValueError: as `solve`.
    """
    reg = plain.regulariser_or_none(mdp, reg)
    checks.expect_type(mdp, MDP, "first argument", "mdp")
    checks.expect_type(reg, Regulariser, "second argument", "kl")
    ball = balls.checked(ambiguity, mdp)
    value, policy = (checks.array(f"sol.{name}", getattr(sol, name), mdp.dtype) for name in ("value", "policy"))
    return _worst_model(mdp, reg, value, policy, ball)


@jax.jit
def _worst_model(mdp: MDP, reg: Regulariser, value: Array, policy: Array, ball: TransitionBall) -> tuple[Array, Array]:
    problem = bound_problem.bind(mdp, reg, value.shape[:-1], policy.shape[:-2], ambiguity=ball)
    assert problem.ball is not None
    n, batch = len(problem.batch), problem.batch
    v = jnp.broadcast_to(pytrees.lanes_last(value, n, 1), (mdp.n_states, *batch))
    p = jnp.broadcast_to(pytrees.lanes_last(policy, n, 2), (mdp.n_actions, mdp.n_states, *batch))
    reward = problem.reward - problem.regulariser.worst_case(p)
    worst = bellman.worst_transitions(problem, v, jnp.zeros(batch, v.dtype))
    noise = problem.ball.noise(p, worst)
    rows = problem.transitions._rows(n, v.dtype) + noise
    return pytrees.batch_first(reward, 2), jnp.moveaxis(rows, (0, 1, 2), (n + 1, n, n + 2))
