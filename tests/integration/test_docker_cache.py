"""The compiler cache of the docker engine: real containers, gcc and ccache, a volume of our own."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import pytest
from tiny_release import Silent
from verbs import PROJECT, invoke

from farm import shared_cache, source, status_here, targets
from farm.engines.docker import DockerEngine, cache, cache_counters, engine
from farm.execute import execute
from farm.plan import BuildPlan

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from docker import DockerClient

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

TINY = PROJECT / "tests" / "rigs" / "tiny_llama"
TABLE = targets.load()


@pytest.fixture
def volume(client: DockerClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a volume of the test's own in place of the farm's; nothing has made it yet."""
    name = f"llama-farm-test-{secrets.token_hex(4)}"
    monkeypatch.setattr(engine, "CACHE_VOLUME", name)
    monkeypatch.setattr(status_here, "CACHE_VOLUME", name)
    yield name
    for made in client.volumes.list(filters={"name": name}):
        made.remove()


def build(client: DockerClient, image: str, logs: Path) -> None:
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(TINY))
    with execute(plan, DockerEngine(client, reference=image), logs=logs, reporter=Silent()):
        pass


def counted(client: DockerClient, volume: str) -> shared_cache.Statistics:
    lines = cache_counters(client, volume)
    assert lines is not None
    return shared_cache.counted(lines)


def of_docker() -> str:
    lines = [line for line in status_here.caches() if "docker engine" in line]
    assert len(lines) == 1
    return lines[0].removeprefix("compiler cache, docker engine: ")


def test_the_status_tells_hits_and_size_of_the_engine_s_volume(
    client: DockerClient, base_image: str, volume: str, tmp_path: Path
) -> None:
    assert of_docker() == f"empty, no volume {volume} yet"
    build(client, base_image, tmp_path)
    build(client, base_image, tmp_path)
    found = counted(client, volume)
    began = time.monotonic()
    told = of_docker()
    assert time.monotonic() - began < 5, "half a second on an idle machine"
    assert told.startswith(f"{found.hits} of {found.hits + found.misses} hits (")
    assert told.endswith(f" MB in volume {volume}")
    assert found.hits > 0
    assert found.size > 0
    assert client.containers.list(all=True, filters={"label": "llama-farm=cache"}) == []


def test_without_a_builder_image_the_status_says_what_makes_one(
    client: DockerClient, volume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.volumes.create(volume)
    monkeypatch.setattr(cache, "LABEL", "llama-farm-no-such-label")
    assert of_docker() == (f"no builder image to read volume {volume} with; a build makes one")


def test_the_status_names_both_caches_where_there_is_no_release(client: DockerClient) -> None:
    del client
    told = invoke("status", "--folder", "/nonexistent")
    assert told.returncode == 2
    assert told.stderr.startswith("error[RELEASE_MISSING]: /nonexistent is not a release folder")
    local, docker = told.stdout.splitlines()
    assert local.startswith("compiler cache, local engine: ")
    assert docker.startswith("compiler cache, docker engine: ")
