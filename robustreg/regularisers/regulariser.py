"""The base of all regularisers as users hold them: a convex cost of a policy, its conjugate, and the maximiser of that.

    value(p)        Omega(p) = D[p0 : p]/beta
    conjugate(q)    Omega*(q) = max_p <p, q> - Omega(p)        over normalised p
    argmax(q)       the maximiser, which is the gradient of the conjugate
    worst_case(p)   the perturbation of rewards within the robust set that hurts p the most

Here are leaves, axes and precisions. What computes is `bound`.

`beta` is the *inverse* strength in 1/reward units: a larger beta is a weaker regulariser. `state_scale` multiplies it
per state. The reference policy (prior) is kept as logarithms; a prior of 0 masks an action.

**Axes.** `beta` and `alpha` are `[*B]`, `state_scale` `[*B, S]`, the prior `[A]`, `[S, A]` or `[*B, S, A]`. The public
methods act on the last axis of `[*B, ..., A]`: the regulariser's own batch axes lead, the states, where it has any, are
next to last, and values without a state axis are those of every state. Arrays of a solution whose lanes have more axes
than the regulariser, `[..., *B, S, A]`, are taken as they are if they do not fit the other way. What fits both ways, or
could have lanes or states on one axis, is refused, and both readings named (see `axes`).

**Precision.** Leaves are float32 at least (see `parameters`). Values of 16 bits are computed with in float32, and
results have the dtype of the values.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import checks, pytrees
from robustreg.regularisers import actions, axes, parameters
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.sums import BoundSum


class Regulariser:
    """Base of all regularisers: leaves and their axes, and what can be asked of one on its own.

    A subclass holds leaves and gives `_bound`, which makes the `Bound` that computes. To write one of your own, take
    `Separable`, of which one function is asked.

    Attributes:
        beta: inverse strength in 1/reward units, `[*B]`.
        log_prior: logarithm of the reference policy, `[A]`, `[S, A]` or `[*B, S, A]`; None is uniform.
        state_scale: multiplies beta per state, `[*B, S]`, or None.
    """

    beta: Array
    log_prior: Array | None
    state_scale: Array | None
    has_reference = True  # the cost is that of leaving a distribution, and 0 there
    _is_norm = False  # the cost is no sum over actions

    def _bound(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> Bound:
        """Make the bound regulariser from leaves that are laid out, `[S or 1, *b]` and `[A, S or 1, *b]`; `place` does
        that with others, cast to `dtype`."""
        raise TypeError(f"{type(self).__name__} does not define _bound")

    def _rearrange(self, place: Any, dtype: Any, n_actions: int, last: bool = False) -> Any:
        """Put every leaf through `place(leaf, core_ndim)`, merge `state_scale` in beta, and make a `Bound` of them."""
        log_prior = self.log_prior
        if log_prior is None:
            # (In a user's own array one number will do: an array of them would be folded at compile time.)
            log_prior = jnp.full((1 if last else n_actions,), -np.log(n_actions), dtype)
        elif log_prior.shape[-1] != n_actions:
            raise ValueError(f"the prior is over {log_prior.shape[-1]} actions, the values over {n_actions}")
        log_prior = log_prior[None] if log_prior.ndim == 1 else log_prior
        beta = place(self.beta.astype(dtype)[..., None], 1)
        if self.state_scale is not None:
            beta = beta * place(self.state_scale.astype(dtype), 1)
        return self._bound(beta, place(log_prior.astype(dtype), 2), place, dtype)

    def __add__(self, other: Any) -> "Sum":
        """Add costs up: an adversary with the budgets of both. See `sums`."""
        return _sum(self, other) if isinstance(other, Regulariser) else NotImplemented

    @property
    def _scalars(self) -> tuple[str, ...]:
        """Names of the leaves that are one number per lane, `[*B]`."""
        return ("beta",)

    def _at_unit_strength(self) -> Any:
        """Set beta to 1."""
        return dataclasses.replace(self, beta=jnp.ones_like(self.beta))  # type: ignore[type-var]

    @property
    def _leaves(self) -> axes.Leaves:
        """Shapes of the leaves."""
        parts = (getattr(self, name, None) for name in ("alpha", "beta", "state_scale", "log_prior", "alpha_per_state"))
        return axes.Leaves(*(x if x is None else x.shape for x in parts))  # type: ignore[arg-type]  # beta is there

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch axes of all leaves together."""
        return self._leaves.batch

    def bind(self, batch_ndim: int, dtype: Any, n_actions: int) -> Any:
        """Lay it out for the kernels, as a `Bound`: leaves `[*core reversed, *B]`, cast to `dtype`."""
        return self._rearrange(lambda x, core: pytrees.lanes_last(x, batch_ndim, core), dtype, n_actions)

    def _public(self, x: ArrayLike, refuse: bool = False, reduce: pytrees.Reducers = pytrees.ROWS) -> tuple[Any, Array]:
        """The regulariser, bound, and `x`, aligned, with actions where `reduce` has them.

        See `axes.align`, to which `refuse` goes.
        """
        x = jnp.asarray(x)
        x = x.astype(parameters.working(x.dtype))
        if x.ndim == 0:
            raise ValueError("this argument is a scalar; expected [..., A], an entry for each action")
        leaves = self._leaves
        rank, at = len(leaves.batch), axes.align(leaves, x.shape, refuse)

        def place(leaf: Array, core: int) -> Array:
            """Give a leaf `[*b, S (, A)]` an axis for each axis of `x`, the one of actions where `reduce` has it."""
            core_at = leaf.ndim - core
            batch, states, actions = leaf.shape[:core_at], leaf.shape[core_at : core_at + 1], leaf.shape[core_at + 1 :]
            leaf = leaf.reshape(at.place(batch, rank, states) + actions)
            return leaf if core == 1 else jnp.moveaxis(leaf, -1, reduce.axis)

        last = reduce is pytrees.LAST
        bound = self._rearrange(place, x.dtype, x.shape[-1], last).with_reduce(reduce)
        given, x = x.shape, jnp.moveaxis(x.reshape(at.shape), -1, reduce.axis)
        parts = *bound.shapes, reduce.without_actions(bound.log_prior)
        try:
            shape = jnp.broadcast_shapes(reduce.without_actions(x), *parts)
        except ValueError:
            raise ValueError(axes.mismatch(leaves, given)) from None
        return bound, jnp.broadcast_to(x, (*shape, given[-1]) if last else (given[-1], *shape))

    def value(self, policy: ArrayLike) -> Array:
        """Compute the cost of a policy.

        Args:
            policy: `[*B, ..., A]`, normalised over its last axis.

        Returns:
            `Omega(p) = D[p0 : p]/beta` in reward units, `[*B, ...]`; non-negative, 0 at the prior.
        """
        return _act(self, policy, "value")

    def conjugate(self, q: ArrayLike) -> Array:
        """Compute the regularised maximum of action values.

        Args:
            q: action values, `[*B, ..., A]`; entries of masked actions are ignored.

        Returns:
            `max_p <p, q> - Omega(p)`, `[*B, ...]`.
        """
        return _act(self, q, "conjugate")

    def argmax(self, q: ArrayLike) -> Array:
        """Find the regularised greedy policy, the gradient of `conjugate`.

        Args:
            q: action values, `[*B, ..., A]`; entries of masked actions are ignored.

        Returns:
            the maximiser, `[*B, ..., A]`.
        """
        return _act(self, q, "argmax")

    def log_policy(self, q: ArrayLike) -> Array:
        """Take the logarithm of `argmax(q)`, which does not underflow with it.

        Args:
            q: action values, `[*B, ..., A]`; entries of masked actions are ignored.

        Returns:
            `log argmax(q)`, `[*B, ..., A]`: minus infinity for masked actions and, with alpha > 1, for those outside
            the support. Differentiable in everything, to any order; derivatives are 0 where it is minus infinity, and
            NaN where they are beyond the largest number.
        """
        with jax.debug_infs(False):  # minus infinity is no fault here
            return _act(self, q, "log_argmax")

    def worst_case(
        self,
        policy: ArrayLike | None = None,
        *,
        log_policy: ArrayLike | None = None,
        action: ArrayLike | None = None,
    ) -> Array:
        """Find the perturbation that hurts a policy the most within the robust set; see `adversary.worst_case`."""
        if (policy is None) == (log_policy is None):
            raise ValueError("give a policy as probabilities or as log_policy, one of the two")
        if log_policy is None:
            assert policy is not None
            return _act(self, policy, "worst_case", action)
        return _act(self, log_policy, "worst_case_of_logs", action)


@pytrees.dataclass
class Sum(Regulariser):
    """The sum of regularisers; write it with `+`.

    Attributes:
        parts: two or more, none of them a sum.
        shared: whether they have the same reference.
    """

    parts: tuple[Regulariser, ...]
    shared: bool = pytrees.static()

    @property
    def has_reference(self) -> bool:  # type: ignore[override]
        """Whether the parts have the same reference."""
        return self.shared

    @property
    def beta(self) -> Array:  # type: ignore[override]
        """Inverse strength of all parts together, `1/sum(1/beta)`, `[*B]`, where no part has its own per state."""
        return 1 / functools.reduce(jnp.add, (1 / part.beta for part in self.parts))

    @property
    def log_prior(self) -> Array | None:  # type: ignore[override]
        """The reference that parts share, else their normalised geometric mean; None where all are uniform."""
        if self.shared:
            return self.parts[0].log_prior
        known = [part.log_prior for part in self.parts if part.log_prior is not None]
        return jax.nn.log_softmax(functools.reduce(jnp.add, known) / len(self.parts)) if known else None

    @property
    def state_scale(self) -> None:  # type: ignore[override]
        """None: each part has its own."""
        return None

    @property
    def _leaves(self) -> axes.Leaves:
        leaves = [part._leaves for part in self.parts]
        states = {n for each in leaves if (n := each.states) is not None and n > 1}
        if len(states) > 1:
            raise ValueError(f"the parts of this sum are for different numbers of states: {sorted(states)}")
        try:
            batch = jnp.broadcast_shapes(*(each.batch for each in leaves))
        except ValueError:
            shown = ", ".join(str(list(each.batch)) for each in leaves)
            raise ValueError(f"the batch axes of the parts of this sum do not broadcast: {shown}") from None
        return axes.Leaves(None, batch, tuple(states) or None, None)

    def _rearrange(self, place: Any, dtype: Any, n_actions: int, last: bool = False) -> "BoundSum":
        parts = tuple(part._rearrange(place, dtype, n_actions, last) for part in self.parts)
        return BoundSum(parts, self.shared)

    @property
    def _scalars(self) -> tuple[str, ...]:
        return ()

    def _at_unit_strength(self) -> "Sum":
        beta = self.beta
        parts: Any = self.parts  # of classes that are dataclasses, as all are
        return Sum(tuple(dataclasses.replace(part, beta=part.beta / beta) for part in parts), self.shared)


def _sum(*parts: Regulariser) -> Sum:
    """The sum of parts whose axes fit; sums among them are taken apart."""
    flat: list[Any] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Sum) else [part])
    if sum(part._is_norm for part in flat) > 1:
        raise TypeError("a sum has one norm ball at most: add the radii of balls of one p")
    if any(part._is_norm and part.p == 1 for part in flat):
        raise TypeError("a norm ball of p = 1 cannot be added to another regulariser; take p > 1")
    whole = Sum(tuple(flat), _same_reference(flat))
    _ = whole._leaves.batch, whole._leaves.states
    return whole


def _same_reference(parts: list[Any]) -> bool:
    """Whether all parts are 0 at one policy, as far as values can be looked at."""
    if not all(part.has_reference for part in parts):
        return False
    priors = [part.log_prior for part in parts]
    first = priors[0]
    if all(prior is first for prior in priors):
        return True
    if any(prior is None for prior in priors) or checks.is_traced(*priors):
        return False
    return all(prior.shape == first.shape and np.array_equal(prior, first) for prior in priors)


def counting(reg: Any, dtype: Any, n_actions: int) -> Any:
    """Put the counting measure in the place of a reference, unless a mask stands there."""
    return reg if reg.log_prior is not None else dataclasses.replace(reg, log_prior=jnp.zeros((n_actions,), dtype))


def _act(reg: Regulariser, x: ArrayLike, method: str, action: ArrayLike | None = None) -> Any:
    """A kernel on an array in the public layout, as one compiled program."""
    name = _ARGUMENTS.get(method, "q")
    if not isinstance(x, jax.Array):  # a compiled program would say nothing of its name, or of swapped bytes
        x = checks.array(name, x)
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}; expected [..., A], none empty")
    if action is not None and x.ndim:
        action = actions.checked("action", action, x.shape[:-1], x.shape[-1])
    return _acted(reg, x, method, action)


_ARGUMENTS = {"value": "policy", "worst_case": "policy", "worst_case_of_logs": "log_policy"}


@functools.partial(jax.jit, static_argnames="method")
def _acted(reg: Regulariser, x: Array, method: str, action: Array | None = None) -> Any:
    given, shape = jax.dtypes.canonicalize_dtype(x.dtype), x.shape
    bound, x = reg._public(x, refuse=True, reduce=pytrees.LAST)
    if action is None:
        out = getattr(bound, method)(x)
    else:
        place = axes.align(reg._leaves, shape, True).shape[:-1]
        action = jnp.broadcast_to(action.reshape(place), x.shape[:-1])[..., None]
        out = getattr(bound, method)(x, action)[..., 0]
    return out.astype(given) if jnp.issubdtype(given, jnp.floating) else out
