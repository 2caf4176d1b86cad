"""What the way to the first token cost: named stages with seconds and bytes, for people and JSON.

The order is that of the work: resolve (facts, manifest, choice), fetch, verify, unpack, devices,
start (until the model is loaded), first token. A stage that was not needed is not there.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from llama_loader.events import Event, Sink, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator


class Timeline:
    """Stages in the order in which they ended."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; an error in it leaves no stage."""
        began = time.monotonic()
        yield
        self.add(name, time.monotonic() - began)

    def add(self, name: str, seconds: float, size: int | None = None) -> None:
        """Add a stage that was timed elsewhere."""
        self.stages.append(Stage(name, seconds, size))

    def listening(self, sink: Sink) -> Sink:
        """Return a sink that keeps the stages that it is told of, and passes everything on."""

        def take(event: Event) -> None:
            if isinstance(event, Stage):
                self.stages.append(event)
            sink(event)

        return take

    @property
    def seconds(self) -> float:
        """Sum of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def as_json(self) -> list[dict[str, object]]:
        """Return the stages as plain data: name, seconds, size in bytes or null."""
        return [
            {"name": one.name, "seconds": round(one.seconds, 4), "size": one.size}
            for one in self.stages
        ]
