"""Faults that are nobody's doing: Ctrl-C, a full disk, files that are damaged or lie. Each ends in a sentence."""

import contextlib
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_cli import run

import robustreg as rr
from robustreg import archive
from robustreg._core import files
from robustreg.cli import commands

ROOT = Path(__file__).parents[1]
CHAIN = '[problem]\nkind = "chain"\ndiscount = 0.9\n[regulariser]\nkind = "kl"\nbeta = 1.0\n'
SWEEP = CHAIN + "[sweep]\nbeta = { from = 0.1, to = 30.0, count = 40, spacing = 'log' }\nchunk = 1\n"


def config(tmp_path, text=CHAIN):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


# ---- Ctrl-C

# A program of its own that sends itself SIGINT, twice, as soon as there is what the second argument asks for.
INTERRUPTED = """
import os, pathlib, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a script inherit none
from robustreg import cli
when, sys.argv = sys.argv[1], ["robustreg", *sys.argv[2:]]

def interrupt():
    if when.startswith("/"):
        while not list(pathlib.Path(when).glob("chunk-*")):
            time.sleep(0.001)
    else:
        time.sleep(float(when))
    print(time.time(), flush=True)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
sys.exit(cli.main())
"""


def interrupted(when, *arguments):
    """Exit code, errors and seconds of a command after it is interrupted."""
    line = [sys.executable, "-c", INTERRUPTED, str(when), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, time.time() - float(done.stdout.splitlines()[0])


def test_an_interrupted_solve_says_so_and_leaves_nothing(tmp_path):
    """While a program is being compiled, when Python itself would not hear of the signal for seconds."""
    path = config(tmp_path, CHAIN.replace('"kl"', '"alpha"\nalpha = 1.5'))
    code, err, seconds = interrupted(0.6, "solve", path, "--out", tmp_path / "out")
    assert (code, seconds < 5) == (130, True), err
    assert err == f"robustreg: interrupted; nothing was written to {tmp_path / 'out'}; run the same command again\n"
    assert not list(tmp_path.glob("out/*"))


def test_an_interrupted_sweep_says_what_is_kept_and_is_resumed(tmp_path, capsys):
    # So many chunks that it is not over when the signal comes.
    path, out = config(tmp_path, SWEEP.replace("count = 40", "count = 3000")), tmp_path / "out"
    code, err, seconds = interrupted(out, "sweep", path, "--out", out)
    assert (code, seconds < 5) == (130, True), err
    assert err.splitlines()[-1].startswith("robustreg: interrupted; ") and "Traceback" not in err
    assert f"kept in {out}; go on with the same command and --resume" in err
    assert not list(out.glob(".*partial"))
    assert run(capsys, "sweep", path, "--out", out, "--resume")[0] == 0
    assert run(capsys, "sweep", path, "--out", tmp_path / "undisturbed")[0] == 0
    assert (out / "table.csv").read_bytes() == (tmp_path / "undisturbed" / "table.csv").read_bytes()


def test_an_interrupted_start_says_so(tmp_path):
    """While JAX is still being imported, which is most of the first second."""
    (tmp_path / "jax.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    # (A test in the background of a script inherits that SIGINT is ignored.)
    begin = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv)"
    with subprocess.Popen(
        [sys.executable, "-c", begin, "-m", "robustreg", "--version"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout is not None and started.stdout.readline() == "importing\n"
        started.send_signal(signal.SIGINT)
        assert started.communicate(timeout=10) == ("", "robustreg: interrupted\n") and started.returncode == 130


def test_a_caller_of_main_keeps_its_own_interrupts(tmp_path, monkeypatch):
    """With arguments of its own the command is part of another program, which decides what SIGINT does."""
    # Of the program's own; tests in the background of a script would inherit none.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(commands, "_run", lambda job: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            commands.main(["solve", str(config(tmp_path)), "--out", str(tmp_path / "out")])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not (tmp_path / "out").exists()
    finally:
        signal.signal(signal.SIGINT, before)


# ---- a full disk


@contextlib.contextmanager
def room(size):
    """No file may grow beyond so many bytes: writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sizes(folder):
    return sorted(path.stat().st_size for path in folder.iterdir() if path.suffix in (".png", ".npz", ".csv", ".pdf"))


@pytest.mark.parametrize("command", ["solve", "certify", "figure", "sweep", "merge"])
def test_a_full_disk_leaves_what_was_there(tmp_path, capsys, command):
    """At each file in turn: all old files are as they were, no part of a new one is there, and the file is named."""
    text = {"figure": "[figure]\nkind = 'decision'\nreward = [1.0, 0.5]\nbeta = [1.0]\n"}.get(command, CHAIN)
    path, out = config(tmp_path, SWEEP if command in ("sweep", "merge") else text), tmp_path / "out"
    line = [command, path, "--out", out]
    if command == "merge":
        assert run(capsys, "sweep", path, "--out", tmp_path / "part")[0] == 0
        line = [command, path, tmp_path / "part", "--out", out]
    assert run(capsys, *line)[0] == 0
    before = contents(out)
    line += ["--resume"] if command == "sweep" else []
    for size in sizes(out)[-3:]:
        with room(size - 1):
            code, _, err = run(capsys, *line)
        assert code == 1 and err.splitlines()[-1].startswith("robustreg: cannot write "), err
        assert str(out) in err and "File too large" in err
        after = contents(out)
        assert set(after) == set(before)
        changed = {name for name in before if after[name] != before[name]}
        assert changed <= {"table.csv"} or command in ("sweep", "merge")


def test_files_appear_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), files.together():
        files.write_whole(tmp_path / "a", lambda file: file.write(b"new"))
        raise RuntimeError
    assert contents(tmp_path) == {"a": b"old"}
    with files.together():
        for name in "ab":
            files.write_whole(tmp_path / name, lambda file: file.write(b"new"))
            assert (tmp_path / "a").read_text() == "old" and not (tmp_path / "b").exists()
    assert contents(tmp_path) == {"a": b"new", "b": b"new"}


@pytest.mark.parametrize("name", ["result.npz", "heat_map.png"])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, capsys, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    code, _, err = run(capsys, "solve", config(tmp_path), "--out", tmp_path / "out")
    assert code == 1 and f"cannot write {tmp_path / 'out' / name}: Is a directory" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


# ---- archives that are damaged, or lie


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("result")
    assert commands.main(["solve", str(config(folder)), "--out", str(folder)]) == 0
    return folder / "result.npz"


def test_every_kind_of_damage_is_a_sentence_that_names_the_file(result, tmp_path):
    """Bits flipped at a thousand places, and the file cut at fifty: read as before, or refused."""
    whole, rng = result.read_bytes(), np.random.default_rng(0)
    damaged, path, refused = [whole[: int(n)] for n in np.linspace(0, len(whole) - 1, 50)], tmp_path / "x.npz", 0
    for _ in range(1000):
        content = bytearray(whole)
        content[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        damaged.append(bytes(content))
    for content in damaged:
        path.write_bytes(content)
        try:
            archive.read_header(path)
            rr.load(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
            refused += 1
    assert refused > 900


def test_damage_and_lies_are_exit_code_2(result, tmp_path, capsys):
    path, own = tmp_path / "flipped.npz", tmp_path / "own.npz"
    np.savez(own, policy=np.full((6, 2), 0.5), reward=np.zeros((6, 2)))
    for source, name, line in (
        (result, b"header", [path]),
        (result, b"perturbation", [path]),
        (own, b"policy", [result, "--policy", path]),
        (own, b"reward", [result, "--deployed", path]),
    ):
        content = bytearray(source.read_bytes())
        content[content.index(name + b".npy") + 200] ^= 255
        path.write_bytes(content)
        code, _, err = run(capsys, "certify", *line)
        assert code == 2 and str(path) in err and err.count("\n") == 1, err
    with np.load(result) as file:
        arrays = dict(file)
    for name, x in (("value", np.zeros(5)), ("value", np.zeros((3, 6))), ("tol", np.ones(3)), ("q", np.ones(()))):
        np.savez(path, **{**arrays, name: x})
        code, _, err = run(capsys, "certify", path)
        assert code == 2 and f"{path}: {name} has shape {x.shape}, its configuration says" in err


def test_a_tolerance_in_a_file_is_no_excuse(result, tmp_path, capsys):
    """A value that is wrong by 1 is not certified because the file says that it may be."""
    with np.load(result) as file:
        arrays = dict(file)
    np.savez(tmp_path / "lie.npz", **{**arrays, "tol": np.float64(1e9), "value": arrays["value"] + 1})
    code, out, _ = run(capsys, "certify", tmp_path / "lie.npz")
    assert code == 1 and "fails: certificate" in out


def claimed(shape, kind="<f8"):
    """The header of an array of that shape, without the array."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (63 - (10 + len(text)) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@contextlib.contextmanager
def little_memory():
    """Half a gigabyte more than there is, so that a bomb fails instead of taking the machine along."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def bombs():
    """Arrays of 6 states and 2 actions, and what does more harm than that."""
    zeros = io.BytesIO()
    np.save(zeros, np.zeros((2**27, 1)))
    return {
        "claims more than it holds": (claimed((10**13, 2)), zipfile.ZIP_STORED),
        "claims the right shape without content": (claimed((6, 2)), zipfile.ZIP_STORED),
        "expands to a gigabyte": (zeros.getvalue(), zipfile.ZIP_DEFLATED),
        "claims a shape beyond all numbers": (claimed((10**30, 10**30)), zipfile.ZIP_STORED),
        "claims Python objects": (claimed((6, 2), "|O") + b"cos\nsystem\n", zipfile.ZIP_STORED),
        "has no header": (b"\x93NUMPY\x09\x00", zipfile.ZIP_STORED),
    }


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_bombs_are_refused_from_their_headers(result, tmp_path, capsys):
    path = tmp_path / "bomb.npz"
    for name, (content, method) in bombs().items():
        with zipfile.ZipFile(path, "w", method) as file:
            file.writestr("policy.npy", content)
        with little_memory():
            code, _, err = run(capsys, "certify", result, "--policy", path)
        # By what its header says, not by a lack of memory.
        assert code == 2 and str(path) in err and "allocate" not in err, (name, err)
        with np.load(result) as held, zipfile.ZipFile(path, "w", method) as file:
            for key, x in held.items():
                plain = io.BytesIO()
                np.save(plain, x)
                bomb = key == "value"
                file.writestr(f"{key}.npy", content if bomb else plain.getvalue(), method if bomb else None)
        with little_memory():
            code, _, err = run(capsys, "certify", path)
        # By what its header says, not by a lack of memory.
        assert code == 2 and str(path) in err and "allocate" not in err, (name, err)


# ---- folders of a sweep


def test_a_damaged_chunk_is_computed_anew(tmp_path, capsys):
    path, out = config(tmp_path, SWEEP), tmp_path / "out"
    assert run(capsys, "sweep", path, "--out", out)[0] == 0
    before = contents(out)
    chunk = sorted(out.glob("chunk-*"))[0]
    whole = chunk.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 255
    other = io.BytesIO()
    np.savez(other, objective=np.zeros(1), gap=np.zeros(1), steps=np.zeros(1), status=np.zeros(1))
    for content in (bytes(flipped), whole[: len(whole) // 2], b"", other.getvalue()):
        chunk.write_bytes(content)
        assert run(capsys, "sweep", path, "--out", out, "--resume")[0] == 0
        assert contents(out)["table.csv"] == before["table.csv"] and chunk.stat().st_size == len(whole)


def test_a_refused_sweep_leaves_its_folder_free(tmp_path, capsys):
    """Leaves that do not fit the problem are found before a manifest is written; so are parts of another sweep."""
    out = tmp_path / "out"
    for line in ("prior = [[0.5, 0.25, 0.25]]", "state_scale = [[1.0, 2.0]]", "reward = [[[1.0]]]"):
        code, _, err = run(capsys, "sweep", config(tmp_path, CHAIN + f"[sweep]\n{line}\n"), "--out", out)
        assert code == 2 and err.startswith("robustreg: ") and not out.exists(), err
    part = config(tmp_path, CHAIN + "[sweep]\nbeta = [1.0, 2.0]\n")
    assert run(capsys, "sweep", part, "--out", tmp_path / "part")[0] == 0
    other = config(tmp_path, CHAIN + "[sweep]\nbeta = [1.0, 3.0]\n")
    code, _, err = run(capsys, "merge", other, tmp_path / "part", "--out", out)
    assert code == 2 and "holds another sweep than the configuration" in err and not out.exists()
    # Nor are chunks of one sweep put among those of another.
    assert run(capsys, "sweep", other, "--out", out)[0] == 0
    before = contents(out)
    part = config(tmp_path, CHAIN + "[sweep]\nbeta = [1.0, 2.0]\n")
    assert run(capsys, "merge", part, tmp_path / "part", "--out", out)[0] == 2 and contents(out) == before
    code, _, err = run(capsys, "sweep", part, "--out", tmp_path / "part")
    assert code == 2 and "holds this sweep already; add --resume" in err


def test_failures_are_the_verdict_whatever_was_asked_for(tmp_path, capsys):
    text = CHAIN + "[solver]\nmax_steps = 1\n[sweep]\nbeta = [1.0, 2.0]\noutputs = ['objective']\n"
    code, out, err = run(capsys, "sweep", config(tmp_path, text), "--out", tmp_path / "out")
    assert code == 1 and "2 cells did not converge" in err and out.count("MAX_STEPS") == 2


def test_a_signal_after_the_work_is_done_does_not_change_the_exit_code():
    """While the interpreter ends its own handlers are gone already."""
    codes = []
    for pause in (0.0, 0.1, 0.2, 0.3):
        work = [sys.executable, "-m", "robustreg", "info"]
        with subprocess.Popen(work, stdout=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
            assert process.stdout is not None
            process.stdout.readline()  # it ends soon
            time.sleep(pause)
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        codes.append(process.returncode)
    assert set(codes) <= {0, 130}
