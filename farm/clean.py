"""``invoke clean``: list what the farm left on this machine and in its engine, and remove it.

It removes only what the farm made: its own folder of the user's cache, ``.farm`` of this checkout,
and in the Docker engine what has its label and its names. It keeps what a run uses, ``dist/``, and
a compiler cache that ``CCACHE_DIR`` names.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from farm import STATE_FOLDER, run_lock
from farm.engines import docker
from farm.errors import EngineError
from farm.inputs.packages import cache_root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NAMES: Final = {
    "ccache": "the local engine's compiler cache",
    "builds": "unfinished builds",
    "downloads": "source archives, wheels and toolkits, as they were fetched",
    "sources": "unpacked sources",
    "git": "llama.cpp's repository",
    "toolkits": "unpacked CUDA toolkits",
    "models": "models for tests and the demo",
    "roots": "base images that were being made",
    "trees": "built trees of this checkout",
    "logs": "logs of this checkout",
    "journal": "what was built in this checkout, and how long it took",
    "locks": "locks of this checkout",
}
_BLOCK: Final = 512
"""Bytes of what stat(2) counts in."""
_BUSY: Final = "a run of the farm uses it"


@dataclass(frozen=True)
class Left:
    """One thing on the disk. ``kept``: why it stays; ``remove`` returns why it could not go."""

    what: str
    size: int
    kept: str
    remove: Callable[[], str]


@dataclass
class Leavings:
    """All that there is. A context manager: as long as it is open, no run begins to use it.

    Args:
        patience: seconds for each answer of the Docker engine.
        state: the checkout's ``.farm``.
    """

    patience: int | None = None
    state: Path = STATE_FOLDER
    things: list[Left] = field(default_factory=list)
    engine: str = ""
    """Why the engine could not be asked, empty if it answers."""
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Look at everything."""
        with ExitStack() as stack:
            for root in (cache_root(), self.state):
                if root.is_dir():
                    free = stack.enter_context(run_lock.unused(root))
                    self.things += _folders(root, "" if free else _BUSY)
            try:
                client = stack.enter_context(closing(docker.connect(self.patience)))
                self.things += [_stored(thing) for thing in docker.stored(client)]
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
        """Remove what can be; gives a line for each thing.

        Raises:
            EngineError: the engine went away in the middle.
        """
        for thing in self.things:
            stays = thing.kept or thing.remove()
            yield f"stays: {thing.what}: {stays}" if stays else f"removed {thing.what}"


def _stored(thing: docker.Stored) -> Left:
    return Left(f"engine: {thing.name}", thing.size, thing.kept, lambda: docker.remove(thing))


def _folders(root: Path, kept: str) -> Iterator[Left]:
    """Give what the farm makes in a folder; other files there are left alone."""
    for path in sorted(root.iterdir()):
        told = _NAMES.get(path.name)
        if told is not None and path.is_dir() and not path.is_symlink():
            yield Left(f"{path}: {told}", size_of(path), kept, _remover(path))


def _remover(path: Path) -> Callable[[], str]:
    def remove() -> str:
        try:
            shutil.rmtree(path)
        except OSError as error:  # of another user, as after a run with sudo
            return f"{error.filename}: {error.strerror}"
        return ""

    return remove


def size_of(folder: Path) -> int:
    """Return the bytes that a folder's files take on the disk; links are not followed."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(parent) / name).st_blocks * _BLOCK
            except FileNotFoundError:  # gone meanwhile
                continue
    return total
