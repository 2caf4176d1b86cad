"""What is here of an artifact that is not here whole: verified chunks that outlive their process.

One file for each artifact, ``<root>/partial/<sha256>``, each chunk at its own place in it. Nothing
says which chunks it holds: they are hashed when the file is opened and again when one is taken out
of it, so a file that was cut off, damaged or put there by somebody else costs a download and no
more. Two processes may write to it at the same time: a place only ever gets the bytes that belong
there. It is never unpacked, listed or executed by itself.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from threading import Lock
from typing import TYPE_CHECKING, Final, final

from llama_loader import disk, notes
from llama_loader.events import Sink, ignore

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from llama_loader.chunks import Wanted

FOLDER: Final = "partial"
STALE_SECONDS: Final = 3 * 86400.0
"""An installation that nobody went on with for so long is not gone on with."""

_PRIVATE: Final = 0o700
_FILE_MODE: Final = 0o600


@final
class Partial:
    """The chunks of one artifact. Use as a context manager; nothing is made before one is kept.

    Args:
        folder: where such files lie; made if need be.
        wanted: the artifact.
        sink: told where chunks cannot be kept.
    """

    def __init__(self, folder: Path, wanted: Wanted, sink: Sink = ignore) -> None:
        self._path = folder / wanted.sha256
        self._wanted = wanted
        self._sink = sink
        self._lock = Lock()
        self._handle: int | None = None
        self._there: set[int] = set()
        self._refused = len(wanted.chunks) == 1  # a chunk is kept whole or not at all

    def __enter__(self) -> Partial:
        """Look at what is here, and verify it."""
        if not self._refused and os.path.lexists(self._path):
            try:
                self._open()
            except OSError:  # no file of ours: it must not stand in the way of one
                self._unlink()
            self._there = {at for at in range(len(self._wanted.chunks)) if self._read(at)}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the file; it stays."""
        with self._lock:
            self._refused = True
            self._close()

    def has(self, index: int) -> bool:
        """Whether a chunk lies here; ``get`` may find it damaged all the same."""
        return index in self._there

    def get(self, index: int) -> bytes | None:
        """Return a chunk that is verified now, None where it is not here."""
        if index not in self._there:
            return None
        with self._lock:
            data = self._read(index)
        if data is None:
            self._there.discard(index)
        return data

    def keep(self, index: int, data: bytes) -> bool:
        """Keep a verified chunk; False where it cannot be, which costs no more than resuming."""
        with self._lock:
            if self._refused:
                return False
            try:
                self._open()
                self._write(index, data)
            except OSError as error:
                self._give_up(error)
                return False
        self._there.add(index)
        return True

    def discard(self) -> None:
        """Remove the file: the artifact is installed, or will never be."""
        with self._lock:
            self._refused = True
            self._close()
            self._unlink()

    def _open(self) -> None:
        """Open the file, in place of anything else that stands there."""
        if self._handle is not None:
            return
        self._path.parent.mkdir(mode=_PRIVATE, exist_ok=True)
        # O_NONBLOCK: somebody may have put a FIFO there.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(self._path, flags, _FILE_MODE)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "not a plain file", str(self._path))
        self._handle = handle

    def _read(self, index: int) -> bytes | None:
        if self._handle is None:
            return None
        try:
            data = os.pread(self._handle, self._wanted.length(index), self._wanted.start(index))
        except OSError:  # a disk that fails: what is fetched is as good
            return None
        return data if self._wanted.is_right(index, data) else None

    def _write(self, index: int, data: bytes) -> None:
        at, rest = self._wanted.start(index), memoryview(data)
        while rest and self._handle is not None:
            written = os.pwrite(self._handle, rest, at)
            at, rest = at + written, rest[written:]

    def _give_up(self, error: OSError) -> None:
        self._refused = True
        self._close()
        self._unlink()
        self._sink(notes.partial_not_kept(self._path, error))

    def _close(self) -> None:
        self._there.clear()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _unlink(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError:  # swept by its age
            return


def sweep(folder: Path) -> None:
    """Remove what nobody went on with for ``STALE_SECONDS``."""
    if not folder.is_dir():
        return
    oldest = time.time() - STALE_SECONDS
    for left in folder.iterdir():
        try:
            if left.is_dir() and not left.is_symlink():  # an archive's (``kept_archive``)
                if disk.newest(left) < oldest:
                    shutil.rmtree(left, ignore_errors=True)
            elif left.lstat().st_mtime < oldest:
                left.unlink(missing_ok=True)
        except OSError:  # another process was faster, or it is not ours to remove
            continue
