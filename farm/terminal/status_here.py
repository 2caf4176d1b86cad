"""What this machine has: a release folder, and each engine's compiler cache in one line."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

from farm import release
from farm.clean import Leavings
from farm.engines import shared_cache
from farm.engines.docker import CACHE_VOLUME, cache_counters, connect
from farm.engines.local import ccache_dir
from farm.errors import EngineError, UsageError
from farm.terminal import overview, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farm.engines.shared_cache import Statistics

_FOLDER: Final = Path("dist")
_PATIENCE: Final = 2
"""Seconds for each answer of an engine: who asks for the status does not wait for one."""


def tell(folder: Path | None, suppose: str | None) -> None:
    """Print a release folder, the compiler caches, and what a supposed host would get.

    Without ``folder`` it is ``dist``, and that there is no release yet is no error.

    Raises:
        UsageError: the folder that was named, or that a host is supposed for, has no release.
        IntegrityError: its manifest is malformed.
    """
    place = folder or _FOLDER
    try:
        show.status(release.load(place))
    except UsageError as error:
        if folder is not None or suppose is not None:
            raise
        show.line(f"no release: {error.message} ({error.hint})")
    for line in caches():
        show.line(line)
    show.line(disk())
    if suppose is not None:
        show.line(overview.supposed((place / release.MANIFEST).read_bytes(), suppose))


def disk() -> str:
    """Return one line: what `invoke clean` would list, summed up."""
    with Leavings(patience=_PATIENCE) as left:
        engine = ", the engine not counted" if left.engine else ""
        return (
            f"disk: {show.megabytes(left.size)} of caches, images and logs{engine}"
            " (invoke clean lists and removes them)"
        )


def caches() -> Iterator[str]:
    """Give one line for the compiler cache of each engine that builds on one machine."""
    folder = ccache_dir()
    counted = shared_cache.statistics(folder)
    told = "no ccache on PATH" if counted is None else _figures(counted, str(folder))
    yield f"compiler cache, local engine: {told}"
    yield f"compiler cache, docker engine: {_of_docker()}"


def _of_docker() -> str:
    try:
        with closing(connect(_PATIENCE)) as client:
            lines = cache_counters(client, CACHE_VOLUME)
    except EngineError as error:
        return error.message.partition(": ")[0]  # the rest is a system's words: a build says them
    if lines is None:
        return f"empty, no volume {CACHE_VOLUME} yet"
    return _figures(shared_cache.counted(lines), f"volume {CACHE_VOLUME}")


def _figures(counted: Statistics, where: str) -> str:
    asked = counted.hits + counted.misses
    share = f" ({counted.hits / asked:.0%})" if asked else ""
    return f"{counted.hits} of {asked} hits{share}, {show.megabytes(counted.size)} in {where}"
