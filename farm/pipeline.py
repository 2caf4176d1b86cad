"""Plans → engine → trees → tarballs → manifest, on one machine."""

from __future__ import annotations

import platform
import re
import time
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import msgspec

from farm import STATE_FOLDER, durable, release, targets
from farm.elf import version_key
from farm.engines.docker import DockerEngine
from farm.engines.docker.connection import connect
from farm.engines.docker.inventory import DockerImages
from farm.engines.local import LocalEngine
from farm.errors import BuildError, EngineError, FarmError, UsageError, raise_all, remark
from farm.execute import BuiltTree, Log, execute
from farm.inputs import images, pins, toolkit
from farm.kept import KeptTree, digest, times
from farm.options import BuildRequest, require_known
from farm.pack import Packed
from farm.plan import BuildEngine, BuildPlan
from farm.request import ENGINES, require_buildable
from farm.tarball import build_record, parts
from farm.targets import ArchSet, Line
from farm.terminal.progress import BUILT, FAILED, BuildReport, Fleet

STATE: Final = STATE_FOLDER
_NVCC: Final = re.compile(r"NVIDIA (\d+\.\d+)")
"""CMake's words: ``NVIDIA 13.0.88``, newer ones followed by ``with host compiler GNU 12.2.0``."""


@dataclass(frozen=True)
class Made:
    """One tarball, and how long its build (container, compile, copying out) and packing took."""

    tarball: Packed
    build_seconds: float
    pack_seconds: float


def build_all(
    plans: list[BuildPlan], engine: BuildEngine, request: BuildRequest, report: BuildReport
) -> tuple[Made, ...]:
    """Build and pack sets with one engine; one that fails does not stop the others.

    Raises:
        FarmError: sets failed; names them.
    """
    made: list[Made] = []
    failures: dict[str, FarmError] = {}
    with Fleet(report, times(plans, STATE), many=False) as fleet:
        for plan in plans:
            try:
                made.append(_build_one(plan, engine, request, fleet))
            except FarmError as error:
                fleet.end(plan.key, FAILED)
                failures[plan.key] = error
                if len(plans) > 1:  # the error of an only set is raised unchanged
                    report.say(error.render())
    return conclude(made, failures, request, report)


def conclude(
    made: list[Made], failures: dict[str, FarmError], request: BuildRequest, report: BuildReport
) -> tuple[Made, ...]:
    """Write the manifest of the tarballs; raise an error that names the sets that failed."""
    if made:
        # Runs of other sets may share the folder: the manifest lists all of its tarballs.
        manifest = release.write(request.out)
        report.say(f"manifest: {request.out / release.MANIFEST} ({manifest.release})")
    if not failures:
        return tuple(made)
    first, asked = next(iter(failures.values())), len(made) + len(failures)
    if asked == 1:
        raise first
    raise BuildError(
        "SETS_FAILED",
        count=len(failures),
        asked=asked,
        failures=", ".join(failures),
        others="; the others are built" if made else "",
        log=first.log,
    )


def make_base_image(line: str, tag: str | None, report: BuildReport, *, fresh: bool = False) -> str:
    """Make the devel image of a line from packages; returns its name.

    Raises:
        UsageError: there is no recipe for the line, or mmdebstrap is not installed.
        EngineError: no engine answers, or a step failed; the log has all of its lines.
    """
    images.check_line(line)
    place = STATE / "logs" / f"base-image-{line}.log"
    with closing(Log(place, lambda _, told: report.say(told))) as log:

        def take(text: str) -> None:
            log.note(text)
            report.activity(f"base image {line}: {text}")

        report.say(f"base image for line {line}: is made unless it exists (log: {place})")
        with closing(connect()) as client:
            store = DockerImages(client)
            made = images.make_base_image(store, line=line, tag=tag, fresh=fresh, log=take)
    report.say(f"image: {made.reference} ({made.id})")
    return made.reference


def with_image(request: BuildRequest, line: str, report: BuildReport) -> BuildRequest:
    """Name the line's pinned image if it can be pulled, else one made from packages.

    Without an engine the request is returned unchanged; ``choose_engine`` then reports it.

    Raises:
        UsageError: the image cannot be pulled, and there is no recipe for one.
        EngineError: making one failed.
    """
    try:
        client = connect()
    except EngineError:
        return request
    reference = pins.load().image(targets.load().line(line).image).reference
    try:
        with closing(client):
            store = DockerImages(client)
            found = store.find(reference) or store.pull(reference)
            return replace(request, image=found.reference)
    except EngineError as error:
        report.say(f"note[{error.code}]: {error.message}; making one from packages")
    return replace(request, image=make_base_image(line, None, report))


def choose_engine(request: BuildRequest, line: Line | None, report: BuildReport) -> BuildEngine:
    """Return the requested engine; ``auto`` takes docker if one answers, else local.

    Without a line, the engine's image or toolkit determines it (``settled``).

    Raises:
        UsageError: there is no such engine.
        EngineError: it was requested by name and does not answer.
    """
    require_known("ENGINE_UNKNOWN", "--engine", request.engine, ENGINES)
    if request.engine == "local":
        return _local(request, line)
    try:
        client = connect()
    except EngineError as error:
        if request.engine == "docker":
            raise
        report.say(f"engine: local, because {error.message}")
        return _local(request, line)
    reference = _reference(request, line, report)
    report.say(f"engine: docker, because one answers; devel image {reference}")
    return DockerEngine(client, reference=reference, jobs=request.jobs, cached=not request.fresh)


def settled(
    engine: BuildEngine,
    request: BuildRequest,
    line: Line | None,
    report: BuildReport,
    sets: tuple[ArchSet, ...],
) -> Line:
    """Return the line of a build on this engine, checked against what it builds with.

    Where a person named no line, it follows from the image or from the local toolkit.

    Raises:
        UsageError: the image or toolkit cannot make what the line promises; the error lists every
            contradiction. Or the farm has no line for it, or its nvcc cannot build one of the
            sets.
        EngineError: the image cannot be pulled, or no program can be started in it.
    """
    table = targets.load()
    if not isinstance(engine, DockerEngine):
        if line is None or line.is_cuda:
            found = toolkit.locate(request.toolkit)
            if line is None or request.line is None:
                line = table.line_of_toolkit(found.version, what=str(found.root))
            line = msgspec.structs.replace(line, codes=found.codes)
        notes: tuple[str | None, ...] = (table.unchecked(line),)
        line = promise_of_this_host(line, report)
    else:
        tools = _tools(engine, line, sets)
        report.say(f"image: {tools}")
        if line is None or (request.image and request.line is None):
            line, notes = images.line_of_tools(table, tools)
        else:
            line = msgspec.structs.replace(line, codes=tools.codes)
            notes = (table.unchecked(line),)
        raise_all(images.contradictions(line, tools))
    for note in filter(None, notes):
        report.say(note)
    require_buildable(line, sets)
    return line


def _tools(engine: DockerEngine, line: Line | None, sets: tuple[ArchSet, ...]) -> images.ImageTools:
    """Return the tools of the engine's image; if it is out of reach, the hint names another."""
    try:
        return engine.tools()
    except EngineError as error:
        name = _line_from_packages(line, sets) if error.code == "IMAGE_UNAVAILABLE" else None
        if name:
            more = "" if line and line.name == name else f"--line {name} "
            error.hint = (
                f"is its name right, and its registry in reach? Without one: invoke base-image"
                f" --line {name};"
                f" then the same command with {more}--image {images.TAGS[name]}"
            )
        raise


def _line_from_packages(line: Line | None, sets: tuple[ArchSet, ...]) -> str | None:
    """Return this line, or the newest other, that has an image from packages and builds the sets.

    None: there is none.
    """
    for name in ([line.name] if line else []) + [*reversed(images.TAGS)]:
        if name in images.TAGS:
            with suppress(UsageError):
                require_buildable(targets.load().line(name), sets)
                return name
    return None


def _reference(request: BuildRequest, line: Line | None, report: BuildReport) -> str:
    """Return the devel image by its digest if its tag is pinned, else as the person named it."""
    pinned = pins.load()
    if request.image is None:
        return pinned.image((line or targets.load().line(targets.DEFAULT_LINE)).image).reference
    known = {pin.tag: pin.reference for pin in pinned.images}
    if request.image not in known and not images.names_digest(request.image):
        report.say(remark("IMAGE_NOT_PINNED/chosen", image=request.image))
    return known.get(request.image, request.image)


def promise_of_this_host(line: Line, report: BuildReport) -> Line:
    """Return the line with this host's glibc, for a local build without the line's devel image."""
    host = platform.libc_ver()[1]
    if not host or version_key(host) <= version_key(line.glibc):
        return line
    report.say(remark("GLIBC_OF_THIS_HOST", line=line, host=host))
    return msgspec.structs.replace(line, glibc=host)


def _local(request: BuildRequest, line: Line | None) -> LocalEngine:
    if request.image:
        raise UsageError("IMAGE_WITHOUT_DOCKER")
    if line is not None and not line.is_cuda:
        return LocalEngine(jobs=request.jobs, cached=not request.fresh)
    named = line if request.line else None
    if request.toolkit == toolkit.WHEELS:  # before they are fetched
        _require_of_line(named, toolkit.wheels_version(), f"--toolkit {toolkit.WHEELS}")
    found = toolkit.locate(request.toolkit)
    _require_of_line(named, found.version, found.root)
    return LocalEngine(cuda=found.root, jobs=request.jobs, cached=not request.fresh)


def _require_of_line(line: Line | None, version: str, root: object) -> None:
    """Refuse a toolkit of another CUDA version than that of the line that was named, if any."""
    if line is not None and not line.accepts_toolkit(version):
        wheels = toolkit.shown_wheels()
        raise UsageError(
            "TOOLKIT_NOT_OF_LINE/folder", line=line, root=root, version=version, wheels=wheels
        )


def _build_one(plan: BuildPlan, engine: BuildEngine, request: BuildRequest, fleet: Fleet) -> Made:
    started, report = time.monotonic(), fleet.report
    kept = KeptTree(plan, digest(plan, engine.identity(plan)), STATE)
    if found_built(kept, report, fresh=request.fresh):
        made = pack_kept(kept, request, report, began=started)
        fleet.before(plan.key)
        return made
    fleet.begin(plan.key, engine.name)
    kept.begin()
    reporter, logs = partial(fleet.hear, plan.key), STATE / "logs"
    with execute(plan, engine, logs=logs, reporter=reporter) as built:
        keep(kept, built, request, report)
    fleet.step(plan.key, "pack")
    made = pack_kept(kept, request, report, began=started)
    fleet.end(plan.key, BUILT)
    return made


def keep(kept: KeptTree, built: BuiltTree, request: BuildRequest, report: BuildReport) -> None:
    """Keep a built tree with what accompanies it: ``BUILD.json`` and the licences' texts.

    Raises:
        BuildError: ``TOOLKIT_NOT_OF_LINE``: another nvcc compiled it than the line promises.
        PackError: ``WRITE_FAILED``.
    """
    plan = kept.plan
    survey = parts.survey(plan.source.tree, version=plan.source.version)
    for part in survey.parts:
        if not part.licence_files:
            report.say(remark("LICENCE_MISSING/source", path=part.path))
    _check_nvcc(plan, built.toolchain.nvcc)
    found = survey + built.cub
    inputs = {}  # the digests of pinned files that neither the source nor an image's digest covers
    if built.toolchain.engine == "docker":
        inputs = {images.BUILDER_DOCKERFILE.name: images.builder_sha256()}
    elif request.toolkit == toolkit.WHEELS:
        wheels = pins.load().toolkit_of(toolkit.WHEELS_LINE)
        inputs = {pin.filename: pin.sha256 for pin in wheels}
    record = build_record.of(plan, built.toolchain, parts=found.parts, inputs=inputs)
    kept.keep(built.folder, build_record.encode(record), found.texts, built.seconds)


def found_built(kept: KeptTree, report: BuildReport, *, fresh: bool) -> bool:
    """Return whether an earlier run has built this plan; print that, or that it did not finish."""
    if fresh:
        return False
    if kept.is_whole():
        report.say(f"{kept.plan.key}: built already, in an earlier run (--fresh builds it again)")
        return True
    entry = kept.entry()
    if entry.begun and entry.tree is None:
        report.say(
            f"{kept.plan.key}: resumes: an earlier run did not finish it; what the compiler cache "
            "holds is not compiled again"
        )
    return False


def pack_kept(kept: KeptTree, request: BuildRequest, report: BuildReport, *, began: float) -> Made:
    """Pack a set's tree, unless the same tarball is already in the request's folder."""
    compiled = time.monotonic()
    for left in request.out.glob(f".{kept.plan.artifact_name}.????????"):
        durable.remove(left)  # of a run that was killed while it packed; this one has the lock
    tarball = kept.packed(request.out)
    how = "packed" if tarball is None else "packed already"
    tarball = tarball or kept.pack(request.out)
    if request.copy is not None:
        tarball.copy(request.copy)
    report.say(f"{how}: {tarball.path} ({tarball.size / 1e6:.1f} MB)")
    return Made(tarball, compiled - began, time.monotonic() - compiled)


def _check_nvcc(plan: BuildPlan, nvcc: str | None) -> None:
    """Refuse a tree of another toolkit than the line's: it may need another driver."""
    version = _NVCC.match(nvcc or "")
    if plan.line.is_cuda and not (version and plan.line.accepts_toolkit(version[1])):
        raise BuildError("TOOLKIT_NOT_OF_LINE/nvcc", line=plan.line, nvcc=nvcc)
