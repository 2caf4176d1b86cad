"""One run at a time for each set, in a checkout and in a folder of tarballs.

The operating system releases a lock (``flock``) when its process ends, however it ends. The holder
removes the lock's file, so a lock counts only on the file that still has the name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from farm.errors import BuildError

IN_USE: Final = ".in-use"
"""The file of a folder that a run holds open, and locked, while it uses the folder."""
PATIENCE: Final = 600.0
"""Seconds to wait for another run, which may be packing a tarball of a GB meanwhile."""
_TOLD: Final = 0.1
"""Seconds after which a note names the process that holds the lock."""
_PAUSE: Final = 0.02
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
    with ExitStack() as stack:
        for folder in folders:
            for key in keys:
                stack.enter_context(_locked(folder, key, 0, "SET_IS_BEING_BUILT"))
        yield


@contextmanager
def turn(folder: Path, name: str) -> Iterator[None]:
    """Wait until a lock is free, and hold it: for work of a few minutes at most.

    Raises:
        BuildError: ``OUT_NOT_WRITABLE``; ``FOLDER_LOCKED``: another process has it for too long.
    """
    with _locked(folder, name, PATIENCE, "FOLDER_LOCKED"):
        yield


@contextmanager
def _locked(folder: Path, name: str, patience: float, code: str) -> Iterator[None]:
    place = folder / f".{name}.lock"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _take(place, patience, stack)
        except TimeoutError as by:
            raise BuildError(code, name=name, folder=folder, by=by, patience=patience) from by
        except OSError as error:
            raise BuildError(
                "OUT_NOT_WRITABLE/disk", folder=folder, strerror=error.strerror
            ) from error
        stack.callback(place.unlink, missing_ok=True)
        yield


def _take(place: Path, patience: float, stack: ExitStack) -> None:
    """Open and lock the file of this name; a missing file is made."""
    while True:
        with ExitStack() as opened:
            handle = _handle(place)
            opened.callback(os.close, handle)
            wait(handle, place, patience, "FOLDER_LOCKED")
            with suppress(FileNotFoundError):  # its holder has removed it meanwhile
                if os.path.samestat(place.lstat(), os.fstat(handle)):
                    stack.push(opened.pop_all())
                    return


def wait(handle: int, place: object, patience: float, code: str) -> None:
    """Lock what is open as ``handle``; print a note of that code if that takes a moment.

    Raises:
        TimeoutError: another process, which it names, has it for more than ``patience`` seconds.
    """
    begun, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            waited = time.monotonic() - begun
            if waited >= patience:
                raise TimeoutError(_holder(handle)) from error
            if waited >= _TOLD and not told:
                told = True
                sys.stderr.write(f"note[{code}]: waiting: {_holder(handle)} has locked {place}\n")
            time.sleep(_PAUSE)
        else:
            return


def _holder(handle: int) -> str:
    """Name the process that holds the lock of an open file, as the kernel lists it."""
    inode = str(os.fstat(handle).st_ino)
    with suppress(OSError):
        for line in Path("/proc/locks").read_text("ascii").splitlines():
            _, kind, _, _, process, place, *_ = line.split()
            if kind == "FLOCK" and place.rpartition(":")[2] == inode:
                return f"process {process}"
    return "another process"


def _handle(place: Path) -> int:
    """Open a lock's file to write; a link in its place is refused."""
    return os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def use(folder: Path) -> None:
    """Mark a folder as used by this process until it ends; a missing folder is made.

    If this user may not write there, nothing is marked: this user can remove nothing there, either.

    Raises:
        OSError: the folder cannot be made.
    """
    if folder not in _USED:
        folder.mkdir(0o700, parents=True, exist_ok=True)
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
