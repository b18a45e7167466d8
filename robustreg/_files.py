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
