"""An installed runtime: its record, and the check of its files against a list.

A receipt is written once, by the installer. Where a manifest is trusted, its list counts instead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from llama_loader import disk, strict_json
from llama_loader import manifest as schema
from llama_loader.concurrency import Background
from llama_loader.disk import FORBIDDEN_BITS, NO_FILE, NOT_WRITABLE, Folder
from llama_loader.errors import IntegrityError
from llama_loader.events import Sink, Stage, ignore
from llama_loader.manifest import Artifact, FileEntry
from llama_loader.store_folder import FORMAT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

RECEIPT: Final = "receipt.json"
FILES: Final = "files"
PROGRAM: Final = "llama-server"

CONTRADICTION: Final = "MANIFEST_CONTRADICTS_ITSELF"
"""The code of an error that fetching again does not cure."""
OTHER_FILES: Final = "RUNTIME_LISTS_OTHER_FILES"
"""The code of a receipt that lists other files than the manifest for the same archive."""

_REPAIR: Final = "`fetch` takes it out of use and repairs it"
_BLOCK: Final = 1 << 20
_SHOWN: Final = 10


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What an installer writes down, once.

    Attributes:
        format: the store's.
        sha256: of the archive.
        release: the release's name, None for an archive by URL.
        artifact: the manifest's entry, None for an archive by URL.
        verified: False where nothing pinned the archive.
        files: all there is.
    """

    format: Annotated[int, Meta(ge=1)] = FORMAT
    sha256: schema.Sha256
    release: str | None = None
    artifact: Artifact | None = None
    verified: bool = True
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Installed:
    """A runtime in a store.

    Attributes:
        folder: the absolute folder that holds ``llama-server``, or the libraries of an artifact
            that has none.
        root: the runtime's own folder in the store.
        sha256: of the archive that it came from.
        release: the release's name, None for an archive by URL.
        artifact: the manifest's entry, None for an archive by URL.
        verified: False if nothing pinned the archive.
        files: all that it must hold.
        sink: told how long ``verify`` took.
    """

    folder: Path
    root: Path
    sha256: str
    release: str | None
    artifact: Artifact | None
    verified: bool
    files: tuple[FileEntry, ...] = field(default=(), compare=False, repr=False)
    sink: Sink = field(default=ignore, compare=False, repr=False)

    def verify(self) -> None:
        """Hash every file now. Call it as the last act before each execution.

        Raises:
            IntegrityError: names the files that are damaged, missing or not listed.
            StoreError: one cannot be read.
        """
        with disk.errors(self.root):
            try:
                place = Folder.open(self.root)
            except (FileNotFoundError, NotADirectoryError) as error:
                told = f"{self.root} was removed"
                raise IntegrityError("RUNTIME_DAMAGED", told, hint="start again") from error
            with place:
                self.check(place)

    def check(self, place: Folder, *, hashed: bool = True) -> None:
        """Check the files of the open folder ``place``, which is ``root``."""
        started = time.monotonic()
        piece_size = self.artifact.piece_size if self.artifact else 0
        check_files(place, self.files, piece_size, hashed=hashed)
        if hashed:
            size = sum(entry.size for entry in self.files)
            self.sink(Stage("verify", time.monotonic() - started, size))


def read(place: Folder) -> Receipt:
    """Read the receipt of a runtime, a folder named by its archive's digest.

    Raises:
        IntegrityError: it is missing, damaged, or of another runtime.
        OSError: it cannot be read.
    """
    data = place.read(RECEIPT, schema.MAX_MANIFEST_BYTES)
    if data is None:
        raise IntegrityError("RUNTIME_DAMAGED", f"{place.path}: has no receipt", hint=_REPAIR)
    name = place.path.name
    what = f"receipt of {name[:12]}"
    tree = strict_json.loads(data, what=what, max_bytes=schema.MAX_MANIFEST_BYTES)
    receipt = schema.convert(tree, Receipt, what=what, code="RECEIPT_INVALID")
    of_artifact = receipt.artifact is None or (
        receipt.artifact.sha256 == receipt.sha256 and receipt.artifact.files == receipt.files
    )
    if receipt.sha256 != name or not of_artifact:
        raise IntegrityError(
            "RUNTIME_DAMAGED", f"{place.path}: its receipt is of another runtime", hint=_REPAIR
        )
    return receipt


def describe(found: Receipt, place: Path, trusted: Artifact | None, sink: Sink) -> Installed:
    """Return the runtime in the folder ``place``; a trusted entry counts before its receipt."""
    return Installed(
        folder=place / FILES / main_folder(found, place.name),
        root=place,
        sha256=found.sha256,
        release=found.release,
        artifact=trusted or found.artifact,
        verified=found.verified,
        files=trusted.files if trusted else found.files,
        sink=sink,
    )


def same_files(one: tuple[FileEntry, ...], other: tuple[FileEntry, ...]) -> bool:
    """Whether two lists mean the same files; a manifest may gain their pieces' digests later."""
    return [msgspec.structs.replace(entry, chunks=()) for entry in one] == [
        msgspec.structs.replace(entry, chunks=()) for entry in other
    ]


def main_folder(found: Receipt, name: str) -> str:
    """Return the folder of a runtime that others ask for: its server's, or its libraries'."""
    if found.artifact is not None and found.artifact.kind == schema.CUDA_RUNTIME:
        return found.artifact.library_folder
    return find_program((entry.path for entry in found.files), name)


def find_program(paths: Iterable[str], name: str) -> str:
    """Return the folder (relative, ``.`` at the top) that holds ``llama-server``.

    Raises:
        IntegrityError: there is none, or there are several.
    """
    found = [path for path in paths if path.rpartition("/")[2] == PROGRAM]
    if len(found) != 1:
        what = "holds no llama-server" if not found else f"holds {' and '.join(sorted(found))}"
        raise IntegrityError(
            "NO_SERVER_IN_ARCHIVE",
            f"{name} {what}",
            hint="name an archive of a llama.cpp release for Linux",
        )
    return found[0].rpartition("/")[0] or "."


def check_files(
    place: Folder, entries: Sequence[FileEntry], piece_size: int, *, hashed: bool = True
) -> None:
    """Check that a runtime has exactly the files of a list; wrong modes are set right.

    Args:
        place: the runtime's folder.
        entries: all files that it must hold.
        piece_size: bytes of the pieces whose digests an entry may have.
        hashed: hash every file; if not, names, sizes, owners and modes are all that is checked.

    Raises:
        IntegrityError: names the files that are missing, changed or not listed; or a file is right
            as a whole and its pieces are not (``CONTRADICTION``).
        OSError: one cannot be read.
    """
    listed = {entry.path: entry for entry in entries}
    try:
        with place.folder(FILES) as files:
            present = set(_walk(files, ""))
            there = [entry for path, entry in listed.items() if path in present]
            wrong = _wrong(files, there, piece_size if hashed else None)
            _require_one_truth(files, [entry for entry in there if entry.path in wrong])
    except OSError as error:
        if error.errno not in (*NO_FILE, errno.EPERM, errno.EACCES):
            raise
        told = f"{place.path}: {error.filename}: {error.strerror}"
        raise IntegrityError("RUNTIME_DAMAGED", told, hint=_REPAIR) from error
    problems = {
        "changed": wrong,
        "missing": listed.keys() - present,
        "not listed": present - listed.keys(),
    }
    told = "; ".join(f"{_names(paths)} {what}" for what, paths in problems.items() if paths)
    if told:
        raise IntegrityError("RUNTIME_DAMAGED", f"{place.path}: {told}", hint=_REPAIR)


def _require_one_truth(folder: Folder, wrong: Sequence[FileEntry]) -> None:
    """Tell a list that contradicts itself from a file that was changed.

    While a file is unpacked it is hashed as a whole: hashing its pieces as well would cost a
    quarter of an installation.
    """
    for entry in wrong:
        whole = _Piece(entry, 0, entry.size, entry.sha256)
        if entry.chunks and whole.is_in(folder):
            raise IntegrityError(
                CONTRADICTION,
                f"{entry.path} has the sha256 that is listed for it, but not its pieces'",
                hint="the manifest contradicts itself; ask who published it",
            )


def _walk(folder: Folder, inside: str) -> Iterator[str]:
    """Yield the path of everything that is not a folder."""
    for name in folder.names():
        path = f"{inside}{name}"
        if folder.has_folder(name):
            with folder.folder(name) as found:
                yield from _walk(found, f"{path}/")
        else:
            yield path


def _has_its_form(handle: int, entry: FileEntry) -> bool:
    """Whether it is a regular file of the right size that only this user can change."""
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
        return False
    wanted = 0o755 if entry.executable else 0o644
    if stat.S_IMODE(status.st_mode) != wanted:
        try:
            os.fchmod(handle, wanted)
        except OSError as error:  # another user's file, a read-only disk, or one without modes
            if error.errno not in NOT_WRITABLE:
                raise
        status = os.fstat(handle)
    mine = status.st_uid in (0, os.geteuid()) and not status.st_mode & FORBIDDEN_BITS
    return mine and (not entry.executable or bool(status.st_mode & stat.S_IXUSR))


@dataclass(frozen=True)
class _Piece:
    """Bytes of an installed file, and what their sha256 must be."""

    entry: FileEntry
    start: int
    length: int
    sha256: str

    def is_in(self, folder: Folder) -> bool:
        """Hash the piece, if the file that is open now still has its form."""
        try:
            handle = folder.open_file(self.entry.path)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            return False
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, handle)
            if not _has_its_form(handle, self.entry):
                return False
            digest, at, end = hashlib.sha256(), self.start, self.start + self.length
            while at < end and (block := os.pread(handle, min(end - at, _BLOCK), at)):
                digest.update(block)
                at += len(block)
        return digest.hexdigest() == self.sha256


def _pieces(entry: FileEntry, piece_size: int | None) -> Iterator[_Piece]:
    """Split a file where the manifest has the digests of its pieces.

    None for ``piece_size`` stands for no bytes at all: only the file's form is checked.
    """
    if piece_size is None:
        yield _Piece(entry, 0, 0, hashlib.sha256().hexdigest())
    elif not entry.chunks or not piece_size:
        yield _Piece(entry, 0, entry.size, entry.sha256)
    else:
        for index, digest in enumerate(entry.chunks):
            start = index * piece_size
            yield _Piece(entry, start, min(piece_size, entry.size - start), digest)


def _wrong(folder: Folder, entries: Sequence[FileEntry], piece_size: int | None) -> set[str]:
    """Hash files in as many threads as there are processors; return the paths of wrong ones.

    Hashing releases the interpreter's lock: 190 MB in 4 MiB pieces keep every core busy.
    """
    pieces = [piece for entry in entries for piece in _pieces(entry, piece_size)]
    left = deque(sorted(pieces, key=lambda piece: -piece.length))
    wrong: set[str] = set()

    def hash_some() -> None:
        with contextlib.suppress(IndexError):
            while True:
                piece = left.popleft()
                if not piece.is_in(folder):
                    wrong.add(piece.entry.path)

    workers = [Background(hash_some) for _ in range(min(len(pieces), os.cpu_count() or 1))]
    for worker in workers:
        worker.result()
    return wrong


def _names(paths: Collection[str]) -> str:
    ordered = sorted(paths)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return f"{', '.join(ordered[:_SHOWN])}{more}"


def hold(place: Folder) -> None:
    """Write down that a runtime is in use: now, and until this process and its forks have ended.

    That is a shared lock on its folder, which the kernel releases however the process ends. If
    locks do not work, or the store is read-only, the time of the last use is all, or nothing is.
    """
    with contextlib.suppress(OSError):
        os.utime(place.handle)
    status = os.fstat(place.handle)
    if (status.st_dev, status.st_ino) in _held:
        return
    with contextlib.suppress(OSError):
        handle = os.dup(place.handle)
        _held[status.st_dev, status.st_ino] = handle
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


_held: dict[tuple[int, int], int] = {}
"""Open folders by device and inode, once each."""
