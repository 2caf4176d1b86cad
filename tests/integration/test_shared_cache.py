"""Two machines (two caches) that share compiled objects through a real Redis server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest
from verbs import PROJECT

from farm import shared_cache, source, targets
from farm.engines.local import LocalEngine
from farm.errors import UsageError
from farm.execute import execute
from farm.plan import BuildPlan, Step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TINY = PROJECT / "tests" / "rigs" / "tiny_llama"
TABLE = targets.load()


class Silent:
    def step(self, plan: BuildPlan, step: Step) -> None: ...
    def count(self, done: int, total: int) -> None: ...
    def note(self, line: str) -> None: ...


def lacking(program: str) -> None:
    if os.environ.get("FARM_REQUIRE_ALL") == "1":
        pytest.fail(f"no {program}")
    pytest.skip(f"no {program}")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    for program in ("redis-server", "ccache"):
        if shutil.which(program) is None:
            lacking(program)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    options = ("--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(tmp_path))
    with subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.terminate()


def build(machine: Path, monkeypatch: pytest.MonkeyPatch) -> shared_cache.Statistics:
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine / "cache"))
    monkeypatch.setenv("CCACHE_DIR", str(machine / "ccache"))
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(TINY))
    with execute(plan, LocalEngine(), logs=machine, reporter=Silent()):
        found = shared_cache.statistics(machine / "ccache")
    assert found is not None
    return found


def test_what_one_machine_compiled_another_gets_from_redis(
    redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "alone"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(shared_cache.VARIABLE, redis)
    first = build(tmp_path / "one", monkeypatch)
    asked = first.hits + first.misses
    # Both programs have the same main.cpp: built after one another, the second is a hit at home.
    assert asked >= first.misses >= asked - 1 >= 3
    assert first.size > 0
    second = build(tmp_path / "two", monkeypatch)
    assert (second.hits, second.misses) == (asked, 0)
    assert remote_hits(tmp_path / "two") >= asked - 1
    monkeypatch.delenv(shared_cache.VARIABLE)
    assert build(tmp_path / "alone", monkeypatch).misses >= asked - 1


def remote_hits(machine: Path) -> int:
    told = subprocess.run(
        ["ccache", "--print-stats"],
        env={**os.environ, "CCACHE_DIR": str(machine / "ccache")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = dict(line.split("\t")[:2] for line in told.splitlines() if "\t" in line)
    return int(rows["remote_storage_hit"])


def test_an_address_that_ccache_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shared_cache.VARIABLE, "memcached://host")
    with pytest.raises(UsageError) as refused:
        shared_cache.environment()
    assert refused.value.code == "CCACHE_REMOTE_INVALID"
    assert "memcached" not in refused.value.render(), "it may hold a password"
