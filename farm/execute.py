"""The executor: run a plan's steps in a workspace, keep the log, return the products."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Final

from farm import durable
from farm.engines import shared_cache
from farm.errors import BuildError, EngineError
from farm.plan import BuildEngine, BuildPlan, Step, Toolchain, Workspace
from farm.tarball import parts
from farm.tarball.parts import Survey

SHOWN_LINES: Final = 20
"""How many of a failed compiler's lines the error shows; the log has them all."""
_SHOWN_WIDTH: Final = 2000
_KEPT_LINES: Final = 10 * SHOWN_LINES
"""Lines kept of the first failure, because some are blank."""
_LOOK_SECONDS: Final = 0.5
"""Seconds between two checks whether the caller still wants the build: compilers can be silent."""

_NINJA_COUNT: Final = re.compile(r"^\[([0-9]{1,9})/([0-9]{1,9})\] ")
_NINJA_FAILED: Final = re.compile(r"^FAILED: (?:\[code=\d+\] )?(.+)$")
_IDENTIFICATION: Final = re.compile(
    r"^-- The (?P<language>C|CXX|CUDA) compiler identification is (?P<name>.+)$"
)
_CUDA_PROGRAMS: Final = (
    *("bin/nvcc", "bin/cudafe++", "bin/ptxas"),
    *("bin/fatbinary", "bin/nvlink", "nvvm/bin/cicc"),
)
_HASH_PROGRAMS: Final = """
parts="cc1 cc1plus collect2 lto-wrapper lto1 as ld ar ranlib"
for name in "$@" $(for part in $parts; do g++ -print-prog-name="$part"; done); do
    path=$(command -v "$name") && echo "$(sha256sum < "$path") $name"
done
"""
"""gcc and g++ are drivers: ``cc1`` and ``cc1plus`` compile, the others do the rest."""
_HASHED: Final = re.compile(r"([0-9a-f]{64})  - (\S+)\Z")


Reporter = Callable[..., None]
"""Takes an event of a build: ``step`` and its name; ``count``, how many of ninja's edges are done,
and how many there are; ``note`` and a line that is not part of a step's progress."""


@dataclass(frozen=True)
class BuiltTree:
    """The result of a build: CMake's ``bin`` folder, the compilers, and the seconds of all steps.

    ``cub`` is the part of the toolkit that was compiled in, with its licence's text.
    """

    folder: Path
    toolchain: Toolchain
    seconds: float
    log: Path
    cub: Survey = field(default_factory=Survey)


class Log:
    """The full log of a set or an image, and what of it an error shows.

    The file is unbuffered, so that nothing is left to be written when it is closed.
    """

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self.path, self.reporter = path, reporter
        self.counts = False
        self.tail: list[str] = []
        self.failed: list[str] = []
        self.compilers: dict[str, str] = {}
        with durable.writing(path):
            self._file = durable.new_file(path)

    def write(self, line: str) -> None:
        """Write one line, or raise ``WRITE_FAILED``: the disk is full."""
        rest = f"{line}\n".encode("utf-8", "replace")
        with durable.writing(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def note(self, line: str) -> None:
        """Write an engine's line, and pass on one that a person must see."""
        self.write(line)
        if line.startswith(("note[", "warning[")):
            self.reporter("note", line)

    def take(self, line: str) -> None:
        """Write one line of a step's output; pass counts on, keep the lines for an error."""
        self.write(line)
        count = _NINJA_COUNT.match(line) if self.counts else None
        if count is not None:
            self.reporter("count", int(count[1]), int(count[2]))
            if not self.failed:
                self.tail.clear()
            return
        failed = _NINJA_FAILED.match(line)
        if failed is not None:
            if not self.failed:
                self.tail.clear()
            self.failed = [*self.failed[:1], failed[1].strip()]
            return
        identified = _IDENTIFICATION.match(line)
        if identified is not None:
            self.compilers[identified["language"]] = identified["name"]
        if len(self.failed) > 1:
            return  # the error shows the first failure; the log has those of the other compilers
        self.tail.append(line[:_SHOWN_WIDTH])
        if not self.failed:
            del self.tail[:-SHOWN_LINES]
        del self.tail[_KEPT_LINES:]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def execute(
    plan: BuildPlan,
    engine: BuildEngine,
    *,
    logs: Path,
    reporter: Reporter,
    abandoned: Callable[[], bool] | None = None,
) -> Iterator[BuiltTree]:
    """Run ``plan`` on ``engine``; the full log is ``<plan.key>.log`` in the folder ``logs``.

    The products are in a private folder that is removed when the context is left. ``abandoned`` is
    called twice a second; true if the caller has ended, which ends the step.

    Raises:
        BuildError: a step failed; shows the failing file and the compiler's last lines.
        EngineError: the engine is out of reach or went away.
        PackError: ``WRITE_FAILED``: the disk is full.
    """
    with (
        closing(Log(logs / f"{plan.key}.log", reporter)) as log,
        tempfile.TemporaryDirectory(prefix="llama-farm-") as folder,
        engine.open(plan, log.note) as workspace,
        _ended_when(abandoned, workspace),
    ):
        environment = plan.environment(workspace.layout, ccache_dir=workspace.ccache_dir)
        if workspace.ccache_dir is not None:
            environment |= shared_cache.environment(plan.source, workspace.image, log.note)
        # Before the first step: the source's own programs could answer in their place.
        told = workspace.ask(workspace.layout.cmake, "--version")
        hashed, cub = programs(plan, workspace), Survey()
        if plan.line.is_cuda and workspace.layout.cuda is not None:
            cub = parts.parse_cub(workspace.ask(*parts.cub_command(workspace.layout.cuda)))
        with shared_cache.watched(workspace, environment, log.note):
            started = time.monotonic()
            for step in plan.steps(workspace.layout, jobs=workspace.jobs):
                _run(step, plan, workspace, environment, log)
            seconds = time.monotonic() - started
        products = Path(folder) / "bin"
        products.mkdir()
        workspace.collect(workspace.layout.products, products)
        image = workspace.image
        toolchain = Toolchain(
            engine=engine.name,
            compiler=log.compilers.get("CXX", "unknown"),
            cmake=told[0].removeprefix("cmake version ") if told else "unknown",
            nvcc=log.compilers.get("CUDA") if plan.line.is_cuda else None,
            image=image.reference if image else None,
            image_digest=image.id if image else None,
            programs=hashed,
        )
        yield BuiltTree(products, toolchain, seconds, log.path, cub)


@contextmanager
def _ended_when(abandoned: Callable[[], bool] | None, workspace: Workspace) -> Iterator[None]:
    """Check in a thread whether the build is still wanted, and end its processes if not."""
    if abandoned is None:
        yield
        return
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            if abandoned():
                # if it cannot be reached here, the build cannot reach it either
                with suppress(EngineError):
                    workspace.end()
                return

    beside = threading.Thread(target=look, name=f"watch {workspace.layout.build}", daemon=True)
    beside.start()
    try:
        yield
    finally:
        over.set()
        beside.join()


def _run(
    step: Step,
    plan: BuildPlan,
    workspace: Workspace,
    environment: Mapping[str, str],
    log: Log,
) -> None:
    log.reporter("step", step.name)
    log.write(f"$ {' '.join(step.argv)}")
    log.counts = step.counts
    log.tail.clear()
    status = workspace.run(step.argv, environment, log.take)
    if status == 0:
        return
    shown = "\n".join(f"  | {line}" for line in _telling(log.tail))
    what = f" at {log.failed[0]}" if log.failed else ""
    raise BuildError(
        "COMPILE_FAILED" if step.counts else "CONFIGURE_FAILED",
        f"{plan.key}: step {step.name} ended with status {status}{what}\n{shown}",
        hint="the first error above is the one that counts",
        log=str(log.path),
    )


def _telling(lines: list[str]) -> list[str]:
    """Return the compiler's messages without the command line that ninja prints before them."""
    told = [line for line in lines if line.strip() and not line.startswith("ninja: build stopped")]
    without_command = told[1:] if len(told) > 1 and " -c " in told[0] else told
    return without_command[:SHOWN_LINES]


def programs(plan: BuildPlan, workspace: Workspace) -> dict[str, str]:
    """Return the sha256 of the programs that compile and link, by name, without missing ones."""
    layout = workspace.layout
    asked = ["gcc", "g++", layout.cmake, layout.ninja]
    if plan.line.is_cuda and layout.cuda is not None:
        asked += [str(layout.cuda / program) for program in _CUDA_PROGRAMS]
    found = map(_HASHED.match, workspace.ask("sh", "-c", _HASH_PROGRAMS, "sh", *asked))
    return {PurePath(match[2]).name: match[1] for match in found if match}
