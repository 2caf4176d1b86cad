"""Installed runtimes, by the digest of the archive that they came from.

<root>/FORMAT                       marks the folder as a store; the first thing written
<root>/runtimes/<sha256>/           one runtime: receipt.json and files/
<root>/manifests/<sha256>.json      manifests by digest, so that a warm start needs no network
<root>/channels/                    what was accepted from signed channels (``trust``)
<root>/shown/                       what starts and answers took (``llama_space.request``)
<root>/partial/<sha256>             verified chunks of an unfinished download, from the first one
<root>/staging/                     what is being installed; private, removed afterwards

A runtime appears by one rename of a complete, synced folder, so it is whole or missing, with or
without working file locks. Where locks work, one process at a time writes to the store. What this
module removes has a name that only a store gives, in a folder that carries a store's marker.
"""

import contextlib
import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from llama_loader import disk, locations, receipt, store_folder
from llama_loader import manifest as schema
from llama_loader.disk import Folder
from llama_loader.errors import IntegrityError, NetworkError, SettingError
from llama_loader.events import Note, Sink, Stage, ignore
from llama_loader.fetch import Fetcher
from llama_loader.manifest import Artifact, Manifest
from llama_loader.receipt import FILES, RECEIPT, Installed, Receipt

MAX_AGE_SECONDS: Final = 14 * 86400.0
"""A runtime that was not executed for so long is removed."""
LOCK_SECONDS: Final = 900.0
"""An installation over a slow link; after that the other installer counts as hung."""

_POLL_SECONDS: Final = 0.05
_TRIES: Final = 16
"""Renames of one runtime: without locks each that fails may be another installer's success."""
_TAKEN: Final = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


class Store:
    """Runtimes below ``root``, or a private folder once that cannot be used.

    Nothing is written before something is installed. All methods, and the constructor, raise
    ``StoreError``: the folder is no store, is of a newer loader, fails, or its path would be
    misread. Those that fetch raise ``NetworkError`` for what cannot be had, and ``IntegrityError``
    for what is not as published or pinned, damaged or unsafe.
    """

    def __init__(self, root: Path, *, sink: Sink = ignore) -> None:
        self.root = root.absolute()
        self._sink = sink
        self._is_private = False
        store_folder.require_usable(self.root)

    def find(
        self, sha256: str, trusted: Artifact | None = None, *, hashed: bool = True
    ) -> Installed | None:
        """Return an installed runtime, every file of it hashed now; None unless it is undamaged.

        ``trusted`` is the manifest's entry; without it the runtime's receipt counts. If not
        ``hashed``, what the receipt says is returned, unless the store could not be mended: the
        caller verifies it before it executes it, and repairs it then.
        """
        if not os.path.lexists(self.root):
            return None
        with self._opened() as root:
            return self._find(root, sha256, trusted, hashed=hashed)

    def install(
        self,
        artifact: Artifact,
        urls: Sequence[str],
        fetcher: Fetcher,
        *,
        note: Note | None = None,
        hashed: bool = True,
    ) -> Installed:
        """Return the artifact's runtime, fetched (``note`` is told first) unless it is installed.

        ``hashed`` is that of ``find``.
        """
        found = self.find(artifact.sha256, artifact, hashed=hashed)
        if found is not None:
            return found
        with self._writing() as (root, staging):

            def fill(into: Path) -> Receipt:
                if note is not None:
                    self._sink(note)
                self._fetch(root, artifact, urls, fetcher, into)
                return Receipt(sha256=artifact.sha256, artifact=artifact)

            return self._install(root, staging, artifact.sha256, artifact, fill)

    def install_archive(
        self, url: str, sha256: str | None, fetcher: Fetcher, *, hashed: bool = True
    ) -> Installed:
        """Return the runtime of any llama.cpp archive, wherever its ``llama-server`` lies.

        Without a pin it is fetched every time, and a note has its digest. ``hashed``: see ``find``.
        """
        found = self.find(sha256, hashed=hashed) if sha256 is not None else None
        if found is None:
            found = self._install_archive(url, sha256, fetcher)
        # an artifact of libraries has none
        receipt.find_program((entry.path for entry in found.files), url)
        return found

    def manifest(self, url: str, sha256: str | None, fetcher: Fetcher) -> Manifest:
        """Return a manifest: a pinned one from the store if it is there, else fetched.

        Offline, the error of one that is not pinned names the digest of the last one from there.
        """
        what = f"manifest {locations.shown(url)}"
        if sha256 is not None:
            kept = self.read("manifests", f"{sha256}.json", limit=schema.MAX_MANIFEST_BYTES)
            if kept is not None and hashlib.sha256(kept).hexdigest() == sha256:
                return schema.parse(kept, what=what)
        at = ("manifests", f"{hashlib.sha256(url.encode()).hexdigest()}.last")
        last = self.read(*at, limit=64) if sha256 is None else None
        try:
            data = fetcher.manifest_bytes(url)
        except NetworkError as error:
            if last is None or error.code != "OFFLINE":
                raise
            shown, pin = locations.shown(url), last.decode("ascii", "replace")
            raise NetworkError("OFFLINE/pin", url=shown, digest=pin) from error
        digest = hashlib.sha256(data).hexdigest()
        _require_pin(what, digest, sha256, "MANIFEST_PIN_MISMATCH")
        manifest = schema.parse(data, what=what)
        if sha256 is None:  # a release's manifest never expires
            code = "MANIFEST_NOT_PINNED/channel" if manifest.expires else "MANIFEST_NOT_PINNED"
            self._sink(Note.of(code, what=what, digest=digest))
        if last != digest.encode():
            self.write("manifests", f"{digest}.json", data=data)
            if sha256 is None:
                self.write(*at, data=digest.encode())
        return manifest

    def verify(self, folder: Path, artifacts: Sequence[Artifact] | None = None) -> Installed:
        """Hash the files of the installed runtime that a folder is in, in whichever store.

        They are compared with the entry among the manifest's ``artifacts``; if there is no
        manifest, with the receipt, which is reported: who can change a file can change that too.
        A folder that is in no installed runtime raises ``SettingError``, and damaged files
        ``IntegrityError``.
        """
        resolved = Path(os.path.realpath(folder))  # resolve() raises RuntimeError for a loop
        for path in (resolved, *resolved.parents):
            if path.parent.name == "runtimes" and store_folder.DIGEST.fullmatch(path.name):
                break
        else:
            raise SettingError("NOT_A_RUNTIME", folder=folder)
        entry = next((one for one in artifacts or () if one.sha256 == path.name), None)
        if artifacts is not None and entry is None:
            raise IntegrityError("OTHER_ARTIFACT", path=path)
        with disk.errors(path), contextlib.ExitStack() as opened:
            try:
                place = opened.enter_context(Folder.open(path))
            except (FileNotFoundError, NotADirectoryError) as error:
                raise SettingError("NOT_A_RUNTIME", folder=folder) from error
            installed = Receipt.read(place).installed(path, entry, self._sink)
        installed.verify()
        if not os.path.exists(resolved):  # noqa: PTH110 - Path's raises for too long a name
            raise SettingError("NOT_A_RUNTIME", folder=folder)
        if entry is None:
            self._sink(Note.of("COMPARED_WITH_RECEIPT", path=path))
        return installed

    def read(self, *names: str, limit: int) -> bytes | None:
        """Return a small file of the store; None unless it is a regular file of ``limit`` bytes."""
        if not os.path.lexists(self.root):
            return None
        with self._opened() as root:
            return root.read("/".join(names), limit)

    def write(self, *names: str, data: bytes) -> None:
        """Write a small file: the old one or the new one at every moment; its folders are made."""
        with self._writing() as (root, staging), contextlib.ExitStack() as opened:
            place = root
            for name in names[:-1]:
                place = opened.enter_context(place.folder(name, make=0o755))
            place.replace(names[-1], data, staging=staging)

    @contextmanager
    def _opened(self, *, make: bool = False) -> Iterator[Folder]:
        """Open the store, and turn the disk's errors into the store's; ``make`` it to write."""
        with disk.errors(self.root):
            root = self._open(make=make)
        with root, disk.errors(self.root):
            yield root

    def _open(self, *, make: bool) -> Folder:
        """Open it; a private one if this user cannot use it, or others can change it."""
        try:
            place = disk.trusted(self.root, make=0o755 if make else None, sticky=False)
            return store_folder.open_store(place, make=make)
        except OSError as error:
            if error.errno not in disk.NOT_WRITABLE or self._is_private:
                raise
            usual, self.root, self._is_private = self.root, disk.make_private_folder(), True
            self._sink(Note.of("STORE_TEMPORARY", usual=usual, why=error.strerror, root=self.root))
            return self._open(make=make)

    @contextmanager
    def _writing(self) -> Iterator[tuple[Folder, Folder]]:
        """Open the store and its staging folder to write; what ended processes left there goes."""
        # No other process writes meanwhile, if locks work and none takes too long
        with (
            self._opened(make=True) as root,
            root.folder("staging") as staging,
            root.folder("staging") as probe,
        ):
            try:
                # a working lock refuses a second opener, also this process
                is_alone = self._locks(staging) and not probe.lock()
                staging.sweep(0.0 if is_alone else disk.STALE_SECONDS)
                yield root, staging
            finally:
                staging.unlock()

    def _locks(self, staging: Folder) -> bool:
        """Lock the store; return False if locks fail here, or another process has it too long."""
        end = time.monotonic() + LOCK_SECONDS
        try:
            is_locked = staging.lock()
        except OSError:  # as on some network disks
            return False
        if not is_locked:
            self._sink(Note.of("STORE_BUSY"))
        while not is_locked and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            is_locked = staging.lock()
        return is_locked

    def _find(
        self,
        root: Folder,
        sha256: str,
        trusted: Artifact | None,
        *,
        hashed: bool = True,
        told: Sink = ignore,
    ) -> Installed | None:
        """Return a runtime that is undamaged; None otherwise. ``told`` gets the reason."""
        try:
            with Folder.open(root.path / "runtimes" / sha256) as place:
                found = Receipt.read(place).installed(place.path, trusted, self._sink)
            if hashed or not store_folder.can_be_mended(root):
                found.verify()
        except FileNotFoundError:
            return None
        except (NotADirectoryError, PermissionError) as error:
            problem = disk.reason(root.path, error)
        except IntegrityError as error:
            if error.code == receipt.CONTRADICTION and trusted is not None:
                raise  # else the manifest that it came by is not the one that is trusted now
            problem = error.message
        else:
            return found
        told(Note.of("RUNTIME_DAMAGED/found", why=problem))
        return None

    def _install(
        self,
        root: Folder,
        staging: Folder,
        sha256: str,
        trusted: Artifact | None,
        fill: Callable[[Path], Receipt],
    ) -> Installed:
        """Return a runtime that is there after all, or publish what ``fill`` unpacks."""
        found = self._find(root, sha256, trusted, told=self._sink)
        if found is not None:
            return found
        with staging.temporary("install") as made:
            with made.folder(FILES, make=0o755) as files:
                done = fill(files.path)
            return self._publish(root, staging, made, done)

    def _publish(self, root: Folder, staging: Folder, made: Folder, done: Receipt) -> Installed:
        """Make a complete runtime visible in one step; an undamaged one that exists stays."""
        sha256 = done.sha256
        installed = done.installed(root.path / "runtimes" / sha256, None, self._sink)
        made.write(RECEIPT, schema.dump(done))
        os.fchmod(made.handle, 0o755)
        for _, folder in made.walk(schema.MAX_PARTS, make=0o755):
            if folder is not None:
                folder.sync()
        made.sync()
        with root.folder("runtimes") as runtimes:
            for tries_left in reversed(range(_TRIES)):
                try:
                    staging.rename(made.path.name, runtimes, sha256)
                    break
                except OSError as error:
                    if not tries_left or error.errno not in _TAKEN:
                        raise
                # Without working locks another installer may have been faster.
                found = self._find(root, sha256, done.artifact)
                if found is not None:
                    return found
                _discard(staging, runtimes, sha256)
            runtimes.sync()
            for unused in runtimes.unused(store_folder.DIGEST, MAX_AGE_SECONDS):
                with contextlib.suppress(OSError):
                    _discard(staging, runtimes, unused)
        return installed

    def _fetch(
        self, root: Folder, artifact: Artifact, urls: Sequence[str], fetcher: Fetcher, into: Path
    ) -> None:
        """Fetch an artifact and unpack it while it arrives, after the chunks that are kept."""
        from llama_loader import unpack

        needed = artifact.size + artifact.unpacked_size
        with disk.errors(self.root, needed), root.folder("partial", make=0o700) as downloads:
            for name in downloads.unused(store_folder.DIGEST, disk.STALE_SECONDS):
                downloads.unlink(name)
            downloads.make_room(artifact.sha256)
            waited, started = [0.0], time.monotonic()
            try:
                handle = downloads.open_to_write(artifact.sha256, 0o600)
                with os.fdopen(handle, "r+b") as kept:
                    chunks = _timed(fetcher.chunks(artifact, urls, kept), waited)
                    unpack.unpack(chunks, artifact, into)
            except (IntegrityError, OSError):  # refused, or no room: the chunks are useless
                downloads.unlink(artifact.sha256)
                raise
            downloads.unlink(artifact.sha256)
        self._sink(Stage("fetch", waited[0], artifact.size))
        self._sink(Stage("unpack", time.monotonic() - started - waited[0], artifact.unpacked_size))

    def _install_archive(self, url: str, sha256: str | None, fetcher: Fetcher) -> Installed:
        from llama_loader import foreign

        with self._writing() as (root, staging), tempfile.TemporaryFile(dir=staging.path) as copy:
            started, name = time.monotonic(), locations.shown(url)
            digest, size = fetcher.copy(url, copy, limit=foreign.MAX_BYTES)
            self._sink(Stage("fetch", time.monotonic() - started, size))
            _require_pin(name, digest, sha256, "SHA256_MISMATCH/pin")
            if sha256 is None:
                self._sink(Note.of("UNVERIFIED", name=name, digest=digest))

            def fill(into: Path) -> Receipt:
                started = time.monotonic()
                files = foreign.unpack(copy, url, into)
                receipt.find_program((entry.path for entry in files), url)
                unpacked = sum(entry.size for entry in files)
                self._sink(Stage("unpack", time.monotonic() - started, unpacked))
                return Receipt(sha256=digest, files=files)

            return self._install(root, staging, digest, None, fill)


def _require_pin(what: str, digest: str, pinned: str | None, code: str) -> None:
    if pinned not in (None, digest):
        raise IntegrityError(code, what=what, digest=digest, pinned=pinned)


def _timed(
    chunks: Generator[bytes, None, None], seconds: list[float]
) -> Generator[bytes, None, None]:
    """Add up the time that an iterator takes; the rest is its consumer's."""
    with contextlib.closing(chunks):
        while True:
            started = time.monotonic()
            chunk = next(chunks, None)
            seconds[0] += time.monotonic() - started
            if chunk is None:
                return
            yield chunk


def _discard(staging: Folder, runtimes: Folder, sha256: str) -> None:
    """Take a runtime out of use in one step, then delete it."""
    with contextlib.suppress(FileNotFoundError), staging.temporary("old") as grave:
        runtimes.rename(sha256, grave)
