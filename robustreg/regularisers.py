"""Policy regularisers: a convex cost of a policy, its conjugate, and the maximiser of the conjugate.

A regulariser is three functions of one state's action distribution, all else follows (see `bellman`, `adversary`):

    value(p)        Omega(p) = D[p0 : p]/beta
    conjugate(q)    Omega*(q) = max_p <p, q> - Omega(p)        over normalised p
    argmax(q)       the maximiser, which is the gradient of the conjugate

`beta` is the *inverse* strength in 1/reward units: a larger beta is a weaker regulariser. `state_scale` multiplies it
per state. The reference policy (prior) is kept as logarithms; a prior of 0 masks an action.

**Axes.** `beta` and `alpha` are `[*B]`, `state_scale` `[*B, S]`, the prior `[A]`, `[S, A]` or `[*B, S, A]`. The public
methods act on the last axis of `[*B, ..., A]`; the regulariser's own batch axes lead.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from robustreg import _host, _tree, conjugates, divergences


class Regulariser:
    """Base of all regularisers: leaves and their axes.

    A subclass gives `_value`, `_maximiser` and `_worst_case`, and the derivatives of the second: `_conjugate_tangent`
    and `_policy_tangent`. All are functions of arrays with actions leading (`[A, ...]`), in which the parameters of a
    bound regulariser broadcast.
    """

    beta: Array
    log_prior: Array | None
    state_scale: Array | None
    _roughness = 1.0  # rounding of the conjugate in units of u (2 + log A)/beta
    has_reference = True  # the cost is that of leaving a distribution, and 0 there

    def _value(self, policy: Array) -> Array:
        raise TypeError(f"{type(self).__name__} does not define _value")

    def _maximiser(self, q: Array) -> tuple[Array, Array]:
        raise TypeError(f"{type(self).__name__} does not define _maximiser")

    def _worst_case(self, policy: Array) -> Array:
        raise TypeError(f"{type(self).__name__} does not define _worst_case")

    def _conjugate_tangent(self, policy: Array, q: Array, dq: Array | None, change: Any) -> Array:
        """Change of `Omega*(q)` at its maximiser, `[...]`; `change` is the regulariser's own, leaf by leaf."""
        raise TypeError(f"{type(self).__name__} does not define _conjugate_tangent")

    def _policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        """Change of the maximiser, `[A, ...]`."""
        raise TypeError(f"{type(self).__name__} does not define _policy_tangent")

    @property
    def _prior(self) -> Array:
        """`log p0` of a bound regulariser, `[A, 1 or S, *b]`."""
        assert self.log_prior is not None
        return self.log_prior

    @staticmethod
    def _change(dq: Array | None, change: Any) -> conjugates.Change:
        """A direction in q and in the regulariser's own leaves."""
        order = _tree.given(change.alpha) if hasattr(change, "alpha") else None
        return conjugates.Change(dq, _tree.given(change.beta), _tree.given(change.log_prior), order)

    def _rearrange(self, place: Any, dtype: Any, n_actions: int) -> Any:
        """The same regulariser with every leaf put through `place(leaf, core_ndim)`; `state_scale` merged in beta."""
        log_prior = self.log_prior
        if log_prior is None:
            log_prior = jnp.full((n_actions,), -np.log(n_actions), dtype)
        if log_prior.shape[-1] != n_actions:
            raise ValueError(f"the prior is over {log_prior.shape[-1]} actions, the values over {n_actions}")
        log_prior = log_prior[None] if log_prior.ndim == 1 else log_prior
        beta = place(self.beta.astype(dtype)[..., None], 1)
        if self.state_scale is not None:
            beta = beta * place(self.state_scale.astype(dtype), 1)
        return self._rebuild(beta, place(log_prior.astype(dtype), 2), place, dtype)

    def _rebuild(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> Any:
        raise TypeError(f"{type(self).__name__} does not define _rebuild")

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch axes of all leaves together."""
        shapes = [self.beta.shape]
        if self.state_scale is not None:
            shapes.append(self.state_scale.shape[:-1])
        if self.log_prior is not None and self.log_prior.ndim > 2:
            shapes.append(self.log_prior.shape[:-2])
        return np.broadcast_shapes(*shapes)

    def bind(self, batch_ndim: int, dtype: Any, n_actions: int) -> Any:
        """The same regulariser in the kernels' layout: leaves `[*core reversed, *B]`, cast to `dtype`."""
        return self._rearrange(lambda x, core: _tree.lanes_last(x, batch_ndim, core), dtype, n_actions)

    def _public(self, x: ArrayLike) -> tuple[Any, Array]:
        """The regulariser and `x` with actions leading, aligned for an `x` of shape `[*B, ..., A]`."""
        x = jnp.asarray(x)
        x = _host.canonical(x) if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)
        if x.ndim == 0:
            raise ValueError("expected [..., A], got a scalar")
        batch_ndim = len(self.batch_shape)
        x = x.reshape((1,) * (batch_ndim + 1 - x.ndim) + x.shape)
        if x.ndim == batch_ndim + 1 and self._per_state:
            x = x[..., None, :]  # one distribution against per-state parameters: every state sees it
        middle = x.ndim - 1 - batch_ndim

        def place(leaf: Array, core: int) -> Array:
            """`[*b, S]` or `[*b, S, A]` to `[(A,) *b, ones, S]`, with an axis for each of `x` in `[A, *B, ...]`."""
            leaf = leaf if core == 1 else jnp.moveaxis(leaf, -1, 0)
            actions, batch, states = leaf.shape[: core - 1], leaf.shape[core - 1 : -1], leaf.shape[-1:]
            inner = (1,) * (middle - 1) + states if middle else ()
            return leaf.reshape(actions + (1,) * (batch_ndim - len(batch)) + batch + inner)

        bound = self._rearrange(place, x.dtype, x.shape[-1])
        x = jnp.moveaxis(x, -1, 0)
        try:
            order = getattr(bound, "alpha", bound.beta)
            shape = jnp.broadcast_shapes(x.shape[1:], bound.beta.shape, order.shape, bound.log_prior.shape[1:])
        except ValueError:
            own = f"beta (with state_scale) {bound.beta.shape}, prior {bound.log_prior.shape[1:]}"
            raise ValueError(
                f"values of axes {x.shape[1:]} (actions apart) do not broadcast with the regulariser's {own}; "
                "expected [*B, ..., A], the regulariser's batch axes leading and states next to last"
            ) from None
        return bound, jnp.broadcast_to(x, x.shape[:1] + shape)

    @property
    def _per_state(self) -> bool:
        return self.state_scale is not None or (self.log_prior is not None and self.log_prior.ndim > 1)

    def value(self, policy: ArrayLike) -> Array:
        """Cost of a policy.

        Args:
            policy: `[*B, ..., A]`, normalised over its last axis.

        Returns:
            `Omega(p) = D[p0 : p]/beta` in reward units, `[*B, ...]`; non-negative, 0 at the prior.
        """
        return _act(self, policy, "_value")

    def conjugate(self, q: ArrayLike) -> Array:
        """Regularised maximum.

        Args:
            q: action values, `[*B, ..., A]`; entries of masked actions are ignored.

        Returns:
            `max_p <p, q> - Omega(p)`, `[*B, ...]`.
        """
        return _act(self, q, "maximise")[0]

    def argmax(self, q: ArrayLike) -> Array:
        """Regularised greedy policy, the gradient of `conjugate`.

        Args:
            q: action values, `[*B, ..., A]`; entries of masked actions are ignored.

        Returns:
            the maximiser, `[*B, ..., A]`.
        """
        return jnp.moveaxis(_act(self, q, "maximise")[1], 0, -1)

    def worst_case(self, policy: ArrayLike) -> Array:
        """Perturbation that hurts a policy the most within the robust set; see `adversary.worst_case`."""
        return jnp.moveaxis(_act(self, policy, "_worst_case"), 0, -1)


@functools.partial(jax.jit, static_argnames="method")
def _act(reg: Regulariser, x: ArrayLike, method: str) -> Any:
    """A kernel on an array in the public layout, as one compiled program."""
    bound, x = reg._public(x)
    return maximise(bound, x) if method == "maximise" else getattr(bound, method)(x)


@jax.custom_jvp
def maximise(reg: Regulariser, q: Array) -> tuple[Array, Array]:
    """`Omega*(q)`, `[...]`, and its maximiser, `[A, ...]`, of a bound regulariser, both differentiable to any order.

    Nothing is differentiated through the search for the maximiser.
    """
    return reg._maximiser(q)


def _maximise_jvp(primals: tuple[Any, Array], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (reg, q), (change, dq) = primals, tangents
    value, policy = maximise(reg, q)
    dq = _tree.given(dq)
    dvalue = jnp.broadcast_to(reg._conjugate_tangent(policy, q, dq, change), value.shape)
    return (value, policy), (dvalue, jnp.broadcast_to(reg._policy_tangent(policy, dq, change), policy.shape))


maximise.defjvp(_maximise_jvp, symbolic_zeros=True)


@_tree.dataclass
class KL(Regulariser):
    """`Omega(p) = KL(p : p0)/beta`. Build it with `kl`, which validates; leaves as in the module docstring."""

    beta: Array
    log_prior: Array | None = None
    state_scale: Array | None = None

    def _rebuild(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> "KL":
        return KL(beta, log_prior)

    def _value(self, policy: Array) -> Array:
        return divergences.kl_divergence(policy, self._prior) / self.beta

    def _maximiser(self, q: Array) -> tuple[Array, Array]:
        return conjugates.kl_maximiser(q, self.beta, self._prior)

    def _conjugate_tangent(self, policy: Array, q: Array, dq: Array | None, change: Any) -> Array:
        return conjugates.conjugate_tangent(policy, *self._as_alpha(), self._change(dq, change))

    def _policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        return conjugates.policy_tangent(policy, *self._as_alpha(), self._change(dq, change))

    def _as_alpha(self) -> tuple[Array, Array, Array]:
        return self._prior, jnp.ones_like(self.beta), self.beta

    def _worst_case(self, policy: Array) -> Array:
        return divergences.log_ratio(policy, self._prior) / self.beta[None]


@_tree.dataclass
class Alpha(Regulariser):
    """`Omega(p) = D_alpha[p0 : p]/beta`. Build it with `alpha`, which validates; leaves as in the module docstring."""

    alpha: Array
    beta: Array
    log_prior: Array | None = None
    state_scale: Array | None = None
    # D sums log-ratios that err by about 2 u log A each, against p/alpha or p0/(1 - alpha), whichever is below 2.
    _roughness = 4.0

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch axes of all leaves together."""
        return np.broadcast_shapes(super().batch_shape, self.alpha.shape)

    def _rebuild(self, beta: Array, log_prior: Array, place: Any, dtype: Any) -> "Alpha":
        return Alpha(place(self.alpha.astype(dtype)[..., None], 1), beta, log_prior)

    def _value(self, policy: Array) -> Array:
        return divergences.alpha_divergence(policy, self._prior, self.alpha) / self.beta

    def _maximiser(self, q: Array) -> tuple[Array, Array]:
        return conjugates.alpha_maximiser(q, self.beta, self._prior, self.alpha)

    def _conjugate_tangent(self, policy: Array, q: Array, dq: Array | None, change: Any) -> Array:
        return conjugates.conjugate_tangent(policy, self._prior, self.alpha, self.beta, self._change(dq, change))

    def _policy_tangent(self, policy: Array, dq: Array | None, change: Any) -> Array:
        return conjugates.policy_tangent(policy, self._prior, self.alpha, self.beta, self._change(dq, change))

    def _worst_case(self, policy: Array) -> Array:
        return divergences.alpha_gradient(policy, self._prior, self.alpha) / self.beta[None]


def kl(
    beta: ArrayLike,
    prior: ArrayLike | None = None,
    log_prior: ArrayLike | None = None,
    *,
    state_scale: ArrayLike | None = None,
) -> KL:
    """KL regulariser `KL(p : p0)/beta` (entropy regularisation up to a constant for a uniform prior).

    Args:
        beta: inverse strength in 1/reward units, `[*B]`, positive and finite; larger is weaker.
        prior: reference policy p0, `[A]`, `[S, A]` or `[*B, S, A]`; None is uniform. 0 masks an action.
        log_prior: its logarithm instead of it; give at most one of the two.
        state_scale: `[*B, S]`, multiplies beta per state.

    Returns:
        A `KL`, whose arguments are pytree leaves.

    Raises:
        ValueError: a value out of range (concrete arguments only), naming the first offender.
    """
    return KL(_strength("beta", beta), _log_prior(prior, log_prior), _scale(state_scale))


def alpha(
    alpha: ArrayLike,
    beta: ArrayLike,
    prior: ArrayLike | None = None,
    log_prior: ArrayLike | None = None,
    *,
    state_scale: ArrayLike | None = None,
) -> Alpha:
    """Alpha-divergence regulariser `D_alpha[p0 : p]/beta` [Cichocki and Amari 2010].

    alpha = 1 is KL, 0 reverse KL, 1/2 four squared Hellinger distances, 2 half of Pearson's chi-squared (sparsemax).
    For alpha > 1 bad actions get probability exactly 0.

    Args:
        alpha: any real number, `[*B]`.
        beta: inverse strength in 1/reward units, `[*B]`, positive and finite; larger is weaker.
        prior: reference policy p0, `[A]`, `[S, A]` or `[*B, S, A]`; None is uniform. 0 masks an action.
        log_prior: its logarithm instead of it; give at most one of the two.
        state_scale: `[*B, S]`, multiplies beta per state.

    Returns:
        An `Alpha`, whose arguments are pytree leaves.

    Raises:
        ValueError: a value out of range (concrete arguments only), naming the first offender.
    """
    order = _array("alpha", alpha)
    _refuse("alpha", order, lambda x: ~np.isfinite(x), "must be finite")
    return Alpha(order, _strength("beta", beta), _log_prior(prior, log_prior), _scale(state_scale))


def _array(name: str, x: ArrayLike) -> Array:
    """An array of explicit floating dtype: a weakly typed leaf would compile anew."""
    try:
        kind = jnp.result_type(x) if isinstance(x, Tracer) else np.asarray(x).dtype
    except ValueError:
        kind = np.dtype(object)
    if not any(jnp.issubdtype(kind, real) for real in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"{name} must be a number or an array of real numbers, got {x!r}")
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return jnp.asarray(x, jnp.result_type(float))
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype if floating else np.float64))


def _refuse(name: str, x: Array, bad: Any, rule: str) -> None:
    """Raise for the first entry of a concrete array that is `bad`; tracers pass."""
    if isinstance(x, Tracer):
        return
    wrong = np.asarray(bad(np.asarray(x)))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        label = f"{name}[{', '.join(map(str, where))}]" if where else name
        raise ValueError(f"{label} is {np.asarray(x)[where]}: {name} {rule}")


def _strength(name: str, x: ArrayLike) -> Array:
    x = _array(name, x)
    remedy = "must be positive and finite"
    if name == "beta":
        remedy += "; `nominal_optimum` solves without a regulariser, `evaluate` values the prior as a policy"
    _refuse(name, x, lambda v: ~((v > 0) & np.isfinite(v)), remedy)
    return x


def _scale(x: ArrayLike | None) -> Array | None:
    if x is None:
        return None
    scale = _strength("state_scale", x)
    if scale.ndim == 0:
        raise ValueError("state_scale needs a state axis, [*B, S]; a scalar belongs into beta")
    return scale


def _log_prior(prior: ArrayLike | None, log_prior: ArrayLike | None) -> Array | None:
    if prior is not None and log_prior is not None:
        raise ValueError("give prior or log_prior, not both")
    if prior is not None:
        p = _array("prior", prior)
        _refuse("prior", p, lambda v: ~((v >= 0) & np.isfinite(v)), "must be non-negative and finite")
        logs = log_of(p)
    elif log_prior is None:
        return None
    else:
        logs = _array("log_prior", log_prior)
        _refuse("log_prior", logs, lambda v: np.isnan(v) | np.isposinf(v), "must be below infinity and not NaN")
    if logs.ndim == 0:
        raise ValueError("a prior needs an action axis: [A], [S, A] or [*B, S, A]")
    _check_sums(logs)
    return logs


def log_of(prior: Array) -> Array:
    """Logarithm of a prior, minus infinity where it is 0, with gradient 0 there."""
    return jnp.where(prior > 0, jnp.log(jnp.where(prior > 0, prior, 1)), -jnp.inf)


def _check_sums(logs: Array) -> None:
    if isinstance(logs, Tracer):
        return
    total = np.exp(np.asarray(logs, np.float64)).sum(-1)
    tolerance = 1e-6 if logs.dtype.itemsize <= 4 else 1e-10
    wrong = np.abs(total - 1) > tolerance
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        label = f"prior[{', '.join(map(str, where))}]" if where else "prior"
        raise ValueError(
            f"{label} sums to {total[where]:.6g} over actions, not 1 (tolerance {tolerance:g}); divide it by its sum"
        )
