"""Access to folders that hold verified files: relative to an open folder, never through a link.

``Folder`` is the one door: it reads only regular files up to a limit, replaces a file in one step,
and removes nothing outside itself. ``trusted`` says whether only this user can change a path. What
is stored where is not decided here (``store``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from llama_loader.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_WRITABLE: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
NO_FILE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})
"""Nothing is there, or a link, or a socket (ENXIO)."""
STALE_SECONDS: Final = 86400.0
"""A folder whose owner cannot be asked counts as abandoned so long after it was made."""
FORBIDDEN_BITS: Final = 0o7022
"""Set-id and sticky bits, and what would let others change a file after it was hashed."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OWNED: Final = re.compile(r"[^.]+\.[^.]+\.[0-9]+\.([0-9]+|-)\.[^.]+", re.ASCII)
"""The names that ``new_folder`` gives: purpose, world, process, its start, something random."""
_START_TIME: Final = 19
"""Field 22 of ``/proc/PID/stat``, counted behind the name's closing bracket (proc(5))."""
_NOWHERE: Final = "nowhere"
_MAX_LINKS: Final = 40
_AS_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO for reading waits for its writer otherwise
_AS_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_AS_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def errors(place: Path) -> Iterator[None]:
    """Turn the operating system's errors into ``StoreError``."""
    try:
        yield
    except OSError as error:
        raise failure(place, error) from error


def is_full(error: OSError) -> bool:
    """Whether an error means that the disk, or this user's share of it, is full."""
    return error.errno in _FULL


def failure(place: Path, error: OSError) -> StoreError:
    """Return the error of a disk that is full, or that fails."""
    if is_full(error):
        return StoreError(
            "DISK_FULL",
            f"no room in {place}: {error.strerror}; nothing was half-installed",
            hint="free some space and try again, or use another store (HF_HOME, or --store)",
        )
    return StoreError(
        "STORE_FAILED",
        f"{error.filename or place}: {error.strerror or error}",
        hint="check the folder's owner and permissions, or use another store with --store",
    )


@final
class Folder:
    """An open folder. Use as a context manager.

    All names are relative to its descriptor, so that a path that changes meanwhile leads nowhere
    else. Links are not followed; names have no slash.

    Args:
        handle: the open folder, closed with this object.
        path: what messages call it.
    """

    def __init__(self, handle: int, path: Path) -> None:
        self.handle = handle
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Open a folder by its path, whose last part is no link.

        Raises:
            OSError: there is none, or it cannot be opened.
        """
        return cls(os.open(path, _AS_FOLDER), path)

    def __enter__(self) -> Folder:
        """Do nothing: it is open."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self.handle)

    def folder(self, name: str, *, make: int | None = None) -> Folder:
        """Open a folder in it, and take away the right of others to write there.

        Args:
            name: of the folder.
            make: the mode to make it with if it is missing; None if it must exist.

        Raises:
            PermissionError: it belongs to another user, or others can still write to it.
            OSError: there is none; it is a link or a file; it cannot be opened.
        """
        if make is not None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, make, dir_fd=self.handle)
        found = Folder(os.open(name, _AS_FOLDER, dir_fd=self.handle), self.path / name)
        try:
            found._require_own(make)
        except BaseException:
            os.close(found.handle)
            raise
        return found

    def _require_own(self, mode: int | None) -> None:
        status = os.fstat(self.handle)
        wanted = stat.S_IMODE(status.st_mode) & ~FORBIDDEN_BITS if mode is None else mode
        if _is_own(status) and stat.S_IMODE(status.st_mode) != wanted:
            os.fchmod(self.handle, wanted)
            status = os.fstat(self.handle)
        if not _is_own(status) or status.st_mode & FORBIDDEN_BITS:
            raise PermissionError(errno.EPERM, _why_not(status), str(self.path))

    def names(self) -> list[str]:
        """Return the names in it, sorted."""
        return sorted(os.listdir(self.handle))  # noqa: PTH208 - a descriptor is no path

    def status(self, name: str) -> os.stat_result | None:
        """Return what stands under a name (a link is not followed); None if nothing does."""
        try:
            return os.stat(name, dir_fd=self.handle, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def has_folder(self, name: str) -> bool:
        """Whether a folder, and no link to one, stands under a name."""
        status = self.status(name)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def holds(self, name: str, other: Folder) -> bool:
        """Whether the open folder ``other`` is what stands under a name now."""
        status = self.status(name)
        return status is not None and os.path.samestat(status, os.fstat(other.handle))

    def open_file(self, path: str) -> int:
        """Open a file below this folder for reading; no link on the way is followed.

        Raises:
            OSError: there is none, or it cannot be opened.
        """
        *folders, name = path.split("/")
        with contextlib.ExitStack() as opened:
            place = self
            for part in folders:
                place = opened.enter_context(place.folder(part))
            return os.open(name, _AS_FILE, dir_fd=place.handle)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a file's bytes; None unless it is a regular file of at most ``limit`` bytes.

        Raises:
            OSError: it cannot be read.
        """
        try:
            handle = os.open(name, _AS_FILE, dir_fd=self.handle)
        except OSError as error:
            if error.errno in NO_FILE:
                return None
            raise
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, handle)
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
                return None
            return os.read(handle, status.st_size)

    def open_to_write(self, name: str, mode: int) -> int:
        """Open a file to write in place, made if need be; what is no file cannot be opened.

        Raises:
            OSError: it cannot be opened.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags, mode, dir_fd=self.handle)

    def write_new(self, name: str, data: bytes) -> None:
        """Write and sync a file that does not exist yet; only its owner may change it."""
        handle = os.open(name, _AS_NEW, 0o644, dir_fd=self.handle)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(handle)

    def replace(self, name: str, data: bytes, *, staging: Folder) -> None:
        """Write a file so that it is missing, the old one or the new one at every moment.

        A folder that stands in its place is renamed, not removed.

        Args:
            name: of the file.
            data: what it holds then.
            staging: a folder on the same disk for the file before it is complete.
        """
        with staging.temporary("file") as half_done:
            half_done.write_new(name, data)
            try:
                half_done.rename(name, self)
            except IsADirectoryError:
                self.rename(name, self, f"{name}.aside-{os.urandom(4).hex()}")
                half_done.rename(name, self)
            self.sync()

    def rename(self, name: str, into: Folder, new: str | None = None) -> None:
        """Move what stands under a name to another folder of the same disk, in one step."""
        os.rename(name, new or name, src_dir_fd=self.handle, dst_dir_fd=into.handle)

    def remove(self, name: str) -> None:
        """Remove a file, a link, or a folder with all that is in it; a missing one is no error."""
        with contextlib.suppress(FileNotFoundError):
            if not self.has_folder(name):
                os.unlink(name, dir_fd=self.handle)
                return
            handle = os.open(name, _AS_FOLDER, dir_fd=self.handle)
            with Folder(handle, self.path / name) as inside:
                for inner in inside.names():
                    inside.remove(inner)
            os.rmdir(name, dir_fd=self.handle)

    def sync(self) -> None:
        """Have its names on the disk."""
        os.fsync(self.handle)

    def sync_all(self) -> None:
        """Have the names in it and in all folders below on the disk, and let others read them."""
        for name in self.names():
            if self.has_folder(name):
                with self.folder(name, make=0o755) as inside:
                    inside.sync_all()
        self.sync()

    def new_folder(self, purpose: str) -> Folder:
        """Make and open a private folder whose name says which process owns it."""
        owner = f"{os.getpid()}.{_started(os.getpid())}"
        name = f"{purpose}.{_world()}.{owner}.{os.urandom(8).hex()}"
        return self.folder(name, make=0o700)

    @contextmanager
    def temporary(self, purpose: str) -> Iterator[Folder]:
        """Give such a folder; at the end it is removed, if it still has its name."""
        with self.new_folder(purpose) as made:
            try:
                yield made
            finally:
                with contextlib.suppress(OSError):  # swept later
                    self.remove(made.path.name)

    def sweep(self) -> None:
        """Remove the folders of ``new_folder`` whose owner ended; all other names stay."""
        for name in self.names():
            if _OWNED.fullmatch(name) and self._is_abandoned(name):
                with contextlib.suppress(OSError):  # another process was faster, or is at it
                    self.remove(name)

    def _is_abandoned(self, name: str) -> bool:
        """Whether the owner of a folder of ``new_folder`` has ended."""
        status = self.status(name)
        if status is None or not self.has_folder(name):
            return False
        _, world, process, began, _ = name.split(".")
        if world == _world() != _NOWHERE:
            # Process numbers are used again: the moment of the start tells two owners apart.
            return _started(int(process)) != began
        return status.st_mtime < time.time() - STALE_SECONDS


def trusted(path: Path) -> Path:
    """Return a folder's real path if only this user and root can change what it leads to.

    Every folder on the way counts, also on the way of a link. What does not exist yet is trusted.

    Raises:
        PermissionError: a folder belongs to another user, or others can write to it; or this user
            may not look at it.
        OSError: the path leads through a file, or in a circle.
    """
    left, place, links = list(reversed(path.absolute().parts)), Path("/"), 0
    while left:
        place, before = place / left.pop(), place
        try:
            status = place.lstat()
        except FileNotFoundError:
            return place.joinpath(*reversed(left))
        if not _is_own(status) or _is_open_to_others(status):
            raise PermissionError(errno.EPERM, f"{place} {_why_not(status)}", str(path))
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            left.extend(reversed(place.readlink().parts))
            place = before
        elif place.name == "..":
            place = before.parent
    return place


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())


def _is_open_to_others(status: os.stat_result) -> bool:
    """Whether others can rename what is in a folder; a group of this user alone is no other."""
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & stat.S_ISVTX:
        return False
    group = status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.geteuid())
    return bool(status.st_mode & stat.S_IWOTH or group)


def _why_not(status: os.stat_result) -> str:
    if not _is_own(status):
        return f"belongs to another user ({status.st_uid})"
    return f"can be written by other users (mode {stat.S_IMODE(status.st_mode):04o})"


def private_place(name: str) -> Path | None:
    """Return the folder that ``private_folder`` made before; None if there is none.

    A folder that another user made, or can look into, counts as none.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.geteuid()}"
    with contextlib.suppress(FileNotFoundError):
        status = folder.lstat()
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        return folder if own and not status.st_mode & 0o077 else None
    return None


def private_folder(name: str) -> Path:
    """Return a folder for this user alone among the temporary files, the same one every time.

    If another user has put something there under that name, a new folder is made.
    """
    with contextlib.suppress(FileExistsError):
        Path(tempfile.gettempdir(), f"{name}-{os.geteuid()}").mkdir(mode=0o700)
    return private_place(name) or Path(tempfile.mkdtemp(prefix=f"{name}-"))


def _world() -> str:
    """Name the place where a process number means something: this boot and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot.read_text()[:8]}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return _NOWHERE


def _started(pid: int) -> str:
    """When a process began, in the kernel's own count; ``-`` if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "-"
    return text.rpartition(")")[2].split()[_START_TIME]
