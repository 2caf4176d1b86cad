"""Build a set twice from nothing and compare every byte; ``farm.rebuild`` uses the comparison too.

Neither build uses a compiler cache or changes the checkout's own trees and journal. Files that
differ are kept, and diffoscope explains them if that program is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from farm import durable, pipeline, release
from farm.errors import BuildError, PackError
from farm.execute import execute
from farm.kept import fill
from farm.options import require_known
from farm.pack import ROOT
from farm.plan import BuildPlan
from farm.request import ENGINES, choose_source, resolve
from farm.tarball import archive
from farm.terminal.progress import BUILT, Fleet
from llama_loader import cgroups

if TYPE_CHECKING:
    from collections.abc import Callable

    from farm.options import BuildRequest
    from farm.plan import Engine, Toolchain
    from farm.targets import ArchSet, Line
    from farm.terminal.progress import BuildReport

KEPT: Final = pipeline.STATE / "reproducible"
"""Both versions of the files that differ, for a person to look at."""
REPORT: Final = "diffoscope.txt"
_LOGS: Final = pipeline.STATE / "logs"
_SIDES: Final = ("first", "second")
_DIFFOSCOPE: Final = "diffoscope"
_DIFFOSCOPE_SECONDS: Final = 600
_DIFFERENT: Final = 1
"""diffoscope's exit status when it did its work and found differences."""


def prove(request: BuildRequest, report: BuildReport) -> None:
    """Build each set of a request twice and compare the tarballs.

    Args:
        request: what to build; its ``jobs`` is for the first build, the second has one more.
        report: shows the progress.

    Raises:
        UsageError: the request names something that does not exist or cannot be built.
        BuildError: ``NOT_REPRODUCIBLE``: the files that differ were reported; or a step failed.
        EngineError: the engine is out of reach or went away.
    """
    require_known("ENGINE_UNKNOWN", "--engine", request.engine, ENGINES[:-1])
    line, sets = resolve(request)
    if line is None:
        with closing(pipeline.choose_engine(request, line, report)) as engine:
            line = pipeline.settled(engine, request, line, report)
    elif request.engine != "local" and request.image is None:
        request = replace(pipeline.with_image(request, line.name, report), line=line.name)
    differing = [one.name for one in sets if not _is_same_twice(request, line, one, report)]
    if differing:
        raise BuildError(
            "NOT_REPRODUCIBLE",
            f"two builds are not the same: {', '.join(differing)}",
            hint=f"the files that differ are listed above; both sides are in {KEPT}",
        )


def _is_same_twice(
    request: BuildRequest, line: Line, arch_set: ArchSet, report: BuildReport
) -> bool:
    key = f"{line.name}-{arch_set.name}"
    jobs = request.jobs or cgroups.processors()
    with tempfile.TemporaryDirectory(prefix="llama-farm-twice-") as name:
        first, second = (
            _built(replace(request, jobs=jobs + more, cached=False), line, arch_set, report, folder)
            for more, folder in enumerate(Path(name) / side for side in _SIDES)
        )
        found = compare(first, second, KEPT / key, report.say)
    if not found:
        report.say(f"identical: {key}, twice the same bytes")
    return not found


def _built(
    request: BuildRequest, line: Line, arch_set: ArchSet, report: BuildReport, folder: Path
) -> Path:
    """Build a set into a folder of its own; return the tarball, in a folder beside it."""
    report.say(
        f"{line.name}-{arch_set.name}: {folder.name} build, -j {request.jobs}, no compiler cache"
    )
    folder.mkdir()
    with closing(pipeline.choose_engine(request, line, report)) as engine:
        settled = pipeline.settled(engine, request, line, report)
        plan = BuildPlan(arch_set, settled, choose_source(request))
        clean_tree(plan, engine, request, report, folder)
    return release.pack_tree(folder, folder.with_name(f"{folder.name}-out"), arch_set.format)


def clean_tree(
    plan: BuildPlan,
    engine: Engine,
    request: BuildRequest,
    report: BuildReport,
    folder: Path,
    *,
    told: Callable[[Toolchain], Toolchain] = lambda toolchain: toolchain,
) -> None:
    """Build a plan into ``folder``, as a kept tree: ``bin``, ``licenses``, ``BUILD.json``.

    Args:
        plan: what to build.
        engine: where; it must not use a compiler cache.
        request: the options.
        report: shows the progress.
        folder: an existing, empty folder.
        told: the facts about the compilers for the record.

    Raises:
        BuildError: a step failed.
        EngineError: the engine is out of reach or went away.
    """
    # one build as the only set of a table; it is no run whose times are kept
    with Fleet(report, {plan.key: None}, many=False) as fleet:
        fleet.begin(plan.key, engine.name)
        reporter = partial(fleet.hear, plan.key)
        with execute(plan, engine, logs=_LOGS / folder.name, reporter=reporter) as built:
            toolchain = told(built.toolchain)
            build_json, licences = pipeline.recorded(plan, toolchain, built.cub, request, report)
            fill(folder, built.folder, build_json, licences)
        fleet.end(plan.key, BUILT)


_FACTS: Final = ("other bytes, sha256", "mode", "time in the archive")
_Facts = tuple[str, str, str]
"""A member's sha256, mode and time, as they are shown."""


def compare(first: Path, second: Path, kept: Path, say: Callable[[str], None]) -> tuple[str, ...]:
    """Compare two release tarballs; report, keep and explain what differs.

    Args:
        first: a tarball.
        second: the other one.
        kept: the folder for both versions of what differs, and diffoscope's report; is replaced.
        say: takes one line for a person at a time.

    Returns:
        A line for each file that differs; none if the tarballs are identical.

    Raises:
        PackError: one of them is damaged, or holds what no release may.
        BuildError: diffoscope failed, or took more than ten minutes.
        OSError: a file cannot be read or written.
    """
    if durable.sha256(first) == durable.sha256(second):
        return ()
    if kept.exists():
        shutil.rmtree(kept)
    one, other = (
        _unpack(tarball, kept / side) for tarball, side in zip((first, second), _SIDES, strict=True)
    )
    found = [
        f"{path}: {what}"
        for path in sorted({*one, *other})
        if (what := _difference(one.get(path), other.get(path)))
    ]
    if not found:
        order = "members in another order" if [*one] != [*other] else "the same members"
        found = [f"{second.name}: {order}, in other compressed bytes"]
    for line in found:
        say(f"  differs: {line}")
    for path in one.keys() & other.keys():
        if one[path][0] == other[path][0]:
            for side in _SIDES:
                (kept / side / path).unlink()
    _explain(kept, say)
    return tuple(found)


def _difference(first: _Facts | None, second: _Facts | None) -> str:
    """Return how two members of one name differ, or ``""``."""
    if first is None or second is None:
        return f"only the {'second' if first is None else 'first'} has it"
    facts = zip(_FACTS, first, second, strict=True)
    return next((f"{what} {one} / {other}" for what, one, other in facts if one != other), "")


def _unpack(tarball: Path, folder: Path) -> dict[str, _Facts]:
    """Unpack a release's tarball; its members are checked as everywhere (``archive.members``)."""
    found = {}
    folder.mkdir(parents=True)
    try:
        with tarball.open("rb") as raw:
            archive_format = archive.format_of(tarball.name)
            for member in archive.members(raw, archive_format, what=tarball.name, root=ROOT):
                place = folder / member.path
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as out:
                    while block := member.stream.read(archive.BLOCK):
                        out.write(block)
                facts = (durable.sha256(place), f"{member.mode:04o}", str(member.mtime))
                found[member.path] = facts
    except archive.DAMAGE as error:
        raise PackError("ARCHIVE_DAMAGED", f"{tarball.name}: {error}") from error
    return found


def _explain(kept: Path, say: Callable[[str], None]) -> None:
    """Let diffoscope write its report on both versions, if it is installed."""
    if shutil.which(_DIFFOSCOPE) is None:
        say(
            f"note[NO_DIFFOSCOPE]: {_DIFFOSCOPE} is not installed (apt-get install "
            f"diffoscope-minimal), so nothing explains what differs; both sides are in {kept}"
        )
        return
    report = kept / REPORT
    options = ("--exclude-directory-metadata=recursive", "--text", str(report))
    sides = (str(kept / side) for side in _SIDES)
    try:
        done = subprocess.run(
            [_DIFFOSCOPE, *options, *sides],
            capture_output=True,
            text=True,
            timeout=_DIFFOSCOPE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            "DIFFOSCOPE_SLOW",
            f"diffoscope had not ended after {_DIFFOSCOPE_SECONDS} s",
            log=str(report),
        ) from error
    if done.returncode not in (0, _DIFFERENT):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BuildError("DIFFOSCOPE_FAILED", f"diffoscope: {last[0]}")
    say(f"diffoscope's report: {report}")
