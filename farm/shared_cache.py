"""The compiler cache's bounds, its storage shared between machines, and what it says of itself.

``FARM_CCACHE_REMOTE`` names the shared storage in ccache's own words: ``redis://HOST:6379``,
``http://HOST/folder/``, ``file:/folder``. It is set where compilers run: on this machine for
the local and docker engines, on each worker's for dask.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from farm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import PurePath

VARIABLE: Final = "FARM_CCACHE_REMOTE"
MAXSIZE_VARIABLE: Final = "CCACHE_MAXSIZE"
DEFAULT_MAXSIZE: Final = "20G"

_STORAGE: Final = re.compile(r"(redis|redis\+unix|http|file):\S+")
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
        UsageError: ``CCACHE_REMOTE_INVALID``: it is not an address that ccache knows.
    """
    address = os.environ.get(VARIABLE)
    if not address:
        return None
    if not _STORAGE.fullmatch(address):
        raise UsageError(
            "CCACHE_REMOTE_INVALID",
            f"{VARIABLE} is not the address of a storage that ccache knows",
            hint="it begins with redis:, redis+unix:, http: or file:",
        )
    return address


def environment() -> dict[str, str]:
    """Return ccache's variables for every step of a build.

    Raises:
        UsageError: the shared storage's address is none.
    """
    variables = {MAXSIZE_VARIABLE: os.environ.get(MAXSIZE_VARIABLE, DEFAULT_MAXSIZE)}
    address = remote()
    if address is not None:
        variables["CCACHE_REMOTE_STORAGE"] = address
    return variables


def statistics(folder: PurePath) -> Statistics | None:
    """Ask ccache for its counters, None where there is no ccache."""
    ccache = shutil.which("ccache")
    if ccache is None:
        return None
    done = subprocess.run(
        [ccache, "--print-stats"],
        env={**os.environ, "CCACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    return counted(done.stdout.splitlines())


def counted(lines: Iterable[str]) -> Statistics:
    """Read what ``ccache --print-stats`` printed."""
    rows = (line.split("\t") for line in lines)
    found = {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
    return Statistics(
        hits=sum(found.get(name, 0) for name in _HITS),
        misses=found.get("cache_miss", 0),
        size=found.get("cache_size_kibibyte", 0) * _KIBIBYTE,
    )
