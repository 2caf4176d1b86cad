"""Keep the verified chunks of an unfinished download, so that the next process can resume it.

One file for each artifact, ``<root>/partial/<sha256>``, with its chunks from the first one on. Each
is hashed when it is read; the first one that is not right ends the file. A damaged file costs a
download and no more. Two processes may write to it at the same time, for a place only ever gets the
bytes that belong there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from threading import Lock
from typing import TYPE_CHECKING, Final, final

from llama_loader.events import Note, Sink, ignore

if TYPE_CHECKING:
    from llama_loader.disk import Folder
    from llama_loader.manifest import Artifact

FOLDER: Final = "partial"
STALE_SECONDS: Final = 3 * 86400.0
"""An unfinished download that was not resumed for so long is removed."""

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
    """The file of one artifact's chunks; ``sink`` is told if they cannot be kept."""

    def __init__(self, folder: Folder, artifact: Artifact, sink: Sink = ignore) -> None:
        self._folder = folder
        self._artifact = artifact
        self._sink = sink
        self._lock = Lock()
        self._is_over = False

    def get(self, index: int) -> bytes | None:
        """Return a chunk, verified now; None if it is missing or damaged, or cannot be read."""
        artifact, data = self._artifact, b""
        with self._lock, contextlib.suppress(OSError):
            if not self._is_over:
                handle = self._folder.open_file(artifact.sha256)
                try:
                    length = chunk_length(artifact, index)
                    data = os.pread(handle, length, index * artifact.chunk_size)
                finally:
                    os.close(handle)
        return data if is_chunk(artifact, index, data) else None

    def keep(self, index: int, data: bytes) -> None:
        """Keep a verified chunk. A failure is reported, and costs resuming and no more."""
        with self._lock:
            try:
                if not self._is_over:
                    self._write(data, index * self._artifact.chunk_size)
            except OSError as error:
                self._end()
                self._sink(
                    Note(
                        "PARTIAL_NOT_KEPT",
                        f"{self._folder.path}: {error.strerror or error}: if this download is cut"
                        " off, the next one begins anew",
                    )
                )

    def discard(self) -> None:
        """Remove the file: the artifact is installed, or will never be."""
        with self._lock:
            self._end()

    def close(self) -> None:
        """Keep no more chunks: the folder is closed, but another thread may still download."""
        with self._lock:
            self._is_over = True

    def _write(self, data: bytes, at: int) -> None:
        folder, name = self._folder, self._artifact.sha256
        status = folder.status(name)
        if status is not None and not (stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
            _remove(folder, name)
        with os.fdopen(folder.open_to_write(name, _FILE_MODE), "r+b") as stream:
            stream.seek(at)
            stream.write(data)

    def _end(self) -> None:
        self._is_over = True
        _remove(self._folder, self._artifact.sha256)


def sweep(folder: Folder) -> None:
    """Remove the files of downloads that were not resumed for ``STALE_SECONDS``, and only those."""
    oldest = time.time() - STALE_SECONDS
    for name in filter(_NAME.fullmatch, folder.names()):
        status = folder.status(name)
        if status is not None and status.st_mtime < oldest:
            _remove(folder, name)


def _remove(folder: Folder, name: str) -> None:
    """Remove a file or a link; a folder, which is no download, stays."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder.handle)
