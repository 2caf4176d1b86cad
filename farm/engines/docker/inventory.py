"""The farm's images, volumes and containers in an engine, and their removal.

An image that a person builds on one of ours inherits its label, and so does a container that a
person starts from it or from any image with that label. So only an image or container under the
farm's own names is removed. Neither label nor name makes an image one that a build may trust: its
author writes both (``farm.inputs.images.is_trusted``).

Everything here raises ``EngineError`` where the engine is out of reach.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Final

import docker
from docker.errors import APIError, ImageNotFound, NotFound

from farm.engines.docker.connection import ENGINE_FAILURES, engine_errors, reason
from farm.engines.docker.container import CONFLICT, LABEL, is_named_by_us, remove_container, running
from farm.errors import EngineError
from farm.inputs.images import PROBE, ImageFacts, ImageTools, is_ours, names_digest, tools_of
from farm.plan import CACHE_CONFIG, CACHE_FOLDER

CACHE_VOLUME: Final = "llama-farm-ccache"
"""The cache of the pinned archive on trusted images; others have their owner's name appended."""
BUILDER: Final = "llama-farm-builder"
IMAGES: Final = (BUILDER, "llama-farm-base")
"""Repositories of the images that the farm makes; images of other names are never removed."""
_IN_USE: Final = frozenset({"running", "paused"})
"""A container is paused while its products are copied out."""
_SHOWN_LINES: Final = 12
_PIECE: Final = 1 << 20


def cache_counters(client: docker.DockerClient, volume: str) -> list[str] | None:
    """Return the output of ``ccache --print-stats`` for a volume, None if there is no such volume.

    A container of a builder image reads the volume, without network and read-only.

    Raises:
        EngineError: ``NO_BUILDER_IMAGE``.
    """
    with engine_errors("ENGINE_FAILED", "the compiler cache could not be read"):
        if volume not in {one.name for one in client.volumes.list()}:
            return None
        labelled = client.images.list(filters={"label": f"{LABEL}=builder"})
    builders = (_facts(one, tag) for one in labelled for tag in one.tags)
    builder = next((one for one in builders if is_ours(one, one.reference)), None)
    if builder is None:
        raise EngineError("NO_BUILDER_IMAGE", volume=volume)
    volumes = {volume: {"bind": str(CACHE_FOLDER), "mode": "ro"}}
    with running(client, builder, "cache", volumes=volumes) as workspace:
        variables = {"CCACHE_DIR": str(CACHE_FOLDER), "CCACHE_CONFIGPATH": CACHE_CONFIG}
        return workspace.ask("ccache", "--print-stats", environment=variables)


def make_volume(client: docker.DockerClient, volume: str) -> None:
    """Make the compiler cache's volume with the farm's label, unless it exists."""
    with engine_errors("ENGINE_FAILED", f"volume {volume} could not be made"):
        client.volumes.create(volume, labels={LABEL: "ccache"})


@dataclass(frozen=True)
class Stored:
    """One thing that the farm keeps, in the engine or on the disk.

    Attributes:
        name: with its kind, such as ``image llama-farm-base:bookworm``.
        size: in bytes; of a builder image, what it adds to the image below it.
        kept: why it stays; empty if it can be removed.
        delete: removes it; returns why it stays, or an empty text if it was removed.
    """

    name: str
    size: int
    kept: str
    delete: Callable[[], str]

    def remove(self) -> str:
        """Remove it from the engine; return why it was kept, or an empty text if it was removed."""
        return self.kept or self.delete()


def stored(
    client: docker.DockerClient, *, volume: str = CACHE_VOLUME, images: tuple[str, ...] = IMAGES
) -> list[Stored]:
    """Return the farm's things in the engine, in the order in which they can be removed."""
    with engine_errors("ENGINE_FAILED", "what the farm keeps in the engine could not be listed"):
        containers = client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True)
        found = []
        for one in filter(is_named_by_us, containers):
            kept = "a run of the farm uses it" if one.status in _IN_USE else ""
            remove = partial(remove_container, one)
            found.append(_thing(f"container {one.name}", 0, kept, remove))
        used = client.df()
        found += _images(client, images, used)
        sizes = {one["Name"]: one["UsageData"]["Size"] for one in used["Volumes"] or ()}
        for name in sorted(sizes):
            if name == volume or name.startswith(f"{volume}-"):
                found.append(_volume(client, name, max(sizes[name], 0)))
        return found


def _thing(name: str, size: int, kept: str, delete: Callable[[], object]) -> Stored:
    def remove() -> str:
        with engine_errors("ENGINE_FAILED", f"{name} could not be removed"), suppress(NotFound):
            try:
                delete()
            except APIError as error:
                if error.status_code != CONFLICT:
                    raise
                return "a container uses it"
        return ""

    return Stored(name, size, kept, remove)


def _images(
    client: docker.DockerClient, repositories: tuple[str, ...], used: dict[str, Any]
) -> Iterator[Stored]:
    """Yield the farm's images, newest first, so that images on top of others come first.

    The engine itself refuses to remove one that a container uses.
    """
    shared = {one["Id"]: max(one["SharedSize"], 0) for one in used["Images"] or ()}
    for image in client.images.list(filters={"label": LABEL}):
        for tag in image.tags:
            repository = tag.rpartition(":")[0]
            if repository in repositories:
                below = shared.get(image.id, 0) if repository == BUILDER else 0
                size = int(image.attrs["Size"]) - below
                # by its name: other names of it stay
                yield _thing(f"image {tag}", size, "", partial(client.images.remove, tag))


def _volume(client: docker.DockerClient, name: str, size: int) -> Stored:
    volume = client.volumes.get(name)
    users = client.containers.list(all=True, filters={"volume": name}, ignore_removed=True)
    kept = f"container {users[0].name} uses it" if users else ""
    if LABEL not in (volume.attrs.get("Labels") or {}):
        kept = f"it has no label of the farm's; `docker volume rm {name}` removes it"
    return _thing(f"volume {name}", size, kept, volume.remove)


class DockerImages:
    """The images of one engine."""

    def __init__(self, client: docker.DockerClient) -> None:
        self._client = client

    def find(self, tag: str) -> ImageFacts | None:
        """Return the engine's image ``tag``, or None."""
        with engine_errors("ENGINE_FAILED", f"image {tag} could not be looked up"):
            try:
                return _facts(self._client.images.get(tag), tag)
            except ImageNotFound:
                return None

    def pull(self, reference: str) -> ImageFacts:
        """Pull an image from its registry.

        Raises:
            EngineError: it cannot be pulled; the hint names another way.
        """
        try:
            for event in self._client.api.pull(reference, stream=True, decode=True):
                if why := event.get("error"):
                    raise EngineError("IMAGE_UNAVAILABLE", reference=reference, error=why)
            return _facts(self._client.images.get(reference), reference)
        except ENGINE_FAILURES as error:
            why = reason(error)
            raise EngineError("IMAGE_UNAVAILABLE", reference=reference, error=why) from error

    def remove(self, reference: str) -> None:
        """Remove an image; that something uses it is an error, too."""
        with engine_errors("ENGINE_FAILED", f"image {reference} could not be removed"):
            self._client.images.remove(reference)

    def tools(self, image: ImageFacts) -> ImageTools:
        """Return an image's tools, which a container without a network prints."""
        with running(self._client, image, "probe") as workspace:
            told = workspace.ask("/bin/sh", "-c", PROBE)
        return tools_of(image.reference, "\n".join(told))

    def import_root(self, tar: IO[bytes], tag: str, labels: Mapping[str, str]) -> ImageFacts:
        """Make an image of one layer from a root file system's tar stream."""
        repository, _, version = tag.partition(":")
        changes = [f'LABEL "{name}"="{value}"' for name, value in sorted(labels.items())]
        with engine_errors("ENGINE_FAILED", f"image {tag} could not be imported"):
            # An iterator: docker-py announces chunks, but requests sends a file in one piece.
            pieces = iter(lambda: tar.read(_PIECE), b"")
            self._client.api.import_image_from_stream(
                pieces, repository=repository, tag=version, changes=changes
            )
            return _facts(self._client.images.get(tag), tag)

    def build(
        self,
        context: IO[bytes],
        tag: str,
        *,
        buildargs: Mapping[str, str],
        labels: Mapping[str, str],
        log: Callable[[str], None],
    ) -> ImageFacts:
        """Build an image from a tar'ed context, and pass on every line of output.

        Raises:
            EngineError: a step of the Dockerfile failed; shows its last lines.
        """
        lines: deque[str] = deque(maxlen=_SHOWN_LINES)
        with engine_errors("ENGINE_FAILED", f"image {tag} could not be built"):
            events = self._client.api.build(
                fileobj=context,
                custom_context=True,
                tag=tag,
                buildargs=dict(buildargs),
                labels=dict(labels),
                nocache=True,  # an image's author can claim that it is the result of any step
                rm=True,
                forcerm=True,
                decode=True,
            )
            for event in events:
                if "error" in event:
                    shown = "\n".join(f"  | {line}" for line in lines)
                    raise EngineError(
                        "IMAGE_BUILD_FAILED", tag=tag, error=event["error"].strip(), shown=shown
                    )
                new = event.get("stream", "").splitlines()
                lines.extend(line for line in new if line.strip())
                for line in new:
                    log(line)
            return _facts(self._client.images.get(tag), tag)


def _facts(image: Any, reference: str) -> ImageFacts:
    """Return an image's facts.

    An image of another digest than the requested one is not found: in containerd's store an archive
    names its images as it likes.
    """
    digest = (image.attrs.get("Descriptor") or {}).get("digest")  # other stores tell none
    if digest and names_digest(reference) and reference.rpartition("@")[2] != digest:
        raise ImageNotFound(f"the engine's {reference} has the digest {digest}")
    config = image.attrs.get("Config") or {}  # an image of another program may have none
    triggers = tuple(config.get("OnBuild") or ())
    return ImageFacts(image.id, dict(config.get("Labels") or {}), reference, triggers)
