"""Installed runtimes, by the digest of the archive that they came from.

<root>/FORMAT                       marks the folder as a store; the first thing written
<root>/runtimes/<sha256>/           one runtime: receipt.json and files/
<root>/manifests/<sha256>.json      manifests by digest, so that a warm start needs no network
<root>/channels/                    what was accepted from signed channels (``trust``)
<root>/partial/                     verified chunks of unfinished downloads (``partial``)
<root>/staging/                     what is being installed; private, removed afterwards

A runtime appears by one rename of a complete, synced folder, so it is whole or missing, with or
without working file locks. What this module removes has a name that only a store gives, in a folder
that carries a store's marker.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llama_loader import disk, notes, partial, receipt
from llama_loader import manifest as schema
from llama_loader.disk import Folder
from llama_loader.errors import IntegrityError, SettingError, StoreError
from llama_loader.events import Note, Sink, Stage, ignore
from llama_loader.receipt import FILES, RECEIPT, Installed, Receipt
from llama_loader.store_folder import DIGEST, StoreFolder

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from llama_loader.fetch import Fetcher
    from llama_loader.manifest import Artifact, Manifest

MAX_AGE_SECONDS: Final = 14 * 86400.0
"""A runtime that no process asked for in so long is removed."""

_TRIES: Final = 3


class Store:
    """Runtimes below ``root``. Nothing is written before something is installed.

    Args:
        root: the store's folder.
        sink: told of progress, and of what is not as asked.
    """

    def __init__(self, root: Path, *, sink: Sink = ignore) -> None:
        self._folder = StoreFolder(root, sink)
        self._sink = sink

    @property
    def root(self) -> Path:
        """Where runtimes are installed; a private folder once the usual one cannot be used."""
        return self._folder.root

    def find(
        self, sha256: str, trusted: Artifact | None = None, *, hashed: bool = True
    ) -> Installed | None:
        """Return an installed runtime, every file of it hashed now; None unless it is whole.

        Args:
            sha256: of its archive.
            trusted: the manifest's entry; None to trust the runtime's receipt.
            hashed: hash its files; if not, only their names, sizes and modes are checked.

        Raises:
            StoreError: the folder is no store, or of a newer loader, or cannot be read.
        """
        with contextlib.suppress(FileNotFoundError), self._folder.open(make=False) as root:
            return self._find(root, sha256, trusted, hashed=hashed, repair=False)
        return None

    def install(
        self,
        artifact: Artifact,
        urls: Sequence[str],
        fetcher: Fetcher,
        *,
        release: str,
        note: Note | None = None,
        hashed: bool = True,
    ) -> Installed:
        """Return the artifact's runtime, fetched and unpacked unless it is installed.

        Args:
            artifact: a server, or libraries for one.
            urls: where it is, tried in order.
            fetcher: fetches it.
            release: the release's name.
            note: what a person should know if it has to be fetched.
            hashed: hash an installed runtime's files; if not, only their names, sizes and modes
                are checked: the caller verifies it before it executes one.

        Raises:
            NetworkError: it cannot be fetched from any URL.
            IntegrityError: what came is not what the manifest says.
            StoreError: the disk is full or broken.
        """
        found = self.find(artifact.sha256, artifact, hashed=hashed)
        if found is not None:
            return found
        with self._opened() as root, self._folder.lock(root, artifact.sha256):
            found = self._find(root, artifact.sha256, artifact)
            if found is None:
                if note is not None:
                    self._sink(note)
                found = self._install(root, artifact, urls, fetcher, release)
            return found

    def install_archive(self, url: str, sha256: str | None, fetcher: Fetcher) -> Installed:
        """Return the runtime of any llama.cpp archive, wherever its ``llama-server`` lies.

        With no pin the archive is fetched every time, and its digest is reported.

        Raises:
            NetworkError: it cannot be fetched.
            IntegrityError: it is not what is pinned, is damaged or unsafe.
            StoreError: the disk is full or broken.
        """
        found = self.find(sha256) if sha256 is not None else None
        if found is None:
            found = self._install_archive(url, sha256, fetcher)
        elif found.artifact is not None and found.artifact.kind != schema.LLAMA_SERVER:
            raise IntegrityError("NO_SERVER_IN_ARCHIVE", f"{url} holds no llama-server")
        return replace(found, verified=sha256 is not None)

    def manifest(self, url: str, sha256: str | None, fetcher: Fetcher) -> Manifest:
        """Return a manifest: a pinned one from the store if it is there, else fetched.

        Raises:
            NetworkError: it cannot be fetched.
            IntegrityError: it is not what is pinned, or malformed.
            StoreError: it cannot be kept.
        """
        what = f"manifest {url}"
        if sha256 is None:
            data = fetcher.manifest_bytes(url, None)
            self._sink(notes.manifest_not_pinned(url, hashlib.sha256(data).hexdigest()))
            return schema.parse(data, what=what)
        cached = self._kept_manifest(sha256)
        data = fetcher.manifest_bytes(url, sha256) if cached is None else cached
        manifest = schema.parse(data, what=what)
        if cached is None:
            self.write("manifests", f"{sha256}.json", data=data)
        return manifest

    def verify(self, folder: Path, artifact: Artifact | None = None) -> Installed:
        """Hash the files of an installed runtime, in whichever store it is.

        Args:
            folder: the runtime's folder, or any folder in it.
            artifact: the manifest's entry to compare with; None to compare with the runtime's own
                receipt, which is reported: who can change the files can change the receipt.

        Raises:
            SettingError: it is not an installed runtime.
            IntegrityError: names the files that are damaged, missing or not listed.
            StoreError: it cannot be read.
        """
        with disk.errors(folder):
            resolved = Path(os.path.realpath(folder))  # resolve() raises RuntimeError for a loop
            for path in (resolved, *resolved.parents):
                if path.parent.name == "runtimes" and DIGEST.fullmatch(path.name):
                    break
            else:
                raise SettingError(
                    "NOT_A_RUNTIME",
                    f"{folder} is not in an installed runtime",
                    hint="give the folder that `python -m llama_loader fetch` prints",
                )
            if artifact is not None and artifact.sha256 != path.name:
                raise IntegrityError(
                    "OTHER_ARTIFACT",
                    f"{path} was unpacked from the archive {path.name[:12]}, not from"
                    f" {artifact.name}",
                    hint="give the manifest of the release that it came from",
                )
            with Folder.open(path) as place:
                installed = self._checked(place, artifact, hashed=True)
        if artifact is None:
            self._sink(notes.compared_with_receipt(path))
        return installed

    def write(self, *names: str, data: bytes) -> None:
        """Write a small file of the store: it is the old one or the new one at every moment.

        Args:
            names: the folders below the store's, made if need be, then the file's name.
            data: what the file holds then.

        Raises:
            StoreError: it cannot be written.
        """
        with contextlib.ExitStack() as opened:
            place = root = opened.enter_context(self._folder.open(make=True))
            opened.enter_context(disk.errors(self.root.joinpath(*names)))
            staging = opened.enter_context(root.folder("staging"))
            for name in names[:-1]:
                place = opened.enter_context(place.folder(name, make=0o755))
            place.replace(names[-1], data, staging=staging)

    # what is installed

    def _find(
        self,
        root: Folder,
        sha256: str,
        trusted: Artifact | None = None,
        *,
        hashed: bool = True,
        repair: bool = True,
    ) -> Installed | None:
        """Return a runtime that is whole, and hold it; None otherwise.

        ``repair`` reports a damaged one and takes it out of use.
        """
        with contextlib.ExitStack() as opened, disk.errors(self.root / "runtimes" / sha256):
            place = None
            try:
                runtimes = opened.enter_context(root.folder("runtimes"))
                place = opened.enter_context(runtimes.folder(sha256))
                receipt.hold(place)
                if not runtimes.holds(sha256, place):  # it was just removed
                    return None
                return self._checked(place, trusted, hashed=hashed)
            except FileNotFoundError:
                return None
            except (NotADirectoryError, PermissionError) as error:
                problem = Note("RUNTIME_DAMAGED", f"{error.filename}: {error.strerror}")
            except IntegrityError as error:
                if error.code == receipt.CONTRADICTION:
                    raise
                problem = Note(error.code, error.message)
            if repair:
                self._sink(replace(problem, hint="it is fetched again"))
                # one that another manifest vouches for stays until this one's list is proven true
                if problem.code != receipt.OTHER_FILES:
                    self._discard(root, sha256, place)
            return None

    def _checked(self, place: Folder, trusted: Artifact | None, *, hashed: bool) -> Installed:
        """Check a runtime against the entry that is trusted, else against its own receipt."""
        found = receipt.read(place)
        if trusted is not None and not receipt.same_files(found.files, trusted.files):
            told = f"{place.path}: its receipt lists other files than the manifest"
            raise IntegrityError(receipt.OTHER_FILES, told)
        installed = receipt.describe(found, place.path, trusted, self._sink)
        installed.check(place, hashed=hashed)
        return installed

    def _discard(self, root: Folder, sha256: str, damaged: Folder | None) -> None:
        """Take a runtime out of use in one step, then delete it.

        Another process may have put a sound one in its place: that one stays.
        """
        try:
            with (
                root.folder("runtimes") as runtimes,
                root.folder("staging", make=0o700) as staging,
                staging.temporary("damaged") as grave,
            ):
                if damaged is None or runtimes.holds(sha256, damaged):
                    runtimes.rename(sha256, grave)
                if damaged is not None and not grave.holds(sha256, damaged):
                    with contextlib.suppress(OSError):  # missing, or a third one is there
                        grave.rename(sha256, runtimes)
        except FileNotFoundError:  # another process was faster
            return
        except OSError as error:
            if error.errno not in disk.NOT_WRITABLE:  # the temporary store is used then
                raise

    def _collect(self, root: Folder, keep: str) -> None:
        """Remove the runtimes that are unused for long and that no living process holds."""
        with disk.errors(self.root), root.folder("runtimes") as runtimes:
            for name in set(filter(DIGEST.fullmatch, runtimes.names())) - {keep}:
                with contextlib.suppress(OSError), runtimes.folder(name) as place:
                    if _is_unused(place):
                        # fails where it is held, and where locks do not work
                        fcntl.flock(place.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if _is_unused(place):  # no process asked for it meanwhile
                            self._discard(root, name, place)

    # installing

    @contextmanager
    def _opened(self) -> Iterator[Folder]:
        """Open the store to write; what ended processes left half done goes."""
        with self._folder.open(make=True) as root, disk.errors(self.root):
            with root.folder("staging") as staging:
                staging.sweep()
            with root.folder(partial.FOLDER, make=0o700) as downloads:
                partial.sweep(downloads)
            yield root

    def _install(
        self,
        root: Folder,
        artifact: Artifact,
        urls: Sequence[str],
        fetcher: Fetcher,
        release: str,
    ) -> Installed:
        """Fetch, unpack and publish an artifact."""
        from llama_loader import unpack

        done = Receipt(
            sha256=artifact.sha256, release=release, artifact=artifact, files=artifact.files
        )
        with (
            root.folder(partial.FOLDER, make=0o700) as downloads,
            contextlib.closing(partial.Partial(downloads, artifact, self._sink)) as kept,
            self._staged(root, artifact.sha256) as staging,
        ):
            try:
                waited, started = [0.0], time.monotonic()
                chunks = _timed(fetcher.chunks(artifact, urls, kept), waited)
                unpack.unpack(chunks, artifact, staging.path / FILES, sink=self._sink)
                rest = time.monotonic() - started - waited[0]
                self._sink(Stage("fetch", waited[0], artifact.size))
                self._sink(Stage("unpack", rest, artifact.unpacked_size))
                installed = self._publish(root, staging, done, artifact.name)
            except (IntegrityError, OSError):  # refused, or no room: the chunks are of no use
                kept.discard()
                raise
            kept.discard()
            return installed

    def _install_archive(self, url: str, sha256: str | None, fetcher: Fetcher) -> Installed:
        from llama_loader import foreign

        with self._opened() as root, tempfile.TemporaryFile(dir=self.root / "staging") as copy:
            started = time.monotonic()
            digest, size = fetcher.copy(url, copy, limit=foreign.MAX_BYTES)
            self._sink(Stage("fetch", time.monotonic() - started, size))
            if sha256 is None:
                self._sink(notes.archive_not_pinned(url, digest))
            elif digest != sha256:
                raise IntegrityError(
                    "SHA256_MISMATCH",
                    f"{url} has sha256 {digest}; {sha256} is pinned",
                    hint="if the archive is meant to change, pin the new digest; otherwise do not"
                    " use it",
                )
            with self._folder.lock(root, digest), self._staged(root, digest) as staging:
                found = self._find(root, digest)
                if found is not None:
                    return found
                started = time.monotonic()
                files = foreign.unpack(copy, url, staging.path / FILES)
                unpacked = sum(entry.size for entry in files)
                self._sink(Stage("unpack", time.monotonic() - started, unpacked))
                done = Receipt(sha256=digest, verified=sha256 is not None, files=files)
                return self._publish(root, staging, done, url)

    @contextmanager
    def _staged(self, root: Folder, sha256: str) -> Iterator[Folder]:
        """Give a private folder with an empty ``files``; what is left of it is removed."""
        with root.folder("staging") as staging, staging.temporary(sha256[:12]) as folder:
            folder.folder(FILES, make=0o755).close()
            yield folder

    def _publish(self, root: Folder, made: Folder, done: Receipt, name: str) -> Installed:
        """Make a complete runtime visible in one step; a sound one that is there is as good."""
        receipt.main_folder(done, name)
        made.write_new(RECEIPT, schema.dump(done))
        os.fchmod(made.handle, 0o755)
        made.sync_all()
        sha256 = done.sha256
        with root.folder("staging") as staging, root.folder("runtimes") as runtimes:
            for _ in range(_TRIES):
                try:
                    staging.rename(made.path.name, runtimes, sha256)
                except OSError as error:
                    # Without working locks another installer may have been faster.
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                        raise
                    found = self._find(root, sha256, done.artifact, repair=False)
                    if found is not None:
                        return found
                    self._discard(root, sha256, None)
                    continue
                runtimes.sync()
                receipt.hold(made)
                self._collect(root, sha256)
                return receipt.describe(done, runtimes.path / sha256, None, self._sink)
        raise StoreError(
            "STORE_UNSTABLE",
            f"the runtime {sha256[:12]} was damaged as soon as it was installed",
            hint="is another program writing to the store, or is the disk failing?",
        )

    def _kept_manifest(self, sha256: str) -> bytes | None:
        """Return a manifest of the store, hashed now; None if it is missing or damaged."""
        with (
            disk.errors(self.root / "manifests"),
            contextlib.suppress(FileNotFoundError),
            self._folder.open(make=False) as root,
            root.folder("manifests") as manifests,
        ):
            data = manifests.read(f"{sha256}.json", schema.MAX_MANIFEST_BYTES)
            if data is not None and hashlib.sha256(data).hexdigest() == sha256:
                return data
        return None


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


def _is_unused(place: Folder) -> bool:
    return time.time() - os.fstat(place.handle).st_mtime >= MAX_AGE_SECONDS
