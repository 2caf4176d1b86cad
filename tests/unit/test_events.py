"""What is told, as an iterator."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from llama_loader import loader, settings
from llama_loader.errors import IntegrityError
from llama_loader.events import Downloading, Event, Note, Sink, Stage, Unpacking, told
from tests.rigs import archives
from tests.rigs.archives import GOOD
from tests.rigs.fault_server import FaultServer

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from llama_loader.loader import Prepared

ONE, TWO = Note("ONE", "first"), Note("TWO", "second")


def test_events_come_while_the_work_goes_on() -> None:
    seen = threading.Event()

    def work(sink: Sink) -> int:
        sink(ONE)
        assert seen.wait(10)
        sink(TWO)
        return 7

    def listen() -> Generator[Event, None, int]:
        return (yield from told(work))

    events = listen()
    assert next(events) == ONE
    seen.set()
    assert next(events) == TWO
    with pytest.raises(StopIteration) as ended:
        next(events)
    assert ended.value.value == 7


def test_an_error_comes_after_the_last_event() -> None:
    def work(sink: Sink) -> None:
        sink(ONE)
        raise IntegrityError("SHA256_MISMATCH", "other bytes")

    events = told(work)
    assert next(events) == ONE
    with pytest.raises(IntegrityError, match="other bytes"):
        next(events)


def test_an_installation_that_nobody_watches_any_more_is_given_up(tmp_path: Path) -> None:
    """And the next one finds nothing in its way, and tells all of it."""
    packed, artifact = archives.release(GOOD, chunk_size=100)
    with FaultServer() as server:
        server.put(f"/{artifact.urls[0]}", packed)
        url = server.put("/manifest.json", archives.manifest(artifact))
        given = {"manifest_url": url, "store": str(tmp_path / "store"), "allow_cpu": "1"}
        wanted = settings.load(given, {})

        def install(sink: Sink) -> Prepared:
            return loader.prepare(wanted, sink=sink)

        others = set(threading.enumerate())
        events = told(install)
        while not isinstance(next(events), Downloading):
            pass
        events.close()
        for thread in set(threading.enumerate()) - others:
            while thread.ident is None:  # it was about to start when the watching ended
                time.sleep(0.01)
            thread.join(10)
        assert not (tmp_path / "store" / "runtimes" / artifact.sha256).exists()
        whole = list(told(install))
    kinds = {type(event) for event in whole}
    assert kinds >= {Downloading, Unpacking, Stage}
    last = [event for event in whole if isinstance(event, Unpacking)][-1]
    assert last.done == last.total == artifact.unpacked_size
    assert (tmp_path / "store" / "runtimes" / artifact.sha256).is_dir()
