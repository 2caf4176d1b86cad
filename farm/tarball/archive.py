"""Deterministic compressed tarballs: the same members give the same bytes.

They record no time, user name or owner: ustar with owner 0:0, one fixed time for every member, no
time in the compressor's header, and one compressing thread.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, BinaryIO, Final, Self, cast

from farm.errors import PackError
from farm.options import require_known

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


ZSTD_LEVEL: Final = 19
ZSTD_WINDOW_LOG: Final = 23
"""8 MiB: what a decoder must keep in memory (docs/manifest.md)."""
GZIP_LEVEL: Final = 9
FORMATS: Final = ("tar.zst", "tar.gz")
FILE_MODE: Final = 0o644
PROGRAM_MODE: Final = 0o755

BLOCK: Final = 1 << 20
"""Bytes that are read at a time."""
_INPUT: Final = 1 << 16
_GZIP_BITS: Final = 16 + zlib.MAX_WBITS
"""Zlib's way to say: one member of gzip, with its checksum."""
MAX_BYTES: Final = 8 << 30
"""Bytes of all members of an archive that is read; CUDA's libraries unpack to about 2 GB."""
MAX_FILES: Final = 1_000
"""An SBOM of so many takes 3 s, of 5,000 a minute; the largest release has fewer than 100."""
DAMAGE: Final = (tarfile.TarError, zstd.ZstdError, zlib.error, EOFError, gzip.BadGzipFile)
"""The libraries' exceptions for an archive that is damaged or cut short."""


@dataclass(frozen=True)
class Digests:
    """A file's size in bytes, its sha256, and that of each of its chunks."""

    size: int
    sha256: str
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Chunking:
    """Bytes of the chunks of a tarball, and of those of the files in it.

    A tarball of 20 MB has 40 chunks. A chunk is unpacked once it is verified, so over a slow link
    only the last one remains after the last byte (docs/store.md). Files are hashed on all cores,
    which the 45 chunks of the largest file keep busy.
    """

    archive: int = 512 * 1024
    files: int = 4 * 1024 * 1024


@dataclass(frozen=True)
class TarMember:
    """One regular file of an archive. ``stream`` is valid until the next member is read.

    ``mtime`` is the time in the archive; ``write`` gives all members one time.
    """

    path: str
    size: int
    mode: int
    stream: BinaryIO
    mtime: int = 0


class ChunkHasher:
    """Hashes a file as a whole and in chunks of ``chunk_size`` bytes."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self._whole = hashlib.sha256()
        self._chunk = hashlib.sha256()
        self._chunks: list[str] = []
        self._size = 0

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        self._whole.update(data)
        view = memoryview(data)
        while view:
            room = self.chunk_size - self._size % self.chunk_size
            self._chunk.update(view[:room])
            self._size += len(view[:room])
            if self._size % self.chunk_size == 0:
                self._chunks.append(self._chunk.hexdigest())
                self._chunk = hashlib.sha256()
            view = view[room:]

    def digests(self) -> Digests:
        """Return the digests of all bytes so far."""
        last = [self._chunk.hexdigest()] if self._size % self.chunk_size else []
        return Digests(self._size, self._whole.hexdigest(), (*self._chunks, *last))


def hash_file(stream: BinaryIO, chunk_size: int) -> Digests:
    """Hash a stream from its current position to its end."""
    hasher = ChunkHasher(chunk_size)
    while block := stream.read(BLOCK):
        hasher.update(block)
    return hasher.digests()


def write(
    raw: IO[bytes],
    archive_format: str,
    members: Iterable[TarMember],
    mtime: int,
    *,
    level: int = ZSTD_LEVEL,
) -> None:
    """Write members, in their order, to ``raw``, which stays open; ``level`` is zstd's.

    Each is written before the next one is asked for.

    Raises:
        PackError: ``FORMAT_UNKNOWN``, ``NAME_TOO_LONG``, ``ARCHIVE_UNSOUND``: they are more than a
            release has, or ``FILE_CHANGED``: one has fewer bytes than its size.
    """
    left = MAX_BYTES
    with (
        _compressor(raw, archive_format, level) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for member in members:
            left -= member.size  # a library may have many names, and each is a file
            if left < 0:
                raise PackError(
                    "ARCHIVE_UNSOUND/most", what=member.path, most="more than a release"
                )
            info = tarfile.TarInfo(member.path)
            info.size, info.mode, info.mtime = member.size, member.mode, mtime
            try:
                tar.addfile(info, member.stream)
            except ValueError as error:
                raise PackError("NAME_TOO_LONG", path=member.path, error=error) from error
            except OSError as error:
                if error.errno is not None:
                    raise
                raise PackError("FILE_CHANGED", path=member.path) from error


def members(
    raw: BinaryIO, archive_format: str, *, what: str, root: str = "runtime"
) -> Iterator[TarMember]:
    """Yield an archive's members, streaming it once; read each one before the next.

    ``what`` is its name in an error, ``root`` the one folder that must contain everything.

    Raises:
        PackError: ``ARCHIVE_UNSOUND``: it contains something that no release may contain.
        Exception: one of ``DAMAGE``, here or when a member is read.
    """
    if archive_format not in FORMATS:
        raise _unknown(archive_format)
    with (
        io.BufferedReader(_Unpacked(raw, archive_format, what), BLOCK) as unpacked,
        tarfile.open(fileobj=unpacked, mode="r|", tarinfo=_PlainInfo) as tar,
    ):
        left, names = MAX_BYTES, set[str]()
        for info in tar:
            left -= info.size
            if left < 0 or len(names) == MAX_FILES:
                most = f"more than {MAX_BYTES} bytes or {MAX_FILES} files"
                raise PackError("ARCHIVE_UNSOUND/most", what=what, most=most)
            if info.name.casefold() in names:
                twice = f"{info.name} stands in it twice, or differs in case only"
                raise PackError("ARCHIVE_UNSOUND/twice", what=what, twice=twice)
            names.add(info.name.casefold())
            if problem := _unsound(info, root):
                raise PackError("ARCHIVE_UNSOUND", what=what, name=info.name, problem=problem)
            content = cast("BinaryIO", tar.extractfile(info))
            yield TarMember(info.name, info.size, info.mode, content, int(info.mtime))
        # The compressor's checksum is at the very end: read up to it. tarfile has read ahead.
        rest = cast("BinaryIO", tar.fileobj)
        if rest.read(BLOCK).strip(b"\0") or rest.read(1):
            raise PackError("ARCHIVE_UNSOUND/end", what=what)


def require_format(asked: str) -> None:
    """Refuse an unknown ``--format``: ``FORMAT_UNKNOWN``."""
    require_known("FORMAT_UNKNOWN", "--format", asked, FORMATS)


def format_of(name: str) -> str:
    """Return the format that a file's name ends with, or raise ``FORMAT_UNKNOWN``."""
    for archive_format in FORMATS:
        if name.endswith(f".{archive_format}"):
            return archive_format
    raise _unknown(name)


class _PlainInfo(tarfile.TarInfo):
    """A header with the bytes that ``write`` gives it.

    ``tarfile`` reads an extended one of any size into memory, and names and numbers that other
    readers understand otherwise. It reads a damaged or missing header as the end, which is
    two blocks of zeros.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read 512 bytes."""
        try:
            found = super().frombuf(buf, encoding, errors)
            written = found.tobuf(tarfile.USTAR_FORMAT, encoding, errors)
            if found.type == tarfile.REGTYPE and written == buf:
                return found
        except (tarfile.HeaderError, ValueError) as error:
            if buf == bytes(tarfile.BLOCKSIZE):  # the end
                raise
            raise tarfile.ReadError(str(error)) from error
        raise tarfile.ReadError("a header in it is not a plain file's, as releases have it")


def _unsound(info: tarfile.TarInfo, root: str) -> str:
    top, *inside = info.name.split("/")
    if not info.name.isprintable():
        return "has a name that is not printable"
    if top != root or not inside or {"", ".", ".."} & set(inside):
        return f"is not a file below {root}/"
    if info.mode not in (FILE_MODE, PROGRAM_MODE):
        return f"has mode {info.mode:04o}"
    return "" if (info.uid, info.gid) == (0, 0) else "is not owned by 0:0"


def _compressor(raw: IO[bytes], archive_format: str, level: int) -> gzip.GzipFile | zstd.ZstdFile:
    if archive_format == "tar.gz":
        return gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0)
    if archive_format == "tar.zst":
        options: dict[int, int] = {
            zstd.CompressionParameter.compression_level: level,
            zstd.CompressionParameter.window_log: ZSTD_WINDOW_LOG,
            zstd.CompressionParameter.checksum_flag: 1,
        }
        return zstd.ZstdFile(raw, "wb", options=options)
    raise _unknown(archive_format)


class _Unpacked(io.RawIOBase):
    """What one gzip member or zstd frame unpacks to.

    The libraries' own readers continue with the next one; an archive can have millions of them.
    """

    def __init__(self, raw: BinaryIO, archive_format: str, what: str) -> None:
        self._raw, self._what = raw, what
        window: dict[int, int] = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
        self._one = (
            zlib.decompressobj(_GZIP_BITS)
            if archive_format == "tar.gz"
            else zstd.ZstdDecompressor(options=window)
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # io gives no other
        one, tail = self._one, b""
        while not one.eof:
            if isinstance(one, zstd.ZstdDecompressor):
                hungry = one.needs_input
            else:
                tail = one.unconsumed_tail
                hungry = not tail
            block = self._raw.read(_INPUT) if hungry else tail
            data = one.decompress(block, len(buffer))
            buffer[: len(data)] = data
            if data:
                return len(data)
            if hungry and not block:
                raise EOFError("it is cut short")
        if one.unused_data or self._raw.read(1):
            raise PackError("ARCHIVE_UNSOUND/end", what=self._what)
        return 0


def _unknown(name: str) -> PackError:
    return PackError("FORMAT_UNKNOWN", name=name, formats=", ".join(FORMATS))
