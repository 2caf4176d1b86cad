"""The compiler cache of the docker engine: real containers, gcc and ccache, a volume of our own."""

import io
import ipaddress
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import redis_server
from docker import DockerClient
from tiny_release import Person, Silent
from verbs import PROJECT, invoke

from farm import source, targets
from farm.engines import docker, shared_cache
from farm.engines.docker import DockerEngine
from farm.engines.docker import inventory as cache
from farm.engines.docker.inventory import DockerImages, cache_counters
from farm.execute import execute
from farm.inputs.images import ImageFacts
from farm.plan import BuildPlan
from farm.terminal import status
from tests.rigs.archives import Entry, tar
from tests.rigs.heard import heard

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

TINY = PROJECT / "tests" / "rigs" / "tiny_llama"
TABLE = targets.load()


@pytest.fixture
def volume(client: DockerClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a volume of the test's own in place of the farm's; nothing has made it yet."""
    name = f"llama-farm-test-{secrets.token_hex(4)}"
    monkeypatch.setattr(docker, "CACHE_VOLUME", name)
    monkeypatch.setattr(status, "CACHE_VOLUME", name)
    yield name
    for made in client.volumes.list(filters={"name": name}):
        made.remove()


def plan_of(tree: Path, *, pinned: bool = False) -> BuildPlan:
    found = replace(source.from_folder(tree), sha256="0" * 64 if pinned else None)
    return BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), found)


def build(client: DockerClient, image: str, logs: Path, person: Silent | None = None) -> None:
    docker = DockerEngine(client, reference=image)
    with execute(plan_of(TINY, pinned=True), docker, logs=logs, reporter=person or Silent()):
        pass


def counted(client: DockerClient, volume: str) -> shared_cache.Statistics:
    lines = cache_counters(client, volume)
    assert lines is not None
    return shared_cache.counted(lines)


def of_docker() -> str:
    lines = [line for line in status.caches() if "docker engine" in line]
    assert len(lines) == 1
    return lines[0].removeprefix("compiler cache, docker engine: ")


def test_a_second_container_gets_everything_from_the_volume_and_the_status_tells_it(
    client: DockerClient, base_image: str, volume: str, tmp_path: Path
) -> None:
    assert of_docker() == f"empty, no volume {volume} yet"
    build(client, base_image, tmp_path)
    first = counted(client, volume)
    build(client, base_image, tmp_path)
    found = counted(client, volume)
    # Both programs have the same main.cpp: built after one another, the second is a hit at once.
    assert first.misses >= 3
    assert found.misses == first.misses, "nothing was compiled again"
    assert found.hits == 2 * first.hits + first.misses, "every object was a hit"
    began = time.monotonic()
    told = of_docker()
    assert time.monotonic() - began < 5, "half a second on an idle machine"
    assert told.startswith(f"{found.hits} of {found.hits + found.misses} hits (")
    assert told.endswith(f"B in volume {volume}")
    assert found.size > 0
    ours = {"label": "llama-farm=cache", "volume": volume}
    assert client.containers.list(all=True, filters=ours, ignore_removed=True) == []


POISON = {
    "settings": """
file(WRITE "$ENV{CCACHE_DIR}/p.sh" "#!/bin/sh
for a; do case $a in *.cpp) sed -i s/version:/poisoned/ $a;; esac; done\nexec \\"$@\\"\n")
file(CHMOD "$ENV{CCACHE_DIR}/p.sh" PERMISSIONS OWNER_READ OWNER_EXECUTE)
file(WRITE "$ENV{CCACHE_DIR}/ccache.conf" "prefix_command = $ENV{CCACHE_DIR}/p.sh
prefix_command_cpp = $ENV{CCACHE_DIR}/p.sh\n")
""",
    "objects": """
file(WRITE /tmp/as "#!/bin/sh
for a; do case $a in *.s) sed -i s/version:/poisoned/ $a;; esac; done
exec /tmp/real \\"$@\\"\n")
execute_process(COMMAND sh -c "as=$(command -v as) && cp $as /tmp/real && rm $as && cp /tmp/as $as")
execute_process(COMMAND sh -c "chmod 755 $(command -v as || echo /usr/bin/as)")
""",
    "image": "",
}
HOSTILE = """ARG BASE
FROM ${BASE}
RUN as=$(command -v as) && cp $as /tmp/real && rm $as && printf '#!/bin/sh\\n\
for a; do case $a in *.s) sed -i "s/version: %%d/poisoned %%d/" $a;; esac; done\\n\
exec /tmp/real "$@"\\n' > $as && chmod 755 $as
"""


@pytest.fixture
def hostile_image(client: DockerClient, base_image: str) -> Iterator[str]:
    """An image with the farm's label and another assembler, and beside it its builder image.

    That has the name that the farm gives to one, and none of the tools.
    """
    store, tag = DockerImages(client), f"llama-farm-base:test-{secrets.token_hex(4)}"
    with DockerEngine(client, reference=base_image).open(plan_of(TINY), lambda _: None):
        base = store.find(base_image)
        assert base is not None

    def make(name: str, below: str, recipe: str) -> ImageFacts:
        packed = io.BytesIO(tar([Entry("Dockerfile", recipe.encode())]))
        args, labels = {"BASE": below}, {"llama-farm": "base"}
        return store.build(packed, name, buildargs=args, labels=labels, log=lambda _: None)

    builder = docker._builder_tag(make(tag, docker._builder_tag(base), HOSTILE))
    fake = make(builder, base.id, "ARG BASE\nFROM ${BASE}\n")
    yield tag
    for name in (builder, fake.id, tag):  # the name was given to another one meanwhile
        client.images.remove(name)


@pytest.mark.usefixtures("volume")
@pytest.mark.parametrize("kind", POISON)
def test_nothing_that_a_source_leaves_in_a_cache_gets_into_another_s_build(
    request: pytest.FixtureRequest, client: DockerClient, base_image: str, tmp_path: Path, kind: str
) -> None:
    """Settings: not even in the same folder. Objects: what ccache keeps is by the driver's key.

    Image: the pinned source, whose builds share a cache, was built on one of another author.
    """
    theirs = request.getfixturevalue("hostile_image") if kind == "image" else base_image
    said = []
    for name, poison in (("theirs", POISON[kind]), ("theirs", ""), ("ours", "")):
        tree = Path(shutil.copytree(TINY, tmp_path / name, dirs_exist_ok=True))
        with (tree / "CMakeLists.txt").open("a", encoding="utf-8") as file:
            file.write(poison)
        plan = plan_of(tree, pinned=kind == "image")
        docker = DockerEngine(client, reference=theirs if name == "theirs" else base_image)
        with execute(plan, docker, logs=tmp_path, reporter=Silent()) as built:
            said.append(heard([built.folder / "llama-server"]).stdout.partition(" ")[0])
    own = "version:" if kind == "settings" else "poisoned"
    assert said == [own, own, "version:"]


@pytest.mark.parametrize("kind", ["http", "file", "image"])
def test_container_of_a_source_that_is_not_pinned_has_no_shared_cache(
    request: pytest.FixtureRequest,
    client: DockerClient,
    base_image: str,
    volume: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    address = f"file:{tmp_path}" if kind == "file" else "http://farm:s3cret@127.0.0.1:9/cache/"
    monkeypatch.setenv(shared_cache.VARIABLE, address)
    plan = plan_of(TINY, pinned=kind == "image")
    image = request.getfixturevalue("hostile_image") if kind == "image" else base_image
    told: list[str] = []
    with DockerEngine(client, reference=image).open(plan, lambda _: None) as workspace:
        details = client.api.inspect_container(workspace.container.id)
        shared_cache.environment(plan.source, workspace.image, told.append)
    assert details["HostConfig"]["NetworkMode"] == "none"
    own = plan.source.cache or client.images.get(image).id.removeprefix("sha256:")[:16]
    assert [mount["Name"] for mount in details["Mounts"]] == [f"{volume}-{own}"]
    assert told[0].startswith("note[CACHE_NOT_SHARED]: ")
    assert kind != "image" or f" on {image} has a cache of its own" in told[0]


def test_without_a_builder_image_the_status_says_what_makes_one(
    client: DockerClient, volume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.volumes.create(volume)
    monkeypatch.setattr(cache, "LABEL", "llama-farm-no-such-label")
    assert of_docker() == (f"no builder image to read volume {volume} with; a build makes one")


def test_the_status_names_both_caches(client: DockerClient) -> None:
    del client
    told = invoke("status")
    assert told.returncode == 0, told.stderr
    *_, local, docker, _ = told.stdout.splitlines()
    assert local.startswith("compiler cache, local engine: ")
    assert docker.startswith("compiler cache, docker engine: ")


@pytest.fixture
def gateway(client: DockerClient) -> str:
    """This machine's address as the engine's containers see it, where the engine is here."""
    config = client.networks.get("bridge").attrs["IPAM"]["Config"][0]
    hosts = ipaddress.ip_network(config["Subnet"]).hosts()
    return str(config.get("Gateway") or next(hosts))


@pytest.mark.parametrize("kind", ["redis", "a folder that both mount"])
def test_what_one_engine_compiled_another_gets(
    client: DockerClient,
    base_image: str,
    volume: str,
    gateway: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Inside a container alone the folder would take everything, and be gone with it."""
    person = Person()
    with ExitStack() as ends:
        address = f"file:{tmp_path}/shared%20by%20all|umask=002"
        if kind == "redis":
            served = redis_server.serving(gateway, tmp_path, password="s3cret")
            address = ends.enter_context(served)
        monkeypatch.setenv(shared_cache.VARIABLE, address)
        build(client, base_image, tmp_path, person)
        first = counted(client, volume)
        client.volumes.get(volume).remove()  # another engine's volume, as empty as this one's
        build(client, base_image, tmp_path, person)
        second = counted(client, volume)
    assert first.misses >= 3
    assert (second.hits, second.misses) == (first.hits + first.misses, 0)
    assert remote_hits(client, volume) >= first.misses - 1, "the same main.cpp is in it twice"
    assert person.told == []
    assert kind == "redis" or any((tmp_path / "shared by all").iterdir())


def remote_hits(client: DockerClient, volume: str) -> int:
    rows = dict(line.split("\t")[:2] for line in cache_counters(client, volume) or ())
    return int(rows["remote_storage_hit"])


def test_a_storage_that_no_container_reaches_is_said_and_the_build_goes_on(
    client: DockerClient,
    base_image: str,
    volume: str,
    gateway: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = f"redis://:s3cret@{gateway}:{redis_server.free_port(gateway)}"
    monkeypatch.setenv(shared_cache.VARIABLE, address)
    person = Person()
    build(client, base_image, tmp_path, person)
    first = counted(client, volume)
    build(client, base_image, tmp_path, Person())
    assert counted(client, volume).misses == first.misses >= 3, "the volume works"
    begin, end = person.told
    assert begin.startswith("note[CCACHE_REMOTE_DOWN]: ")
    assert end.startswith("note[CCACHE_REMOTE_ERRORS]: ")
    assert "s3cret" not in begin + end
