"""An installed runtime: what its installer wrote down, and the check of its files against a list.

The list that counts is that of a trusted manifest's entry; without one, the receipt's own. Files
that are damaged, missing or not listed raise ``IntegrityError``, which names them; so does a list
whose pieces are not those of its files (``CONTRADICTION``). What cannot be read raises ``OSError``,
and ``StoreError`` from ``Installed.verify``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import msgspec

from llama_loader import disk
from llama_loader import manifest as schema
from llama_loader.concurrency import Background
from llama_loader.disk import FORBIDDEN_BITS, NO_FILE, NOT_WRITABLE, Folder
from llama_loader.errors import IntegrityError
from llama_loader.events import Sink, Stage, ignore
from llama_loader.manifest import Artifact, FileEntry

RECEIPT: Final = "receipt.json"
FILES: Final = "files"
PROGRAM: Final = "llama-server"

CONTRADICTION: Final = "MANIFEST_CONTRADICTS_ITSELF"
"""The code of an error that fetching again does not cure."""

_BLOCK: Final = 1 << 20
_TRIES: Final = 3
_SHOWN: Final = 10


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an installer writes down: the manifest's entry, or the files of an archive by URL."""

    sha256: schema.Sha256
    artifact: Artifact | None = None
    files: tuple[FileEntry, ...] = ()

    @classmethod
    def read(cls, place: Folder) -> Receipt:
        """Read the receipt of a runtime, a folder named by its archive's digest."""
        data = place.read(RECEIPT, schema.MAX_MANIFEST_BYTES)
        if data is None:
            raise damaged(f"{place.path}: has no receipt")
        try:
            found = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise damaged(f"{place.path}: its receipt cannot be read: {error}") from error
        digests = {found.sha256, found.artifact.sha256 if found.artifact else found.sha256}
        if digests != {place.path.name}:
            raise damaged(f"{place.path}: its receipt is of another runtime")
        return found

    def installed(self, root: Path, trusted: Artifact | None, sink: Sink) -> Installed:
        """Return the runtime in the folder ``root``; a trusted entry counts before the receipt."""
        artifact = trusted or self.artifact
        files = artifact.files if artifact else self.files
        if artifact is not None and artifact.kind == schema.CUDA_RUNTIME:
            inside = artifact.library_folder
        else:
            name = artifact.name if artifact else self.sha256[:12]
            inside = find_program((entry.path for entry in files), name)
        folder = root / FILES / inside
        return Installed(folder, root, self.sha256, artifact, files=files, sink=sink)


@dataclass(frozen=True)
class Installed:
    """A runtime in a store."""

    folder: Path  # holds ``llama-server``, or the libraries of an artifact that has none
    root: Path  # the runtime's own folder in the store
    sha256: str  # of the archive that it came from
    artifact: Artifact | None  # None for an archive by URL
    files: tuple[FileEntry, ...] = field(default=(), compare=False, repr=False)
    sink: Sink = field(default=ignore, compare=False, repr=False)  # told how long ``verify`` took

    @property
    def library_folders(self) -> tuple[Path, ...]:
        """The program's folder, then others with shared libraries: ``lib`` beside ``bin``."""
        paths = (self.root / FILES / one.path for one in self.files)
        others = {path.parent for path in paths if ".so" in path.suffixes} - {self.folder}
        return (self.folder, *sorted(others))

    def verify(self) -> None:
        """Hash every file now, set modes that are wrong, and renew the time of the last use.

        Call it as the last act before each execution.
        """
        started = time.monotonic()
        piece_size = self.artifact.piece_size if self.artifact else 0
        with disk.errors(self.root):
            check_files(self.root, self.files, piece_size)
        size = sum(entry.size for entry in self.files)
        self.sink(Stage("verify", time.monotonic() - started, size))


def damaged(message: str) -> IntegrityError:
    """Return the error of a runtime that must not be executed."""
    return IntegrityError("RUNTIME_DAMAGED", why=message)


def find_program(paths: Iterable[str], name: str) -> str:
    """Return the folder (relative, ``.`` at the top) that holds ``llama-server``."""
    found = sorted(path for path in paths if path.rpartition("/")[2] == PROGRAM)
    if len(found) != 1:
        there = " and ".join(found) or "no llama-server"
        raise IntegrityError("NO_SERVER_IN_ARCHIVE", name=name, found=there)
    return found[0].rpartition("/")[0] or "."


def check_files(root: Path, entries: Sequence[FileEntry], piece_size: int) -> None:
    """Check that a runtime has exactly the files of a list; set modes that are wrong."""
    listed = {f"{FILES}/{entry.path}": entry for entry in entries}
    known = {RECEIPT, *listed, *(str(up) for path in listed for up in PurePosixPath(path).parents)}
    try:
        with Folder.open(root.parent) as runtimes, runtimes.folder(root.name) as place:
            with contextlib.suppress(OSError):  # a read-only store is not collected either
                os.utime(place.handle)
            present = {".", *(path for path, _ in place.walk(schema.MAX_PARTS))}
            there = {path: entry for path, entry in listed.items() if path in present}
            _renew(root, place, there)
            problems = _hashed(place, there, piece_size)
    except OSError as error:
        if error.errno not in (*NO_FILE, errno.EPERM, errno.EACCES):
            raise
        raise damaged(disk.reason(root, error)) from error
    problems |= dict.fromkeys(listed.keys() - present, "missing")
    problems |= dict.fromkeys(present - known, "not listed")
    told = []
    for kind in sorted({*problems.values()}):
        paths = sorted(path for path in problems if problems[path] == kind)
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        told.append(f"{', '.join(paths[:_SHOWN])}{more} {kind}")
    if told:
        raise damaged(f"{root}: {'; '.join(told)}")


def _renew(root: Path, place: Folder, files: dict[str, FileEntry]) -> None:
    """Replace each file that other users could write by a copy; hashing it sets the copy's mode."""
    # Another user may have opened the file, and could write to it after it was hashed
    for path, entry in files.items():
        status = place.status(path)
        if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
            continue  # no copy makes it right
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            try:
                with (
                    Folder.open(root.parents[1]) as store,
                    store.folder("staging", make=0o700) as staging,
                ):
                    place.renew(path, staging=staging)
            except OSError as error:
                if error.errno != errno.EROFS:  # its mode cannot be set either, and is refused
                    raise


def _hashed(place: Folder, files: dict[str, FileEntry], piece_size: int) -> dict[str, str]:
    """Hash files, and those again that were changed meanwhile; say what is wrong, by path."""
    # Hashing takes long, the last look at all files a millisecond
    problems: dict[str, str] = {}
    before: dict[str, tuple[int, ...] | None] = {}
    left = files
    for _ in range(_TRIES):
        before |= {path: stamp(place, path) for path in left}
        problems |= _problems(place, left, piece_size)
        left = {
            path: entry
            for path, entry in files.items()
            if path not in problems and stamp(place, path) != before[path]
        }
        if not left:
            return problems
    return problems | dict.fromkeys(left, "changed while it was hashed")


def stamp(place: Folder, path: str) -> tuple[int, ...] | None:
    """Return what every change of a file changes: no program can set the time of its change."""
    status = place.status(path)
    if status is None:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _problems(place: Folder, files: dict[str, FileEntry], piece_size: int) -> dict[str, str]:
    """Hash files in as many threads as there are processors; say what is wrong, by path."""
    # Hashing releases the interpreter's lock: 190 MB in 4 MiB pieces keep every core busy
    pieces = [piece for path in files for piece in _pieces(path, files[path], piece_size)]
    left = deque(sorted(pieces, key=lambda piece: -piece.length))
    problems: dict[str, str] = {}

    def hash_some() -> None:
        with contextlib.suppress(IndexError):
            while True:
                piece = left.popleft()
                if problem := piece.problem(place):
                    problems[piece.path] = problem

    workers = [Background(hash_some) for _ in range(min(len(pieces), os.cpu_count() or 1))]
    for worker in workers:
        worker.result()
    # While a file is unpacked it is hashed as a whole: hashing its pieces as well would cost a
    # quarter of an installation.
    for path in problems:
        whole = next(_pieces(path, files[path], 0))
        if files[path].chunks and not whole.problem(place):
            raise IntegrityError(CONTRADICTION, path=path)
    return problems


class _Piece(NamedTuple):
    """Bytes of an installed file, and what their sha256 must be."""

    path: str
    entry: FileEntry
    start: int
    length: int
    sha256: str

    def problem(self, place: Folder) -> str:
        """Hash the piece of the file that is open now; return what is wrong, empty if nothing."""
        try:
            handle = place.open_file(self.path)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            return "changed"
        try:
            problem, digest = _problem_of_form(handle, self.entry), hashlib.sha256()
            at, end = self.start, self.start + self.length
            while not problem and at < end:
                block = os.pread(handle, min(end - at, _BLOCK), at)
                digest.update(block)
                at += len(block) or end
        finally:
            os.close(handle)
        return problem or ("" if digest.hexdigest() == self.sha256 else "changed")


def _problem_of_form(handle: int, entry: FileEntry) -> str:
    """Whether it is a regular file of its size that only this user can change; set its mode."""
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
        return "changed"
    wanted = 0o755 if entry.executable else 0o644
    if stat.S_IMODE(status.st_mode) != wanted:
        try:
            os.fchmod(handle, wanted)
        except OSError as error:  # another user's file, a read-only disk, or one without modes
            if error.errno not in NOT_WRITABLE:
                raise
        status = os.fstat(handle)
    if entry.executable and not status.st_mode & stat.S_IXUSR:
        return "cannot be executed"
    return disk.why_not(status, FORBIDDEN_BITS)


def _pieces(path: str, entry: FileEntry, piece_size: int) -> Iterator[_Piece]:
    """Split a file where the manifest has the digests of its pieces."""
    if not entry.chunks or not piece_size:
        yield _Piece(path, entry, 0, entry.size, entry.sha256)
    else:
        for index, digest in enumerate(entry.chunks):
            start = index * piece_size
            yield _Piece(path, entry, start, min(piece_size, entry.size - start), digest)
