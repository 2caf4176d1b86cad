"""Keep the verified chunks of an unfinished download, so that the next process can resume it.

One file for each artifact, ``<root>/partial/<sha256>``, with each chunk in its own place. No list
says which chunks it holds: they are hashed when the file is opened and again when one is read. A
file that was cut off, damaged or put there by another program costs a download and no more. Two
processes may write to it at the same time, for a place only ever gets the bytes that belong there.
The file itself is never unpacked or executed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from threading import Lock
from typing import TYPE_CHECKING, Final, final

from llama_loader.events import Note, Sink, ignore

if TYPE_CHECKING:
    from pathlib import Path

    from llama_loader.manifest import Artifact

FOLDER: Final = "partial"
STALE_SECONDS: Final = 3 * 86400.0
"""An unfinished download that was not resumed for so long is removed."""

_PRIVATE: Final = 0o700
_FILE_MODE: Final = 0o600
_NAME: Final = re.compile(r"[0-9a-f]{64}")


def chunk_length(artifact: Artifact, index: int) -> int:
    """Return a chunk's size in bytes."""
    return min(artifact.chunk_size, artifact.size - index * artifact.chunk_size)


def is_chunk(artifact: Artifact, index: int, data: bytes) -> bool:
    """Return whether these are a chunk's bytes."""
    return hashlib.sha256(data).hexdigest() == artifact.chunks[index]


@final
class Partial:
    """The chunks of one artifact. Use as a context manager; makes no file before it keeps a chunk.

    Args:
        folder: where such files are; made if need be.
        artifact: whose chunks these are.
        sink: told if chunks cannot be kept.
    """

    def __init__(self, folder: Path, artifact: Artifact, sink: Sink = ignore) -> None:
        self._path = folder / artifact.sha256
        self._artifact = artifact
        self._sink = sink
        self._lock = Lock()
        self._handle: int | None = None
        self._found: set[int] = set()
        self._over = len(artifact.chunks) == 1  # a chunk is kept whole or not at all

    def __enter__(self) -> Partial:
        """Open the file if there is one, and find the chunks in it that are right."""
        if not self._over and os.path.lexists(self._path):
            try:
                self._open()
            except OSError:  # not a file of ours: it must not stand in the way of one
                self._unlink()
            self._found = {at for at in range(len(self._artifact.chunks)) if self._read(at)}
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file; it stays."""
        with self._lock:
            self._close()

    def has(self, index: int) -> bool:
        """Return whether a chunk is here; ``get`` may find it damaged all the same."""
        return index in self._found

    def get(self, index: int) -> bytes | None:
        """Return a chunk, verified now, or None where it is not here."""
        with self._lock:
            data = self._read(index) if index in self._found else None
            if data is None:
                self._found.discard(index)
        return data

    def keep(self, index: int, data: bytes) -> bool:
        """Keep a verified chunk; return False where it cannot be, which only costs resuming."""
        with self._lock:
            if self._over:
                return False
            try:
                self._write(self._open(), index, data)
            except OSError as error:
                self._close()
                self._unlink()
                self._sink(
                    Note(
                        "PARTIAL_NOT_KEPT",
                        f"{self._path}: {error.strerror or error}: if this download is cut off, the"
                        " next one begins anew",
                    )
                )
                return False
            self._found.add(index)
        return True

    def discard(self) -> None:
        """Remove the file: the artifact is installed, or will never be."""
        with self._lock:
            self._close()
            self._unlink()

    def _open(self) -> int:
        """Return the open file, made if need be."""
        if self._handle is None:
            self._path.parent.mkdir(mode=_PRIVATE, exist_ok=True)
            # O_NONBLOCK: another program may have put a FIFO there.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._handle = os.open(self._path, flags, _FILE_MODE)
            if not stat.S_ISREG(os.fstat(self._handle).st_mode):
                os.close(self._handle)
                self._handle = None
                raise OSError(errno.EINVAL, "not a plain file", str(self._path))
        return self._handle

    def _read(self, index: int) -> bytes | None:
        if self._handle is None:
            return None
        length, start = chunk_length(self._artifact, index), index * self._artifact.chunk_size
        try:
            data = os.pread(self._handle, length, start)
        except OSError:  # the disk fails: the chunk is fetched again
            return None
        return data if is_chunk(self._artifact, index, data) else None

    def _write(self, handle: int, index: int, data: bytes) -> None:
        at, rest = index * self._artifact.chunk_size, memoryview(data)
        while rest:
            written = os.pwrite(handle, rest, at)
            at, rest = at + written, rest[written:]

    def _close(self) -> None:
        self._over = True
        self._found.clear()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _unlink(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError:  # a folder, say: it stays, and nothing is kept
            return


def sweep(folder: Path) -> None:
    """Remove the files of downloads that were not resumed for ``STALE_SECONDS``, and only those."""
    if folder.is_symlink() or not folder.is_dir():
        return
    oldest = time.time() - STALE_SECONDS
    for left in folder.iterdir():
        try:
            if _NAME.fullmatch(left.name) and left.lstat().st_mtime < oldest:
                left.unlink(missing_ok=True)
        except OSError:  # another process was faster, or it is not ours to remove
            continue
