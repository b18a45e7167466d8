"""Three kinds of transitions, one operator: expect and push are transposes, padding is inert, kinds agree."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ACTIONS, KINDS, STATES, all_cases, dense, expect, stack, successors

import robustreg as rr

CASES = all_cases()


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    return rng.normal(size=STATES), rng.normal(size=(STATES, ACTIONS))


@pytest.mark.parametrize("kind", KINDS)
def test_expect_and_push_against_numpy(kind, vectors):
    v, mu = vectors
    for case in CASES:
        transitions = case.transitions(kind)
        assert (transitions.n_states, transitions.n_actions) == (STATES, ACTIONS)
        np.testing.assert_allclose(np.asarray(transitions.expect(v)), np.einsum("sat,t->sa", case.P, v), atol=1e-14)
        np.testing.assert_allclose(np.asarray(transitions.push(mu)), np.einsum("sat,sa->t", case.P, mu), atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_over_batches(kind):
    """<mu, expect v> = <push mu, v> for every lane, with the kernel shared."""
    rng = np.random.default_rng(1)
    v, mu = rng.normal(size=(2, 3, STATES)), rng.normal(size=(2, 3, STATES, ACTIONS))
    transitions = CASES[0].transitions(kind)
    forward, backward = np.asarray(transitions.expect(v)), np.asarray(transitions.push(mu))
    assert forward.shape == (2, 3, STATES, ACTIONS) and backward.shape == (2, 3, STATES)
    np.testing.assert_allclose((mu * forward).sum((-1, -2)), (backward * v).sum(-1), rtol=1e-13)
    np.testing.assert_allclose(forward, np.einsum("sat,...t->...sa", CASES[0].P, v), atol=1e-14)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_batched_kernels(kind):
    """A kernel with batch axes of its own, [M,1,S,A,S], against values [M,L,S] and [L,S]."""
    rng = np.random.default_rng(2)
    cases = stack(CASES)
    P = cases.P[:, None]
    transitions = dense(P) if kind == "dense" else successors(P)
    assert transitions.batch_shape == P.shape[:2]
    for shape in ((len(CASES), 4), (4,), (len(CASES), 40)):
        v, mu = rng.normal(size=(*shape, STATES)), rng.normal(size=(*shape, STATES, ACTIONS))
        np.testing.assert_allclose(np.asarray(transitions.expect(v)), np.einsum("...sat,...t->...sa", P, v), atol=1e-14)
        np.testing.assert_allclose(np.asarray(transitions.push(mu)), np.einsum("...sat,...sa->...t", P, mu), atol=1e-14)


def test_push_is_the_transpose_of_a_matrix_free_expect(vectors):
    """push may be left out, and expect may close over its parameters."""
    P = CASES[0].P
    for transitions in (
        rr.MatrixFree(expect, n_states=STATES, n_actions=ACTIONS, parameters=P),
        rr.MatrixFree(lambda v: P @ v, n_states=STATES, n_actions=ACTIONS),
    ):
        np.testing.assert_allclose(np.asarray(transitions.expect(vectors[0])), P @ vectors[0], atol=1e-14)
        np.testing.assert_allclose(
            np.asarray(transitions.push(vectors[1])), np.einsum("sat,sa->t", P, vectors[1]), atol=1e-14
        )


def lists(indices, probabilities):
    return rr.Successors(jnp.asarray(indices), jnp.asarray(probabilities))


def test_padding_is_inert(vectors):
    """Padding with probability 0 changes no bit, wherever its index points; repeated successors add up."""
    tight = successors(CASES[0].P)
    indices, probabilities = np.asarray(tight.indices), np.asarray(tight.probabilities)
    pad = np.random.default_rng(3).integers(0, STATES, (STATES, ACTIONS, 5)).astype(np.int32)
    padded = lists(np.concatenate([indices, pad], -1), np.concatenate([probabilities, 0.0 * pad], -1))
    split = lists(np.concatenate([indices, indices], -1), np.concatenate([probabilities, probabilities], -1) / 2)
    for x, name in zip(vectors, ("expect", "push"), strict=True):
        expected = np.asarray(getattr(tight, name)(x))
        np.testing.assert_array_equal(np.asarray(getattr(padded, name)(x)), expected)
        np.testing.assert_allclose(np.asarray(getattr(split, name)(x)), expected, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_follows_the_kernel(kind):
    transitions = CASES[0].transitions(kind, np.float32)
    assert transitions.dtype == np.float32
    assert transitions.expect(np.ones(STATES, np.float32)).dtype == np.float32
    assert transitions.push(np.ones((STATES, ACTIONS), np.float32)).dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_pytrees(kind, vectors):
    """They pass through jit as arguments and differentiate with respect to the values."""
    transitions = CASES[0].transitions(kind)
    v, mu = vectors
    gradient = jax.jit(jax.grad(lambda v, t: (t.expect(v) * mu).sum()))(v, transitions)
    np.testing.assert_allclose(np.asarray(gradient), np.einsum("sat,sa->t", CASES[0].P, mu), atol=1e-14)


def test_wrong_shapes_are_refused(vectors):
    for kind in KINDS:
        with pytest.raises((ValueError, TypeError)):
            CASES[0].transitions(kind).expect(np.ones(STATES + 1))
        with pytest.raises((ValueError, TypeError)):
            CASES[0].transitions(kind).push(np.ones((ACTIONS, STATES)))


def _copies(compiled: Any, size: int) -> list[str]:
    """Arrays of so many numbers that a compiled program makes: no arguments, and no other views of them."""
    text = compiled.as_text()
    entry = text[text.index("ENTRY") :].splitlines()[1:]
    made = [re.match(r"\s+(?:ROOT )?%\S+ = f\d+\[([\d,]+)\]\S* ([a-z-]+)\(", line) for line in entry]
    lines = [(line, *m.groups()) for line, m in zip(entry, made) if m]
    views = ("parameter", "bitcast", "reshape", "get-tuple-element")
    return [line for line, dims, what in lines if math.prod(map(int, dims.split(","))) == size and what not in views]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="which products copy a factor is a matter of the compiler")
@pytest.mark.parametrize("own", [1, 6])
def test_products_do_not_copy_the_kernel(own):
    """In another order of factors each of them did, which took ten to twenty times as long as the product."""
    s, a, lanes = 40, 3, 6
    kernel = rr.Dense(jnp.ones((own, s, a, s)) / s)
    v, mu = jnp.ones((s, lanes)), jnp.ones((a, s, lanes))
    for product, x in ((rr.Dense._expect, v), (rr.Dense._push, mu), (rr.Dense._mixed, mu[..., :own])):
        assert not _copies(jax.jit(product).lower(kernel, x).compile(), kernel.probabilities.size)
    if own == 1:
        return
    # (Such a copy is found.)
    other = jax.jit(lambda k, x: jnp.einsum("bsat,tb->asb", k.probabilities, jnp.broadcast_to(x[:, :1], (s, own))))
    assert _copies(other.lower(kernel, v).compile(), kernel.probabilities.size)
