"""Files that appear whole or not at all, one by one or several together."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

# Files of this process that are not complete yet: what an interrupted one removes before it ends.
_partials: set[Path] = set()
# Complete files that wait for others, by the path that they will have; None: none waits.
_waiting: ContextVar[dict[Path, Path] | None] = ContextVar("_waiting", default=None)


def write_whole(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file under another name in the same folder, flush it to the disk, and rename it.

    Args:
        path: of the file; what stood there stays until the new one is complete.
        write: given the open binary file.

    Raises:
        OSError: the file cannot be written (a full disk, say); it names `path`, and nothing is left of the new one.
    """
    # Of this process and host alone: a folder may be shared by many.
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    waiting = _waiting.get()
    kept = False
    try:
        if path.is_dir():  # renaming would find out, but only after the work
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _partials.add(partial)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if waiting is None:
            os.replace(partial, path)
        else:
            waiting[path], kept = partial, True
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if not kept:
            _remove(partial)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let the files that `write_whole` writes inside appear at the end, all of them, or none if anything is raised."""
    waiting: dict[Path, Path] = {}
    token = _waiting.set(waiting)
    try:
        yield
        for path, partial in waiting.items():
            os.replace(partial, path)
    finally:
        _waiting.reset(token)
        for partial in waiting.values():
            _remove(partial)


def remove_partials() -> None:
    """Remove what this process has begun to write and not completed; for a process that ends in the middle."""
    for partial in tuple(_partials):
        with contextlib.suppress(OSError):
            _remove(partial)


def _remove(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _partials.discard(partial)


def of_the_dead(partial: Path) -> bool:
    """Tell whether a partial file was left by a process of this host that is no more."""
    host, _, pid = partial.name.removesuffix(".partial").rpartition(".")
    # (Elsewhere signal 0 is no question, it interrupts.)
    if os.name != "posix" or not host.endswith(f".{socket.gethostname()}") or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        pass
    return False
