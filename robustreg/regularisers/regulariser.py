"""The base of all regularisers: a convex cost of a policy, its conjugate, and the maximiser of the conjugate.

A regulariser is three functions of one state's action distribution, all else follows (see `bellman`, `adversary`):

    value(p)        Omega(p) = D[p0 : p]/beta
    conjugate(q)    Omega*(q) = max_p <p, q> - Omega(p)        over normalised p
    argmax(q)       the maximiser, which is the gradient of the conjugate

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

from robustreg._core import checks, forks, pytrees
from robustreg.regularisers import actions, axes, divergences, parameters, tangents


class Regulariser:
    """Base of all regularisers: leaves and their axes.

    A subclass gives `_value`, `_maximiser`, `_worst_case` and `_worst_case_of_logs`, and the derivatives of the second:
    `_conjugate_tangent` and `_policy_tangent`. All are functions of arrays with actions leading (`[A, ...]`), in which
    the parameters of a bound regulariser broadcast.
    """

    beta: Array
    log_prior: Array | None
    state_scale: Array | None
    reduce = pytrees.LANES  # how a bound regulariser sums over actions, and which axis they are on
    has_reference = True  # the cost is that of leaving a distribution, and 0 there

    def _value(self, policy: Array) -> Array:
        raise TypeError(f"{type(self).__name__} does not define _value")

    def _maximiser(self, q: Array) -> tuple[Array, Array]:
        raise TypeError(f"{type(self).__name__} does not define _maximiser")

    def _conjugate(self, q: Array) -> Array:
        return maximise(self, q)[0]

    def _argmax(self, q: Array) -> Array:
        return maximise(self, q)[1]

    def _log_argmax(self, q: Array) -> Array:
        return self._log_policy(maximise(self, q)[1], q)

    def _log_policy(self, policy: Array, q: Array) -> Array:
        """`log p` of the maximiser `policy` for `q`, `[A, ...]`; here to what a probability can hold."""
        return jnp.where(policy == 0, -jnp.inf, jnp.log(jnp.where(policy == 0, 1, policy)))

    def _worst_case(self, policy: Array, action: Array | None = None) -> Array:
        raise TypeError(f"{type(self).__name__} does not define _worst_case")

    def _policy_change(self, dq: Array) -> Array:
        """Bound the change of the maximiser in the 1-norm where no action value changes by more than `dq`, `[*B]`."""
        return jnp.full_like(dq, 2)

    def _largest_weight(self, reward: Array, gap: Array) -> Array:
        """Bound the probability of an action worth less than that of the largest `reward` by `gap`, all `[A, ...]`."""
        return jnp.ones_like(gap)

    def _excess(self, q: Array, th: Array) -> Array:
        """`max_a q - th`, `[...]`: how far values that are averaged lie apart."""
        return pytrees.largest(jnp.where(jnp.isneginf(self._prior), -jnp.inf, q)) - th

    def _worst_case_of_logs(self, log_policy: Array, action: Array | None = None) -> Array:
        raise TypeError(f"{type(self).__name__} does not define _worst_case_of_logs")

    def _conjugate_tangent(self, policy: Array, q: Array, dq: Array | None, change: Any) -> Array:
        """Change of `Omega*(q)` at its maximiser, `[...]`; `change` is the regulariser's own, leaf by leaf."""
        raise TypeError(f"{type(self).__name__} does not define _conjugate_tangent")

    def _policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        """Change of the maximiser, `[A, ...]`."""
        raise TypeError(f"{type(self).__name__} does not define _policy_tangent")

    def _noise(self, scales: divergences.Scales) -> Array:
        """Bound on the rounding of a bound regulariser's conjugate, in units of u and of rewards, `[*b]`.

        Here that of a given policy's cost: near the prior `D ~ L^2/2` errs by some `u |L|`, `L = log(p/p0)`.
        """
        return 2 * scales.logs * jnp.minimum(scales.temperature, jnp.sqrt(2 * scales.cost * scales.temperature))

    def _value_error(self, policy: Array) -> Array:
        """Bound on the rounding of `_value` at any policy, in reward units, `[...]`."""
        return 4 * jnp.finfo(policy.dtype).eps * (2 + float(np.log(policy.shape[0]))) / self.beta

    @property
    def _prior(self) -> Array:
        """`log p0` of a bound regulariser, `[A, 1 or S, *b]`."""
        assert self.log_prior is not None
        return self.log_prior

    @staticmethod
    def _change(dq: Array | None, change: Any) -> tangents.Change:
        """A direction in q and in the regulariser's own leaves."""
        order = pytrees.given(change.alpha) if hasattr(change, "alpha") else None
        return tangents.Change(dq, pytrees.given(change.beta), pytrees.given(change.log_prior), order)

    def _rearrange(self, place: Any, dtype: Any, n_actions: int, last: bool = False) -> Any:
        """The same regulariser with every leaf put through `place(leaf, core_ndim)`; `state_scale` merged in beta."""
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
        return self._rebuild(beta, place(log_prior.astype(dtype), 2), place, dtype)

    def _rebuild(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> Any:
        raise TypeError(f"{type(self).__name__} does not define _rebuild")

    @property
    def _leaves(self) -> axes.Leaves:
        """Shapes of the leaves."""
        parts = (getattr(self, name, None) for name in ("alpha", "beta", "state_scale", "log_prior"))
        return axes.Leaves(*(x if x is None else x.shape for x in parts))  # type: ignore[arg-type]  # beta is there

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch axes of all leaves together."""
        return self._leaves.batch

    def bind(self, batch_ndim: int, dtype: Any, n_actions: int) -> Any:
        """Lay it out for the kernels: leaves `[*core reversed, *B]`, cast to `dtype`."""
        return self._rearrange(lambda x, core: pytrees.lanes_last(x, batch_ndim, core), dtype, n_actions)

    def _public(self, x: ArrayLike, refuse: bool = False, reduce: pytrees.Reducers = pytrees.ROWS) -> tuple[Any, Array]:
        """The regulariser and `x`, aligned, with actions where `reduce` has them.

        See `axes.align`, to which `refuse` goes.
        """
        forks.refuse()
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
        bound = dataclasses.replace(self._rearrange(place, x.dtype, x.shape[-1], last), reduce=reduce)
        given, x = x.shape, jnp.moveaxis(x.reshape(at.shape), -1, reduce.axis)
        parts = bound.beta.shape, getattr(bound, "alpha", bound.beta).shape, reduce.without_actions(bound.log_prior)
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
        return _act(self, policy, "_value")

    def conjugate(self, q: ArrayLike) -> Array:
        """Compute the regularised maximum of action values.

        Args:
            q: action values, `[*B, ..., A]`; entries of masked actions are ignored.

        Returns:
            `max_p <p, q> - Omega(p)`, `[*B, ...]`.
        """
        return _act(self, q, "_conjugate")

    def argmax(self, q: ArrayLike) -> Array:
        """Find the regularised greedy policy, the gradient of `conjugate`.

        Args:
            q: action values, `[*B, ..., A]`; entries of masked actions are ignored.

        Returns:
            the maximiser, `[*B, ..., A]`.
        """
        return _act(self, q, "_argmax")

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
            return _act(self, q, "_log_argmax")

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
            return _act(self, policy, "_worst_case", action)
        return _act(self, log_policy, "_worst_case_of_logs", action)


def by_rows(bound: Any) -> Any:
    """Make a bound regulariser see each row of actions as a problem of its own, whatever the lanes."""
    own = any(field.name == "reduce" for field in dataclasses.fields(bound))
    return dataclasses.replace(bound, reduce=pytrees.ROWS) if own else bound


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


_ARGUMENTS = {"_value": "policy", "_worst_case": "policy", "_worst_case_of_logs": "log_policy"}


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


@jax.custom_jvp
def maximise(reg: Regulariser, q: Array) -> tuple[Array, Array]:
    """Compute `Omega*(q)`, `[...]`, and its maximiser, `[A, ...]`, differentiable to any order.

    Nothing is differentiated through the search for the maximiser.
    """
    return reg._maximiser(q)


def _maximise_jvp(primals: tuple[Any, Array], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (reg, q), (change, dq) = primals, tangents
    value, policy = maximise(reg, q)
    dq = pytrees.given(dq)
    dvalue = jnp.broadcast_to(reg._conjugate_tangent(policy, q, dq, change), value.shape)
    return (value, policy), (dvalue, jnp.broadcast_to(reg._policy_tangent(policy, dq, change), policy.shape))


maximise.defjvp(_maximise_jvp, symbolic_zeros=True)
