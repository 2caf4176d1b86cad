"""One plan → one tree or some objects, compiled with no compiler cache, in a folder of their own.

Nothing is taken from an earlier build, and the checkout's journal and trees are left alone.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from farm import pipeline
from farm.errors import BuildError
from farm.execute import execute
from farm.pack import BUILD_RECORD, LICENCES
from farm.tarball import build_record
from farm.terminal.fleet import BUILT, Fleet, SetReporter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path, PurePath

    from farm.engines.base import Engine, LineSink, Toolchain, Workspace
    from farm.plan import BuildPlan, Layout
    from farm.request import BuildRequest
    from farm.terminal.report import BuildReport

Wanted = int | tuple[str, ...]
"""How many objects, or which."""
CUDA_OBJECTS: Final = "ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir"
"""Where CMake leaves the objects of ggml's CUDA code, below the build folder."""
LOGS: Final = pipeline.STATE / "logs"
_SHOWN: Final = 20
_STRIP: Final = 'cd "$1" && shift && for each in "$@"; do strip --strip-unneeded "$each"; done'


def tree(
    plan: BuildPlan,
    engine: Engine,
    request: BuildRequest,
    report: BuildReport,
    folder: Path,
    *,
    told: Callable[[Toolchain], Toolchain] = lambda toolchain: toolchain,
) -> Path:
    """Build a plan into ``folder``, as a kept tree: ``bin``, ``licenses``, ``BUILD.json``.

    Args:
        plan: what to build.
        engine: where; it must not use a compiler cache.
        request: what was asked for.
        report: who is told.
        folder: an existing, empty folder.
        told: what is recorded of who compiled.

    Raises:
        BuildError: a step failed.
        EngineError: the engine is out of reach or went away.
    """
    with (
        _watched(plan, engine, report) as reporter,
        execute(plan, engine, logs=LOGS / folder.name, reporter=reporter) as built,
    ):
        toolchain = told(built.toolchain)
        build_json, licences = pipeline.recorded(plan, toolchain, built.cub, request, report)
        shutil.copytree(built.folder, folder / "bin", symlinks=True)
    (folder / BUILD_RECORD).write_bytes(build_json)
    (folder / LICENCES).mkdir()
    for name, text in licences.items():
        (folder / LICENCES / name).write_bytes(text)
    return folder


@contextmanager
def _watched(plan: BuildPlan, engine: Engine, report: BuildReport) -> Iterator[SetReporter]:
    """Show this one build as the only set of a table; it is no run of which times are kept."""
    with Fleet(report, {plan.key: 0.0}, known=False, many=False) as fleet:
        fleet.begin(plan.key, engine.name)
        yield SetReporter(fleet, plan.key)
        fleet.end(plan.key, BUILT)


def record_of(folder: Path) -> build_record.BuildRecord:
    """Return the record of a tree that was built here."""
    return build_record.decode((folder / BUILD_RECORD).read_bytes(), what=str(folder))


@dataclass(frozen=True)
class Objects:
    """CUDA objects of one build: their names below ``raw`` and ``stripped``."""

    names: tuple[str, ...]
    raw: Path
    stripped: Path


def cuda_objects(
    plan: BuildPlan, engine: Engine, wanted: Wanted, report: BuildReport, folder: Path
) -> Objects:
    """Compile some of a plan's CUDA objects, and strip copies of them.

    Args:
        plan: what to build.
        engine: where; it must not use a compiler cache.
        wanted: how many, spread over all of them; or their names, such as ``norm``.
        report: who is told.
        folder: an existing, empty folder.

    Raises:
        BuildError: a step failed, or the plan has no such objects, or fewer.
        EngineError: the engine is out of reach or went away.
    """
    with _Run.opened(plan, engine, report, folder) as run:
        layout = run.workspace.layout
        configure, _ = plan.steps(layout, jobs=run.workspace.jobs)
        run.step(plan, configure.name, configure.argv)
        names = _chosen(run.listed(layout), wanted)
        chosen = replace(plan, targets=tuple(f"{CUDA_OBJECTS}/{name}" for name in names))
        _, compile_ = chosen.steps(layout, jobs=run.workspace.jobs)
        run.step(plan, compile_.name, compile_.argv)
        objects = Objects(names, folder / "raw", folder / "stripped")
        built = layout.build / CUDA_OBJECTS
        _collect(run.workspace, built, objects.raw)
        run.step(plan, "strip", ("sh", "-c", _STRIP, "sh", str(built), *names))
        _collect(run.workspace, built, objects.stripped)
    return objects


def _collect(workspace: Workspace, products: PurePath, into: Path) -> None:
    into.mkdir()
    workspace.collect(products, into)


def _chosen(names: tuple[str, ...], wanted: Wanted) -> tuple[str, ...]:
    """Take what is named, or a systematic sample: large kernels, small ones, and all between."""
    if not isinstance(wanted, int):
        by_stem = {name.rpartition("/")[2].removesuffix(".cu.o"): name for name in names}
        unknown = [name for name in wanted if name not in by_stem]
        if unknown:
            raise BuildError(
                "OBJECTS_UNKNOWN", f"the build has no CUDA object called {', '.join(unknown)}"
            )
        return tuple(by_stem[name] for name in wanted)
    if len(names) < wanted:
        raise BuildError(
            "OBJECTS_TOO_FEW", f"{wanted} CUDA objects asked for, there are {len(names)}"
        )
    return tuple(names[number * len(names) // wanted] for number in range(wanted))


@dataclass(frozen=True)
class _Run:
    """Commands in one workspace, with their log."""

    workspace: Workspace
    environment: Mapping[str, str]
    report: BuildReport
    take: LineSink
    log: Path

    @classmethod
    @contextmanager
    def opened(
        cls, plan: BuildPlan, engine: Engine, report: BuildReport, folder: Path
    ) -> Iterator[_Run]:
        """Open a workspace for a plan; the log lies in ``LOGS``."""
        log = LOGS / folder.name / f"{plan.key}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8", buffering=1) as stream:

            def take(line: str) -> None:
                stream.write(f"{line}\n")

            with engine.open(plan, take) as workspace:
                environment = plan.environment(workspace.layout, ccache_dir=None)
                yield cls(workspace, environment, report, take, log)

    def step(self, plan: BuildPlan, name: str, argv: tuple[str, ...]) -> None:
        """Run a command that must succeed; ninja's counters go to the report."""
        self.report.say(f"{plan.key} {name} …")
        tail: list[str] = []

        def take(line: str) -> None:
            self.take(line)
            tail.append(line)
            del tail[:-_SHOWN]

        status = self.workspace.run(argv, self.environment, take)
        if status != 0:
            shown = "\n".join(f"  | {line}" for line in tail)
            raise BuildError(
                "COMPILE_FAILED",
                f"{plan.key}: step {name} ended with status {status}\n{shown}",
                log=str(self.log),
            )

    def listed(self, layout: Layout) -> tuple[str, ...]:
        """Return the CUDA objects of a configured build, sorted, below ``CUDA_OBJECTS``."""
        lines: list[str] = []
        command = (layout.ninja, "-C", str(layout.build), "-t", "targets", "all")
        self.workspace.run(command, self.environment, lines.append)
        outputs = (line.partition(": ")[0] for line in lines)
        prefix = f"{CUDA_OBJECTS}/"
        found = (o.removeprefix(prefix) for o in outputs if o.startswith(prefix))
        return tuple(sorted(name for name in found if name.endswith(".cu.o")))
