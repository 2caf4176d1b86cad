"""An archive's bytes → verified files in a private folder.

Two sets of rules. A release's tarball holds exactly the files that its manifest lists, as plain
files; anything else is refused while it is read. A foreign archive (``…_LLAMA_CPP_URL``) may hold
links inside itself, which become files; it must hold a ``llama-server``.

``tarfile``'s own filter is not relied on: it has let links escape before (CVE-2026-11940).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import shutil
import sys
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Final, cast

from llama_loader.errors import IntegrityError
from llama_loader.events import Sink, Unpacking, ignore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_loader.manifest import Artifact, FileEntry

WINDOW_LOG: Final = 23
"""zstd windows of at most 8 MiB: what the farm writes (docs/manifest.md), and little memory."""
MAX_FOREIGN_BYTES: Final = 8 << 30
MAX_FOREIGN_MEMBERS: Final = 20_000
PROGRAM: Final = "llama-server"
FILE_MODE: Final = 0o644
PROGRAM_MODE: Final = 0o755

_PIECE: Final = 1 << 20
_SPECIAL_BITS: Final = 0o7000
_MAGIC: Final = {
    b"\x1f\x8b": "tar.gz",
    b"\xfd7zXZ\x00": "tar.xz",
    b"\x28\xb5\x2f\xfd": "tar.zst",
}


class Source(io.RawIOBase):
    """Reads an iterator of verified chunks as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the chunk at hand, or from the next one."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)


class _Xz(io.RawIOBase):
    """Decompresses one xz stream. ``lzma.LZMAFile`` passes over what follows it."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with decompressed bytes.

        Raises:
            LZMAError: the stream is damaged, or bytes follow it.
            EOFError: it ends too early.
        """
        plain = b""
        while not plain and not self._decompressor.eof:
            packed = self._source.read(_PIECE) if self._decompressor.needs_input else b""
            if not packed and self._decompressor.needs_input:
                raise EOFError("the compressed data ends too early")
            plain = self._decompressor.decompress(packed, len(buffer))
        if self._decompressor.eof and self._decompressor.unused_data:
            raise lzma.LZMAError("bytes follow the end of the compressed data")
        buffer[: len(plain)] = plain
        return len(plain)


def unpack(chunks: Iterator[bytes], artifact: Artifact, into: Path, *, sink: Sink = ignore) -> None:
    """Unpack a release's tarball into the empty folder ``into``; every byte is checked.

    Raises:
        IntegrityError: the archive is damaged, or holds anything but what the manifest lists.
    """
    listed = {entry.path: entry for entry in artifact.files}
    source = io.BufferedReader(Source(chunks), _PIECE)
    done = 0
    with _archive_errors(artifact.name), _decompressed(source, artifact.format) as plain:
        with tarfile.open(fileobj=plain, mode="r|", format=tarfile.USTAR_FORMAT) as tar:
            for member in tar:
                if member.isdir() and _is_parent(member.name, listed):
                    continue
                entry = _expected(member, listed, artifact.name)
                _write(_content(tar, member), entry, into / entry.path, artifact.name)
                done += entry.size
                sink(Unpacking(artifact.name, done, artifact.unpacked_size))
        _read_to_end(plain, artifact.name)
    if source.read(1):
        raise _refused(artifact.name, "bytes follow the end of the compressed data")
    if listed:
        raise _refused(artifact.name, f"{min(listed)} is listed but missing")


def unpack_foreign(archive: IO[bytes], name: str, into: Path) -> None:
    """Unpack any llama.cpp archive into the empty folder ``into`` by rules of its own.

    Links that stay inside the archive become files; the same limits of kind, place and size hold.

    Raises:
        IntegrityError: it is damaged or unsafe, or of a kind that is not known.
    """
    kind = _kind(archive, name)
    links: dict[str, str] = {}
    seen: dict[str, str] = {}
    total = 0
    with (
        _archive_errors(name),
        _decompressed(archive, kind) as plain,
        tarfile.open(fileobj=plain, mode="r|") as tar,
    ):
        for number, member in enumerate(tar, 1):
            path = _safe_path(member.name, name)
            total += member.size
            if number > MAX_FOREIGN_MEMBERS or total > MAX_FOREIGN_BYTES:
                raise _refused(name, "it unpacks to more than any llama.cpp release")
            if member.isdir():
                continue
            _reject_twin(str(path), seen, name)
            if member.issym() or member.islnk():
                links[str(path)] = _link_target(member, path, name)
            else:
                _write_foreign(tar, member, into / path, name)
    _resolve_links(links, into, name)


def find_program(folder: Path, name: str) -> Path:
    """Return the folder that holds ``llama-server``, wherever in the archive it lies.

    Raises:
        IntegrityError: there is none, or there are several.
    """
    found = sorted(path for path in folder.rglob(PROGRAM) if path.is_file())
    if len(found) != 1:
        what = "holds no llama-server" if not found else "holds more than one llama-server"
        raise IntegrityError(
            "NO_SERVER_IN_ARCHIVE",
            f"{name} {what}",
            hint="name an archive of a llama.cpp release for Linux",
        )
    found[0].chmod(PROGRAM_MODE)
    return found[0].parent


def _expected(member: tarfile.TarInfo, listed: dict[str, FileEntry], name: str) -> FileEntry:
    """Take the entry that a member must be out of the list: a second one finds none."""
    if not member.isreg():
        raise _refused(name, f"{member.name!r} is not a plain file")
    entry = listed.pop(member.name, None)
    if entry is None:
        raise _refused(name, f"{member.name!r} is not listed, or stands there twice")
    mode = PROGRAM_MODE if entry.executable else FILE_MODE
    if member.mode != mode:
        raise _refused(name, f"{member.name!r} has mode {member.mode:04o}, not {mode:04o}")
    if member.size != entry.size:
        raise _refused(name, f"{member.name!r} has {member.size} bytes, not {entry.size}")
    return entry


def _is_parent(folder: str, listed: dict[str, FileEntry]) -> bool:
    return any(path.startswith(f"{folder.rstrip('/')}/") for path in listed)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    if stream is None:  # a plain file always has content
        raise tarfile.TarError(f"{member.name!r} cannot be read")
    return stream


def _write(content: IO[bytes], entry: FileEntry, place: Path, name: str) -> None:
    digest, received = hashlib.sha256(), 0
    place.parent.mkdir(parents=True, exist_ok=True)
    mode = PROGRAM_MODE if entry.executable else FILE_MODE
    handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as stream:
        while piece := content.read(_PIECE):
            digest.update(piece)
            received += len(piece)
            stream.write(piece)
        stream.flush()
        os.fchmod(handle, mode)
        os.fsync(handle)
    if received != entry.size or digest.hexdigest() != entry.sha256:
        raise _refused(name, f"{entry.path!r} is not what the manifest lists")


def _write_foreign(tar: tarfile.TarFile, member: tarfile.TarInfo, place: Path, name: str) -> None:
    if not member.isreg():
        raise _refused(name, f"{member.name!r} is neither a file nor a link")
    if member.mode & _SPECIAL_BITS:
        raise _refused(name, f"{member.name!r} has mode {member.mode:04o}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with _content(tar, member) as content, place.open("xb") as stream:
        shutil.copyfileobj(content, stream, _PIECE)
        stream.flush()
        os.fsync(stream.fileno())
    place.chmod(PROGRAM_MODE if member.mode & 0o100 else FILE_MODE)


def _link_target(member: tarfile.TarInfo, path: PurePosixPath, name: str) -> str:
    start = path.parent if member.issym() else PurePosixPath()
    if PurePosixPath(member.linkname).is_absolute():
        raise _refused(name, f"{member.name!r} is a link to an absolute path")
    parts: list[str] = list(start.parts)
    for part in PurePosixPath(member.linkname).parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise _refused(name, f"{member.name!r} is a link that leads out of the archive")
    return "/".join(parts)


def _resolve_links(links: dict[str, str], into: Path, name: str) -> None:
    for link, first in links.items():
        target, steps = first, 0
        while target in links and steps <= len(links):
            target, steps = links[target], steps + 1
        real = into / target
        if not real.is_file() or real.is_symlink():
            raise _refused(name, f"{link!r} is a link to nothing")
        place = into / link
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real, place)
        shutil.copymode(real, place)


def _safe_path(member: str, name: str) -> PurePosixPath:
    path = PurePosixPath(member)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in member
    if unsafe or any(not character.isprintable() for character in member):
        raise _refused(name, f"a member is called {member!r}")
    return path


def _reject_twin(path: str, seen: dict[str, str], name: str) -> None:
    twin = seen.setdefault(path.casefold(), path)
    if twin is not path:
        raise _refused(name, f"{path!r} and {twin!r} are one name, or differ in case only")


def _kind(archive: IO[bytes], name: str) -> str:
    archive.seek(0)
    head = archive.read(8)
    archive.seek(0)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    raise IntegrityError(
        "ARCHIVE_UNKNOWN",
        f"{name} is neither gzip, xz nor zstd data (it begins with {head!r})",
        hint="a page that asks for a login comes with status 200: open the URL in a browser",
    )


def _decompressed(source: IO[bytes], kind: str) -> IO[bytes]:
    if kind == "tar.gz":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=source, mode="rb"))
    if kind == "tar.xz":
        return cast("IO[bytes]", io.BufferedReader(_Xz(source), _PIECE))
    if kind == "tar.zst":
        zstd = _zstd()
        options = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
        return cast("IO[bytes]", zstd.ZstdFile(source, "rb", options=options))
    raise IntegrityError(
        "FORMAT_UNKNOWN", f"this loader cannot read {kind!r}", hint="update the loader"
    )


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _read_to_end(plain: IO[bytes], name: str) -> None:
    """Read what follows the archive's end: only zeros may, and the checksum must be right."""
    while piece := plain.read(_PIECE):
        if piece.strip(b"\0"):
            raise _refused(name, "data follows the end of the archive")


class _archive_errors:  # noqa: N801 - a context manager that reads like a function
    """Turns what the decompressors and tarfile raise into one error that names the archive."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        known = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
        is_zstd = error is not None and type(error).__name__ == "ZstdError"
        if isinstance(error, known) or is_zstd:
            raise _refused(self._name, f"it is damaged: {error}") from error


def _refused(name: str, why: str) -> IntegrityError:
    return IntegrityError(
        "ARCHIVE_REFUSED", f"{name}: {why}", hint="nothing of it was kept, and nothing was run"
    )
