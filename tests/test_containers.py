"""Containers at the door of `rr.mdp`: every one gives the problem of the plain arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import xarray as xr
from jax.experimental import sparse as jax_sparse

import robustreg

rr: Any = robustreg
sparse: Any = jax_sparse  # for the type checker: BCOO takes NumPy arrays too

S, A = 4, 2
RNG = np.random.default_rng(5)
P = np.where(RNG.random((A, S, S)) < 0.6, RNG.random((A, S, S)), 0) + 0.1 * np.eye(S)
P = P / P.sum(-1, keepdims=True)  # [A, S, S]
R = RNG.normal(size=(A, S, S))
EXPECTED = (P * R).sum(-1).T  # [S, A]
STATES, ACTIONS = ["n", "e", "s", "w"], ["go", "stay"]


class Tensor:
    """What torch's tensors do, of all that is asked here."""

    dtype, layout = "torch.float64", "torch.strided"

    def __init__(self, x, on_tape=True):
        self.x, self.on_tape, self.ndim = np.asarray(x), on_tape, np.ndim(x)

    def detach(self):
        return Tensor(self.x, False)

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        if self.on_tape:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.x


def frame(x, rows=STATES, columns=STATES):
    return pd.DataFrame(x, list(rows), list(columns))


def padded(x):
    """A sparse matrix with room for entries that it has not got, which are places outside of it."""
    return sparse.BCOO.fromdense(x, nse=x.size + 3)


def shuffled(x):
    return frame(x).loc[STATES[::-1], [STATES[1], STATES[0], *STATES[2:]]]


def same(m):
    v = np.arange(S) ** 2.0
    np.testing.assert_allclose(m.reward, EXPECTED, atol=1e-14)
    np.testing.assert_allclose(m.transitions.expect(v), (P @ v).T, atol=1e-13)
    return m


TRANSITIONS = {
    "csr_matrix": lambda: ([sp.csr_matrix(p) for p in P], {}),
    "csc_array": lambda: ([sp.csc_array(p) for p in P], {}),
    "BCOO": lambda: ([padded(p) for p in P], {}),
    "BCSR": lambda: ([sparse.BCSR.fromdense(p) for p in P], {}),
    "one BCOO": lambda: (sparse.BCOO.fromdense(P), {}),
    "one BCOO, states first": lambda: (sparse.BCOO.fromdense(P.swapaxes(0, 1), n_batch=1), {}),
    "frames": lambda: ([frame(p) for p in P], {"layout": "ass"}),
    "frames in other orders": lambda: ([frame(P[0]), shuffled(P[1])], {"layout": "ass"}),
    "dict": lambda: (dict(zip(ACTIONS, P)), {}),
    "dict of frames": lambda: ({"go": frame(P[0]), "stay": shuffled(P[1])}, {}),
    "dict of sparse": lambda: (dict(zip(ACTIONS, map(sp.csr_array, P))), {}),
    "xarray": lambda: (xr.DataArray(P, dims=["action", "state", "successor"]), {"layout": "ass"}),
    "torch": lambda: (Tensor(P), {"layout": "ass"}),
    "list of torch": lambda: ([Tensor(p) for p in P], {"layout": "ass"}),
    "Dense of torch": lambda: (rr.Dense(Tensor(P.swapaxes(0, 1))), {}),
    "array": lambda: (P, {"layout": "ass"}),
    "array, states first": lambda: (P.swapaxes(0, 1), {}),
}
REWARDS = {
    "[S, A]": lambda: EXPECTED,
    "frame": lambda: frame(EXPECTED, columns=ACTIONS),
    "frame in another order": lambda: frame(EXPECTED, columns=ACTIONS).loc[STATES[::-1]],
    "xarray": lambda: xr.DataArray(EXPECTED),
    "torch": lambda: Tensor(EXPECTED),
    "sparse [S, A]": lambda: sp.coo_matrix(EXPECTED),
    "csr per action": lambda: [sp.csr_array(r) for r in R],
    "BCOO per action": lambda: [padded(r) for r in R],
    "one dense": lambda: [sp.csr_array(R[0]), R[1]],
}
PER_ACTION = ("csr_matrix", "csc_array", "BCOO", "BCSR", "one BCOO", "dict", "dict of sparse", "array", "torch")


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_transitions(kind):
    transitions, how = TRANSITIONS[kind]()
    m = same(rr.mdp(transitions, EXPECTED, 0.9, **how))
    assert m.dtype == np.float64
    assert isinstance(m.transitions, rr.Successors) == any(x in kind for x in ("cs", "BC", "sparse"))


@pytest.mark.parametrize("kind", REWARDS)
def test_rewards(kind):
    # What names no state cannot be told to be in another order.
    named = "frame" in kind
    same(rr.mdp([frame(p) for p in P] if named else P, REWARDS[kind](), 0.9, layout="ass"))
    if not named:
        same(rr.mdp([sp.csr_array(p) for p in P], REWARDS[kind](), 0.9))
        same(rr.mdp(P.swapaxes(0, 1), REWARDS[kind](), 0.9))


@pytest.mark.parametrize("kind", PER_ACTION)
def test_rewards_of_successors_by_action(kind):
    transitions, how = TRANSITIONS[kind]()
    same(rr.mdp(transitions, R, 0.9, **how))
    same(rr.mdp(transitions, list(R), 0.9, **how))
    same(rr.mdp(transitions, R.swapaxes(0, 1), 0.9, **how))  # [S, A, S] as ever


def test_rewards_by_name_of_the_action():
    transitions = dict(zip(ACTIONS, P))
    same(rr.mdp(transitions, {"stay": R[1], "go": sp.csr_array(R[0])}, 0.9))
    m = same(rr.mdp(transitions, {"stay": EXPECTED[:, 1], "go": EXPECTED[:, 0]}, 0.9))
    assert m.names.actions == ("go", "stay") and m.names.states == (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"reward is given by name of the action, \('go',\), but transitions have"):
        rr.mdp(transitions, {"go": R[0]}, 0.9)
    with pytest.raises(ValueError, match="but transitions give none: pass them as a dict too"):
        rr.mdp(P, {"go": R[0]}, 0.9, layout="ass")


def test_labels_are_kept_and_must_agree():
    m = rr.mdp([frame(p) for p in P], EXPECTED, 0.9, layout="ass", initial="s")
    assert m.names.states == tuple(STATES) and m.initial.tolist() == [0, 0, 1, 0]
    other = frame(P[1], ["n", "e", "s", "x"], ["n", "e", "s", "x"])
    with pytest.raises(ValueError, match="transitions name other states in one matrix than in the first"):
        rr.mdp([frame(P[0]), other], EXPECTED, 0.9, layout="ass")
    twice = frame(P[0], ["n", "n", "s", "w"], ["n", "n", "s", "w"])
    with pytest.raises(ValueError, match=r"transitions\[0\] has two rows called 'n'"):
        rr.mdp([twice, twice], EXPECTED, 0.9, layout="ass")
    assert rr.mdp([pd.DataFrame(p) for p in P], EXPECTED, 0.9, layout="ass").names is None


def test_endings_per_state():
    ends = np.array([True, False, False, True])
    rows = np.where(ends[:, None, None], 0, P.swapaxes(0, 1))
    for given in (ends, pd.Series(ends), ends.astype(float), ends.tolist()):
        m = rr.mdp(rows, EXPECTED, 0.9, termination=given)
        np.testing.assert_array_equal(m.termination, np.repeat(ends[:, None], A, 1))
    half = rr.mdp(P.swapaxes(0, 1), EXPECTED, 0.9, termination=0.5 * ends, normalise=True)
    np.testing.assert_allclose(half.transitions.expect(np.ones(S))[:, 0], 1 - 0.5 * ends)
    traced = jax.jit(lambda x: rr.mdp(rows, EXPECTED, 0.9, termination=x).termination)(ends.astype(float))
    np.testing.assert_array_equal(traced, m.termination)


def test_other_arguments():
    probabilities = pd.Series([0.25, 0.25, 0.25, 0.25])
    m = rr.mdp(
        P.swapaxes(0, 1), EXPECTED, xr.DataArray(0.9), initial=probabilities, available=pd.DataFrame(EXPECTED > -9)
    )
    assert m.available is None and m.discount == 0.9
    reg = rr.kl(Tensor(2.0), prior=Tensor([0.25, 0.75]), state_scale=pd.Series(np.ones(S)))
    np.testing.assert_allclose(np.exp(reg.log_prior), [0.25, 0.75])


def test_inside_jit():
    places = [sparse.BCOO.fromdense(p) for p in P]

    def build(numbers):
        parts = [sparse.BCOO((x, q.indices), shape=q.shape) for x, q in zip(numbers, places)]
        return rr.mdp(parts, parts, 0.9).reward

    found = jax.jit(build)([q.data for q in places])
    np.testing.assert_allclose(found, (P * P).sum(-1).T)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (R[:1], "expected [*B, S, A] = [*B, 4, 2]"),
        (R, "it looks like [A, S, S]: pass reward.swapaxes(0, 1), or transitions with layout="),
        ([sp.csr_array(R[0])], "reward is a list of 1 matrices; expected one per action, 2"),
        (
            [sp.csr_array(R[0]), sp.csr_array(R[1][:3])],
            "reward[1] has shape [3, 4]; expected one matrix [S, S] = [4, 4]",
        ),
        ([sp.csr_array(R[0]), sp.csr_array(np.full((S, S), np.nan))], "rewards must be finite"),
        (np.ma.masked_array(EXPECTED, EXPECTED > 0), "reward is a masked array, and what it hides has no number"),
    ],
)
def test_refusals(reward, words):
    with pytest.raises(ValueError) as caught:
        rr.mdp(P.swapaxes(0, 1), reward, 0.9)
    assert words in str(caught.value)


def test_as_many_states_as_actions():
    square = np.stack([np.eye(2), np.eye(2)[::-1]])
    with pytest.raises(ValueError, match=r"reads as \[S, A, S\], as \[A, S, S\] and as \[B, S, A\]"):
        rr.mdp(square, np.ones((2, 2, 2)), 0.9, layout="ass")
    reward = np.arange(8.0).reshape(2, 2, 2)
    m = rr.mdp([sp.csr_array(p) for p in square], [sp.csr_array(r) for r in reward], 0.9)
    np.testing.assert_array_equal(m.reward, (square * reward).sum(-1).T)
    lopsided = sparse.BCOO.fromdense(np.array([[[0.25, 0.75], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]]))
    with pytest.raises(ValueError, match="does not tell"):
        rr.mdp(lopsided, np.ones((2, 2)), 0.9)
    for layout, expected in (("ass", [[0.75, 0.5], [0, 1]]), ("sas", [[0.75, 0], [0.5, 1]])):
        chosen = rr.mdp(lopsided, np.ones((2, 2)), 0.9, layout=layout)
        np.testing.assert_array_equal(chosen.transitions.expect(np.array([0.0, 1.0])), expected)


def test_plain_arrays_are_left_alone():
    from robustreg._core import containers

    for x in (EXPECTED, jnp.ones(2), 0.5, [0.5, 1], None, "text"):
        assert containers.plain("x", x) is x
