r"""Transitions that stay probabilities, where the actions of a state share the radius: see `exact_balls` for one row.

A policy p of a state, with rows P_a and values v of the successors, loses

    Psi(p)  =  max_x  sum_a p_a <P_a - x_a, v>     such that    sum_a D(x_a, P_a) <= B,   x_a >= 0,  sum x_a = sum P_a,

where D is half the squared distance in the 2-norm and `B = b^2/2`, or D is the relative entropy and `B = b`. With the
multiplier 1/s of the budget, every row is the worst of its own ball at the strength `s p_a`,

    x_a(s p_a)  =  argmin_x  s p_a <x, v> + D(x, P_a),

one s for all actions: that at which the budget is spent. The more an action is played, the more of it is spent there.

Psi is convex, and so a regulariser, to be added to the one there is [Wiesemann, Kuhn and Rustem 2013 for the sets]. By
the dual of its maximum it is the least of sums over actions (`regularisers.least`),

    Psi(p)  =  min_s phi(p, s),      phi(p, s)  =  B/s + sum_a max_x (p_a <P_a - x, v> - D(x, P_a)/s),

whose marginals are `<P_a - x_a(s p_a), v>`. Its worst case is what the noise takes off each action.

**Cost.** Three searches, one in the other, each of whose steps looks at every row that is written out: 50 to 150 looks
for a backup, which takes some 4 where each pair has a radius of its own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import pytrees
from robustreg.problems.transitions import Transitions
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.least import Least
from robustreg.regularisers.sums import BoundSum
from robustreg.solvers import exact_balls
from robustreg.solvers.plain import FixedPolicy, HardMax

KINDS = (2, "kl")


@pytrees.dataclass
class SharedBall(exact_balls.ExactBall):
    """Balls around all rows of a state together: `radius` is `[1, S or 1, *b]`, p is 2 or "kl"."""

    def rounding(self, discount: Array, size: Array) -> Array:
        """Bound what the cost of a value of that size errs by, in units of u: two sums over S states, and searches."""
        return 2 * super().rounding(discount, size)

    def worst(self, h: Array, c: Array) -> Array:
        """Return the value: which rows are worst at it depends on the policy too."""
        return h

    def expected(self, transitions: Transitions, h: Array, worst: Array) -> Array:
        """Compute `P h`, `[A, S, *B]`: what the noise costs is in the operator."""
        return transitions._expect(h)

    def operator(self, reg: Bound, discount: Array, worst: Array) -> Bound:
        """Return the regulariser with what the noise costs added to it."""
        cost = self._cost_of(discount, worst, reg.log_prior)
        if isinstance(reg, FixedPolicy):
            lost = cost.value(jnp.broadcast_to(reg.policy, (*reg.policy.shape[:2], *worst.shape[1:])))
            return FixedPolicy(reg.policy, reg.cost + lost, reg.beta, reg.log_prior)
        parts = () if isinstance(reg, HardMax) else reg.parts if isinstance(reg, BoundSum) else (reg,)
        if any(isinstance(part, Least) for part in parts):
            raise TypeError(
                'a ball of transitions with rectangular="s" is added to the regulariser, as a function of the policy: '
                'beside a norm ball, that sum is not there; take "sa"'
            )
        return BoundSum((*parts, cost), False)

    def noise(self, policy: Array, worst: Array) -> Array:
        """Find the noise that costs a policy most, `[A, S, S, *B]`."""
        one, free = jnp.ones((1,) * (worst.ndim - 1), worst.dtype), jnp.zeros((1,) * policy.ndim, worst.dtype)
        cost = self._cost_of(one, worst, free)
        return cost.noise_at(cost.strength(policy)[None] * policy)

    def _cost_of(self, discount: Array, h: Array, log_prior: Array) -> "SharedCost":
        """Psi of the states whose successors have these values."""
        # Rows keep their mass, so that it may be counted from the lowest value.
        over = h - lax.stop_gradient(jnp.min(h, axis=0, keepdims=True))
        masks = jnp.where(jnp.isneginf(log_prior), -jnp.inf, 0).astype(h.dtype)
        return SharedCost(discount, self.radius[0], self.rows, over[None, None], masks, self.p)


@pytrees.dataclass
class SharedCost(Least):
    """Hold what the noise of all rows together costs a policy, `g Psi(p)`.

    Attributes:
        discount: g, `[*b]`.
        radius: `[S or 1, *b]`.
        rows: of P, `[A, S, S, *b]`.
        values: of the successors, from the lowest on, `[1, 1, S, *B]`.
        log_prior: 0, or minus infinity for an action that does not exist.
        p: 2 or "kl".
    """

    has_reference = False

    discount: Array
    radius: Array
    rows: Array
    values: Array
    log_prior: Array
    p: float | str = pytrees.static()

    @property
    def beta(self) -> Array:  # type: ignore[override]
        """One over the most that can be taken off, `[1, *B]`."""
        most = self.discount * jnp.max(self.values, axis=(0, 1, 2))
        return (1 / jnp.maximum(most, jnp.finfo(most.dtype).tiny))[None]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the leaves without actions."""
        return (self.radius.shape,)

    def noise_at(self, s: Array) -> Array:
        """Compute `x - P` at strengths `[A, S, *B]`, `[A, S, S, *B]`."""
        rows, values = jnp.broadcast_arrays(self.rows, self.values)
        return _noise(self.p, s, rows, values)

    def taken(self, s: Array) -> Array:
        """Compute what each action loses at strengths `[A, S, *B]`, likewise."""
        return -self.discount[None, None] * jnp.sum(self.noise_at(s) * self.values, axis=2)

    def spent(self, s: Array) -> Array:
        """Compute D of each row at strengths `[A, S, *B]`, likewise."""
        rows, values = jnp.broadcast_arrays(self.rows, self.values)
        return _spent(self.p, s, rows, values)

    def taken_and_spent(self, s: Array) -> tuple[Array, Array]:
        """Compute both."""
        noise = self.noise_at(s)
        spent = 0.5 * jnp.sum(noise**2, axis=2) if self.p == 2 else self.spent(s)
        return -self.discount[None, None] * jnp.sum(noise * self.values, axis=2), spent

    def budget(self) -> Array:
        """Compute B, `[S or 1, *b]`."""
        return 0.5 * self.radius**2 if self.p == 2 else self.radius

    def strength(self, policy: Array) -> Array:
        """Find the s at which a policy's budget is spent, `[S, *B]`, differentiably."""
        rows, values = jnp.broadcast_arrays(self.rows, policy[:, :, None] * self.values)

        def in_one(x: Array) -> Array:
            """Put the rows of all actions into one, `[1, S, A S, *B]`."""
            x = jnp.moveaxis(x, 0, 1)
            return x.reshape(1, x.shape[0], -1, *x.shape[3:])

        radius = jnp.broadcast_to(self.radius, rows.shape[1:2] + rows.shape[3:])[None]
        return exact_balls.strength(_size_of(self.p, rows.shape[0]), in_one(rows), in_one(values), radius)[0]

    def value(self, policy: Array) -> Array:
        """Compute `g Psi(p)`, `[S, *B]`."""
        return jnp.sum(policy * self.slopes(policy), axis=0)

    def slopes(self, policy: Array) -> Array:
        """Compute what the worst noise takes off each action, `[A, S, *B]`."""
        return self.taken(self.strength(policy)[None] * policy)

    def best(self, policy: Array) -> Array:
        """Return the logarithm of the strength, `[S, *B]`."""
        return jnp.log(jnp.maximum(self.strength(policy), jnp.finfo(policy.dtype).tiny))

    def bracket(self, like: Array) -> tuple[Array, Array, Array]:
        """Return strengths that do not spend the budget (to begin with, too), and that leave the lowest value alone.

        Rows move by at most `s p_a` times the deviation of the values, `width sqrt(S)/2` or less (2-norm), and to a
        relative entropy of at most `(s p_a width)^2 / 8`.
        """
        width, about = jnp.max(self.values, axis=(0, 1, 2)), jnp.finfo(like.dtype)
        unit = jnp.broadcast_to(-jnp.log(jnp.where(width > 0, width, 1)), like.shape[1:])
        least = jnp.sqrt((8 / self.rows.shape[2] if self.p == 2 else 8) * self.budget())
        none = float(np.exp(-0.98 * about.nmant))
        low = unit + jnp.log(jnp.maximum(0.9 * least, none))
        return low, low, unit + 0.7 * about.nmant

    @property
    def growth(self) -> float:
        """Return 2: what is spent grows with the square of a small s."""
        return 2.0

    def at(self, log_s: Array) -> "AtStrength":
        """Return `g phi(., s)`."""
        return AtStrength(log_s, self)

    def beyond(self, policy: Array, log_s: Array) -> Array:
        """Measure what is spent at s against the budget, in logarithms, `[S, *B]`."""
        spent = jnp.sum(self.spent(jnp.exp(log_s)[None] * policy), axis=0)
        tiny = jnp.finfo(policy.dtype).tiny
        return jnp.log(jnp.maximum(spent, tiny)) - jnp.log(jnp.maximum(self.budget(), tiny))

    def bend(self, policy: Array) -> tuple[Array, Array]:
        """Find how s falls as an action is played more: `s p_a` all spend from one budget.

        With `c_a` the cost of a row at `t = s p_a`, where `dD = t dc`, the budget holds
        `sum_a p_a^2 c_a' ds = -sum_a s p_a c_a' dp_a`.
        """
        s = self.strength(policy)
        slope = jax.jvp(self.taken, (s[None] * policy,), (jnp.ones_like(policy),))[1]
        b = policy * slope
        total = jnp.sum(policy * b, axis=0)
        # (A budget that is never spent bends nothing.)
        binds = (total > 0) & (self.beyond(policy, jnp.log(s)) > -1e-3)
        return jnp.where(binds, s / jnp.where(total > 0, total, 1), 0), b


@pytrees.dataclass
class AtStrength(Bound):
    """`g phi(., s)`: a sum over actions, at least `g Psi`, and that where s spends the budget.

    Attributes:
        log_s: `[S, *B]`.
        cost: what it is at least.
    """

    has_reference = False

    log_s: Array
    cost: SharedCost

    @property
    def beta(self) -> Array:  # type: ignore[override]
        """That of the cost."""
        return self.cost.beta

    @property
    def log_prior(self) -> Array:  # type: ignore[override]
        """That of the cost."""
        return self.cost.log_prior

    @property
    def roughness(self) -> Array:
        """Sums over successors round by units of the most that they can be."""
        return 1 / self.beta

    def value(self, policy: Array) -> Array:
        """Compute it, `[S, *B]`."""
        s = jnp.exp(self.log_s)
        taken, used = self.cost.taken_and_spent(s[None] * policy)
        left = self.cost.budget() - jnp.sum(used, axis=0)
        return jnp.sum(policy * taken, axis=0) + self.cost.discount[None] * left / s

    def marginal(self, log_policy: Array) -> Array:
        """Compute what the noise at s takes off each action, `[A, S, *B]`."""
        return self.cost.taken(jnp.exp(self.log_s[None] + log_policy))


def _noise(p: float | str, s: Array, rows: Array, values: Array) -> Array:
    """The worst rows at strengths, less the rows, `[A, S, n, *B]`."""
    if p == 2:
        return exact_balls.projection(s, rows, values)
    return rows * jnp.expm1(exact_balls.log_tilt(s, rows, values))


def _spent(p: float | str, s: Array, rows: Array, values: Array) -> Array:
    """How far these are from the rows, in D, `[A, S, *B]`."""
    if p == 2:
        return 0.5 * jnp.sum(exact_balls.projection(s, rows, values) ** 2, axis=2)
    return exact_balls.entropy(s, rows, values)


@functools.cache
def _size_of(p: float | str, n_actions: int) -> Callable[[Array, Array, Array], Array]:
    """How far the rows of all actions, put into one, move at a strength, in the radius's unit."""

    def size(s: Array, rows: Array, values: Array) -> Array:
        rows, values = (
            jnp.moveaxis(x[0].reshape(x.shape[1], n_actions, -1, *x.shape[3:]), 1, 0) for x in (rows, values)
        )
        total = jnp.sum(_spent(p, jnp.broadcast_to(s, rows.shape[:2] + rows.shape[3:]), rows, values), axis=0)[None]
        return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, 2 * total, 1)), 0) if p == 2 else total

    return size
