"""The images of one Docker engine."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, Final

import requests
from docker.errors import DockerException, ImageNotFound

from farm.engines.docker.connection import engine_errors, reason
from farm.engines.docker.inventory import labels
from farm.engines.images import PROBE, ImageFacts, ImageTools, tools_of
from farm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import docker

_PIECE: Final = 1 << 20
_PULL_HINT: Final = (
    "where the image's registry cannot be reached, `invoke base-image --line LINE` makes one from "
    "the distribution's packages; give its name with --image"
)


class DockerImages:
    """Images of one engine; see ``farm.engines.images.ImageStore``."""

    def __init__(self, client: docker.DockerClient) -> None:
        self._client = client

    def find(self, tag: str) -> ImageFacts | None:
        """Return what the engine has under ``tag``, None where it has nothing."""
        with engine_errors("ENGINE_FAILED", f"image {tag} could not be looked up"):
            try:
                return _facts(self._client.images.get(tag), tag)
            except ImageNotFound:
                return None

    def pull(self, reference: str) -> ImageFacts:
        """Pull an image from its registry.

        Raises:
            EngineError: it cannot be pulled; names it and says what to do without it.
        """
        try:
            for event in self._client.api.pull(reference, stream=True, decode=True):
                if "error" in event:
                    raise EngineError(
                        "IMAGE_UNAVAILABLE",
                        f"image {reference} cannot be pulled: {event['error']}",
                        hint=_PULL_HINT,
                    )
            return _facts(self._client.images.get(reference), reference)
        except (DockerException, requests.RequestException) as error:
            raise EngineError(
                "IMAGE_UNAVAILABLE",
                f"image {reference} cannot be pulled: {reason(error)}",
                hint=_PULL_HINT,
            ) from error

    def remove(self, reference: str) -> None:
        """Remove an image.

        Raises:
            EngineError: something uses it.
        """
        with engine_errors("ENGINE_FAILED", f"image {reference} could not be removed"):
            self._client.images.remove(reference)

    def tools(self, image: ImageFacts) -> ImageTools:
        """Ask an image what it has to build with, in a container without a network.

        Raises:
            EngineError: no container can be started from it.
        """
        with engine_errors("IMAGE_BROKEN", f"nothing can be started in image {image.reference}"):
            told = self._client.containers.run(
                image.id,
                [PROBE],
                entrypoint=["/bin/sh", "-c"],
                remove=True,
                network_mode="none",
                labels=labels("probe"),
            )
        return tools_of(image.reference, told.decode("utf-8", "replace"))

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
        """Build an image from a tar'ed context, handing over every line as it comes.

        Raises:
            EngineError: a step of the Dockerfile failed; shows its last lines.
        """
        lines: list[str] = []
        with engine_errors("ENGINE_FAILED", f"image {tag} could not be built"):
            events = self._client.api.build(
                fileobj=context,
                custom_context=True,
                tag=tag,
                buildargs=dict(buildargs),
                labels=dict(labels),
                rm=True,
                forcerm=True,
                decode=True,
            )
            for event in events:
                if "error" in event:
                    shown = "\n".join(f"  | {line}" for line in lines[-12:])
                    raise EngineError(
                        "IMAGE_BUILD_FAILED",
                        f"image {tag}: {event['error'].strip()}\n{shown}",
                        hint="a package or the network is missing inside the build container",
                    )
                new = event.get("stream", "").splitlines()
                lines += [line for line in new if line.strip()]
                for line in new:
                    log(line)
            return _facts(self._client.images.get(tag), tag)


def _facts(image: Any, reference: str) -> ImageFacts:
    return ImageFacts(id=image.id, labels=dict(image.labels), reference=reference)
