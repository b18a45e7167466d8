"""The campaign of `benchmarks/honesty.py` in small: nothing wrong in silence, and a planted fault is found."""

import dataclasses
import importlib
import json
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracle import exact_conjugate

import robustreg as rr

MODULES = ("claims", "draws", "honesty", "reference", "tallies")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
claims, draws, honesty, reference, tallies = map(importlib.import_module, MODULES)


def random_decisions(n, seed):
    """Decisions of five actions with tiny and masked priors, over the whole range of the campaign."""
    rng = np.random.default_rng(seed)
    order = np.where(rng.random(n) < 0.3, rng.choice([0, 0.5, 1, 2, 1 + 1e-7, 1e-7], n), rng.uniform(-5, 5, n))
    beta, size = 10 ** rng.uniform(-6, 6, n), 10 ** rng.uniform(-6, 6, n)
    prior = rng.dirichlet(np.ones(5), n)
    prior[::3, 1], prior[::4, 2] = 1e-12, 0
    return order, beta, prior / prior.sum(-1, keepdims=True), rng.normal(size=(n, 5)) * size[:, None]


def test_the_reference_bounds_what_decimal_arithmetic_says():
    order, beta, prior, q = random_decisions(24, 0)
    exact = prior.astype(reference.LD) / prior.astype(reference.LD).sum(-1, keepdims=True)
    low, high = reference.conjugate(q, *(x.astype(reference.LD) for x in (order, beta)), exact)
    for i in range(len(q)):
        truth = exact_conjugate(order[i], beta[i], prior[i], q[i], digits=60)
        assert Decimal(str(low[i])) <= truth <= Decimal(str(high[i])), (order[i], beta[i])
    # Sharp as well: bounds as wide as the numbers would contain everything.
    assert ((high - low) <= 1e3 * reference.UNIT * (2 + np.abs(order)) * np.abs(q).max(-1)).all()


@pytest.mark.parametrize("ends", [False, True])
def test_the_reference_solves_and_its_bounds_are_sharp(ends):
    drawn = draws.draw(np.random.default_rng(1), 128, 12, 4, "float64", False, ends)
    answer = reference.solve(drawn.exact)
    width = (answer.upper - answer.lower).max(-1)
    # Values may differ by scale/(1-g) over states, and a rounding of that adds up over another 1/(1-g) steps.
    assert (width >= 0).all() and (width <= 5e3 * reference.UNIT * drawn.scale * drawn.exact.horizon**2).all()


def test_draws_are_exact_problems():
    for seed, dtype in ((0, "float32"), (1, "float64")):
        drawn = draws.draw(np.random.default_rng(seed), 300, 9, 3, dtype, False, True)
        assert (drawn.P.astype(float).sum(-1) + drawn.termination == 1).all() and (drawn.P >= 0).all()
        assert (drawn.policy.astype(float).sum(-1) == 1).all() and (drawn.policy[drawn.prior == 0] == 0).all()
        assert np.abs(drawn.prior.astype(float).sum(-1) - 1).max() <= np.finfo(dtype).eps
        assert set(drawn.kind) == set(range(len(draws.KINDS)))
        single = (drawn.P > 0).sum(-1).max((1, 2)) <= 1
        assert 0.3 < single.mean() < 0.9 and (drawn.discount.min(), drawn.discount.max()) == (0, 1 - 105 / 2**20)


@pytest.mark.parametrize("group", [honesty.SMALL[0], pytest.param(honesty.SMALL[1], marks=pytest.mark.slow)])
def test_nothing_is_wrong_in_silence(group):
    table = honesty.campaign(rr, (group,))
    wrong = {name: tally for name, tally in table.tallies.items() if tally.violated}
    assert not wrong, "\n".join(
        f"{name}: {tally.violated} of {tally.tried}, {tally.example}" for name, tally in wrong.items()
    )
    asked = [tally for name, tally in table.tallies.items() if not name.startswith(("game", "solve to tol"))]
    # An answer that is mostly NaN, or a reference that cannot tell, would violate nothing either.
    assert all(tally.tried > 0 and tally.unchecked + tally.unanswered <= 0.05 * tally.tried for tally in asked)


@pytest.fixture(scope="module")
def batch():
    """One batch of the small campaign, with programs that the test above has compiled."""
    group = honesty.SMALL[0]
    rng = np.random.default_rng(0)
    drawn = draws.draw(rng, group.lanes, group.states, group.actions, group.dtype, False, group.ends)
    m = rr.mdp(drawn.P, drawn.reward, drawn.discount, drawn.initial, layout="sas")
    reg = rr.alpha(drawn.alpha, drawn.beta, drawn.prior)
    sol, truth = rr.solve(m, reg), reference.solve(drawn.exact)
    return tallies.Batch(rr, tallies.Table(), drawn, m, reg, sol, truth, "planted", False)


def lose(x, lane=7):
    """An array with one lane of NaN."""
    x = np.asarray(x)
    return np.where(np.arange(len(x)).reshape((-1,) + (1,) * (x.ndim - 1)) == lane, np.nan, x).astype(x.dtype)


def wrong(name: str, change: Any) -> Any:
    """The library with one function's answer changed."""
    return SimpleNamespace(
        **{n: getattr(rr, n) for n in rr.__all__} | {name: lambda *a, **k: change(getattr(rr, name)(*a, **k))}
    )


def found(batch, spoilt, check):
    """Claims that are violated with a changed library, and those without an answer."""
    table = tallies.Table()
    check(dataclasses.replace(batch, rr=spoilt, table=table))
    return (
        {name for name, tally in table.tallies.items() if tally.violated},
        {name for name, tally in table.tallies.items() if tally.unanswered},
    )


def checks(batch):
    """Each function of the library with the check that looks at it and the claim that one wrong lane breaks."""
    policy = batch.draw.policy
    dr = claims.perturbations(batch, np.random.default_rng(3))
    return {
        "evaluate": (lambda b: claims.values(b, policy, "random"), "evaluate, random policy"),
        "occupancy": (lambda b: claims.visits(b, policy, "random"), "occupancy, random policy"),
        "slack": (lambda b: claims.slacks(b, dr), "slack"),
        "critical_beta": (lambda b: claims.slacks(b, dr), "critical_beta: Omega* changes sign"),
    }


@pytest.mark.parametrize("name", ["evaluate", "occupancy", "slack", "critical_beta"])
def test_wrong_numbers_are_found_and_lost_ones_counted(batch, name):
    check, claim = checks(batch)[name]
    tables = tallies.Table(), tallies.Table(), tallies.Table()
    for table, library in zip(tables, (rr, wrong(name, lambda x: 1.02 * x), wrong(name, lose))):
        check(dataclasses.replace(batch, rr=library, table=table))
    sound, spoilt, lost = (table.tallies[claim] for table in tables)
    assert spoilt.violated > 0.3 * spoilt.tried
    assert lost.unanswered == sound.unanswered + 1 and lost.violated <= sound.violated


def test_false_bounds_of_a_solve_are_found(batch):
    width = batch.sol.upper - batch.sol.lower
    low = dataclasses.replace(batch.sol, upper=batch.sol.lower - width)
    for sol, claim in (
        (low, "solve: lower <= V* <= upper"),
        (dataclasses.replace(batch.sol, tol=0.4 * batch.sol.tol), "solve: CONVERGED, upper - lower <= 2 tol"),
        (dataclasses.replace(batch.sol, lower=np.nan * batch.sol.lower), "solve: lower <= V* <= upper"),
    ):
        table = tallies.Table()
        claims.solution(dataclasses.replace(batch, table=table), sol, "solve")
        assert table.tallies[claim].violated > 0.5 * table.tallies[claim].tried


def test_false_certificates_are_found(batch):
    def above(proof):
        return dataclasses.replace(proof, lower=proof.upper + 1e-3 * abs(proof.upper) + proof.gap)

    def below(proof):
        return dataclasses.replace(proof, upper=proof.lower - 1e-3 * abs(proof.lower) - proof.gap)

    violated, _ = found(batch, wrong("certify", above), claims.certificates)
    assert {"certify: lower <= policy's guarantee", "certify: lower <= upper"} <= violated
    violated, _ = found(batch, wrong("certify", below), claims.certificates)
    assert {"certify: V* <= upper", "certify: lower <= upper"} <= violated
    _, unanswered = found(
        batch, wrong("certify", lambda proof: dataclasses.replace(proof, upper=lose(proof.upper))), claims.certificates
    )
    assert "certify: V* <= upper" in unanswered


def test_false_guarantees_are_found(batch):
    dr = claims.perturbations(batch, np.random.default_rng(3))

    def generous(got):
        return dataclasses.replace(got, total_slack=abs(got.total_slack) * 2 + abs(got.guaranteed) + abs(got.actual))

    violated, _ = found(batch, wrong("guarantee", generous), lambda b: claims.guarantees(b, dr))
    assert {"guarantee: total_slack", "guarantee: actual >= bound", "guarantee: covered, so margin >= 0"} <= violated


def test_false_derivatives_are_found(batch):
    def wrongly(sol):
        return dataclasses.replace(sol, objective=1.01 * sol.objective)

    violated, _ = found(batch, wrong("solve", wrongly), lambda b: claims.derivatives(b, np.random.default_rng(0)))
    assert {"gradient in the reward = occupancy", "derivative along a direction, forwards"} <= violated


def test_false_bounds_of_a_game_are_found(batch):
    low, high = ((batch.draw.exact.initial * x).sum(-1) for x in (batch.truth.lower, batch.truth.upper))
    room = 1e-2 * batch.draw.scale * batch.draw.exact.horizon

    def violated(primal, dual):
        played = SimpleNamespace(primal=primal, dual=dual)
        return found(batch, SimpleNamespace(solve_game=lambda *_, **__: played), claims.game)[0]

    assert not violated(low - room, high + room)
    assert violated(high + room, high + 2 * room) and violated(low - 2 * room, low - room)


@pytest.mark.parametrize("violated", [0, 3])
def test_the_script_prints_counts_and_fails_if_anything_is_violated(monkeypatch, capsys, tmp_path, violated):
    table = tallies.Table()
    slack = table.tallies["slack"]
    slack.tried, slack.unanswered, slack.violated, slack.worst, slack.example = 200, 10, violated, 0.5, "lane 7"
    monkeypatch.setattr(honesty, "campaign", lambda *_: table)
    monkeypatch.setattr(sys, "argv", ["honesty.py", "--small", "--json", str(tmp_path / "rows.jsonl")])
    assert honesty.main() == (violated > 0)
    out = capsys.readouterr().out
    assert "10 (5.0%)" in out and f"200 cases, {violated} claims violated" in out
    assert ("lane 7" in out) == (violated > 0)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["claim"]: row["violated"] for row in rows}["slack"] == violated
