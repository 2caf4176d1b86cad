"""The interface of every engine: open a workspace for a plan, run commands, return files."""

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
    """The compilers of a build, for BUILD.json; they are never part of a binary.

    ``image`` and ``image_digest`` are None for the local engine. ``programs``: the sha256 of each
    program by name: ``cc1plus``, ``ld``, ``cicc`` and so on.
    """

    engine: str
    compiler: str
    cmake: str
    nvcc: str | None
    image: str | None = None
    image_digest: str | None = None
    programs: dict[str, str] = field(default_factory=dict)


class Workspace(Protocol):
    """A place with the plan's source. Closing it removes it with everything in it."""

    @property
    def layout(self) -> Layout:
        """The folders and programs, as paths of the workspace."""

    @property
    def jobs(self) -> int:
        """How many compilers fit at a time."""

    @property
    def image(self) -> ImageFacts | None:
        """The devel image below it, None for the local engine."""

    @property
    def ccache_dir(self) -> PurePath | None:
        """The compiler cache's folder, or None."""

    def run(self, argv: tuple[str, ...], environment: Mapping[str, str], sink: LineSink) -> int:
        """Run one command and pass on its output (stdout and stderr together) line by line.

        Returns:
            The exit status.
        """

    def collect(self, products: PurePath, into: Path) -> None:
        """Copy the folder ``products`` into the existing, empty folder ``into``."""

    def end(self) -> None:
        """End the running command, from another thread; every later command fails."""


class Engine(Protocol):
    """Opens workspaces. A closed one leaves nothing behind, also after errors and Ctrl-C."""

    @property
    def name(self) -> str:
        """The word for ``--engine``."""

    def identity(self, plan: BuildPlan) -> str:
        """Return the identity of ``plan``'s compilers: with another one the bytes may differ.

        Raises:
            EngineError: the image or a compiler is missing.
        """

    def open(self, plan: BuildPlan, sink: LineSink) -> AbstractContextManager[Workspace]:
        """Make a workspace for ``plan`` with its source inside.

        Raises:
            EngineError: the engine or an image cannot be reached.
        """

    def close(self) -> None:
        """Close what the engine holds open, after all workspaces are closed."""
