"""NumPy archives (.npz) from anywhere: each array is checked from its header before anything is allocated for it.

`numpy.load` believes what a header claims and reads whatever a compressed member expands to, so that a file of 250
bytes may ask for terabytes; and it reports damage by a dozen kinds of exceptions. Here all of them are one, that names
the file.
"""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArchiveError(ValueError):
    """An archive that cannot be read; the message names the file and the array."""


class Arrays:
    """The arrays of an open archive, by name."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        """Take an open archive; `opened` does."""
        self._path, self._archive = path, archive
        self.names = tuple(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Read the shape of an array from its header.

        Raises:
            ArchiveError: there is no such array, or its header and its size contradict each other.
        """
        return self._header(name, compressed=True)

    def read(self, name: str, compressed: bool = False) -> np.ndarray:
        """Read an array.

        Args:
            name: of the array.
            compressed: whether it may be compressed. Uncompressed it is no larger than the file; compressed it may be
                a thousand times as large, so that its `shape` has to be known to be what is wanted.

        Raises:
            ArchiveError: there is no such array, it is damaged, or it is not what its header claims.
        """
        self._header(name, compressed)
        with self._named(name), self._archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def _header(self, name: str, compressed: bool) -> tuple[int, ...]:
        """The shape, if the header is one of plain numbers or text and as many bytes follow as it says."""
        if name not in self.names:
            raise ArchiveError(f"{self._path}: no array `{name}`; it holds: {', '.join(self.names) or 'nothing'}")
        with self._named(name):
            info = self._archive.getinfo(f"{name}.npy")
            with self._archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                shape, _, dtype = _HEADERS[version](member)
                held = info.file_size - member.tell()
            if dtype.kind not in "biufU":
                raise ValueError(f"it holds {dtype}, not numbers or text")
            if (claimed := math.prod(shape) * dtype.itemsize) != held:
                raise ValueError(f"its header says {shape} of {dtype}, {claimed} bytes, and {held} bytes follow")
            if not compressed and (info.compress_type != zipfile.ZIP_STORED or held > os.path.getsize(self._path)):
                raise ValueError("it is compressed, as robustreg writes none")
        return shape

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Name the file and the array, whatever damaged bytes make their readers raise."""
        try:
            yield
        except Exception as error:
            raise ArchiveError(f"{self._path}: array `{name}` cannot be read: {_line(error)}; write it anew") from error


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Arrays]:
    """Open an archive.

    Args:
        path: of the file.

    Raises:
        OSError: the file cannot be opened.
        ArchiveError: it is no archive, or an incomplete one.
    """
    path = Path(path)
    with open(path, "rb") as file:
        yield Arrays(path, _directory(path, file))


def _directory(path: Path, file: IO[bytes]) -> zipfile.ZipFile:
    """The archive in an open file."""
    try:
        return zipfile.ZipFile(file)
    except Exception as error:  # the directory may be damaged in as many ways as an array
        raise ArchiveError(f"{path} is no NumPy archive (.npz), or a damaged one: {_line(error)}") from error


def _line(error: Any) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
