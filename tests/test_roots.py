"""The bracketed root finders, on functions whose roots are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustreg._core import roots

# Increasing functions of x less a target, by name: the root at a target y, and a bracket.
FUNCTIONS = {
    "line": (lambda x: 3 * x, lambda y: y / 3, -50.0, 60.0),
    "cube": (lambda x: x**3, np.cbrt, -40.0, 30.0),
    "exponential": (jnp.exp, np.log, -300.0, 80.0),
    "root": (jnp.sqrt, np.square, 0.0, 1e4),
    "bend": (lambda x: jnp.where(x > 1, 100 * x - 99, x), lambda y: np.where(y > 1, (y + 99) / 100, y), -3.0, 90.0),
}
TARGETS = np.array([0.1, 0.9, 1.0, 1.7, 20.0])


def lanes(name, dtype):
    f, inverse, low, high = FUNCTIONS[name]
    y = jnp.asarray(TARGETS, dtype)
    return f, y, inverse(TARGETS), jnp.full_like(y, low), jnp.full_like(y, high)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_roots_are_found_to_rounding(name, dtype):
    f, y, root, low, high = lanes(name, dtype)
    unit = np.finfo(dtype).eps
    # What the function itself can be told to, in x.
    slack = unit * (np.abs(root) + TARGETS * np.abs(np.gradient(root, TARGETS)) + 1)
    ends = jax.jit(lambda: roots.bisect(lambda x: f(x) > y, low, high))()
    assert (np.asarray(ends[0]) <= root + 4 * slack).all() and (np.asarray(ends[1]) >= root - 4 * slack).all()
    assert (np.asarray(ends[1] - ends[0]) <= 4 * unit * np.abs(ends).max(0)).all()

    def measure(x, _):
        value, slope = jax.jvp(f, (x,), (jnp.ones_like(x),))
        return value - y, slope, None

    near = lambda x: unit * jnp.abs(x)  # noqa: E731
    found = jax.jit(lambda: roots.newton(measure, high, low, high, close=0.0, near=near, turns=200))()
    assert (np.abs(np.asarray(found.x) - root) <= 8 * slack).all()
    options = {"slope": 1.0, "close": float(unit), "turns": 300, "carried": 0 * y, "keep": jnp.where}
    found = jax.jit(lambda: roots.secant(lambda x, _: (f(x) - y, x), high, low, high, **options))()
    assert (np.abs(np.asarray(found.carried) - root) <= 8 * slack).all()


def test_a_lane_at_its_root_stays_there():
    """A step that rounding leaves no length of is the last one: no reason to halve a wide bracket anew."""
    targets, turned = jnp.asarray([1.0, 2.0, 300.0]), []

    def measure(x, _):
        jax.debug.callback(lambda: turned.append(1))
        return (x - targets) + 1e-17, jnp.ones_like(x), None

    low, high = jnp.full(3, -1e3), jnp.full(3, 1e6)
    near = lambda x: 2.0**-52 * jnp.abs(x)  # noqa: E731
    found = roots.newton(measure, targets + 1, low, high, close=0.0, near=near, turns=200)
    jax.effects_barrier()
    np.testing.assert_array_equal(found.x, targets)
    assert len(turned) == 2


def test_a_jump_is_bracketed_and_lanes_do_not_touch():
    """Where a function jumps over 0 the bracket closes around the jump; a NaN lane holds nobody up."""
    place = jnp.asarray([0.3, np.nan, -2.0])
    low, high = jnp.full(3, -10.0), jnp.full(3, 10.0)
    ends = roots.bisect(lambda x: x > place, low, high)
    np.testing.assert_allclose(np.asarray(ends)[:, [0, 2]], [[0.3, -2.0]] * 2, rtol=1e-15)

    def step(x, _):
        return jnp.where(x > place, 1.0, -1.0) + 0 * place, jnp.zeros_like(x), None

    near = lambda x: 1e-15 * jnp.abs(x)  # noqa: E731
    found = roots.newton(step, low, low, high, close=0.0, near=near, turns=80, hopeless=jnp.isnan(place))
    np.testing.assert_allclose(np.asarray(found.x)[[0, 2]], [0.3, -2.0], rtol=1e-14)
    alone = roots.bisect(lambda x: x > place[:1], low[:1], high[:1])
    assert np.array_equal(np.asarray(alone)[:, 0], np.asarray(ends)[:, 0])


def test_roots_at_zero_are_told_from_none():
    """A root at 0 ends at the size that was asked for, or at the smallest number there is."""
    one = jnp.ones(1)
    ends = roots.bisect(lambda x: x > 0, -one, 2 * one, size=1.0)
    assert ends[0] <= 0 <= ends[1] and float(ends[1][0] - ends[0][0]) <= 3e-16
    ends = roots.bisect(lambda x: x > 0, 0 * one, one)
    assert float(ends[0][0]) == 0 and float(ends[1][0]) < 1e-300


def test_a_root_on_an_end_is_stepped_to():
    """Newton's step ends there, instead of halving what is left of the bracket turn by turn."""
    turned = []

    def measure(x, _):
        jax.debug.callback(lambda: turned.append(1))
        return x - low + 1e-17, jnp.full_like(x, 0.999), None

    low, high = jnp.asarray([0.3, -7.0]), jnp.asarray([1e6, 1e6])
    found = roots.newton(measure, high, low, high, close=0.0, near=lambda x: 1e-15 * jnp.abs(x), turns=200)
    jax.effects_barrier()
    np.testing.assert_array_equal(found.x, low)
    assert len(turned) <= 3


def test_the_secant_method_keeps_what_belongs_to_its_roots():
    """A root beyond the bracket is its nearer end, after two looks; a lane that is done keeps what it carried."""
    place, turned = jnp.asarray([0.7, 9.0, -3.0, 1.0]), []

    def measure(x, seen):
        jax.debug.callback(lambda: turned.append(1))
        return jnp.expm1(x - place), (x, seen[1] + 1)

    def keep(done, old, new):
        return tuple(jnp.where(done, a, b) for a, b in zip(old, new))

    low, high, none = jnp.full(4, -2.0), jnp.full(4, 2.0), jnp.zeros(4)
    options = {"slope": 1.0, "close": 1e-15, "turns": 100, "carried": (none, none), "keep": keep}
    at, looks = roots.secant(measure, jnp.asarray([0.0, 0.0, 0.0, 1.0]), low, high, **options).carried
    jax.effects_barrier()
    np.testing.assert_allclose(at, [0.7, 2.0, -2.0, 1.0], rtol=2e-15)
    assert looks[1] <= 3 and looks[2] <= 3 and looks[3] == 1 and len(turned) == looks[0] <= 9
