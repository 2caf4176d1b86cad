"""Installed runtimes, by the digest of the archive that they came from.

    <root>/FORMAT                       the layout's version
    <root>/runtimes/<sha256>/           one runtime: receipt.json and files/
    <root>/manifests/<sha256>.json      pinned manifests, so that a warm start needs no network
    <root>/staging/                     what is being installed; private, gone afterwards

A runtime appears by one rename of a complete, synced folder, so it is there whole or not at all,
with or without working file locks; the lock only spares two installers the same work. Before every
start all files are hashed again: a damaged runtime is taken out of use, never executed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from llama_loader import manifest as schema
from llama_loader import strict_json, unpack
from llama_loader.errors import IntegrityError, LoaderError, SettingError, StoreError
from llama_loader.events import Note, Sink, Stage, ignore
from llama_loader.fetch import Wanted
from llama_loader.manifest import Artifact, FileEntry, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llama_loader.fetch import Fetcher

FORMAT: Final = 1
LOCK_SECONDS: Final = 900.0
"""An installation over a slow link; after that the other installer is taken for dead."""
STALE_SECONDS: Final = 3600.0
"""A staging folder that nothing was written to for so long has no owner any more."""

_RECEIPT: Final = "receipt.json"
_FILES: Final = "files"
_PIECE: Final = 1 << 20
_PRIVATE: Final = 0o700
_NOT_WRITABLE: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR})


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What stands beside an installed runtime: what it is, and every file of it."""

    format: Annotated[int, Meta(ge=1)]
    sha256: schema.Sha256
    release: str | None
    artifact: Artifact | None
    verified: bool
    folder: schema.RelativePath
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Installed:
    """A runtime whose files were all hashed and found right.

    Attributes:
        folder: the absolute folder that holds ``llama-server``.
        root: the runtime's own folder in the store.
        sha256: of the archive that it came from.
        release: the release's name, None for an archive by URL.
        artifact: the manifest's entry, None for an archive by URL.
        verified: False where nothing pinned the archive.
    """

    folder: Path
    root: Path
    sha256: str
    release: str | None
    artifact: Artifact | None
    verified: bool


class Store:
    """Runtimes below ``root``. Nothing is written before something is installed."""

    def __init__(self, root: Path, *, sink: Sink = ignore) -> None:
        self._root = root.absolute()
        self._sink = sink

    @property
    def root(self) -> Path:
        """Where runtimes are installed; a private folder once the usual one was not writable."""
        return self._root

    def find(self, sha256: str) -> Installed | None:
        """Return an installed runtime, every file of it hashed now; None where there is none.

        A damaged one is said, and taken out of use.

        Raises:
            StoreError: the store is of a newer loader, or cannot be read.
        """
        place = self._root / "runtimes" / sha256
        with _disk_errors(place):
            self._check_format()
            if not place.is_dir():
                return None
            started = time.monotonic()
            try:
                receipt = _read_receipt(place)
                _check_files(place / _FILES, receipt)
            except IntegrityError as error:
                self._sink(Note(error.code, error.message, "it is fetched again"))
                self._discard(place)
                return None
            size = sum(entry.size for entry in receipt.files)
            self._sink(Stage("verify", time.monotonic() - started, size))
            return _installed(place, receipt)

    def install(
        self, artifact: Artifact, urls: Sequence[str], fetcher: Fetcher, *, release: str
    ) -> Installed:
        """Return the artifact's runtime, fetched and unpacked unless it is there already.

        Raises:
            NetworkError: it cannot be had from any URL.
            IntegrityError: what was had is not what the manifest says.
            StoreError: the disk is full or broken.
        """
        found = self.find(artifact.sha256)
        if found is not None:
            return found
        wanted = Wanted(
            artifact.name, artifact.size, artifact.sha256, artifact.chunk_size, artifact.chunks
        )
        with self._installing(artifact.sha256) as staging:
            if staging is not None:
                clock = _Clock()
                started = time.monotonic()
                chunks = clock.around(fetcher.chunks(wanted, urls))
                unpack.unpack(chunks, artifact, staging / _FILES, sink=self._sink)
                self._sink(Stage("fetch", clock.seconds, artifact.size))
                unpacking = time.monotonic() - started - clock.seconds
                self._sink(Stage("unpack", unpacking, artifact.unpacked_size))
                folder = _program_folder(staging / _FILES, artifact.name)
                receipt = Receipt(
                    format=FORMAT,
                    sha256=artifact.sha256,
                    release=release,
                    artifact=artifact,
                    verified=True,
                    folder=folder,
                    files=artifact.files,
                )
                self._publish(staging, receipt)
        return self._found_after_install(artifact.sha256)

    def install_archive(self, url: str, sha256: str | None, fetcher: Fetcher) -> Installed:
        """Return the runtime of any llama.cpp archive, wherever its ``llama-server`` lies.

        With no pin the archive is fetched every time, and the digest to pin is said loudly.

        Raises:
            NetworkError: it cannot be had.
            IntegrityError: it is not what is pinned, is damaged or unsafe.
            StoreError: the disk is full or broken.
        """
        if sha256 is not None:
            found = self.find(sha256)
            if found is not None:
                return replace(found, verified=True)
        self._prepare()
        with _disk_errors(self._root), tempfile.TemporaryFile(dir=self._staging()) as spool:
            started = time.monotonic()
            digest, size = fetcher.copy(url, spool, limit=unpack.MAX_FOREIGN_BYTES)
            self._sink(Stage("fetch", time.monotonic() - started, size))
            self._judge(url, digest, sha256)
            with self._installing(digest) as staging:
                if staging is not None:
                    started = time.monotonic()
                    unpack.unpack_foreign(spool, url, staging / _FILES)
                    self._sink(Stage("unpack", time.monotonic() - started))
                    self._publish(staging, _foreign_receipt(staging, url, digest, sha256))
        return self._found_after_install(digest)

    def manifest(self, url: str, sha256: str | None, fetcher: Fetcher) -> Manifest:
        """Return a manifest: a pinned one from the store where it lies there, else fetched.

        Raises:
            NetworkError: it cannot be had.
            IntegrityError: it is not what is pinned, or malformed.
        """
        cached = self._root / "manifests" / f"{sha256}.json"
        data = _read_if_there(cached) if sha256 else None
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            data = fetcher.manifest_bytes(url, sha256)
            if sha256 is not None:
                self._keep_manifest(cached.name, data)
            else:
                self._say_unpinned(url, data)
        return schema.parse(data, what=f"manifest {url}")

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
            if (place / _RECEIPT).is_file():
                with _disk_errors(place):
                    receipt = _read_receipt(place)
                    _check_files(place / _FILES, receipt)
                    return _installed(place, receipt)
        raise SettingError(
            "NOT_A_RUNTIME",
            f"{folder} is not in an installed runtime",
            hint="give the folder that `python -m llama_loader fetch` prints",
        )

    def _found_after_install(self, sha256: str) -> Installed:
        found = self.find(sha256)
        if found is None:
            raise StoreError(
                "STORE_UNSTABLE",
                f"the runtime {sha256[:12]} was damaged as soon as it was installed",
                hint="is another program writing to the store, or is the disk failing?",
            )
        return found

    @contextmanager
    def _installing(self, sha256: str) -> Iterator[Path | None]:
        """Give a private folder to install into; None where somebody else was faster."""
        self._prepare()
        with _disk_errors(self._root), self._lock(sha256):
            if (self._root / "runtimes" / sha256).is_dir():
                yield None
                return
            staging = Path(tempfile.mkdtemp(prefix=f"{sha256[:12]}.", dir=self._staging()))
            try:
                (staging / _FILES).mkdir(mode=0o755)
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _publish(self, staging: Path, receipt: Receipt) -> None:
        _write(staging / _RECEIPT, schema.encode(receipt))
        for folder in sorted((path for path in staging.rglob("*") if path.is_dir()), reverse=True):
            _sync_folder(folder)
        _sync_folder(staging)
        runtimes = self._root / "runtimes"
        try:
            staging.rename(runtimes / receipt.sha256)
        except OSError as error:
            # Without working locks another installer may have been faster: theirs is as good.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        _sync_folder(runtimes)

    def _prepare(self) -> None:
        """Make the store's folders, or fall back to a private temporary store and say so."""
        try:
            self._make_folders()
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise _disk_error(self._root, error) from error
            usual, self._root = self._root, Path(tempfile.mkdtemp(prefix="llama-loader-"))
            self._sink(
                Note(
                    "STORE_TEMPORARY",
                    f"{usual} cannot be written ({error.strerror}); installing to {self._root}, "
                    "which is gone with this machine's temporary files",
                    "set HF_HOME or --store to a folder that can be written",
                )
            )
            self._make_folders()
        self._sweep()

    def _make_folders(self) -> None:
        for name in ("runtimes", "manifests", "staging"):
            (self._root / name).mkdir(parents=True, exist_ok=True)
        self._staging().chmod(_PRIVATE)
        self._check_format()
        if not (self._root / "FORMAT").is_file():
            _write_whole(self._root / "FORMAT", f"{FORMAT}\n".encode())
        # A folder may be there and not writable: find out before anything is fetched.
        with tempfile.TemporaryFile(dir=self._staging()):
            pass

    def _check_format(self) -> None:
        text = _read_if_there(self._root / "FORMAT")
        if text is not None and text.strip() != str(FORMAT).encode():
            raise StoreError(
                "STORE_NEWER",
                f"the store {self._root} has format {text[:20].decode('ascii', 'replace')!r}; "
                f"this loader knows {FORMAT}",
                hint="update the loader, or use another store with --store",
            )

    def _staging(self) -> Path:
        return self._root / "staging"

    def _sweep(self) -> None:
        """Remove what installers left that were killed."""
        horizon = time.time() - STALE_SECONDS
        for left in self._staging().iterdir():
            if left.is_dir() and _newest(left) < horizon:
                shutil.rmtree(left, ignore_errors=True)

    def _discard(self, place: Path) -> None:
        """Take a runtime out of use in one step, then delete it."""
        try:
            self._staging().mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            grave = Path(tempfile.mkdtemp(prefix="damaged.", dir=self._staging()))
            place.rename(grave / place.name)
        except OSError as error:
            raise StoreError(
                "RUNTIME_DAMAGED",
                f"{place} is damaged and cannot be removed: {error.strerror}",
                hint="use another store with --store",
            ) from error
        shutil.rmtree(grave, ignore_errors=True)

    @contextmanager
    def _lock(self, sha256: str) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(self._staging() / f"{sha256}.lock", timeout=LOCK_SECONDS)
        try:
            lock.acquire()
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

    def _judge(self, url: str, digest: str, sha256: str | None) -> None:
        if sha256 is None:
            self._sink(
                Note(
                    "UNVERIFIED",
                    f"{url} is not pinned: these bytes are run as they came; their sha256 is "
                    f"{digest}",
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

    def _say_unpinned(self, url: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        self._sink(
            Note(
                "MANIFEST_NOT_PINNED",
                f"manifest {url} is not pinned; its sha256 is {digest}",
                f"set YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_SHA256={digest}",
            )
        )

    def _keep_manifest(self, name: str, data: bytes) -> None:
        self._prepare()
        with _disk_errors(self._root):
            _write_whole(self._root / "manifests" / name, data)


class _Clock:
    """Adds up the time that an iterator takes; the rest is its consumer's."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        while True:
            started = time.monotonic()
            chunk = next(chunks, None)
            self.seconds += time.monotonic() - started
            if chunk is None:
                return
            yield chunk


def _read_receipt(place: Path) -> Receipt:
    try:
        data = (place / _RECEIPT).read_bytes()
    except FileNotFoundError as error:
        raise IntegrityError("RUNTIME_DAMAGED", f"{place}: has no receipt") from error
    what = f"receipt of {place.name[:12]}"
    tree = strict_json.loads(data, what=what, max_bytes=schema.MAX_MANIFEST_BYTES)
    receipt = schema.convert(tree, Receipt, what=what, code="RECEIPT_INVALID")
    if receipt.sha256 != place.name:
        raise IntegrityError("RUNTIME_DAMAGED", f"{place}: its receipt is of another runtime")
    return receipt


def _check_files(folder: Path, receipt: Receipt) -> None:
    listed = {entry.path: entry for entry in receipt.files}
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    wrong = sorted(present ^ listed.keys())
    # Hashing releases the interpreter's lock: 190 MB take as long as the largest file alone.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        there = [entry for entry in receipt.files if entry.path in present]
        sound = pool.map(lambda entry: _is_sound(folder / entry.path, entry), there)
        wrong += [entry.path for entry, fine in zip(there, sound) if not fine]  # noqa: B905
    if wrong:
        raise IntegrityError(
            "RUNTIME_DAMAGED",
            f"{receipt.sha256[:12]}: {', '.join(wrong[:5])} "
            f"({len(wrong)} files) changed since it was installed",
        )


def _is_sound(path: Path, entry: FileEntry) -> bool:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW) if not path.is_symlink() else None
    if handle is None:
        return False
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if status.st_size != entry.size or bool(status.st_mode & 0o100) != entry.executable:
            return False
        digest = hashlib.sha256()
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest() == entry.sha256


def _installed(place: Path, receipt: Receipt) -> Installed:
    return Installed(
        folder=place / _FILES / receipt.folder,
        root=place,
        sha256=receipt.sha256,
        release=receipt.release,
        artifact=receipt.artifact,
        verified=receipt.verified,
    )


def _program_folder(files: Path, name: str) -> str:
    return str(unpack.find_program(files, name).relative_to(files))


def _foreign_receipt(staging: Path, url: str, digest: str, sha256: str | None) -> Receipt:
    files = staging / _FILES
    folder = _program_folder(files, url)
    entries = tuple(
        FileEntry(
            path=str(path.relative_to(files)),
            size=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            executable=bool(path.stat().st_mode & 0o100),
        )
        for path in sorted(files.rglob("*"))
        if path.is_file()
    )
    return Receipt(
        format=FORMAT,
        sha256=digest,
        release=None,
        artifact=None,
        verified=sha256 is not None,
        folder=folder,
        files=entries,
    )


def _read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is absent, the old one or the new one at every moment."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _newest(folder: Path) -> float:
    times = [folder.lstat().st_mtime]
    for path in folder.rglob("*"):
        try:
            times.append(path.lstat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times)


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except LoaderError:
        raise
    except OSError as error:
        raise _disk_error(place, error) from error


def _disk_error(place: Path, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            "DISK_FULL",
            f"no room in {place}: {error.strerror}; nothing was half-installed",
            hint="free some space, or use another store with --store",
        )
    return StoreError(
        "STORE_FAILED",
        f"{error.filename or place}: {error.strerror or error}",
        hint="check the folder's owner and permissions, or use another store with --store",
    )
