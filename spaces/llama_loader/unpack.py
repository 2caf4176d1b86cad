"""Unpack a release's tarball into a private folder, and verify every file.

The archive must hold exactly the files that its manifest lists, as plain files; anything else is
refused while it is read: bytes → decompressed pieces → members → files.

Python's ``tarfile`` reads headers of any size into memory, takes several readings of a damaged
archive for one, and has let links escape (CVE-2026-11940). ``Reader`` reads the part of the format
that GNU tar, bsdtar and Python write, and refuses the rest. ``foreign`` reads with it, too.

An archive that is damaged, truncated, too large or not understood raises ``IntegrityError``; a file
that cannot be written raises ``OSError``.
"""

from __future__ import annotations

import hashlib
import importlib
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

from llama_loader.concurrency import ahead
from llama_loader.errors import IntegrityError
from llama_loader.manifest import Artifact, FileEntry

FILE_MODE: Final = 0o644
PROGRAM_MODE: Final = 0o755
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

AHEAD: Final = 4
"""Pieces of 512 KiB that may wait to be written."""
_SLACK: Final = 1 << 20
"""Bytes of padding at an archive's end; tar writes up to 10 KiB, other tools more."""
_HEADERS: Final = 8 * 1024
"""Bytes of headers and padding for one file with the longest path that a manifest may list."""
PIECE: Final = 1 << 19
"""The largest piece that is passed on, in bytes."""
_BITE: Final = 1 << 16
WINDOW_LOG: Final = 23
"""zstd windows of at most 8 MiB: what the farm writes (docs/manifest.md), and little memory."""
XZ_MEMORY: Final = 80 << 20
"""Bytes; xz -9 needs 65 MiB."""

MAGIC: Final = {
    b"\x1f\x8b": "tar.gz",
    b"\xfd7zXZ\x00": "tar.xz",
    b"\x28\xb5\x2f\xfd": "tar.zst",
    b"PK\x03\x04": "zip",
}
BLOCK: Final = 512
MAX_EXTENDED: Final = 64 * 1024
"""Bytes of one extended header: a path of 4,096 bytes fits many times."""
MAX_EXTENDED_ALL: Final = 8 << 20
"""Bytes of all extended headers of an archive: each record in them is a step."""

_KINDS: Final = {
    b"0": "file",
    b"\0": "file",
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"5": "folder",
    b"6": "FIFO",
}
_EXTENSIONS: Final = frozenset((b"path", b"linkpath", b"size"))
_OCTAL: Final = re.compile(rb"[0-7]+")
_RECORD: Final = re.compile(rb"(\d{1,6}) ([^=\n]+)=")


def unpack(chunks: Generator[bytes, None, None], artifact: Artifact, into: Path) -> None:
    """Unpack a release's tarball into the empty folder ``into``; every byte is checked."""
    listed = {entry.path: entry for entry in artifact.files}
    folders = artifact.folders
    limit = artifact.unpacked_size + _SLACK + _HEADERS * (len(listed) + len(folders))

    def decompress() -> Generator[bytes, None, None]:
        with closing(chunks):  # in the thread that reads them
            yield from decompressed(chunks, artifact.format, artifact.name)

    with closing(ahead(decompress(), AHEAD)) as plain:
        reader = Reader(plain, artifact.name, limit)
        for member in reader.members():
            if member.kind == "folder" and member.path.rstrip("/") in folders:
                continue
            entry = _expected(member, listed, artifact.name)
            written = write(reader.content(), entry.path, into, executable=entry.executable)
            if (written.size, written.sha256) != (entry.size, entry.sha256):
                raise refused(artifact.name, f"{entry.path!r} is not what the manifest lists")
    if listed:
        raise refused(artifact.name, f"{min(listed)} is listed but missing")


def write(
    pieces: Iterable[bytes | memoryview], path: str, into: Path, *, executable: bool
) -> FileEntry:
    """Write and sync a new file, of mode 0755 or 0644, below ``into``; return size and digest."""
    digest, size = hashlib.sha256(), 0
    place = into / path
    place.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(place, _NEW_FILE, stat.S_IRUSR | stat.S_IWUSR), "wb") as stream:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            stream.write(piece)
        stream.flush()
        os.fchmod(stream.fileno(), PROGRAM_MODE if executable else FILE_MODE)
        os.fsync(stream.fileno())
    return FileEntry(path=path, size=size, sha256=digest.hexdigest(), executable=executable)


def _expected(member: Member, listed: dict[str, FileEntry], name: str) -> FileEntry:
    """Take a member's entry out of the list, so that a second one with its path finds none."""
    if member.kind != "file":
        raise refused(name, f"{member.path!r} is a {member.kind}, not a plain file")
    entry = listed.pop(member.path, None)
    if entry is None:
        raise refused(name, f"{member.path!r} is not listed, or is in the archive twice")
    mode = PROGRAM_MODE if entry.executable else FILE_MODE
    if member.mode != mode:
        raise refused(name, f"{member.path!r} has mode {member.mode:04o}, not {mode:04o}")
    if member.size != entry.size:
        raise refused(name, f"{member.path!r} has {member.size} bytes, not {entry.size}")
    return entry


def refused(name: str, why: str) -> IntegrityError:
    """Return the error of an archive that is damaged or unsafe."""
    return IntegrityError("ARCHIVE_REFUSED", name=name, why=why)


def archive_format(head: bytes, name: str) -> str:
    """Tell an archive's format from its first bytes."""
    for magic, found in MAGIC.items():
        if head.startswith(magic):
            return found
    raise IntegrityError("ARCHIVE_UNKNOWN", name=name, head=head[:8])


def decompressed(chunks: Iterator[bytes], form: str, name: str) -> Generator[bytes, None, None]:
    """Yield the plain bytes of a ``tar.gz``, ``tar.xz`` or ``tar.zst``, ``PIECE`` at most each.

    Nothing may follow them, and nothing in them may need too much memory.
    """
    make, failure = _decoder(form, name)
    decoder = None
    try:
        # in small pieces: a decoder copies what follows a member, after each of them
        for data in (one[at : at + _BITE] for one in chunks for at in range(0, len(one), _BITE)):
            rest = data
            while rest or (decoder is not None and not decoder.needs_input):
                decoder = decoder or make()
                piece = decoder.decompress(rest, PIECE)
                rest = b""
                if piece:
                    yield piece
                if decoder.eof:  # what follows must be another member, or it is garbage
                    rest, decoder = decoder.unused_data, None
    except failure as error:
        raise refused(name, f"it is damaged: {error}") from error
    if decoder is not None:
        raise refused(name, "it is damaged: it ends in the middle of the compressed data")


class _Gzip:
    """zlib's decompressor with the interface of the other two."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.eof, self.unused_data, self.needs_input = False, b"", True

    def decompress(self, data: bytes, limit: int) -> bytes:
        plain = self._inner.decompress(self._inner.unconsumed_tail + data, limit)
        self.eof, self.unused_data = self._inner.eof, self._inner.unused_data
        self.needs_input = len(plain) < limit  # all of the input is used up then
        return plain


def _decoder(form: str, name: str) -> tuple[Callable[[], Any], type[Exception]]:
    if form == "tar.gz":
        return _Gzip, zlib.error
    if form == "tar.xz":
        return (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)), lzma.LZMAError
    if form != "tar.zst":
        raise IntegrityError("FORMAT_UNKNOWN", name=name, form=form)
    name_of_zstd = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    zstd = importlib.import_module(name_of_zstd)
    options = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
    return (lambda: zstd.ZstdDecompressor(options=options)), zstd.ZstdError


class Member(NamedTuple):
    """One header: ``mode`` has the set-id bits, too; ``target`` is a link's."""

    path: str
    kind: str
    size: int
    mode: int
    target: str


class Reader:
    """Reads members from plain bytes, at most ``limit`` of them; ``name`` is for errors."""

    def __init__(self, pieces: Iterator[bytes], name: str, limit: int) -> None:
        def bounded() -> Iterator[memoryview]:
            left = limit
            for piece in pieces:
                left -= len(piece)
                if left < 0:
                    raise refused(name, "it unpacks to more than it may")
                yield memoryview(piece)

        self._pieces = bounded()
        self._name = name
        self._rest = memoryview(b"")
        self._left = 0
        self._extensions = 0

    def members(self) -> Iterator[Member]:
        """Yield the members; take a file's ``content`` before the next one."""
        extended: dict[str, str] = {}
        while (header := self._take(BLOCK)).count(0) != BLOCK:
            if sum(header) - sum(header[148:156]) + 8 * 32 != self._number(header[148:156]):
                raise refused(self._name, "it is damaged: a header's checksum is wrong")
            flag = header[156:157]
            if flag in (b"x", b"g", b"L", b"K"):
                extended.update(self._extended(flag, self._number(header[124:136])))
                continue
            member = self._member(header, flag, extended)
            extended = {}
            self._left = member.size
            yield member
            for _ in self.content():
                pass
            self._take(-member.size % BLOCK)
        if extended:
            raise refused(self._name, "it is damaged: it ends after an extended header")
        # to the very end, so that the decompressor sees its checksums
        for piece in chain((self._rest,), self._pieces):
            if bytes(piece).count(0) != len(piece):
                raise refused(self._name, "data follows the end of the archive")

    def content(self) -> Iterator[memoryview]:
        """Yield what was not read yet of the present member's content."""
        while self._left:
            piece = self._some(self._left)
            self._left -= len(piece)
            yield piece

    def _member(self, header: bytes, flag: bytes, extended: dict[str, str]) -> Member:
        path = self._text(header[:100])
        if header[257:263] == b"ustar\0" and header[345]:
            path = f"{self._text(header[345:500])}/{path}"
        path = extended.get("path", path)
        kind = _KINDS.get(flag, f"member of type {flag!r}")
        size = self._number(header[124:136])
        if "size" in extended:
            if not re.fullmatch(r"[0-9]{1,19}", extended["size"]):
                raise refused(self._name, f"it is damaged: {extended['size']!r} is not a size")
            size = int(extended["size"])
        if kind == "file" and path.endswith("/"):
            kind = "folder"
        if kind != "file" and size:
            raise refused(self._name, f"{path!r}, a {kind}, has content")
        target = extended.get("linkpath", self._text(header[157:257]))
        return Member(path, kind, size, self._number(header[100:108]), target)

    def _extended(self, flag: bytes, size: int) -> dict[str, str]:
        """Read an extended header's values for the next member."""
        if size > MAX_EXTENDED:
            raise refused(self._name, f"an extended header has {size} bytes")
        self._extensions += BLOCK + size
        if self._extensions > MAX_EXTENDED_ALL:
            raise refused(self._name, f"extended headers have more than {MAX_EXTENDED_ALL} bytes")
        data = self._take(size)
        self._take(-size % BLOCK)
        if flag in b"LK":
            return {"path" if flag == b"L" else "linkpath": self._text(data)}
        found, start = {}, 0
        while start < len(data):  # POSIX pax: LENGTH KEY=VALUE, each with its newline
            match = _RECORD.match(data, start)
            end = start + int(match[1]) if match else 0
            if not match or end <= match.end() or data[end - 1 : end] != b"\n":
                raise refused(self._name, "it is damaged: an extended header cannot be read")
            key = match[2]
            known = key in _EXTENSIONS
            if (known and flag == b"g") or key.startswith(b"GNU.sparse"):
                raise refused(self._name, "an extended header is of a kind that is not read")
            if known:
                found[key.decode()] = self._decoded(data[match.end() : end - 1])
            start = end
        return found

    def _number(self, field: bytes) -> int:
        text = field.strip(b" \0")
        if not text:
            return 0
        if not _OCTAL.fullmatch(text):
            raise refused(self._name, f"it is damaged: {field!r} is not a number")
        return int(text, 8)

    def _text(self, field: bytes) -> str:
        return self._decoded(field.split(b"\0", 1)[0])

    def _decoded(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise refused(self._name, f"{text!r} is not UTF-8") from error

    def _take(self, size: int) -> bytes:
        taken = bytearray()
        while len(taken) < size:
            taken += self._some(size - len(taken))
        return bytes(taken)

    def _some(self, size: int) -> memoryview:
        """Return between 1 and ``size`` bytes."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                raise refused(self._name, "it is damaged: it ends in the middle")
            self._rest = piece
        taken = self._rest[:size]
        self._rest = self._rest[size:]
        return taken
