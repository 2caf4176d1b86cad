"""Unpack a release's tarball into a private folder, and verify every file.

The archive must hold exactly the files that its manifest lists, as plain files; anything else is
refused while it is read.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import closing
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from llama_loader.concurrency import ahead
from llama_loader.events import Sink, Unpacking, ignore
from llama_loader.manifest import FileEntry
from llama_loader.tarball import Member, Reader, decompressed, refused

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from pathlib import Path

    from llama_loader.manifest import Artifact

FILE_MODE: Final = 0o644
PROGRAM_MODE: Final = 0o755
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

AHEAD: Final = 4
"""Pieces of 512 KiB that may wait to be written."""
_SLACK: Final = 1 << 20
"""Bytes of padding at an archive's end; tar writes up to 10 KiB, other tools more."""
_HEADERS: Final = 8 * 1024
"""Bytes of headers and padding for one file with the longest path that a manifest may list."""


def unpack(
    chunks: Generator[bytes, None, None], artifact: Artifact, into: Path, *, sink: Sink = ignore
) -> None:
    """Unpack a release's tarball into the empty folder ``into``; every byte is checked.

    Raises:
        IntegrityError: the archive is damaged, or holds anything but what the manifest lists.
        OSError: a file cannot be written.
    """
    listed = {entry.path: entry for entry in artifact.files}
    folders = _folders(listed, artifact.name)
    limit = artifact.unpacked_size + _SLACK + _HEADERS * (len(listed) + len(folders))
    plain = ahead(_plain(chunks, artifact), AHEAD)
    done = 0
    with closing(plain):
        reader = Reader(plain, artifact.name, limit)
        for member in reader.members():
            if member.kind == "folder" and member.path.rstrip("/") in folders:
                continue
            entry = _expected(member, listed, artifact.name)
            written = write(reader.content(), entry.path, into, executable=entry.executable)
            if (written.size, written.sha256) != (entry.size, entry.sha256):
                raise refused(artifact.name, f"{entry.path!r} is not what the manifest lists")
            done += entry.size
            sink(Unpacking(artifact.name, done, artifact.unpacked_size))
    if listed:
        raise refused(artifact.name, f"{min(listed)} is listed but missing")


def _plain(
    chunks: Generator[bytes, None, None], artifact: Artifact
) -> Generator[bytes, None, None]:
    """Decompress; close the chunks in the thread that reads them."""
    with closing(chunks):
        yield from decompressed(chunks, artifact.format, artifact.name)


def write(
    pieces: Iterable[bytes | memoryview], path: str, into: Path, *, executable: bool
) -> FileEntry:
    """Write a new file below ``into`` and sync it to the disk; return its size and digest.

    Its mode is 0755 where it is ``executable``, else 0644.

    Raises:
        OSError: it cannot be written, or exists already.
    """
    digest, size = hashlib.sha256(), 0
    place = into / path
    place.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(place, _NEW_FILE, stat.S_IRUSR | stat.S_IWUSR), "wb") as stream:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            stream.write(piece)
        stream.flush()
        os.fchmod(stream.fileno(), PROGRAM_MODE if executable else FILE_MODE)
        os.fsync(stream.fileno())
    return FileEntry(path=path, size=size, sha256=digest.hexdigest(), executable=executable)


def _folders(listed: dict[str, FileEntry], name: str) -> set[str]:
    """Return the folders of the listed files; none may be a listed file as well."""
    folders = {str(parent) for path in listed for parent in PurePosixPath(path).parents} - {"."}
    if folders & listed.keys():
        raise refused(name, f"{min(folders & listed.keys())!r} is listed as file and as folder")
    return folders


def _expected(member: Member, listed: dict[str, FileEntry], name: str) -> FileEntry:
    """Take a member's entry out of the list, so that a second one with its path finds none."""
    if member.kind != "file":
        raise refused(name, f"{member.path!r} is a {member.kind}, not a plain file")
    entry = listed.pop(member.path, None)
    if entry is None:
        raise refused(name, f"{member.path!r} is not listed, or stands there twice")
    mode = PROGRAM_MODE if entry.executable else FILE_MODE
    if member.mode != mode:
        raise refused(name, f"{member.path!r} has mode {member.mode:04o}, not {mode:04o}")
    if member.size != entry.size:
        raise refused(name, f"{member.path!r} has {member.size} bytes, not {entry.size}")
    return entry
