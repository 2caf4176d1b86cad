"""Installed runtimes, by the digest of the archive that they came from.

A runtime appears by one rename of a complete, synced folder, so it is there whole or not at all,
with or without working file locks; the lock only spares two installers the same work. Before every
start all files are hashed again: a damaged runtime is taken out of use, never executed. The layout
is ``store_folder``'s.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from llama_loader import disk, generations, notes, receipt
from llama_loader import manifest as schema
from llama_loader.errors import IntegrityError, SettingError, StoreError
from llama_loader.events import Note, Sink, Stage, ignore
from llama_loader.receipt import FILES, RECEIPT, Receipt
from llama_loader.soundness import Soundness
from llama_loader.store_folder import FORMAT, StoreFolder, kept_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from llama_loader.fetch import Fetcher
    from llama_loader.manifest import Artifact, Manifest

LOCK_SECONDS: Final = 900.0
"""An installation over a slow link; after that the other installer is taken for dead."""


@dataclass(frozen=True)
class Installed:
    """A runtime whose files were all hashed and found right, on their way here or again now.

    Attributes:
        folder: the absolute folder that holds ``llama-server``, or the libraries of an artifact
            that has none.
        root: the runtime's own folder in the store.
        sha256: of the archive that it came from.
        release: the release's name, None for an archive by URL.
        artifact: the manifest's entry, None for an archive by URL.
        verified: False where nothing pinned the archive.
        sound: whoever executes a file of it asks this first.
    """

    folder: Path
    root: Path
    sha256: str
    release: str | None
    artifact: Artifact | None
    verified: bool
    sound: Soundness = field(compare=False, repr=False)


class Store:
    """Runtimes below ``root``. Nothing is written before something is installed."""

    def __init__(self, root: Path, *, sink: Sink = ignore) -> None:
        self._folder = StoreFolder(root, sink)
        self._sink = sink

    @property
    def root(self) -> Path:
        """Where runtimes are installed; a private folder once the usual one was not writable."""
        return self._folder.path

    def find(self, sha256: str) -> Installed | None:
        """Return an installed runtime, every file of it hashed now; None where there is none.

        A damaged one is said, and taken out of use.

        Raises:
            StoreError: the store is of a newer loader, or cannot be read.
        """
        return self._find(sha256)

    def install(
        self,
        artifact: Artifact,
        urls: Sequence[str],
        fetcher: Fetcher,
        *,
        release: str,
        note: Note | None = None,
    ) -> Installed:
        """Return the artifact's runtime, fetched and unpacked unless it is there already.

        Args:
            artifact: a server, or libraries for one.
            urls: where it is, tried in order.
            fetcher: fetches it.
            release: the release's name.
            note: what a person should know where it really has to be fetched.

        Raises:
            NetworkError: it cannot be had from any URL.
            IntegrityError: what was had is not what the manifest says.
            StoreError: the disk is full or broken.
        """
        found = self._find(artifact.sha256, artifact)
        if found is not None:
            return found
        with self._installing(artifact.sha256) as staging:
            if staging is not None:
                if note is not None:
                    self._sink(note)
                done = self._install(artifact, urls, fetcher, staging, release)
                if done is not None:
                    return self._installed(done)
        return self._found_after_install(artifact.sha256, artifact)

    def install_archive(self, url: str, sha256: str | None, fetcher: Fetcher) -> Installed:
        """Return the runtime of any llama.cpp archive, wherever its ``llama-server`` lies.

        With no pin the archive is fetched every time, and the digest to pin is said loudly.

        Raises:
            NetworkError: it cannot be had.
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
        """Return a manifest: a pinned one from the store where it lies there, else fetched.

        Raises:
            NetworkError: it cannot be had.
            IntegrityError: it is not what is pinned, or malformed.
            StoreError: it cannot be kept.
        """
        what = f"manifest {url}"
        if sha256 is None:
            data = fetcher.manifest_bytes(url, None)
            self._sink(notes.manifest_not_pinned(url, hashlib.sha256(data).hexdigest()))
            return schema.parse(data, what=what)
        cached = kept_manifest(self.root, sha256)
        data = fetcher.manifest_bytes(url, sha256) if cached is None else cached
        manifest = schema.parse(data, what=what)
        if cached is None:
            self._keep_manifest(sha256, data)
        return manifest

    def use(self, manifest: Manifest, url: str, installed: Sequence[Installed]) -> None:
        """Hold what was installed of a release for as long as this process lives; make it current.

        The release that was current becomes the previous one. Where the store cannot be written,
        it stays as it is.

        Raises:
            StoreError: the disk is full or broken.
        """
        for one in installed:
            generations.hold(one.root)
        digests = tuple(one.sha256 for one in installed)
        record = generations.read(self.root)
        if record is not None and record.current.runtimes == digests:
            return
        with disk.errors(self.root):
            try:
                self._switch(record, manifest, url, digests)
            except OSError as error:
                if error.errno not in disk.NOT_WRITABLE:
                    raise

    def previous(self) -> tuple[Manifest, str]:
        """Return the manifest (and its URL) of the release that was used here before this one.

        Raises:
            StoreError: there is none.
        """
        record = generations.read(self.root)
        before = record.previous if record is not None else None
        data = kept_manifest(self.root, before.manifest) if before is not None else None
        if before is None or data is None:
            raise StoreError(
                "NO_PREVIOUS_RELEASE",
                f"the store {self.root} has no release before the one in use",
                hint="pin the release that you want: its manifest's URL and sha256",
            )
        return schema.parse(data, what=f"manifest of {before.release}"), before.url

    def _switch(
        self,
        record: generations.Record | None,
        manifest: Manifest,
        url: str,
        digests: tuple[str, ...],
    ) -> None:
        """Write the manifest down, then the new pair, then remove what nobody needs any more."""
        data = schema.dump(manifest)
        sha256 = hashlib.sha256(data).hexdigest()
        self._keep_manifest(sha256, data)
        now = generations.Generation(
            release=manifest.release, url=url, manifest=sha256, runtimes=digests
        )
        after = generations.following(record, now)
        self.write_whole(self.root / generations.CURRENT, schema.dump(after))
        generations.collect(self._folder.runtimes, after.runtimes, self._folder.discard)

    def verify(self, folder: Path) -> Installed:
        """Hash the files of an installed runtime again.

        Args:
            folder: the runtime's folder, or any folder in it.

        Raises:
            SettingError: it is not an installed runtime.
            IntegrityError: names the files that are damaged, missing or not listed.
            StoreError: it cannot be read.
        """
        resolved = folder.absolute()
        for place in (resolved, *resolved.parents):
            if (place / RECEIPT).is_file() and place.parent.name == "runtimes":
                with disk.errors(place):
                    return self._checked(place)
        raise SettingError(
            "NOT_A_RUNTIME",
            f"{folder} is not in an installed runtime",
            hint="give the folder that `python -m llama_loader fetch` prints",
        )

    def _find(self, sha256: str, trusted: Artifact | None = None) -> Installed | None:
        place = self._folder.runtimes / sha256
        with disk.errors(place):
            self._folder.check_format()
            if not place.is_dir():
                return None
            generations.touch(place)
            try:
                return self._checked(place, trusted)
            except IntegrityError as error:
                if error.code == receipt.CONTRADICTION:
                    raise
                self._sink(Note(error.code, error.message, "it is fetched again"))
                self._folder.discard(place)
                return None

    def _checked(self, place: Path, trusted: Artifact | None = None) -> Installed:
        """Hash a runtime against the entry that is trusted, else against its own receipt."""
        found = receipt.read(place)
        if trusted is not None and not receipt.same_files(found.files, trusted.files):
            raise IntegrityError("RUNTIME_DAMAGED", f"{place}: its receipt lists other files")
        installed = self._installed(found, trusted)
        installed.sound.look()
        return installed

    def _installed(self, found: Receipt, trusted: Artifact | None = None) -> Installed:
        """Describe a runtime; its files have still to be hashed where they lie."""
        place = self._folder.runtimes / found.sha256
        against = trusted or found.artifact
        files, piece_size = (against.files, against.piece_size) if against else (found.files, 0)

        def look() -> None:
            started = time.monotonic()
            receipt.check_files(place, files, piece_size)
            size = sum(entry.size for entry in files)
            self._sink(Stage("verify", time.monotonic() - started, size))

        return Installed(
            folder=place / FILES / receipt.main_folder(found, place.name),
            root=place,
            sha256=found.sha256,
            release=found.release,
            artifact=found.artifact,
            verified=found.verified,
            sound=Soundness(look),
        )

    def _found_after_install(self, sha256: str, trusted: Artifact | None = None) -> Installed:
        found = self._find(sha256, trusted)
        if found is None:
            raise StoreError(
                "STORE_UNSTABLE",
                f"the runtime {sha256[:12]} was damaged as soon as it was installed",
                hint="is another program writing to the store, or is the disk failing?",
            )
        return found

    def _install(
        self,
        artifact: Artifact,
        urls: Sequence[str],
        fetcher: Fetcher,
        staging: Path,
        release: str,
    ) -> Receipt | None:
        """Fetch, unpack and publish; None where another installer's runtime stands there now."""
        from llama_loader import installation, partial

        folder = self.root / partial.FOLDER
        with installation.resumable(folder, artifact, self._sink) as kept:
            installation.fetch_and_unpack(
                artifact, urls, fetcher, staging / FILES, partial=kept, sink=self._sink
            )
            done = Receipt(
                format=FORMAT,
                sha256=artifact.sha256,
                release=release,
                artifact=artifact,
                verified=True,
                files=artifact.files,
            )
            return done if self._publish(staging, done, artifact.name) else None

    def _install_archive(self, url: str, sha256: str | None, fetcher: Fetcher) -> Installed:
        from llama_loader import foreign

        self._folder.prepare()
        staging_folder = self._folder.staging
        with disk.errors(self.root), tempfile.TemporaryFile(dir=staging_folder) as copy:
            started = time.monotonic()
            digest, size = fetcher.copy(url, copy, limit=foreign.MAX_BYTES)
            self._sink(Stage("fetch", time.monotonic() - started, size))
            self._judge(url, digest, sha256)
            with self._installing(digest) as staging:
                if staging is not None:
                    started = time.monotonic()
                    files = foreign.unpack(copy, url, staging / FILES)
                    unpacked = sum(entry.size for entry in files)
                    self._sink(Stage("unpack", time.monotonic() - started, unpacked))
                    done = Receipt(
                        format=FORMAT,
                        sha256=digest,
                        release=None,
                        artifact=None,
                        verified=sha256 is not None,
                        files=files,
                    )
                    if self._publish(staging, done, url):
                        return self._installed(done)
        return self._found_after_install(digest)

    @contextmanager
    def _installing(self, sha256: str) -> Iterator[Path | None]:
        """Give a private folder to install into; None where somebody else was faster."""
        self._folder.prepare()
        with disk.errors(self.root), self._folder.lock(sha256, LOCK_SECONDS):
            if (self._folder.runtimes / sha256).is_dir():
                yield None
                return
            staging = disk.new_folder(self._folder.staging, sha256[:12])
            try:
                (staging / FILES).mkdir()
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _publish(self, staging: Path, done: Receipt, name: str) -> bool:
        """Make a complete runtime visible, in one step; False where another one stands there."""
        receipt.main_folder(done, name)
        disk.write_new(staging / RECEIPT, schema.dump(done))
        for folder in (staging, *staging.rglob("*")):
            if folder.is_dir():
                folder.chmod(0o755)
                disk.sync_folder(folder)
        runtimes = self._folder.runtimes
        try:
            staging.rename(runtimes / done.sha256)
        except OSError as error:
            # Without working locks another installer may have been faster: theirs is as good.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return False
        disk.sync_folder(runtimes)
        return True

    def _judge(self, url: str, digest: str, sha256: str | None) -> None:
        if sha256 is None:
            self._sink(notes.archive_not_pinned(url, digest))
        elif digest != sha256:
            raise IntegrityError(
                "SHA256_MISMATCH",
                f"{url} has sha256 {digest}; {sha256} is pinned",
                hint="if the archive is meant to change, pin the new digest; otherwise do not "
                "use it",
            )

    def _keep_manifest(self, sha256: str, data: bytes) -> None:
        path = self.folder("manifests") / f"{sha256}.json"
        with disk.errors(path):
            self.write_whole(path, data)

    def folder(self, *names: str) -> Path:
        """Return a folder of the store, made if need be.

        Raises:
            StoreError: it cannot be made.
        """
        self._folder.prepare()
        folder = self.root
        for name in names:
            folder /= name
            with disk.errors(folder):
                folder.mkdir(mode=0o755, exist_ok=True)
        return folder

    def write_whole(self, path: Path, data: bytes) -> None:
        """Write a small file so that it is the old one or the new one at every moment.

        Raises:
            OSError: it cannot be written.
        """
        disk.write_whole(path, data, staging=self._folder.staging)
