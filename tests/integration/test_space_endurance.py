"""A hundred calls in a row leave the app as it was."""

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import space
from gradio_client import Client

pytestmark = [pytest.mark.docker, pytest.mark.model, pytest.mark.timeout(900)]

WARM_UP, ROUNDS, ROUND = 20, 4, 25
ROOM = 10 * 1024**2
"""Bytes. What an allocator may keep: a leak of 200 kB in each of the 50 calls between the two
halves would be more."""


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
            uses = [used(served.pid)]
            for number in range(ROUNDS * ROUND):
                client.predict(f"{number} dogs", "ja", api_name="/translate")
                if (number + 1) % ROUND == 0:
                    uses.append(used(served.pid))
    before, after = uses[0], uses[-1]
    assert after.processes == before.processes
    assert after.files <= before.files + 2, uses
    middle = len(uses) // 2
    early = min(use.memory for use in uses[1 : middle + 1])
    late = min(use.memory for use in uses[middle + 1 :])
    assert late <= early + ROOM, uses
