"""Every accepted form of an MDP gives the same MDP, with explicit dtypes, inside jit as outside."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import robustreg

# For the type checker: tests hand NumPy arrays to classes that declare JAX arrays, and read any transitions.
rr: Any = robustreg

S, A = 5, 3
RNG = np.random.default_rng(0)
P = np.where(RNG.random((S, A, S)) < 0.5, RNG.random((S, A, S)), 0.0) + np.eye(S)[:, None] * 0.1
P /= P.sum(-1, keepdims=True)
REWARD = RNG.normal(size=(S, A))
VALUE = RNG.normal(size=S)
ENDS = np.where(RNG.random((S, A)) < 0.5, 0.25, 0.0)


def successors(p=P):
    """All successors of every row, as lists."""
    return rr.Successors(np.broadcast_to(np.arange(S, dtype=np.int32), p.shape[-3:]), p)


def matrix_free(p: Any = P):
    """The same as a function of its parameters."""
    return rr.MatrixFree(lambda v, q: q @ v, n_states=S, n_actions=A, parameters=jnp.asarray(p))


FORMS = {
    "array": (P, None),
    "list": (P.tolist(), None),
    "jax": (jnp.asarray(P), None),
    "sas": (P, "sas"),
    "ass": (P.swapaxes(0, 1), "ass"),
    "list of arrays": ([P[:, a] for a in range(A)], "ass"),
    "csr_matrix": ([sparse.csr_matrix(P[:, a]) for a in range(A)], None),
    "csr_array": ([sparse.csr_array(P[:, a]) for a in range(A)], None),
    "coo_array": (tuple(sparse.coo_array(P[:, a]) for a in range(A)), None),
    "Dense": (rr.Dense(jnp.asarray(P)), None),
    "Successors": (successors(), None),
    "MatrixFree": (matrix_free(), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_transitions(form):
    transitions, layout = FORMS[form]
    m = rr.mdp(transitions, REWARD, 0.9, layout=layout)
    np.testing.assert_allclose(m.transitions.expect(jnp.asarray(VALUE)), P @ VALUE, rtol=1e-14)
    mass = np.einsum("sa,sat->t", REWARD, P)
    np.testing.assert_allclose(m.transitions.push(jnp.asarray(REWARD)), mass, rtol=1e-13)
    assert (m.n_states, m.n_actions, m.dtype, m.batch_shape) == (S, A, np.float64, ())
    assert m.termination is None and m.grid is None
    np.testing.assert_array_equal(m.initial, np.full(S, 1 / S))


def test_sparse_entries_accumulate_and_rows_are_short():
    rows, columns, data = [0, 0, 1, 2, 2], [1, 1, 2, 0, 1], [0.25, 0.5, 1.0, 0.5, 0.5]
    matrix = sparse.coo_matrix(([*data, 0.25], ([*rows, 0], [*columns, 0])), (3, 3))
    m = rr.mdp([matrix, sparse.eye_array(3)], np.ones((3, 2)), 0.9)
    assert m.transitions.probabilities.shape == (3, 2, 2)
    np.testing.assert_array_equal(m.transitions.probabilities[0], [[0.25, 0.75], [1.0, 0.0]])
    np.testing.assert_array_equal(m.transitions.indices[0], [[0, 1], [0, 0]])


@pytest.mark.parametrize("transitions", [P, successors(), [sparse.csr_array(P[:, a]) for a in range(A)]])
def test_forms_of_reward(transitions):
    per_successor = RNG.normal(size=(S, A, S))
    expected = (P * per_successor).sum(-1)
    np.testing.assert_allclose(rr.mdp(transitions, per_successor, 0.9).reward, expected, rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(rr.mdp(transitions, REWARD[:, 0], 0.9).reward, np.tile(REWARD[:, :1], A))
    np.testing.assert_array_equal(rr.mdp(transitions, REWARD.tolist(), 0.9).reward, REWARD)
    batch = np.stack([REWARD, -REWARD])
    m = rr.mdp(transitions, batch, 0.9)
    assert m.batch_shape == (2,)
    np.testing.assert_array_equal(m.reward, batch)


def test_reward_per_successor_in_a_batch_of_transitions():
    lanes = np.stack([P, P[::-1, :, ::-1]])
    per_successor = RNG.normal(size=(S, A, S))
    m = rr.mdp(rr.Dense(lanes), per_successor, 0.9)
    np.testing.assert_allclose(m.reward, (lanes * per_successor).sum(-1), rtol=1e-13, atol=1e-15)
    traced = jax.jit(lambda p: rr.mdp(rr.Dense(p), per_successor, 0.9).reward)(lanes)
    np.testing.assert_allclose(traced, m.reward, rtol=1e-13, atol=1e-15)


def test_plain_array_with_batch_axes():
    lanes = np.stack([P, P[::-1, :, ::-1]])
    m = rr.mdp(lanes.swapaxes(-3, -2), REWARD, 0.9, layout="ass")
    assert m.batch_shape == (2,)
    np.testing.assert_allclose(m.transitions.probabilities, lanes, rtol=1e-15)


def test_batch_axes_broadcast_and_what_is_shared_stays_shared():
    m = rr.mdp(P, np.stack([REWARD] * 2)[:, None], np.array([0.5, 0.9, 0.99]), termination=None)
    assert m.batch_shape == (2, 3)
    assert m.transitions.batch_shape == () and m.reward.shape == (2, 1, S, A) and m.discount.shape == (3,)
    ends = np.stack([ENDS, ENDS])
    shared = rr.mdp(P * (1 - ENDS)[..., None], REWARD, 0.9, termination=ends)
    assert shared.transitions.batch_shape == () and shared.batch_shape == (2,)


def test_termination():
    m = rr.mdp(P * (1 - ENDS)[..., None], REWARD, 0.9, termination=ENDS)
    np.testing.assert_array_equal(m.termination, ENDS)
    np.testing.assert_allclose(m.transitions.probabilities.sum(-1) + m.termination, 1.0, rtol=3e-16)
    assert rr.mdp(P, REWARD, 0.9, termination=np.zeros((S, A))).termination is None
    assert rr.mdp(P, REWARD, 0.9, termination=np.zeros((S, A), int)).termination is None
    assert rr.mdp(P * 0, REWARD, 0.9, termination=np.full((S, A), 1 + 1e-12)).termination.max() == 1.0


def test_rows_within_tolerance_are_rescaled_in_double_precision():
    rough = P * (1 + 9e-11)
    m = rr.mdp(rough, REWARD, 0.9)
    assert np.abs(np.asarray(m.transitions.probabilities, np.longdouble).sum(-1) - 1).max() < 4e-16
    coarse = (P * (1 - 6e-7)).astype(np.float32)
    m = rr.mdp(coarse, REWARD.astype(np.float32), 0.9)
    assert m.dtype == m.transitions.dtype == np.float32
    assert np.abs(np.asarray(m.transitions.probabilities, np.float64).sum(-1) - 1).max() < 1.2e-7
    free = P * (1 - ENDS)[..., None] * (1 + 5e-11)
    m = rr.mdp(free, REWARD, 0.9, termination=ENDS)
    np.testing.assert_allclose(m.transitions.probabilities.sum(-1), 1 - ENDS, rtol=4e-16)


def test_initial():
    start = np.array([0.5, 0.5, 0, 0, 0]) * (1 + 5e-11)
    np.testing.assert_allclose(rr.mdp(P, REWARD, 0.9, start).initial, [0.5, 0.5, 0, 0, 0], rtol=3e-16)
    assert rr.mdp(P, REWARD, 0.9, initial=np.eye(S)).batch_shape == (S,)


@pytest.mark.parametrize("jit", [False, True])
def test_normalise(jit):
    def make(p, ends, start):
        return rr.mdp(p, REWARD, 0.9, start, ends, normalise=True)

    make = jax.jit(make) if jit else make
    counts, start = P * np.arange(1, A + 1)[:, None], np.arange(S) + 1.0
    m = make(counts, None, start)
    np.testing.assert_allclose(m.transitions.probabilities, P, rtol=1e-14)
    np.testing.assert_allclose(m.initial, start / start.sum(), rtol=1e-14)
    m = make(counts, ENDS, start)
    np.testing.assert_allclose(m.transitions.probabilities, P * (1 - ENDS)[..., None], rtol=1e-14)
    lanes = np.stack([ENDS, 0.5 * ENDS])
    m = make(counts, lanes, start)
    np.testing.assert_allclose(m.transitions.probabilities, P * (1 - lanes)[..., None], rtol=1e-14)


# ---- precision


def test_dtype_follows_the_arrays_and_scalars_and_discounts_follow_them():
    p32, r32 = P.astype(np.float32), REWARD.astype(np.float32)
    assert rr.mdp(p32, r32, 0.9).dtype == np.float32
    assert rr.mdp(p32, r32, np.float64(0.9)).dtype == np.float32
    assert rr.mdp(p32, REWARD.tolist(), 0.9).dtype == np.float32
    assert rr.mdp(p32, REWARD, 0.9).dtype == np.float64
    assert rr.mdp(p32, r32, np.array([0.5, 0.9])).dtype == np.float32
    assert rr.mdp(np.tile(np.eye(S)[:, None], (1, A, 1)).astype(int), np.ones((S, A), int), 0).dtype == np.float64
    half = np.tile(np.eye(S)[:, None], (1, A, 1)).astype(jnp.bfloat16)
    assert rr.mdp(half, r32.astype(jnp.bfloat16), 0.5).dtype == np.float32
    sparse32 = [sparse.csr_array(p32[:, a]) for a in range(A)]
    assert rr.mdp(sparse32, r32, 0.9).dtype == np.float32
    assert rr.mdp(matrix_free(p32), r32, 0.9).dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", ["array", "Successors", "csr_array"])
def test_every_leaf_has_the_dtype_and_is_not_weak(form, dtype):
    m = rr.mdp(_cast(FORMS[form][0], dtype), REWARD.astype(dtype), 0.9)
    for leaf in jax.tree.leaves(m):
        assert isinstance(leaf, jax.Array) and not leaf.weak_type
        assert leaf.dtype == (np.int32 if jnp.issubdtype(leaf.dtype, jnp.integer) else dtype)


def test_complement_comes_from_double_precision():
    p32, r32 = P.astype(np.float32), REWARD.astype(np.float32)
    for g in (0.0, 0.3, 0.99, 0.999, 0.9999, 1 - 1e-6):
        m = rr.mdp(p32, r32, g)
        assert m.complement == np.float32(1 - np.longdouble(g))
        assert m.discount == np.float32(g)
    grid = np.array([0.9, 0.9999])
    np.testing.assert_array_equal(rr.mdp(P, REWARD, grid).complement, 1 - grid)
    rounded = jnp.float32(0.9999)
    assert rr.mdp(p32, r32, rounded).complement == 1 - rounded


@pytest.fixture
def without_x64():
    """JAX's default configuration, for one test."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.mark.usefixtures("without_x64")
def test_precision_without_x64():
    m = rr.mdp(P, REWARD, 0.9999)
    assert {leaf.dtype for leaf in jax.tree.leaves(m)} == {np.dtype(np.float32)}
    assert m.complement == np.float32(1e-4)


# ---- transformations


@pytest.mark.parametrize("form", ["array", "Dense", "Successors"])
def test_under_jit_vmap_and_grad(form):
    def build(transitions, reward, discount, initial, ends):
        return rr.mdp(transitions, reward, discount, initial, ends)

    transitions = jax.tree.map(lambda p: p if p.dtype == np.int32 else p * (1 - ENDS)[..., None], FORMS[form][0])
    plain = build(transitions, REWARD, 0.9, np.eye(S)[0], ENDS)
    traced = jax.jit(build)(transitions, REWARD, 0.9, np.eye(S)[0], ENDS)
    chex.assert_trees_all_close(plain, traced, rtol=1e-14)
    for leaf in jax.tree.leaves(traced):
        assert not leaf.weak_type
    mapped = jax.vmap(build, in_axes=(None, 0, 0, None, None))(
        transitions, np.stack([REWARD] * 2), np.array([0.5, 0.9]), np.eye(S)[0], ENDS
    )
    assert mapped.reward.shape == (2, S, A) and mapped.discount.shape == (2,)
    slope = jax.grad(lambda g: build(transitions, REWARD, g, None, ENDS).complement)(0.9)
    assert slope == -1.0


def test_traced_rewards_of_every_form():
    per_successor = RNG.normal(size=(S, A, S))
    for reward in (REWARD, REWARD[:, 0], per_successor):
        for transitions in (P, successors()):
            plain = rr.mdp(transitions, reward, 0.9)
            traced = jax.jit(lambda r, t=transitions: rr.mdp(t, r, 0.9))(reward)
            chex.assert_trees_all_close(plain, traced, rtol=1e-13, atol=1e-15)
    listed = jax.jit(lambda x: rr.mdp(P, [[x] * A] * S, 0.9).reward)(2.0)
    np.testing.assert_array_equal(listed, np.full((S, A), 2.0))


def test_float32_inside_jit():
    p32, r32 = P.astype(np.float32), REWARD.astype(np.float32)
    start = np.full(S, 0.2, np.float32)
    m = jax.jit(rr.mdp)(p32, r32, 0.9, start)
    assert {leaf.dtype for leaf in jax.tree.leaves(m)} == {np.dtype(np.float32)}


def test_values_of_tracers_are_not_checked():
    m = jax.jit(lambda p, r, g: rr.mdp(p, r, g))(P * 3, REWARD * np.nan, 1.5)
    assert np.isnan(m.reward).all() and m.discount == 1.5
    concrete = jax.jit(lambda g: rr.mdp(matrix_free(), REWARD, g).complement)(0.75)
    assert concrete == 0.25


def test_one_trace_for_all_values():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def total(m):
        return m.reward.sum() * m.discount

    for g in (0.0, 0.5, np.float64(0.9), jnp.asarray(0.99)):
        total(rr.mdp(P, REWARD, g))
        total(rr.mdp(P, (10 * REWARD).round().astype(int), g, np.eye(S, dtype=int)[0]))


def test_replacing_is_building_anew():
    """Checked as the factory checks, concrete or traced; the rest stays."""
    new = dict(reward=2 * REWARD[:, 0], discount=0.5, initial=np.eye(S)[1])
    m, built = rr.mdp(P, REWARD, 0.9).replace(**new), rr.mdp(P, new["reward"], 0.5, new["initial"])
    chex.assert_trees_all_equal(m, built)
    traced = jax.jit(lambda r, g: rr.mdp(P, REWARD, 0.9).replace(reward=r, discount=g))(2 * REWARD, 0.5)
    np.testing.assert_array_equal(traced.reward, 2 * REWARD)
    assert traced.discount == traced.complement == 0.5
    ended = rr.mdp(P * (1 - ENDS)[..., None], REWARD, 0.9, termination=ENDS)
    chex.assert_trees_all_equal(ended.replace(termination=ENDS), ended)
    table = {"cold": {"heat": [(1.0, "warm", 1.0)]}, "warm": {"heat": [(1.0, "cold", 0.0)]}}
    named = rr.from_table(table, 0.9).replace(initial="warm")
    assert named.names is not None and named.initial.tolist() == [float(s == "warm") for s in named.names.states]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(transitions=P), "replace takes reward, discount, initial, termination, not transitions"),
        (dict(discount=1.0), "must lie in"),
        (dict(reward=np.full((S, A), np.nan)), r"reward\[s=0, a=0\] is nan"),
        (dict(reward=np.zeros((A, S))), "transposed"),
        (dict(initial=np.ones(S)), "initial sums to 5"),
        (dict(termination=ENDS), "sum"),
        (dict(discount=np.full(3, 0.9), initial=np.full((2, S), 1 / S)), "broadcast|batch"),
    ],
)
def test_replacing_refuses_what_the_factory_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        rr.mdp(P, REWARD, 0.9).replace(**changes)


def test_the_class_never_validates():
    broken = jax.tree.map(lambda leaf: leaf * np.nan, rr.mdp(P, REWARD, 0.9))
    assert np.isnan(broken.reward).all()
    placeholder = jax.tree.unflatten(jax.tree.structure(broken), [None] * len(jax.tree.leaves(broken)))
    assert placeholder.reward is None
    assert "reward=float64[5, 3]" in repr(broken)


def _cast(transitions, dtype):
    if isinstance(transitions, rr.Successors):
        return rr.Successors(transitions.indices, transitions.probabilities.astype(dtype))
    if isinstance(transitions, list):
        return [matrix.astype(dtype) for matrix in transitions]
    return transitions.astype(dtype)
