"""Files that appear whole or not at all."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file under another name in the same folder, flush it to the disk, and rename it.

    Args:
        path: of the file; what stood there stays until the new one is complete.
        write: given the open binary file.
    """
    # Of this process and host alone: a folder may be shared by many.
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def of_the_dead(partial: Path) -> bool:
    """Whether a partial file was left by a process of this host that is no more."""
    host, _, pid = partial.name.removesuffix(".partial").rpartition(".")
    if not host.endswith(f".{socket.gethostname()}") or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        return False
    return False
