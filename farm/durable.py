"""Write files and folders so that they are complete on the disk before they have their name.

It also computes their digests, and turns a full disk into a one-line error. What opens, reads or
writes a file raises ``OSError`` if that fails.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, Final, cast

import msgspec

from farm import PROJECT_ROOT
from farm.errors import BuildError, PackError, UsageError
from llama_loader import disk

SMALL: Final = 8 << 20
"""Bytes. The largest manifest that the loader reads; the largest SBOM seen has 36 kB."""
MOST_BYTES: Final = 2 << 30
MOST_FILES: Final = 50_000
"""Limits of a source, with folders; the largest archive seen unpacks to 300 MB in 5,000 files."""
MOST_NAMES: Final = 32
"""Names in a path of a tree; llama.cpp's longest has 9. ``shutil`` calls itself for each
folder, and Python ends at 1,000 calls."""
MOST_ENTRIES: Final = 100_000
"""Names in a folder, or in all pages of a server's list."""
MOST_ARCHIVE: Final = 8 << 30
"""Bytes of what is in a wheel. The largest wheel of CUDA has less than 1 GB."""


class _FixedSizeFile(io.FileIO):
    """A file that ends where it ended when it was opened: another user can let it grow."""

    read = io.RawIOBase.read  # type: ignore[assignment]  # it calls readinto, as the next does
    readall = io.RawIOBase.readall

    def __init__(self, handle: int, size: int) -> None:
        super().__init__(handle)
        self._size = size

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # io gives no other
        return super().readinto(memoryview(buffer)[: max(0, self._size - self.tell())])

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            return super().seek(self._size + offset)
        return super().seek(offset, whence)


@contextmanager
def writing(place: Path, *, hint: str = "") -> Iterator[None]:
    """Turn an error of the disk (full, not writable) into a one-line error.

    ``hint`` is that of the error.

    Raises:
        PackError: ``WRITE_FAILED``, instead of the block's ``OSError``.
    """
    try:
        yield
    except shutil.Error as error:  # a list of all that went wrong in a whole tree
        raise PackError("WRITE_FAILED", place=place, why=error.args[0][0][2], hint=hint) from error
    except OSError as error:
        why = error.strerror or error
        raise PackError("WRITE_FAILED", place=place, why=why, hint=hint) from error


def open_regular(path: Path, *, follow: bool = True, most: int | None = None) -> BinaryIO:
    """Open a regular file to read, without ever waiting for a FIFO or a device.

    The stream ends where the file ended when it was opened. ``follow``: it may be a link. Where
    other users may write, a link can lead to a file that only this user may read. ``most`` are the
    bytes that it may have; a sparse file of a TiB takes hours to read.

    Raises:
        OSError: it cannot be opened, is no regular file, or is larger.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        handle = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    except OSError as error:
        if follow or error.errno != errno.ELOOP:
            raise
        raise OSError(errno.EINVAL, "a link, not a regular file", str(path)) from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or (most is not None and found.st_size > most):
        os.close(handle)
        why = f"larger than {most} bytes" if stat.S_ISREG(found.st_mode) else "not a regular file"
        raise OSError(errno.EINVAL, why, str(path))
    bounded = _FixedSizeFile(handle, found.st_size)
    return cast("BinaryIO", io.BufferedReader(bounded, 1 << 17))


def read_small(path: Path, *, follow: bool = True) -> bytes:
    """Read a regular file of at most 8 MiB: a manifest, an SBOM, a report, a signature.

    ``follow`` is as for ``open_regular``.
    """
    with open_regular(path, follow=follow, most=SMALL) as stream:
        return stream.read()


def copy(path: Path, place: Path) -> None:
    """Copy a link as a link, and a source's regular file with its mode and times.

    Raises:
        UsageError: ``SOURCE_UNREADABLE``: the file's path leads through a link.
    """
    if path.is_symlink():
        place.symlink_to(path.readlink())
        return
    with open_regular(path, follow=False) as stream, place.open("xb") as out:
        if opened(stream.fileno()).readlink() != path:  # another user can swap a folder on the way
            raise unreadable(path, "a link leads there")
        shutil.copyfileobj(stream, out, 1 << 20)
        found = os.fstat(stream.fileno())
    place.chmod(stat.S_IMODE(found.st_mode))
    os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))


def head(path: Path, most: int = SMALL) -> str:
    """Return at most ``most`` bytes of a text that another person may have written."""
    with open_regular(path) as stream:
        return stream.read(most).decode("utf-8", "replace")


@contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """Yield a private file to write; it replaces ``path`` on success, and is removed on failure.

    At every moment the old file or the new one exists, after a power cut too.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        # not by its name: who may write to the folder can put a link to another file there
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    sync(path.parent)


def replace(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file as ``replacing`` does."""
    with replacing(path, mode) as stream:
        stream.write(content)


def new_file(path: Path) -> io.FileIO:
    """Replace a file, or a link that another user left, by a new file, and open it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path.open("xb", buffering=0)


@contextmanager
def handle_of(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file or folder until the context is left, with flags of open(2); give its handle."""
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Open a folder, not a link; give a path to it that stays right when its name is changed."""
    with handle_of(folder, os.O_DIRECTORY | os.O_NOFOLLOW) as handle:
        yield opened(handle)


def opened(handle: int) -> Path:
    """Return a path to what is open as ``handle``, which no other program can change."""
    return Path(f"/proc/self/fd/{handle}")


def followed(path: Path) -> Path | None:
    """Return what a path leads to; None where the kernel, which follows 40 links, finds nothing.

    Python's ``realpath`` follows any number of links, in a time that grows with their square.
    """
    with suppress(OSError), handle_of(path, os.O_PATH) as handle:
        return opened(handle).readlink()
    return None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that gets its name on success; the faster of two processes wins.

    All of its content is on the disk before it has its name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent)) / folder.name
    staging.mkdir()
    try:
        yield staging
        sync_tree(staging)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        remove(staging.parent)


def require_own(
    folder: Path, code: str = "FOLDER_NOT_OWN", *, make: int | None = None, **counts: Any
) -> None:
    """Refuse a folder that another user can change, or whose way there.

    What the farm finds in its cache it builds and runs. ``code`` is the error's, ``make`` the mode
    of a missing folder, which is made; None if it need not exist. ``counts`` are as for
    ``disk.trusted``.

    Raises:
        BuildError: ``FOLDER_NOT_OWN``.
    """
    try:
        disk.trusted(folder, make=make, **{"sticky": False, **counts})
    except PermissionError as error:
        raise BuildError(code, folder=folder, why=error.strerror) from error
    except OSError:  # missing, through a file, or a circle: its next use reports that
        if make is not None:
            raise


def require_own_out(
    folder: Path, code: str = "FOLDER_NOT_OWN/out", *, make: int | None = None
) -> None:
    """Refuse, or make, a folder as ``require_own`` does.

    The checkout's owner may change it, and in the checkout everybody who may change that: they can
    change the farm's code.

    Raises:
        BuildError: ``FOLDER_NOT_OWN``.
    """
    steps = {step: step.stat() for step in (PROJECT_ROOT, *PROJECT_ROOT.parents)}
    owners = frozenset(one.st_uid for one in steps.values())
    # elsewhere not: a closed folder above the checkout may keep them from it
    ways = (folder.absolute(), Path(os.path.realpath(folder)))
    if not all(way.is_relative_to(PROJECT_ROOT) for way in ways):
        require_own(folder, code, make=make, owners=owners)
        return
    open_to = {step: one for step, one in steps.items() if not one.st_mode & stat.S_ISVTX}
    groups = frozenset(disk.writing_group(*one) for one in open_to.items()) - {None}
    is_public = any(one.st_mode & stat.S_IWOTH for one in open_to.values())
    require_own(folder, code, make=make, owners=owners, groups=None if is_public else groups)


def require_own_temporary() -> None:
    """Refuse a temporary folder that another user can change; name it for programs that start.

    Where the folder of ``TMPDIR`` is missing, Python takes another one: a program would take that
    of the variable, which another user may have made meanwhile.

    Raises:
        BuildError: ``FOLDER_NOT_OWN``.
    """
    require_own(Path(tempfile.gettempdir()), sticky=True)
    os.environ["TMPDIR"] = tempfile.gettempdir()


def remove(path: Path) -> str:
    """Remove a file or a folder of any depth; return rm's last words about what stays.

    ``shutil.rmtree`` ends at some 1,000 folders in one another.
    """
    places = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{os.defpath}"}
    done = subprocess.run(
        ["rm", "-rf", "--", path],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=places,
        check=False,
    )
    return done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]


def sync_tree(folder: Path) -> None:
    """Wait until a folder and its content are on the disk, by one call of syncfs(2).

    A source tree has thousands of files; one ``fsync`` for each takes half a minute.
    """
    with handle_of(folder) as handle:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))


def sync(path: Path) -> None:
    """Wait until one file or folder is on the disk."""
    with handle_of(path) as handle:
        os.fsync(handle)


def write_tar(
    stream: IO[bytes], content: Mapping[str, Path | bytes], mtime: int | None = None
) -> None:
    """Write files and folders into a tar that is read from its beginning next.

    ``content`` is by name in the tar: a file's bytes, or a path, of which ``.git`` is left out.
    ``mtime`` is every file's time; None keeps those of the paths.
    """

    def normal(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = entry.mtime if mtime is None else mtime
        return None if PurePosixPath(entry.name).name == ".git" else entry

    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, source in content.items():
            if isinstance(source, Path):
                tar.add(source, arcname=name, filter=normal)
            else:
                entry = tarfile.TarInfo(name.lstrip("/"))
                entry.size = len(source)
                tar.addfile(entry, io.BytesIO(source))
    stream.seek(0)


def sha256(path: Path, *, follow: bool = True, most: int | None = None) -> str:
    """Return the sha256 of a file's bytes; ``follow`` and ``most`` as for ``open_regular``."""
    with open_regular(path, follow=follow, most=most) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def folder_digest(
    folder: Path, most: int | None = None, without: frozenset[Path] = frozenset()
) -> str:
    """Return the sha256 of a folder's names, modes, links and contents, ``.git`` left out.

    Only files and links are read, because reading a pipe would wait for ever.
    """
    whole = hashlib.sha256()
    for path in files(folder, most, without):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            kind, content = "link", _encodable(str(path.readlink()))
        elif not path.is_file():
            kind, content = "other", ""
        else:
            kind = "program" if path.stat().st_mode & stat.S_IXUSR else "file"
            content = sha256(path)
        whole.update(msgspec.json.encode([_encodable(name), kind, content]) + b"\n")
    return whole.hexdigest()


def _encodable(name: str) -> str:
    """Return a name with the bytes escaped that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def names(folder: Path, before: int = 0) -> list[str]:
    """Return the names in a folder, in order; so many were read ``before``, in other ones.

    Raises:
        UsageError: ``FOLDER_TOO_LARGE``: together there are more than ``MOST_ENTRIES``.
    """
    left = MOST_ENTRIES - before
    with os.scandir(folder) as entries:
        found = sorted(one.name for one in islice(entries, left + 1))
    if len(found) > left:
        raise UsageError("FOLDER_TOO_LARGE", folder=folder, most=f"{MOST_ENTRIES} names")
    return found


def files(
    folder: Path, most: int | None = None, without: frozenset[Path] = frozenset()
) -> Iterator[Path]:
    """Yield everything below a folder except folders, in order, without ``.git``.

    ``most`` are the bytes of all files, each looked at before it is given; None for a tree of the
    farm's. Files and folders that are ``without`` are left out.

    Raises:
        UsageError: ``SOURCE_UNREADABLE``: there is more than a source has.
    """
    waiting, room, left = [folder], MOST_FILES, most
    while waiting:
        path = waiting.pop()
        if path != folder and (path.is_symlink() or not path.is_dir()):
            left = None if left is None else left - path.lstat().st_size
            if left is not None and left < 0:
                raise unreadable(path, f"beyond {(most or 0) >> 20} MiB")
            yield path
            continue
        with os.scandir(path) as found:  # a folder's names may fill the memory
            paths = (path / one.name for one in found if one.name != ".git")
            chosen = sorted(islice((one for one in paths if one not in without), room + 1))
        room -= len(chosen)
        if room < 0:
            raise unreadable(path, f"beyond {MOST_FILES} files and folders")
        if chosen and len(path.relative_to(folder).parts) == MOST_NAMES:
            raise unreadable(path, f"more than {MOST_NAMES} folders in one another")
        waiting += reversed(chosen)


def unreadable(path: Path, why: str) -> UsageError:
    """Return the error of a path that the farm does not read: ``SOURCE_UNREADABLE``."""
    return UsageError("SOURCE_UNREADABLE", shown=_encodable(str(path)), why=why)
