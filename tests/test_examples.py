"""The worked pipelines: each runs in its small form through the command line, and each of its claims can fail."""

from pathlib import Path

import jax
import numpy as np
import pytest

from robustreg import cli
from robustreg.cli import example_config
from robustreg.examples import bandit, decide, deploy, finetune, irl, tune

CONFIGS = Path(__file__).parent.parent / "configs" / "examples"
NAMES = sorted(example_config.KINDS)


def run(capsys, *arguments):
    """Exit code, output and errors of `robustreg example`."""
    code = cli.main(["example", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def ordinary_jax():
    """Examples are programs of users: promotions are as JAX has them, not as the suite does."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_small_form_through_the_command_line(capsys, tmp_path, name):
    code, out, err = run(capsys, name, "--small", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "holds: " in out and "nan" not in out
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.npz", f"{name}.png"}
    assert all(f"wrote {tmp_path / file}" in out for file in (f"{name}.npz", f"{name}.png"))
    with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as file:
        assert len(file) > 2
        assert all(np.isfinite(x).all() for x in file.values() if x.dtype.kind == "f")


def test_every_example_has_a_configuration_and_a_line(capsys):
    assert sorted(path.stem for path in CONFIGS.glob("*.toml")) == NAMES
    code, out, _ = run(capsys, "--list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(example_config.KINDS)


def test_bad_command_lines_and_configurations(capsys, tmp_path):
    code, _, err = run(capsys, "dance", "--out", tmp_path)
    assert code == 2 and "allowed: " in err and "deploy" in err
    with pytest.raises(SystemExit) as caught:
        cli.main(["example"])
    assert caught.value.code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_key_is_named(capsys, tmp_path, name):
    path = tmp_path / f"{name}.toml"
    path.write_text((CONFIGS / f"{name}.toml").read_text().replace("seed = ", "sede = ", 1))
    code, out, err = run(capsys, path, "--out", tmp_path)
    assert (code, out) == (2, "")
    assert str(path) in err and "unknown key 'sede'; allowed: " in err and "seed" in err


def test_a_failed_claim_is_exit_code_1(capsys, tmp_path, monkeypatch):
    report = deploy.report(deploy_rows(promise=0.0), 0.9, 400)
    monkeypatch.setattr(example_config, "load", lambda *_: report)
    code, out, err = run(capsys, "deploy", "--out", tmp_path)
    assert code == 1 and "unregularised: promises kept in 100.0%" in err
    assert "holds: KL, by set" in out and (tmp_path / "deploy.npz").exists()


# ---- claims that fail


def deploy_rows(promise, calibrated=0.0):
    """Rows of 100 worlds in which every true return is 1."""
    some = deploy.Deployed(*np.ones((5, 100)))
    inside, worse = np.arange(100) < 50, np.linspace(-0.1, 0.1, 100)
    rows = [deploy.Row("unregularised", 1.0, promise + worse, inside & False, some, False)]
    for name, less in (("unregularised, by set", 1.0), ("KL, by set", 0.5)):
        rows.append(deploy.Row(name, 1.0, calibrated - less * (1 + worse), inside, some, True))
    return rows


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"promise": 2.0}, []),
        ({"promise": 0.0}, ["unregularised: promises kept in 100.0%"]),
        (
            {"promise": 2.0, "calibrated": 3.0},
            ["KL, by set: promises kept in 0.0%", "100 broken promises in 100 cases"],
        ),
    ],
)
def test_deploy_can_fail(changes, failing):
    failed = "; ".join(deploy.report(deploy_rows(**changes), 0.9, 400).failed)
    assert all(text in failed for text in failing) and bool(failed) == bool(failing)


def test_deploy_budgets_are_quantiles():
    assert deploy.budget(np.arange(1.0, 100.0), 0.9) == 90  # 0.9 of 100, not 91
    assert deploy.budget(np.arange(5.0), 0.9) == np.inf


IRL = {
    "mismatch": np.array([1e-9]),
    "mismatch_exact": np.array(1e-9),
    "kl_exact": np.array(1e-12),
    "kl": np.array([[1.0], [0.1]]),
    "drives": np.array([10, 100]),
    "backups_warm": np.array([1]),
    "backups_cold": np.array([2]),
}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, None),
        ({"mismatch": np.array([1e-2])}, "features of demonstrations are matched to 1.0e-02"),
        ({"kl_exact": np.array(1e-3)}, "recovered to a KL of 1.0e-03"),
        ({"kl": np.array([[1.0], [0.9]])}, "KL falls by 1 with 10 times"),
        ({"backups_cold": np.array([1])}, "warm starts take 1 backups"),
    ],
)
def test_irl_can_fail(change, failing):
    failed = [claim.sentence for claim in irl.claims({**IRL, **change}) if not claim.holds]
    assert len(failed) == (failing is not None) and all(failing in sentence for sentence in failed)


FINETUNE = {
    "guaranteed": np.array([[0.0], [0.999], [0.5]]),
    "best": np.array([1.0]),
    "short": np.array([0.001]),
    "relative_error": np.array([0.01]),
    "left": np.array([[1.2], [0.999]]),
    "off_boundary": np.zeros((2, 1)),
}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, None),
        ({"best": np.array([2.0]), "short": np.array([1.001])}, "training misses 50"),
        ({"short": np.array([0.002])}, "that is KL(p : p*)/beta, to 1e-03"),
        ({"relative_error": np.array([0.2])}, "the implicit reward is the reward model's to 20.0%"),
        ({"left": np.array([[0.9], [0.999]])}, "2 attacks on the boundary"),
        ({"off_boundary": np.ones((2, 1))}, "2 attacks on the boundary"),
        ({"guaranteed": np.array([[0.0], [0.999], [1.5]])}, "the best-rated token is guaranteed less"),
    ],
)
def test_finetune_can_fail(change, failing):
    failed = [claim.sentence for claim in finetune.claims({**FINETUNE, **change}) if not claim.holds]
    assert len(failed) == (failing is not None) and all(failing in sentence for sentence in failed)


DECIDE = {
    "guaranteed": np.array([[1.0, 1.1, 1.0], [1.5, 1.7, 1.6], [2.0, 2.0, 2.0]]),
    "likelihood": np.array([[-1.0, -1.0], [-1.1, -1.2]]),
    "slope": np.array([1.0, 2.0]),
    "difference": np.array([1.0, 2.0]),
}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, None),
        ({"slope": np.array([1.0, 2.1])}, "the gradient agrees with a finite difference to 5e-02"),
        ({"guaranteed": np.array([[1.0, 1.1, 1.0], [0.9, 1.3, 0.9]])}, "models for the decision guarantee"),
        (
            {"likelihood": np.array([[-1.0, -1.3], [-1.1, -1.2]])},
            "their mean log-likelihood is lower",
        ),
    ],
)
def test_decide_can_fail(change, failing):
    failed = [claim.sentence for claim in decide.claims({**DECIDE, **change}) if not claim.holds]
    assert len(failed) == (failing is not None) and all(failing in sentence for sentence in failed)


BANDIT = {
    "peace": np.array([[0.0], [1.5], [1.0]]),
    "attacked": np.array([[0.0], [0.2], [0.999]]),
    "best": np.array([1.0]),
    "slopes": np.ones((2, 3)),
}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, None),
        ({"slopes": np.array([[1.0, 2.0], [1.0, 2.1]])}, "the gradient of a round is"),
        ({"best": np.array([2.0])}, "the network misses 50"),
        ({"peace": np.array([[0.0], [0.9], [1.0]])}, "attacked, it keeps 1.00"),
    ],
)
def test_bandit_can_fail(change, failing):
    failed = [claim.sentence for claim in bandit.claims({**BANDIT, **change}) if not claim.holds]
    assert len(failed) == (failing is not None) and all(failing in sentence for sentence in failed)


TUNE = {
    "earned": np.array([[1.0, 2.0, 3.0], [1.1, 2.2, 3.0], [1.5, 2.6, 3.5]]),
    "slope": np.array([1.0, 2.0]),
    "difference": np.array([1.0, 2.0]),
}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, None),
        ({"slope": np.array([1.0, 2.1])}, "the meta-gradient agrees with differences to 5e-02"),
        ({"earned": np.array([[1.0, 2.0], [0.0, 0.1], [1.0, 2.0]])}, "more than none"),
        ({"earned": np.array([[0.0, 0.1], [1.0, 2.0], [0.9, 2.1]])}, "more than the one to begin with"),
    ],
)
def test_tune_can_fail(change, failing):
    failed = [claim.sentence for claim in tune.claims({**TUNE, **change}) if not claim.holds]
    assert len(failed) == (failing is not None) and all(failing in sentence for sentence in failed)
