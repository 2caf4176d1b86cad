"""A hundred calls in a row leave the app as it was."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import space
from gradio_client import Client

pytestmark = [pytest.mark.docker, pytest.mark.model, pytest.mark.timeout(900)]

WARM_UP, CALLS = 20, 100
ROOM = 24 * 1024**2
"""Bytes. What the allocator may keep; a leak of 250 kB in each call would be more."""


@dataclass(frozen=True)
class Use:
    """Of the app and everything that it started: processes, open files, resident bytes."""

    processes: int
    files: int
    memory: int


def used(pid: int) -> Use:
    pids = [pid, *descendants(pid)]
    files = sum(len(list(Path(f"/proc/{one}/fd").iterdir())) for one in pids)
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in pids)
    return Use(len(pids), files, pages * os.sysconf("SC_PAGE_SIZE"))


def descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return children + [one for child in children for one in descendants(child)]


def test_a_hundred_calls_leave_no_process_no_file_and_no_memory_behind(
    real_manifest: str, real_model: Path, tmp_path: Path
) -> None:
    variables = {
        **space.pinned(real_manifest),
        "gguf_path": str(real_model),
        "max_new_tokens": "3",
        "n_ctx": "512",
    }
    with space.serving(tmp_path / "home", **variables) as served:
        client = Client(served.url, verbose=False)
        with closing(client):
            for number in range(WARM_UP):
                assert client.predict(f"{number} cats", "ja", api_name="/translate") is not None
            before = used(served.pid)
            for number in range(CALLS):
                client.predict(f"{number} dogs", "ja", api_name="/translate")
            after = used(served.pid)
    assert after.processes == before.processes
    assert after.files <= before.files + 2, (before, after)
    assert after.memory <= before.memory + ROOM, (before, after)
