r"""The game itself, played: agent against adversary by first-order steps, with both bounds on its value.

A policy-regularised MDP is worth what an agent can guarantee against an adversary who subtracts any `dr` of a set from
the reward (see `adversary`),

    max_pi min_dr <mu_pi, r - dr>  =  min_dr max_pi <mu_pi, r - dr>.

`solve` knows the answer: against the whole robust set, the adversary's best answer and the saddle point have closed
forms. Here nobody uses them. Each side sees the payoff's gradient only and moves a little, by any optax transformation;
that they meet where `solve` says is strong duality, observed. Sets without closed forms are played in the same way
(`budgets`).

**Moves.** A step of the *agent* is a natural-gradient step: logits rise by the advantage `beta (q - <pi, q>)` of the
plain, unregularised q under `r - dr`, for the policy and the perturbation that are being played; in every state,
however rarely visited. Its policy is the logits' image under a link: "matched", the regulariser's own (`grad Omega*`,
softmax for KL, sparsemax for alpha = 2), or "softmax" with the prior as weights, which is the same for KL only. The
link serves to write policies down; there is no maximum over q anywhere. q comes from a critic that follows the play:
one linear solve for what the last value misses. The *adversary* climbs `<mu, dr>` within its set, by several cheap
steps (no linear solve) for each of the agent's.

**Bounds.** Every `record` rounds, for the policy pi and the perturbation dr being played,

    primal = <mu_pi, r> - max { <mu_pi, dr'> : dr' in the set }    what pi guarantees      (or less: see `budgets`)
    dual   = max_pi' <mu_pi', r - dr>                              nobody gets more against dr

enclose the value of the game, to rounding, whoever played well or not. That the support function of the robust set is
the regulariser (`evaluate(mdp, policy, reg)`) serves this certificate alone; no move looks at it. The largest primal
and the smallest dual met are kept, with the policy and the perturbation that they belong to.

**Rate.** Near the saddle point the adversary's steps are Newton's and the agent's then are regularised policy
iteration: play ends superlinearly. Before, logits move by up to 5 a round: about `beta range(q)/5` rounds. Measured for
alpha in {.5, 1, 2} and beta in {.5, 5, 50}: see `benchmarks/game.py`. Where states share a constraint (`Features`,
`SharedBudget`), answers jump and play circles inward: there the means over rounds (weights proportional to the round;
policies weighted by their visits, so that it is occupancies that are averaged) are tried beside the last, and the gap
falls slowly: with `Features`, to 1e-2 or 1e-3 of the rewards after 2,000 rounds.
"""

import dataclasses
import functools
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from robustreg import _host, _tree, bellman, linear
from robustreg import adversary as nature
from robustreg.budgets import Adversary, Whole, is_masked, shape
from robustreg.mdp import MDP
from robustreg.regularisers import Regulariser, maximise
from robustreg.solution import SolveError, Status, concrete
from robustreg.solve import keep

# Logits are logarithms of probabilities: 5 a round is a factor of 150.
AGENT = optax.chain(optax.clip(5.0), optax.sgd(1.0))
RESPONSE = optax.sgd(1.0)
_SCHEMES = ("alternating", "simultaneous", "extragradient")
_LINKS = ("matched", "softmax")
_RUNNING = -1
# Residual of the critic's linear solve, relative to what it starts from.
_CRITIC = 1e-3

Scheme = Literal["alternating", "simultaneous", "extragradient"]
Link = Literal["matched", "softmax"]


@_tree.dataclass
class Game:
    """How a game went; batch axes lead, n counts the times that bounds were taken.

    Attributes:
        policy: the agent's policy with the best guarantee met, `[*B, S, A]`.
        perturbation: the adversary's perturbation with the least dual value met, `[*B, S, A]`: the perturbed reward
            is `reward - perturbation`; a member of the set, to rounding.
        primal: the return that `policy` guarantees from `initial` against the whole set (a lower bound), `[*B]`.
        dual: the best return of any policy against `perturbation` (an upper bound), `[*B]`.
        primals, duals: the same after each of `rounds`, best so far, `[*B, n]`; constant once a lane has stopped.
        rounds: `[n]` int32, from 0.
        steps: rounds that a lane played, `[*B]` int32.
        status: `Status` codes, `[*B]` int32.
        tol: the relative gap asked for, `[*B]`; the one reached if none was.
    """

    policy: Array
    perturbation: Array
    primal: Array
    dual: Array
    primals: Array
    duals: Array
    rounds: Array
    steps: Array
    status: Array
    tol: Array

    @property
    def gap(self) -> Array:
        """Duality gap `dual - primal`, `[*B]`, in reward units: the value of the game lies in between."""
        return self.dual - self.primal

    @property
    def relative_gap(self) -> Array:
        """The gap relative to the larger of |primal| and |dual|, `[*B]`."""
        return _relative(self.primal, self.dual)

    @property
    def gaps(self) -> Array:
        """The gap after each of `rounds`, `[*B, n]`."""
        return self.duals - self.primals

    @property
    def converged(self) -> Array:
        """`[*B]` bool: the relative gap is within `tol`."""
        return self.status == int(Status.CONVERGED)

    def raise_if_failed(self) -> "Game":
        """Return the game if every lane converged.

        Raises:
            SolveError: naming the lanes that did not, their status, and the remedy. Outside jit only.
        """
        status = concrete(self.status, "raise_if_failed")
        if (status == Status.CONVERGED).all():
            return self
        reached = np.asarray(self.relative_gap)
        lines = [f"{int((status != Status.CONVERGED).sum())} of {status.size} games failed"]
        for index in np.argwhere(status != Status.CONVERGED)[:8]:
            code = Status(int(status[tuple(index)]))
            remedy = "play more steps or loosen tol" if code == Status.MAX_STEPS else code.remedy
            lines.append(f"  {code.name}: lane {index.tolist()} (relative gap {reached[tuple(index)]:.3g}): {remedy}")
        raise SolveError("\n".join(lines))


def _relative(primal: Array, dual: Array) -> Array:
    size = jnp.maximum(jnp.abs(primal), jnp.abs(dual))
    return (dual - primal) / jnp.where(size > 0, size, 1)


def solve_game(
    mdp: MDP,
    reg: Regulariser,
    agent: optax.GradientTransformation | None = None,
    adversary: Adversary | None = None,
    *,
    response: optax.GradientTransformation | None = None,
    scheme: Scheme = "alternating",
    link: Link = "matched",
    steps: int = 200,
    responses: int | None = None,
    record: int = 5,
    tol: ArrayLike | None = None,
) -> Game:
    """Play agent against adversary, without the closed form of either's best answer.

    Any leaf of `mdp`, `reg` and `adversary` may carry leading batch axes; they broadcast as in NumPy, and every
    combination is a lane `[*B]`. One compiled loop; lanes that are done, or lost to NaN, are frozen and left alone.

    Args:
        mdp: from `robustreg.mdp` or a generator.
        reg: the regulariser, which defines the robust set.
        agent: optax transformation of the agent's natural gradient, in logits; each lane by itself. None:
            `optax.chain(optax.clip(5.0), optax.sgd(1.0))`. Make it once: every new one compiles anew.
        adversary: the set to play from: None for the whole robust set, `Box`, `StatesOnly`, `Features` or
            `SharedBudget` from `robustreg.budgets`.
        response: optax transformation of the adversary's natural gradient. None: `optax.sgd(1.0)`, Newton's step.
        scheme: "alternating": the adversary answers the agent's new policy; "simultaneous": the old one;
            "extragradient": both move from where they are by the directions at where they would be. (Optimistic play is
            `optax.optimistic_gradient_descent` for both.)
        link: from logits to policy, "matched" or "softmax", see the module's docstring.
        steps: rounds to play at most.
        responses: adversary's steps per round; None: what suits the set (10 if states do not share a constraint).
        record: rounds between two looks at the bounds.
        tol: relative gap `(dual - primal)/max(|primal|, |dual|)` at which a lane stops, `[*B]` or a number; None: play
            all steps.

    Returns:
        A `Game`: `primal <= value of the game <= dual` to rounding. Against the whole robust set, that value is
        `solve(mdp, reg).objective`.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or shape, with the remedy.
    """
    _host.expect_type(mdp, MDP, "first argument", "mdp")
    _host.expect_type(reg, Regulariser, "second argument", "kl")
    adversary = Whole() if adversary is None else adversary
    if not isinstance(adversary, Adversary):
        hint = "an optax transformation of its steps is `response`" if hasattr(adversary, "update") else "or None"
        raise TypeError(f"adversary must be a set such as robustreg.Box(0.1), got {type(adversary).__name__}; {hint}")
    adversary.check(mdp.n_states, mdp.n_actions)
    for name, rule in (("agent", agent), ("response", response)):
        if rule is not None and not (hasattr(rule, "init") and hasattr(rule, "update")):
            raise TypeError(f"{name} must be an optax transformation such as optax.sgd(0.5), got {rule!r}")
    for name, choice, known in (("scheme", scheme, _SCHEMES), ("link", link, _LINKS)):
        if choice not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {choice!r}")
    if tol is not None and not isinstance(tol, Tracer) and not np.all(np.asarray(tol) > 0):
        raise ValueError(f"tol must be positive, got {tol}; None plays all steps")
    responses = adversary._responses if responses is None else responses
    counts = {name: _count(name, n) for name, n in (("steps", steps), ("responses", responses), ("record", record))}
    rules = _Rules(agent or AGENT, response or RESPONSE, scheme, link, **counts)
    return _play(mdp, reg, adversary, jnp.asarray(-1 if tol is None else tol, mdp.dtype), rules)


def _count(name: str, value: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, the same for all lanes, got {value!r}") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


@_tree.options
class _Rules:
    """What the compiled program depends on."""

    agent: optax.GradientTransformation
    response: optax.GradientTransformation
    scheme: str
    link: str
    steps: int
    responses: int
    record: int

    @property
    def records(self) -> int:
        """Looks at the bounds, the one before the first round included."""
        return 1 + -(-self.steps // self.record)


@_tree.dataclass
class _Position:
    """Where play stands; every leaf ends in the lanes' axes.

    Attributes:
        logits: the agent's, `[A, S, *B]`.
        params: the adversary's.
        memories: of the two optax transformations.
        value: the critic's, `[S, *B]`.
        means: sums of `k d pi`, of `k d` and of `k dr` over rounds k, or () where nothing is averaged.
        steps: rounds played, `[*B]`.
    """

    logits: Array
    params: Any
    memories: tuple[Any, Any]
    value: Array
    means: tuple[Array, ...]
    steps: Array


@_tree.dataclass
class _Books:
    """Best bounds met and what they belong to; `history` is `[2, n, *B]`."""

    policy: Array
    perturbation: Array
    primal: Array
    dual: Array
    status: Array
    history: Array


@_tree.dataclass
class _Board:
    """What does not change during play."""

    problem: bellman.Lanes
    adversary: Any
    initial: Array
    rules: _Rules = _tree.static()


@functools.partial(jax.jit, static_argnames="rules")
def _play(mdp: MDP, reg: Regulariser, adversary: Adversary, tol: Array, rules: _Rules) -> Game:
    problem = bellman.lanes(mdp, reg, tol.shape, adversary.batch_shape)
    n, batch = len(problem.batch), problem.batch
    bound = adversary.bind(n, mdp.dtype)
    board = _Board(lax.optimization_barrier(problem), bound, _tree.lanes_last(mdp.initial, n, 1), rules)
    tol = jnp.broadcast_to(tol, batch)
    position = _start(board)
    empty = jnp.full(batch, jnp.inf, mdp.dtype)
    status = jnp.where(bellman.sound(problem), _RUNNING, int(Status.NONFINITE_INPUT)).astype(jnp.int32)
    zero = jnp.zeros_like(position.logits)
    books = _Books(zero, zero, -empty, empty, status, jnp.zeros((2, rules.records, *batch), mdp.dtype))
    books = _record(board, tol, 0, position, books)

    def running(state: tuple[Any, ...]) -> Array:
        return jnp.any(state[1].status == _RUNNING) & (state[2] < rules.records)

    def turn(state: tuple[Any, ...]) -> tuple[Any, ...]:
        position, books, index = state
        played = jnp.minimum(rules.record, rules.steps - (index - 1) * rules.record)
        after = lax.fori_loop(0, played, lambda _, x: _round(board, x), position)
        position = keep(books.status != _RUNNING, position, after)
        return position, _record(board, tol, index, position, books), index + 1

    position, books, index = lax.while_loop(running, turn, (position, books, jnp.asarray(1, jnp.int32)))
    return _result(books, position.steps, tol, index, rules)


def _start(board: _Board) -> _Position:
    problem, rules = board.problem, board.rules
    logits = jnp.zeros(shape(problem), problem.dtype)
    params = board.adversary.retract(problem, board.adversary.start(problem))
    memories = (_per_lane(problem, rules.agent.init)(logits), _per_lane(problem, rules.response.init)(params))
    means = (logits, logits[0], logits) if board.adversary._coupled else ()
    return _Position(logits, params, memories, logits[0], means, jnp.zeros(problem.batch, jnp.int32))


def _per_lane(problem: bellman.Lanes, function: Any) -> Any:
    """A function of trees whose leaves end in the lanes' axes, for each lane by itself.

    A transformation that looks at norms would otherwise couple lanes.
    """
    for _ in problem.batch:
        function = jax.vmap(function, in_axes=-1, out_axes=-1)
    return function


def _policy(board: _Board, logits: Array) -> Array:
    """The policy of logits, `[A, S, *B]`."""
    problem = board.problem
    if board.rules.link == "softmax":
        return jax.nn.softmax(problem.regulariser._prior + logits, axis=0)
    return maximise(problem.regulariser, logits / problem.regulariser.beta[None])[1]


def _advantages(board: _Board, position: _Position) -> tuple[Array, Array]:
    """The agent's natural gradient `beta (q - <pi, q>) [A, S, *B]`, and the critic's new value."""
    problem = board.problem
    policy = _policy(board, position.logits)
    dr = board.adversary.perturbation(problem, position.params)
    reward = jnp.where(is_masked(problem), 0, problem.reward - dr)

    def backed_up(v: Array) -> Array:
        return reward + problem.discount[None, None] * problem.transitions._expect(v)

    missed = jnp.sum(policy * backed_up(position.value), axis=0) - position.value
    accuracy = jnp.full(problem.batch, _CRITIC, problem.dtype)
    value = position.value + linear.solve(bellman.chain(problem, policy), missed, accuracy, None, linear.Method())
    q = backed_up(value)
    return problem.regulariser.beta[None] * (q - jnp.sum(policy * q, axis=0, keepdims=True)), value


def _visits(board: _Board, policy: Array) -> Array:
    """Discounted visits of states, `[S, *B]`."""
    initial = jnp.broadcast_to(board.initial, policy.shape[1:])
    accuracy = jnp.zeros(board.problem.batch, policy.dtype)
    visits = linear.occupy(bellman.chain(board.problem, policy), initial, accuracy, linear.Method())
    return jnp.maximum(visits, 0)


def _moved_agent(board: _Board, position: _Position, direction: Array) -> tuple[Array, Any]:
    update = _per_lane(board.problem, board.rules.agent.update)
    change, memory = update(-direction, position.memories[0], position.logits)
    logits = position.logits + change
    # Constants do not matter to either link; left in, they would grow.
    masked = is_masked(board.problem)
    top = jnp.max(jnp.where(masked, -jnp.inf, logits), axis=0, keepdims=True)
    return jnp.where(masked, 0, logits - top), memory


def _moved_adversary(board: _Board, params: Any, memory: Any, direction: Any) -> tuple[Any, Any]:
    update = _per_lane(board.problem, board.rules.response.update)
    change, memory = update(jax.tree.map(jnp.negative, direction), memory, params)
    params = optax.apply_updates(params, change)
    return params if board.adversary._free else board.adversary.retract(board.problem, params), memory


def _answers(board: _Board, position: _Position, policy: Array, params: Any) -> tuple[Any, Any]:
    """The adversary's steps of a round against one policy, from its memory at the start of the round."""
    coupled = board.adversary._coupled
    visits = _visits(board, policy) if coupled else jnp.ones(policy.shape[1:], policy.dtype)

    def answer(_: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        direction = board.adversary.ascent(board.problem, state[0], policy, visits, position.steps)
        return _moved_adversary(board, *state, direction)

    params, memory = lax.fori_loop(0, board.rules.responses, answer, (params, position.memories[1]))
    return board.adversary.retract(board.problem, params), memory


def _round(board: _Board, position: _Position) -> _Position:
    """One round: a move of the agent and the adversary's answers."""
    scheme = board.rules.scheme
    direction, value = _advantages(board, position)
    logits, memory = _moved_agent(board, position, direction)
    seen = position.logits if scheme == "simultaneous" else logits
    params, answered = _answers(board, position, _policy(board, seen), position.params)
    if scheme == "extragradient":
        there = dataclasses.replace(position, logits=logits, params=params, value=value)
        direction, value = _advantages(board, there)
        logits, memory = _moved_agent(board, position, direction)
        params, answered = _answers(board, position, _policy(board, there.logits), position.params)
    moved = dataclasses.replace(
        position, logits=logits, params=params, memories=(memory, answered), value=value, steps=position.steps + 1
    )
    return dataclasses.replace(moved, means=_averaged(board, moved)) if position.means else moved


def _averaged(board: _Board, position: _Position) -> tuple[Array, ...]:
    policy = _policy(board, position.logits)
    visits, weight = _visits(board, policy), position.steps.astype(policy.dtype)
    dr = board.adversary.perturbation(board.problem, position.params)
    flow, mass, total = position.means
    return (
        flow + (weight[None] * visits)[None] * policy,
        mass + weight[None] * visits,
        total + weight[None, None] * dr,
    )


# ---- bounds


def _record(board: _Board, tol: Array, index: Array | int, position: _Position, books: _Books) -> _Books:
    """Bounds of what is being played (and of its means), the best kept; a verdict on each lane that runs."""
    problem = board.problem
    policy = _policy(board, position.logits)
    dr = board.adversary.perturbation(problem, position.params)
    candidates = [(policy, dr)]
    if position.means:
        flow, mass, total = position.means
        count = position.steps.astype(problem.dtype)
        weight = jnp.where(count > 0, 0.5 * count * (count + 1), 1)
        mean = jnp.where((mass > 0)[None], flow / jnp.where(mass > 0, mass, 1)[None], policy)
        candidates.append((mean, jnp.where((count > 0)[None, None], total / weight[None, None], dr)))
    new, sound = books, jnp.ones(problem.batch, bool)
    for policy, dr in candidates:
        primal, dual = _primal(board, position.params, policy), _dual(board, dr)
        higher, lower = primal > new.primal, dual < new.dual
        sound = sound & jnp.isfinite(primal) & jnp.isfinite(dual)
        new = dataclasses.replace(
            new,
            policy=jnp.where(higher[None, None], policy, new.policy),
            primal=jnp.where(higher, primal, new.primal),
            perturbation=jnp.where(lower[None, None], dr, new.perturbation),
            dual=jnp.where(lower, dual, new.dual),
        )
    reached = _relative(new.primal, new.dual) <= tol
    status = jnp.where(reached & (tol >= 0), int(Status.CONVERGED), _RUNNING)
    broken = jnp.where(position.steps == 0, int(Status.NONFINITE_INPUT), int(Status.NONFINITE))
    new = dataclasses.replace(new, status=jnp.where(sound, status, broken).astype(jnp.int32))
    done = books.status != _RUNNING
    new = keep(done, dataclasses.replace(books, history=()), dataclasses.replace(new, history=()))
    bounds = jnp.stack([new.primal, new.dual])
    return dataclasses.replace(new, history=books.history.at[:, index].set(bounds))


def _from_start(board: _Board, value: Array) -> Array:
    """`<initial, value>` of `[*B, S]`, `[*B]`."""
    return jnp.sum(board.initial * jnp.moveaxis(value, -1, 0), axis=0)


def _primal(board: _Board, params: Any, policy: Array) -> Array:
    """What a policy guarantees against the set, or less, `[*B]`."""
    problem = board.problem
    visits = _visits(board, policy) if board.adversary._coupled else jnp.ones(policy.shape[1:], policy.dtype)
    cost, extra = board.adversary.price(problem, params, policy, visits)
    taken = jnp.where(policy == 0, -jnp.inf, 0).astype(policy.dtype)
    fixed = nature.Fixed(policy, cost, problem.regulariser.beta, taken)
    return _from_start(board, nature.fixed_point(problem, fixed, problem.reward)) - extra


def _dual(board: _Board, dr: Array) -> Array:
    """The most that any policy gets against a perturbation, `[*B]`."""
    problem = board.problem
    masked = jnp.where(is_masked(problem), -jnp.inf, 0).astype(dr.dtype)
    free = nature.Unregularised(jnp.full_like(problem.regulariser.beta, jnp.finfo(dr.dtype).max), masked)
    return _from_start(board, nature.fixed_point(problem, free, problem.reward - dr))


def _result(books: _Books, steps: Array, tol: Array, looks: Array, rules: _Rules) -> Game:
    """The books in the public layout; a lost lane is NaN."""
    unasked = tol < 0
    end = jnp.where(unasked, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = jnp.where(books.status == _RUNNING, end, books.status).astype(jnp.int32)
    lost = status >= int(Status.NONFINITE_INPUT)
    bounds = jnp.where(lost, jnp.nan, jnp.stack([books.primal, books.dual]))
    # Looks not taken, because every lane was done, see what the last one saw.
    index = jnp.arange(rules.records, dtype=jnp.int32)
    later = (index >= looks).reshape((1, -1) + (1,) * lost.ndim)
    primals, duals = jnp.moveaxis(jnp.where(later, bounds[:, None], books.history), 1, -1)
    return Game(
        policy=_tree.batch_first(jnp.where(lost, jnp.nan, books.policy), 2),
        perturbation=_tree.batch_first(jnp.where(lost, jnp.nan, books.perturbation), 2),
        primal=bounds[0],
        dual=bounds[1],
        primals=primals,
        duals=duals,
        rounds=jnp.minimum(index * rules.record, rules.steps),
        steps=steps,
        status=status,
        tol=jnp.where(unasked, _relative(bounds[0], bounds[1]), tol),
    )
