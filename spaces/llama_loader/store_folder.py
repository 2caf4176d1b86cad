"""The store's own folder: its layout and format, its lock, what is half done, a way out.

<root>/FORMAT                       the layout's version
<root>/current                      the release in use and the one before it (``generations``)
<root>/runtimes/<sha256>/           one runtime: receipt.json and files/
<root>/manifests/<sha256>.json      manifests by digest, so that a warm start needs no network
<root>/channels/<name>/<serial>.json  what was accepted from a signed channel (``channel``)
<root>/partial/<sha256>             verified chunks of what is not here whole (``partial``)
<root>/partial/<sha256 of a URL>/   what came of an archive by URL (``kept_archive``)
<root>/staging/                     what is being installed; private, gone afterwards
"""

from __future__ import annotations

import errno
import hashlib
import shutil
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

FORMAT: Final = 1


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
        """Leave the store of a newer loader alone.

        Raises:
            StoreError: it is one.
        """
        text = disk.read_if_there(self.path / "FORMAT")
        if text is not None and text.strip() != str(FORMAT).encode():
            raise StoreError(
                "STORE_NEWER",
                f"the store {self.path} has format {text[:20].decode('ascii', 'replace')!r}; "
                f"this loader knows {FORMAT}",
                hint="update the loader, or use another store with --store",
            )

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
        for folder in (self.path, *(self.path / name for name in ("runtimes", "manifests"))):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.staging.mkdir(mode=0o700, exist_ok=True)
        self.staging.chmod(0o700)
        self.check_format()
        # A folder may be there and not writable: find out before anything is fetched.
        with tempfile.TemporaryFile(dir=self.staging):
            pass
        if not (self.path / "FORMAT").is_file():
            disk.write_whole(self.path / "FORMAT", f"{FORMAT}\n".encode(), staging=self.staging)


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
