"""Sets of perturbations whose states share a constraint, for `game.solve_game`: `Features` and `SharedBudget`.

What the adversary takes in one state it lacks in another, so that its answer depends on where the agent spends its
time: methods that `sets` has no use for visits in, need them here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import checks, loops, pytrees
from robustreg.game.sets import Adversary, Whole, is_masked, shape
from robustreg.regularisers.bound import maximise
from robustreg.solvers.bound_problem import BoundProblem

# `Features.price`: how often the temperature halves, Newton steps at each, and lengths that a step is tried with. Fewer
# steps or a faster fall lose track where an action's probability vanishes: a bound off by 1e-3 instead of 1e-5.
_HALVINGS, _STEPS_EACH = 20, 4
_DAMPING = np.array([1.0, 0.5, 0.2, 0.05, 0.0])


@pytrees.dataclass
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
        if checks.is_traced(self.features):
            return
        table = np.asarray(self.features, np.float64).reshape(-1, n_states * n_actions, sizes[-1])
        checks.refuse("Features.features", table, ~np.isfinite(table), ("row", "feature"), "features must be finite")
        for lane, phi in enumerate(table):
            w = np.linalg.lstsq(phi, np.ones(len(phi)), rcond=None)[0]
            if np.abs(phi @ w - 1).max() > 1e-4:
                raise ValueError(
                    f"no combination of Features.features (lane {lane}) is a constant, and 0 may be all that "
                    "the robust set leaves: append one, np.concatenate([features, np.ones((S, A, 1))], -1)"
                )

    def bind(self, batch_ndim: int, dtype: Any) -> "Features":
        """Return the features as `[F, A, S, *b]`."""
        return Features(pytrees.lanes_last(jnp.asarray(self.features, dtype), batch_ndim, 3))

    def start(self, problem: BoundProblem) -> Array:
        """w, `[F, *B]`."""
        return jnp.zeros((self.features.shape[0], *problem.batch), problem.dtype)

    def retract(self, problem: BoundProblem, params: Array) -> Array:
        """Any w stands for a member."""
        return params

    def _combined(self, problem: BoundProblem, params: Array) -> tuple[Array, Array, Array]:
        """`features @ w [A, S, *B]`, its conjugates `[S, *B]` and normals `[A, S, *B]`."""
        x = jnp.broadcast_to(jnp.sum(self.features * params[:, None, None], axis=0), shape(problem))
        return x, *maximise(problem.regulariser, x)

    def perturbation(self, problem: BoundProblem, params: Array) -> Array:
        """Compute `features @ w` less what its hardest state exceeds."""
        x, excess, _ = self._combined(problem, params)
        return x - jnp.max(excess, axis=0)[None, None]

    def _temperature(self, problem: BoundProblem, count: Array) -> Array:
        """Of the maximum over states, in reward units: the perturbation falls short of the best by so much a visit."""
        cooled = jnp.maximum(1.0 / (1 + count.astype(problem.dtype)) ** 2, float(jnp.finfo(problem.dtype).eps) ** 0.5)
        return 0.1 * cooled / jnp.max(problem.regulariser.beta, axis=0)

    def ascent(self, problem: BoundProblem, params: Array, policy: Array, visits: Array, count: Array) -> Array:
        """Newton's direction in w for the smoothed maximum."""
        slope, hessian, _ = self._model(problem, params, policy * visits[None], self._temperature(problem, count))
        return _solve(hessian, slope)

    def _model(self, problem: BoundProblem, w: Array, mu: Array, temperature: Array) -> tuple[Array, Array, Array]:
        """Slope and curvature in w of `<mu, phi w> - |mu| max_s Omega*((phi w)_s)`, smoothed; the normals, weighted."""
        _, excess, normal = self._combined(problem, w)
        total = jnp.sum(mu, axis=(0, 1))
        share = jax.nn.softmax((excess - jnp.max(excess, axis=0)[None]) / temperature[None], axis=0)
        multiplier = share * total[None]
        target = multiplier[None] * normal
        bend = problem.regulariser.curvature(normal)
        bend = bend / pytrees.total(bend)[None]
        # beta sum_s l_s (Cov of phi under the curvature) within states, and the covariance of the normals' between.
        spread = self.features - pytrees.total(self.features * bend[None], 1)[:, None]
        size = (multiplier * problem.regulariser.beta * pytrees.total(problem.regulariser.curvature(normal)))[None]
        within = self._gram(size * bend, spread)
        mean = jnp.sum(self.features * normal[None], axis=1)
        across = mean - jnp.sum(mean * share[None], axis=1)[:, None]
        between = jnp.sum(across[:, None] * across[None] * (multiplier / temperature[None])[None, None], axis=2)
        # Shifting all features by a constant leaves the set the same: centred, steps have no part in that direction.
        centre = jnp.mean(self.features, axis=(1, 2)) * total[None]
        return self._project(mu - target), within + between + centre[:, None] * centre[None], target

    def _project(self, mu: Array) -> Array:
        """Tell what the features see of an occupancy, `[F, *B]`."""
        return jnp.sum(self.features * mu[None], axis=(1, 2))

    def _gram(self, weight: Array, table: Array) -> Array:
        """`sum_{s,a} weight phi phi^T`, `[F, F, *B]`."""
        return jnp.sum(table[:, None] * table[None] * weight[None, None], axis=(2, 3))

    def price(self, problem: BoundProblem, params: Array, policy: Array, visits: Array) -> tuple[Array, Array]:
        """R's support function at an occupancy `u >= 0` that the features cannot tell from mu.

        `<mu, phi w> = <u, phi w>` for every w, and no member of R takes more than that from u. The normals' occupancy
        at the adversary's best answer to mu is the best such u: Newton's method goes there, with temperatures that
        fall. Of that occupancy only the part is taken that changes nothing that the features see, and as much of it as
        leaves u >= 0.
        """
        mu = policy * visits[None]
        coldest = self._temperature(problem, jnp.zeros(problem.batch, jnp.int32))

        def value(w: Array, temperature: Array) -> Array:
            excess = self._combined(problem, w)[1] / temperature[None]
            return jnp.sum(self._project(mu) * w, axis=0) - jnp.sum(mu, axis=(0, 1)) * temperature * (
                jax.scipy.special.logsumexp(excess, axis=0)
            )

        def step(count: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            w, temperature, least = state
            slope, hessian, target = self._model(problem, w, mu, temperature)
            least = jnp.minimum(least, self._split(problem, mu, target))
            move = _solve(hessian, slope)
            ways = w[None] + move[None] * _DAMPING.reshape((-1,) + (1,) * w.ndim).astype(w.dtype)
            best = jnp.argmax(lax.map(lambda x: value(x, temperature), ways), axis=0)
            w = jnp.take_along_axis(ways, best[None, None], axis=0)[0]
            return w, jnp.where(count % _STEPS_EACH == _STEPS_EACH - 1, 0.5, 1.0).astype(w.dtype) * temperature, least

        start = (params, coldest, self._support(problem, mu))
        return jnp.zeros_like(visits), loops.fori_loop(0, _HALVINGS * _STEPS_EACH, step, start)[2]

    def _split(self, problem: BoundProblem, mu: Array, target: Array) -> Array:
        """R's support function a way from mu towards a target, `[*B]`, the best of a few."""
        metric = jnp.maximum(mu, target)
        seen = _solve(self._gram(metric, self.features), self._project(target - mu))
        change = target - mu - metric * jnp.sum(self.features * seen[:, None, None], axis=0)
        falling = change < 0
        room = jnp.min(jnp.where(falling, mu / jnp.where(falling, -change, 1), jnp.inf), axis=(0, 1))
        step = jnp.minimum(room, 1)
        return jnp.minimum(*(self._support(problem, mu + (part * step)[None, None] * change) for part in (0.9, 1.0)))

    @staticmethod
    def _support(problem: BoundProblem, u: Array) -> Array:
        u = jnp.maximum(u, 0)
        mass = jnp.sum(u, axis=0)
        prior = jnp.broadcast_to(jnp.exp(problem.regulariser.log_prior), u.shape)
        policy = jnp.where((mass > 0)[None], u / jnp.where(mass > 0, mass, 1)[None], prior)
        return jnp.sum(mass * problem.regulariser.value(policy), axis=0)


def _solve(matrix: Array, right: Array) -> Array:
    """`matrix^{-1} right` for `[F, F, *B]`, positive semidefinite, and `[F, *B]`; directions without weight stay 0."""
    matrix, right = jnp.moveaxis(matrix, (0, 1), (-2, -1)), jnp.moveaxis(right, 0, -1)
    # Scaled to a diagonal of ones: temperatures and curvatures differ by many orders of magnitude.
    diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    scale = jnp.where(diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    matrix = matrix * scale[..., None, :] * scale[..., None]
    eye = jnp.eye(right.shape[-1], dtype=right.dtype).reshape((1,) * (right.ndim - 1) + matrix.shape[-2:])
    ridge = 16 * float(jnp.finfo(right.dtype).eps) * eye + jnp.where(diagonal > 0, 0, 1)[..., None] * eye
    return jnp.moveaxis(scale * jnp.linalg.solve(matrix + ridge, (scale * right)[..., None])[..., 0], -1, 0)


@pytrees.dataclass
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
        checks.expect_shape("SharedBudget.weights", jnp.shape(self.weights), (n_states,), "S", "one weight per state")
        if checks.is_traced(self.budget, self.weights):
            return
        weights, budget = (np.asarray(x, np.float64) for x in (self.weights, self.budget))
        rule = "a weight must be positive and finite: a state of weight 0 could be taken from without limit"
        checks.refuse("SharedBudget.weights", weights, ~((weights > 0) & np.isfinite(weights)), ("s",), rule)
        rule = "a budget must be finite and at least 0, which is the robust set itself"
        checks.refuse("SharedBudget.budget", budget, ~((budget >= 0) & np.isfinite(budget)), (), rule)

    def bind(self, batch_ndim: int, dtype: Any) -> "SharedBudget":
        """Budget `[*b]` and weights `[S, *b]`."""
        budget, weights = jnp.asarray(self.budget, dtype), jnp.asarray(self.weights, dtype)
        return SharedBudget(pytrees.lanes_last(budget, batch_ndim, 0), pytrees.lanes_last(weights, batch_ndim, 1))

    def start(self, problem: BoundProblem) -> dict[str, Array]:
        """Compute `beta dr` within R, and logarithms of the states' shares in the budget."""
        zero = jnp.zeros(shape(problem), problem.dtype)
        return {"within": zero, "share": zero[0]}

    def retract(self, problem: BoundProblem, params: dict[str, Array]) -> dict[str, Array]:
        """R's own projection; shares normalised."""
        return {"within": Whole().retract(problem, params["within"]), "share": jax.nn.log_softmax(params["share"], 0)}

    def perturbation(self, problem: BoundProblem, params: dict[str, Array]) -> Array:
        """Return a member of R, and each state's share of the budget on all its actions alike."""
        extra = self.budget[None] * jnp.exp(params["share"]) / self.weights
        dr = Whole().perturbation(problem, params["within"]) + extra[None]
        return jnp.where(is_masked(problem), 0, dr)

    def ascent(
        self, problem: BoundProblem, params: dict[str, Array], policy: Array, visits: Array, count: Array
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
        self, problem: BoundProblem, params: dict[str, Array], policy: Array, visits: Array
    ) -> tuple[Array, Array]:
        """Return the support function itself: the whole budget goes to the state of most visits per weight."""
        return problem.regulariser.value(policy), self.budget * jnp.max(visits / self.weights, axis=0)
