"""One set, built twice from nothing, in two workspaces and with other numbers of jobs: the same?"""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from farm import pipeline, release
from farm.errors import BuildError, UsageError
from farm.plan import BuildPlan
from farm.reproduce import clean_build, diffoscope
from farm.reproduce.reproducibility import compare_tarballs, compare_trees
from farm.request import choose_source, resolve
from llama_loader import cgroups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farm.engines.base import Engine
    from farm.reproduce.clean_build import Wanted
    from farm.reproduce.reproducibility import Difference
    from farm.request import BuildRequest
    from farm.targets import ArchSet, Line
    from farm.terminal.report import BuildReport

KEPT: Final = pipeline.STATE / "reproducible"
"""What differs is kept here, for a person to look at."""
_NAMES: Final = ("first", "second")


@dataclass(frozen=True)
class Proof:
    """What was compared, how many files, and what differs."""

    what: str
    files: int
    differences: tuple[Difference, ...]


def prove(request: BuildRequest, report: BuildReport, *, objects: Wanted | None = None) -> None:
    """Build each set of a request twice and compare the files and the tarballs.

    Args:
        request: what to build; its ``jobs`` is for the first build, the second has one more.
        report: who is told.
        objects: compile only so many CUDA objects of a set, spread over all; or the named ones.

    Raises:
        UsageError: what is asked for does not exist or cannot be built.
        BuildError: ``NOT_REPRODUCIBLE``: names every file that differs, with its cause; or a step
            failed.
        EngineError: the engine is out of reach or went away.
    """
    line, sets = resolve(request)
    _check(request, sets, objects)
    if line is None:
        with closing(pipeline.choose_engine(request, line, report)) as engine:
            line = pipeline.settled(engine, request, line, report)
    elif request.engine != "local" and request.image is None:
        request = replace(pipeline.with_image(request, line.name, report), line=line.name)
    proofs = []
    for arch_set in sets:
        with tempfile.TemporaryDirectory(prefix="llama-farm-twice-") as name:
            folder = Path(name)
            trial = _Trial(arch_set, line, request, report, folder)
            proof = trial.whole() if objects is None else trial.objects(objects)
            _tell(proof, report)
            proofs.append(proof)
    differing = [proof.what for proof in proofs if proof.differences]
    if differing:
        raise BuildError(
            "NOT_REPRODUCIBLE",
            f"two builds are not the same: {', '.join(differing)}",
            hint=f"what differs stands above; both builds are in {KEPT}",
        )


def _check(request: BuildRequest, sets: tuple[ArchSet, ...], objects: Wanted | None) -> None:
    if request.engine == "dask":
        raise UsageError(
            "ENGINE_UNKNOWN",
            "--engine 'dask' spreads sets over hosts; here one set is built twice",
            hint="it is one of auto, docker, local",
        )
    for arch_set in sets:
        if objects is not None and not arch_set.archs:
            raise UsageError(
                "SET_HAS_NO_CUDA",
                f"set {arch_set.name} holds no CUDA code, so --objects has nothing to choose from",
                hint="without --objects all of it is built and compared",
            )


@dataclass(frozen=True)
class _Trial:
    """One set and where its two builds go."""

    arch_set: ArchSet
    line: Line
    request: BuildRequest
    report: BuildReport
    folder: Path

    def whole(self) -> Proof:
        """Build the set twice; compare the trees and the tarballs."""
        first, second = (
            clean_build.tree(plan, engine, request, self.report, folder)
            for plan, engine, request, folder in self._both()
        )
        tarballs = [
            release.pack_tree(tree, self.folder / f"out-{tree.name}", self.arch_set.format)
            for tree in (first, second)
        ]
        found = (*compare_trees(first, second), *compare_tarballs(*tarballs))
        return self._proof(f"{self._key}, whole", first, second, found)

    def objects(self, wanted: Wanted) -> Proof:
        """Compile some CUDA objects twice; what stripping leaves counts, as in a tarball."""
        first, second = (
            clean_build.cuda_objects(plan, engine, wanted, self.report, folder)
            for plan, engine, _, folder in self._both()
        )
        raw = compare_trees(first.raw, second.raw)
        if raw:
            files = len({difference.path for difference in raw})
            places = sorted({d.what.partition(",")[0] for d in raw})
            self.report.say(
                f"before they are stripped {files} of {len(first.names)} objects differ, in "
                f"{', '.join(places)}"
            )
        found = compare_trees(first.stripped, second.stripped)
        what = f"{self._key}, {len(first.names)} CUDA objects, stripped"
        return self._proof(what, first.stripped, second.stripped, found)

    @property
    def _key(self) -> str:
        return f"{self.line.name}-{self.arch_set.name}"

    def _both(self) -> Iterator[tuple[BuildPlan, Engine, BuildRequest, Path]]:
        """Give what each of the two builds needs; its engine is closed when the next one begins."""
        jobs = self.request.jobs or cgroups.processors()
        for number, name in enumerate(_NAMES):
            request = replace(self.request, jobs=jobs + number, cached=False)
            folder = self.folder / name
            folder.mkdir()
            self.report.say(f"{self._key}: {name} build, -j {request.jobs}, no compiler cache")
            with closing(pipeline.choose_engine(request, self.line, self.report)) as engine:
                line = pipeline.settled(engine, request, self.line, self.report)
                plan = BuildPlan(self.arch_set, line, choose_source(request))
                yield plan, engine, request, folder

    def _proof(self, what: str, first: Path, second: Path, found: tuple[Difference, ...]) -> Proof:
        if found:
            diffoscope.keep(first, second, found, KEPT / self._key, self.report.say)
        files = sum(1 for path in first.rglob("*") if path.is_file())
        return Proof(what, files, found)


def _tell(proof: Proof, report: BuildReport) -> None:
    for difference in proof.differences:
        report.say(f"  differs: {difference.render()}")
    if not proof.differences:
        report.say(f"identical: {proof.what}: {proof.files} files, twice the same bytes")
