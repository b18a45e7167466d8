r"""The regularised Bellman operator, its derivative, and what one residual of it proves.

    T V = Omega*(r + g P V)          q_values, backup
    dT/dV = K = g P_pi               Chain, with pi = grad Omega*(q)  (Danskin)

`T` is monotone, convex and, when no episode ends, `T(V + c) = T V + g c`.

**Offsets.** Values are carried as `V = h + c`, one number `c` per lane. With the exit rate
`e(s,a) = (1-g) + g termination(s,a)`,

    T(h + c) - c = Omega*(r - c e + g P h),

so that a constant costs nothing and rounding is that of the small `h`, not of `V`, which is larger by 1/(1-g).
`1-g` is a leaf of its own, rounded once from double precision: in float32 `1 - 0.9999` is wrong in the fourth digit.

**Certificate.** With `d = T V - V` [MacQueen 1966; Puterman 1994, sec. 6.6], for any V

    T V + g/(1-g) min d  <=  V*  <=  T V + g/(1-g) max d,

where min d is replaced by min(min d, 0) and max d by max(max d, 0) if episodes end. In floating point `T` is computed
with an error; an error of `delta` in every entry widens each side by `delta/(1-g)`, except for the error in `c e`:
along every trajectory the discounted exit rates add up to exactly 1, so that it widens them by `u |c|` only.
`rounding` bounds both, from the size of every summand of the backup.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from robustreg import _tree, masks
from robustreg.mdp import MDP
from robustreg.regularisers import Regulariser, maximise
from robustreg.transitions import Transitions


@_tree.dataclass
class Lanes:
    """A regularised MDP in the kernels' layout: actions first, lanes last, every leaf aligned with `[A, S, *B]`.

    Attributes:
        transitions, regulariser: bound to the layout.
        reward: `[A, S, *b]`.
        leave: exit rate `(1-g) + g termination`, `[A, S, *b]` with axes of 1 where nothing depends on them.
        discount, complement: g and 1 - g, `[*b]`.
        sizes: see `sizes`.
        ends: whether termination is part of the problem (else T commutes with constants up to g).
    """

    transitions: Transitions
    regulariser: Regulariser
    reward: Array
    leave: Array
    discount: Array
    complement: Array
    sizes: tuple[Array, Array, Array]
    batch: tuple[int, ...] = _tree.static()
    ends: bool = _tree.static()

    @property
    def n_states(self) -> int:
        """S."""
        return self.reward.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """Working precision."""
        return self.reward.dtype


def lanes(mdp: MDP, regulariser: Regulariser, *others: tuple[int, ...]) -> Lanes:
    """Lay an MDP and a regulariser out for the kernels.

    Args:
        mdp: any batch axes.
        regulariser: any batch axes.
        *others: batch shapes of further arrays (a policy, an initial value) that broadcast with them.

    Raises:
        ValueError: batch axes that do not broadcast.
    """
    try:
        batch = np.broadcast_shapes(mdp.batch_shape, regulariser.batch_shape, *others)
    except ValueError:
        shapes = [mdp.batch_shape, regulariser.batch_shape, *others]
        raise ValueError(f"batch axes do not broadcast: MDP, regulariser, others have {shapes}") from None
    mdp, n, dtype = mdp._canonical(), len(batch), mdp.dtype
    bound = masks.restricted(regulariser, mdp.available).bind(n, dtype, mdp.n_actions)
    if bound.beta.shape[0] not in (1, mdp.n_states) or bound._prior.shape[1] not in (1, mdp.n_states):
        raise ValueError(f"the regulariser has per-state parameters for another number of states than {mdp.n_states}")
    discount, complement = (_tree.lanes_last(x, n, 0) for x in (mdp.discount, _complement(mdp)))
    leave = complement[None, None]
    if mdp.termination is not None:
        leave = leave + discount[None, None] * _tree.lanes_last(mdp.termination.astype(dtype), n, 2)
    reward = _tree.lanes_last(mdp.reward, n, 2)
    if mdp.available is not None:
        reward = jnp.where(_tree.lanes_last(mdp.available, n, 2), reward, 0)
    return Lanes(
        transitions=mdp.transitions.bind(n, dtype),
        regulariser=bound,
        reward=reward,
        leave=leave,
        discount=discount,
        complement=complement,
        sizes=sizes(bound, reward),
        batch=batch,
        ends=mdp.termination is not None,
    )


def sizes(regulariser: Regulariser, reward: Array) -> tuple[Array, Array, Array]:
    """What `rounding` grows with and no iteration changes: largest |r|, 1/beta and |log p0|, `[*b]` each."""
    masked = jnp.isneginf(regulariser._prior)
    largest = jnp.max(jnp.where(masked, 0, jnp.abs(reward)), axis=(0, 1))
    return (
        largest,
        1 / jnp.min(regulariser.beta, axis=0),
        -jnp.min(jnp.where(masked, 0, regulariser._prior), axis=(0, 1)),
    )


def _complement(mdp: MDP) -> Array:
    """`1 - g` as precisely as the MDP knows it: its own leaf, unless `discount` was replaced without it."""
    difference = 1 - mdp.discount
    fits = jnp.abs(difference - mdp.complement) <= jnp.finfo(mdp.dtype).eps
    return jnp.where(fits, mdp.complement, difference)


def q_values(problem: Lanes, h: Array, c: Array) -> Array:
    """`r + g P V - c` at `V = h + c`, `[A, S, *B]`, from `h [S, *B]` and `c [*B]`."""
    ahead = problem.discount[None, None] * problem.transitions._expect(h)
    return (problem.reward - c[None, None] * problem.leave) + ahead


def backup(problem: Lanes, h: Array, c: Array) -> tuple[Array, Array, Array]:
    """`T V - c [S, *B]`, its policy `[A, S, *B]` and `q - c [A, S, *B]` at `V = h + c`."""
    q = q_values(problem, h, c)
    th, policy = maximise(problem.regulariser, q)
    return th, policy, q


def cost(problem: Lanes, th: Array, q: Array) -> Array:
    """`max_s (max_a q - T V)`, `[*B]`: the most that the regulariser takes off, in reward units."""
    masked = jnp.isneginf(problem.regulariser._prior)
    return jnp.max(_tree.largest(jnp.where(masked, -jnp.inf, q)) - th, axis=0)


def sound(problem: Lanes) -> Array:
    """Whether discount and strength of a lane are in range, `[*B]`. NaN and infinity show in the first backup."""
    proper = (problem.discount >= 0) & (problem.discount < 1) & (problem.complement > 0)
    return jnp.broadcast_to(proper & jnp.all(problem.regulariser.beta > 0, axis=0), problem.batch)


@_tree.dataclass
class Chain:
    """`K = g P_pi`, the derivative of T: the policy's discounted Markov chain as an operator.

    Attributes:
        transitions, policy: bound to the kernels' layout, `[A, S, *B]`; whichever kernel and policy on it make `P_pi`.
        discount: `[*b]`.
        leave: exit rate of the policy, `(I - K) 1`, `[S, *B]`.
        backwards: `P_pi` from the other end, or None; see `Transitions`.
    """

    transitions: Transitions
    policy: Array
    discount: Array
    leave: Array
    backwards: Transitions | None
    ends: bool = _tree.static()

    def apply(self, x: Array, add: Callable[[Array], Array] = _tree.total) -> Array:
        """`K x`, `[S, *B]`. `add` sums over actions; to transpose this function, give one that has a transpose."""
        return self.discount[None] * add(self.policy * self.transitions._expect(x))

    def transpose(self, y: Array) -> Array:
        """`K^T y`, `[S, *B]`."""
        if self.backwards is not None:
            return self.discount[None] * self.backwards._push(y[None])
        return self.discount[None] * self.transitions._push(self.policy * y[None])

    def matrix(self) -> Array:
        """`K` written out, `[*B, S, S]` (row: state, column: successor)."""
        n, batch = self.leave.shape[0], self.leave.shape[1:]
        unit = jnp.eye(n, dtype=self.policy.dtype).reshape((n,) + (1,) * len(batch) + (n,))
        # A further lane for each unit vector: P is then one matrix-matrix product for all of them.
        expected = self.transitions._widen()._expect(jnp.broadcast_to(unit, (n, *batch, n)))
        rows = self.discount[None, ..., None] * jnp.sum(self.policy[..., None] * expected, axis=0)
        return jnp.moveaxis(rows, 0, -2)


def chain(problem: Lanes, policy: Array) -> Chain:
    """The chain of a policy `[A, S, *B]`."""
    leave = _tree.total(policy * problem.leave) if problem.ends else problem.leave[0]
    leave = jnp.broadcast_to(leave, policy.shape[1:])
    transitions, policy, backwards = problem.transitions._under(policy)
    return Chain(transitions, policy, problem.discount, leave, backwards, problem.ends)


def extremes(d: Array, ends: bool) -> tuple[Array, Array]:
    """Smallest and largest entry per lane, `[*B]` each, clipped at 0 if episodes end. NaN if any entry is not finite.

    The test for finite entries is explicit: reductions by max over axis 0 have been seen to lose NaN (JAX 0.10, CPU).
    """
    # One reduction for all three: the compiler makes three kernels of every separate one.
    low, high, broken = jnp.max(jnp.stack([-d, d, jnp.where(jnp.isfinite(d), 0, jnp.inf)]), axis=1)
    low = -low
    if ends:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    return jnp.where(broken > 0, jnp.nan, low), jnp.where(broken > 0, jnp.nan, high)


def value_bounds(problem: Lanes, h: Array, c: Array, th: Array, cost: Array) -> tuple[Array, Array]:
    """Certified bounds on V*, `[S, *B]` each, from one backup `th = T V - c` at `V = h + c`; rounding included."""
    low, high = extremes(th - h, problem.ends)
    ratio = problem.discount / problem.complement
    # Forming the bounds themselves rounds by a few units of their size.
    slack = rounding(problem, jnp.max(jnp.abs(h), axis=0), c, cost)
    slack = slack + 4 * float(jnp.finfo(problem.dtype).eps) * ratio * jnp.maximum(jnp.abs(low), jnp.abs(high))
    middle = th + c[None]
    return middle + (ratio * low - slack)[None], middle + (ratio * high + slack)[None]


def rounding(problem: Lanes, size: Array, c: Array, cost: Array) -> Array:
    """Bound on the error that floating point adds to each side of the certificate, `[*B]`.

    The error of one backup is at most `u` times the sum of: the products and sums of `P h` (whose roundings are
    bounded by their number for short sums and behave like its square root for long ones [Higham and Mary 2019]),
    the storage of P, r and g, and the conjugate, whose logarithms err by `u (2 + log A)/beta` or a small multiple of
    that (the regulariser's `_roughness`) and whose parameters,
    stored with relative error u, by `u` times the cost of regularisation.

    Args:
        size, c: of the iterate `V = h + c`: `max_s |h|` and c, `[*B]`.
        cost: `max_a q - T V`, `[*B]`, largest over states: the size of what the regulariser takes off.
    """
    unit = 0.5 * float(jnp.finfo(problem.dtype).eps)
    terms = 4 + min(problem.transitions.fan_out, 4 * problem.transitions.fan_out**0.5)
    n_actions = problem.reward.shape[0]
    log_actions = float(np.log(n_actions))
    reward, temperature, log_prior = problem.sizes
    per_step = (
        (terms + 2 + n_actions**0.5) * size
        + (2 + n_actions**0.5) * jnp.abs(cost)
        + (2 + log_actions + log_prior) * jnp.minimum(jnp.abs(cost), temperature)
        + problem.regulariser._roughness * (2 + log_actions) * temperature
        + 3 * reward
    )
    return unit * (per_step / problem.complement + 4 * jnp.abs(c) + 2 * size)
