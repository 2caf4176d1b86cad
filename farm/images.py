"""Container images as the farm sees them: facts, and what an engine's image store can do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


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
