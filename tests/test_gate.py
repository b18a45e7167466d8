"""A derivative that does not exist is NaN for who asks for it and nothing for who does not."""

import jax
import jax.numpy as jnp
import numpy as np

from robustreg._core import pytrees

X = jnp.array([1.0, 2.0, 3.0])
LOST = jnp.array([False, True, False])
KEPT = jnp.array([1.0, 0.0, 1.0])  # a cotangent that does not ask for the lost entry


@jax.custom_jvp
def square(x, lost):
    """`x^2` whose derivative is not known where `lost`."""
    return x**2


square.defjvp(lambda primals, tangents: (square(*primals), pytrees.gate(2 * primals[0] * tangents[0], primals[1])))


def weighted(x, weight, lost=LOST):
    return jnp.sum(weight * square(x, lost))


def test_forwards_what_is_lost_is_nan():
    value, tangent = jax.jvp(lambda x: square(x, LOST), (X,), (jnp.zeros(3),))
    np.testing.assert_array_equal(value, [1, 4, 9])
    np.testing.assert_array_equal(tangent, [0, np.nan, 0])
    np.testing.assert_array_equal(jax.jit(jax.linearize(lambda x: square(x, LOST), X)[1])(X), [2, np.nan, 18])


def test_backwards_only_who_asks_meets_nan():
    for transform in (lambda f: f, jax.jit, jax.checkpoint):
        gradient = transform(jax.grad(weighted))
        np.testing.assert_array_equal(gradient(X, KEPT), [2, 0, 6])
        np.testing.assert_array_equal(gradient(X, jnp.ones(3)), [2, np.nan, 6])
        np.testing.assert_array_equal(gradient(X, jnp.array([0, 1e-300, 0])), [0, np.nan, 0])


def test_under_vmap_lanes_do_not_disturb_each_other():
    lanes = jax.vmap(jax.grad(weighted), (None, 0, 0))
    found = jax.jit(lanes)(X, jnp.stack([KEPT, KEPT, jnp.ones(3)]), jnp.stack([LOST, ~LOST, LOST]))
    np.testing.assert_array_equal(found, [[2, 0, 6], [np.nan, 0, np.nan], [2, np.nan, 6]])


def test_is_differentiable_again_in_every_order_of_modes():
    f = lambda x: weighted(x, KEPT)  # noqa: E731
    for outer in (jax.jacfwd, jax.jacrev):
        np.testing.assert_array_equal(outer(jax.grad(f))(X), np.diag([2, 0, 2]))
    np.testing.assert_array_equal(jax.jvp(jax.grad(f), (X,), (jnp.ones(3),))[1], [2, 0, 2])
    # Reverse over forward: the direction is a constant there, and nothing is lost of the second derivative.
    along = lambda x: jax.jvp(lambda y: square(y, LOST), (x,), (jnp.ones(3),))[1] @ KEPT  # noqa: E731
    np.testing.assert_array_equal(jax.grad(along)(X), [2, 0, 2])
    found = jax.hessian(lambda x: weighted(x, jnp.ones(3)))(X)
    np.testing.assert_array_equal(found[jnp.array([0, 2])], np.eye(3)[[0, 2]] * 2)
    assert np.isnan(found[1, 1])
