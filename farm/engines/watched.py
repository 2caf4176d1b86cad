"""An engine whose builds end soon after nobody waits for them, also while a compiler is silent."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path, PurePath

    from farm.engines.base import Engine, LineSink, Workspace
    from farm.engines.images import ImageFacts
    from farm.plan import BuildPlan, Layout

_EVERY: Final = 0.5
"""Seconds between two looks."""


@dataclass(frozen=True)
class WatchedWorkspace:
    """A workspace whose commands run beside a look, twice a second, at whether to go on.

    Args:
        inner: where the commands run.
        check: raises what ends the build.
        beside: one thread. It is free again once ``inner`` is closed, which ends what runs there.
    """

    inner: Workspace
    check: Callable[[], None]
    beside: ThreadPoolExecutor

    @property
    def layout(self) -> Layout:
        """Where things are, in the workspace's own paths."""
        return self.inner.layout

    @property
    def jobs(self) -> int:
        """How many compilers fit at a time."""
        return self.inner.jobs

    @property
    def image(self) -> ImageFacts | None:
        """The devel image that it stands on."""
        return self.inner.image

    @property
    def ccache_dir(self) -> PurePath | None:
        """The compiler cache, None where there is none."""
        return self.inner.ccache_dir

    def run(self, argv: tuple[str, ...], environment: Mapping[str, str], sink: LineSink) -> int:
        """Run one command; lines are handed over in the caller's own thread."""
        lines: SimpleQueue[str | None] = SimpleQueue()
        running = self.beside.submit(self.inner.run, argv, environment, lines.put)
        running.add_done_callback(lambda _: lines.put(None))
        for line in self._until_end(lines):
            sink(line)
        return running.result()

    def collect(self, products: PurePath, into: Path) -> None:
        """Copy the folder ``products`` into the folder ``into``."""
        self.check()
        self.inner.collect(products, into)

    def _until_end(self, lines: SimpleQueue[str | None]) -> Iterator[str]:
        due = time.monotonic() + _EVERY
        while True:
            try:
                line = lines.get(timeout=max(due - time.monotonic(), 0.0))
            except Empty:
                line = ""
            else:
                if line is None:
                    return
                yield line
            if time.monotonic() >= due:
                due = time.monotonic() + _EVERY
                self.check()


class WatchedEngine:
    """Opens watched workspaces of another engine.

    Args:
        engine: builds.
        check: raises what ends the build; asked twice a second.
    """

    def __init__(self, engine: Engine, check: Callable[[], None]) -> None:
        self._engine = engine
        self._check = check

    @property
    def name(self) -> str:
        """The word for ``--engine``."""
        return self._engine.name

    def identity(self, plan: BuildPlan) -> str:
        """Name what compiles ``plan``."""
        return self._engine.identity(plan)

    @contextmanager
    def open(self, plan: BuildPlan, sink: LineSink) -> Iterator[WatchedWorkspace]:
        """Make a workspace; what still runs when it is closed is ended and waited for."""
        with ThreadPoolExecutor(max_workers=1) as beside, self._engine.open(plan, sink) as inner:
            self._check()
            yield WatchedWorkspace(inner, self._check, beside)

    def close(self) -> None:
        """Let go of what the engine holds open."""
        self._engine.close()
