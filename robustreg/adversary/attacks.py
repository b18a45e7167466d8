"""What the robust set of a regulariser is compared with: attacks that only take, noise, one decision.

* `norm_attack`: an adversary who only lowers rewards, within a norm ball per state. The worst one on a fixed policy
  follows from the dual norm, `max { <p, dr> : ||dr||_k <= radius } = radius ||p||_{k/(k-1)}`, and is never negative.
* `random_attack`: noise that costs its adversary what the worst case costs, or takes as much.
* `single_decision`: the game of Ortega and Lee for both signs of beta.
* `entropy` (in `entropies`): no reference policy.
* `nominal_optimum` (in `evaluation`): no regulariser at all.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import checks, pytrees
from robustreg.regularisers.bound import maximise
from robustreg.regularisers.divergences import deformed_exp, deformed_log, weighted
from robustreg.regularisers.families import kl
from robustreg.regularisers.regulariser import Regulariser


def _floating(name: str, x: ArrayLike) -> Array:
    """An array; integers become floating."""
    x = checks.canonical(checks.array(name, x))
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)


def norm_attack(policy: ArrayLike, radius: ArrayLike, order: ArrayLike = 2.0) -> Array:
    """Find the perturbation in a norm ball that lowers a fixed policy's return the most. It raises no reward.

    Args:
        policy: `[*B, ..., A]`, normalised over its last axis.
        radius: of the ball in every state, in reward units; broadcastable to `[*B, ...]`. The ball of the same price
            as a regulariser has `radius = reg.value(policy)/||policy||`, in the dual norm.
        order: `k >= 1` of the norm `||dr||_k`, infinity included; broadcastable to `[*B, ...]`.

    Returns:
        `dr = radius (p/||p||_d)^(d-1)`, `d = k/(k-1)`, `[*B, ..., A]`; not negative, 0 on actions never taken. At order
        1 it is the whole radius on the likeliest action, and on each of several that are equally likely a share of it.

    Raises:
        ValueError: a policy that is no distribution over actions, a negative radius, an order below 1.
    """
    policy = _floating("policy", policy)
    if policy.ndim == 0:
        raise ValueError("policy is a scalar; expected [*B, ..., A]")
    checks.check_policy(policy, policy.shape[-1:], "A")
    checks.require("radius", radius, lambda x: (x >= 0) & (x < np.inf), "a radius is finite and not negative")
    checks.require("order", order, lambda x: x >= 1, "the order of a norm is at least 1")
    order_, radius_ = (jnp.asarray(x, policy.dtype)[..., None] for x in (order, radius))
    checks.check_batches({"policy": policy.shape[:-1], "radius": radius_.shape[:-1], "order": order_.shape[:-1]})
    shape = jnp.broadcast_shapes(policy.shape[:-1] + (1,), order_.shape, radius_.shape)
    p = jnp.broadcast_to(policy, shape[:-1] + policy.shape[-1:])
    k, radius_ = (jnp.broadcast_to(x, shape) for x in (order_, radius_))
    taken = p > 0
    logs = jnp.where(taken, jnp.log(jnp.where(taken, p, 1)), -jnp.inf)
    below = jnp.where(taken, logs - jnp.max(logs, axis=-1, keepdims=True), 0)
    first = k == 1
    # p^(d-1) = p^{1/(k-1)} relative to its largest entry, and the k-th power of that.
    exponent = jnp.where(first, 0, 1 / jnp.where(first, 1, k - 1))
    power = jnp.where(first, 0, jnp.where(jnp.isinf(k), 1, k * exponent))
    shape_of = jnp.where(first, jnp.where(below == 0, 1, 0), jnp.exp(exponent * below))
    shape_of = jnp.where(taken, shape_of, 0)
    total = jnp.sum(jnp.where(first | ~taken, shape_of, jnp.exp(power * below)), axis=-1, keepdims=True)
    size = jnp.where(jnp.isinf(k), 1, jnp.exp(jnp.log(total) / jnp.where(jnp.isinf(k), 1, k)))
    return radius_ * shape_of / size


def random_attack(
    key: Array,
    reg: Regulariser,
    policy: ArrayLike,
    match: Literal["cost", "effect"] = "cost",
    spread: ArrayLike | None = None,
) -> Array:
    """Uniform noise with the budget of the worst case.

    Noise is uniform on [-1, 1] per action, scaled so that its standard deviation over the prior is that of the
    worst case, then shifted by the same amount in every action.

    Args:
        key: a random key.
        reg: the regulariser.
        policy: `[*B, ..., A]`, whose worst case is matched.
        match: "cost": the shift puts the noise on the boundary of the robust set, where the worst case is (the same
            `Omega*(dr) = 0`): it takes less from the policy. "effect": the shift makes it take as much as the worst
            case, `<p, dr> = Omega(p)`: it costs more, and is outside the set.
        spread: another standard deviation, `[*B, ...]` in reward units; needed where the worst case is infinite.

    Returns:
        `dr`, `[*B, ..., A]`, in reward units; 0 on masked actions. NaN where the worst case is infinite and no spread
        given.

    Raises:
        TypeError: what is no regulariser; ValueError: another `match`, a negative spread.
    """
    checks.expect_type(reg, Regulariser, "second argument", "kl")
    if match not in ("cost", "effect"):
        raise ValueError(f'match is {match!r}; expected "cost" or "effect"')
    if spread is not None:
        checks.require(
            "spread", spread, lambda x: (x >= 0) & (x < np.inf), "a standard deviation is finite and not negative"
        )
    return _random_attack(key, reg, policy, spread, match)


@functools.partial(jax.jit, static_argnames="match")
def _random_attack(key: Array, reg: Regulariser, policy: ArrayLike, spread: ArrayLike | None, match: str) -> Array:
    bound, p = reg._public(policy)
    masked = jnp.broadcast_to(jnp.isneginf(bound.log_prior), p.shape)
    prior = jax.nn.softmax(jnp.broadcast_to(bound.log_prior, p.shape), axis=0)
    noise = jax.random.uniform(key, p.shape, p.dtype, -1, 1)
    wanted = _deviation(prior, bound.worst_case(p)) if spread is None else jnp.asarray(spread, p.dtype)
    own = _deviation(prior, noise)
    noise = noise * (wanted / jnp.where(own > 0, own, 1))[None]
    if match == "cost":
        noise = noise - maximise(bound, noise)[0][None]
    else:
        noise = noise + (bound.value(p) - weighted(p, noise))[None]
    return jnp.moveaxis(jnp.where(masked, 0, noise), 0, -1)


def _deviation(prior: Array, x: Array) -> Array:
    """Standard deviation over the prior, `[...]`, of `x [A, ...]`."""
    x = jnp.where(prior == 0, 0, x)
    square = jnp.sum(prior * (x - jnp.sum(prior * x, axis=0, keepdims=True)) ** 2, axis=0)
    flat = square == 0
    return jnp.where(flat, 0, jnp.sqrt(jnp.where(flat, 1, square)))


@pytrees.dataclass
class Decision:
    """The game of one decision. With `value` the certainty equivalent, `utility - cost = value` for every action.

    Attributes:
        policy: `p0 exp(beta U)`, normalised, `[*B, A]`: the agent's for beta > 0, what a pessimist expects below 0.
        cost: the adversary's, `(1/beta) log(p/p0)`, `[*B, A]`, in units of utility.
        value: `(1/beta) log sum p0 exp(beta U)`, `[*B]`.
    """

    policy: Array
    cost: Array
    value: Array


def single_decision(utility: ArrayLike, beta: ArrayLike, prior: ArrayLike | None = None) -> Decision:
    """Solve a single decision against an imagined adversary [Ortega and Lee 2014, thm 1], for beta of both signs.

        F  =  ext_p min_C { <p, U - C> + (1/beta) (sum p0 exp(beta C) - 1) }

    in which ext is a maximum for beta > 0 (the free energy of a bounded agent, seeking: F from the mean of U at 0 to
    its maximum) and a minimum, with a maximum inside, for beta < 0 (averse: F down to the minimum of U).

    Args:
        utility: U, `[*B, A]`; ignored where the prior is 0.
        beta: any real number, `[*B]`, in 1/utility units; 0 is the prior and its mean.
        prior: p0, `[A]` or `[*B, A]`; None is uniform.

    Returns:
        A `Decision`; smooth in beta, at 0 too.

    Raises:
        ValueError: a prior that does not sum to 1, an infinite beta.
    """
    u = _floating("utility", utility)
    if u.ndim == 0:
        raise ValueError("expected utilities [*B, A], got a scalar")
    checks.require("beta", beta, np.isfinite, "beta is finite; utility.max() and .min() are the limits")
    n = u.shape[-1]
    logs = kl(1.0, prior).log_prior
    logs = jnp.full((n,), -np.log(n), u.dtype) if logs is None else logs.astype(u.dtype)
    b = jnp.asarray(beta, u.dtype)[..., None]
    shape = jnp.broadcast_shapes(u.shape, logs.shape, b.shape)
    return _single_decision(*(jnp.broadcast_to(x, shape) for x in (u, logs)), jnp.broadcast_to(b, shape[:-1] + (1,)))


@jax.jit
def _single_decision(u: Array, logs: Array, b: Array) -> Decision:
    masked = jnp.isneginf(logs)
    prior = jnp.exp(logs)
    u = jnp.where(masked, 0, u)
    mean = jnp.sum(prior * u, axis=-1, keepdims=True)
    d = jnp.where(masked, 0, u - mean)
    near = jnp.abs(b) * jnp.max(jnp.abs(d), axis=-1, keepdims=True) <= 1
    small, large = jnp.where(near, b, 0), jnp.where(near, 1, b)
    close = deformed_log(jnp.sum(prior * deformed_exp(d, small), axis=-1, keepdims=True), small)
    far = jax.scipy.special.logsumexp(logs + large * d, axis=-1, keepdims=True) / large
    value = mean + jnp.where(near, close, far)
    policy = jax.nn.softmax(logs + b * d, axis=-1)
    return Decision(policy, jnp.where(masked, 0, u - value), value[..., 0])
