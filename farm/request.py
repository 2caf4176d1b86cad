"""What a person asked to be built: options → a line, sets, a source. Nothing is started here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec

from farm import source, targets
from farm.errors import UsageError
from farm.inputs import pins
from farm.tarball import archive

if TYPE_CHECKING:
    from farm.source import Source
    from farm.targets import ArchSet, Line, Targets

ENGINES: Final = ("auto", "docker", "local", "dask")
SCHEMES: Final = ("tcp", "tls", "ws", "wss")
"""What a scheduler's address may begin with; ``tcp`` where it begins with nothing."""


@dataclass(frozen=True)
class BuildRequest:
    """What a person asked for, in the words of the options (DESIGN 3.6)."""

    arch_set: str | None = None
    archs: str | None = None
    line: str | None = None
    """None: the one that the image or the local toolkit makes, else ``targets.DEFAULT_LINE``."""
    engine: str = "auto"
    image: str | None = None
    toolkit: str | None = None
    ref: str | None = None
    source: Path | None = None
    assume_build: int | None = None
    """llama.cpp's build number, by a person's word: for a source whose history does not tell it."""
    format: str | None = None
    jobs: int | None = None
    out: Path = Path("dist")
    fresh: bool = False
    cached: bool = True
    """False: no compiler cache at all is used, and none is filled."""
    also: tuple[str, ...] = ()
    """Further programs of llama.cpp that the tarball holds (``farm.additions.PROGRAMS``)."""
    define: tuple[tuple[str, str], ...] = ()
    """Further CMake definitions (``farm.additions.definitions``)."""
    this_cpu: bool = False
    """Build the CPU variants that this machine runs, and no others (``recipe.of_this_machine``)."""
    copy: Path | None = None
    """Where the tarball goes under a name of its own, too, for those who want one file."""
    scheduler: str | None = None
    workers: int | None = None
    worker_engine: str = "auto"


def resolve(request: BuildRequest) -> tuple[Line | None, tuple[ArchSet, ...]]:
    """Turn names into a line and sets, refusing what cannot be built.

    The line is None where only the image can tell it (``pipeline.settled``).

    Raises:
        UsageError: an unknown name, a malformed option, or a combination that nvcc cannot build.
    """
    table = targets.load()
    line = _line(table, request)
    if request.arch_set and request.archs:
        raise UsageError("SET_AND_ARCHS", "--arch-set and --archs exclude each other")
    if request.format is not None:
        archive.require_format(request.format)
    if request.worker_engine not in ENGINES[:-1]:
        raise UsageError(
            "ENGINE_UNKNOWN",
            f"--worker-engine {request.worker_engine!r}",
            hint="it is one of auto, docker, local",
        )
    _check_cluster(request)
    if request.jobs is not None and request.jobs < 1:
        raise UsageError("JOBS_INVALID", f"--jobs {request.jobs} is not a positive number")
    sets = (
        (targets.custom_set(request.archs, archive_format=request.format),)
        if request.archs is not None
        else table.resolve(request.arch_set or "zerogpu")
    )
    if request.copy is not None and len(sets) > 1:
        raise UsageError("COPY_OF_SEVERAL", f"--copy is for one tarball; {len(sets)} are asked for")
    require_buildable(line, sets)
    if request.format is None:
        return line, sets
    return line, tuple(msgspec.structs.replace(s, format=request.format) for s in sets)


def _line(table: Targets, request: BuildRequest) -> Line | None:
    """Return the line that the options tell; None where the image or the toolkit will."""
    if request.line is None and (request.image or request.engine == "local"):
        return table.line_of_image(request.image)
    line = table.line(request.line or targets.DEFAULT_LINE)
    if not line.image and not request.image and request.engine != "local":
        raise UsageError(
            "LINE_HAS_NO_IMAGE",
            f"line {line.name} has no devel image in build/targets.toml",
            hint=f"name one with --image, such as nvidia/cuda:{line.toolkit}.1-devel-ubuntu22.04",
        )
    return line


def require_buildable(line: Line | None, sets: tuple[ArchSet, ...]) -> None:
    """Refuse sets that a line cannot build; what only an image can tell is looked at later.

    Raises:
        UsageError: names the set, or its architecture, and the line.
    """
    for arch_set in sets:
        if line is not None:
            targets.check_buildable(line, arch_set)
        if not arch_set.archs and (line is None or line.is_cuda):
            raise UsageError(
                "SET_HAS_NO_CUDA",
                f"set {arch_set.name} holds no CUDA code",
                hint="invoke build-cpu builds it",
            )


def _check_cluster(request: BuildRequest) -> None:
    """Refuse what no cluster can be meant by."""
    if request.engine != "dask":
        given = [f"--{name}" for name in ("scheduler", "workers") if getattr(request, name)]
        if given:
            raise UsageError(
                "CLUSTER_WITHOUT_DASK",
                f"{' and '.join(given)} without --engine dask",
                hint="add --engine dask, or leave it out",
            )
    if request.scheduler is not None and not _is_address(request.scheduler):
        raise UsageError(
            "SCHEDULER_INVALID",
            f"--scheduler {request.scheduler!r} is no scheduler's address",
            hint="it is tcp://HOST:PORT, or tls://, ws://, wss://",
        )


def _is_address(text: str) -> bool:
    scheme, mark, rest = text.partition("://")
    if mark and scheme not in SCHEMES:
        return False
    try:
        parts = urlsplit(f"//{rest if mark else text}")
        return bool(parts.hostname and parts.port) and parts.netloc == parts.geturl()[2:]
    except ValueError:  # the port is no number, or there cannot be such a one
        return False


def choose_source(request: BuildRequest) -> Source:
    """Return the source that ``--ref`` or ``--source`` names, else the pinned archive.

    Raises:
        UsageError: both are given, or the ref does not exist.
        SourceError: it cannot be had, or is not what its pin says.
    """
    if request.ref and request.source:
        raise UsageError("REF_AND_SOURCE", "--ref and --source exclude each other")
    if not (request.ref or request.source):
        if request.assume_build is not None:
            raise UsageError(
                "ASSUMED_BUILD_IS_KNOWN",
                "--assume-build without --source or --ref: the pinned archive's build is known",
            )
        return source.from_archive(pins.load().source)
    found = (
        source.from_folder(request.source) if request.source else source.from_ref(request.ref or "")
    )
    if request.assume_build is None:
        return found
    return source.assume_build(found, request.assume_build)
