"""The compiler cache: its size limit, the storage that machines share, and its counters.

``FARM_CCACHE_REMOTE`` names the shared storage in ccache's own words: ``redis://HOST:6379``,
``http://HOST/folder/``, ``file:/folder``. It is set where compilers run: on this machine for
the local and docker engines, on each worker's for dask. ccache itself continues without it and
prints nothing, so a build of a minute takes an hour. So the farm tests the storage before the first
step and counts its errors after the last one. The address is never shown: it may hold a password.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from farm.errors import UsageError, remark
from farm.inputs.images import ImageFacts
from farm.plan import CACHE_CONFIG, LineSink, Workspace

if TYPE_CHECKING:
    from farm.source import SourceTree

VARIABLE: Final = "FARM_CCACHE_REMOTE"
ANY_VARIABLE: Final = "FARM_CCACHE_REMOTE_ANY"
MAXSIZE_VARIABLE: Final = "CCACHE_MAXSIZE"
DEFAULT_MAXSIZE: Final = "20G"

_STORAGE: Final = re.compile(
    r"((redis|http)://|redis\+unix:)\S+|file:(?://)?(?P<folder>/[^\s|]+)\S*"
)
_SIZE: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:[kKMGT]i?B?)?")
"""ccache also accepts other texts, such as ``5GG``, with another meaning."""
_HITS: Final = ("direct_cache_hit", "preprocessed_cache_hit")
_KIBIBYTE: Final = 1024


@dataclass(frozen=True)
class Statistics:
    """What ccache counted since its cache was made; ``size`` in bytes."""

    hits: int
    misses: int
    size: int


def remote() -> str | None:
    """Return the shared storage, None where there is none.

    Raises:
        UsageError: ``CCACHE_REMOTE_INVALID``: ccache does not accept the address.
    """
    address = os.environ.get(VARIABLE)
    if not address:
        return None
    if not _STORAGE.fullmatch(address):
        raise UsageError("CCACHE_REMOTE_INVALID")
    return address


def folder() -> str | None:
    """Return the storage's folder, which a container needs mounted; None for another storage.

    Raises:
        UsageError: ``CCACHE_REMOTE_INVALID``.
    """
    found = _STORAGE.fullmatch(remote() or "")
    return found and found["folder"] and unquote(found["folder"])


def bound() -> str:
    """Return the cache's size limit, in ccache's words.

    Raises:
        UsageError: ``CCACHE_MAXSIZE_INVALID``: it is no size.
    """
    size = os.environ.get(MAXSIZE_VARIABLE) or DEFAULT_MAXSIZE
    if not _SIZE.fullmatch(size):
        raise UsageError("CCACHE_MAXSIZE_INVALID", size=size[:40])
    return size


def check(note: Callable[[str], None]) -> None:
    """Refuse variables that ccache would not accept, before anything starts; note a missing limit.

    Raises:
        UsageError: names the variable and what it accepts.
    """
    remote()
    size = bound()
    if (number := _SIZE.fullmatch(size)) and float(number[1]) == 0:
        note(remark("CCACHE_UNBOUNDED", variable=MAXSIZE_VARIABLE, size=size))


def owner(source: SourceTree, image: ImageFacts | None) -> str:
    """Return whose compiler cache a build uses: its own name, empty for the one of pinned inputs.

    The author of the source, or of a program of the image, can put wrong objects into the cache.
    ``image`` is the devel image below a build, None on this machine.
    """
    of_image = "" if image is None or image.trusted else image.id.rpartition(":")[2][:16]
    return "-".join(filter(None, (source.cache, of_image)))


def is_for(source: SourceTree, image: ImageFacts | None) -> bool:
    """Whether a build uses the shared storage: that of pinned inputs, others if told so.

    Others could put wrong objects into it, and send its password away.
    """
    return not owner(source, image) or bool(os.environ.get(ANY_VARIABLE))


def environment(source: SourceTree, image: ImageFacts | None, note: LineSink) -> dict[str, str]:
    """Return ccache's variables for every step of a build; ``note`` takes one coded line.

    Raises:
        UsageError: the limit, or the shared storage's address, is malformed.
    """
    variables = {MAXSIZE_VARIABLE: bound()}
    address = remote()
    if address is not None and not is_for(source, image):
        on = f" on {image.reference}" if image and not image.trusted else ""
        note(remark("CACHE_NOT_SHARED", origin=source.origin, on=on))
    elif address is not None:
        variables["CCACHE_REMOTE_STORAGE"] = address
    return variables


def program() -> str | None:
    """Return the ccache on PATH, else the one that was installed beside this Python."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("ccache") or shutil.which("ccache", path=beside)


def statistics(folder: PurePath) -> Statistics | None:
    """Ask ccache for its counters, None where there is no ccache."""
    ccache = program()
    if ccache is None:
        return None
    done = subprocess.run(
        [ccache, "--print-stats"],
        # ccache prints no counters if another of its variables is wrong
        env={"CCACHE_DIR": str(folder), "CCACHE_CONFIGPATH": CACHE_CONFIG},
        capture_output=True,
        text=True,
        check=False,
    )
    return counted(done.stdout.splitlines())


def counted(lines: Iterable[str]) -> Statistics:
    """Read what ``ccache --print-stats`` printed."""
    found = _counters(lines)
    hits = sum(found[name] for name in _HITS)
    return Statistics(hits, found["cache_miss"], found["cache_size_kibibyte"] * _KIBIBYTE)


def _counters(lines: Iterable[str]) -> Counter[str]:
    """Return each counter; those that were printed more than once add up."""
    found: Counter[str] = Counter()
    for name, *value in (line.split("\t") for line in lines):
        if value and re.fullmatch("[0-9]{1,15}", value[0]):
            found[name] += int(value[0])
    return found


_FOLDER: Final = ".cache-probe"
_PROBE: Final = """
mkdir -p "$1" && cd "$1" && printf 'int probe;\\n' > probe.c || exit
for _ in first again; do
    rm -rf "$1/cache"
    CCACHE_DIR=$1/cache "$2" cc -c probe.c -o probe.o
    CCACHE_DIR=$1/cache "$2" --print-stats
done
cd .. && rm -rf "$1"
"""
"""Two compilations, each with an empty cache: ccache has to ask the storage, and may fill it."""
_ERRORS: Final = ("remote_storage_error", "remote_storage_timeout")


@contextmanager
def watched(workspace: Workspace, environment: Mapping[str, str], say: LineSink) -> Iterator[None]:
    """Report a shared storage that does not answer; do nothing if none is named.

    The storage gets one request before the block. Its errors are counted after it. ``say``
    takes one coded line.
    """
    if "CCACHE_REMOTE_STORAGE" not in environment:
        yield
        return
    layout = workspace.layout

    def counted(*argv: str) -> Counter[str]:
        return _counters(workspace.ask(*argv, environment=environment))

    def failed() -> int:
        found = counted(layout.launcher, "--print-stats")
        return sum(found[name] for name in _ERRORS)

    probe = counted("sh", "-c", _PROBE, "sh", str(layout.build / _FOLDER), layout.launcher)
    if trouble := _trouble(probe):
        say(trouble)
    before = failed()
    yield
    if (errors := failed() - before) > 0:
        say(remark("CCACHE_REMOTE_ERRORS", errors=errors))


def _trouble(found: Counter[str]) -> str | None:
    """Return what is wrong, from what the probe's two compilations counted."""
    if not found.keys() & set(_ERRORS):
        return remark("CCACHE_TOO_OLD")
    if any(found[name] for name in _ERRORS):
        return remark("CCACHE_REMOTE_DOWN")
    # To ccache a refused GET is a miss, not an error (docs/building.md)
    if found["remote_storage_write"] and not found["remote_storage_hit"]:
        return remark("CCACHE_REMOTE_UNREADABLE")
    return None
