"""Container images as the farm sees them: facts, and what an engine's image store can do."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Final, Protocol

from farm import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BUILDER_DOCKERFILE: Final = PROJECT_ROOT / "build" / "images" / "builder.Dockerfile"
"""What is put on top of every devel image."""


def builder_sha256() -> str:
    """Return the digest of ``builder.Dockerfile``, for BUILD.json."""
    return hashlib.sha256(BUILDER_DOCKERFILE.read_bytes()).hexdigest()


@dataclass(frozen=True)
class ImageFacts:
    """An image that the engine has. ``id`` is the digest of its configuration."""

    id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""


class ImageStore(Protocol):
    """The images of one engine; ``farm.engines.docker.DockerImages`` is the real one."""

    def find(self, tag: str) -> ImageFacts | None:
        """Return what the engine has under ``tag``, None where it has nothing."""

    def import_root(self, tar: IO[bytes], tag: str, labels: Mapping[str, str]) -> ImageFacts:
        """Make an image of one layer from a root file system's tar stream."""

    def build(
        self,
        context: IO[bytes],
        tag: str,
        *,
        buildargs: Mapping[str, str],
        labels: Mapping[str, str],
        log: Callable[[str], None],
    ) -> ImageFacts:
        """Build an image from a tar'ed context, handing over every line as it comes."""

    def pull(self, reference: str) -> ImageFacts:
        """Pull an image from its registry."""
