r"""Sets of perturbations that the adversary of `game.solve_game` may play from, and what it knows of each.

The whole robust set of a regulariser, `R = { dr : Omega*(dr(s, .)) <= 0 in every state s }` (see `adversary`), has a
support function in closed form, `max { <mu, dr> : dr in R } = sum_s d(s) Omega(pi(.|s))` with `mu = d pi`, and so a
Bellman equation. Restricted or pooled, most have neither, and the game is played:

| set | members | support function, bounded by |
|---|---|---|
| `Whole` | R | itself, `Omega` |
| `Box(bound)` | R with `\|dr\| <= bound` | a split of the policy, one number per state |
| `StatesOnly()` | R with `dr(s, a) = u(s)` | 0: `Omega*(u 1) = u`, R leaves `u <= 0`: nothing is gained |
| `Features(phi)` | R with `dr = phi @ w` | a split of the occupancy that the features cannot tell from it |
| `SharedBudget(budget, weights)` | `sum_s weights_s max(Omega*(dr_s), 0) <= budget` | itself |

A set gives the game four things: parameters to play with, the member of the set that they stand for (feasible to
rounding, always), the direction of steepest ascent of `<mu, dr>` in them, and a *price*: an upper bound on the support
function at the agent's policy, hence a lower bound on what that policy guarantees. The bound holds whatever the
parameters and closes at the adversary's best answer. It is weak duality: R is closed under decrease, so its support
function is finite for every occupancy `u >= 0` (a policy or not) and equal to `sum_s |u_s| Omega(u_s/|u_s|)`; a sum of
two sets has the sum of two support functions, an intersection the smallest such sum over splits `mu = u + v`.

This module holds the sets that are a product over states; those whose states share a constraint are in `coupled_sets`.

**Metric.** Directions are per visit of a state, in units in which a step of 1 is Newton's: with `p = grad
Omega*(dr)`, policy that `dr` is worst for, and the curvature `w = p0^{alpha-1} m^{2-alpha}` at `m = max(pi, p)`, an
entry of `beta dr` moves by `(pi - p)/w`. For KL that is at most 1, and `log(pi/p)` near the best answer.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import checks, pytrees, roots
from robustreg.regularisers.bound import maximise
from robustreg.solvers.bound_problem import BoundProblem

# Steps of the safeguarded root finding in `Box`: Newton takes 4 to 10.
_ROOT_STEPS = 40


def is_masked(problem: BoundProblem) -> Array:
    """Actions of prior 0, `[A, 1 or S, *b]`."""
    return jnp.isneginf(problem.regulariser.log_prior)


def shape(problem: BoundProblem) -> tuple[int, ...]:
    """Compute `[A, S, *B]` in full."""
    return (*problem.reward.shape[:2], *problem.batch)


class Adversary:
    """Base of the sets. Methods work in the kernels' layout (`[A, S, *B]`); `visits [S, *B]` is the occupancy d.

    Attributes:
        _coupled: whether states share a constraint. The best answer then jumps, play circles around the saddle point
            on its way in, and the means of what was played are tried beside the last.
        _responses: adversary's steps per step of the agent, by default.
        _free: whether `ascent` takes parameters that are not retracted: once a round is then enough.
    """

    _coupled = False
    _responses = 10
    _free = False

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch axes of the set's own leaves."""
        return ()

    def check(self, n_states: int, n_actions: int) -> None:
        """Refuse leaves that do not fit an MDP of these sizes."""

    def bind(self, batch_ndim: int, dtype: Any) -> Any:
        """Return the same set in the kernels' layout."""
        return self

    def start(self, problem: BoundProblem) -> Any:
        """Parameters of no perturbation."""
        return jnp.zeros(shape(problem), problem.dtype)

    def retract(self, problem: BoundProblem, params: Any) -> Any:
        """Parameters of a member of the set, from any."""
        raise NotImplementedError

    def perturbation(self, problem: BoundProblem, params: Any) -> Array:
        """Return the member `dr`, `[A, S, *B]`, that retracted parameters stand for."""
        raise NotImplementedError

    def ascent(self, problem: BoundProblem, params: Any, policy: Array, visits: Array, count: Array) -> Any:
        """Direction in which `<mu, dr>` rises; `count` rounds have been played, `[*B]`."""
        raise NotImplementedError

    def price(self, problem: BoundProblem, params: Any, policy: Array, visits: Array) -> tuple[Array, Array]:
        """Compute `cost [S, *B]` and `extra [*B]` with `max { <mu, dr> : dr in the set } <= sum_s d cost + extra`."""
        raise NotImplementedError


def boundary(problem: BoundProblem, x: Array) -> tuple[Array, Array]:
    """Return the highest point of R's boundary with the normal that `x/beta` has, in units of 1/beta, and that normal.

    Where the normal of an action is 0 the boundary is flat in it: lower entries have the same normal and take less.
    The highest is chosen, because play that starts lower has to climb back before the action counts again.
    """
    reg, masked = problem.regulariser, is_masked(problem)
    excess, normal = maximise(reg, x / reg.beta[None])
    x = x - (reg.beta * excess)[None]
    x = jnp.where(normal == 0, jnp.maximum(x, reg.beta[None] * reg.worst_case(normal)), x)
    return jnp.where(masked, 0, x), normal


@pytrees.dataclass
class Whole(Adversary):
    """The whole robust set of the regulariser; its parameters are `beta dr`, on the boundary."""

    _free = True

    def retract(self, problem: BoundProblem, params: Array) -> Array:
        """Along the direction that moves all actions alike."""
        return boundary(problem, params)[0]

    def perturbation(self, problem: BoundProblem, params: Array) -> Array:
        """Return the parameters in reward units."""
        return params / problem.regulariser.beta[None]

    def ascent(self, problem: BoundProblem, params: Array, policy: Array, visits: Array, count: Array) -> Array:
        """Along the boundary: `pi` less the boundary's normal."""
        normal = maximise(problem.regulariser, params / problem.regulariser.beta[None])[1]
        return natural(problem, policy, normal)

    def price(self, problem: BoundProblem, params: Array, policy: Array, visits: Array) -> tuple[Array, Array]:
        """Return the regulariser: this is how the set was defined."""
        return problem.regulariser.value(policy), jnp.zeros(problem.batch, problem.dtype)


def natural(problem: BoundProblem, policy: Array, normal: Array) -> Array:
    """Compute `(pi - p)/w`, the step in `beta dr` towards the perturbation whose normal is `pi`, `[A, S, *B]`.

    w is the regulariser's curvature at the larger of the two.
    """
    w = problem.regulariser.curvature(jnp.maximum(policy, normal))
    return jnp.where(w > 0, (policy - normal) / jnp.where(w > 0, w, 1), 0)


@pytrees.dataclass
class Box(Whole):
    """Perturbations in the robust set of at most a given size in every state and action.

    Where the box binds on all actions, nothing regularises the agent: its best answer is deterministic, and the
    probability of an action that is worse by x falls by `exp(-beta x)` a round (measured: gap 1e-4 of the rewards after
    400 rounds, 3e-6 after 1,600, at beta = 0.5 and a bound of 0.05, all of it on the primal side).

    Attributes:
        bound: largest `|dr|`, in reward units: a positive number, or an array that broadcasts to `[*B, S, A]` (one
            number per lane is `[*B, 1, 1]`).
    """

    bound: Any

    _free = False

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch axes of the bound."""
        return jnp.shape(self.bound)[:-2]

    def check(self, n_states: int, n_actions: int) -> None:
        """Refuse a bound of another shape, or one that is not positive."""
        if jnp.ndim(self.bound) not in (0,):
            core = tuple(jnp.shape(self.bound)[-2:])
            if len(core) < 2 or core[0] not in (1, n_states) or core[1] not in (1, n_actions):
                raise ValueError(
                    f"Box.bound has shape {jnp.shape(self.bound)}; expected a number or [*B, S, A] = "
                    f"[*B, {n_states}, {n_actions}] with axes of 1 allowed: one number per lane is bound[:, None, None]"
                )
        if not checks.is_traced(self.bound):
            bound = np.asarray(self.bound, np.float64)
            rule = "a bound must be positive and finite; pass adversary=None for the whole robust set"
            checks.refuse("Box.bound", bound, ~((bound > 0) & np.isfinite(bound)), ("s", "a")[: bound.ndim], rule)

    def bind(self, batch_ndim: int, dtype: Any) -> "Box":
        """Return the bound as `[A or 1, S or 1, *b]`."""
        bound = jnp.asarray(self.bound, dtype)
        bound = bound.reshape((1, 1)) if bound.ndim == 0 else bound
        return Box(pytrees.lanes_last(bound, batch_ndim, 2))

    def retract(self, problem: BoundProblem, params: Array) -> Array:
        """Compute `clip(x - c, -bound, bound)` with the number c per state that puts it on the boundary of R."""
        reg, masked = problem.regulariser, is_masked(problem)
        x, bound = params / reg.beta[None], jnp.broadcast_to(self.bound, params.shape)
        exact = 8 * float(jnp.finfo(x.dtype).eps) * (pytrees.largest(bound) + 1 / reg.beta)

        def at(c: Array) -> Array:
            return jnp.clip(x - c[None], -bound, bound)

        def measure(c: Array, _: None) -> tuple[Array, Array, None]:
            dr = at(c)
            excess, normal = maximise(reg, dr)
            return -excess, pytrees.total(jnp.where(jnp.abs(dr) < bound, normal, 0)), None

        # All entries at the upper bound are outside, all at the lower one inside.
        low = -pytrees.largest(jnp.where(masked, -jnp.inf, bound - x))
        high = pytrees.largest(jnp.where(masked, -jnp.inf, x + bound))
        hopeless = jnp.isnan(pytrees.total(jnp.where(masked, 0, x)))
        found = roots.newton(
            measure,
            maximise(reg, x)[0],
            low,
            high,
            close=exact,
            near=lambda c: 0.5 * float(jnp.finfo(c.dtype).eps) * jnp.abs(c),
            turns=_ROOT_STEPS,
            hopeless=hopeless,
        )
        dr = at(jnp.where(found.exact, found.x, found.high))
        # As in `boundary`.
        normal = maximise(reg, dr)[1]
        dr = jnp.where(normal == 0, jnp.maximum(dr, jnp.minimum(reg.worst_case(normal), bound)), dr)
        return jnp.where(masked, 0, reg.beta[None] * dr)

    def ascent(self, problem: BoundProblem, params: Array, policy: Array, visits: Array, count: Array) -> Array:
        """Compute `pi` less the part of it that the boundary of R bears; the box bears the rest."""
        normal = maximise(problem.regulariser, params / problem.regulariser.beta[None])[1]
        dr = self.perturbation(problem, params)
        free = (jnp.abs(dr) < self.bound) & ~is_masked(problem)
        borne = pytrees.total(jnp.where(free, normal, 0))
        share = pytrees.total(jnp.where(free, policy, 0)) / jnp.where(borne > 0, borne, 1)
        return natural(problem, policy, jnp.where(borne > 0, share, 1)[None] * normal)

    def price(self, problem: BoundProblem, params: Array, policy: Array, visits: Array) -> tuple[Array, Array]:
        """Compute `l Omega(p) + sum_a bound |pi - l p|` for the best multiple l of the normal p."""
        normal = maximise(problem.regulariser, params / problem.regulariser.beta[None])[1]
        own = problem.regulariser.value(normal)
        # Convex and piecewise linear in l: the least value is at a kink.
        on = normal > 0
        kinks = jnp.where(on, policy / jnp.where(on, normal, 1), 0)
        kinks = jnp.concatenate([kinks, jnp.zeros_like(kinks[:1])])

        def total(share: Array) -> Array:
            return share * own + pytrees.total(self.bound * jnp.abs(policy - share[None] * normal))

        # Nothing is gained by the box beyond R.
        cost = jnp.minimum(jnp.min(lax.map(total, kinks), axis=0), problem.regulariser.value(policy))
        return cost, jnp.zeros(problem.batch, problem.dtype)


@pytrees.dataclass
class StatesOnly(Adversary):
    """Perturbations that treat all actions of a state alike, `dr(s, a) = u(s)`.

    `Omega*(u 1) = u`: the robust set leaves `u <= 0`, so that this adversary is harmless and the game's value is the
    nominal optimum. That is shown by playing it. Nothing regularises the agent then: give it large
    steps, `optax.sgd(50.0)`.
    """

    _responses = 1

    def start(self, problem: BoundProblem) -> Array:
        """Compute `beta u`, `[S, *B]`."""
        return jnp.zeros(shape(problem)[1:], problem.dtype)

    def retract(self, problem: BoundProblem, params: Array) -> Array:
        """Not above 0."""
        return jnp.minimum(params, 0)

    def perturbation(self, problem: BoundProblem, params: Array) -> Array:
        """Compute `u(s)` for every action, 0 on masked ones."""
        dr = jnp.broadcast_to((params / problem.regulariser.beta)[None], shape(problem))
        return jnp.where(is_masked(problem), 0, dr)

    def ascent(self, problem: BoundProblem, params: Array, policy: Array, visits: Array, count: Array) -> Array:
        """Every visit pays u."""
        return jnp.sum(policy, axis=0)

    def price(self, problem: BoundProblem, params: Array, policy: Array, visits: Array) -> tuple[Array, Array]:
        """Nothing: `u <= 0`."""
        return jnp.zeros(visits.shape, problem.dtype), jnp.zeros(problem.batch, problem.dtype)
