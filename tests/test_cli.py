"""The command line: what it prints, what it writes, and its exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import robustreg as rr
from robustreg import archive
from robustreg.cli import commands, config
from robustreg.sweeps import outputs

CONFIGS = Path(__file__).parent.parent / "configs"
LAKE = CONFIGS / "frozen_lake.toml"
ROWS = (
    "problem states actions discount regulariser beta objective nominal_return price_of_robustness "
    "certified_gap indifference_residual iterations compile_seconds run_seconds precision status"
).split()


def table(text):
    """The printed rows as a dictionary, names with underscores."""
    rows = (re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines() if "  " in line)
    return {name.replace(" ", "_"): value for name, value in rows}


def run(capsys, *arguments):
    """Exit code, printed table, and errors of one command."""
    code = commands.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def written(tmp_path, problem, regulariser, solver=""):
    path = tmp_path / "problem.toml"
    path.write_text(f"[problem]\n{problem}\n[regulariser]\n{regulariser}\n[solver]\n{solver}\n")
    return path


def test_frozen_lake(capsys, tmp_path):
    code, out, err = run(capsys, "solve", LAKE, "--out", tmp_path / "new" / "folder")
    rows = table(out)
    assert (code, err) == (0, "")
    assert list(rows) == ROWS
    assert (rows["states"], rows["actions"], rows["beta"], rows["status"]) == ("64", "4", "300", "CONVERGED")

    job = config.load(LAKE)
    m, sol = job.problem.mdp, rr.solve(job.problem.mdp, job.regulariser)
    nominal = float(m.initial @ rr.evaluate(m, sol.policy))
    assert float(rows["objective"]) == pytest.approx(float(sol.objective), rel=1e-8)
    assert float(rows["nominal_return"]) == pytest.approx(nominal, rel=1e-8)
    assert float(rows["price_of_robustness"]) == pytest.approx(best_start_value(m) - nominal, rel=1e-3)
    assert float(rows["certified_gap"]) <= 2e-8 and float(rows["indifference_residual"]) <= 1e-8
    assert float(rows["run_seconds"]) > 0 and float(rows["compile_seconds"]) >= 0

    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == {"result.npz", "value.png", "policy.png", "perturbation.png"}
    assert all(f"wrote {tmp_path / 'new' / 'folder' / name}" in out for name in files)


def best_start_value(m):
    """Unregularised optimum by plain sweeps over the dense table, in NumPy."""
    P = np.array(m.transitions.expect(np.eye(m.n_states))).transpose(1, 2, 0)
    value = np.zeros(m.n_states)
    for _ in range(5_000):
        value = (np.array(m.reward) + float(m.discount) * P @ value).max(-1)
    return float(np.array(m.initial) @ value)


def test_results_can_be_read_without_the_library(capsys, tmp_path):
    code, out, _ = run(capsys, "solve", CONFIGS / "bandit.toml", "--out", tmp_path)
    assert code == 0
    reward, beta = np.array([1.1, 0.8, 0.7, 0.5, 0.2, -0.3]), 3.0
    value = np.log(np.mean(np.exp(beta * reward))) / beta
    with np.load(tmp_path / "result.npz", allow_pickle=False) as file:
        assert set(file) >= {"value", "policy", "perturbation", "lower", "upper", "status"}
        np.testing.assert_allclose(file["value"], [value], rtol=1e-14)
        np.testing.assert_allclose(file["policy"], [np.exp(beta * (reward - value)) / 6], rtol=1e-13)
        np.testing.assert_allclose(file["perturbation"], [reward - value], rtol=1e-13)
        assert file["lower"] <= value <= file["upper"] and file["status"] == 0
    header = archive.read_header(tmp_path / "result.npz")
    assert header["config"]["regulariser"] == {"kind": "kl", "beta": beta}
    assert header["dtype"] == "float64"
    assert header["versions"]["jax"] == jax.__version__
    assert header["table"]["objective"] == table(out)["objective"]
    sol = archive.load(tmp_path / "result.npz")
    assert isinstance(sol, rr.Solution) and bool(sol.converged)


def test_nothing_is_written_unless_asked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "solve", CONFIGS / "bandit.toml")
    assert code == 0 and "wrote" not in out and not list(tmp_path.iterdir())


def test_the_table_shows_alpha(capsys, tmp_path):
    path = written(tmp_path, 'kind = "chain"', 'kind = "alpha"\nalpha = 1.5\nbeta = 2')
    code, out, _ = run(capsys, "solve", path, "--device", "cpu")
    assert code == 0
    assert (table(out)["regulariser"], table(out)["alpha"], table(out)["beta"]) == ("Alpha", "1.5", "2")


def test_a_loose_tolerance_is_enough(capsys, tmp_path):
    path = written(tmp_path, 'kind = "ring"', 'kind = "kl"\nbeta = 5', 'kind = "value_iteration"\ntol = 1e-2')
    code, out, err = run(capsys, "solve", path)
    assert (code, err) == (0, "")
    assert 1e-5 < float(table(out)["certified_gap"]) <= 2e-2


def test_a_failed_solve_is_exit_code_1(capsys, tmp_path):
    path = written(tmp_path, 'kind = "ring"', 'kind = "kl"\nbeta = 5', 'kind = "value_iteration"\nmax_steps = 2')
    code, out, err = run(capsys, "solve", path, "--out", tmp_path / "out")
    assert code == 1
    assert table(out)["status"] == "MAX_STEPS"
    assert "MAX_STEPS" in err and "raise max_steps" in err
    assert (tmp_path / "out" / "result.npz").exists()


def test_a_failed_certificate_is_exit_code_1(capsys, monkeypatch):
    """A solution that is wrong by more than it claims does not get through."""
    solve = rr.solve

    def wrong(*arguments, **options):
        sol = solve(*arguments, **options)
        return rr.Solution(**{**vars(sol), "perturbation": sol.perturbation + 1e-6})

    monkeypatch.setattr(rr, "solve", wrong)
    code, _, err = run(capsys, "solve", CONFIGS / "bandit.toml")
    assert code == 1 and "certificate" in err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "[problem]\nkind = 'maze'\n[regulariser]\nkind = 'kl'\nbeta = 1",
            "unknown kind 'maze'; allowed: bandit",
        ),
        (
            "[problem]\nkind = 'chain'\n[regulariser]\nkind = 'kl'\ntau = 1",
            "unknown key 'tau'; allowed: beta",
        ),
        ("[problem", "Expected ']'"),
    ],
)
def test_a_bad_configuration_is_exit_code_2(capsys, tmp_path, content, expected):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    code, out, err = run(capsys, "solve", path)
    assert (code, out) == (2, "")
    assert str(path) in err and expected in err


def test_bad_command_lines_are_exit_code_2(capsys, tmp_path):
    assert run(capsys, "solve", tmp_path / "absent.toml")[0] == 2
    absent = next(kind for kind in ("tpu", "gpu") if kind not in {d.platform for d in jax.devices()})
    code, _, err = run(capsys, "solve", LAKE, "--device", absent)
    assert code == 2 and f"--device {absent}" in err and "it found: " in err
    bad = [
        ("--out", ""),
        ("--out", "a\0b"),
        ("--lost-after", "-1"),
        ("--lost-after", "nan"),
        ("--coordinator", "nohost"),
    ]
    bad += [("--coordinator", "host:0"), ("--num-processes", "0"), ("--process-id", "-1"), ("--shard", "1/x")]
    for arguments in (
        [],
        ["solve"],
        ["solve", "a\0b"],
        *(["sweep", str(LAKE), "--out", "x", *x] for x in bad),
        ["solve", str(LAKE), "--precision", "float16"],
        ["dance"],
    ):
        with pytest.raises(SystemExit) as caught:
            commands.main(arguments)
        assert caught.value.code == 2


def test_without_matplotlib_the_result_is_still_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run(capsys, "solve", CONFIGS / "bandit.toml", "--out", tmp_path)
    assert code == 0 and "robustreg[figures]" in err
    assert [path.name for path in tmp_path.iterdir()] == ["result.npz"]


def test_float32_in_a_process_of_its_own(tmp_path):
    """The precision is a setting of the whole process, so that it needs one."""
    command = [
        sys.executable,
        "-m",
        "robustreg",
        "solve",
        str(LAKE),
        "--precision",
        "float32",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = table(done.stdout)
    assert rows["precision"] == "float32" and rows["status"] == "CONVERGED"
    job = config.load(LAKE)
    truth = np.array(rr.solve(job.problem.mdp, job.regulariser).value)
    with np.load(tmp_path / "result.npz", allow_pickle=False) as file:
        assert file["value"].dtype == np.float32
        assert (file["lower"] <= truth).all() and (truth <= file["upper"]).all()


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    rows = table(out)
    assert code == 0
    assert rows["jax"] == jax.__version__ and rows["numpy"] == np.__version__
    assert "cpu" in rows["devices"] or jax.default_backend() != "cpu"
    assert rows["precisions"] == "float32, float64"


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        commands.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("robustreg")


def test_a_folder_that_cannot_be_is_refused_before_the_work(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(commands, "_run", lambda _: pytest.fail("worked in vain"))
    for command in ("solve", "certify", "sweep"):
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            code, _, err = run(capsys, command, CONFIGS / "bandit.toml", "--out", out)
            assert code == 2 and "cannot write there" in err


def test_a_refused_command_leaves_no_empty_folder(capsys, tmp_path):
    for command in ("solve", "certify", "sweep", "figure"):
        assert run(capsys, command, tmp_path / "absent.toml", "--out", tmp_path / "new" / "folder")[0] == 2
    assert not list(tmp_path.iterdir())


def test_who_closes_the_pipe_has_seen_enough(tmp_path):
    """`robustreg info | head -0` ends without a traceback; printing to a full disk, with a sentence."""
    command = f"{sys.executable} -m robustreg info"
    for line in (f"({command} | head -0)", f"{command} > /dev/full"):
        done = subprocess.run(line, shell=True, capture_output=True, text=True)
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.returncode == 1 and "cannot write standard output: No space left on device" in done.stderr


def test_outputs_are_listed(capsys):
    """Every one with its meaning, in a line that fits, without a configuration."""
    with pytest.raises(SystemExit) as end:
        commands.main(["sweep", "--list-outputs"])
    lines = capsys.readouterr().out.splitlines()
    assert not end.value.code and [line.split()[0] for line in lines] == list(outputs.OUTPUTS)
    assert all(len(line.split(maxsplit=1)[1]) > 20 and len(line) < 130 for line in lines)


def test_pictures_know_the_actions_that_the_prior_forbids(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    seen = []
    monkeypatch.setattr(commands.solution_figures, "write", lambda *arguments: seen.append(arguments[-1]) or [])
    problem = "kind = 'bandit'\nreward = [1.0, 2.0, 3.0]"
    for prior in ("", "prior = [0.5, 0.5, 0.0]"):
        path = written(tmp_path, problem, f"kind = 'kl'\nbeta = 1.0\n{prior}")
        assert run(capsys, "solve", path, "--out", tmp_path / "out")[0] == 0
    assert seen[0] is None
    np.testing.assert_array_equal(seen[1], [[False, False, True]])
