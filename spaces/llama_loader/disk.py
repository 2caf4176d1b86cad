"""Access to folders that hold verified files: relative to an open folder, never through a link.

``Folder`` is the one door: it reads only regular files up to a limit, replaces a file in one step,
and removes nothing outside itself. ``trusted``: whether only this user can change a path. What
is stored where is not decided here (``store``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, final

from llama_loader.errors import StoreError

NOT_WRITABLE: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
NO_FILE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})
"""Nothing is there, or a link, or a socket (ENXIO)."""
FORBIDDEN_BITS: Final = 0o7022
"""Set-id and sticky bits, and what would let others change a file after it was hashed."""

STALE_SECONDS: Final = 3 * 86400.0
"""What is unfinished, and was not touched for so long, is removed."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LIST: Final = re.compile(r"system\..*acl")
"""Extended attributes that hold an access control list: posix_acl_access, nfs4_acl, richacl."""
_TEMPORARY: Final = re.compile(r"[a-z]+\.[0-9a-f]{16}\.tmp", re.ASCII)
"""The names that ``temporary`` gives: a purpose, and something random."""
_AS_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO waits for its other end otherwise
_AS_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_IN_PLACE: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def errors(place: Path, needed: int = 0) -> Iterator[None]:
    """Turn the operating system's errors into ``StoreError``; it names the bytes ``needed``."""
    try:
        yield
    except OSError as error:
        raise failure(place, error, needed) from error


def is_full(error: OSError) -> bool:
    """Whether an error means that the disk, or this user's share of it, is full."""
    return error.errno in _FULL


def failure(place: Path, error: OSError, needed: int = 0) -> StoreError:
    """Return the error of a disk that is full, or that fails."""
    if is_full(error):
        needs = f" ({needed / 1e6:.0f} MB are needed)" if needed else ""
        return StoreError("DISK_FULL", place=place, needs=needs, why=error.strerror)
    return StoreError("STORE_FAILED/place", why=reason(place, error))


def reason(place: Path, error: OSError) -> str:
    """Return what failed below a folder, and why; the error may name a path relative to it."""
    path = place / error.filename if isinstance(error.filename, str) else place
    return f"{path}: {error.strerror or error}"


@final
@dataclass
class Folder:
    """An open folder; ``path`` is what messages call it. Use as a context manager.

    All names are relative to its descriptor, so that a path that changes meanwhile leads nowhere
    else. Links are not followed; names have no slash. All methods raise ``OSError``.
    """

    handle: int
    path: Path

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Open a folder by its path, whose last part is no link."""
        return cls(os.open(path, _AS_FOLDER), path)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.handle)

    def folder(self, name: str, *, make: int | None = None) -> Folder:
        """Open a folder in it, and take away the right of others to write there.

        ``make`` is the mode that it gets, made if need be; None if it must exist.

        Raises:
            PermissionError: it belongs to another user, or others can still write to it.
        """
        if make is not None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, make, dir_fd=self.handle)
        with contextlib.ExitStack() as opened:
            found = Folder(os.open(name, _AS_FOLDER, dir_fd=self.handle), self.path / name)
            opened.enter_context(found)
            status = os.fstat(found.handle)
            mode = stat.S_IMODE(status.st_mode)
            wanted = mode & ~FORBIDDEN_BITS if make is None else make
            if mode != wanted and status.st_uid == os.geteuid():
                os.fchmod(found.handle, wanted)
                status = os.fstat(found.handle)
            if why := why_not(status, FORBIDDEN_BITS):
                raise PermissionError(errno.EPERM, why, str(found.path))
            opened.pop_all()
            return found

    def walk(self, deep: int, *, make: int | None = None) -> Iterator[tuple[str, Folder | None]]:
        """Yield the path of everything below, and each open folder of at most ``deep`` names."""
        for name in self.names():
            if not deep or not self.has_folder(name):
                yield name, None
                continue
            with self.folder(name, make=make) as inside:
                yield name, inside
                for path, found in inside.walk(deep - 1, make=make):
                    yield f"{name}/{path}", found

    def names(self) -> list[str]:
        """Return the names in it, sorted."""
        return sorted(os.listdir(self.handle))  # noqa: PTH208 - a descriptor is no path

    def status(self, name: str) -> os.stat_result | None:
        """Return the facts of a name (a link is not followed); None if there is nothing."""
        try:
            return os.stat(name, dir_fd=self.handle, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def has_folder(self, name: str) -> bool:
        """Return whether a name is a folder, and no link to one."""
        status = self.status(name)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def open_file(self, path: str) -> int:
        """Open a file at a path below to read it; no link on the way is followed."""
        with self._holding(path) as (place, name):
            return os.open(name, _AS_FILE, dir_fd=place.handle)

    @contextmanager
    def _holding(self, path: str) -> Iterator[tuple[Folder, str]]:
        """Open the parent folder of a path below; return it and the last name."""
        *folders, name = path.split("/")
        with contextlib.ExitStack() as opened:
            place = self
            for part in folders:
                place = opened.enter_context(place.folder(part))
            yield place, name

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a file's bytes; None unless it is a regular file of at most ``limit`` bytes."""
        try:
            handle = self.open_file(name)
        except OSError as error:
            if error.errno in NO_FILE:
                return None
            raise
        try:
            status = os.fstat(handle)
            is_small = stat.S_ISREG(status.st_mode) and status.st_size <= limit
            return os.read(handle, status.st_size) if is_small else None
        finally:
            os.close(handle)

    def open_to_write(self, name: str, mode: int) -> int:
        """Open a file to write in place, made if need be; what is no file cannot be opened."""
        return os.open(name, _IN_PLACE, mode, dir_fd=self.handle)

    def write(self, name: str, data: bytes) -> None:
        """Write a file in place and sync it; only its owner may change it."""
        with os.fdopen(self.open_to_write(name, 0o644), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def replace(self, name: str, data: bytes, *, staging: Folder) -> None:
        """Write a file so that it is missing, the old one or the new one at every moment.

        It is completed in ``staging``, a folder on the same disk.
        """
        with staging.temporary("file") as half_done:
            half_done.write(name, data)
            self.make_room(name)
            half_done.rename(name, self)
            self.sync()

    def make_room(self, name: str) -> None:
        """Remove what is no regular file of this one name; a folder is renamed, not removed."""
        status = self.status(name)
        if status is None or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
            return
        if stat.S_ISDIR(status.st_mode):
            self.rename(name, self, f"{name}.aside-{os.urandom(4).hex()}")
        else:
            os.unlink(name, dir_fd=self.handle)

    def renew(self, path: str, *, staging: Folder) -> None:
        """Replace a file below by a copy, completed in ``staging`` on the same disk.

        A program that opened the old file for writing cannot write to the new one.
        """
        with self._holding(path) as (place, name), staging.temporary("renewed") as half_done:
            with (
                os.fdopen(place.open_file(name), "rb") as old,
                os.fdopen(half_done.open_to_write(name, 0o600), "wb") as new,
            ):
                shutil.copyfileobj(old, new)
            half_done.rename(name, place)

    def rename(self, name: str, into: Folder, new: str | None = None) -> None:
        """Move a file or folder to another folder of the same disk, in one step."""
        os.rename(name, new or name, src_dir_fd=self.handle, dst_dir_fd=into.handle)

    def unlink(self, name: str) -> None:
        """Remove a file or a link, if that is possible; a folder stays."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.handle)

    def remove(self, name: str) -> None:
        """Remove a folder with all that is in it; a missing one is no error.

        Folders move out of it first: others may have put thousands into one another.
        """
        left = [name]
        for one in left:  # which grows
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(one, _AS_FOLDER, dir_fd=self.handle)
                with Folder(handle, self.path / one) as inside:
                    for inner in inside.names():
                        if inside.has_folder(inner):
                            with contextlib.suppress(OSError):  # an empty one of another user
                                os.rmdir(inner, dir_fd=inside.handle)
                                continue
                            left.append(f"inner.{os.urandom(8).hex()}.tmp")  # the clean-up has it
                            inside.rename(inner, self, left[-1])
                        else:
                            inside.unlink(inner)
                os.rmdir(one, dir_fd=self.handle)

    def sync(self) -> None:
        """Have its names on the disk."""
        os.fsync(self.handle)

    @contextmanager
    def temporary(self, purpose: str) -> Iterator[Folder]:
        """Make a private folder; at the end it is removed, if it still has its name."""
        name = f"{purpose}.{os.urandom(8).hex()}.tmp"
        with self.folder(name, make=0o700) as made:
            try:
                yield made
            finally:
                with contextlib.suppress(OSError):  # swept later
                    self.remove(name)

    def sweep(self, seconds: float) -> None:
        """Remove the folders of ``temporary`` that ended processes left so long ago or earlier."""
        for name in self.unused(_TEMPORARY, seconds):
            with contextlib.suppress(OSError):  # another process was faster; or it is no folder
                self.remove(name)

    def unused(self, pattern: re.Pattern[str], seconds: float) -> list[str]:
        """Return the names of a pattern whose last change is so long ago or longer."""
        latest = time.time() - seconds
        found = {name: self.status(name) for name in filter(pattern.fullmatch, self.names())}
        return [name for name, status in found.items() if status and status.st_mtime <= latest]

    def lock(self) -> bool:
        """Lock it against every later opener; return False while another process has it locked."""
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        """Unlock it: closing it does not unlock it while a fork of this process has a copy."""
        with contextlib.suppress(OSError):  # locks fail on this disk
            fcntl.flock(self.handle, fcntl.LOCK_UN)


def open_own(path: Path) -> IO[bytes]:
    """Open a file to resume it; remove one that is not regular, this user's, and of one name.

    In a folder that others can write it may be a link to another file of this user.

    Raises:
        OSError: it cannot be removed or made, or another user was faster.
    """
    with contextlib.suppress(FileNotFoundError):
        if _is_own_file(path.lstat()):
            file = os.fdopen(os.open(path, _IN_PLACE, 0o666), "ab")
            if _is_own_file(os.fstat(file.fileno())):
                return file
            file.close()
        path.unlink()
    return os.fdopen(os.open(path, _IN_PLACE | os.O_EXCL, 0o666), "ab")


def _is_own_file(status: os.stat_result) -> bool:
    is_one = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    return is_one and status.st_uid == os.geteuid()


def trusted(
    path: Path,
    hops: int = 40,
    *,
    make: int | None = None,
    sticky: bool = True,
    owners: frozenset[int] = frozenset(),
    groups: frozenset[int] | None = frozenset(),
) -> Path:
    """Return a folder's real path if only this user and root can change what it leads to.

    Every folder on the way counts, also on the way of up to ``hops`` links that lead to one
    another. ``make`` is the mode of missing ones, each made and looked at before the next; None if
    all must exist. ``sticky``: it may itself be one in which others make files of their own, such
    as ``/tmp``. ``owners`` are other users that count as this user; so do ``groups``' members, or
    everybody if that is None.

    Raises:
        PermissionError: a folder belongs to another user, or others can write to it, or this user
            may not look at it.
        OSError: the path leads through a file, in a circle, or to nothing.
    """
    last = path.absolute()
    for step in (*reversed(last.parents), last):
        loose = sticky or step != last
        if make is not None and not os.path.lexists(step):
            with contextlib.suppress(FileExistsError):  # another user's is looked at like any other
                step.mkdir(make)
        status = step.lstat()
        if why := why_not(status, _bits_of_others(step, status, groups, sticky=loose), owners):
            raise PermissionError(errno.EPERM, f"{step} {why}", str(path))
        if stat.S_ISLNK(status.st_mode):
            if not hops:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            way = step.parent / step.readlink()
            trusted(way, hops - 1, make=make, sticky=loose, owners=owners, groups=groups)
    return Path(os.path.realpath(path))


def _bits_of_others(
    folder: Path, status: os.stat_result, groups: frozenset[int] | None, *, sticky: bool
) -> int:
    """Return the bits by which others may rename a folder's files; this user's own group may."""
    is_free = groups is None or (sticky and status.st_mode & stat.S_ISVTX)
    if is_free or not stat.S_ISDIR(status.st_mode):
        return 0
    group = writing_group(folder, status)
    is_own = group is not None and (group in (groups or ()) or _is_alone_in(group))
    return stat.S_IWOTH | (0 if is_own else stat.S_IWGRP)


def writing_group(folder: Path, status: os.stat_result) -> int | None:
    """Return the one group whose members may write to a folder; None if there is none.

    With an access control list the group's bits are its mask (acl(5)): its users may be any.
    """
    lists: list[str] = []
    if status.st_mode & stat.S_IWGRP:
        with contextlib.suppress(OSError):  # a disk that has no lists
            lists = [one for one in os.listxattr(folder) if _LIST.match(one)]
    return status.st_gid if status.st_mode & stat.S_IWGRP and not lists else None


def _is_alone_in(group: int) -> bool:
    """Whether a group has this user's number, and no other known member but root."""
    # A directory service need not list its members: see docs/threats.md
    users = pwd.getpwall()
    groups = [one for one in grp.getgrall() if one.gr_gid == group]  # several may have its number
    with contextlib.suppress(KeyError):  # most containers name no group for their user
        groups.append(grp.getgrgid(group))  # a directory service may list none
    members = {name for one in groups for name in one.gr_mem}
    members.update(user.pw_name for user in users if user.pw_gid == group)
    own = {user.pw_name for user in users if user.pw_uid in (0, os.geteuid())}
    return group == os.geteuid() and members <= own


def why_not(status: os.stat_result, forbidden: int, owners: frozenset[int] = frozenset()) -> str:
    """Return why a file or folder is not this user's or root's alone; empty if it is.

    ``forbidden`` are the bits of a mode that let others change it; ``owners`` may own it, too.
    """
    if status.st_uid not in (0, os.geteuid(), *owners):
        return f"belongs to another user ({status.st_uid})"
    if status.st_mode & forbidden:
        return f"can be written by other users (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def nearest(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists; may raise ``OSError``."""
    return next(one for one in (path, *path.parents) if one.exists())


def make_private_folder(kind: str = "llama-loader") -> Path:
    """Make this user's own folder among the temporary files, or find it; return its real path.

    Errors are those of ``trusted``.
    """
    try:
        return trusted(private_folder(kind), make=0o700)
    except OSError:  # another user was faster: it has another name then
        return trusted(private_folder(kind), make=0o700)


def private_folder(kind: str = "llama-loader") -> Path:
    """Return where this user's own folder among the temporary files is, or can be made.

    It is the same one every time, unless another user made it, or others can look into it.
    """
    folder = Path(tempfile.gettempdir(), f"{kind}-{os.geteuid()}")
    with contextlib.suppress(FileNotFoundError):
        status = folder.lstat()
        is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if not is_own or status.st_mode & 0o077:
            return folder.with_name(f"{kind}-{os.urandom(8).hex()}")
    return folder
