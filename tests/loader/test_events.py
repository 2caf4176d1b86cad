"""What a sink may do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llama_loader import loader, settings
from llama_loader.events import Downloading, Event, Stage, Unpacking
from tests.rigs import archives
from tests.rigs.archives import GOOD
from tests.rigs.fault_server import FaultServer

if TYPE_CHECKING:
    from pathlib import Path


def test_installation_that_its_sink_interrupts_is_given_up_and_the_next_one_completes(
    tmp_path: Path,
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Downloading):
            raise KeyboardInterrupt

    packed, artifact = archives.release(GOOD, chunk_size=100)
    with FaultServer() as server:
        server.put(f"/{artifact.urls[0]}", packed)
        url = server.put("/manifest.json", archives.manifest(artifact))
        given = {"manifest_url": url, "store": str(tmp_path / "store"), "allow_cpu": "1"}
        wanted = settings.load(given, {})
        with pytest.raises(KeyboardInterrupt):
            loader.prepare(wanted, sink=interrupt)
        assert not (tmp_path / "store" / "runtimes" / artifact.sha256).exists()
        whole: list[Event] = []
        loader.prepare(wanted, sink=whole.append)
    assert {type(event) for event in whole} >= {Downloading, Unpacking, Stage}
    last = [event for event in whole if isinstance(event, Unpacking)][-1]
    assert last.done == last.total == artifact.unpacked_size
    assert (tmp_path / "store" / "runtimes" / artifact.sha256).is_dir()
