"""One run at a time for each set, in a checkout and in a folder of tarballs.

The operating system releases a lock (``flock``) when its process ends, however it ends. The holder
removes the lock's file, so a lock counts only on the file that still has the name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from farm.errors import BuildError

IN_USE: Final = ".in-use"
"""The file of a folder that a run holds open, and locked, while it uses the folder."""
_USED: Final[dict[Path, int]] = {}
"""These files of this process, by folder."""
_MOST_USED: Final = 8
"""The user's cache and the checkout are two folders; only tests use more, one after the other."""


@contextmanager
def held(keys: Iterable[str], folders: Iterable[Path]) -> Iterator[None]:
    """Hold every set's lock in every folder; a missing folder is made.

    Raises:
        BuildError: ``SET_IS_BEING_BUILT``: another run has one of them; ``OUT_NOT_WRITABLE``.
    """
    wanted = [(key, folder) for folder in folders for key in keys]
    with ExitStack() as stack:
        for key, folder in wanted:
            stack.enter_context(_locked(folder, key, fcntl.LOCK_EX | fcntl.LOCK_NB))
        yield


@contextmanager
def turn(folder: Path, name: str) -> Iterator[None]:
    """Wait until a lock is free, and hold it: for work of a few seconds.

    Raises:
        BuildError: ``OUT_NOT_WRITABLE``.
    """
    with _locked(folder, name, fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(folder: Path, name: str, how: int) -> Iterator[None]:
    place = folder / f".{name}.lock"
    with ExitStack() as stack:
        try:
            file = _open(place, how, stack)
        except BlockingIOError as taken:
            number = ""
            with suppress(OSError), place.open("rb") as held_by:  # of one that has ended meanwhile
                told = held_by.read(20).strip()
                number = told.decode("ascii") if told.isdigit() else ""
            raise BuildError(
                "SET_IS_BEING_BUILT",
                name=name,
                folder=folder,
                by=number and f" by process {number}",
            ) from taken
        except OSError as error:
            raise BuildError(
                "OUT_NOT_WRITABLE/disk", folder=folder, strerror=error.strerror
            ) from error
        stack.callback(place.unlink, missing_ok=True)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _open(place: Path, how: int, stack: ExitStack) -> IO[str]:
    """Open and lock the file of this name; a missing file is made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = stack.enter_context(os.fdopen(_handle(place), "r+", encoding="ascii"))
        fcntl.flock(file, how)
        with suppress(FileNotFoundError):  # its holder has removed it meanwhile
            if place.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()


def _handle(place: Path) -> int:
    """Open a lock's file to write; a link, a device or a FIFO in its place is refused."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(place, flags, 0o600)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise OSError(errno.EINVAL, "not a file that this farm made", str(place))
    return handle


def use(folder: Path) -> None:
    """Mark a folder as used by this process until it ends; a missing folder is made.

    If this user may not write there, nothing is marked: this user can remove nothing there, either.

    Raises:
        OSError: the folder cannot be made.
    """
    if folder not in _USED:
        folder.mkdir(parents=True, exist_ok=True)
        while len(_USED) >= _MOST_USED:
            os.close(_USED.pop(next(iter(_USED))))
        try:
            handle = _handle(folder / IN_USE)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return
            raise
        fcntl.flock(handle, fcntl.LOCK_SH)  # waits for who removes what is in it
        _USED[folder] = handle


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Keep other processes out of a folder; yield False if another process uses it.

    Raises:
        OSError: this user may not write there.
    """
    handle = _handle(folder / IN_USE)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)
