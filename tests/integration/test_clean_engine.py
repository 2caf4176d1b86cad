"""`invoke clean` and a real engine: what is the farm's goes, what is another's or in use stays."""

import io
import secrets
from collections.abc import Iterator

import pytest
from docker import DockerClient

from farm.engines.docker import inventory as engine
from farm.engines.docker.inventory import LABEL, make_volume
from tests.rigs.archives import Entry, tar

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]


def _import(client: DockerClient, name: str, *, labelled: bool = True) -> str:
    """Make an image of one small file; returns its name with the tag."""
    packed = io.BytesIO(tar([Entry(name, secrets.token_bytes(100_000))]))
    told = {LABEL: "base"} if labelled else {}
    return engine.DockerImages(client).import_root(packed, f"{name}:1", told).reference


@pytest.fixture
def names(client: DockerClient) -> Iterator[tuple[str, str]]:
    """Names of this test's own, for an image and a volume; nothing of them stays."""
    mark = secrets.token_hex(4)
    image, volume = f"clean-test-{mark}", f"clean-test-{mark}"
    yield image, volume
    for one in client.containers.list(all=True, ignore_removed=True):
        if mark in one.name:
            one.remove(force=True)
    for name in (f"{image}:1", f"another-{image}:1"):
        if client.images.list(name):
            client.images.remove(name)
    for found in client.volumes.list(filters={"name": volume}):
        found.remove()


def _clean(client: DockerClient, names: tuple[str, str]) -> dict[str, str]:
    image, volume = names
    mark = image.rpartition("-")[2]
    found = engine.stored(client, volume=volume, images=(image,))
    return {one.name: one.remove() for one in found if mark in one.name}


def test_clean_removes_the_farms_image_and_volume_and_no_one_elses(
    client: DockerClient, names: tuple[str, str]
) -> None:
    image, volume = names
    ours, others = _import(client, image), _import(client, f"another-{image}")
    for name in (volume, f"{volume}-0123456789abcdef"):  # and that of a source of its own
        make_volume(client, name)
    sizes = {one.name: one.size for one in engine.stored(client, volume=volume, images=(image,))}
    assert sizes[f"image {ours}"] >= 100_000
    volumes = {f"volume {volume}": "", f"volume {volume}-0123456789abcdef": ""}
    assert _clean(client, names) == {f"image {ours}": "", **volumes}
    assert client.images.list(ours) == []
    assert client.images.list(others), "a person's image inherits the label of ours"
    assert client.volumes.list(filters={"name": volume}) == []


def test_clean_leaves_what_has_our_name_and_not_our_label(
    client: DockerClient, names: tuple[str, str]
) -> None:
    image, volume = names
    theirs = _import(client, image, labelled=False)
    client.volumes.create(volume)
    (told,) = _clean(client, names).values()
    assert f"docker volume rm {volume}" in told
    assert client.images.list(theirs)
    assert client.volumes.list(filters={"name": volume})


def test_clean_leaves_what_a_container_uses_and_removes_ended_containers_of_the_farm(
    client: DockerClient, names: tuple[str, str], base_image: str
) -> None:
    image, volume = names
    ours = _import(client, image)
    make_volume(client, volume)
    mark = image.rpartition("-")[2]
    run, ended = (f"{LABEL}-cpu-cpu-{number}-{mark}" for number in (1, 2))
    for name in (run, ended, f"{image}-theirs"):  # theirs has its image's label
        base = base_image if name == run else ours
        made = client.containers.create(
            base, ["cat"], name=name, labels={LABEL: "cpu-cpu"}, stdin_open=True,
            volumes=[f"{volume}:/v"],
        )  # fmt: skip
        if name == run:
            made.start()
    told = _clean(client, names)
    assert told.pop(f"container {ended}") == ""
    assert "uses it" in told.pop(f"container {run}")
    assert set(told) == {f"image {ours}", f"volume {volume}"}
    assert all(told.values()), told
    left = client.containers.list(all=True, filters={"name": mark}, ignore_removed=True)
    assert {one.name for one in left} == {run, f"{image}-theirs"}
    assert client.images.list(ours)
    assert client.volumes.list(filters={"name": volume})
