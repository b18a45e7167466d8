"""Sweeps: every cell is the solve that it stands for, and no accident costs more than the chunks in flight."""

import errno
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest

import robustreg as rr
from robustreg.cli import commands
from robustreg.sweeps import plan, progress, store
from robustreg.sweeps.store import join

engine = import_module("robustreg.sweeps.runner")
SCALARS = (
    "objective nominal_return regulariser_cost price_of_robustness worst_case_return policy_entropy gap steps status"
).split()
ARRAYS = ("value", "policy", "perturbation", "occupancy")
M = rr.problems.chain(discount=0.9)
BETAS, ALPHAS, DISCOUNTS = np.geomspace(0.1, 30, 7), np.array([0.5, 1.0, 2.0]), np.array([0.8, 0.95])
GRID = {"alpha": ALPHAS, "beta": BETAS, "discount": DISCOUNTS}
SMALL = {"beta": np.geomspace(0.1, 30, 400)}


@functools.cache
def swept():
    return rr.sweep(M, rr.alpha(1.0, 1.0), GRID, outputs=(*SCALARS, *ARRAYS), tol=1e-8, chunk=4)


@pytest.mark.slow
def test_every_cell_is_its_solve():
    """Value within certificates, everything else of the same solution; results that follow from others do."""
    table = swept()
    assert table.shape == (3, 7, 2) and table.computed.all() and (table["status"] == rr.Status.CONVERGED).all()
    alone = rr.solve(
        rr.mdp(M.transitions, M.reward, DISCOUNTS, M.initial),
        rr.alpha(ALPHAS[:, None, None], BETAS[:, None]),
        tol=1e-8,
    )
    assert np.abs(table["value"] - alone.value).max() <= 2e-8
    np.testing.assert_allclose(table["objective"], alone.objective, atol=2e-8)
    np.testing.assert_allclose(table["policy"], alone.policy, atol=1e-5)
    np.testing.assert_allclose(table["perturbation"], alone.perturbation, atol=1e-6)
    m = rr.mdp(M.transitions, M.reward, DISCOUNTS, M.initial)
    np.testing.assert_allclose(table["nominal_return"], rr.evaluate(m, table["policy"]) @ M.initial, atol=1e-8)
    np.testing.assert_allclose(table["occupancy"].sum((-1, -2)), np.broadcast_to(1 / (1 - DISCOUNTS), (3, 7, 2)))
    np.testing.assert_allclose(table["regulariser_cost"], table["nominal_return"] - table["objective"], atol=1e-12)
    np.testing.assert_allclose(table["worst_case_return"], table["objective"], atol=1e-6)
    best = np.asarray(rr.nominal_optimum(m) @ M.initial)
    np.testing.assert_allclose(table["price_of_robustness"], best - table["nominal_return"], atol=1e-7)
    entropy = np.asarray(-(table["policy"] * np.log(np.maximum(table["policy"], 1e-300))).sum(-1))
    visits = table["occupancy"].sum(-1)
    np.testing.assert_allclose(table["policy_entropy"], (entropy * visits).sum(-1) / visits.sum(-1), atol=1e-10)
    assert (table["gap"] <= 2e-8).all() and (table["steps"] >= 1).all()


def test_what_the_chunk_is_changes_nothing_beyond_the_certificate():
    small, large = (rr.sweep(M, rr.kl(1.0), SMALL, tol=1e-8, chunk=n)["objective"] for n in (3, 64))
    assert np.abs(small - large).max() <= 2e-8


def test_a_neighbour_is_a_good_start():
    """Along beta most steps are saved."""
    warm = rr.sweep(M, rr.kl(1.0), SMALL, tol=1e-8, chunk=4)["steps"]
    cold = np.asarray(rr.solve(M, rr.kl(SMALL["beta"]), tol=1e-8).steps)
    assert warm.sum() < 0.9 * cold.sum()


def test_zip_and_other_leaves():
    """Rewards, priors and initial distributions vary as well; a leaf with axes of its own is numbered."""
    rng = np.random.default_rng(0)
    rewards = np.asarray(M.reward) + rng.normal(size=(5, 6, 2))
    priors = rng.dirichlet(np.ones(2), 5)
    starts = rng.dirichlet(np.ones(6), 5)
    grid = {"beta": np.linspace(1, 5, 5), "reward": rewards, "prior": priors, "initial": starts}
    table = rr.sweep(M, rr.kl(1.0), grid, zipped=True, tol=1e-8, chunk=2)
    assert table.shape == (5,) and list(table.coordinates["reward"]) == [0, 1, 2, 3, 4]
    for i in range(5):
        m = rr.mdp(M.transitions, rewards[i], 0.9, starts[i])
        alone = rr.solve(m, rr.kl(float(grid["beta"][i]), prior=priors[i]), tol=1e-8)
        assert abs(table["objective"][i] - float(alone.objective)) <= 2e-8
    assert table.select(beta=2.0).shape == (1,)


def test_many_mdps_are_an_axis():
    m = rr.problems.garnets(5, n_states=6, n_actions=3, branching=3, discount=0.9)
    table = rr.sweep(m, rr.kl(1.0), {"beta": [0.5, 5.0]}, tol=1e-8, chunk=3)
    assert list(table.coordinates) == ["mdp", "beta"] and table.shape == (5, 2)
    for i in range(5):
        one = rr.problems.garnet(6, 3, 3, 0.9, seed=i)
        alone = rr.solve(one, rr.kl(np.array([0.5, 5.0])), tol=1e-8)
        assert np.abs(table["objective"][i] - np.asarray(alone.objective)).max() <= 2e-8


def test_a_cell_that_fails_says_so_and_disturbs_no_other():
    rewards = np.stack([np.asarray(M.reward)] * 8)
    grid = {"beta": np.linspace(1, 5, 8), "reward": rewards}
    clean = rr.sweep(M, rr.kl(1.0), grid, zipped=True, tol=1e-8, chunk=4)
    failing = rr.sweep(M, rr.kl(1.0), grid, zipped=True, tol=1e-8, chunk=4, max_steps=1)
    assert set(failing["status"]) == {int(rr.Status.MAX_STEPS)}
    assert np.isfinite(clean["objective"]).all()
    with pytest.raises(ValueError, match=r"reward\[lane=3, s=0, a=0\] is nan; rewards must be finite"):
        rr.sweep(M, rr.kl(1.0), {"reward": np.where(np.arange(8)[:, None, None] == 3, np.nan, rewards)})


# ---- tables


def test_tables_select_print_and_export(tmp_path):
    table = swept()
    picked = table.select(alpha=2.0, discount=0.95)
    assert picked.shape == (7,) and list(picked.coordinates) == ["beta"]
    np.testing.assert_array_equal(picked["value"], table["value"][2, :, 1])
    with pytest.raises(ValueError, match="alpha has no value 1.7; the nearest is 2"):
        table.select(alpha=1.7)
    with pytest.raises(KeyError, match="no axis 'gamma'"):
        table.select(gamma=1)
    with pytest.raises(KeyError, match="'entropy' is none of"):
        table["entropy"]
    text = repr(table)
    assert text.startswith("Table(alpha 3 x beta 7 x discount 2; 42 of 42 cells)") and "CONVERGED" in text
    assert len({len(line) for line in text.splitlines()[1:]}) == 1  # aligned
    lines = table.to_csv(tmp_path / "table.csv").read_text().splitlines()
    assert len(lines) == 43 and lines[0].split(",")[:4] == ["alpha", "beta", "discount", "objective"]
    assert lines[1].split(",")[-1] == "CONVERGED" and "value" not in lines[0]
    frame = table.to_pandas()
    assert frame.shape == (42, 3 + len(SCALARS))
    np.testing.assert_allclose(frame.set_index(["alpha", "beta", "discount"])["objective"], table["objective"].ravel())
    dataset = table.to_xarray()
    np.testing.assert_array_equal(dataset["value"].sel(alpha=0.5, discount=0.8), table["value"][0, :, 0])


# ---- arguments


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"grid": {}}, "the grid is empty"),
        ({"grid": {"beta": []}}, "the grid is empty"),
        ({"grid": {"gamma": [0.9]}}, "unknown leaf 'gamma' in the grid; there are: discount"),
        ({"grid": {"alpha": [0.9]}}, "unknown leaf 'alpha'"),
        ({"grid": {"beta": [1.0, -1.0]}}, r"beta\[1\] is -1.0: beta must be positive and finite"),
        ({"grid": {"state_scale": np.eye(2, 6)}}, r"state_scale\[0, 1\] is 0.0: state_scale must be positive"),
        ({"grid": {"discount": [0.5, 1.0]}}, r"discount\[lane=1\] is 1; it must lie in \[0, 1\)"),
        ({"grid": {"prior": [[0.5, 0.5], [0.5, 0.4]]}}, r"prior\[1\] sums to 0.9 over actions, not 1"),
        ({"grid": {"prior": [[1.5, -0.5]]}}, r"prior\[0, 1\] is -0.5: prior must be non-negative"),
        ({"grid": {"initial": np.eye(3, 6) * 0.9}}, r"initial\[lane=0\] sums to 0.9, not 1"),
        ({"grid": {"initial": np.ones((2, 5)) / 5}}, r"initial has shape \(2, 5\); expected \[\*B, S\] = \[\*B, 6\]"),
        ({"grid": {"reward": np.ones((2, 2, 6))}}, r"reward has shape \(2, 2, 6\)"),
        ({"grid": {"alpha": [np.inf]}, "reg": rr.alpha(1.0, 1.0)}, r"alpha\[0\] is inf: alpha must be finite"),
        ({"grid": {"beta": [[1.0]]}}, r"beta has shape \(1, 1\)"),
        ({"grid": {"beta": [1.0], "discount": [0.5, 0.9]}, "zipped": True}, "equally long, got {'beta': 1, 'disc"),
        ({"outputs": ("speed",)}, "unknown output 'speed'; there are: objective"),
        ({"reg": rr.kl(np.ones(3))}, "no batch axes"),
    ],
)
def test_bad_arguments(change, expected):
    call = {"mdp": M, "reg": rr.kl(1.0), "grid": SMALL} | change
    with pytest.raises(ValueError, match=expected):
        rr.sweep(call.pop("mdp"), call.pop("reg"), call.pop("grid"), **call)


# ---- folders


def same(a, b):
    """Two tables hold the same bits."""
    assert a.computed.all() and b.computed.all() and list(a.columns) == list(b.columns)
    return all((a[name] == b[name]).all() for name in a.columns)


def run(out, **how):
    return rr.sweep(M, rr.kl(1.0), SMALL, tol=1e-8, chunk=1, out=out, **how)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed") / "out")


def test_a_killed_run_resumes_where_it_was(tmp_path, undisturbed):
    """kill -9 in the middle: nothing finished is computed again, and the table is that of an undisturbed run."""
    script = f"""
import os, signal, jax
jax.config.update("jax_enable_x64", True)
import numpy as np, robustreg as rr
seen = []
def die(state):
    seen.append(state["cells"])
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
rr.sweep(rr.problems.chain(discount=0.9), rr.kl(1.0), {{"beta": np.geomspace(0.1, 30, 400)}}, tol=1e-8, chunk=1,
         out={str(tmp_path / "out")!r}, progress=die)
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("chunk-*.npz")}
    assert 1 <= len(kept) < 8
    computed = []
    table = run(tmp_path / "out", resume=True, progress=computed.append)
    assert len(computed) == 8 - len(kept)
    assert {
        n: t for n, t in ((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "out").glob("*.npz")) if n in kept
    } == kept
    assert same(table, undisturbed) and computed[-1]["cells"] == 400
    assert not list((tmp_path / "out").glob(".*partial"))


def test_half_a_file_is_computed_again(tmp_path, undisturbed):
    run(tmp_path)
    path = sorted(tmp_path.glob("chunk-*.npz"))[2]
    path.write_bytes(path.read_bytes()[:100])
    computed = []
    assert same(run(tmp_path, resume=True, progress=computed.append), undisturbed) and len(computed) == 1


def test_another_sweep_in_the_folder_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="holds this sweep already; pass resume=True"):
        run(tmp_path)
    changes = [
        ({"tol": 1e-6}, "tol"),
        ({"outputs": ("gap",)}, "outputs"),
        ({"solver": rr.ValueIteration()}, "solver"),
        ({"chunk": 2}, "chunk"),
    ]
    for change, name in changes:
        with pytest.raises(ValueError, match=rf"another (sweep \(it differs in: )?{name}"):
            rr.sweep(M, rr.kl(1.0), SMALL, **({"tol": 1e-8, "chunk": 1, "out": tmp_path, "resume": True} | change))
    with pytest.raises(ValueError, match="differs in: data"):
        rr.sweep(M, rr.kl(1.0, prior=np.array([0.4, 0.6])), SMALL, tol=1e-8, chunk=1, out=tmp_path, resume=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["sweep"]["dtype"] == "float64" and "jax" in manifest["versions"]


def test_a_folder_keeps_the_layout_of_the_devices_that_began_it(tmp_path, monkeypatch):
    """Begun on an accelerator, which lays cells out otherwise, and finished here: bit for bit what that would get."""
    grid = {"beta": np.geomspace(0.1, 30, 60), "discount": [0.8, 0.9]}
    original, here = plan._sizes, plan.make_plan(M, rr.kl(1.0), grid, ("objective",), False, None, jax.local_devices())
    with monkeypatch.context() as m:
        # What `_sizes` says for a card: all cells at once, on short paths.
        m.setattr(plan, "_sizes", lambda *_: (8, 16, 3, 7))
        whole = rr.sweep(M, rr.kl(1.0), grid, tol=1e-8)
        rr.sweep(M, rr.kl(1.0), grid, tol=1e-8, out=tmp_path / "half", part=(0, 2))
        rr.sweep(M, rr.kl(1.0), grid, tol=1e-8, out=tmp_path / "other", shard=(1, 2))  # the older word
    layout = json.loads((tmp_path / "half" / "manifest.json").read_text())["layout"]
    assert plan._sizes is original and layout != plan.layout_of(here)
    kept = len(list((tmp_path / "half").glob("chunk-*.npz")))
    every = join([tmp_path / name for name in ("half", "other")], tmp_path / "all")
    joined = rr.sweep(M, rr.kl(1.0), grid, tol=1e-8, out=every, resume=True, part=None)
    resumed = rr.sweep(M, rr.kl(1.0), grid, tol=1e-8, out=tmp_path / "half", resume=True)
    assert 0 < kept < len(list((tmp_path / "half").glob("chunk-*.npz")))
    assert resumed == whole and joined == whole
    with pytest.raises(ValueError, match="begun with another chunk"):
        rr.sweep(M, rr.kl(1.0), grid, tol=1e-8, out=tmp_path / "half", resume=True, chunk=5)
    rr.sweep(M, rr.kl(1.0), grid, tol=1e-8, out=tmp_path / "mine", part=(1, 2))
    with pytest.raises(ValueError, match="begin parts on unlike machines with one and the same chunk"):
        join([tmp_path / "other", tmp_path / "mine"], tmp_path / "none")
    for text in ("", "{}", '{"sweep": {}, "layout": []}'):
        (tmp_path / "mine" / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="no manifest of a sweep"):
            rr.sweep(M, rr.kl(1.0), grid, tol=1e-8, out=tmp_path / "mine", resume=True)
    (tmp_path / "mine" / "manifest.json").write_text(
        (tmp_path / "half" / "manifest.json").read_text().replace('"length": 7', '"length": 6')
    )
    with pytest.raises(ValueError, match="in an order that this version"):
        rr.sweep(M, rr.kl(1.0), grid, tol=1e-8, out=tmp_path / "mine", resume=True)


def test_a_chunk_that_was_asked_for_is_the_same_on_every_device():
    card = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 2**36})
    grid = {"beta": np.geomspace(0.1, 30, 600)}
    made = [plan.make_plan(M, rr.kl(1.0), grid, ("gap",), False, 7, where) for where in (jax.local_devices(), [card])]
    assert plan.layout_of(made[0]) == plan.layout_of(made[1])


KERNEL = """
import sys
import jax.numpy as jnp
import robustreg as rr
P = jnp.array([[[0.5, 0.5], [1.0, 0.0]], [[0.0, 1.0], [0.5, 0.5]]], jnp.float32)
P = P if sys.argv[2] == "same" else jnp.full((2, 2, 2), 0.5)
m = rr.mdp(rr.MatrixFree(lambda v: P @ v, n_states=2, n_actions=2), jnp.eye(2, dtype=jnp.float32), 0.9)
rr.sweep(m, rr.kl(1.0), {"beta": [1.0, 2.0, 4.0]}, out=sys.argv[1], resume=True, chunk=1)
"""  # fmt: skip


@pytest.mark.slow
def test_matrix_free_sweeps_are_resumed_in_another_process(tmp_path):
    """A function lies elsewhere in every process, and what it closes over is no leaf."""

    def begin(what):
        command = [sys.executable, "-c", KERNEL, str(tmp_path), what]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_ENABLE_X64": "0"})

    for _ in range(2):
        assert begin("same").returncode == 0
    assert "differs in: kernel" in begin("other").stderr


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"tol": -1e-3}, "tol must be positive"), ({"tol": 0.0}, "tol must be positive"),
        ({"tol": [1e-3, 1e-2]}, "one number for all cells"), ({"chunk": -3}, "chunk must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"), ({"chunk": 2.5}, "chunk must be an integer"),
        ({"max_steps": 0}, "max_steps must be at least 1"), ({"part": (3, 2)}, "0 <= i < n"),
        ({"part": (-1, 2)}, "0 <= i < n"), ({"part": (0, 0)}, "0 <= i < n"),
        ({"part": 3}, r"part must be \(i, n\)"),
        ({"outputs": "gap"}, "sequence of names"), ({"solver": rr.Newton}, "instance"),
    ],
)  # fmt: skip
def test_what_solve_refuses_a_sweep_refuses(wrong, text):
    with pytest.raises((ValueError, TypeError), match=text):
        rr.sweep(M, rr.kl(1.0), SMALL, **wrong)


def test_no_prior_for_what_has_none():
    with pytest.raises(ValueError, match="unknown leaf 'prior' in the grid; there are: .*beta"):
        rr.sweep(M, rr.entropy(1.0), {"prior": np.full((1, 2), 0.5)})


def test_large_tables_print_their_ends_at_once():
    n = 300_000
    columns = {"objective": np.arange(n, dtype=float), "status": np.zeros(n, np.int32)}
    table = rr.Table({"beta": np.geomspace(0.1, 1, n)}, columns, False, np.ones(n, bool))
    start = time.perf_counter()
    text = repr(table)
    assert time.perf_counter() - start < 0.1
    assert text.count("\n") == 13 and "299999" in text and "300000 of 300000 cells" in text
    assert len(list(table.rows())) == n
    other = rr.Table(table.coordinates, columns | {"objective": columns["objective"] + 1}, False, table.computed)
    assert table == rr.Table(table.coordinates, dict(columns), False, table.computed) and table != other
    assert table != "a table"


def test_a_full_disk_is_an_error_that_keeps_what_there_is(tmp_path, monkeypatch, undisturbed):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(rr.SweepError, match="No space left on device; finished chunks are kept"):
        run(tmp_path)
    monkeypatch.setattr(store.os, "fsync", real)
    assert len(list(tmp_path.glob("chunk-*.npz"))) == 2 and not list(tmp_path.glob(".*partial"))
    assert same(run(tmp_path, resume=True), undisturbed)


def test_a_folder_that_cannot_be_is_an_error_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(engine, "_solve_chunk", lambda *_: pytest.fail("worked in vain"))
    with pytest.raises(rr.SweepError, match="cannot make the folder"):
        run(tmp_path / "file" / "out")


def test_parts_join_to_the_whole(tmp_path, undisturbed):
    parts = [run(tmp_path / f"part{i}", part=(i, 3)) for i in range(3)]
    assert sum(part.computed.sum() for part in parts) == 400
    assert not (parts[0].computed & parts[1].computed).any() and np.isnan(parts[0]["objective"]).any()
    store.join([tmp_path / "part0", tmp_path / "part2"], tmp_path / "whole")
    assert run(tmp_path / "whole", resume=True, part=None).computed.sum() < 400
    store.join([tmp_path / f"part{i}" for i in range(3)], tmp_path / "whole")
    assert same(run(tmp_path / "whole", resume=True, part=None), undisturbed)
    rr.sweep(M, rr.kl(1.0), SMALL, tol=1e-6, out=tmp_path / "other")
    with pytest.raises(ValueError, match="hold different sweeps"):
        store.join([tmp_path / "part0", tmp_path / "other"], tmp_path / "mixed")
    with pytest.raises(ValueError, match="holds no sweep"):
        store.join([tmp_path / "nothing"], tmp_path / "mixed")


# ---- command line

CONFIG = """
[problem]
kind = "chain"
discount = 0.9
[regulariser]
kind = "kl"
beta = 1.0
[solver]
tol = 1e-6
[sweep]
beta = { from = 0.1, to = 30.0, count = 40, spacing = "log" }
chunk = 1
"""


def command(capsys, *arguments):
    code = commands.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line(capsys, tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(CONFIG)
    code, out, err = command(capsys, "sweep", path, "--out", tmp_path / "a")
    assert (
        code == 0
        and out.startswith("Table(beta 40; 40 of 40 cells)")
        and f"wrote {tmp_path / 'a' / 'table.csv'}" in out
    )
    assert "40/40 cells" in err and "failed" not in err
    assert f"wrote {tmp_path / 'a' / 'returns.png'}" in out and (tmp_path / "a" / "returns.png").stat().st_size > 5000
    assert len((tmp_path / "a" / "table.csv").read_text().splitlines()) == 41
    code, _, err = command(capsys, "sweep", path, "--out", tmp_path / "a")
    assert code == 2 and "resume" in err
    assert command(capsys, "sweep", path, "--out", tmp_path / "a", "--resume")[0] == 0
    for i in range(2):
        code, out, err = command(capsys, "sweep", path, "--out", tmp_path / f"p{i}", "--shard", f"{i}/2")
        # A part that did all of its work is no failure; of some of the cells there is no picture.
        assert code == 0 and f"part {i} of 2 is done: " in out and " of 40 cells are here" in out
        assert {x.suffix or x.name for x in (tmp_path / f"p{i}").iterdir()} == {".npz", ".json", ".csv", ".lock"}
    code, _, err = command(capsys, "merge", path, tmp_path / "p0", "--out", tmp_path / "half")
    assert code == 1 and "of 40 cells are not there: a part is missing" in err
    merged = command(capsys, "merge", path, tmp_path / "p0", tmp_path / "p1", "--out", tmp_path / "b")
    assert merged[0] == 0
    assert (tmp_path / "b" / "table.csv").read_text() == (tmp_path / "a" / "table.csv").read_text()
    path.write_text(CONFIG.replace("tol = 1e-6", "tol = 1e-30"))
    code, out, err = command(capsys, "sweep", path, "--out", tmp_path / "c")
    assert code == 1 and "STAGNATED" in out and "40 cells did not converge" in err and "40 failed" in err
    with pytest.raises(SystemExit):
        commands.main(["sweep", str(path), "--out", str(tmp_path / "d"), "--shard", "2/2"])
    assert "the part runs from 0 to 1" in capsys.readouterr().err
    assert Path(tmp_path / "d").exists() is False


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path, undisturbed):
    """Also to who wants to resume; reading is free, parts may share, and nothing of the living is removed."""
    folder = tmp_path / "out"
    computed = []

    def intrude(state):
        computed.append(state)
        if len(computed) == 1:
            partial = folder / f".chunk-0000000.npz.{socket.gethostname()}.{os.getpid()}.partial"
            partial.touch()
            for how in ({"part": (0, 1)}, {"part": (0, 2)}):
                with pytest.raises(store.SweepError, match="another run is writing"):
                    run(folder, resume=True, **how)
            assert 0 < np.isfinite(run(folder, resume=True, part=None)["objective"]).sum() < 400
            assert partial.exists()
            partial.unlink()

    assert same(run(folder, progress=intrude), undisturbed)
    assert same(run(folder, resume=True), undisturbed)
    assert not (folder / ".lock").exists()


def test_a_lock_that_is_taken_away_meanwhile_keeps_nobody_out(tmp_path, monkeypatch):
    """Between opening and locking it: its last owner has ended, and the next run makes a file of its own."""
    fcntl, opened = store.fcntl, []

    def flock(file, how):
        opened.append(file)
        if len(opened) == 1:
            (tmp_path / ".lock").unlink()
        fcntl.flock(file, how)

    monkeypatch.setattr(store, "fcntl", types.SimpleNamespace(**{**vars(fcntl), "flock": flock}))
    with store.Store(tmp_path).held(alone=True):
        assert len(opened) == 2 and opened[0].closed
        with pytest.raises(store.SweepError, match="another run is writing"), store.Store(tmp_path).held(alone=False):
            pass
    assert not (tmp_path / ".lock").exists()


def test_what_killed_parts_left_is_removed_by_others(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    run(tmp_path / "out", part=(0, 2))
    left, living, elsewhere = (
        tmp_path / "out" / f".chunk-0000000.npz.{host}.{pid}.partial"
        for host, pid in ((socket.gethostname(), dead.pid), (socket.gethostname(), os.getpid()), ("other", dead.pid))
    )
    for path in (left, living, elsewhere):
        path.touch()
    run(tmp_path / "out", resume=True, part=(1, 2))
    assert not left.exists() and living.exists() and elsewhere.exists()


def test_what_is_left_is_told_without_the_time_of_compiling(capsys, monkeypatch):
    """The first chunk takes as long as making the program; from then on the rate is that of the work."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    seen: list[dict] = []
    report = progress.reporter(seen.append, 100, 0)
    for seconds in (40.0, 41.0, 42.0):
        clock[0] = seconds
        report(10, 0)
    assert [round(state["eta"], 6) for state in seen[1:]] == [8.0, 7.0]
    assert np.isnan(seen[0]["eta"]) and np.isnan(seen[0]["rate"])
    report = progress.reporter(True, 100, 20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])  # a line every ten seconds
    for seconds, cells in ((80.0, 10), (100.0, 10), (101.0, 60)):
        clock[0] = seconds
        report(cells, 0)
    assert capsys.readouterr().err.splitlines() == [
        "20/100 cells, compiling",
        "30/100 cells",
        "40/100 cells, 0.5/s, 120 s left",
        "100/100 cells, 3.3/s, 0 s left",
    ]
