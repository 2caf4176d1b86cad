"""The status of a place (channels, releases) or of this machine (release, caches)."""

from __future__ import annotations

import json
import re
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from farm import loader, release
from farm.clean import Leavings
from farm.engines import shared_cache
from farm.engines.docker import CACHE_VOLUME, cache_counters, connect
from farm.engines.local import ccache_dir
from farm.errors import EngineError, UsageError
from farm.terminal import show
from llama_loader import manifest as schema

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from farm.engines.shared_cache import Statistics
    from farm.publish.destination import Destination
    from llama_loader.manifest import Manifest

_FOLDER: Final = Path("dist")
_PATIENCE: Final = 2
"""Seconds for each answer of an engine, so that `invoke status` is quick."""
_CODE: Final = re.compile(r"^error\[(\w+)\]", re.MULTILINE)


def tell(folder: Path | None, suppose: str | None) -> None:
    """Print a release folder, the compiler caches, and what a supposed host would get.

    Without ``folder`` it is ``dist``, and a missing release there is no error.

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
        show.line(supposed((place / release.MANIFEST).read_bytes(), suppose))


def disk() -> str:
    """Return one line with the sum of what `invoke clean` would list."""
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


class Row(NamedTuple):
    """A channel or a release; ``gets`` is what the supposed host would get, None without one."""

    name: str
    manifest: Manifest
    gets: str | None

    @property
    def left(self) -> timedelta | None:
        """How long until it expires; None for never."""
        expires = self.manifest.expires
        return None if expires is None else expires - datetime.now(timezone.utc)


class Overview(NamedTuple):
    """A place."""

    where: str
    channels: tuple[Row, ...]
    releases: tuple[Row, ...]


def of(destination: Destination, suppose: str | None = None) -> Overview:
    """Read every channel's and every release's manifest.

    Raises:
        PublishError: the place cannot be read.
        LoaderError: a manifest is malformed, or ``suppose`` cannot be read.
    """
    destination.require_there()
    channels = {
        name: destination.channel_file(name, release.MANIFEST) for name in destination.channels()
    }
    releases = {name: destination.small(name, release.MANIFEST) for name in destination.releases()}
    return Overview(
        destination.where,
        tuple(_row(name, content, suppose) for name, content in channels.items() if content),
        tuple(_row(name, content, suppose) for name, content in releases.items()),
    )


def supposed(manifest: bytes, suppose: str) -> str:
    """Return which artifact a described host would get, and why; the loader decides.

    Raises:
        UsageError: the host's facts cannot be read.
    """
    done = loader.suppose(manifest, suppose)
    return done.stdout.strip() or done.stderr.strip()


def _row(name: str, content: bytes, suppose: str | None) -> Row:
    gets = None if suppose is None else _gets(content, suppose)
    return Row(name, schema.parse(content, what=name), gets)


def _gets(manifest: bytes, suppose: str) -> str:
    """Return the artifact's name, or the error's code."""
    done = loader.suppose(manifest, suppose, "--json")
    choice = json.loads(done.stdout)["choice"] if done.stdout else None
    if choice:
        name: str = choice["artifact"]
        return name
    code = _CODE.search(done.stderr)
    return f"nothing: {code[1]}" if code else "nothing"
