"""The Markov chain of a policy as a linear operator: `K = g P_pi`, applied, transposed, written out."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from robustreg._core import pytrees
from robustreg.problems.dense import Dense
from robustreg.problems.successors import BoundSuccessors
from robustreg.problems.transitions import Transitions


@pytrees.dataclass
class Product:
    """A matrix that is the product of two vectors, `left right^T`, `[S, *B]` each."""

    left: Array
    right: Array

    def pick(self, index: tuple[Array, ...]) -> "Product":
        """Return the lanes at `index`, one array `[n]` per batch axis."""
        return Product(pytrees.pick_lanes(self.left, index), pytrees.pick_lanes(self.right, index))

    def apply(self, x: Array) -> Array:
        """Multiply by a vector, `[S, *B]`."""
        return self.left * jnp.sum(self.right * x, axis=0)[None]

    def transpose(self, y: Array) -> Array:
        """Multiply a vector by it, `[S, *B]`."""
        return self.right * jnp.sum(self.left * y, axis=0)[None]

    def entries(self) -> Array:
        """Write it out, `[S, S, *B]`."""
        return self.left[:, None] * self.right[None]


@pytrees.dataclass
class Written:
    """A matrix written out: a kernel of one action (row: state, column: successor), whose products are those of one."""

    kernel: Dense

    def pick(self, index: tuple[Array, ...]) -> "Written":
        """Return the lanes at `index`, one array `[n]` per batch axis."""
        return Written(self.kernel._take_lanes(index))

    def apply(self, x: Array) -> Array:
        """Multiply by a vector, `[S, *B]`."""
        return self.kernel._expect(x)[0]

    def transpose(self, y: Array) -> Array:
        """Multiply a vector by it, `[S, *B]`."""
        return self.kernel._push(y[None])

    def entries(self) -> Array:
        """Write it out, `[S, S, *B]`."""
        return jnp.moveaxis(self.kernel.probabilities[..., 0, :], (-2, -1), (0, 1))


def written(rows: Array) -> Written:
    """Make it of rows `[*B, S, S]`."""
    return Written(Dense(rows[..., None, :]))


@pytrees.dataclass
class Moved:
    """A matrix of lists and a few columns: what states lose of their successors less what they gain elsewhere.

    Attributes:
        lost: one entry per action and successor.
        lowest: columns of what is gained, `[R, *B]`.
        gained: `[R, S, *B]`.
    """

    lost: BoundSuccessors
    lowest: Array
    gained: Array

    def pick(self, index: tuple[Array, ...]) -> "Moved":
        """Return the lanes at `index`, one array `[n]` per batch axis."""
        lowest, gained = (pytrees.pick_lanes(x, index) for x in (self.lowest, self.gained))
        return Moved(self.lost._take_lanes(index), lowest, gained)

    def apply(self, x: Array) -> Array:
        """Multiply by a vector, `[S, *B]`."""
        there = jnp.take_along_axis(x, self.lowest, axis=0)
        return jnp.sum(self.lost._expect(x), axis=0) - jnp.sum(self.gained * there[:, None], axis=0)

    def transpose(self, y: Array) -> Array:
        """Multiply a vector by it, `[S, *B]`."""
        there = jnp.sum(self.gained * y[None], axis=1)
        return self.lost._push(y[None]) - jnp.sum(jnp.where(self._columns, there[:, None], 0), axis=0)

    def entries(self) -> Array:
        """Write it out, `[S, S, *B]`."""
        lost = self.lost._written_out(jnp.ones(self.lost.probabilities.shape[1:], self.gained.dtype))
        return lost - jnp.sum(jnp.where(self._columns[:, None], self.gained[:, :, None], 0), axis=0)

    @property
    def _columns(self) -> Array:
        """Which state each column is, bool `[R, S, *B]`."""
        states = jnp.arange(self.gained.shape[1], dtype=self.lowest.dtype)
        return self.lowest[:, None] == states.reshape((1, -1) + (1,) * (self.lowest.ndim - 1))


@pytrees.dataclass
class Chain:
    """`K = g P_pi`, the derivative of T: the policy's discounted Markov chain as an operator.

    Attributes:
        transitions, policy: in the kernels' layout, `[A, S, *B]`: a pair that induces `P_pi`, perhaps a cheaper one.
        discount: `[*b]`.
        exit_rate: exit rate of the policy, `(I - K) 1`, `[S, *B]`.
        longest: the problem's own bound on discounted steps, `[*b]`.
        backwards: `P_pi` from the other end, or None; see `Transitions`.
        pull: what is taken off K, or None: the change that uncertain transitions make (see `ambiguity`). K may then
            have negative entries.
    """

    transitions: Transitions
    policy: Array
    discount: Array
    exit_rate: Array
    longest: Array
    backwards: Transitions | None
    ends: bool = pytrees.static()
    pull: Product | Written | Moved | None = None

    @property
    def horizon(self) -> Array:
        """Bound on discounted steps, `[*B]`: on `(I - K)^{-1} 1`, hence on how much the inverse enlarges anything."""
        if self.pull is not None:
            return jnp.broadcast_to(self.longest, self.exit_rate.shape[1:])
        return jnp.minimum(1 / jnp.min(self.exit_rate, axis=0), self.longest)

    def pick(self, index: tuple[Array, ...]) -> "Chain":
        """Return the lanes at `index`, one array `[n]` per batch axis."""
        own = (self.policy, self.discount, self.exit_rate, self.longest)
        policy, discount, exit_rate, longest = (pytrees.pick_lanes(x, index) for x in own)
        pull = None if self.pull is None else self.pull.pick(index)
        return Chain(self.transitions._take_lanes(index), policy, discount, exit_rate, longest, None, self.ends, pull)

    def apply(self, x: Array, add: Callable[[Array], Array] = pytrees.total) -> Array:
        """Compute `K x`, `[S, *B]`. `add` sums over actions; to be transposed, give one that has a transpose."""
        ahead = self.discount[None] * add(self.policy * self.transitions._expect(x))
        return ahead if self.pull is None else ahead - self.pull.apply(x)

    def transpose(self, y: Array) -> Array:
        """Compute `K^T y`, `[S, *B]`."""
        if self.backwards is not None:
            back = self.discount[None] * self.backwards._push(y[None])
        else:
            back = self.discount[None] * self.transitions._push(self.policy * y[None])
        return back if self.pull is None else back - self.pull.transpose(y)

    def matrix(self) -> Array:
        """Compute `K` written out, `[*B, S, S]` (row: state, column: successor)."""
        n, batch = self.exit_rate.shape[0], self.exit_rate.shape[1:]
        rows = self.discount[None, None] * self.transitions._written_out(
            jnp.broadcast_to(self.policy, self.policy.shape[:2] + batch)
        )
        matrix = jnp.moveaxis(rows, (0, 1), (-2, -1))
        if self.pull is None:
            return matrix
        entries = jnp.broadcast_to(self.pull.entries(), (n, n, *batch))
        return matrix - jnp.moveaxis(entries, (0, 1), (-2, -1))
