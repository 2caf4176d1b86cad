"""What every engine is: a place, opened for one plan, that runs commands and gives files back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path, PurePath

    from farm.inputs.images import ImageFacts
    from farm.plan import BuildPlan, Layout

LineSink = Callable[[str], None]
"""Takes one line of output, without its newline."""


@dataclass(frozen=True)
class Toolchain:
    """What compiled: goes into BUILD.json, never into a binary.

    ``image`` and ``image_digest`` are None for the local engine. ``programs`` are the sha256 of
    what did the work, by name: ``cc1plus``, ``ld``, ``cicc`` and so on.
    """

    engine: str
    compiler: str
    cmake: str
    nvcc: str | None
    image: str | None = None
    image_digest: str | None = None
    programs: dict[str, str] = field(default_factory=dict)


class Workspace(Protocol):
    """A place with the plan's source in it. Gone, with everything in it, when it is closed."""

    @property
    def layout(self) -> Layout:
        """Where things are, in the workspace's own paths."""

    @property
    def jobs(self) -> int:
        """How many compilers fit at a time."""

    @property
    def image(self) -> ImageFacts | None:
        """The devel image that it stands on, None for the local engine."""

    @property
    def ccache_dir(self) -> PurePath | None:
        """The compiler cache, None where there is none."""

    def run(self, argv: tuple[str, ...], environment: Mapping[str, str], sink: LineSink) -> int:
        """Run one command, hand over its output (stdout and stderr together) line by line.

        Returns:
            The exit status.
        """

    def collect(self, products: PurePath, into: Path) -> None:
        """Copy the folder ``products`` into the existing, empty folder ``into``."""

    def end(self) -> None:
        """End what runs here, from another thread; every later command fails."""


class Engine(Protocol):
    """Opens workspaces. Nothing of one remains after it is closed, on errors and Ctrl-C too."""

    @property
    def name(self) -> str:
        """The word for ``--engine``."""

    def identity(self, plan: BuildPlan) -> str:
        """Name what compiles ``plan``: with another answer the bytes may be others.

        Raises:
            EngineError: it is unknown, because the image or a compiler is missing.
        """

    def open(self, plan: BuildPlan, sink: LineSink) -> AbstractContextManager[Workspace]:
        """Make a workspace for ``plan`` with its source inside.

        Raises:
            EngineError: the engine or an image is out of reach.
        """

    def close(self) -> None:
        """Let go of what the engine holds open; call it when no workspace is."""
