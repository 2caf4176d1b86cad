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
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Final, final

from llama_loader.disk import STALE_SECONDS
from llama_loader.events import Note, Sink, ignore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_loader.disk import Folder
    from llama_loader.manifest import Artifact

FOLDER: Final = "partial"
_NAME: Final = re.compile(r"[0-9a-f]{64}")


def chunk_length(artifact: Artifact, index: int) -> int:
    """Return a chunk's size in bytes."""
    return min(artifact.chunk_size, artifact.size - index * artifact.chunk_size)


def is_chunk(artifact: Artifact, index: int, data: bytes) -> bool:
    """Return whether these are a chunk's bytes."""
    return hashlib.sha256(data).hexdigest() == artifact.chunks[index]


@final
class Partial:
    """The file of one artifact's chunks; ``sink`` is told if they cannot be kept.

    Once it is closed nothing is read or kept, although another thread may still download.
    """

    def __init__(self, folder: Folder, artifact: Artifact, sink: Sink = ignore) -> None:
        self._folder = folder
        self._artifact = artifact
        self._sink = sink
        self._file: IO[bytes] | None = None
        with self._reporting():
            status = folder.status(artifact.sha256)
            if status is not None and not (stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
                _remove(folder, artifact.sha256)
            self._file = os.fdopen(folder.open_to_write(artifact.sha256, 0o600), "r+b")

    def get(self, index: int) -> bytes | None:
        """Return a chunk, verified now; None if it is missing or damaged, or cannot be read."""
        data = b""
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            if self._file is not None:
                self._file.seek(index * self._artifact.chunk_size)
                data = self._file.read(chunk_length(self._artifact, index))
        return data if is_chunk(self._artifact, index, data) else None

    def keep(self, index: int, data: bytes) -> None:
        """Keep a verified chunk. A failure is reported, and costs resuming and no more."""
        with self._reporting(), contextlib.suppress(ValueError):
            if self._file is not None:
                self._file.seek(index * self._artifact.chunk_size)
                self._file.write(data)
                self._file.flush()

    def discard(self) -> None:
        """Remove the file: the artifact is installed, or will never be."""
        self.close()
        _remove(self._folder, self._artifact.sha256)

    def close(self) -> None:
        """Keep no more chunks. The file's own lock lets a read or write of another thread end."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written cannot be written now
                self._file.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            self._sink(
                Note(
                    "PARTIAL_NOT_KEPT",
                    f"{self._folder.path}: {error.strerror or error}: if this download is cut"
                    " off, the next one begins anew",
                )
            )


def sweep(folder: Folder) -> None:
    """Remove the files of downloads that were not resumed for ``STALE_SECONDS``, and only those."""
    for name in folder.unused(_NAME, STALE_SECONDS):
        _remove(folder, name)


def _remove(folder: Folder, name: str) -> None:
    """Remove a file or a link; a folder, which is no download, stays."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder.handle)
