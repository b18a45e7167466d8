"""No argument of the public interface passes in silence, or ends in an exception that does not name it."""

import inspect
from typing import Any

import jax
import numpy as np
import pytest

import robustreg

rr: Any = robustreg
M, REG = rr.problems.chain(discount=0.9), rr.kl(1.0)
POLICY, REWARD = np.full((6, 2), 0.5), np.asarray(M.reward)
KERNEL = np.moveaxis(np.asarray(M.transitions.expect(np.eye(6))), 0, -1)
ROWS = [("a", "x", "b", 1.0, 1.0), ("b", "x", "a", 1.0, 0.0)]
SIZES = {"n_states": 6, "n_actions": 2, "branching": 2, "discount": 0.9, "seed": 0}

# A call that is right, of every function: its arguments are then made wrong one by one.
RIGHT: dict[str, tuple[Any, dict[str, Any]]] = {
    "mdp": (rr.mdp, dict(transitions=KERNEL, reward=REWARD, discount=0.9, initial=np.full(6, 1 / 6))),
    "kl": (rr.kl, dict(beta=1.0, prior=[0.5, 0.5], state_scale=np.ones(6))),
    "alpha": (rr.alpha, dict(alpha=1.5, beta=1.0, prior=[0.5, 0.5])),
    "entropy": (rr.entropy, dict(beta=1.0)),
    "solve": (
        rr.solve,
        dict(mdp=M, reg=REG, solver=rr.Newton(), tol=1e-6, max_steps=9, init=np.zeros(6), strict=False),
    ),
    "certify": (rr.certify, dict(mdp=M, reg=REG, sol=rr.solve(M, REG), strict=False)),
    "evaluate": (rr.evaluate, dict(mdp=M, policy=POLICY, reg=REG, reward=REWARD)),
    "occupancy": (rr.occupancy, dict(mdp=M, policy=POLICY)),
    "nominal_optimum": (rr.nominal_optimum, dict(mdp=M, reg=REG)),
    "worst_case": (rr.worst_case, dict(reg=REG, policy=POLICY)),
    "worst_case of logs": (rr.worst_case, dict(reg=REG, log_policy=np.log(POLICY), action=np.zeros(6, int))),
    "slack": (rr.slack, dict(reg=REG, perturbation=REWARD)),
    "critical_beta": (rr.critical_beta, dict(reg=REG, perturbation=REWARD, weights=np.ones(6), per_state=True)),
    "calibrate": (rr.calibrate, dict(reg=REG, perturbations=REWARD[None], coverage=0.5, mdp=M, policy=POLICY)),
    "guarantee": (rr.guarantee, dict(mdp=M, reg=REG, policy=POLICY, deployed=REWARD)),
    "aggregated_slack": (rr.aggregated_slack, dict(mdp=M, reg=REG, policy=POLICY, perturbation=REWARD)),
    "aggregated_slack of visits": (
        lambda visits: rr.aggregated_slack(M, REG, None, REWARD, visits=visits),
        dict(visits=np.ones(6)),
    ),
    "shard": (rr.shard, dict(mdp=M, devices=jax.devices()[:1], axis="states", pad=False)),
    "solve_game": (rr.solve_game, dict(mdp=M, reg=REG, steps=2, tol=1.0, scheme="alternating")),
    "sweep": (
        rr.sweep,
        dict(mdp=M, reg=REG, grid={"beta": [1.0]}, outputs=("gap",), zipped=False, tol=1.0, max_steps=9, chunk=2)
        | dict(devices=jax.devices()[:1], resume=False, part=(0, 1), progress=False, shard=(0, 1)),
    ),
    "raise_if_loose": (lambda tol: rr.certify(M, REG, rr.solve(M, REG)).raise_if_loose(tol), dict(tol=1.0)),
    "chain": (rr.problems.chain, dict(n_states=6, discount=0.9, slip=0.1)),
    "ring": (rr.problems.ring, dict(n_states=6, discount=0.9, slip=0.1)),
    "garnet": (rr.problems.garnet, SIZES),
    "garnets": (rr.problems.garnets, SIZES | {"count": 2}),
    "slippery_grid": (rr.problems.slippery_grid, dict(size=4, discount=0.9, water_share=0.2, seed=0)),
    "grid_world": (rr.problems.grid_world, dict(cells=["S.", "~G"], discount=0.9, slip=0.1, step=0.0, goal=1.0)),
    "from_table": (rr.from_table, {next(iter(inspect.signature(rr.from_table).parameters)): ROWS, "discount": 0.9}),
    "stack": (rr.stack, dict(problems=[(M, REG)])),
    "losses.consistency_loss": (
        rr.losses.consistency_loss,
        dict(reg=REG, value=np.zeros(6), next_value=np.zeros(6), reward=np.zeros(6), discount=0.9)
        | dict(log_policy=np.log(POLICY), action=np.zeros(6, int), weights=1.0),
    ),
    "losses.fenchel_young": (rr.losses.fenchel_young, dict(reg=REG, q=REWARD, target=POLICY, weights=1.0)),
    "losses.log_ratio": (
        rr.losses.log_ratio,
        dict(log_prob=REWARD, reference=REWARD, mask=np.ones((6, 2), bool)),
    ),
    "losses.dpo": (
        rr.losses.dpo,
        dict(reg=REG, chosen=np.zeros(6), rejected=np.zeros(6), label_smoothing=0.1, clip=1.0, weights=1.0),
    ),
    "losses.ipo": (rr.losses.ipo, dict(reg=REG, chosen=np.zeros(6), rejected=np.zeros(6), weights=1.0)),
    "losses.sampled_worst_case": (
        rr.losses.sampled_worst_case,
        dict(reg=rr.alpha(1.5, 1.0), log_ratio=np.zeros(6), divergence=0.0, weights=np.ones(6)),
    ),
    "losses.sampled_slack": (
        rr.losses.sampled_slack,
        dict(reg=REG, perturbation=np.zeros(6), log_ratio=np.zeros(6), weights=np.ones(6)),
    ),
    "losses.sampled_critical_beta": (
        rr.losses.sampled_critical_beta,
        dict(reg=REG, perturbation=np.zeros(6), log_ratio=np.zeros(6), weights=np.ones(6)),
    ),
    "losses.sampled_guarantee": (
        rr.losses.sampled_guarantee,
        dict(reg=REG, returns=np.zeros(6), log_ratio=np.zeros(6), divergence=0.0, weights=np.ones(6)),
    ),
    "norm_attack": (rr.baselines.norm_attack, dict(policy=POLICY, radius=1.0, order=2.0)),
}
WRONG = {
    "an object": object(),
    "a number beyond floats": 10**400,
    "complex numbers": np.ones((6, 2)) * 1j,
    "text in an array": np.array(["a"]),
    "rows of unlike lengths": [[1.0], [1.0, 2.0]],
    "a date": np.datetime64("2020-01-01"),
    "text": "abc",
    "nan": float("nan"),
}
# Integers of any size are right there: a cap is a cap, and a seed is a seed.
ANY_INTEGER = {("solve", "max_steps"), ("sweep", "max_steps"), ("sweep", "chunk"), ("solve_game", "steps")} | {
    (name, "seed") for name in ("garnet", "garnets", "slippery_grid")
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_wrong_argument_is_refused_by_name(name):
    function, arguments = RIGHT[name]
    for argument in arguments:
        for what, value in WRONG.items():
            if (name, argument) in ANY_INTEGER and isinstance(value, int):
                continue
            if (
                name.startswith("losses")
                and what == "nan"
                and argument not in ("reg", "action", "clip", "label_smoothing")
            ):
                continue  # data of a training step: what is not finite stays so
            if (name, argument, what) in {
                ("solve", "init", "nan"),
                ("shard", "axis", "text"),
                ("from_table", "table", "text"),
            }:
                continue  # nan is data, whose lane fails by its status; an axis has any name; a table may be a path
            with pytest.raises((TypeError, ValueError)) as caught:
                function(**{**arguments, argument: value})
            case = f"{name}({argument}={what}): {type(caught.value).__name__}: {caught.value}"
            assert type(caught.value) in (TypeError, ValueError), case
            words = [argument, argument.removesuffix("s"), "argument", "row 0"]
            assert any(word in str(caught.value) for word in words), case


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: rr.solve(M, REG, tol=np.inf), "tol must be positive and finite"),
        (lambda: rr.solve(M, REG, tol=True), "tol must be a number"),
        (lambda: rr.solve_game(M, REG, tol=np.inf, steps=1), "tol must be positive and finite"),
        (lambda: rr.sweep(M, REG, {"beta": [1.0]}, tol=-1.0), "tol must be positive"),
        (lambda: rr.sweep(M, REG, {"beta": [1.0]}, part=(True, 2)), "part must be (i, n)"),
        (lambda: rr.sweep(M, REG, {"beta": [1.0]}, part=()), "part must be (i, n)"),
        (lambda: rr.sweep(M, REG, {"beta": [1.0]}, chunk=True), "chunk must be an integer"),
        (lambda: rr.sweep(M, REG, {"beta": [1.0]}, devices=[]), "devices must be a sequence of jax devices"),
        (lambda: rr.shard(M, []), "devices must be a mesh or a sequence of jax devices"),
        (lambda: rr.certify(M, REG, None), "sol must be a Solution"),
        (lambda: rr.aggregated_slack(M, REG, None, REWARD), "give the policy, or visits="),
        (lambda: rr.critical_beta(REG, REWARD, per_state=1), "per_state must be True or False"),
        (lambda: jax.jit(lambda b: rr.sweep(M, rr.kl(b), {"beta": [1.0]})["gap"])(2.0), "cannot run inside jit"),
        (lambda: rr.sweep(M, REG, {"beta": np.ones(2**14), "discount": np.zeros(2**14)}), "268,435,456 cells"),
    ],
)
def test_what_used_to_pass_in_silence(call, text):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert text in str(caught.value)


def test_swapped_bytes_are_the_same_numbers():
    """Files from other machines; a compiled program would take the bytes as they lie."""
    swapped = POLICY.astype(">f8"), REWARD.astype(">f8")
    calls = [
        lambda p, r: rr.slack(REG, r),
        lambda p, r: rr.worst_case(REG, p),
        lambda p, r: rr.evaluate(M, p, reward=r),
        lambda p, r: rr.guarantee(M, REG, p, r).actual,
        lambda p, r: rr.critical_beta(REG, r),
    ]
    for call in calls:
        np.testing.assert_array_equal(call(*swapped), call(POLICY, REWARD))
