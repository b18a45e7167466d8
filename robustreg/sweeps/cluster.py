"""Several processes on one sweep, on one host or many: how they meet, and how the living learn of the dead.

JAX's distributed runtime tells each process its number, by whatever means the cluster offers, and is let go at once.
Whoever keeps it is aborted, in C++ and without a word to the user, as soon as another process is lost; and a sweep has
no use for it, because every process computes chunks of its own on its own devices.

From then on everything goes through the folder that the processes share for their results. Each keeps a file in its
subfolder `processes`, which says what it does and changes a few times within the time after which it would be taken
for lost. Only changes count, as seen by whoever reads: clocks of hosts may differ. Process 0 watches all others and
they watch process 0, which passes on what it learns, so that a sweep of many processes reads few files.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax

from robustreg._core import interrupts
from robustreg._core.files import write_whole
from robustreg.sweeps.runner import Run
from robustreg.sweeps.store import SweepError
from robustreg.sweeps.table import Table

# Files change this often within the time after which a process is lost, and are read at most twice as often.
_BEATS = 5


class Peers:
    """The processes of a sweep, as one of them sees the others.

    Attributes:
        index, count: number of this process, from 0, and of all.
    """

    def __init__(self, folder: Path, index: int, count: int, timeout: float):
        """Take part; `join_cluster` finds the arguments.

        Args:
            folder: shared by all, with one file per process.
            index, count: see the class.
            timeout: seconds without a change after which a process is lost.
        """
        self.index, self.count = index, count
        self._folder, self._timeout = folder, timeout
        self._state, self._beat, self._stop, self._lock = ("starting", ""), 0, threading.Event(), threading.Lock()
        self._heard: dict[int, tuple[dict[str, Any], float]] = {
            i: ({}, time.monotonic()) for i in (range(1, count) if index == 0 else [0])
        }
        self._looked = -float("inf")
        self._thread = threading.Thread(target=self._beats, daemon=True)

    def __enter__(self) -> "Peers":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stop.set()
        self._thread.join()
        if error is not None:
            self.say("failed", str(error) or type(error).__name__)

    def say(self, state: str, message: str = "") -> None:
        """Tell the others what this process does: "working", "done" or "failed"."""
        with self._lock:
            self._state = (state, message)
            self._write()

    def interrupted(self) -> str:
        """Tell the others, who would otherwise wait until this process is taken for lost; nothing for the user."""
        self.say("failed", "interrupted")
        return ""

    def _write(self) -> None:
        """Write the present state, with the lock held: a beat must not say again what has just been overtaken."""
        self._beat += 1
        about = {"process": self.index, "host": socket.gethostname(), "pid": os.getpid()}
        about |= {"state": self._state[0], "message": self._state[1], "beat": self._beat}
        # A beat that cannot be written is left out: if that lasts, the other processes take this one for lost.
        with contextlib.suppress(OSError):
            write_whole(self._path(self.index), lambda file: file.write(json.dumps(about).encode()))

    def _beats(self) -> None:
        while True:
            with self._lock:
                self._write()
            if self._stop.wait(self._timeout / _BEATS):
                return

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.json"

    def check(self) -> None:
        """Look at the others, unless that was just now.

        Raises:
            SweepError: one has failed, or is lost.
        """
        if time.monotonic() - self._looked < self._timeout / _BEATS / 2:
            return
        self._looked = time.monotonic()
        for i, (before, since) in self._heard.items():
            said = self._read(i) or before
            self._heard[i] = (said, since if said == before else time.monotonic())
        for i, (said, since) in self._heard.items():
            name = f"process {i} ({said['host']}, pid {said['pid']})" if said else f"process {i}"
            kept = "finished chunks are kept: start all processes again with --resume"
            if said.get("state") == "failed":
                raise SweepError(f"{name} failed: {said['message']}; {kept}")
            if said.get("state") != "done" and time.monotonic() - since > self._timeout:
                raise SweepError(f"{name} is lost, nothing was heard of it for {self._timeout:g} s; {kept}")

    def _read(self, index: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._path(index).read_bytes())
        except (OSError, ValueError):
            return None

    def wait(self, states: Collection[str]) -> None:
        """Until all that this process watches are in one of the states.

        Raises:
            SweepError: one has failed, or is lost.
        """
        self.check()
        while not all(said.get("state") in states for said, _ in self._heard.values()):
            time.sleep(min(0.2, self._timeout / _BEATS / 2))
            self.check()


@contextlib.contextmanager
def join_cluster(
    out: Path,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    timeout: float = 100.0,
) -> Iterator[Peers]:
    """Meet the other processes; before anything else touches a device.

    Args:
        out: folder of the sweep, shared by all.
        coordinator: address and port of process 0, reachable from all; None: found by JAX, from the cluster or from
            its own environment variables.
        count, index: number of processes, and of this one; None: found by JAX.
        timeout: seconds without a sign of life after which a process is lost.

    Raises:
        ValueError: what JAX was not told it could not find out.
        SweepError: the folder cannot be made, or the processes do not meet. (JAX itself ends a process with an abort
            if it waits in vain for `jax.distributed.initialize`, after five minutes.)
    """
    try:
        jax.distributed.initialize(coordinator, count, index)
        index, count = jax.process_index(), jax.process_count()
        folder = out / "processes"
        if index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.json"):
                left.unlink(missing_ok=True)
        # All processes meet here once more: none has said a word yet, and what an earlier run left is gone.
        jax.distributed.shutdown()
    except OSError as error:
        raise SweepError(f"cannot make the folder {out}: {error.strerror}") from error
    except RuntimeError as error:
        raise SweepError(f"the processes did not meet: {error}") from error
    with Peers(folder, index, count, timeout) as group, interrupts.saying(group.interrupted):
        yield group


def sweep(group: Peers, run: Run, out: Path, resume: bool, progress: Any = False) -> Table | None:
    """Compute a sweep together.

    Args:
        group: this process and the others.
        run: the same sweep in all of them.
        out: folder that they share.
        resume: go on with what it already holds.
        progress: of this process; as in `robustreg.sweep`.

    Returns:
        In process 0 the table, when all are done; `None` in the others, which then still `wait` for process 0 to end.

    Raises:
        ValueError: the folder holds another sweep.
        SweepError: results cannot be written, or another process has failed or is lost.
    """

    if group.index > 0:
        group.wait(("working", "done"))  # the folder is then that of this sweep
    run, store = run.open(out, resume or group.index > 0)
    with store.held(alone=False):
        group.say("working")
        run.fill(store, (group.index, group.count), progress, group.check)
    if group.index > 0:
        group.say("done")
        return None
    group.wait(("done",))
    return run.read(store)
