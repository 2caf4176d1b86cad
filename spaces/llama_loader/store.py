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
import re
import stat
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from llama_loader import disk, partial, receipt
from llama_loader import manifest as schema
from llama_loader.disk import Folder
from llama_loader.errors import IntegrityError, SettingError, StoreError
from llama_loader.events import Note, Sink, Stage, ignore
from llama_loader.receipt import FILES, RECEIPT, Receipt

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from llama_loader.fetch import Fetcher
    from llama_loader.manifest import Artifact, FileEntry, Manifest

FORMAT: Final = 2
MARKER: Final = "llama-loader-store "
"""What the file FORMAT begins with, before the number: no other program writes it."""
NAMES: Final = frozenset(
    {"FORMAT", "channels", "current", "manifests", "partial", "runtimes", "self-tests", "staging"}
)
"""All names that a store has in its folder; ``current`` is of format 1."""
LOCK_SECONDS: Final = 900.0
"""An installation over a slow link; after that the other installer is taken for dead."""
MAX_AGE_SECONDS: Final = 14 * 86400.0
"""A runtime that no process asked for in so long is removed."""
MAX_BYTES: Final = 8 << 30
"""All runtimes together; beyond that the longest unused are removed. A release has 0.2 to 2 GB."""
RECENT_SECONDS: Final = 3600.0
"""A runtime that was asked for just now may be about to start, and not be held yet."""
AHEAD: Final = 1
"""Chunks that may wait to be unpacked. They have 4 MiB each."""

_PRIVATE: Final = "llama-loader"
_MAX_MARKER: Final = 64
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_TRIES: Final = 3
_POLL_SECONDS: Final = 0.05
_SEPARATORS: Final = ":;$"
"""What LD_LIBRARY_PATH gives a meaning to (ld.so(8)): a part of the path would be searched."""


@dataclass(frozen=True)
class Installed:
    """A runtime in a store.

    Attributes:
        folder: the absolute folder that holds ``llama-server``, or the libraries of an artifact
            that has none.
        root: the runtime's own folder in the store.
        sha256: of the archive that it came from.
        release: the release's name, None for an archive by URL.
        artifact: the manifest's entry, None for an archive by URL.
        verified: False if nothing pinned the archive.
        files: what an archive by URL must hold; for an artifact, its own list counts.
        sink: told how long ``verify`` took.
    """

    folder: Path
    root: Path
    sha256: str
    release: str | None
    artifact: Artifact | None
    verified: bool
    files: tuple[FileEntry, ...] = field(default=(), compare=False, repr=False)
    sink: Sink = field(default=ignore, compare=False, repr=False)

    def verify(self) -> None:
        """Hash every file now. Call it as the last act before each execution.

        Raises:
            IntegrityError: names the files that are damaged, missing or not listed.
            StoreError: one cannot be read.
        """
        with disk.errors(self.root):
            try:
                place = Folder.open(self.root)
            except (FileNotFoundError, NotADirectoryError) as error:
                told = f"{self.root} was removed"
                raise IntegrityError("RUNTIME_DAMAGED", told, hint="start again") from error
            with place:
                self.check(place)

    def check(self, place: Folder, *, hashed: bool = True) -> None:
        """Check the files of the open folder ``place``, which is ``root``."""
        started = time.monotonic()
        files, piece_size = self.files, 0
        if self.artifact is not None:
            files, piece_size = self.artifact.files, self.artifact.piece_size
        receipt.check_files(place, files, piece_size, hashed=hashed)
        if hashed:
            size = sum(entry.size for entry in files)
            self.sink(Stage("verify", time.monotonic() - started, size))


class Store:
    """Runtimes below ``root``. Nothing is written before something is installed.

    Args:
        root: the store's folder.
        sink: told of progress, and of what is not as asked.

    Attributes:
        root: where runtimes are installed; a private folder once the usual one cannot be used.
    """

    def __init__(self, root: Path, *, sink: Sink = ignore) -> None:
        self.root = root.absolute()
        self._sink = sink
        self._is_private = False

    def find(self, sha256: str) -> Installed | None:
        """Return an installed runtime, every file of it hashed now; None if there is none.

        A damaged one is reported, and taken out of use.

        Raises:
            StoreError: the folder is no store, or of a newer loader, or cannot be read.
        """
        return self._look(sha256, discard=True)

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
        found = self._look(artifact.sha256, artifact, hashed=hashed)
        if found is not None:
            return found
        with self._installing(artifact.sha256) as root:
            found = self._find(root, artifact.sha256, artifact, say=False, discard=True)
            if found is None:
                if note is not None:
                    self._sink(note)
                found = self._install(root, artifact, urls, fetcher, release)
                self._collect(root, artifact.sha256)
            return found

    def install_archive(self, url: str, sha256: str | None, fetcher: Fetcher) -> Installed:
        """Return the runtime of any llama.cpp archive, wherever its ``llama-server`` lies.

        With no pin the archive is fetched every time, and its digest is reported.

        Raises:
            NetworkError: it cannot be fetched.
            IntegrityError: it is not what is pinned, is damaged or unsafe.
            StoreError: the disk is full or broken.
        """
        found = self._look(sha256) if sha256 is not None else None
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
            digest = hashlib.sha256(data).hexdigest()
            self._sink(
                Note(
                    "MANIFEST_NOT_PINNED",
                    f"manifest {url} is not pinned; its sha256 is {digest}",
                    f"set YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_SHA256={digest}",
                )
            )
            return schema.parse(data, what=what)
        cached = self._kept_manifest(sha256)
        data = fetcher.manifest_bytes(url, sha256) if cached is None else cached
        manifest = schema.parse(data, what=what)
        if cached is None:
            path = self.folder("manifests") / f"{sha256}.json"
            with disk.errors(path):
                self.write_whole(path, data)
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
            resolved = folder.resolve()
            for path in (resolved, *resolved.parents):
                if path.parent.name == "runtimes" and _DIGEST.fullmatch(path.name):
                    return self._verified(path, artifact)
        raise SettingError(
            "NOT_A_RUNTIME",
            f"{folder} is not in an installed runtime",
            hint="give the folder that `python -m llama_loader fetch` prints",
        )

    def folder(self, *names: str) -> Path:
        """Return a folder of the store, made if need be.

        Raises:
            StoreError: it cannot be made.
        """
        with self._opened() as root, contextlib.ExitStack() as opened, disk.errors(self.root):
            place = root
            for name in names:
                place = opened.enter_context(place.folder(name, make=_mode(name)))
            return self.root.joinpath(*names)

    def write_whole(self, path: Path, data: bytes) -> None:
        """Write a small file of the store: it is the old one or the new one at every moment.

        Raises:
            OSError: it cannot be written.
        """
        *names, name = path.relative_to(self.root).parts
        with self._opened() as root, contextlib.ExitStack() as opened:
            staging = opened.enter_context(root.folder("staging"))
            place = root
            for part in names:
                place = opened.enter_context(place.folder(part))
            place.replace(name, data, staging=staging)

    # opening and claiming

    @contextmanager
    def _opened(self) -> Iterator[Folder]:
        """Open the store to write, made if need be; a private one if the usual cannot be used."""
        try:
            root = self._open_root(make=True)
        except OSError as error:
            self._use_private(error)
            with disk.errors(self.root):
                root = self._open_root(make=True)
        with root:
            yield root

    @contextmanager
    def _reading(self) -> Iterator[Folder | None]:
        """Open the store to read; None if there is none."""
        try:
            root = self._open_root(make=False)
        except FileNotFoundError:
            root = None
        except OSError as error:
            self._use_private(error)
            with disk.errors(self.root):
                root = self._open_root(make=True)
        with root or contextlib.nullcontext():
            yield root

    def _use_private(self, error: OSError) -> None:
        """Go on in a folder of this user alone, if the usual store may not be used or written."""
        usual = self.root
        if error.errno not in disk.NOT_WRITABLE or self._is_private:
            raise disk.failure(usual, error) from error
        with disk.errors(usual):
            self.root = disk.private_folder(_PRIVATE)
        self._is_private = True
        self._sink(
            Note(
                "STORE_TEMPORARY",
                f"{usual} cannot be written ({error.strerror}); installing to {self.root}, which is"
                " gone with this machine's temporary files",
                "set HF_HOME or --store to a folder that can be written",
            )
        )

    def _open_root(self, *, make: bool) -> Folder:
        place = self.root if self._is_private else disk.trusted(self.root)
        if set(_SEPARATORS) & set(f"{self.root}{place}"):
            raise StoreError(
                "STORE_PATH_UNUSABLE",
                f"the store's path {str(place)!r} has one of the characters {_SEPARATORS}, which"
                " the dynamic linker takes for more than a name",
                hint="use another store (HF_HOME, or --store)",
            )
        if make:
            disk.make_folders(place)
        root = Folder.open(place)
        try:
            root.path = self.root
            state = self._state(root)
            if make:
                self._claim(root, state)
        except BaseException:
            root.close()
            raise
        return root

    def _state(self, root: Folder) -> str:
        """Return ``ours``, ``older`` or ``empty``; refuse any other folder.

        Raises:
            StoreError: it holds other files, or is the store of a newer loader.
        """
        names = set(root.names())
        data = root.read("FORMAT", _MAX_MARKER)
        text = "" if data is None else data.decode("ascii", "replace")
        number = text.removeprefix(MARKER).strip()
        known = FORMAT if text.startswith(MARKER) else 1
        if number.isascii() and number.isdigit() and int(number) > known:
            raise StoreError(
                "STORE_NEWER",
                f"the store {self.root} has format {number}; this loader knows {FORMAT}",
                hint="update the loader, or use another store with --store",
            )
        folders = names & NAMES - {"FORMAT", "current"}
        links = [name for name in sorted(folders) if not _is_folder(root.status(name))]
        whole = f"{MARKER}{FORMAT}\n"
        if not links and text == whole:
            return "ours"
        begun = data is not None and names == {"FORMAT"} and whole.startswith(text)
        if not names or begun:
            return "empty"
        if not links and names <= NAMES and (text.strip() == "1" or _is_proven(root, names, data)):
            return "older"
        why = f"{links[0]} in it is a link or a file" if links else "it holds other files"
        raise StoreError(
            "STORE_NOT_OURS",
            f"{self.root} is not a store of this loader: {why}",
            hint="give --store (or HF_HOME) a folder that is new, empty, or already a store",
        )

    def _claim(self, root: Folder, state: str) -> None:
        """Mark the folder as a store, before anything else is written; make what a store has."""
        marker = f"{MARKER}{FORMAT}\n".encode()
        if state == "empty":
            # Of a process that was killed here a part of the marker is left. Processes that do this
            # at once write the same bytes to the same place.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open("FORMAT", flags, 0o644, dir_fd=root.handle), "wb") as stream:
                stream.write(marker)
                stream.flush()
                os.fsync(stream.fileno())
            root.sync()
        for name in ("runtimes", "manifests"):
            root.folder(name, make=0o755).close()
        with root.folder("staging", make=0o700) as staging:
            # A folder may exist and not be writable: find out before anything is fetched.
            probe = staging.new_folder("probe")
            with probe:
                staging.remove(probe.path.name)
            if state == "older":
                root.replace("FORMAT", marker, staging=staging)

    # what is installed

    def _look(
        self,
        sha256: str,
        trusted: Artifact | None = None,
        *,
        hashed: bool = True,
        discard: bool = False,
    ) -> Installed | None:
        with self._reading() as root:
            if root is None:
                return None
            return self._find(root, sha256, trusted, hashed=hashed, discard=discard)

    def _find(
        self,
        root: Folder,
        sha256: str,
        trusted: Artifact | None = None,
        *,
        hashed: bool = True,
        say: bool = True,
        discard: bool = False,
    ) -> Installed | None:
        """Return a runtime that is whole, and hold it; None otherwise.

        Args:
            root: the open store.
            sha256: of its archive.
            trusted: the manifest's entry; None to trust the runtime's receipt.
            hashed: hash its files.
            say: report a damaged one.
            discard: take a damaged one out of use.
        """
        with contextlib.ExitStack() as opened, disk.errors(self.root / "runtimes" / sha256):
            place = None
            try:
                runtimes = opened.enter_context(root.folder("runtimes"))
                place = opened.enter_context(runtimes.folder(sha256))
                hold(place)
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
                # one that another manifest vouches for stays until this one's list is proven true
                discard = discard and error.code != receipt.OTHER_FILES
            if say:
                self._sink(replace(problem, hint="it is fetched again"))
            if discard:
                self._discard(root, sha256, place)
            return None

    def _checked(self, place: Folder, trusted: Artifact | None, *, hashed: bool) -> Installed:
        """Check a runtime against the entry that is trusted, else against its own receipt."""
        found = receipt.read(place)
        if trusted is not None and not receipt.same_files(found.files, trusted.files):
            told = f"{place.path}: its receipt lists other files than the manifest"
            raise IntegrityError(receipt.OTHER_FILES, told)
        installed = self._described(found, place.path, trusted)
        installed.check(place, hashed=hashed)
        return installed

    def _described(self, found: Receipt, place: Path, trusted: Artifact | None = None) -> Installed:
        return Installed(
            folder=place / FILES / receipt.main_folder(found, place.name),
            root=place,
            sha256=found.sha256,
            release=found.release,
            artifact=trusted or found.artifact,
            verified=found.verified,
            files=found.files,
            sink=self._sink,
        )

    def _verified(self, path: Path, artifact: Artifact | None) -> Installed:
        if artifact is not None and artifact.sha256 != path.name:
            raise IntegrityError(
                "OTHER_ARTIFACT",
                f"{path} was unpacked from the archive {path.name[:12]}, not from {artifact.name}",
                hint="give the manifest of the release that it came from",
            )
        with Folder.open(path) as place:
            installed = self._checked(place, artifact, hashed=True)
        if artifact is None:
            self._sink(
                Note(
                    "COMPARED_WITH_RECEIPT",
                    f"{path} was compared with its own receipt, not with a manifest: a program that"
                    " can change the files can change the receipt",
                    "give the release's manifest with --manifest and --manifest-sha256",
                )
            )
        return installed

    def _discard(self, root: Folder, sha256: str, damaged: Folder | None) -> None:
        """Take a runtime out of use in one step, then delete it.

        Another process may have put a sound one in its place: that one stays.
        """
        try:
            with (
                root.folder("runtimes") as runtimes,
                root.folder("staging", make=0o700) as staging,
                staging.new_folder("damaged") as grave,
            ):
                try:
                    if damaged is None or runtimes.holds(sha256, damaged):
                        runtimes.rename(sha256, grave)
                    if damaged is not None and not grave.holds(sha256, damaged):
                        with contextlib.suppress(OSError):  # missing, or a third one is there
                            grave.rename(sha256, runtimes)
                finally:
                    staging.remove(grave.path.name)
        except FileNotFoundError:  # another process was faster
            return
        except OSError as error:
            if error.errno not in disk.NOT_WRITABLE:  # the temporary store is used then
                raise

    def _collect(self, root: Folder, keep: str) -> None:
        """Remove runtimes by age and size, the longest unused first.

        Never ``keep``, one that a living process holds, or one asked for within the hour.
        """
        with disk.errors(self.root), root.folder("runtimes") as runtimes:
            found = sorted(_ages(runtimes))
            total = sum(size for _, _, size in found)
            for used, name, size in found:
                if name == keep or time.time() - used < RECENT_SECONDS:
                    continue
                if time.time() - used < MAX_AGE_SECONDS and total <= MAX_BYTES:
                    continue
                with contextlib.suppress(OSError), runtimes.folder(name) as place:
                    # fails where it is held, and where locks do not work
                    fcntl.flock(place.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(place.handle).st_mtime == used:
                        self._discard(root, name, place)
                        total -= size

    # installing

    @contextmanager
    def _installing(self, sha256: str) -> Iterator[Folder]:
        """Open the store for one installation, and be the only installer of it if locks work."""
        with self._opened() as root, disk.errors(self.root):
            self._sweep(root)
            with root.folder("staging") as staging, self._lock(staging, f"{sha256}.lock"):
                yield root

    def _sweep(self, root: Folder) -> None:
        with root.folder("staging") as staging:
            staging.sweep()
        partial.sweep(self.root / partial.FOLDER)

    @contextmanager
    def _lock(self, staging: Folder, name: str) -> Iterator[None]:
        """Wait for other installers; go on without a lock if it does not work or takes too long."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with contextlib.ExitStack() as opened:
            try:
                handle = os.open(name, flags, 0o600, dir_fd=staging.handle)
                opened.callback(os.close, handle)
                self._wait(handle)
            except OSError as error:
                if disk.is_full(error):
                    raise
                self._sink(Note("STORE_NOT_LOCKED", f"installing without a lock: {error}"))
            yield

    def _wait(self, handle: int) -> None:
        end, said = time.monotonic() + LOCK_SECONDS, False
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError("another installer holds it too long") from None
            if not said:
                said = True
                self._sink(Note("STORE_BUSY", "another process installs it; waiting for that"))
            time.sleep(_POLL_SECONDS)

    def _install(
        self,
        root: Folder,
        artifact: Artifact,
        urls: Sequence[str],
        fetcher: Fetcher,
        release: str,
    ) -> Installed:
        """Fetch, unpack and publish an artifact."""
        done = Receipt(
            format=FORMAT,
            sha256=artifact.sha256,
            release=release,
            artifact=artifact,
            verified=True,
            files=artifact.files,
        )
        with (
            partial.Partial(self.root / partial.FOLDER, artifact, self._sink) as kept,
            self._staged(root, artifact.sha256) as staging,
        ):
            try:
                fetch_and_unpack(
                    artifact, urls, fetcher, staging.path / FILES, kept=kept, sink=self._sink
                )
                installed = self._publish(root, staging, done, artifact.name)
            except (IntegrityError, OSError):  # refused, or no room: the chunks are of no use
                kept.discard()
                raise
            kept.discard()
            return installed

    def _install_archive(self, url: str, sha256: str | None, fetcher: Fetcher) -> Installed:
        from llama_loader import foreign

        with self._opened() as root, disk.errors(self.root):
            self._sweep(root)
            with tempfile.TemporaryFile(dir=self.root / "staging") as copy:
                started = time.monotonic()
                digest, size = fetcher.copy(url, copy, limit=foreign.MAX_BYTES)
                self._sink(Stage("fetch", time.monotonic() - started, size))
                self._judge(url, digest, sha256)
                with self._installing(digest) as store, self._staged(store, digest) as staging:
                    found = self._find(store, digest, say=sha256 is None, discard=True)
                    if found is not None:
                        return found
                    started = time.monotonic()
                    files = foreign.unpack(copy, url, staging.path / FILES)
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
                    installed = self._publish(store, staging, done, url)
                    self._collect(store, digest)
                    return installed

    @contextmanager
    def _staged(self, root: Folder, sha256: str) -> Iterator[Folder]:
        """Give a private folder with an empty ``files``; what is left of it is removed."""
        with root.folder("staging") as staging, staging.new_folder(sha256[:12]) as folder:
            try:
                folder.folder(FILES, make=0o755).close()
                yield folder
            finally:
                with contextlib.suppress(OSError):  # a later process removes it
                    staging.remove(folder.path.name)

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
                    os.rename(
                        made.path.name,
                        sha256,
                        src_dir_fd=staging.handle,
                        dst_dir_fd=runtimes.handle,
                    )
                except OSError as error:
                    # Without working locks another installer may have been faster.
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                        raise
                    found = self._find(root, sha256, done.artifact, say=False, discard=True)
                    if found is not None:
                        return found
                    self._discard(root, sha256, None)
                    continue
                runtimes.sync()
                hold(made)
                return self._described(done, self.root / "runtimes" / sha256)
        raise StoreError(
            "STORE_UNSTABLE",
            f"the runtime {sha256[:12]} was damaged as soon as it was installed",
            hint="is another program writing to the store, or is the disk failing?",
        )

    def _judge(self, url: str, digest: str, sha256: str | None) -> None:
        if sha256 is None:
            self._sink(
                Note(
                    "UNVERIFIED",
                    f"{url} is not pinned: these bytes are run as they came; their sha256 is"
                    f" {digest}",
                    f"set YAKULINGO_SPACES_LLAMA_CPP_SHA256={digest}",
                )
            )
        elif digest != sha256:
            raise IntegrityError(
                "SHA256_MISMATCH",
                f"{url} has sha256 {digest}; {sha256} is pinned",
                hint="if the archive is meant to change, pin the new digest; otherwise do not "
                "use it",
            )

    def _kept_manifest(self, sha256: str) -> bytes | None:
        """Return a manifest of the store, hashed now; None if it is missing or damaged."""
        with self._reading() as root, disk.errors(self.root / "manifests"):
            if root is None or root.status("manifests") is None:
                return None
            with root.folder("manifests") as manifests:
                data = manifests.read(f"{sha256}.json", schema.MAX_MANIFEST_BYTES)
        return data if data and hashlib.sha256(data).hexdigest() == sha256 else None


def fetch_and_unpack(
    artifact: Artifact,
    urls: Sequence[str],
    fetcher: Fetcher,
    into: Path,
    *,
    kept: partial.Partial,
    sink: Sink,
) -> None:
    """Fill the empty folder ``into`` with an artifact's files, every byte verified and synced.

    Raises:
        NetworkError: it cannot be fetched from any URL.
        IntegrityError: what came is not what the manifest says.
        OSError: the disk is full or broken.
    """
    from llama_loader import unpack

    waited, started = [0.0], time.monotonic()
    fetched = fetcher.chunks(artifact, urls, kept, ahead=AHEAD)
    unpack.unpack(_timed(fetched, waited), artifact, into, sink=sink)
    sink(Stage("fetch", waited[0], artifact.size))
    sink(Stage("unpack", time.monotonic() - started - waited[0], artifact.unpacked_size))


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


def hold(place: Folder) -> None:
    """Write down that a runtime is in use: now, and until this process and its forks have ended.

    That is a shared lock on its folder, which the kernel releases however the process ends. If
    locks do not work, or the store is read-only, the time of the last use is all, or nothing is.
    """
    with contextlib.suppress(OSError):
        os.utime(place.handle)
    status = os.fstat(place.handle)
    if (status.st_dev, status.st_ino) in _held:
        return
    with contextlib.suppress(OSError):
        handle = os.dup(place.handle)
        _held[status.st_dev, status.st_ino] = handle
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


_held: dict[tuple[int, int], int] = {}
"""Open folders by device and inode, once each."""


def _ages(runtimes: Folder) -> Iterator[tuple[float, str, int]]:
    """Yield when each runtime was last asked for, its name, and its size in bytes."""
    for name in runtimes.names():
        status = runtimes.status(name)
        if _DIGEST.fullmatch(name) and _is_folder(status) and status is not None:
            size = sum(one.st_size for one in runtimes.walk(name))
            yield status.st_mtime, name, size


def _is_folder(status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISDIR(status.st_mode)


def _mode(name: str) -> int:
    return 0o700 if name in {"staging", "partial"} else 0o755


def _is_proven(root: Folder, names: set[str], marker: bytes | None) -> bool:
    """Whether a folder whose marker cannot be read holds runtimes, and nothing but our names."""
    if marker is not None or not {"FORMAT", "runtimes"} <= names:
        return False
    with root.folder("runtimes") as runtimes:
        return any(_DIGEST.fullmatch(name) for name in runtimes.names())
