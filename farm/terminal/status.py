"""The status of a place (channels, releases) or of this machine, and what ``invoke clean`` removes.

It removes only what the farm made: its own folder of the user's cache, ``.farm`` of this checkout,
and in the Docker engine what has its label and its names. It keeps what a run uses, ``dist/``, and
a compiler cache that ``CCACHE_DIR`` names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, Self

from rich.filesize import decimal

from farm import STATE_FOLDER, durable, loader, release, run_lock
from farm.engines import shared_cache
from farm.engines.docker.connection import connect
from farm.engines.docker.inventory import CACHE_VOLUME, Stored, cache_counters, stored
from farm.engines.local import ccache_dir
from farm.engines.shared_cache import Statistics
from farm.errors import EngineError, FarmError, PublishError, UsageError
from farm.inputs.packages import cache_root
from farm.publish import channels
from farm.publish.places import Destination
from farm.terminal import show
from llama_loader import manifest as schema
from llama_loader.errors import LoaderError

_FOLDER: Final = Path("dist")
_PATIENCE: Final = 2
"""Seconds for each answer of an engine, so that `invoke status` is quick."""
_CODE: Final = re.compile(r"^error\[(\w+)\]", re.MULTILINE)
_NAMES: Final = {
    "ccache": "the local engine's compiler cache",
    "builds": "unfinished builds",
    "downloads": "source archives, wheels and toolkits, as they were fetched",
    "sources": "unpacked sources",
    "git": "llama.cpp's repository",
    "toolkits": "unpacked CUDA toolkits",
    "models": "models for tests and the demo",
    "roots": "base images that were being made",
    "images": "which images the farm has made",
    "trees": "built trees of this checkout",
    "logs": "logs of this checkout",
    "journal": "what was built in this checkout, and how long it took",
    "tarballs": "digests of the tarballs that this checkout packed",
    "locks": "locks of this checkout",
}
_BLOCK: Final = 512
"""Bytes of what stat(2) counts in."""
_BUSY: Final = "a run of the farm uses it"


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
        show.line(supposed(release.content(place), suppose))


def disk() -> str:
    """Return one line with the sum of what `invoke clean` would list."""
    with Leavings(patience=_PATIENCE) as left:
        engine = ", the engine not counted" if left.engine else ""
        return (
            f"disk: {decimal(left.size)} of caches, images and logs{engine}"
            " (invoke clean lists and removes them)"
        )


def caches() -> Iterator[str]:
    """Give one line for the compiler cache of each engine that builds on one machine."""
    folder = ccache_dir()
    counted = shared_cache.statistics(folder)
    told = "no ccache on PATH" if counted is None else _figures(counted, str(folder))
    yield f"compiler cache, local engine: {told}"
    try:
        with closing(connect(_PATIENCE)) as client:
            lines = cache_counters(client, CACHE_VOLUME)
        told = f"empty, no volume {CACHE_VOLUME} yet"
        if lines is not None:
            told = _figures(shared_cache.counted(lines), f"volume {CACHE_VOLUME}")
    except EngineError as error:
        told = error.message.partition(": ")[0]  # the rest is the system's message
    yield f"compiler cache, docker engine: {told}"


def _figures(counted: Statistics, where: str) -> str:
    asked = counted.hits + counted.misses
    share = f" ({counted.hits / asked:.0%})" if asked else ""
    return f"{counted.hits} of {asked} hits{share}, {decimal(counted.size)} in {where}"


class Row(NamedTuple):
    """What is shown of a channel or a release.

    ``size`` are the bytes of its ``tarballs``; ``gets`` is what the supposed host would get, None
    without one.
    """

    name: str
    release: str
    serial: int
    created: datetime
    expires: datetime | None
    tarballs: int
    size: int
    gets: str | None

    @property
    def left(self) -> timedelta | None:
        """How long until it expires; None for never."""
        return None if self.expires is None else self.expires - datetime.now(timezone.utc)


class Overview(NamedTuple):
    """A place."""

    where: str
    channels: tuple[Row, ...]
    releases: tuple[Row, ...]
    failed: tuple[FarmError, ...] = ()
    """Why channels cannot be renewed, and which releases cannot be read."""


def of(destination: Destination, suppose: str | None = None) -> Overview:
    """Read every channel's and every release's manifest.

    Raises:
        PublishError: the place cannot be read.
        UsageError: ``suppose`` cannot be read.
    """
    destination.require_there()
    # one by one: others may put thousands of manifests there
    followed: list[Row] = []
    released: list[Row] = []
    failures: list[FarmError] = []
    for name in destination.channels():
        pair, failed = channels.state(destination, name)
        followed += [_row(name, pair.manifest, suppose)] if pair.manifest else []
        failures += [failed] if failed else []
    for name in destination.releases():
        try:
            released.append(_row(name, destination.small(name, release.MANIFEST), suppose))
        except (PublishError, LoaderError, OSError) as error:
            told = f"release {name!r} of {destination.where} cannot be read: {error}"
            failures.append(PublishError("RELEASE_UNREADABLE", told, hint="repair it or remove it"))
    return Overview(destination.where, tuple(followed), tuple(released), tuple(failures))


def supposed(manifest: bytes, suppose: str) -> str:
    """Return which artifact a described host would get, and why; the loader decides."""
    done = loader.suppose(manifest, suppose)
    return done.stdout.strip() or done.stderr.strip()


def _row(name: str, content: bytes, suppose: str | None) -> Row:
    """Take a manifest's facts, and keep nothing else of it."""
    found, gets = schema.parse(content, what=name), None
    if suppose is not None:
        done = loader.suppose(content, suppose, "--json")
        choice = json.loads(done.stdout)["choice"] if done.stdout else None
        code = _CODE.search(done.stderr)
        gets = f"nothing: {code[1]}" if code else "nothing"
        gets = choice["artifact"] if choice else gets
    return Row(
        name,
        found.release,
        found.serial,
        found.created,
        found.expires,
        tarballs=len(found.artifacts),
        size=sum(artifact.size for artifact in found.artifacts),
        gets=gets,
    )


@dataclass
class Leavings:
    """Everything that ``invoke clean`` can remove; while this context is open, no run begins.

    ``patience`` are seconds for each answer of the Docker engine, ``state`` is the checkout's
    ``.farm``.
    """

    patience: int | None = None
    state: Path = STATE_FOLDER
    things: list[Stored] = field(default_factory=list)
    engine: str = ""
    """Why the engine could not be asked, empty if it answers."""
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Look at everything."""
        with ExitStack() as stack:
            for root in (cache_root(), self.state):
                if root.is_dir():
                    free = stack.enter_context(run_lock.unused(root))
                    for path in sorted(root.iterdir()):  # other files there are left alone
                        told, kept = _NAMES.get(path.name), "" if free else _BUSY
                        if told is not None and path.is_dir() and not path.is_symlink():
                            name, remove = f"{path}: {told}", partial(durable.remove, path)
                            self.things.append(Stored(name, size_of(path), kept, remove))
            try:
                client = stack.enter_context(closing(connect(self.patience)))
                self.things += stored(client)
            except EngineError as error:
                self.engine = error.message
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Let runs begin again."""
        self._open.close()

    @property
    def size(self) -> int:
        """Bytes of all things, including those that stay."""
        return sum(thing.size for thing in self.things)

    def remove(self) -> Iterator[str]:
        """Remove what can be; gives a line for each thing."""
        for thing in self.things:
            stays = thing.remove()
            yield f"stays: {thing.name}: {stays}" if stays else f"removed {thing.name}"


def size_of(folder: Path) -> int:
    """Return the bytes that a folder's files take on the disk; links are not followed."""
    total, folders = 0, [str(folder)]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as found:  # removed, or too deep
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * _BLOCK
    return total
