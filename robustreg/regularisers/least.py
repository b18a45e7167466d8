r"""Costs that are no sums over actions, but the least of such sums: `Omega(p) = min_s phi(p, s)`, convex in p and s.

Added to others, they make a sum whose conjugate is `max_s` of that of the others and `phi(., s)`; `sums` looks for the
best s around the two searches of `marginals`.
"""

import jax.numpy as jnp
from jax import Array

from robustreg.regularisers.bound import Bound


class Least(Bound):
    """Base of such costs; s is a positive number per state, `[...]`, sought by its logarithm."""

    @property
    def searched(self) -> bool:
        """Whether s has to be looked for."""
        return True

    @property
    def growth(self) -> float:
        """About how fast `beyond` grows where s is small."""
        return 1.0

    def bracket(self, like: Array) -> tuple[Array, Array, Array]:
        """Return where to look for `log s` first, and its least and most, `[...]` each, like an array."""
        raise TypeError(f"{type(self).__name__} does not define bracket")

    def at(self, log_s: Array) -> Bound:
        """Return `phi(., s)`, a sum over actions."""
        raise TypeError(f"{type(self).__name__} does not define at")

    def beyond(self, policy: Array, log_s: Array) -> Array:
        """Measure s against the best one for the policy at s, `[...]`: 0 there, and growing with s."""
        raise TypeError(f"{type(self).__name__} does not define beyond")

    def best(self, policy: Array) -> Array:
        """Return the logarithm of the best s for a policy, `[...]`."""
        raise TypeError(f"{type(self).__name__} does not define best")

    def slopes(self, policy: Array) -> Array:
        """Compute the marginals at a policy, `[A, ...]`, of which entries may be 0: all of it decides on s."""
        raise TypeError(f"{type(self).__name__} does not define slopes")

    def bend(self, policy: Array) -> tuple[Array, Array]:
        """Find what the change of s takes off the derivative of the marginals: `c [...]` and `b [A, ...]`.

        With w the yields of `phi(., s)`, the second derivative of Omega is `diag(1/w) - c b b^T`.
        """
        raise TypeError(f"{type(self).__name__} does not define bend")

    def marginal(self, log_policy: Array) -> Array:
        """Compute the derivative in each probability, `[A, ...]`."""
        return self.slopes(jnp.exp(log_policy))

    def yields(self, policy: Array) -> Array:
        """Compute `dp/dm` at a fixed s, `[A, ...]`."""
        return self.at(self.best(policy)).yields(policy) if self.searched else super().yields(policy)
