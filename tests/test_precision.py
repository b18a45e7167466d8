"""Precision is that of the arithmetic: leaves of another dtype than JAX has at present, mixed leaves, own threads.

The suite runs in float64, so that `jax.enable_x64(False)` is the other side of the boundary here; that a float64 label
then means float32 arithmetic is what is tested.
"""

import dataclasses
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import robustreg as rr
from robustreg._core import checks, settings

pytestmark = pytest.mark.slow

WIDE: Any = rr.problems.garnet(7, 3, 3, 0.99)
with jax.enable_x64(False):
    NARROW = rr.problems.garnet(7, 3, 3, 0.99)
REG = rr.kl(20.0)
RIGHT = rr.solve(WIDE, REG)
TRUTH = np.asarray(RIGHT.value)
# What float32 can prove of these values at all; float64 claims are nine digits below.
COARSE = 1e-6


def entries(m, reg, look=lambda call: call()):
    """Of every entry its answer or, as `look` is `jax.eval_shape`, the dtype that it has; and three that claim bounds.

    `look` takes a function without arguments: all arrays are as they are, and only what is computed is traced.
    """
    sol = rr.solve(m, reg)
    policy = np.asarray(RIGHT.policy)
    with pytest.raises(ValueError, match="policy"):
        rr.evaluate(m, 2 * policy)
    proof = rr.certify(m, reg, sol)
    game = rr.solve_game(m, reg, steps=20)
    cells = rr.sweep(m, reg, {"beta": [20.0]}, outputs=("objective", "gap", "status", "value"))
    calls = {
        "evaluate": lambda: rr.evaluate(m, policy, reg),
        "occupancy": lambda: rr.occupancy(m, policy),
        "optimum": lambda: rr.nominal_optimum(m, reg),
        "guarantee": lambda: rr.guarantee(m, reg, policy).guaranteed,
        "slack": lambda: rr.aggregated_slack(m, reg, policy, sol.perturbation),
        "expect": lambda: m.transitions.expect(sol.value),
        "push": lambda: m.transitions.push(rr.occupancy(m, policy)),
        "worst_case": lambda: rr.worst_case(reg, sol.policy),
        "reg.slack": lambda: rr.slack(reg, sol.perturbation),
        "conjugate": lambda: reg.conjugate(sol.q),
        "argmax": lambda: reg.argmax(sol.q),
        "value": lambda: reg.value(sol.policy),
        "critical": lambda: rr.critical_beta(reg, sol.perturbation),
        "calibrate": lambda: rr.calibrate(reg, jnp.stack([sol.perturbation, sol.perturbation]), 0.5),
        "aggregated": lambda: rr.calibrate(reg, sol.perturbation[None], 0.5, mdp=m, policy=policy),
        "support": lambda: rr.RobustSet(reg).support(sol.policy),
        "boundary": lambda: rr.RobustSet(rr.kl(reg.beta)).boundary(0.3),
        "attack": lambda: rr.baselines.norm_attack(sol.policy, 0.1),
    }
    return {
        "solve": sol.value,
        "lower": sol.lower,
        "gap": sol.gap,
        "certify": proof.lower,
        "rounding": proof.rounding,
        "game": game.primal,
        "sweep": cells["value"],
        **{name: look(call) for name, call in calls.items()},
    }, (sol, proof, game)


def honest(sol, proof, game):
    """Every interval that was claimed holds the truth, and nothing claims what float32 cannot have."""
    assert (np.asarray(sol.lower) <= TRUTH).all() and (np.asarray(sol.upper) >= TRUTH).all()
    assert (np.asarray(proof.lower, np.float64) <= TRUTH).all() and (np.asarray(proof.upper, np.float64) >= TRUTH).all()
    objective = float(RIGHT.objective)
    assert float(game.primal) <= objective <= float(game.dual)
    assert float(sol.gap) > COARSE and float(jnp.max(proof.gap)) > COARSE and float(game.gap) > COARSE


@pytest.mark.parametrize("inside_jit", [False, True])
def test_made_in_float64_and_used_where_there_is_none(inside_jit):
    """Every entry computes in float32 then, says so, and certifies no more than that."""
    assert RIGHT.value.dtype == WIDE.dtype == np.float64
    with jax.enable_x64(False):
        assert WIDE.dtype == np.float32 and WIDE.reward.dtype == np.float64
        if inside_jit:
            sol = jax.jit(rr.solve)(WIDE, REG)
            proof = jax.jit(rr.certify)(WIDE, REG, sol)
            game = jax.jit(lambda m, reg: rr.solve_game(m, reg, steps=20))(WIDE, REG)
            found = {"solve": sol.value, "certify": proof.upper, "game": game.dual}
        else:
            found, (sol, proof, game) = entries(WIDE, REG)
        for name, x in found.items():
            assert x.dtype == np.float32, name
        honest(sol, proof, game)
        # A tolerance below what float32 has is not reached, whatever the label.
        assert rr.solve(WIDE, REG, tol=1e-9).status == rr.Status.STAGNATED
        assert "float64" in repr(WIDE) and "CONVERGED" in repr(sol)
    np.testing.assert_allclose(found["solve"], TRUTH, atol=1e-3)


def test_arrays_given_to_methods_are_cast():
    """Float64 arrays themselves, and not only leaves, where JAX has none."""
    policy, dr, q = RIGHT.policy, RIGHT.perturbation, RIGHT.q
    with jax.enable_x64(False):
        found = {
            "worst_case": rr.worst_case(REG, policy),
            "slack": rr.slack(REG, dr),
            "conjugate": rr.alpha(0.5, REG.beta).conjugate(q),
            "argmax": rr.alpha(2.0, REG.beta).argmax(q),
            "value": REG.value(policy),
            "critical_beta": rr.critical_beta(REG, dr),
            "weights": rr.critical_beta(REG, dr, weights=RIGHT.value),
            "calibrate": rr.calibrate(REG, dr[None], 0.5),
            "expect": WIDE.transitions.expect(RIGHT.value),
            "push": WIDE.transitions.push(policy),
            "support": rr.HalfSpace(REG, policy).support(policy),
            "half-space": rr.HalfSpace(REG, policy).slack(dr),
            "attack": rr.baselines.norm_attack(policy, 0.1),
            "decision": rr.baselines.single_decision(q, 1.0).value,
        }
    assert {name: str(x.dtype) for name, x in found.items()} == dict.fromkeys(found, "float32")


def test_made_in_float32_and_used_where_there_is_float64():
    """A float32 MDP is one of float32, with a float64 regulariser and policy too."""
    assert NARROW.dtype == np.float32
    found, claims = entries(NARROW, REG, jax.eval_shape)
    # What takes a regulariser and an array follows the array, and that is the solution's; a boundary point has none.
    for name, x in found.items():
        assert x.dtype == (np.float64 if name == "boundary" else np.float32), name
    honest(*claims)


def test_answers_of_one_side_are_used_on_the_other():
    with jax.enable_x64(False):
        proof = rr.certify(WIDE, REG, RIGHT)
        assert float(RIGHT.gap) < 1e-10 and proof.lower.dtype == np.float32
        assert (np.asarray(proof.lower, np.float64) <= TRUTH).all()
        assert (np.asarray(proof.upper, np.float64) >= TRUTH).all()
        again = rr.solve(WIDE, REG, init=RIGHT.value)
        assert again.value.dtype == np.float32 and bool(again.converged)
    # A policy that was rounded in float32 is none in float64: nothing is said of it before it sums to 1.
    assert np.isnan(rr.certify(WIDE, REG, again).lower).all()
    policy = again.policy.astype(np.float64)
    exact = rr.certify(WIDE, REG, dataclasses.replace(again, policy=policy / policy.sum(-1, keepdims=True)))
    assert exact.lower.dtype == np.float64 and (exact.lower <= TRUTH).all() and (exact.upper >= TRUTH).all()


def test_gradients_cross_the_boundary():
    def objective(reward):
        return rr.solve(dataclasses.replace(WIDE, reward=reward), REG).objective

    rows, (s, a, _) = WIDE.transitions, np.indices(WIDE.transitions.indices.shape)
    P = np.zeros((7, 3, 7))
    np.add.at(P, (s, a, np.asarray(rows.indices)), np.asarray(rows.probabilities))
    right = oracle.occupancy(P, np.asarray(WIDE.initial), np.asarray(0.99), np.asarray(RIGHT.policy))
    with jax.enable_x64(False):
        for gradient in (jax.grad(objective), jax.jit(jax.grad(objective))):
            np.testing.assert_allclose(gradient(WIDE.reward), right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("leaf", ["reward", "initial", "discount"])
def test_mixed_leaves_agree_on_one_dtype(dtype, leaf):
    """Leaves put in by hand are promoted, in both precisions: a coarse number is then an exact one."""
    for m, working in ((WIDE, np.float64), (NARROW, np.float32)):
        mixed = dataclasses.replace(m, **{leaf: getattr(m, leaf).astype(dtype)})
        by_hand = dataclasses.replace(m, **{leaf: getattr(m, leaf).astype(dtype).astype(working)})
        assert mixed.dtype == working
        reg = rr.kl(jnp.asarray(20.0, dtype))
        one, other = rr.solve(mixed, reg), rr.solve(by_hand, reg)
        assert one.value.dtype == working and bool(one.converged)
        assert np.array_equal(one.value, other.value)
        certificate = jax.eval_shape(rr.certify, mixed, reg, one)
        assert jax.eval_shape(rr.evaluate, mixed, one.policy).dtype == certificate.lower.dtype == working


def test_all_leaves_below_float32_compute_in_float32():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, WIDE)
    assert low.dtype == np.float32
    assert checks.working_dtype([jnp.ones(2, jnp.bfloat16), jnp.ones(2, np.float16)]) == np.float32


def test_canonical_casts_floating_arrays_only():
    tree: Any = {"a": jnp.ones(2), "n": jnp.arange(2), "b": jnp.ones(2, bool), "h": jnp.ones(2, jnp.bfloat16), "s": 1.0}
    assert checks.canonical(tree) is tree
    with jax.enable_x64(False):
        cast = checks.canonical(tree)
        assert cast["a"].dtype == np.float32 and cast["h"].dtype == jnp.bfloat16
        assert all(cast[name] is tree[name] for name in ("n", "b", "h", "s"))
        assert jax.jit(checks.canonical)({"a": tree["a"]})["a"].dtype == np.float32
    assert checks.canonical(tree, np.dtype(np.float32))["h"].dtype == np.float32


# ---- settings of the caller in other threads


SETTINGS = {
    "enable_x64": False,
    "debug_nans": True,
    "debug_infs": True,
    "default_matmul_precision": "highest",
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "default_prng_impl": "rbg",
    "disable_jit": True,
    "softmax_custom_jvp": True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_threads_have_the_callers_settings(name):
    def read(out):
        out.append(str(getattr(jax.config, f"jax_{name}")))

    def in_thread(target):
        out: list[str] = []
        thread = threading.Thread(target=target, args=(out,))
        thread.start()
        thread.join()
        return out

    with getattr(jax, name)(SETTINGS[name]):
        mine: list[str] = []
        read(mine)
        carried = settings.carried(read)
        assert in_thread(carried) == mine
    plain = in_thread(read)
    assert plain != mine, "the setting is not the thread's own: this test shows nothing"
    # What the thread was started with stays with the function.
    assert in_thread(carried) == mine


@pytest.mark.parametrize("x64", [False, True])
def test_a_sweep_computes_as_its_caller_does(x64):
    """Whichever side the process is on, `enable_x64` around a sweep holds in the threads that solve it."""
    m = WIDE if x64 else NARROW
    with jax.enable_x64(x64):
        table = rr.sweep(m, REG, {"beta": [5.0, 20.0]}, outputs=("objective", "gap", "status", "value"))
        single = rr.solve(m, rr.kl(np.array([5.0, 20.0])))
    assert table["value"].dtype == single.value.dtype == (np.float64 if x64 else np.float32)
    assert np.abs(table["value"][1] - TRUTH).max() <= table["gap"][1] / 2 + 1e-12
    assert (table["gap"] > COARSE).all() != x64


def test_a_sweep_sees_debug_nans():
    bad = dataclasses.replace(WIDE, reward=WIDE.reward.at[0, 0].set(jnp.nan))
    assert rr.sweep(bad, REG, {"beta": [1.0]})["status"] == rr.Status.NONFINITE_INPUT
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        rr.sweep(bad, REG, {"beta": [1.0]})
