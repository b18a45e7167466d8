"""`robustreg certify`: what it prints, what it writes, and its exit codes, which are the verdict."""

import numpy as np
import pytest
from test_cli import run, table, written

from robustreg import archive
from robustreg.cli import commands

REWARD, BETA = np.array([1.1, 0.8, 0.7, 0.5, 0.2, -0.3]), 3.0
VALUE = np.log(np.mean(np.exp(BETA * REWARD))) / BETA
CHAIN = 'kind = "chain"\nn_states = 4\ndiscount = 0.9'


@pytest.fixture(scope="module")
def bandit(tmp_path_factory):
    """A configuration of one decision."""
    return written(tmp_path_factory.mktemp("bandit"), 'kind = "bandit"', f'kind = "kl"\nbeta = {BETA}')


@pytest.fixture(scope="module")
def solved(bandit):
    """Its result, as `robustreg solve` writes it."""
    assert commands.main(["solve", str(bandit), "--out", str(bandit.parent)]) == 0
    return bandit.parent / "result.npz"


def packed(path, **arrays):
    np.savez(path, **arrays)
    return path


def price(dr, beta=BETA):
    """Omega* of KL with a uniform prior."""
    return np.log(np.mean(np.exp(beta * dr))) / beta


def critical(dr):
    """Largest beta with Omega*(dr) <= 0, by bisection."""
    low, high = 1e-3, 1e3
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.mean(np.exp(middle * dr)) <= 1 else (low, middle)
    return low


def test_a_result_is_certified_anew(capsys, solved):
    code, out, err = run(capsys, "certify", solved)
    rows = table(out)
    assert (code, err) == (0, "")
    assert rows["verdict"] == "holds: the guarantee is certified"
    guarantee, width = (float(x) for x in rows["guarantee"].split(" ± "))
    assert guarantee == pytest.approx(VALUE, rel=1e-8) and width <= 1e-12
    assert (rows["problem"], rows["regulariser"], rows["precision"]) == ("bandit", "KL(beta=3)", "float64")


def test_a_configuration_is_solved_first(capsys, bandit):
    code, out, _ = run(capsys, "certify", bandit)
    assert code == 0 and float(table(out)["guarantee"].split(" ± ")[0]) == pytest.approx(VALUE, rel=1e-8)


def test_a_result_that_was_tampered_with_fails(capsys, solved, tmp_path):
    """The certificate trusts nothing but the problem: each array in turn is found out."""
    sol, header = archive.load(solved), archive.read_header(solved)
    for name, change in (("value", 1e-6), ("perturbation", 1e-6), ("policy", 0.01 * np.array([[1, -1, 0, 0, 0, 0]]))):
        wrong = type(sol)(**{**vars(sol), name: getattr(sol, name) + change})
        path = archive.save(tmp_path / f"{name}.npz", wrong, header)
        code, out, err = run(capsys, "certify", path)
        assert code == 1 and table(out)["verdict"].startswith("fails: certificate: ") and "fails" in err
    stronger = {**header, "config": {**header["config"], "regulariser": {"kind": "kl", "beta": 1.0}}}
    assert run(capsys, "certify", archive.save(tmp_path / "stronger.npz", sol, stronger))[0] == 1


def test_deployed_rewards_within_the_set_and_outside(capsys, bandit, tmp_path):
    policy = np.exp(BETA * (REWARD - VALUE)) / 6
    inside = np.array([0.3, 0.1, -0.2, -0.1, -0.5, -1.0])
    lucky = np.array([-0.1, 0.0, 0.0, 0.0, 0.0, 1.0])
    outside = np.array([1.5, 0.0, 0.0, 0.0, 0.0, -0.5])
    assert price(inside) < 0 < price(lucky) and 0 < price(outside)
    expected = {
        "holds: the deployed reward is in the robust set": (inside, 0),
        "holds, but by luck: the deployed reward is outside the robust set": (lucky, 0),
        "fails: under the deployed reward the policy earns less than its guarantee": (outside, 1),
    }
    for verdict, (dr, expected_code) in expected.items():
        path = packed(tmp_path / "deployed.npz", reward=(REWARD - dr)[None])
        code, out, _ = run(capsys, "certify", bandit, "--deployed", path)
        rows = table(out)
        assert (code, rows["verdict"]) == (expected_code, verdict)
        earned = policy @ (REWARD - dr)
        assert float(rows["deployed_return"]) == pytest.approx(earned, abs=1e-8)
        assert float(rows["margin"]) == pytest.approx(earned - VALUE, abs=1e-8)
        assert float(rows["bound_there"]) == pytest.approx(VALUE - price(dr), abs=1e-8)
        beta = critical(dr) if dr.mean() < 0 else 0.0
        assert float(rows["critical_beta"].split()[0]) == pytest.approx(beta, rel=1e-5)
        assert rows["in_the_robust_set"] == ("yes, in every state" if price(dr) <= 0 else "no")


def test_a_policy_of_ones_own(capsys, bandit, tmp_path):
    mine = np.array([0.5, 0.3, 0.2, 0.0, 0.0, 0.0])
    guarantee = mine @ REWARD - np.sum(mine[:3] * np.log(6 * mine[:3])) / BETA
    path = packed(tmp_path / "mine.npz", policy=mine[None].astype(np.float32))
    code, out, err = run(capsys, "certify", bandit, "--policy", path, "--out", tmp_path / "out")
    rows = table(out)
    assert (code, err) == (0, "")
    assert float(rows["guarantee"]) == pytest.approx(guarantee, abs=1e-6)
    assert float(rows["under_its_worst_case"]) == pytest.approx(float(rows["guarantee"]), rel=1e-8)
    assert float(rows["best_guarantee_of_any_policy"]) == pytest.approx(VALUE, abs=1e-8)
    assert float(rows["given_away"]) == pytest.approx(VALUE - guarantee, abs=1e-4)
    with np.load(tmp_path / "out" / "certificate.npz", allow_pickle=False) as file:
        assert set(file) == {"header", "lower", "worst_case", "worst_case_value"}
        assert float(file["lower"][0]) <= guarantee + 1e-6
        assert '"holds": true' in str(file["header"])


def test_a_policy_without_any_guarantee(capsys, tmp_path):
    config = written(tmp_path, CHAIN, 'kind = "kl"\nbeta = 2.0\nprior = [1.0, 0.0]')
    path = packed(tmp_path / "mine.npz", policy=np.full((4, 2), 0.5))
    code, out, _ = run(capsys, "certify", config, "--policy", path)
    assert code == 1 and "nothing is guaranteed" in table(out)["verdict"]


def test_a_policy_and_a_reward_over_time(capsys, tmp_path):
    """A deployed reward may be outside the set in a state and inside on average over visits."""
    config = written(tmp_path, CHAIN, 'kind = "kl"\nbeta = 2.0\nprior = [0.5, 0.5]')
    policy = packed(tmp_path / "mine.npz", policy=np.tile([0.3, 0.7], (4, 1)))
    m = commands.config.load(config).problem.mdp
    dr = np.full((4, 2), -0.2)
    dr[1] = 0.05
    deployed = packed(tmp_path / "deployed.npz", reward=np.array(m.reward) - dr)
    code, out, _ = run(capsys, "certify", config, "--policy", policy, "--deployed", deployed, "--out", tmp_path)
    rows = table(out)
    assert code == 0 and rows["in_the_robust_set"] == "yes, on average over visits"
    assert float(rows["guarantee"]) == pytest.approx(float(rows["under_its_worst_case"]), rel=1e-8)
    kernel = np.array(m.transitions.expect(np.eye(4))).transpose(1, 2, 0)
    chain = np.einsum("sa,sat->st", np.tile([0.3, 0.7], (4, 1)), kernel)
    paid = (np.array(m.reward) - dr) @ [0.3, 0.7]
    earned = np.array(m.initial) @ np.linalg.solve(np.eye(4) - 0.9 * chain, paid)
    assert float(rows["deployed_return"]) == pytest.approx(earned, abs=1e-8)
    with np.load(tmp_path / "certificate.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(file["deployed_slack"], [0.2, -0.05, 0.2, 0.2], atol=1e-14)
        assert (file["deployed_critical_beta"] == [np.inf, 0, np.inf, np.inf]).all()


@pytest.mark.parametrize(
    ("option", "arrays", "expected"),
    [
        ("--policy", {"pi": np.full((1, 6), 1 / 6)}, "no array `policy`; it holds: pi"),
        ("--policy", {"policy": np.full((6, 1), 1.0)}, "policy has shape (6, 1); expected"),
        ("--policy", {"policy": np.full((1, 1, 6), 1 / 6)}, "without batch axes"),
        ("--policy", {"policy": np.full((1, 6), 0.2)}, "a policy sums to 1 over actions"),
        ("--policy", {"policy": np.array([["a"] * 6])}, "pass an array of real numbers"),
        ("--deployed", {"policy": np.full((1, 6), 0.2)}, "no array `reward`; it holds: policy"),
        ("--deployed", {"reward": np.full((1, 5), 0.2)}, "reward has shape (1, 5); expected"),
        ("--deployed", {"reward": np.array([[0, 0, np.nan, 0, 0, 0]])}, "reward[s=0, a=2] is nan"),
    ],
)
def test_bad_arrays_are_exit_code_2(capsys, bandit, tmp_path, option, arrays, expected):
    path = packed(tmp_path / "file.npz", **arrays)
    code, out, err = run(capsys, "certify", bandit, option, path)
    assert (code, out) == (2, "")
    assert str(path) in err and expected in err


def test_bad_files_are_exit_code_2(capsys, bandit, solved, tmp_path):
    for name in ("absent.toml", "absent.npz"):
        code, _, err = run(capsys, "certify", tmp_path / name)
        assert code == 2 and name in err
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    for arguments in ([text], [bandit, "--policy", text], [bandit, "--deployed", tmp_path / "absent.npz"]):
        code, _, err = run(capsys, "certify", *arguments)
        assert code == 2 and ".npz" in err
    sol, header = archive.load(solved), archive.read_header(solved)
    without = archive.save(tmp_path / "without.npz", sol, {})
    code, _, err = run(capsys, "certify", without)
    assert code == 2 and "`robustreg solve --out` writes one" in err
    other = {**header, "config": {**header["config"], "problem": {"kind": "chain"}}}
    code, _, err = run(capsys, "certify", archive.save(tmp_path / "other.npz", sol, other))
    assert code == 2 and "value has shape (1,), its configuration says (6,)" in err
    tau = {**header, "config": {**header["config"], "regulariser": {"kind": "kl", "tau": 1.0}}}
    code, _, err = run(capsys, "certify", archive.save(tmp_path / "tau.npz", sol, tau))
    assert code == 2 and "unknown key 'tau'; allowed: beta" in err and "tau.npz" in err


def test_a_configuration_that_cannot_be_solved_is_exit_code_1(capsys, tmp_path):
    path = written(tmp_path, CHAIN, 'kind = "kl"\nbeta = 5', 'kind = "value_iteration"\nmax_steps = 2')
    code, _, err = run(capsys, "certify", path)
    assert code == 1 and "MAX_STEPS" in err
