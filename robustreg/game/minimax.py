r"""The game itself, played: agent against adversary by first-order steps, with both bounds on its value.

A policy-regularised MDP is worth what an agent can guarantee against an adversary who subtracts any `dr` of a set from
the reward (see `adversary`),

    max_pi min_dr <mu_pi, r - dr>  =  min_dr max_pi <mu_pi, r - dr>.

`solve` knows the answer: against the whole robust set, the adversary's best answer and the saddle point have closed
forms. Here nobody uses them. Each side sees the payoff's gradient only and moves a little, by any optax transformation;
that they meet where `solve` says is strong duality, observed. Sets without closed forms are played in the same way
(`sets`).

**Moves** (`moves`). A step of the *agent* is a natural-gradient step: logits rise by the advantage `beta (q - <pi, q>)`
of the plain, unregularised q under `r - dr`, for the policy and the perturbation that are being played; in every state,
however rarely visited. The policy is the logits' image under the regulariser's own link `grad Omega*` (softmax for KL,
sparsemax for alpha = 2). The link serves to write policies down; there is no maximum over q anywhere. q comes from a
critic that follows the play: one linear solve for what the last value misses. The *adversary* climbs `<mu, dr>` within
its set, by several cheap steps (no linear solve) for each of the agent's.

**Bounds.** Every `record` rounds, for the policy pi and the perturbation dr being played,

    primal = <mu_pi, r> - max { <mu_pi, dr'> : dr' in the set }    what pi guarantees      (or less: see `sets`)
    dual   = max_pi' <mu_pi', r - dr>                              nobody gets more against dr

enclose the value of the game, whoever played well or not. Both are values of Bellman equations, solved from the
critic's value until their certificate is a tenth of the gap asked for; primal is the lower end of the one interval,
dual the upper end of the other, so that they enclose the value whatever the accuracy. That the support function of the
robust set is the regulariser serves this certificate alone; no move looks at it. The largest primal and the smallest
dual met are kept, with the policy and the perturbation that they belong to.

**Rate.** Near the saddle point the adversary's steps are Newton's and the agent's then are regularised policy
iteration: play ends superlinearly. Before, logits move by up to 5 a round: about `beta range(q)/5` rounds. Measured for
alpha in {.5, 1, 2} and beta in {.5, 5, 50}: see `benchmarks/game.py`. Where states share a constraint (`Features`,
`SharedBudget`), answers jump and play circles inward: there the means over rounds (weights proportional to the round;
policies weighted by their visits, so that it is occupancies that are averaged) are tried beside the last. Gaps on
problems of three states with `Features`: 1e-3 of the rewards after 100 rounds, 1e-5 after 300.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from robustreg._core import checks, loops, pytrees
from robustreg.game import moves
from robustreg.game.sets import Adversary, Whole, is_masked
from robustreg.problems.mdps import MDP
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import bellman, bound_problem
from robustreg.solvers.evaluation import search, unlimited
from robustreg.solvers.loop import freeze
from robustreg.solvers.plain import FixedPolicy, HardMax
from robustreg.solvers.solution import Answer, Status
from robustreg.solvers.tolerance import Tolerance

# (To be imported, it takes a third of the time of all that is not JAX; a game is the only thing here that wants it.)
if TYPE_CHECKING:
    import optax

_SCHEMES = ("alternating", "simultaneous", "extragradient")
_RUNNING = -1
# Certified error of a bound, relative to the gap asked for.
_ACCURACY = 0.1
# Without a tol, a gap of so many times the rounding in its bounds is as small as it gets.
_ROUNDING = 8.0

Scheme = Literal["alternating", "simultaneous", "extragradient"]


@pytrees.dataclass
class Game(Answer):
    """How a game went; batch axes lead, n counts the times that bounds were taken.

    Attributes:
        policy: the agent's policy with the best guarantee met, `[*B, S, A]`.
        perturbation: the adversary's perturbation with the least dual value met, `[*B, S, A]`: the perturbed reward
            is `reward - perturbation`; a member of the set, to rounding.
        primal: a lower bound on the return that `policy` guarantees from `initial` against the whole set, `[*B]`;
            with `tol`, by at most a fifth of the gap asked for, without, by rounding.
        dual: an upper bound on the best return of any policy against `perturbation`, as tight, `[*B]`.
        primals, duals: the same after each of `rounds`, best so far, `[*B, n]`; constant once a lane has stopped.
        rounds: `[n]` int32, from 0.
        steps: rounds that a lane played, `[*B]` int32.
        status: `Status` codes, `[*B]` int32. CONVERGED without `tol`: the gap is of the size of the rounding in the
            two bounds, and cannot get much smaller.
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

    def _failure(self, code: Status, lane: tuple[int, ...]) -> str:
        remedy = code.advise(self.primal.dtype)
        if code == Status.MAX_STEPS:
            remedy = "play more steps, or give the tol that is enough (a looser one, if there was one)"
        return f"(relative gap {float(np.asarray(self.relative_gap)[lane]):.3g}): {remedy}"


def _relative(primal: Array, dual: Array) -> Array:
    size = jnp.maximum(jnp.abs(primal), jnp.abs(dual))
    return (dual - primal) / jnp.where(size > 0, size, 1)


def solve_game(
    mdp: MDP,
    reg: Regulariser,
    agent: "optax.GradientTransformation | None" = None,
    adversary: Adversary | None = None,
    *,
    response: "optax.GradientTransformation | None" = None,
    scheme: Scheme = "alternating",
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
            `SharedBudget`, of `robustreg.game`.
        response: optax transformation of the adversary's natural gradient. None: `optax.sgd(1.0)`, Newton's step.
        scheme: "alternating": the adversary answers the agent's new policy; "simultaneous": the old one;
            "extragradient": both move from where they are by the directions at where they would be. (Optimistic play is
            `optax.optimistic_gradient_descent` for both.)
        steps: rounds to play at most.
        responses: adversary's steps per round at most; None: what suits the set. They end when a step is a tenth of
            the round's first.
        record: rounds between two looks at the bounds.
        tol: relative gap `(dual - primal)/max(|primal|, |dual|)` at which a lane stops, `[*B]` or a number; None: play
            all steps. A lane that played them has status MAX_STEPS, unless its gap is then nothing but rounding.

    Returns:
        A `Game`: `primal <= value of the game <= dual` to rounding. Against the whole robust set, that value is
        `solve(mdp, reg).objective`.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or shape, with the remedy.
    """
    checks.expect_type(mdp, MDP, "first argument", "mdp")
    checks.expect_type(reg, Regulariser, "second argument", "kl")
    adversary = Whole() if adversary is None else adversary
    if not isinstance(adversary, Adversary):
        hint = "an optax transformation of its steps is `response`" if hasattr(adversary, "update") else "or None"
        raise TypeError(f"adversary must be a set such as robustreg.Box(0.1), got {type(adversary).__name__}; {hint}")
    adversary.check(mdp.n_states, mdp.n_actions)
    for name, rule in (("agent", agent), ("response", response)):
        if rule is not None and not (hasattr(rule, "init") and hasattr(rule, "update")):
            raise TypeError(f"{name} must be an optax transformation such as optax.sgd(0.5), got {rule!r}")
    if not isinstance(scheme, str) or scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(map(repr, _SCHEMES))}, got {scheme!r}")
    checks.check_tol(tol, "None plays all steps")
    responses = adversary._responses if responses is None else responses
    given = {"steps": steps, "responses": responses, "record": record}
    counts = {name: min(checks.count(name, n), np.iinfo(np.int32).max) for name, n in given.items()}
    usual = _newton()
    rules = moves.Rules(agent or usual[0], response or usual[1], scheme, **counts)
    return _play(mdp._with_sparsity(), reg, adversary, Tolerance.read(tol, mdp.dtype), rules)


@functools.cache
def _newton() -> "tuple[optax.GradientTransformation, optax.GradientTransformation]":
    """Newton's steps of the agent and of the adversary, the same objects at every call: each new one is compiled."""
    import optax

    # Logits are logarithms of probabilities: 5 a round is a factor of 150.
    return optax.chain(optax.clip(5.0), optax.sgd(1.0)), optax.sgd(1.0)


@pytrees.dataclass
class _Best:
    """Best bounds met, what they belong to and their rounding, `[A, S, *B]` and `[*B]`; `history` is `[2, n, *B]`."""

    policy: Array
    perturbation: Array
    primal: Array
    dual: Array
    noise: tuple[Array, Array]
    status: Array
    history: Array


class _Play(NamedTuple):
    """The loop's state: where both stand, the best bounds met, and how often they were looked at."""

    position: moves.Position
    best: _Best
    looks: Array


@functools.partial(jax.jit, static_argnames="rules")
def _play(mdp: MDP, reg: Regulariser, adversary: Adversary, tol: Tolerance, rules: moves.Rules) -> Game:
    problem = lax.optimization_barrier(bound_problem.bind(mdp, reg, tol.shape, adversary.batch_shape))
    n, batch = len(problem.batch), problem.batch
    setup = moves.Setup(problem, adversary.bind(n, mdp.dtype), pytrees.lanes_last(mdp.initial, n, 1), rules)
    tol = tol.broadcast(batch)
    position = moves.opening(setup)
    infinite = jnp.full(batch, jnp.inf, mdp.dtype)
    status = jnp.where(bellman.sound(problem), _RUNNING, int(Status.NONFINITE_INPUT)).astype(jnp.int32)
    zero, history = jnp.zeros_like(position.logits), jnp.zeros((2, rules.records, *batch), mdp.dtype)
    best = _Best(zero, zero, -infinite, infinite, (infinite, infinite), status, history)

    def running(play: _Play) -> Array:
        return jnp.any(play.best.status == _RUNNING) & (play.looks < rules.records)

    def turn(play: _Play) -> _Play:
        position, best, looks = play
        # The first look comes before the first round.
        count = jnp.where(looks == 0, 0, jnp.minimum(rules.record, rules.steps - (looks - 1) * rules.record))
        after = loops.fori_loop(0, count, lambda _, x: moves.turn(setup, x), position)
        position = freeze(best.status != _RUNNING, position, after)
        return _Play(position, _record(setup, tol, looks, position, best), looks + 1)

    position, best, looks = loops.while_loop(running, turn, _Play(position, best, jnp.asarray(0, jnp.int32)), setup)
    return _result(best, position.steps, tol, looks, rules)


def _record(setup: moves.Setup, tol: Tolerance, index: Array, position: moves.Position, best: _Best) -> _Best:
    """Bounds of what is being played (and of its means), the best kept; a verdict on each lane that runs."""
    done = best.status != _RUNNING
    # Of a lane's returns, the critic's is an estimate; before it has seen anything, the reward.
    size = jnp.where(position.steps == 0, setup.problem.magnitudes.reward, jnp.abs(_from_start(setup, position.value)))
    accuracy = Tolerance(jnp.where(done, jnp.inf, _ACCURACY * tol.value * size), done | tol.given)

    def measure(state: tuple[_Best, Array], pair: tuple[Array, Array]) -> tuple[tuple[_Best, Array], None]:
        (best, sound), (policy, dr) = state, pair
        primal, below = _primal(setup, position, policy, accuracy)
        dual, above = _dual(setup, position, dr, accuracy)
        higher, lower = primal > best.primal, dual < best.dual
        best = dataclasses.replace(
            best,
            policy=jnp.where(higher[None, None], policy, best.policy),
            primal=jnp.where(higher, primal, best.primal),
            perturbation=jnp.where(lower[None, None], dr, best.perturbation),
            dual=jnp.where(lower, dual, best.dual),
            noise=(jnp.where(higher, below, best.noise[0]), jnp.where(lower, above, best.noise[1])),
        )
        return (best, sound & jnp.isfinite(primal) & jnp.isfinite(dual)), None

    (new, sound), _ = loops.scan(measure, (best, ~done), moves.candidates(setup, position))
    reached = _relative(new.primal, new.dual) <= tol.value
    status = jnp.where(reached & tol.given, int(Status.CONVERGED), _RUNNING)
    broken = jnp.where(position.steps == 0, int(Status.NONFINITE_INPUT), int(Status.NONFINITE))
    new = dataclasses.replace(new, status=jnp.where(sound, status, broken).astype(jnp.int32))
    new = freeze(done, dataclasses.replace(best, history=()), dataclasses.replace(new, history=()))
    bounds = jnp.stack([new.primal, new.dual])
    return dataclasses.replace(new, history=best.history.at[:, index].set(bounds))


def _from_start(setup: moves.Setup, value: Array) -> Array:
    """`<initial, value>` of `[S, *B]`, `[*B]`."""
    return jnp.sum(setup.initial * value, axis=0)


def _primal(setup: moves.Setup, position: moves.Position, policy: Array, accuracy: Tolerance) -> tuple[Array, Array]:
    """Tell what a policy guarantees against the set, or less, and the rounding in that, `[*B]`."""
    problem = setup.problem
    cost, extra = setup.adversary.price(problem, position.params, policy, moves.visits(setup, policy))
    never = jnp.where(policy == 0, -jnp.inf, 0).astype(policy.dtype)
    # The price is computed with an error of its own, which must not be in the agent's favour.
    cost = cost + jnp.where(jnp.isfinite(cost), problem.regulariser.value_error(policy), 0)
    fixed = FixedPolicy(policy, cost, unlimited(problem), never)
    value, error, noise = _value(setup, fixed, problem.reward, position.value, accuracy)
    return value - error - extra, noise


def _dual(setup: moves.Setup, position: moves.Position, dr: Array, accuracy: Tolerance) -> tuple[Array, Array]:
    """The most that any policy gets against a perturbation, or more, and the rounding in that, `[*B]`."""
    problem = setup.problem
    masked = jnp.where(is_masked(problem), -jnp.inf, 0).astype(dr.dtype)
    free = HardMax(unlimited(problem), masked)
    value, error, noise = _value(setup, free, problem.reward - dr, position.value, accuracy)
    return value + error, noise


def _value(
    setup: moves.Setup, operator: Bound, reward: Array, start: Array, accuracy: Tolerance
) -> tuple[Array, Array, Array]:
    """Value from the start of an operator's fixed point, a bound on its error, and the rounding in that, `[*B]`."""
    loop = search(bound_problem.with_operator(setup.problem, operator, reward), accuracy, start)
    return _from_start(setup, loop.h + loop.c[None]), loop.half_width, loop.noise


def _result(best: _Best, steps: Array, tol: Tolerance, measurements: Array, rules: moves.Rules) -> Game:
    """The books in the public layout; a lost lane is NaN."""
    # A solve without a tol ends with an interval of up to four times its rounding, and two make a gap (see `solve`).
    # As much again may be left of the game itself.
    done = ~tol.given & (best.dual - best.primal <= _ROUNDING * (best.noise[0] + best.noise[1]))
    end = jnp.where(done, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = jnp.where(best.status == _RUNNING, end, best.status).astype(jnp.int32)
    lost = status >= int(Status.NONFINITE_INPUT)
    bounds = jnp.where(lost, jnp.nan, jnp.stack([best.primal, best.dual]))
    # Once every lane is done no more measurements are taken: later entries repeat the last one.
    index = jnp.arange(rules.records, dtype=jnp.int32)
    later = (index >= measurements).reshape((1, -1) + (1,) * lost.ndim)
    primals, duals = jnp.moveaxis(jnp.where(later, bounds[:, None], best.history), 1, -1)
    return Game(
        policy=pytrees.batch_first(jnp.where(lost, jnp.nan, best.policy), 2),
        perturbation=pytrees.batch_first(jnp.where(lost, jnp.nan, best.perturbation), 2),
        primal=bounds[0],
        dual=bounds[1],
        primals=primals,
        duals=duals,
        rounds=jnp.minimum(index * rules.record, rules.steps),
        steps=steps,
        status=status,
        tol=tol.or_reached(_relative(bounds[0], bounds[1])),
    )
