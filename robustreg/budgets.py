r"""Sets of perturbations that the adversary of `game.solve_game` may play from: what it knows of each.

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

**Metric.** Directions are per visit of a state, in units in which a step of 1 is Newton's: with `p = grad
Omega*(dr)`, policy that `dr` is worst for, and the curvature `w = p0^{alpha-1} m^{2-alpha}` at `m = max(pi, p)`, an
entry of `beta dr` moves by `(pi - p)/w`. For KL that is at most 1, and `log(pi/p)` near the best answer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg import _host, _tree, bellman
from robustreg.regularisers import maximise

# Steps of the safeguarded root finding in `Box`: Newton takes 4 to 10.
_ROOT_STEPS = 40


def is_masked(problem: bellman.Lanes) -> Array:
    """Actions of prior 0, `[A, 1 or S, *b]`."""
    return jnp.isneginf(problem.regulariser._prior)


def shape(problem: bellman.Lanes) -> tuple[int, ...]:
    """`[A, S, *B]` in full."""
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
        """The same set in the kernels' layout."""
        return self

    def start(self, problem: bellman.Lanes) -> Any:
        """Parameters of no perturbation."""
        return jnp.zeros(shape(problem), problem.dtype)

    def retract(self, problem: bellman.Lanes, params: Any) -> Any:
        """Parameters of a member of the set, from any."""
        raise NotImplementedError

    def perturbation(self, problem: bellman.Lanes, params: Any) -> Array:
        """The member `dr`, `[A, S, *B]`, that retracted parameters stand for."""
        raise NotImplementedError

    def ascent(self, problem: bellman.Lanes, params: Any, policy: Array, visits: Array, count: Array) -> Any:
        """Direction in which `<mu, dr>` rises; `count` rounds have been played, `[*B]`."""
        raise NotImplementedError

    def price(self, problem: bellman.Lanes, params: Any, policy: Array, visits: Array) -> tuple[Array, Array]:
        """`cost [S, *B]` and `extra [*B]` with `max { <mu, dr> : dr in the set } <= sum_s d cost + extra`."""
        raise NotImplementedError


@_tree.dataclass
class Whole(Adversary):
    """The whole robust set of the regulariser; its parameters are `beta dr`, projected to `beta (x - Omega*(x))`."""

    _free = True

    def retract(self, problem: bellman.Lanes, params: Array) -> Array:
        """On the boundary of R, along the direction that moves all actions alike."""
        beta = problem.regulariser.beta
        excess = maximise(problem.regulariser, params / beta[None])[0]
        return jnp.where(is_masked(problem), 0, params - (beta * excess)[None])

    def perturbation(self, problem: bellman.Lanes, params: Array) -> Array:
        """The parameters in reward units."""
        return params / problem.regulariser.beta[None]

    def ascent(self, problem: bellman.Lanes, params: Array, policy: Array, visits: Array, count: Array) -> Array:
        """Along the boundary: `pi` less the boundary's normal."""
        normal = maximise(problem.regulariser, params / problem.regulariser.beta[None])[1]
        return natural(problem, policy, normal)

    def price(self, problem: bellman.Lanes, params: Array, policy: Array, visits: Array) -> tuple[Array, Array]:
        """The regulariser: this is how the set was defined."""
        return problem.regulariser._value(policy), jnp.zeros(problem.batch, problem.dtype)


def natural(problem: bellman.Lanes, policy: Array, normal: Array) -> Array:
    """`(pi - p)/w`, the step in `beta dr` towards the perturbation whose normal is `pi`, `[A, S, *B]`."""
    larger = jnp.maximum(policy, normal)
    on = larger > 0
    # KL has no order of its own.
    order = getattr(problem.regulariser, "alpha", jnp.ones_like(problem.regulariser.beta))
    prior = jnp.where(is_masked(problem), 0, problem.regulariser._prior)
    log_w = prior + (2 - order)[None] * (jnp.log(jnp.where(on, larger, 1)) - prior)
    return jnp.where(on, (policy - normal) * jnp.exp(-log_w), 0)


@_tree.dataclass
class Box(Whole):
    """Perturbations in the robust set of at most a given size in every state and action.

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
        if not _host.is_traced(self.bound):
            bound = np.asarray(self.bound, np.float64)
            rule = "a bound must be positive and finite; pass adversary=None for the whole robust set"
            _host.refuse("Box.bound", bound, ~((bound > 0) & np.isfinite(bound)), ("s", "a")[: bound.ndim], rule)

    def bind(self, batch_ndim: int, dtype: Any) -> "Box":
        """The bound as `[A or 1, S or 1, *b]`."""
        bound = jnp.asarray(self.bound, dtype)
        bound = bound.reshape((1, 1)) if bound.ndim == 0 else bound
        return Box(_tree.lanes_last(bound, batch_ndim, 2))

    def retract(self, problem: bellman.Lanes, params: Array) -> Array:
        """`clip(x - c, -bound, bound)` with the number c per state that puts it on the boundary of R."""
        reg, masked = problem.regulariser, is_masked(problem)
        x, bound = params / reg.beta[None], jnp.broadcast_to(self.bound, params.shape)
        exact = 8 * float(jnp.finfo(x.dtype).eps) * (jnp.max(bound, axis=0) + 1 / reg.beta)

        def at(c: Array) -> Array:
            return jnp.clip(x - c[None], -bound, bound)

        def step(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            c, low, high, fine = state
            dr = at(c)
            excess, normal = maximise(reg, dr)
            low, high = jnp.where(excess > 0, c, low), jnp.where(excess <= exact, c, high)
            slope = jnp.sum(jnp.where(jnp.abs(dr) < bound, normal, 0), axis=0)
            newton = c + excess / jnp.where(slope > 0, slope, 1)
            inside = (slope > 0) & (newton > low) & (newton < high)
            fine = fine | (jnp.abs(excess) <= exact)
            return jnp.where(fine, c, jnp.where(inside, newton, 0.5 * (low + high))), low, high, fine

        # All entries at the upper bound are outside, all at the lower one inside.
        low = jnp.min(jnp.where(masked, jnp.inf, x - bound), axis=0)
        high = jnp.max(jnp.where(masked, -jnp.inf, x + bound), axis=0)
        start = (maximise(reg, x)[0], low, high, jnp.zeros(low.shape, bool))
        c, _, high, fine = lax.fori_loop(0, _ROOT_STEPS, step, start)
        return jnp.where(masked, 0, reg.beta[None] * at(jnp.where(fine, c, high)))

    def ascent(self, problem: bellman.Lanes, params: Array, policy: Array, visits: Array, count: Array) -> Array:
        """`pi` less the part of it that the boundary of R bears; the box bears the rest."""
        normal = maximise(problem.regulariser, params / problem.regulariser.beta[None])[1]
        dr = self.perturbation(problem, params)
        free = (jnp.abs(dr) < self.bound) & ~is_masked(problem)
        borne = jnp.sum(jnp.where(free, normal, 0), axis=0)
        share = jnp.sum(jnp.where(free, policy, 0), axis=0) / jnp.where(borne > 0, borne, 1)
        return natural(problem, policy, jnp.where(borne > 0, share, 1)[None] * normal)

    def price(self, problem: bellman.Lanes, params: Array, policy: Array, visits: Array) -> tuple[Array, Array]:
        """`l Omega(p) + sum_a bound |pi - l p|` for the best multiple l of the normal p at the adversary's choice."""
        normal = maximise(problem.regulariser, params / problem.regulariser.beta[None])[1]
        own = problem.regulariser._value(normal)
        # Convex and piecewise linear in l: the least value is at a kink.
        on = normal > 0
        kinks = jnp.where(on, policy / jnp.where(on, normal, 1), 0)
        kinks = jnp.concatenate([kinks, jnp.zeros_like(kinks[:1])])

        def total(share: Array) -> Array:
            return share * own + jnp.sum(self.bound * jnp.abs(policy - share[None] * normal), axis=0)

        # Nothing is gained by the box beyond R.
        cost = jnp.minimum(jnp.min(lax.map(total, kinks), axis=0), problem.regulariser._value(policy))
        return cost, jnp.zeros(problem.batch, problem.dtype)


@_tree.dataclass
class StatesOnly(Adversary):
    """Perturbations that treat all actions of a state alike, `dr(s, a) = u(s)`.

    `Omega*(u 1) = u`: the robust set leaves `u <= 0`, so that this adversary is harmless and the game's value is the
    nominal optimum. That is shown by playing it.
    """

    _responses = 1

    def start(self, problem: bellman.Lanes) -> Array:
        """`beta u`, `[S, *B]`."""
        return jnp.zeros(shape(problem)[1:], problem.dtype)

    def retract(self, problem: bellman.Lanes, params: Array) -> Array:
        """Not above 0."""
        return jnp.minimum(params, 0)

    def perturbation(self, problem: bellman.Lanes, params: Array) -> Array:
        """`u(s)` for every action, 0 on masked ones."""
        dr = jnp.broadcast_to((params / problem.regulariser.beta)[None], shape(problem))
        return jnp.where(is_masked(problem), 0, dr)

    def ascent(self, problem: bellman.Lanes, params: Array, policy: Array, visits: Array, count: Array) -> Array:
        """Every visit pays u."""
        return jnp.sum(policy, axis=0)

    def price(self, problem: bellman.Lanes, params: Array, policy: Array, visits: Array) -> tuple[Array, Array]:
        """Nothing: `u <= 0`."""
        return jnp.zeros(visits.shape, problem.dtype), jnp.zeros(problem.batch, problem.dtype)


@_tree.dataclass
class Features(Adversary):
    """Perturbations in the robust set that are combinations of features, `dr = features @ w`.

    A constant must be among the combinations: without one, 0 may be the only member. The parameters w then stand for
    `features @ w - max_s Omega*((features @ w)_s)`, which touches the boundary of R in the hardest states. Their share
    `l_s` in the maximum, smoothed at a temperature that falls as rounds are played, is the multiplier of state s, and
    the normals `l_s p_s` make up an occupancy that the features cannot tell from the agent's where w is best.

    Attributes:
        features: `[*B, S, A, F]`, in reward units per unit of w.
    """

    features: Any

    _coupled = True

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch axes of the features."""
        return jnp.shape(self.features)[:-3]

    def check(self, n_states: int, n_actions: int) -> None:
        """Refuse features of another shape, or without a constant in their span."""
        sizes = jnp.shape(self.features)
        if len(sizes) < 3 or sizes[-3:-1] != (n_states, n_actions):
            raise ValueError(
                f"Features.features has shape {sizes}; expected [*B, S, A, F] = [*B, {n_states}, {n_actions}, F]"
            )
        if _host.is_traced(self.features):
            return
        table = np.asarray(self.features, np.float64).reshape(-1, n_states * n_actions, sizes[-1])
        _host.refuse("Features.features", table, ~np.isfinite(table), ("row", "feature"), "features must be finite")
        for lane, phi in enumerate(table):
            w = np.linalg.lstsq(phi, np.ones(len(phi)), rcond=None)[0]
            if np.abs(phi @ w - 1).max() > 1e-4:
                raise ValueError(
                    f"no combination of Features.features (lane {lane}) is a constant, and 0 may be all that "
                    "the robust set leaves: append one, np.concatenate([features, np.ones((S, A, 1))], -1)"
                )

    def bind(self, batch_ndim: int, dtype: Any) -> "Features":
        """The features as `[F, A, S, *b]`."""
        return Features(_tree.lanes_last(jnp.asarray(self.features, dtype), batch_ndim, 3))

    def start(self, problem: bellman.Lanes) -> Array:
        """w, `[F, *B]`."""
        return jnp.zeros((self.features.shape[0], *problem.batch), problem.dtype)

    def retract(self, problem: bellman.Lanes, params: Array) -> Array:
        """Any w stands for a member."""
        return params

    def _combined(self, problem: bellman.Lanes, params: Array) -> tuple[Array, Array, Array]:
        """`features @ w [A, S, *B]`, its conjugates `[S, *B]` and normals `[A, S, *B]`."""
        x = jnp.broadcast_to(jnp.sum(self.features * params[:, None, None], axis=0), shape(problem))
        return x, *maximise(problem.regulariser, x)

    def perturbation(self, problem: bellman.Lanes, params: Array) -> Array:
        """`features @ w` less what its hardest state exceeds."""
        x, excess, _ = self._combined(problem, params)
        return x - jnp.max(excess, axis=0)[None, None]

    def _bearing(self, problem: bellman.Lanes, params: Array, visits: Array, count: Array) -> tuple[Array, Array]:
        """Multipliers `[S, *B]` that sum to the visits, and the normals."""
        _, excess, normal = self._combined(problem, params)
        share = jax.nn.softmax(
            (excess - jnp.max(excess, axis=0)[None]) / self._temperature(problem, count)[None], axis=0
        )
        return share * jnp.sum(visits, axis=0)[None], normal

    def _temperature(self, problem: bellman.Lanes, count: Array) -> Array:
        beta = jnp.max(problem.regulariser.beta, axis=0)
        return 1 / (beta * (1 + count.astype(problem.dtype)) ** 0.5 * 10)

    def ascent(self, problem: bellman.Lanes, params: Array, policy: Array, visits: Array, count: Array) -> Array:
        """Newton's direction in w for the smoothed maximum."""
        multiplier, normal = self._bearing(problem, params, visits, count)
        total = jnp.sum(visits, axis=0)
        mu = policy * visits[None]
        slope = self._project(mu - multiplier[None] * normal)
        # Curvature beta sum_s l_s Cov_{p_s}(phi) within states (of the normals, KL's), and that of the maximum between.
        mean = jnp.sum(self.features * normal[None], axis=1)
        spread = self.features - mean[:, None]
        within = self._gram(multiplier[None] * normal * problem.regulariser.beta[None], spread)
        centre = jnp.sum(mean * multiplier[None], axis=1) / total[None]
        across = mean - centre[:, None]
        weight = multiplier / self._temperature(problem, count)[None]
        between = jnp.sum(across[:, None] * across[None] * weight[None, None], axis=2)
        return _solve(within + between, slope)

    def _project(self, mu: Array) -> Array:
        """What the features see of an occupancy, `[F, *B]`."""
        return jnp.sum(self.features * mu[None], axis=(1, 2))

    def _gram(self, weight: Array, table: Array) -> Array:
        """`sum_{s,a} weight phi phi^T`, `[F, F, *B]`."""
        return jnp.sum(table[:, None] * table[None] * weight[None, None], axis=(2, 3))

    def price(self, problem: bellman.Lanes, params: Array, policy: Array, visits: Array) -> tuple[Array, Array]:
        """R's support function at an occupancy `u >= 0` that the features cannot tell from mu.

        `<mu, phi w> = <u, phi w>` for every w, and no member of R takes more than that from u. Of the normals'
        occupancy only the part is taken that changes nothing that the features see, and as much of it as leaves u >= 0.
        """
        mu = policy * visits[None]

        def split(count: Array) -> Array:
            """The best of a few steps towards the normals' occupancy as it is after `count` rounds."""
            multiplier, normal = self._bearing(problem, params, visits, jnp.full(problem.batch, count))
            target = multiplier[None] * normal
            metric = jnp.maximum(mu, target)
            seen = _solve(self._gram(metric, self.features), self._project(target - mu))
            change = target - mu - metric * jnp.sum(self.features * seen[:, None, None], axis=0)
            falling = change < 0
            room = jnp.min(jnp.where(falling, mu / jnp.where(falling, -change, 1), jnp.inf), axis=(0, 1))
            step = jnp.minimum(room, 1)
            totals = [self._support(problem, mu + (part * step)[None, None] * change) for part in (0.0, 0.5, 0.9, 1.0)]
            return jnp.min(jnp.stack(totals), axis=0)

        # Whatever the temperature, the bound holds; which is best depends on how long was played.
        extra = jnp.min(lax.map(split, 2 ** jnp.arange(0, 20, 1, dtype=jnp.int32)), axis=0)
        return jnp.zeros_like(visits), extra

    @staticmethod
    def _support(problem: bellman.Lanes, u: Array) -> Array:
        u = jnp.maximum(u, 0)
        mass = jnp.sum(u, axis=0)
        prior = jnp.broadcast_to(jnp.exp(problem.regulariser._prior), u.shape)
        policy = jnp.where((mass > 0)[None], u / jnp.where(mass > 0, mass, 1)[None], prior)
        return jnp.sum(mass * problem.regulariser._value(policy), axis=0)


def _solve(matrix: Array, right: Array) -> Array:
    """`matrix^{-1} right` for `[F, F, *B]`, positive semidefinite, and `[F, *B]`; directions without weight stay 0."""
    matrix, right = jnp.moveaxis(matrix, (0, 1), (-2, -1)), jnp.moveaxis(right, 0, -1)
    size = jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
    ridge = 64 * float(jnp.finfo(right.dtype).eps) * jnp.where(size > 0, size, 1)
    ridge = ridge * jnp.eye(right.shape[-1], dtype=right.dtype).reshape((1,) * (right.ndim - 1) + matrix.shape[-2:])
    return jnp.moveaxis(jnp.linalg.solve(matrix + ridge, right[..., None])[..., 0], -1, 0)


@_tree.dataclass
class SharedBudget(Adversary):
    """Perturbations that may leave the robust set, by a total shared among the states.

    `sum_s weights_s max(Omega*(dr(s, .)), 0) <= budget`: beyond R, the adversary takes a budget off where the agent
    spends its time, and the agent must not spend too much of it in one place. (Without the maximum, states where the
    adversary gives would pay for those where it takes without limit, and no policy would guarantee anything.)
    The support function is `sum_s d Omega(pi) + budget max_s d/weights`.

    Attributes:
        budget: in reward units times weight, a number or `[*B]`; 0 is the robust set itself.
        weights: positive, `[*B, S]`.
    """

    budget: Any
    weights: Any

    _coupled = True

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch axes of both leaves."""
        return np.broadcast_shapes(jnp.shape(self.budget), jnp.shape(self.weights)[:-1])

    def check(self, n_states: int, n_actions: int) -> None:
        """Refuse weights of another shape and numbers out of range."""
        _host.expect_shape("SharedBudget.weights", jnp.shape(self.weights), (n_states,), "S", "one weight per state")
        if _host.is_traced(self.budget, self.weights):
            return
        weights, budget = (np.asarray(x, np.float64) for x in (self.weights, self.budget))
        rule = "a weight must be positive and finite: a state of weight 0 could be taken from without limit"
        _host.refuse("SharedBudget.weights", weights, ~((weights > 0) & np.isfinite(weights)), ("s",), rule)
        rule = "a budget must be finite and at least 0, which is the robust set itself"
        _host.refuse("SharedBudget.budget", budget, ~((budget >= 0) & np.isfinite(budget)), (), rule)

    def bind(self, batch_ndim: int, dtype: Any) -> "SharedBudget":
        """Budget `[*b]` and weights `[S, *b]`."""
        budget, weights = jnp.asarray(self.budget, dtype), jnp.asarray(self.weights, dtype)
        return SharedBudget(_tree.lanes_last(budget, batch_ndim, 0), _tree.lanes_last(weights, batch_ndim, 1))

    def start(self, problem: bellman.Lanes) -> dict[str, Array]:
        """`beta dr` within R, and logarithms of the states' shares in the budget."""
        zero = jnp.zeros(shape(problem), problem.dtype)
        return {"within": zero, "share": zero[0]}

    def retract(self, problem: bellman.Lanes, params: dict[str, Array]) -> dict[str, Array]:
        """R's own projection; shares normalised."""
        return {"within": Whole().retract(problem, params["within"]), "share": jax.nn.log_softmax(params["share"], 0)}

    def perturbation(self, problem: bellman.Lanes, params: dict[str, Array]) -> Array:
        """A member of R, and each state's share of the budget on all its actions alike."""
        extra = self.budget[None] * jnp.exp(params["share"]) / self.weights
        dr = Whole().perturbation(problem, params["within"]) + extra[None]
        return jnp.where(is_masked(problem), 0, dr)

    def ascent(
        self, problem: bellman.Lanes, params: dict[str, Array], policy: Array, visits: Array, count: Array
    ) -> dict[str, Array]:
        """Shares rise with visits per weight (multiplicative weights), slower the more they would move the agent."""
        worth = visits / self.weights
        share = jnp.exp(params["share"])
        mean = jnp.sum(share * worth, axis=0)
        force = jnp.max(problem.regulariser.beta * self.budget[None] / self.weights, axis=0)
        step = 1 / (1 + force)
        return {
            "within": Whole().ascent(problem, params["within"], policy, visits, count),
            "share": step[None] * (worth - mean[None]) / jnp.max(worth, axis=0)[None],
        }

    def price(
        self, problem: bellman.Lanes, params: dict[str, Array], policy: Array, visits: Array
    ) -> tuple[Array, Array]:
        """The support function itself: the whole budget goes to the state of most visits per weight."""
        return problem.regulariser._value(policy), self.budget * jnp.max(visits / self.weights, axis=0)
