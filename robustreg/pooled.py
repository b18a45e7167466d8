"""Sets of perturbations whose states share a constraint, for `game.solve_game`: `Features` and `SharedBudget`.

What the adversary takes in one state it lacks in another, so that its answer depends on where the agent spends its
time: methods that `budgets` has no use for visits in, need them here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg import _host, _tree, bellman
from robustreg.budgets import Adversary, Whole, is_masked, shape
from robustreg.regularisers import maximise


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
