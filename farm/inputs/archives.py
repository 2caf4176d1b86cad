"""Unpack archives from elsewhere: completely or not at all, only plain files, none outside."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Final, Literal, NoReturn, Self

from farm import durable
from farm.errors import SourceError

_BLOCK: Final = 1 << 20
_EXECUTABLE: Final = 0o100
_DAMAGE: Final = (
    *(tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile),
    *(ValueError, OverflowError, RecursionError),
)
"""Errors that ``tarfile`` and the decompressors raise for a damaged or foreign file."""
_MOST_HEADERS: Final = 1 << 20
"""Bytes of a tar's long names and other extended headers together, which ``tarfile`` reads whole.

One for each of 5,000 files' times has 30 bytes, in all 150 kB."""
_LARGEST_HEADER: Final = 8 << 10
"""Bytes of each; before Python 3.11.10 ``tarfile`` scans it again at each digit."""
_MOST_DIRECTORY: Final = 4 << 20
"""Bytes of a wheel's list of members, which ``zipfile`` reads whole: of 30,000 members or so."""
_METHODS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods of wheels. LZMA data choose their own memory, up to 4 GiB."""


def extract_subtree(archive: Path, subdir: str, into: Path) -> None:
    """Unpack one folder of a source archive (``NAME-VERSION/<subdir>/…``) as the new ``into``.

    Raises:
        SourceError: the archive has no such folder, or as ``unpack``.
    """
    with (
        durable.writing(into),
        durable.new_folder(into) as staging,
        durable.open_regular(archive) as stream,
    ):
        most = durable.MOST_BYTES
        unpack(stream, staging, what=archive.name, mode="r:gz", most=most, subdir=subdir)
        if not any(staging.iterdir()):
            raise SourceError("SUBDIR_MISSING", name=archive.name, subdir=subdir)


def unpack(
    stream: IO[bytes],
    into: Path,
    *,
    what: str,
    mode: Literal["r:", "r:gz"],
    most: int,
    subdir: str = "",
) -> None:
    """Unpack the folder ``subdir`` of a tar, without its first component, to an empty folder.

    Another machine or a foreign program may have made the tar. File times and execute permissions
    are kept; owners and other modes are not. ``what`` is its name in an error, ``most`` the bytes
    of all of its files.

    Raises:
        SourceError: it is damaged, or contains something that is neither a file, a folder nor a
            link, a name or a link that leads outside, a hard link, a link below or through another
            one, or more than ``most``.
    """
    links: dict[PurePosixPath, str] = {}
    folders: set[PurePosixPath] = set()
    try:
        with _Tar.open(fileobj=stream, mode=mode) as tar:
            for member in _bounded(tar, most):
                path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                if member.isdir() or not path.is_relative_to(subdir):
                    continue
                path = path.relative_to(subdir)
                content = tar.extractfile(member) if member.isreg() else None
                if not path.parts or ".." in path.parts or not (content or member.issym()):
                    raise tarfile.ReadError(f"{member.name!r} leads outside, or is no file")
                folders.update(path.parents)
                if len(path.parts) > durable.MOST_NAMES or len(folders) > durable.MOST_FILES:
                    bound = f"{durable.MOST_NAMES} names, or all more than {durable.MOST_FILES}"
                    raise tarfile.ReadError(f"a path has more than {bound} folders")
                if content is None:
                    links[path] = member.linkname
                else:
                    _write_file(into / path, content, member)
            _write_links(into, links)
    except _DAMAGE as error:
        raise SourceError("ARCHIVE_UNSAFE", name=what, error=error) from error


def _write_file(place: Path, content: IO[bytes], member: tarfile.TarInfo) -> None:
    """Write a member's file. ``tarfile``'s own way needs a filter, which Python 3.11.2 lacks."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as out:
        shutil.copyfileobj(content, out, _BLOCK)
    place.chmod(0o755 if member.mode & _EXECUTABLE else 0o644)
    os.utime(place, (member.mtime, member.mtime))


def _write_links(folder: Path, links: Mapping[PurePosixPath, str]) -> None:
    """Write links after all files, so that no file goes through one."""
    for path, target in links.items():
        if len(PurePosixPath(target).parts) > durable.MOST_NAMES:
            raise tarfile.ReadError(f"{path} is a link of more than {durable.MOST_NAMES} names")
        at = PurePosixPath()
        for part in (*path.parent.parts, *PurePosixPath(target).parts):
            if at in links or part.startswith("/") or (part == ".." and not at.parts):
                raise tarfile.ReadError(f"{path} is a link below or through another, or outside")
            at = at.parent if part == ".." else at / part
    for path, target in links.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(target)


def _bounded(tar: tarfile.TarFile, most: int) -> Iterator[tarfile.TarInfo]:
    """Yield what a tree can have; ``tarfile`` looks through all of the tar for a hard link."""
    left = most
    for number, member in enumerate(iter(tar.next, None)):
        tar.members.clear()  # type: ignore[attr-defined]  # it keeps each one until the end
        tar.pax_headers = {}  # it copies those of all members for each; none of them is of use
        left -= member.size
        odd = member.size < 0 or member.issparse() or member.islnk()
        if left < 0 or number == durable.MOST_FILES or odd:
            bounds = f"{most >> 20} MiB or {durable.MOST_FILES} files"
            raise tarfile.ReadError(f"{member.name!r} is a hard link or sparse, or beyond {bounds}")
        yield member


class _SmallInfo(tarfile.TarInfo):
    """A header. ``tarfile`` reads an extended one, and a sparse file's map, of any size."""

    def _proc_member(self, tar: _Tar) -> Self:
        """Take in a header that was read, and what follows an extended one."""
        of_header = 0 if self.isfile() else self.size
        tar.left -= of_header
        beyond = tar.left < 0 or of_header > _LARGEST_HEADER
        if self.size < 0 or self.type == tarfile.GNUTYPE_SPARSE or beyond:
            raise tarfile.ReadError("it has long headers without end, or a sparse file")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]

    def _no_map(self, *_: object) -> NoReturn:
        raise tarfile.ReadError("it has a sparse file")

    # What `tarfile` calls for PAX's three kinds of maps.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _no_map


class _Tar(tarfile.TarFile):
    """A tar whose extended headers are bounded together; ``left`` is in bytes."""

    tarinfo = _SmallInfo
    left = _MOST_HEADERS


def extract_wheel(wheel: Path, into: Path) -> None:
    """Unpack a wheel's files (``open_wheel``) into the existing folder ``into``, and no other."""
    with open_wheel(wheel) as archive:
        for entry in archive.infolist():
            place = Path(archive.extract(entry, into))
            if place.is_file():
                # The upper half of a zip entry's attributes is the file's Unix mode.
                place.chmod(0o755 if entry.external_attr >> 16 & _EXECUTABLE else 0o644)


@contextmanager
def open_wheel(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a wheel; what is read of it until the context is left may be damaged, too.

    Raises:
        SourceError: ``ARCHIVE_UNSAFE``: it is no wheel.
    """
    try:
        with durable.open_regular(path) as stream, _bounded_zip(stream) as wheel:
            yield wheel
    # `zipfile` raises the last two for encryption and for an unknown compression
    except (zipfile.BadZipFile, *_DAMAGE, RuntimeError, NotImplementedError) as error:
        raise SourceError("ARCHIVE_UNSAFE", name=path.name, error=error) from error


def _bounded_zip(stream: IO[bytes]) -> zipfile.ZipFile:
    """Open a zip whose list of members and whose decompressors take little memory."""
    end = zipfile._EndRecData(stream)  # type: ignore[attr-defined]  # noqa: SLF001 - ZipFile's first step
    if end and end[zipfile._ECD_SIZE] > _MOST_DIRECTORY:  # type: ignore[attr-defined]  # noqa: SLF001
        raise zipfile.BadZipFile(f"its list of members has more than {_MOST_DIRECTORY} bytes")
    wheel = zipfile.ZipFile(stream)
    if sum(one.file_size for one in wheel.infolist()) > durable.MOST_ARCHIVE:
        raise zipfile.BadZipFile(f"it unpacks to more than {durable.MOST_ARCHIVE >> 30} GiB")
    for one in wheel.infolist():
        if one.compress_type not in _METHODS:
            raise zipfile.BadZipFile(f"{one.filename!r} is neither stored nor deflated")
    return wheel
