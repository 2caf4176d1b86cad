"""Unpack any llama.cpp archive into a private folder (``…_LLAMA_CPP_URL``).

No manifest lists its files. Links that stay inside the archive become files, so that only files and
folders are installed. A member that leads out, is special, or exists twice is refused, and so is an
archive that would take more than bounded memory, files or bytes.
"""

import posixpath
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Final

from llama_loader.manifest import MAX_MEMBERS, MAX_PARTS, FileEntry
from llama_loader.receipt import PROGRAM
from llama_loader.unpack import PIECE, Member, Reader, archive_format, decompressed, refused, write

MAX_BYTES: Final = 8 << 30
"""An official CUDA release with its cuBLAS unpacks to about 2 GB."""
MAX_LINKS: Final = 1000
"""An official release has two for each of its libraries, about 60."""
MAX_HOPS: Final = 40
"""Links that lead to one another, as many as Linux follows."""
MAX_DIRECTORY: Final = 4 << 20
"""Bytes that zipfile may read at once: it reads a zip's list of members whole."""

_SPECIAL_BITS: Final = 0o7000
_MAX_PATH: Final = 1024
_MAX_PART: Final = 255
_LINKS: Final = ("symbolic link", "hard link")
_ZIP_METHODS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""zipfile sets no bound to the memory that LZMA data ask for, and reports bzip2's damage as an
error of the disk; llama.cpp's releases need neither."""
_ZIP_DAMAGE: Final = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError),
    *(NotImplementedError, RuntimeError),  # a version that zipfile does not know; encryption
)


def unpack(archive: IO[bytes], name: str, into: Path) -> tuple[FileEntry, ...]:
    """Unpack a tarball or ``zip`` into an empty folder; return its files, sorted by path."""
    archive.seek(0)
    form = archive_format(archive.read(8), name)
    archive.seek(0)
    tree = _Tree(name, into)
    if form == "zip":
        _unpack_zip(archive, name, tree)
    else:
        reader = Reader(decompressed(_pieces(archive), form, name), name, MAX_BYTES)
        for member in reader.members():
            tree.add(member, reader.content())
    tree.resolve_links()
    return tuple(tree.files[path] for path in sorted(tree.files))


class _Tree:
    """What was unpacked so far; the limits and rules that hold for each kind of archive."""

    def __init__(self, name: str, into: Path) -> None:
        self.files: dict[str, FileEntry] = {}
        self._name = name
        self._into = into
        self._links: dict[str, str] = {}
        self._spellings: dict[str, tuple[str, bool]] = {}
        self._size = 0
        self._members = 0

    def add(self, member: Member, content: Iterable[bytes | memoryview]) -> None:
        """Write a file, or remember a link."""
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise refused(self._name, f"it has more than {MAX_MEMBERS} members")
        path = self._safe(member.path)
        is_folder = member.kind == "folder"
        if path == "." and not is_folder:  # as a folder tar's first member is called so
            raise refused(self._name, f"{member.path!r} is a {member.kind}")
        self._claim(path, is_folder=is_folder)
        if is_folder:
            return
        if member.kind in _LINKS:
            self._links[path] = self._target(member, path)
            if len(self._links) > MAX_LINKS:
                raise refused(self._name, f"it has more than {MAX_LINKS} links")
        elif member.kind != "file":
            raise refused(self._name, f"{member.path!r} is a {member.kind}")
        elif member.mode & _SPECIAL_BITS:
            raise refused(self._name, f"{member.path!r} has mode {member.mode:04o}")
        else:
            self._write(path, content, executable=bool(member.mode & stat.S_IXUSR))

    def resolve_links(self) -> None:
        """Write a copy for every link; a link to a folder brings the folder's own files."""
        own = dict(self.files)
        for link in self._links:
            target = self._final(link)
            inside = {path: path[len(target) :] for path in own if path.startswith(f"{target}/")}
            if target in own:
                inside = {target: ""}
            if not inside:
                raise refused(self._name, f"{link!r} is a link to nothing")
            if len(self.files) + len(inside) > MAX_MEMBERS:
                raise refused(self._name, f"its links stand for more than {MAX_MEMBERS} files")
            for path, rest in inside.items():
                with (self._into / path).open("rb") as stream:
                    copy = f"{link}{rest}"
                    self._write(copy, _pieces(stream), executable=own[path].executable)

    def _write(self, path: str, content: Iterable[bytes | memoryview], *, executable: bool) -> None:
        def counted() -> Iterator[bytes | memoryview]:
            for piece in content:
                self._size += len(piece)
                if self._size > MAX_BYTES:
                    raise refused(self._name, f"it unpacks to more than {MAX_BYTES} bytes")
                yield piece

        # Old zip tools forget the bit; without it nothing can be started.
        starts = executable or path.rpartition("/")[2] == PROGRAM
        self.files[path] = write(counted(), path, self._into, executable=starts)

    def _safe(self, member: str) -> str:
        """Return a member's path in one spelling, without ``.`` and double slashes."""
        path = PurePosixPath(member)
        unsafe = path.is_absolute() or ".." in path.parts or "\\" in member
        longest = max((len(part.encode()) for part in path.parts), default=0)
        long = len(member.encode()) > _MAX_PATH or longest > _MAX_PART
        deep = len(path.parts) > MAX_PARTS
        if not member or unsafe or long or deep or not member.isprintable():
            raise refused(self._name, f"a member is called {member[:80]!r}")
        return str(path)

    def _claim(self, path: str, *, is_folder: bool) -> None:
        """Refuse a path that exists already, in this or another case, or below a file or link."""
        # A folder may be named again
        if not is_folder and path.casefold() in self._spellings:
            twin = self._spellings[path.casefold()][0]
            raise refused(self._name, f"{path!r} and {twin!r} are one, or differ in case only")
        folders = [(str(parent), True) for parent in PurePosixPath(path).parents]
        for step, folder in (*folders, (path, is_folder)):
            known = self._spellings.setdefault(step.casefold(), (step, folder))
            if known != (step, folder):
                raise refused(self._name, f"{step!r} stands where {known[0]!r} is already")
        if len(self._spellings) > MAX_MEMBERS:
            raise refused(self._name, f"it has more than {MAX_MEMBERS} files and folders")

    def _target(self, member: Member, path: str) -> str:
        """Return where a link leads, as a path in the archive."""
        start = posixpath.dirname(path) if member.kind == "symbolic link" else ""
        target = posixpath.normpath(posixpath.join(start, member.target))
        if target == ".." or target.startswith("../"):
            raise refused(self._name, f"{member.path!r} is a link that leads out of it")
        deep = target.count("/") >= MAX_PARTS
        if target == "." or target.startswith("/") or deep:
            raise refused(self._name, f"{member.path!r} is a link to {member.target[:80]!r}")
        return target

    def _final(self, link: str) -> str:
        """Follow links, also those in the middle of a path."""
        target = self._links[link]
        for _ in range(MAX_HOPS + 1):
            heads = [target[: found.end()] for found in re.finditer("[^/]+", target)]
            via = next((head for head in heads if head in self._links), None)
            if via is None:
                return target
            if len(target) > _MAX_PATH:
                break
            target = self._links[via] + target[len(via) :]
        raise refused(self._name, f"{link!r} is a link that leads in a circle, or too far")


class _Bounded:
    """What zipfile needs of a file, with a bound: zipfile checks no size or offset."""

    def __init__(self, archive: IO[bytes], name: str) -> None:
        self._archive = archive
        self._name = name
        self._size = archive.seek(0, 2)
        self.tell, self.seekable = archive.tell, archive.seekable

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and not 0 <= offset <= self._size:
            raise refused(self._name, "it is damaged: a member lies outside the archive")
        return self._archive.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        bound = MAX_DIRECTORY + 1
        data = self._archive.read(bound if size < 0 else min(size, bound))
        if len(data) == bound:
            raise refused(self._name, f"its list of members has more than {MAX_DIRECTORY} bytes")
        return data


def _unpack_zip(archive: IO[bytes], name: str, tree: _Tree) -> None:
    try:
        with zipfile.ZipFile(_Bounded(archive, name)) as opened:
            if len(opened.infolist()) > MAX_MEMBERS:
                raise refused(name, f"it has more than {MAX_MEMBERS} members")
            for info in opened.infolist():
                if (method := info.compress_type) not in _ZIP_METHODS:
                    raise refused(name, f"{info.filename!r} is compressed by method {method}")
                with opened.open(info) as stream:
                    tree.add(_zip_member(info, stream), _pieces(stream))
    except _ZIP_DAMAGE as error:
        raise refused(name, f"it is damaged: {error}") from error


def _zip_member(info: zipfile.ZipInfo, stream: IO[bytes]) -> Member:
    """Return a zip's member; its Unix mode is the upper half of the attributes, 0 from Windows."""
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        target = stream.read(_MAX_PATH).decode("utf-8", "replace")
        return Member(info.filename, "symbolic link", 0, 0o777, target)
    special = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
    kind = "folder" if info.is_dir() else "special file" if special else "file"
    return Member(info.filename, kind, info.file_size, stat.S_IMODE(mode), "")


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: stream.read(PIECE), b"")
