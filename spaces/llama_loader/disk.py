"""Small things that a store needs of a disk: whole files, synced folders, owners, clear errors."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llama_loader.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_WRITABLE: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
STALE_SECONDS: Final = 3600.0
"""What nobody wrote to for so long has no owner any more, wherever that owner ran."""

_PRIVATE: Final = 0o700
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_START_TIME: Final = 19
"""Field 22 of ``/proc/PID/stat``, counted behind the name's closing bracket (proc(5))."""
_OWNED: Final = re.compile(r"[^.]+\.[^.]+\.[0-9]+\.([0-9]+|-)\.[^.]+", re.ASCII)
"""The names that ``new_folder`` gives: purpose, world, process, its start, something random."""
_NOWHERE: Final = "nowhere"


@contextmanager
def errors(place: Path) -> Iterator[None]:
    """Turn the operating system's errors into ``StoreError``."""
    try:
        yield
    except OSError as error:
        raise failure(place, error) from error


def is_full(error: OSError) -> bool:
    """Whether an error means that there is no room (or none for this user)."""
    return error.errno in _FULL


def failure(place: Path, error: OSError) -> StoreError:
    """Return the error of a disk that is full, or does not do what it should."""
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


def read_if_there(path: Path) -> bytes | None:
    """Return a plain file's bytes, or None where there is none.

    Raises:
        OSError: it cannot be read, or is a pipe, which might never end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        return stream.read()


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, for its owner to change, and have it on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o644), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_whole(path: Path, data: bytes, *, staging: Path) -> None:
    """Write a file so that it is absent, the old one or the new one at every moment.

    Args:
        path: the file.
        data: what it holds then.
        staging: a folder on the same disk for what is half done.
    """
    folder = new_folder(staging, "file")
    try:
        write_new(folder / path.name, data)
        (folder / path.name).replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def new_folder(staging: Path, purpose: str) -> Path:
    """Make a private folder whose name says who owns it."""
    owner = f"{os.getpid()}.{_started(os.getpid())}"
    return Path(tempfile.mkdtemp(prefix=f"{purpose}.{_world()}.{owner}.", dir=staging))


def sweep(staging: Path) -> None:
    """Remove folders of ``new_folder`` whose owner is gone: killed, or of a container that ended.

    Other names, files and links are left alone.
    """
    for left in staging.iterdir():
        ours = _OWNED.fullmatch(left.name) is not None
        if ours and left.is_dir() and not left.is_symlink() and is_stale(left):
            shutil.rmtree(left, ignore_errors=True)


def private_place(name: str) -> Path | None:
    """Return the folder that ``private_folder`` made before; None where there is none of ours."""
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.geteuid()}"
    return folder if folder.is_dir() and is_private(folder) else None


def private_folder(name: str) -> Path:
    """Return a folder for this user alone among the temporary files, the same one every time.

    What somebody else put there under that name is not used.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.geteuid()}"
    try:
        folder.mkdir(mode=_PRIVATE)
    except FileExistsError:
        if not is_private(folder):
            return Path(tempfile.mkdtemp(prefix=f"{name}-"))
    return folder


def is_private(folder: Path) -> bool:
    """Whether it is a folder of this user that nobody else may look into."""
    status = folder.lstat()
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return mine and not stat.S_IMODE(status.st_mode) & 0o077


def remove_run(folder: Path) -> None:
    """Remove a folder made in a ``private_folder``, and that too where it was made for it alone."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.parent.name.endswith(f"-{os.geteuid()}"):
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def is_stale(folder: Path) -> bool:
    """Whether the owner that a folder's name tells (``new_folder``) is gone."""
    parts = folder.name.split(".")
    if _OWNED.fullmatch(folder.name) and parts[1] == _world() != _NOWHERE:
        # Process numbers are used again: the moment of the start tells two owners apart.
        return _started(int(parts[2])) != parts[3]
    return newest(folder) < time.time() - STALE_SECONDS


def _world() -> str:
    """Name the place where a process number means something: this boot and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot.read_text()[:8]}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return _NOWHERE


def _started(pid: int) -> str:
    """When a process began, in the kernel's own count; ``-`` where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "-"
    return text.rpartition(")")[2].split()[_START_TIME]


def newest(folder: Path) -> float:
    """When something was last written in a folder: seconds since the epoch."""
    newest = 0.0
    for place in (folder, *folder.rglob("*")):
        try:
            newest = max(newest, place.lstat().st_mtime)
        except FileNotFoundError:  # its owner is alive
            return time.time()
    return newest
