"""The store's own folder: its layout and format, its lock, what is half done, a way out.

<root>/FORMAT                       marks the folder as a store; the first thing written
<root>/current                      the release in use and the one before it (``generations``)
<root>/runtimes/<sha256>/           one runtime: receipt.json and files/
<root>/manifests/<sha256>.json      manifests by digest, so that a warm start needs no network
<root>/channels/<name>/<serial>.json  what was accepted from a signed channel (``channel``)
<root>/partial/<sha256>             verified chunks of what is not here whole (``partial``)
<root>/staging/                     what is being installed; private, gone afterwards
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from llama_loader import disk, notes
from llama_loader.errors import StoreError
from llama_loader.events import Note

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llama_loader.events import Sink

FORMAT: Final = 2
MARKER: Final = "llama-loader-store "
"""What the file FORMAT begins with, before the number: no other program writes it."""
NAMES: Final = frozenset(
    {"FORMAT", "channels", "current", "manifests", "partial", "runtimes", "staging", "test-runs"}
)
"""All names that a store has in its folder."""
_MAX_MARKER: Final = 64


class StoreFolder:
    """Where a store lies. Nothing is made before ``prepare``.

    Attributes:
        path: the folder; a private one once the usual one was not writable.
    """

    def __init__(self, path: Path, sink: Sink) -> None:
        self.path = path.absolute()
        self._sink = sink

    @property
    def staging(self) -> Path:
        """What is being installed."""
        return self.path / "staging"

    @property
    def runtimes(self) -> Path:
        """What is installed."""
        return self.path / "runtimes"

    def prepare(self) -> None:
        """Make the store's folders, or fall back to a private temporary store and say so.

        Raises:
            StoreError: neither can be done, or the store is of a newer loader.
        """
        from llama_loader import partial

        try:
            self._make_folders()
        except OSError as error:
            if error.errno not in disk.NOT_WRITABLE:
                raise disk.failure(self.path, error) from error
            usual = self.path
            with disk.errors(usual):
                self.path = disk.private_folder("llama-loader")
                self._make_folders()
            self._sink(notes.store_temporary(usual, error, self.path))
        with disk.errors(self.path):
            disk.sweep(self.staging)
            partial.sweep(self.path / partial.FOLDER)

    def check_format(self) -> None:
        """Leave a folder alone that is not a store, and the store of a newer loader.

        Raises:
            StoreError: it is one of these.
            OSError: it cannot be looked at.
        """
        try:
            names = set(os.listdir(self.path))  # noqa: PTH208 - names, no paths
        except FileNotFoundError:
            return
        text = self._marker()
        whole = f"{MARKER}{FORMAT}\n"
        if text == whole or not names:
            self._require_no_links(names)
            return
        number = text.removeprefix(MARKER).strip()
        known = 1 if text in {number, f"{number}\n"} else FORMAT
        if number.isascii() and number.isdigit() and int(number) > known:
            raise StoreError(
                "STORE_NEWER",
                f"the store {self.path} has format {number}; this loader knows {FORMAT}",
                hint="update the loader, or use another store with --store",
            )
        older = text.strip() == "1" and names <= NAMES
        begun = whole.startswith(text) and names == {"FORMAT"}
        if not older and not begun:
            raise _not_ours(self.path, "it holds other files, and no file FORMAT of a store")
        self._require_no_links(names)

    def _marker(self) -> str:
        """Return what FORMAT says; what is not a small plain file says nothing."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            handle = os.open(self.path / "FORMAT", flags)
        except OSError:
            return "\0"
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                return "\0"
            return stream.read(_MAX_MARKER).decode("ascii", "replace")

    def _require_no_links(self, names: set[str]) -> None:
        for name in sorted(names & NAMES - {"FORMAT", "current"}):
            if not stat.S_ISDIR((self.path / name).lstat().st_mode):
                raise _not_ours(self.path, f"{name} in it is no folder, or a link to one")

    def discard(self, place: Path) -> None:
        """Take a runtime out of use in one step, then delete it."""
        try:
            self.staging.mkdir(mode=0o700, parents=True, exist_ok=True)
            grave = disk.new_folder(self.staging, "damaged")
            place.rename(grave / place.name)
        except FileNotFoundError:  # another process was faster
            return
        except OSError as error:
            if error.errno in disk.NOT_WRITABLE:  # the temporary store will do
                return
            raise
        shutil.rmtree(grave, ignore_errors=True)

    @contextmanager
    def lock(self, sha256: str, seconds: float) -> Iterator[None]:
        """Be the only installer of a runtime; go on without that where it cannot be had."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.staging / f"{sha256}.lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self._sink(Note("STORE_BUSY", "another process installs it; waiting for that"))
                lock.acquire(timeout=seconds)
        except (Timeout, NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            why = "another installer holds it too long" if isinstance(error, Timeout) else error
            self._sink(Note("STORE_NOT_LOCKED", f"installing without a lock: {why}"))
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def _make_folders(self) -> None:
        # Whoever may write here may change what was verified, whatever umask this process has.
        self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.check_format()
        marker = f"{MARKER}{FORMAT}\n"
        if self._marker() != marker and not (self.path / "runtimes").exists():
            self._begin(marker)
        for name in ("runtimes", "manifests"):
            (self.path / name).mkdir(mode=0o755, exist_ok=True)
        self.staging.mkdir(mode=0o700, exist_ok=True)
        self.staging.chmod(0o700)
        # A folder may be there and not writable: find out before anything is fetched.
        with tempfile.TemporaryFile(dir=self.staging):
            pass
        if self._marker() != marker:
            disk.write_whole(self.path / "FORMAT", marker.encode(), staging=self.staging)

    def _begin(self, marker: str) -> None:
        """Claim an empty folder: the marker is the first thing in it.

        A part of it, alone, is what a process left that was killed here: it is completed. Processes
        that do this at once write the same bytes to the same place.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self.path / "FORMAT", flags, 0o644), "wb") as stream:
            stream.write(marker.encode())
            stream.flush()
            os.fsync(stream.fileno())
        disk.sync_folder(self.path)


def _not_ours(path: Path, why: str) -> StoreError:
    return StoreError(
        "STORE_NOT_OURS",
        f"{path} is not a store of this loader: {why}",
        hint="give --store (or HF_HOME) a folder that is new, empty, or already a store",
    )


def kept_manifest(root: Path, sha256: str) -> bytes | None:
    """Return a manifest that lies in the store, hashed now; None where it does not, or is damaged.

    Raises:
        StoreError: it cannot be read.
    """
    path = root / "manifests" / f"{sha256}.json"
    with disk.errors(path):
        data = disk.read_if_there(path)
    sound = data is not None and hashlib.sha256(data).hexdigest() == sha256
    return data if sound else None
