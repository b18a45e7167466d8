"""Moves of the explicit game: where play stands, and one round of agent against adversary (see `minimax`).

Everything is in the kernels' layout, `[A, S, *B]`. Nothing here knows a best answer: the agent sees the plain q of what
is being played, the adversary the gradient of `<mu, dr>` (see `sets`).

**Cost.** A round is one loosely solved linear system for the critic and a few conjugates for the adversary's answers,
which end when a step is a tenth of the round's first: its steps are Newton's, so that what remains is a hundredth, and
the agent is about to move again.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from robustreg._core import loops, pytrees
from robustreg.game.sets import boundary, is_masked, shape
from robustreg.solvers import bellman, linear
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.loop import freeze

if TYPE_CHECKING:  # see `minimax`
    import optax

# Residual of the critic's linear solve, relative to what it starts from.
_CRITIC = 1e-3
# The adversary's last step of a round, relative to its first.
_ANSWERED = 0.1


@pytrees.options
class Rules:
    """Hold what the compiled program depends on."""

    agent: "optax.GradientTransformation"
    response: "optax.GradientTransformation"
    scheme: str
    steps: int
    responses: int
    record: int

    @property
    def records(self) -> int:
        """Looks at the bounds, the one before the first round included."""
        return 1 + -(-self.steps // self.record)


@pytrees.dataclass
class Setup:
    """Hold what does not change during play; `adversary` is bound, `initial` is `[S, *b]`."""

    problem: BoundProblem
    adversary: Any
    initial: Array
    rules: Rules = pytrees.static()


@pytrees.dataclass
class Position:
    """Where play stands; every leaf ends in the lanes' axes.

    Attributes:
        logits: the agent's, `[A, S, *B]`, on the boundary that `sets.boundary` describes.
        policy: what they stand for.
        params: the adversary's.
        memories: of the two optax transformations.
        value: the critic's, `[S, *B]`.
        means: sums of `k d pi`, of `k d` and of `k dr` over rounds k, or () where nothing is averaged.
        steps: rounds played, `[*B]`.
    """

    logits: Array
    policy: Array
    params: Any
    memories: tuple[Any, Any]
    value: Array
    means: tuple[Array, ...]
    steps: Array


def opening(setup: Setup) -> Position:
    """Set the prior against no perturbation."""
    problem, rules = setup.problem, setup.rules
    zero = jnp.zeros(shape(problem), problem.dtype)
    logits, policy = boundary(problem, zero)
    params = setup.adversary.retract(problem, setup.adversary.start(problem))
    memories = (_per_lane(problem, rules.agent.init)(logits), _per_lane(problem, rules.response.init)(params))
    means = (zero, zero[0], zero) if setup.adversary._coupled else ()
    return Position(logits, policy, params, memories, zero[0], means, jnp.zeros(problem.batch, jnp.int32))


def _per_lane(problem: BoundProblem, function: Any) -> Any:
    """A function of trees whose leaves end in the lanes' axes, for each lane by itself.

    A transformation that looks at norms would otherwise couple lanes.
    """
    for _ in problem.batch:
        function = jax.vmap(function, in_axes=-1, out_axes=-1)
    return function


def turn(setup: Setup, position: Position) -> Position:
    """One round: a move of the agent and the adversary's answers."""
    scheme = setup.rules.scheme
    moved = _moved_agent(setup, position, position)
    params, memory = _answers(setup, position, position.policy if scheme == "simultaneous" else moved.policy)
    if scheme == "extragradient":
        there = dataclasses.replace(moved, params=params)
        moved = _moved_agent(setup, position, there)
        params, memory = _answers(setup, position, there.policy)
    moved = dataclasses.replace(moved, params=params, memories=(moved.memories[0], memory), steps=position.steps + 1)
    return dataclasses.replace(moved, means=_averaged(setup, moved)) if position.means else moved


def _moved_agent(setup: Setup, position: Position, there: Position) -> Position:
    """The agent's step from a position, in the direction of the natural gradient at another."""
    problem = setup.problem
    direction, value = _advantages(setup, there)
    update = _per_lane(problem, setup.rules.agent.update)
    change, memory = update(-direction, position.memories[0], position.logits)
    logits, policy = boundary(problem, position.logits + change)
    memories = (memory, position.memories[1])
    return dataclasses.replace(position, logits=logits, policy=policy, memories=memories, value=value)


def _advantages(setup: Setup, position: Position) -> tuple[Array, Array]:
    """The agent's natural gradient `beta (q - <pi, q>) [A, S, *B]`, and the critic's new value."""
    problem, policy = setup.problem, position.policy
    dr = setup.adversary.perturbation(problem, position.params)
    reward = jnp.where(is_masked(problem), 0, problem.reward - dr)

    def backed_up(v: Array) -> Array:
        return reward + problem.discount[None, None] * problem.transitions._expect(v)

    missed = pytrees.total(policy * backed_up(position.value)) - position.value
    accuracy = jnp.full(problem.batch, _CRITIC, problem.dtype)
    value = position.value + linear.solve(bellman.chain(problem, policy), missed, accuracy, None, linear.Method())
    q = backed_up(value)
    return problem.regulariser.beta[None] * (q - pytrees.total(policy * q)[None]), value


def visits(setup: Setup, policy: Array) -> Array:
    """Discounted visits of states, `[S, *B]`; ones where no state's constraint depends on another's."""
    if not setup.adversary._coupled:
        return jnp.ones(policy.shape[1:], policy.dtype)
    initial = jnp.broadcast_to(setup.initial, policy.shape[1:])
    accuracy = jnp.zeros(setup.problem.batch, policy.dtype)
    flow = linear.occupy(bellman.chain(setup.problem, policy), initial, accuracy, linear.Method())
    return jnp.maximum(flow, 0)


class _Answer(NamedTuple):
    """The adversary's play within a round: its parameters, its rule's memory, the size of its first direction."""

    params: Any
    memory: Any
    first: Array


def _answers(setup: Setup, position: Position, policy: Array) -> tuple[Any, Any]:
    """The adversary's steps of a round against one policy, from where it stood at the start of the round."""
    problem, adversary, batch = setup.problem, setup.adversary, setup.problem.batch
    update, seen = _per_lane(problem, setup.rules.response.update), visits(setup, policy)
    unit = float(jnp.finfo(policy.dtype).eps) ** 0.5
    import optax

    def answer(state: _Answer, done: Array) -> tuple[_Answer, Array]:
        params, memory = state.params, state.memory
        direction = adversary.ascent(problem, params, policy, seen, position.steps)
        change, moved = update(jax.tree.map(jnp.negative, direction), memory, params)
        new = optax.apply_updates(params, change)
        new = new if adversary._free else adversary.retract(problem, new)
        size = _largest(direction, batch)
        first = jnp.where(jnp.isnan(state.first), size, state.first)
        # Below the square root of rounding, what remains after a step of Newton's is below rounding.
        enough = size <= jnp.maximum(_ANSWERED * first, unit * _largest(params, batch))
        return _Answer(freeze(done, params, new), freeze(done, memory, moved), first), done | enough

    start = _Answer(position.params, position.memories[1], jnp.full(batch, jnp.nan, policy.dtype))
    found = loops.until_done(answer, start, jnp.zeros(batch, bool), setup.rules.responses)
    params, memory = found.params, found.memory
    return adversary.retract(problem, params) if adversary._free else params, memory


def _largest(tree: Any, batch: tuple[int, ...]) -> Array:
    """The largest entry of a tree in absolute value, per lane, `[*B]`."""
    each = [jnp.max(jnp.abs(x).reshape(-1, *batch), axis=0) for x in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(each), axis=0)


def _averaged(setup: Setup, position: Position) -> tuple[Array, ...]:
    """The sums with this round in them."""
    policy, weight = position.policy, position.steps.astype(position.policy.dtype)
    mass = weight[None] * visits(setup, policy)
    dr = setup.adversary.perturbation(setup.problem, position.params)
    new = (mass[None] * policy, mass, weight[None, None] * dr)
    return jax.tree.map(jnp.add, position.means, new)


def candidates(setup: Setup, position: Position) -> tuple[Array, Array]:
    """Policies and perturbations to take bounds of, `[n, A, S, *B]` each: the last played and, if any, the means."""
    problem, policy = setup.problem, position.policy
    dr = setup.adversary.perturbation(problem, position.params)
    if not position.means:
        return policy[None], dr[None]
    flow, mass, total = position.means
    count = position.steps.astype(problem.dtype)
    weight = jnp.where(count > 0, 0.5 * count * (count + 1), 1)
    mean = jnp.where((mass > 0)[None], flow / jnp.where(mass > 0, mass, 1)[None], policy)
    mean_dr = jnp.where((count > 0)[None, None], total / weight[None, None], dr)
    return jnp.stack([policy, mean]), jnp.stack([dr, mean_dr])
