"""The record beside an installed runtime, and the check of the runtime's files against a list.

A receipt is written once, by the installer. Where a manifest is trusted, its list counts instead.
"""

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
from llama_loader.disk import FORBIDDEN_BITS, NO_FILE, NOT_WRITABLE, Folder
from llama_loader.errors import IntegrityError
from llama_loader.manifest import Artifact, FileEntry
from llama_loader.store_folder import FORMAT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

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
    try:
        files = place.folder(FILES)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        missing = [entry.path for entry in entries]
        raise _damaged(place, {"missing": missing}) from error
    with files:
        _check_files(place, files, entries, piece_size, hashed=hashed)


def _check_files(
    place: Folder, files: Folder, entries: Sequence[FileEntry], piece_size: int, *, hashed: bool
) -> None:
    listed = {entry.path: entry for entry in entries}
    try:
        present = set(_walk(files, ""))
        there = [entry for path, entry in listed.items() if path in present]
        sound = [entry for entry in there if _is_in_form(files, entry)]
        wrong = _wrong(files, sound, piece_size) if hashed else set()
    except PermissionError as error:  # a folder of another user
        told = f"{error.filename}: {error.strerror}"
        raise IntegrityError("RUNTIME_DAMAGED", told, hint=_REPAIR) from error
    _require_one_truth(files, [entry for entry in sound if entry.path in wrong])
    changed = wrong | {entry.path for entry in there if entry not in sound}
    problems = {
        "changed": changed,
        "missing": listed.keys() - present,
        "not listed": present - listed.keys(),
    }
    if any(problems.values()):
        raise _damaged(place, problems)


def _damaged(place: Folder, problems: Mapping[str, Collection[str]]) -> IntegrityError:
    told = "; ".join(f"{_names(paths)} {what}" for what, paths in problems.items() if paths)
    return IntegrityError("RUNTIME_DAMAGED", f"{place.path}: {told}", hint=_REPAIR)


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
        status = folder.status(name)
        if status is not None and stat.S_ISDIR(status.st_mode):
            with folder.folder(name) as found:
                yield from _walk(found, f"{path}/")
        else:
            yield path


def _is_in_form(folder: Folder, entry: FileEntry) -> bool:
    handle = _open(folder, entry)
    if handle is not None:
        os.close(handle)
    return handle is not None


def _open(folder: Folder, entry: FileEntry) -> int | None:
    """Open a file if it is a regular one of the right size that only this user can change."""
    try:
        handle = folder.open_file(entry.path)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        return None
    if _has_its_form(handle, entry):
        return handle
    os.close(handle)
    return None


def _has_its_form(handle: int, entry: FileEntry) -> bool:
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
        handle = _open(folder, self.entry)
        if handle is None:
            return False
        with os.fdopen(handle, "rb", buffering=0) as stream:
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


def _wrong(folder: Folder, entries: Sequence[FileEntry], piece_size: int) -> set[str]:
    """Hash files in as many threads as there are processors; returns the paths of wrong ones.

    Hashing releases the interpreter's lock: 190 MB in 4 MiB pieces keep every core busy.
    """
    pieces = [piece for entry in entries for piece in _pieces(entry, piece_size)]
    pieces.sort(key=lambda piece: -piece.length)
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
