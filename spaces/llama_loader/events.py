"""What happens while a release is fetched, as plain frozen data.

A terminal, a Gradio bar and a log show the same events; nobody prints in the middle of the work.
Whoever works tells a ``Sink``; ``told`` makes an iterator of that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Resolving:
    """A manifest is being read."""

    url: str


@dataclass(frozen=True)
class Downloading:
    """``done`` of ``total`` bytes are here and verified; ``total`` is None where not known."""

    name: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Unpacking:
    """``done`` of ``total`` unpacked bytes are written and verified."""

    name: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Stage:
    """A stage of an installation took ``seconds``; ``size`` bytes went through it."""

    name: str
    seconds: float
    size: int | None = None


@dataclass(frozen=True)
class Note:
    """Something that a person should know: not as asked, or not verified."""

    code: str
    message: str
    hint: str = ""


Event = Resolving | Downloading | Unpacking | Stage | Note
Sink = Callable[[Event], None]

_Result = TypeVar("_Result")


def ignore(event: Event) -> None:
    """Take an event and do nothing."""
    del event


def told(work: Callable[[Sink], _Result]) -> Generator[Event, None, _Result]:
    """Do ``work`` in a thread of its own and yield what it tells, as it happens.

    ``for event in told(lambda sink: prepare(settings, sink=sink))`` shows an installation;
    ``result = yield from told(…)`` gives its result, too. Closed early, the work is given up at
    its next event, and leaves nothing half done.

    Raises:
        BaseException: what ``work`` raises, after the last event.
    """
    from queue import SimpleQueue

    from llama_loader.concurrency import Background

    events: SimpleQueue[Event | None] = SimpleQueue()
    over: list[None] = []

    def sink(event: Event) -> None:
        if over:
            raise KeyboardInterrupt  # the work cleans up as after Ctrl-C
        events.put(event)

    def run() -> _Result:
        try:
            return work(sink)
        finally:
            events.put(None)

    working = Background(run)
    try:
        while (event := events.get()) is not None:
            yield event
        return working.result()
    finally:
        over.append(None)


class Timeline:
    """What the way to the first token cost, in the order of the work.

    The stages are resolve (facts, manifest, choice), fetch, unpack, verify, devices, start (until
    the model is loaded) and first token. A stage that was not needed is not there.
    """

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

    def as_json(self) -> list[dict[str, object]]:
        """Return the stages as plain data: name, seconds, size in bytes or null."""
        return [
            {"name": one.name, "seconds": round(one.seconds, 4), "size": one.size}
            for one in self.stages
        ]
