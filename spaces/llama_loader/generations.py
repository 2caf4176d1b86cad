"""Which release is in use, which one was before it, and what may go.

``<root>/current`` is one small JSON file with both, replaced by one rename: at every moment it
names the old pair or the new one. It decides nothing about trust: the pin or the channel says what
runs; this says what ``--previous`` goes back to and what stays on the disk. A file that cannot be
read is as good as none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import TYPE_CHECKING, Final

import msgspec

from llama_loader import disk
from llama_loader import manifest as schema

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

CURRENT: Final = "current"
MAX_AGE_SECONDS: Final = 14 * 86400.0
"""What no process has asked for in so long goes."""
MAX_BYTES: Final = 8 << 30
"""All runtimes together; beyond that the longest unused go first. A release has 0.2 to 2 GB."""
RECENT_SECONDS: Final = 3600.0
"""What was asked for just now may be about to start, and not be held yet."""


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """A release as it was used here.

    Attributes:
        release: its name.
        url: its manifest's.
        manifest: digest of the copy in ``manifests/``.
        runtimes: digests of what was installed from it: a server, and libraries for it.
    """

    release: str
    url: str
    manifest: schema.Sha256
    runtimes: tuple[schema.Sha256, ...]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is in use, and what was before."""

    current: Generation
    previous: Generation | None = None

    @property
    def runtimes(self) -> set[str]:
        """All that both need."""
        before = self.previous.runtimes if self.previous else ()
        return {*self.current.runtimes, *before}


def read(root: Path) -> Record | None:
    """Return what the store's ``current`` says, None where it says nothing that can be read."""
    try:
        data = disk.read_if_there(root / CURRENT)
        return None if data is None else msgspec.json.decode(data, type=Record)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def following(record: Record | None, generation: Generation) -> Record:
    """Return the record after a switch; the same runtimes again are no new generation.

    Nor is another runtime of the same manifest: on ZeroGPU those for both likely GPUs are in use.
    """
    if record is None:
        return Record(current=generation)
    now = record.current
    if now.runtimes == generation.runtimes:
        return Record(current=generation, previous=record.previous)
    if now.manifest == generation.manifest:
        both = tuple(dict.fromkeys((*generation.runtimes, *now.runtimes)))
        current = msgspec.structs.replace(generation, runtimes=both)
        return Record(current=current, previous=record.previous)
    return Record(current=generation, previous=now)


def touch(place: Path) -> None:
    """Write down that a runtime was asked for now; not where the store cannot be written."""
    with contextlib.suppress(OSError):
        os.utime(place)


def hold(place: Path) -> None:
    """Keep a runtime from being collected for as long as this process or a fork of it lives.

    A shared lock on its folder, which the kernel lets go of however the process ends. Where locks
    do not work, the time of the last use is all that protects it.
    """
    with contextlib.suppress(OSError):
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        status = os.fstat(handle)
        if _held.setdefault((status.st_dev, status.st_ino), handle) != handle:
            os.close(handle)
            return
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


_held: dict[tuple[int, int], int] = {}
"""Open folders by device and inode, once each."""


def collect(runtimes: Path, keep: Collection[str], discard: Callable[[Path], None]) -> list[str]:
    """Remove runtimes by age and size: never one to keep, one in use, or one asked for just now.

    Args:
        runtimes: the folder of all of them.
        keep: digests of those that stay.
        discard: takes one out of use and deletes it.

    Returns:
        The digests of those that went.
    """
    now = time.time()
    found = sorted((place.lstat().st_mtime, place) for place in runtimes.iterdir())
    sizes = {place: _size(place) for _, place in found}
    total, gone = sum(sizes.values()), []
    for used, place in found:
        unused = now - used
        if place.name in keep or unused < RECENT_SECONDS:
            continue
        if unused < MAX_AGE_SECONDS and total <= MAX_BYTES:
            continue
        with _alone(place) as alone:
            if alone:
                discard(place)
                total -= sizes[place]
                gone.append(place.name)
    return gone


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[bool]:
    """Whether nobody holds it; where locks do not work, nobody knows, and it stays."""
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(handle)


def _size(place: Path) -> int:
    return sum(path.lstat().st_size for path in place.rglob("*"))
