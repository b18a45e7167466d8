"""Several processes on one sweep: real ones, on this machine, among them one that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from robustreg.cli import commands
from robustreg.sweeps.cluster import Peers
from robustreg.sweeps.store import SweepError

# Many compilations: the run on the oldest releases leaves this file out.
pytestmark = pytest.mark.slow

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
beta = { from = 0.1, to = 30.0, count = 100, spacing = "log" }
chunk = 1
"""
# Process VICTIM kills itself in the middle of its second chunk.
DYING = """
import os, signal, sys
from robustreg import cli
from robustreg.sweeps import store
put, seen = store.Store.put, []
def die(self, job, fields):
    seen.append(job)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, job, fields)
store.Store.put = die
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "sweep.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    assert commands.main(["sweep", str(config), "--out", str(out)]) == 0
    return (out / "table.csv").read_bytes()


def together(config, out, *more, victim=None):
    """Exit code and what was printed, of each of two processes that run one command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["sweep", config, "--out", out, "--distributed", "--coordinator", address, "--num-processes", 2, *more]
    children = []
    for i in range(2):
        start = ["-c", DYING] if i == victim else ["-m", "robustreg"]
        line = [sys.executable, *start, *command, "--process-id", i]
        children.append(
            subprocess.Popen([str(x) for x in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        outputs = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *output) for child, output in zip(children, outputs)]


def test_two_processes_share_a_sweep(config, undisturbed, tmp_path):
    first, second = together(config, tmp_path, "--lost-after", 60)
    assert first[0] == 0 and first[1].startswith("Table(beta 100; 100 of 100 cells)"), first
    assert second[:2] == (0, "process 1 of 2 is done; process 0 has the table\n"), second
    assert (tmp_path / "table.csv").read_bytes() == undisturbed
    states = [json.loads((tmp_path / "processes" / f"{i}.json").read_text()) for i in range(2)]
    assert [state["state"] for state in states] == ["done", "done"] and states[0]["pid"] != states[1]["pid"]
    # A folder that holds the sweep already is refused by one and by all.
    first, second = together(config, tmp_path)
    assert first[0] == 2 and "holds this sweep already; add --resume to go on with it" in first[2], first
    assert second[0] == 1 and "process 0 (" in second[2] and "failed: " in second[2], second


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_ends_the_other_and_resume_completes(victim, config, undisturbed, tmp_path):
    start = time.monotonic()
    ended = together(config, tmp_path, "--lost-after", 3, victim=victim)
    assert time.monotonic() - start < 60
    assert ended[victim][0] == -signal.SIGKILL, ended
    code, out, err = ended[1 - victim]
    assert code == 1 and "Traceback" not in err and out == "", ended
    assert f"robustreg: process {victim} ({socket.gethostname()}, pid " in err, err
    assert "is lost, nothing was heard of it for 3 s; finished chunks are kept: start all processes again" in err
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("chunk-*.npz")}
    assert kept and not (tmp_path / "table.csv").exists()
    assert [code for code, *_ in together(config, tmp_path, "--resume", "--lost-after", 60)] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (tmp_path / "table.csv").read_bytes() == undisturbed


# ---- one process that sees the others' files


@pytest.fixture
def group(tmp_path):
    """Process 0 of three, not started; and a way to speak for the others."""
    zero = Peers(tmp_path, 0, 3, timeout=0.5)

    def said(index, beat, state="working", message=""):
        about = {"process": index, "host": "far", "pid": 7, "state": state, "message": message, "beat": beat}
        (tmp_path / f"{index}.json").write_text(json.dumps(about))

    return zero, said


def test_silence_is_a_loss_and_half_a_file_is_silence(group, tmp_path):
    zero, said = group
    start = time.monotonic()
    beat = 0
    with pytest.raises(SweepError, match=r"process 2 \(far, pid 7\) is lost, nothing was heard of it for 0.5 s"):
        said(2, 0)
        while time.monotonic() - start < 10:
            beat += 1
            said(1, beat)
            (tmp_path / "2.json").write_text("{" if beat > 1 else (tmp_path / "2.json").read_text())
            zero.check()
            time.sleep(0.02)
    assert 0.5 < time.monotonic() - start < 5


def test_a_failure_is_passed_on_at_once_with_its_reason(group):
    zero, said = group
    said(1, 1, "done")
    said(2, 1, "failed", "no space left")
    with pytest.raises(SweepError, match=r"process 2 \(far, pid 7\) failed: no space left; finished chunks are kept"):
        zero.wait(("done",))


def test_waiting_ends_when_all_are_done_and_done_is_never_lost(group):
    zero, said = group
    said(1, 1, "done")
    said(2, 1, "done")
    zero.wait(("done",))
    time.sleep(0.7)
    zero.check()


def test_one_says_what_it_does_until_it_leaves(tmp_path):
    read = tmp_path / "1.json"
    with pytest.raises(ValueError), Peers(tmp_path, 1, 2, timeout=0.2) as one:
        one.say("working")
        first = json.loads(read.read_text())
        time.sleep(0.2)
        second = json.loads(read.read_text())
        raise ValueError("a bad grid")
    assert first["state"] == second["state"] == "working" and second["beat"] > first["beat"]
    assert first["pid"] == os.getpid() and first["host"] == socket.gethostname()
    last = json.loads(read.read_text())
    assert (last["state"], last["message"]) == ("failed", "a bad grid")


# ---- command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--process-id", "1"], "--process-id goes with --distributed"),
        (["--lost-after", "5"], "--lost-after goes with --distributed"),
        (["--distributed", "--shard", "0/2"], "--part and --distributed exclude each other"),
    ],
)
def test_options_that_do_not_go_together(arguments, expected, config, tmp_path, capsys):
    assert commands.main(["sweep", str(config), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_jax_cannot_find_out_is_asked_for(config, tmp_path):
    line = [sys.executable, "-m", "robustreg", "sweep", str(config), "--out", str(tmp_path / "out"), "--distributed"]
    child = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert child.returncode == 2 and "--distributed: coordinator_address should be defined" in child.stderr, child
