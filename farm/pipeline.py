"""What `invoke build-cuda` does: request → plans → engine → trees → tarballs → manifest."""

from __future__ import annotations

import platform
import re
import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from farm import (
    PROJECT_ROOT,
    archive,
    base_image,
    build_record,
    images,
    parts,
    pins,
    release,
    source,
    targets,
    toolkit,
)
from farm.elf import version_key
from farm.engines.docker import DockerEngine, DockerImages, connect
from farm.engines.local import LocalEngine
from farm.errors import BuildError, EngineError, FarmError, UsageError
from farm.execute import execute
from farm.plan import TARGETS, BuildPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from farm.engines.base import Engine
    from farm.parts import Part, Survey
    from farm.report import BuildReport
    from farm.source import Source
    from farm.targets import ArchSet, Line

STATE: Final = PROJECT_ROOT / ".farm"
"""Trees and logs of this checkout; git ignores it."""

ENGINES: Final = ("auto", "docker", "local")

_NVCC: Final = re.compile(r"NVIDIA (\d+\.\d+)")
"""CMake's words: ``NVIDIA 13.0.88``, newer ones followed by ``with host compiler GNU 12.2.0``."""


@dataclass(frozen=True)
class BuildRequest:
    """What a person asked for, in the words of the options (DESIGN 3.6)."""

    arch_set: str | None = None
    archs: str | None = None
    line: str | None = None
    """None: the line that ``image`` is for, else ``targets.DEFAULT_LINE``."""
    engine: str = "auto"
    image: str | None = None
    toolkit: str | None = None
    ref: str | None = None
    source: Path | None = None
    format: str | None = None
    jobs: int | None = None
    out: Path = Path("dist")
    fresh: bool = False
    also: tuple[str, ...] = ()
    """Further targets of llama.cpp's build: they stay in the kept tree and are not shipped."""
    copy: Path | None = None
    """Where the tarball goes under a name of its own, too, for those who want one file."""


@dataclass(frozen=True)
class Made:
    """One tarball, and how long its build (container, compile, copying out) and packing took."""

    tarball: Path
    build_seconds: float
    pack_seconds: float


def build(request: BuildRequest, report: BuildReport) -> tuple[Made, ...]:
    """Build, pack and list everything that ``request`` names.

    A set that fails does not stop the others; it is named at the end.

    Returns:
        The tarballs that were made, one for each set that did not fail.

    Raises:
        UsageError: what is asked for does not exist or cannot be built; nothing was started.
        FarmError: a build, or the packing of one, failed.
    """
    line, sets = resolve(request)
    named = choose_source(request) if request.source or request.ref else None
    with closing(choose_engine(request, line, report)) as engine:
        if engine.name == "local":
            line = promise_of_this_host(line, report)
        tree = named or choose_source(request)
        report.say(f"source: llama.cpp b{tree.build} ({tree.short_commit}) from {tree.origin}")
        plans = [BuildPlan(arch_set, line, tree, (*TARGETS, *request.also)) for arch_set in sets]
        return _build_all(plans, engine, request, report)


def _build_all(
    plans: list[BuildPlan], engine: Engine, request: BuildRequest, report: BuildReport
) -> tuple[Made, ...]:
    made: list[Made] = []
    failures: list[FarmError] = []
    for plan in plans:
        try:
            made.append(_build_one(plan, engine, request, report))
        except (BuildError, EngineError) as error:
            failures.append(error)
            report.say(error.render())
    if made:
        manifest = release.write(request.out)
        report.say(f"manifest: {request.out / release.MANIFEST} ({manifest.release})")
    if failures:
        raise _summary(failures, len(plans))
    return tuple(made)


def make_base_image(line: str, tag: str | None, report: BuildReport, *, fresh: bool = False) -> str:
    """Make the devel image of a line from packages; returns its name.

    Raises:
        UsageError: there is no recipe for the line, or debootstrap cannot run here.
        EngineError: no engine answers, or a step failed; the log has all of its lines.
    """
    base_image.check_line(line)
    logs = STATE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"base-image-{line}.log"
    with log.open("w", encoding="utf-8", buffering=1) as stream:

        def take(text: str) -> None:
            stream.write(f"{text}\n")
            report.activity(f"base image {line}: {text}")

        report.say(f"base image for line {line}: making it, or finding it made (log: {log})")
        with closing(connect()) as client:
            images = DockerImages(client)
            made = base_image.make_base_image(images, line=line, tag=tag, fresh=fresh, log=take)
    report.say(f"image: {made.reference} ({made.id})")
    return made.reference


def resolve(request: BuildRequest) -> tuple[Line, tuple[ArchSet, ...]]:
    """Turn names into a line and sets, refusing what cannot be built.

    Raises:
        UsageError: an unknown name, a malformed option, or a combination that nvcc cannot build.
    """
    table = targets.load()
    line = table.line(request.line) if request.line else table.line_of_image(request.image)
    if request.arch_set and request.archs:
        raise UsageError("SET_AND_ARCHS", "--arch-set and --archs exclude each other")
    if request.format is not None:
        archive.require_format(request.format)
    if request.jobs is not None and request.jobs < 1:
        raise UsageError("JOBS_INVALID", f"--jobs {request.jobs} is not a positive number")
    sets = (
        (targets.custom_set(request.archs, archive_format=request.format),)
        if request.archs is not None
        else table.resolve(request.arch_set or "zerogpu")
    )
    if request.copy is not None and len(sets) > 1:
        raise UsageError("COPY_OF_SEVERAL", f"--copy is for one tarball; {len(sets)} are asked for")
    for arch_set in sets:
        targets.check_buildable(line, arch_set)
        if line.is_cuda and not arch_set.archs:
            raise UsageError(
                "SET_HAS_NO_CUDA",
                f"set {arch_set.name} holds no CUDA code",
                hint="invoke build-cpu builds it",
            )
    if request.format is None:
        return line, sets
    return line, tuple(msgspec.structs.replace(s, format=request.format) for s in sets)


def choose_source(request: BuildRequest) -> Source:
    """Return the source that ``--ref`` or ``--source`` names, else the pinned archive.

    Raises:
        UsageError: both are given, or the ref does not exist.
        SourceError: it cannot be had, or is not what its pin says.
    """
    if request.ref and request.source:
        raise UsageError("REF_AND_SOURCE", "--ref and --source exclude each other")
    if request.ref:
        return source.from_ref(request.ref)
    if request.source:
        return source.from_folder(request.source)
    return source.from_archive(pins.load().source)


def choose_engine(request: BuildRequest, line: Line, report: BuildReport) -> Engine:
    """Return the engine that was asked for; ``auto`` takes docker where one answers, else local.

    Raises:
        UsageError: there is no such engine.
        EngineError: it was asked for by name and does not answer.
    """
    if request.engine not in ENGINES:
        raise UsageError(
            "ENGINE_UNKNOWN",
            f"--engine {request.engine!r}",
            hint=f"it is one of {', '.join(ENGINES)}",
        )
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
    return DockerEngine(client, reference=reference, jobs=request.jobs)


def _reference(request: BuildRequest, line: Line, report: BuildReport) -> str:
    """Return the devel image by its digest where its tag is pinned, else as it was asked for."""
    pinned = pins.load()
    if request.image is None:
        return pinned.image(line.image).reference
    known = {pin.tag: pin.reference for pin in pinned.images}
    if request.image not in known and "@sha256:" not in request.image:
        report.note(
            f"note[IMAGE_NOT_PINNED]: {request.image} has no digest in build/pins.toml; BUILD.json "
            "records the one that is used"
        )
    return known.get(request.image, request.image)


def promise_of_this_host(line: Line, report: BuildReport) -> Line:
    """Let a local build need this host's glibc; the line promises that of its devel image."""
    host = platform.libc_ver()[1]
    if not host or version_key(host) <= version_key(line.glibc):
        return line
    report.note(
        f"note[GLIBC_OF_THIS_HOST]: line {line.name} promises glibc {line.glibc}; what is built "
        f"here may need up to {host}, and the manifest says what it needs"
    )
    return msgspec.structs.replace(line, glibc=host)


def _local(request: BuildRequest, line: Line) -> LocalEngine:
    if request.image:
        raise UsageError("IMAGE_WITHOUT_DOCKER", "--image needs the docker engine")
    if not line.is_cuda:
        return LocalEngine(jobs=request.jobs)
    found = toolkit.locate(request.toolkit)
    if not line.accepts_toolkit(found.version):
        raise UsageError(
            "TOOLKIT_NOT_OF_LINE",
            f"line {line.name} is CUDA {line.toolkit}; the toolkit in {found.root} is "
            f"{found.version}",
            hint="choose the line of that toolkit, or point CUDA_PATH at another one",
        )
    return LocalEngine(cuda=found.root, jobs=request.jobs)


def _build_one(plan: BuildPlan, engine: Engine, request: BuildRequest, report: BuildReport) -> Made:
    logs = STATE / "logs"
    survey = parts.survey(plan.source.tree, version=plan.source.version)
    for part in survey.parts:
        if not part.licence_files:
            report.note(f"note[LICENCE_MISSING]: no licence text in the source for {part.path}")
    started = time.monotonic()
    with execute(plan, engine, logs=logs, reporter=report, fresh=request.fresh) as built:
        _check_nvcc(plan, built.toolchain.nvcc)
        found = _with_cub(survey, built.cub)
        tree = STATE / "trees" / plan.key
        _replace(built.folder, tree / "bin")
        (tree / "BUILD.json").write_bytes(
            build_record.encode(
                build_record.of(
                    plan, built.toolchain, parts=found.parts, inputs=_inputs(request, engine)
                )
            )
        )
    compiled = time.monotonic()
    _write_licences(tree / "licenses", found.texts)
    tarball = release.pack_tree(tree, request.out, plan.arch_set.format)
    if request.copy is not None:
        request.copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tarball, request.copy)
    report.say(f"packed: {tarball} ({tarball.stat().st_size / 1e6:.1f} MB)")
    return Made(tarball, compiled - started, time.monotonic() - compiled)


def _replace(new: Path, place: Path) -> None:
    if place.exists():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(new, place, symlinks=True)


def _with_cub(survey: Survey, cub: tuple[Part, bytes] | None) -> Survey:
    """Add what the toolkit put into the binaries to what the source did."""
    if cub is None:
        return survey
    part, text = cub
    texts = dict.fromkeys(part.licence_files, text)
    return parts.Survey((*survey.parts, part), {**survey.texts, **texts})


def _check_nvcc(plan: BuildPlan, nvcc: str | None) -> None:
    """Refuse what another toolkit made than the line promises: another driver may be needed."""
    version = _NVCC.match(nvcc or "")
    if plan.line.is_cuda and not (version and plan.line.accepts_toolkit(version[1])):
        raise BuildError(
            "TOOLKIT_NOT_OF_LINE",
            f"line {plan.line.name} is CUDA {plan.line.toolkit}; nvcc of the image is {nvcc}",
            hint="--line names the line of that image",
        )


def _inputs(request: BuildRequest, engine: Engine) -> dict[str, str]:
    """Return the digests of pinned files that neither the source nor an image's digest covers."""
    if engine.name == "docker":
        return {images.BUILDER_DOCKERFILE.name: images.builder_sha256()}
    if request.toolkit != toolkit.WHEELS:
        return {}
    return {pin.filename: pin.sha256 for pin in pins.load().toolkit_of(toolkit.WHEELS_LINE)}


def _write_licences(folder: Path, texts: Mapping[str, bytes]) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text)


def _summary(failures: list[FarmError], asked: int) -> FarmError:
    if asked == 1:
        return failures[0]
    return BuildError(
        "SETS_FAILED",
        f"{len(failures)} of {asked} sets failed; the others are built",
        hint="each one's error stands above",
        log=failures[0].log,
    )
