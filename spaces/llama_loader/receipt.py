"""What stands beside an installed runtime: what it is, and every file of it, to be hashed again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from llama_loader import manifest as schema
from llama_loader import strict_json
from llama_loader.concurrency import Background
from llama_loader.errors import IntegrityError
from llama_loader.manifest import Artifact, FileEntry

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

RECEIPT: Final = "receipt.json"
FILES: Final = "files"
PROGRAM: Final = "llama-server"

CONTRADICTION: Final = "MANIFEST_CONTRADICTS_ITSELF"
"""The code of an error that fetching again does not cure."""

_REPAIR: Final = "`fetch` takes it out of use and repairs it"
_BLOCK: Final = 1 << 20
_SHOWN: Final = 10
_FORBIDDEN_BITS: Final = 0o7022
"""Set-id and sticky bits, and what would let others change a file after it was hashed."""


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

    format: Annotated[int, Meta(ge=1)]
    sha256: schema.Sha256
    release: str | None
    artifact: Artifact | None
    verified: bool
    files: tuple[FileEntry, ...]


def read(place: Path) -> Receipt:
    """Read the receipt of the runtime at ``place``, a folder named by its digest.

    Raises:
        IntegrityError: it is missing, damaged, or of another runtime.
        OSError: it cannot be read.
    """
    try:
        data = (place / RECEIPT).read_bytes()
    except FileNotFoundError as error:
        raise IntegrityError("RUNTIME_DAMAGED", f"{place}: has no receipt", hint=_REPAIR) from error
    what = f"receipt of {place.name[:12]}"
    tree = strict_json.loads(data, what=what, max_bytes=schema.MAX_MANIFEST_BYTES)
    receipt = schema.convert(tree, Receipt, what=what, code="RECEIPT_INVALID")
    of_artifact = receipt.artifact is None or (
        receipt.artifact.sha256 == receipt.sha256 and receipt.artifact.files == receipt.files
    )
    if receipt.sha256 != place.name or not of_artifact:
        raise IntegrityError(
            "RUNTIME_DAMAGED", f"{place}: its receipt is of another runtime", hint=_REPAIR
        )
    return receipt


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


def check_files(place: Path, entries: Sequence[FileEntry], piece_size: int) -> None:
    """Hash every file of the runtime at ``place``; nothing else may be there.

    Args:
        place: the runtime's folder.
        entries: all that it has to hold.
        piece_size: bytes of the pieces whose digests an entry may have.

    Raises:
        IntegrityError: names the files that are missing, changed or not listed; or a file is right
            as a whole and its pieces are not (``CONTRADICTION``).
        OSError: one cannot be read.
    """
    folder = place / FILES
    listed = {entry.path: entry for entry in entries}
    present = set(_walk(folder, ""))
    there = [entry for path, entry in listed.items() if path in present]
    sound = [entry for entry in there if _has_its_form((folder / entry.path).lstat(), entry)]
    pieces = [piece for entry in sound for piece in _pieces(entry, piece_size)]
    pieces.sort(key=lambda piece: -piece.length)
    wrong = _wrong(folder, pieces)
    _require_one_truth(folder, [entry for entry in sound if entry.path in wrong])
    changed = wrong | {entry.path for entry in there if entry not in sound}
    problems = {
        "changed": changed,
        "missing": listed.keys() - present,
        "not listed": present - listed.keys(),
    }
    if any(problems.values()):
        told = "; ".join(f"{_names(paths)} {what}" for what, paths in problems.items() if paths)
        raise IntegrityError("RUNTIME_DAMAGED", f"{place}: {told}", hint=_REPAIR)


def _require_one_truth(folder: Path, wrong: Sequence[FileEntry]) -> None:
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


def _walk(folder: Path, inside: str) -> Iterator[str]:
    """Yield the path of everything that is not a real folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = f"{inside}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(folder / entry.name, f"{path}/")
                else:
                    yield path
    except (FileNotFoundError, NotADirectoryError):
        return


def _has_its_form(status: os.stat_result, entry: FileEntry) -> bool:
    """Whether it is a plain file of the right size that nobody but its owner can write."""
    executable = bool(status.st_mode & stat.S_IXUSR)
    regular = stat.S_ISREG(status.st_mode) and not status.st_mode & _FORBIDDEN_BITS
    return regular and status.st_size == entry.size and executable == entry.executable


@dataclass(frozen=True)
class _Piece:
    """Bytes of an installed file, and what their sha256 must be."""

    entry: FileEntry
    start: int
    length: int
    sha256: str

    def is_in(self, folder: Path) -> bool:
        """Hash it, if the file that is open is what was looked at before."""
        # O_NONBLOCK: somebody may have put a FIFO there.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        path = folder / self.entry.path
        with os.fdopen(os.open(path, flags), "rb", buffering=0) as stream:
            if not _has_its_form(os.fstat(stream.fileno()), self.entry):
                return False
            stream.seek(self.start)
            digest, left = hashlib.sha256(), self.length
            while left and (block := stream.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
        return digest.hexdigest() == self.sha256


def _pieces(entry: FileEntry, piece_size: int) -> Iterator[_Piece]:
    """Split a file where the manifest has the digests of its pieces."""
    if not entry.chunks or not piece_size:
        yield _Piece(entry, 0, entry.size, entry.sha256)
        return
    for index, digest in enumerate(entry.chunks):
        start = index * piece_size
        yield _Piece(entry, start, min(piece_size, entry.size - start), digest)


def _wrong(folder: Path, pieces: Sequence[_Piece]) -> set[str]:
    """Hash pieces in as many threads as there are processors; returns the paths of wrong ones.

    Hashing releases the interpreter's lock: 190 MB in 4 MiB pieces keep every core busy.
    """
    left: SimpleQueue[_Piece] = SimpleQueue()
    for piece in pieces:
        left.put(piece)

    def hash_some() -> set[str]:
        wrong = set()
        with contextlib.suppress(Empty):
            while True:
                piece = left.get_nowait()
                if not piece.is_in(folder):
                    wrong.add(piece.entry.path)
        return wrong

    count = min(len(pieces), os.cpu_count() or 1)
    workers = [Background(hash_some) for _ in range(count)]
    return set().union(*(worker.result() for worker in workers))


def _names(paths: Collection[str]) -> str:
    ordered = sorted(paths)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return f"{', '.join(ordered[:_SHOWN])}{more}"
