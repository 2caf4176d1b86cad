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
    from farm.targets import ArchSet, Line

ENGINES: Final = ("auto", "docker", "local", "dask")
SCHEMES: Final = ("tcp", "tls", "ws", "wss")
"""What a scheduler's address may begin with; ``tcp`` where it begins with nothing."""


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
    assume_build: int | None = None
    """llama.cpp's build number, by a person's word: for a source whose history does not tell it."""
    format: str | None = None
    jobs: int | None = None
    out: Path = Path("dist")
    fresh: bool = False
    cached: bool = True
    """False: no compiler cache at all is used, and none is filled."""
    also: tuple[str, ...] = ()
    """Further targets of llama.cpp's build: they stay in the kept tree and are not shipped."""
    copy: Path | None = None
    """Where the tarball goes under a name of its own, too, for those who want one file."""
    scheduler: str | None = None
    workers: int | None = None
    worker_engine: str = "auto"


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
