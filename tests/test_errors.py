"""Bad input gives its error, which names the first offender and the remedy, and nothing else."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import robustreg
from robustreg import archive

# For the type checker: tests hand NumPy arrays to classes that declare JAX arrays, and read any transitions.
rr: Any = robustreg
problems = rr.problems

S, A = 5, 3


def kernel(seed=0, states=S, actions=A):
    """Random transitions [S,A,S]."""
    return np.random.default_rng(seed).dirichlet(np.ones(states), (states, actions))


REWARD = np.random.default_rng(1).normal(size=(S, A))


def build(transitions=None, reward=None, discount: Any = 0.9, **options):
    """A valid MDP but for what a test replaces."""
    return rr.mdp(
        kernel() if transitions is None else transitions,
        REWARD if reward is None else reward,
        discount,
        **options,
    )


def changed(x, index, value):
    """A copy of `x` with one entry replaced."""
    x = np.array(x)
    x[index] = value
    return x


def refused(*parts: str, error: type[Exception] = ValueError):
    """`pytest.raises` on a message that holds all of `parts` in order, as plain text."""
    return pytest.raises(error, match=".*".join(map(re.escape, parts)))


# ---- rows


def test_row_sum_names_the_first_row_and_the_remedy():
    P = kernel()
    P[3, 1] *= 0.9987
    P[4, 2] *= 0.5
    with refused("transitions[s=3, a=1] sum to 0.9987, not 1 (tolerance 1e-10 for float64); renormalise, or pass n"):
        build(P)
    with refused("transitions[s=3, a=1] sum to 0.9987, not 1 (tolerance 1e-6 for float32); renormalise, or pass n"):
        build(P.astype(np.float32))


def test_row_sum_below_one_points_to_termination_and_above_does_not():
    P = kernel()
    with refused("normalise=True; if the episode ends with the rest", "pass termination=1 - P.sum(-1)"):
        build(P * 0.5)
    with pytest.raises(ValueError, match="sum to 1.5, not 1 .*normalise=True$"):
        build(P * 1.5)


def test_tolerance_depends_on_the_precision_of_the_data():
    P = kernel()
    build(changed(P, (0, 0, 0), P[0, 0, 0] + 1e-11))
    with refused("transitions[s=0, a=0] sum to 1.00000001, not 1"):
        build(changed(P, (0, 0, 0), P[0, 0, 0] + 1e-8))
    build(changed(P.astype(np.float32), (0, 0, 0), np.float32(P[0, 0, 0] + 2e-7)))
    build([[row for row in state] for state in P.astype(np.float32)])  # a list of float32 rows is float32 data


def test_row_sum_against_termination():
    P, ends = kernel(), np.zeros((S, A))
    ends[2, 1] = 0.25
    message = "transitions[s=2, a=1] sum to 1, not 0.75 = 1 - termination[s=2, a=1]", "pass normalise=True"
    with refused(*message):
        build(P, termination=ends)
    P[2, 1] *= 0.75
    build(P, termination=ends)


def test_row_sum_in_a_lane():
    P = np.stack([kernel(), kernel(1)])
    P[1, 4, 2] *= 0.5
    with refused("transitions[lane=1, s=4, a=2] sum to 0.5"):
        build(rr.Dense(P))
    with refused("transitions[lane=(0, 1), s=4, a=2] sum to 0.5"):
        build(rr.Dense(P[None]))


def test_row_without_successors_cannot_be_normalised():
    with refused("transitions[s=1, a=0] sum to 0", "cannot be normalised: give it one, or termination 1"):
        build(changed(kernel(), (1, 0), 0.0), normalise=True)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (-0.25, "is -0.25; probabilities must not be negative"),
        (np.nan, "is nan; probabilities must be finite"),
    ],
)
def test_probabilities(bad, said):
    with refused(f"transitions[s=2, a=1, s'=4] {said}"):
        build(changed(kernel(), (2, 1, 4), bad), normalise=True)
    lists = rr.Successors(np.zeros((S, A, 2), np.int32), changed(np.full((S, A, 2), 0.5), (2, 1, 1), bad))
    with refused(f"transitions.probabilities[s=2, a=1, k=1] {said}"):
        build(lists)
    with refused(f"termination[s=2, a=1] {said}"):
        build(termination=changed(np.zeros((S, A)), (2, 1), bad))
    with refused(f"initial[s=3] {said}"):
        build(initial=changed(np.full(S, 1 / S), 3, bad))


def test_infinite_probability():
    with refused("transitions[s=0, a=0, s'=0] is inf; probabilities must be finite"):
        build(changed(kernel(), (0, 0, 0), np.inf))


# ---- shapes and layouts


def test_layout_is_never_guessed():
    P = kernel(states=4, actions=4)
    reward = np.ones((4, 4))
    with refused("(4, 4, 4) with S == A", "tell [S, A, S] from [A, S, S]", 'pass layout="sas" or layout="ass"'):
        rr.mdp(P, reward, 0.9)
    sas, ass = rr.mdp(P, reward, 0.9, layout="sas"), rr.mdp(P.swapaxes(0, 1), reward, 0.9, layout="ass")
    np.testing.assert_array_equal(sas.transitions.probabilities, ass.transitions.probabilities)
    with refused("with S == A"):
        jax.jit(lambda p: rr.mdp(p, reward, 0.9).reward)(P)
    symmetric = (P + P.swapaxes(0, 1)) / 2
    rr.mdp(symmetric, reward, 0.9)  # both readings are the same MDP


def test_layout_that_only_fits_the_other():
    with refused("transitions has shape (3, 5, 5), which only fits [A, S, S]", 'pass layout="ass"'):
        build(kernel().swapaxes(0, 1))
    with refused("transitions has shape (3, 5, 5), which only fits [A, S, S]", 'pass layout="ass"'):
        build(kernel().swapaxes(0, 1), layout="sas")
    with refused("transitions has shape (5, 3, 5), which only fits [S, A, S]", 'pass layout="sas"'):
        build(layout="ass")
    with refused('layout must be "sas" ([S, A, S]) or "ass" ([A, S, S]), got \'aas\''):
        build(layout="aas")


def test_transition_shapes():
    with refused("transitions has shape (5, 5); expected [S, A, S]", 'layout="ass"'):
        build(np.eye(5))
    with refused("transitions has shape (5, 3, 4); expected [S, A, S]", "one row of S probabilities per (s, a)"):
        build(kernel()[..., :4])
    with refused("transitions has shape (0, 3, 0)", "none empty"):
        build(np.zeros((0, 3, 0)))


def test_transitions_that_are_no_array():
    with refused("transitions has dtype <U5; pass an array of real numbers", error=TypeError):
        build([["dense"]])
    with refused("transitions has dtype complex128", error=TypeError):
        build(kernel() + 0j)
    with refused("transitions is a ragged nested sequence"):
        build([[[1.0], [0.5, 0.5]]])


def test_successor_indices():
    indices, p = np.zeros((S, A, 2), np.int32), np.full((S, A, 2), 0.5)
    with refused("transitions.indices[s=1, a=2, k=1] is 5; successors are 0..4; pad a row with index 0 and prob"):
        build(rr.Successors(changed(indices, (1, 2, 1), 5), p))
    with refused("transitions.indices[s=1, a=2, k=0] is -1"):
        build(rr.Successors(changed(indices, (1, 2, 0), -1), p))
    with refused("transitions.indices has dtype float64; successors are state numbers: use int32", error=TypeError):
        build(rr.Successors(indices.astype(float), p))
    with refused("transitions.indices has shape (5, 3); expected [S, A, K]"):
        build(rr.Successors(indices[..., 0], p))
    with refused("transitions.probabilities has shape (5, 3, 1); expected [*B, S, A, K] = [*B, 5, 3, 2]"):
        build(rr.Successors(indices, p[..., :1]))


def test_sparse_matrices():
    good = [sparse.csr_array(kernel()[:, a]) for a in range(A)]
    with refused("transitions is one sparse matrix; pass a list with one [S, S] matrix per action"):
        build(good[0])
    with refused("transitions[1] is csr_array of shape (5, 4); pass one sparse [S, S] = [5, 5] per action"):
        build([good[0], good[1][:, :4], good[2]])
    with refused("transitions[2] is ndarray of shape (5, 5); pass one sparse"):
        build([*good[:2], kernel()[:, 2]])
    with refused("transitions[s=0, a=1] sum to 0.5"):
        build([good[0], good[1] * 0.5, good[2]])


def test_matrix_free():
    P = jnp.asarray(kernel())
    sizes = {"n_states": S, "n_actions": A}
    with refused("transitions[s=0, a=0] sum to 0.5", "pass termination"):
        build(rr.MatrixFree(lambda v: 0.5 * (P @ v), **sizes))
    with refused("transitions.expect(ones)[s=0, a=0] is nan; expect must return finite values"):
        build(rr.MatrixFree(lambda v: jnp.nan * (P @ v), **sizes))
    with refused("transitions.push is not the transpose of expect", "pass push=None to have it derived"):
        build(rr.MatrixFree(lambda v: P @ v, lambda mu: mu.sum(-1), **sizes))
    with refused("must return shape [5, 3], got [3, 5]"):
        build(rr.MatrixFree(lambda v: (P @ v).T, **sizes))
    with refused("MatrixFree(n_states=0, n_actions=3) has no states or no actions"):
        build(rr.MatrixFree(lambda v: P @ v, n_states=0, n_actions=A))
    with refused("normalise=True needs transitions as an array; divide by expect(ones)"):
        build(rr.MatrixFree(lambda v: P @ v, **sizes), normalise=True)
    with refused("reward [S, A, S] needs transitions as an array; with MatrixFree pass the expected [S, A]"):
        build(rr.MatrixFree(lambda v: P @ v, **sizes), np.ones((S, A, S)))


# ---- reward, termination, initial, discount


def test_reward_shapes():
    with refused("reward has shape (3, 5); expected [*B, S, A] = [*B, 5, 3]; it looks transposed: pass reward.T"):
        build(reward=REWARD.T)
    with refused("reward has shape (3,); expected [*B, S, A]", "also accepted: [S], and [S, A, S]"):
        build(reward=np.ones(A))
    with refused("reward has shape ()"):
        build(reward=1.0)


def test_reward_readable_two_ways():
    P = kernel(states=4, actions=4)
    message = (
        "(4, 4, 4) with S == A reads as [S, A, S] and as [B, S, A]",
        "(P * reward).sum(-1), or reward[None]",
    )
    with refused(*message):
        rr.mdp(P, np.ones((4, 4, 4)), 0.9, layout="sas")
    assert rr.mdp(P, np.ones((1, 4, 4, 4)), 0.9, layout="sas").batch_shape == (1, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_reward_must_be_finite(bad):
    rule = "rewards must be finite; to forbid an action, give it prior 0 in the regulariser"
    with refused(f"reward[s=2, a=1] is {bad}; {rule}"):
        build(reward=changed(REWARD, (2, 1), bad))
    with refused(f"reward[lane=1, s=2, a=1] is {bad}"):
        build(reward=changed(np.stack([REWARD, REWARD]), (1, 2, 1), bad))
    with refused(f"reward[s=2, a=1, s'=4] is {bad}"):
        build(reward=changed(np.ones((S, A, S)), (2, 1, 4), bad))


def test_reward_must_be_numeric():
    with refused("reward has dtype object; pass an array of real numbers", error=TypeError):
        build(reward=[[None] * A] * S)


def test_termination():
    with refused("termination has shape (3,); expected [*B, S, A] = [*B, 5, 3]; one probability per (s, a), or [S]"):
        build(termination=np.zeros(A))
    with refused("termination[s=4, a=0] is 1.5; a probability is at most 1"):
        build(termination=changed(np.zeros((S, A)), (4, 0), 1.5))


def test_initial():
    with refused("initial has shape (4,); expected [*B, S] = [*B, 5]; a distribution over states, or None"):
        build(initial=np.full(4, 0.25))
    with refused("initial sums to 2, not 1 (tolerance 1e-10 for float64); divide by the sum, or pass normalise=True"):
        build(initial=np.full(S, 0.4))
    with refused("initial[lane=1] sums to 0, not 1"):
        build(initial=np.stack([np.full(S, 1 / S), np.zeros(S)]), normalise=True)


@pytest.mark.parametrize("bad", [1.0, 1.5, -0.1, np.nan, np.inf])
def test_discount(bad):
    rule = (
        "it must lie in [0, 1): use 0.999 for a long horizon, and termination for episodes that end; solve_average "
        "needs none, solve_horizon takes its own"
    )
    with refused(f"discount is {bad:g}; {rule}"):
        build(discount=bad)
    with refused(f"discount[lane=1] is {bad:g}; {rule}"):
        build(discount=[0.5, bad])


def test_discount_that_rounds_to_one():
    P, reward = kernel().astype(np.float32), REWARD.astype(np.float32)
    with refused("discount is 0.999999999; in float32 that is 1: pass float64 arrays with jax_enable_x64 on"):
        rr.mdp(P, reward, 1 - 1e-9)
    assert float(rr.mdp(kernel(), REWARD, 1 - 1e-9).complement) == pytest.approx(1e-9, rel=1e-6)


def test_batch_axes_that_do_not_broadcast():
    said = "reward [2], discount [3]; give each the same leading axes, or insert axes of size 1"
    with refused(f"batch axes do not broadcast: {said}"):
        build(reward=np.stack([REWARD, REWARD]), discount=[0.1, 0.2, 0.3])
    with refused("batch axes do not broadcast: transitions [3], termination [2]"):
        build(rr.Dense(np.stack([kernel()] * 3)), termination=np.full((2, S, A), 0.5))


def test_shapes_are_checked_on_tracers_too():
    with refused("reward has shape (3, 5)", "pass reward.T"):
        jax.jit(lambda r: build(reward=r).reward)(REWARD.T)
    with refused("transitions has shape (3, 5, 5)", 'layout="ass"'):
        jax.vmap(lambda p: build(p).reward)(np.stack([kernel().swapaxes(0, 1)]))


# ---- generators


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: problems.bandit([[1.0]]), "reward of a bandit has shape (1, 1); expected [A]"),
        (lambda: problems.grid_world("S.G"), "cells is 'S.G'; expected a list of strings, one per row"),
        (lambda: problems.grid_world([]), "cells is []; expected a list of strings"),
        (
            lambda: problems.grid_world(["S.", "G"]),
            "cells[1] has 1 letters, the first row 2; make them equal",
        ),
        (
            lambda: problems.grid_world(["S.", "Gx"]),
            "cells[1][1] is 'x'; expected one of: S start, G goal, ~ water",
        ),
        (
            lambda: problems.grid_world(["#G"]),
            "cells holds no cell to start from; draw at least one of: S start",
        ),
        (
            lambda: problems.grid_world(["S.G"], slip=0.6),
            "slip is 0.6; expected a probability, from 0 to 0.5",
        ),
        (lambda: problems.slippery_cells(1), "size must be at least 2, got 1"),
        (lambda: problems.chain(1), "n_states must be at least 2, got 1"),
        (lambda: problems.chain(slip=1.5), "slip is 1.5; expected a probability, from 0 to 1"),
        (lambda: problems.ring(2), "n_states must be at least 3, got 2"),
        (lambda: problems.ring(slip=-0.5), "slip is -0.5; expected a probability, from 0 to 1"),
        (lambda: problems.garnet(4, 2, 5), "branching is 5; expected 1 to n_states = 4"),
        (lambda: problems.garnet(4, 0, 2), "n_actions must be at least 1, got 0"),
        (
            lambda: problems.slippery_cells(4, water_share=2.0),
            "water_share is 2.0; expected a probability, from 0",
        ),
    ],
)
def test_generators(make, message):
    with refused(message):
        make()


# ---- Gymnasium tables


def table():
    """Two states, two actions."""
    step = [(0.5, 0, 1.0, False), (0.5, 1, 0.0, True)]
    return {0: {0: step, 1: step}, 1: {0: step, 1: step}}


@pytest.mark.parametrize(
    ("state", "action", "value", "message"),
    [
        (1, 0, [(1.0, 2, 0.0, False)], "P[1][0] leads to state 2; states are 0..1"),
        (
            1,
            0,
            [(1.0, 0, 0.0)],
            "P[1][0] holds (1.0, 0, 0.0); expected (probability, successor, reward, terminated)",
        ),
        (0, 1, [(-1.0, 0, 0.0, False)], "P[0][1] has the probability -1; a probability lies between 0 and 1"),
        (0, 1, [(0.5, 0, 0.0, False)], "probabilities of state 0 and action 1 (P[0][1]) sum to 0.5, not 1"),
        (0, 1, [(1.0, 0, np.nan, False)], "P[0][1] has the reward nan; rewards must be finite"),
    ],
)
def test_gymnasium_entries(state, action, value, message):
    broken = table()
    broken[state][action] = value
    with refused(message):
        rr.from_gymnasium(broken)


def test_gymnasium_tables():
    with refused("P has no entry 1; states and actions are numbered from 0"):
        rr.from_gymnasium({0: table()[0], 2: table()[1]})
    with refused("P has an action 'go'; actions are numbered from 0, or see rr.from_table"):
        rr.from_gymnasium({0: table()[0], 1: {"go": [(1.0, 0, 0.0, False)]}})
    with refused("P has no states, or none of their actions"):
        rr.from_gymnasium({0: {}, 1: {0: []}})
    with refused("object has no table of transitions P; only tabular environments", error=TypeError):
        rr.from_gymnasium(object())


def test_gymnasium_without_a_model_or_not_installed(monkeypatch):
    gymnasium = pytest.importorskip("gymnasium")
    with refused("BlackjackEnv has no table of transitions P", "build rr.mdp(...) yourself", error=TypeError):
        rr.from_gymnasium(gymnasium.make("Blackjack-v1"))
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with refused('pip install "robustreg[gym]"', error=ImportError):
        rr.from_gymnasium("FrozenLake-v1")


# ---- files


def test_what_cannot_be_saved(tmp_path):
    with refused("cannot save dict; pass one of: MDP, Solution, Dense, Successors, KL, Alpha", error=TypeError):
        rr.save(tmp_path / "x", {})
    P = jnp.asarray(kernel())
    m = build(rr.MatrixFree(lambda v: P @ v, n_states=S, n_actions=A))
    with refused("MatrixFree transitions are code", "save rr.Successors or rr.Dense", error=TypeError):
        rr.save(tmp_path / "x", m)
    with refused("cannot run inside jit, vmap or grad", error=TypeError):
        jax.jit(lambda r: rr.save(tmp_path / "x", build(reward=r)) and r)(REWARD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("header", [None, "no JSON", "[1]", '{"robustreg": {"format_version": 99}}'])
def test_files_that_are_not_ours(tmp_path, header):
    arrays: Any = {"value": np.ones(3)} if header is None else {"header": np.array(header)}
    np.savez(tmp_path / "x.npz", **arrays)
    for read in (rr.load, archive.read_header):
        with refused("x.npz was not written by this version of robustreg.save"):
            read(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short"])
def test_files_that_are_no_archives(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    for read in (rr.load, archive.read_header):
        with refused("x.npz is no NumPy archive (.npz), or a damaged one"):
            read(tmp_path / "x.npz")


def test_load_finds_what_save_named(tmp_path):
    rr.save(tmp_path / "a", rr.kl(2.0))
    assert float(rr.load(tmp_path / "a").beta) == 2.0


# ---- solve, evaluate, certify


@pytest.mark.parametrize("tol", [0, -1.0, float("nan"), np.float32(-1), np.array([1e-3, -1.0]), jnp.asarray(0.0)])
def test_tolerances_must_be_positive(tol):
    with refused("tol must be positive", "None asks for what the precision supports"):
        rr.solve(build(), rr.kl(1.0), tol=tol)


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (0, ValueError, "max_steps must be at least 1, got 0"),
        (-5, ValueError, "max_steps must be at least 1, got -5"),
        (2.7, TypeError, "max_steps must be an integer, the same for all lanes, got 2.7"),
        (np.array([1, 5]), TypeError, "max_steps must be an integer"),
    ],
)
def test_step_limits(steps, error, message):
    with refused(message, error=error):
        rr.solve(build(), rr.kl(1.0), max_steps=steps)


def test_step_limits_beyond_the_counter():
    assert bool(rr.solve(build(), rr.kl(1.0), tol=1e-6, max_steps=10**12).converged)


def test_policies_must_be_distributions():
    m, even = build(), np.full((S, A), 1 / A)
    for call in (rr.evaluate, rr.occupancy):
        with refused("policy[s=0] is", "a policy sums to 1 over actions"):
            call(m, 1.05 * even)
        with refused("policy[s=0, a=2] is -1", "must not be negative"):
            call(m, np.tile([1.0, 1.0, -1.0], (S, 1)))
        with refused(f"policy has shape ({A}, {S}); expected [*B, S, A]"):
            call(m, even.T)
        with refused("the first argument must be an MDP", error=TypeError):
            call(even, m)
    with refused("the third argument must be a regulariser", error=TypeError):
        rr.evaluate(m, even, REWARD)  # pyright: ignore[reportArgumentType]
    with refused("the first argument must be a regulariser", error=TypeError):
        rr.worst_case(even, rr.kl(1.0))  # pyright: ignore[reportArgumentType]


def test_certify_checks_what_it_is_given():
    m, reg = build(), rr.kl(1.0)
    sol = rr.solve(m, reg)
    for name, wrong in (("value", sol.value[:-1]), ("policy", sol.policy.T), ("perturbation", sol.perturbation[0])):
        with refused(f"{name} has shape"):
            rr.certify(m, reg, dataclasses.replace(sol, **{name: wrong}))
    halved = rr.certify(m, reg, dataclasses.replace(sol, policy=0.5 * sol.policy))
    assert np.isnan(halved.lower).all()
    with pytest.raises(rr.SolveError, match="gap is nan"):
        halved.raise_if_loose(1e-3)


def test_functions_must_be_linear():
    P = jnp.asarray(kernel())
    with refused("transitions.expect(2u - v)[s=0, a=0]", "expect must be linear in v"):
        build(rr.MatrixFree(lambda v: P @ v**2, n_states=S, n_actions=A))


def test_numbers_that_are_none():
    for wrong in (None, "1", 1j, [[1.0], [1.0, 2.0]]):
        with refused("beta must be a number or an array of real numbers", error=TypeError):
            rr.kl(wrong)  # pyright: ignore[reportArgumentType]


# ---- remedies of lanes that failed


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("asked", [True, False])
def test_remedies_fit_who_reads_them(dtype, asked):
    """Nobody who is in float64 is told to take it, nobody without a tol to loosen it; every status has a way out."""
    with jax.enable_x64(dtype == np.float64):
        m = rr.problems.garnet(12, 3, 3, 0.99)
        lanes = rr.solve(m, rr.kl(np.ones(4)), rr.ValueIteration(), tol=1e-300 if asked else None, max_steps=3)
        assert lanes.value.dtype == dtype and (np.asarray(lanes.status) == rr.Status.MAX_STEPS).all()
        every = dataclasses.replace(lanes, status=jnp.asarray([1, 2, 3, 4], jnp.int32))
        with pytest.raises(rr.SolveError) as failure:
            every.raise_if_failed()
    text = str(failure.value)
    ways = {"MAX_STEPS": "raise max_steps", "STAGNATED": "take Newton", "NONFINITE_INPUT": "mend the input"}
    for line, (name, way) in zip(text.splitlines()[1:], {**ways, "NONFINITE": "rescale rewards"}.items(), strict=True):
        assert line.strip().startswith(f"{name}: lane") and way in line
    assert ("float64" in text) == (dtype == np.float32)
    assert ("loosen tol" in text) == asked and ("ask for a tol" in text) != asked
    assert ("tol 1e-300" in text or "tol 0" in text) == asked


def test_a_tol_that_was_missed_by_little_was_asked_for():
    """`tol` without one is the half-width itself; one of the same size that was asked for is not confused with it."""
    sol = rr.solve(rr.problems.bandit(), rr.kl(1.0))
    unit = np.finfo(sol.value.dtype).eps * sol.value
    narrow = dataclasses.replace(sol, lower=sol.value - unit, upper=sol.value + unit)
    for base, tol, asked in ((sol, 0.3 * sol.gap / 2, True), (sol, sol.tol, False), (narrow, 1e-300, True)):
        stuck = dataclasses.replace(base, tol=jnp.asarray(tol), status=jnp.asarray(2, jnp.int32))
        with pytest.raises(rr.SolveError, match="loosen tol" if asked else "ask for a tol"):
            stuck.raise_if_failed()
