"""Ctrl-C in a program of our own: a message, no half files, and the end, whatever the process is doing.

Python hands a signal to the main thread between two of its own instructions. While XLA compiles, that is many seconds
later, and an exception that then ends the interpreter beside threads that still compile makes it crash. So a thread of
its own waits for the signal, says what is kept, and ends the process at once. Files appear whole or not at all, hence
nothing is lost but the work in flight.
"""

import atexit
import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from robustreg._core import files

CODE = 130  # what a shell reports of a program that SIGINT has ended
_PATIENCE = 3.0  # seconds for the last words: a file system may hang

_words: list[Callable[[], str]] = []


def watch() -> None:
    """End this process with a message and exit code 130 at Ctrl-C (SIGINT), from now on.

    Where SIGINT is ignored (a job in the background of a script) it stays so, and only a main thread can watch.
    """
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, _watched)
    if ignored or threading.current_thread() is not threading.main_thread():
        return
    here, there = socket.socketpair()
    there.setblocking(False)
    # The interpreter's handler in C writes the number of the signal there, whatever Python is doing.
    signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _watched)
    # Before the interpreter ends it takes handlers away: a signal would then kill what has done all its work.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait, args=(here, there), daemon=True).start()


def watch_command_line() -> None:
    """Do the same if this process was started as `robustreg` or `python -m robustreg`: importing JAX takes a while."""
    # While Python looks for the module that -m names, "-m" stands for the program.
    module = sys.argv[:1] == ["-m"] and ("-m", "robustreg") in itertools.pairwise(sys.orig_argv)
    if module or Path(*sys.argv[:1]).stem == "robustreg":
        watch()


def _watched(*_: Any) -> None:
    """Take the signal in the place of Python's own handler: no KeyboardInterrupt beside the last words."""


@contextlib.contextmanager
def saying(words: Callable[[], str]) -> Iterator[None]:
    """Say at Ctrl-C inside what `words()` then returns, beside what is said already; it may act as well."""
    _words.append(words)
    try:
        yield
    finally:
        _words.remove(words)


def _wait(here: socket.socket, there: socket.socket) -> None:
    """Wait for the signal; `there` is kept open for the interpreter to write to."""
    with there:
        while signal.SIGINT not in here.recv(64):
            pass
        speaker = threading.Thread(target=_speak, daemon=True)
        speaker.start()
        speaker.join(_PATIENCE)
        os._exit(CODE)


def _speak() -> None:
    said = []
    for words in tuple(_words):
        with contextlib.suppress(Exception):
            said.append(words())
    # Not through sys.stderr: the main thread may have been stopped while it held its lock. The other threads still run,
    # and what they report from here on (progress, a partial file that is gone) would bury the last words.
    begin = "\n" if sys.stderr.isatty() else ""  # after a bar of progress
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.write(stderr, f"{begin}robustreg: interrupted{''.join(f'; {text}' for text in said if text)}\n".encode())
    files.remove_partials()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
