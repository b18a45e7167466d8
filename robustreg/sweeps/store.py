"""Folders of a sweep: one file per finished chunk, beside a manifest of everything that the results depend on."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from robustreg._core.files import of_the_dead, write_whole
from robustreg._core.npz import ArchiveError, opened

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

Fields = dict[str, np.ndarray]
MANIFEST = "manifest.json"


class SweepError(RuntimeError):
    """A sweep that cannot go on; the message says why and what is kept."""


class HeldError(ValueError):
    """A folder that holds results of the sweep already, and nobody said to go on with them."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder with one file per finished chunk."""

    folder: Path

    def path(self, job: int) -> Path:
        return self.folder / f"chunk-{job:07d}.npz"

    def put(self, job: int, fields: Fields) -> None:
        content: Any = fields  # names of arrays, not options of savez
        _write(self.path(job), lambda file: np.savez(file, **content))

    def get(self, job: int, names: Collection[str], cells: int) -> Fields | None:
        """Read a chunk; None where its file is missing or damaged, or holds other results: it is to be computed anew.

        Args:
            job: number of the chunk.
            names: of the results that it has to hold.
            cells: how many of them there are.
        """
        try:
            with opened(self.path(job)) as archive:
                if all(name in archive and archive.shape(name)[:1] == (cells,) for name in names):
                    return {name: archive.read(name) for name in archive.names}
        except (OSError, ArchiveError):
            pass
        return None

    @contextlib.contextmanager
    def held(self, alone: bool) -> Iterator[None]:
        """Keep the folder from other runs while writing to it; what killed ones left half written is removed.

        Args:
            alone: whether nobody else may write at the same time; else others that say so too may.

        Raises:
            SweepError: another run writes to the folder. (Not told on a file system, or a system, without locks.)
        """
        path = self.folder / ".lock"
        try:
            # The system lets go of the lock when the process ends, however that ends.
            file, locked = _locked(path, alone)
        except BlockingIOError as error:
            raise SweepError(
                f"another run is writing to {self.folder}; wait until it has ended, or take another folder"
            ) from error
        except OSError as error:
            raise SweepError(f"cannot write {path}: {error.strerror or error}") from error
        with file:
            for left in self.folder.glob(".*.partial"):
                if (alone and locked) or of_the_dead(left):
                    left.unlink(missing_ok=True)
            try:
                yield
            finally:
                # Others that share the lock go on holding this very file, so that only who is alone takes it away.
                if alone and locked:
                    with contextlib.suppress(OSError):
                        path.unlink()


def _locked(path: Path, alone: bool) -> tuple[IO[bytes], bool]:
    """Open a lock file and lock it; also whether that could be done, on this system and file system.

    Raises:
        BlockingIOError: another run holds it.
        OSError: it cannot be opened.
    """
    while True:
        file = open(path, "ab")
        try:
            if fcntl is None:
                return file, False
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            # Its last owner may have taken the file away since it was opened: a lock on it would keep nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file, True
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            return file, False
        file.close()


def _write(path: Path, write: Callable[[Any], None]) -> None:
    """A whole file, or an error that says what to do."""
    try:
        write_whole(path, write)
    except OSError as error:
        raise SweepError(
            f"cannot write {path}: {error.strerror or error}; finished chunks are kept: make room and resume"
        ) from error


def _differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Names under which two digests differ."""
    return ", ".join(name for name in one if not _same(one[name], other.get(name)))


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; floats in lists are measurements, and differ in their last digits."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(
            math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) if isinstance(a, float) else a == b
            for a, b in zip(one, other)
        )
    return one == other


def open_folder(
    out: str | os.PathLike, digest: dict[str, Any], layout: dict[str, Any], resume: bool
) -> tuple[Store, dict[str, Any]]:
    """Open the folder of a sweep, new or resumed; refuses one that holds another sweep.

    Args:
        out: the folder, made if it is not there.
        digest: everything that results depend on, JSON values by name.
        layout: which cells are solved together, if the folder is new.
        resume: whether it may hold results of this sweep already.

    Returns:
        The folder, and the layout in which it was begun: devices of another kind would choose another.
    """
    folder = Path(out)
    manifest = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"cannot make the folder {folder}: {error.strerror}") from error
    if manifest.exists():
        held = _read(manifest)
        if differ := _differences(digest, held["sweep"]):
            raise ValueError(
                f"{folder} holds another sweep (it differs in: {differ}); take another folder, or the "
                "settings that it was made with"
            )
        if not resume:
            raise HeldError(f"{folder} holds this sweep already; pass resume=True to go on with it")
        layout = held["layout"]
    else:
        versions = {"jax": jax.__version__, "numpy": np.__version__}
        _write_manifest(manifest, {"sweep": digest, "layout": layout, "versions": versions})
    return Store(folder), layout


def _write_manifest(manifest: Path, held: dict[str, Any]) -> None:
    _write(manifest, lambda file: file.write(json.dumps(held, indent=1).encode()))


def _read(manifest: Path) -> dict[str, Any]:
    """A manifest; refuses what is none."""
    try:
        held = json.loads(manifest.read_text(encoding="utf-8"))
        if isinstance(held["sweep"], dict) and isinstance(held["layout"], dict):
            return held
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{manifest} is no manifest of a sweep of this version of robustreg; take another folder")


def join(parts: Sequence[str | os.PathLike], out: str | os.PathLike, digest: Mapping[str, Any] | None = None) -> Path:
    """Collect the chunks of the parts of one sweep in one folder, which `sweep(..., resume=True)` then reads.

    Args:
        parts: folders of the parts.
        out: folder of the whole; it may hold some of it already.
        digest: of the sweep that they have to belong to; None: of any, the same for all.

    Raises:
        ValueError: for folders that do not belong to the same sweep; nothing is written then.
        SweepError: where files cannot be read or written.
    """
    out = Path(out)
    folders = [Path(part) for part in parts]
    for part in folders:
        if not (part / MANIFEST).is_file():
            raise ValueError(f"{part} holds no sweep: it has no {MANIFEST}")
    held = {part: _read(part / MANIFEST) for part in [*folders, out] if (part / MANIFEST).exists()}
    for part, other in held.items():
        if digest is not None and (differ := _differences(dict(digest), other["sweep"])):
            raise ValueError(f"{part} holds another sweep than the configuration (it differs in: {differ})")
        if differ := _differences(other["sweep"], held[folders[0]]["sweep"]):
            raise ValueError(f"{part} and {folders[0]} hold different sweeps (they differ in: {differ})")
        if other["layout"] != held[folders[0]]["layout"]:
            raise ValueError(
                f"{part} and {folders[0]} hold the same sweep, but chunks of different cells: their devices chose so; "
                "begin parts on unlike machines with one and the same chunk"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_manifest(out / MANIFEST, held[folders[0]])
        for part in folders:
            for path in sorted(part.glob("chunk-*.npz")):
                if part.resolve() != out.resolve():
                    _copy(path, out / path.name)
    except OSError as error:
        raise SweepError(f"cannot join into {out}: {error.strerror}") from error
    return out


def _copy(path: Path, copy: Path) -> None:
    """Copy a chunk, unless it cannot be read (a dangling link): it is then missing."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    _write(copy, lambda file: file.write(content))
