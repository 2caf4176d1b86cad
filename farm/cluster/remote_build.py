"""What a host of a cluster does for one set: has the source, builds, hands the products back.

Knows nothing of what brings the job and takes the outcome (``farm/engines/dask``).
"""

from __future__ import annotations

import hashlib
import io
import socket
import tarfile
import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console

from farm import PROJECT_ROOT, pipeline
from farm.durable import new_folder
from farm.engines.watched import WatchedEngine
from farm.errors import EngineError, FarmError
from farm.execute import execute
from farm.inputs.packages import cache_folder
from farm.terminal.report import BuildReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from farm.engines.base import Toolchain
    from farm.execute import Reporter
    from farm.plan import BuildPlan
    from farm.request import BuildRequest
    from farm.tarball.parts import Part
    from farm.targets import Line


def _farm_digest() -> str:
    """Return the sha256 of this checkout's recipe, data and code, which BUILD.json speaks of."""
    whole = hashlib.sha256()
    for name in ("farm/**/*.py", "build/**/*", "spaces/llama_loader/**/*.py"):
        for path in sorted(PROJECT_ROOT.glob(name)):
            if path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                whole.update(f"{path.relative_to(PROJECT_ROOT)} {content}\n".encode())
    return whole.hexdigest()


FARM: Final = _farm_digest()
"""Taken when this process began: of the code that it runs, also where the checkout moves on."""


@dataclass(frozen=True)
class Job:
    """One set for another host. The plan's source folder means nothing there: ``source`` does."""

    plan: BuildPlan
    source: str
    request: BuildRequest
    farm: str = FARM


@dataclass(frozen=True)
class Failure:
    """A ``FarmError`` in words, as it travels."""

    code: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.code}: {self.message}{f' ({self.hint})' if self.hint else ''}"

    @classmethod
    def of(cls, error: FarmError) -> Self:
        """Put an error into words."""
        return cls(error.code, error.message, error.hint)


@dataclass(frozen=True)
class Outcome:
    """What came of a job: ``products`` (a tar) and who made it, or ``failure``.

    ``sha256`` is of ``products``, taken on the host; ``line`` is what the host could promise.
    """

    host: str
    log: bytes
    failure: Failure | None = None
    products: bytes = b""
    sha256: str = ""
    line: Line | None = None
    toolchain: Toolchain | None = None
    seconds: dict[str, float] | None = None
    cub: tuple[Part, bytes] | None = None


def host_name() -> str:
    """Return this host's name, for people."""
    return socket.gethostname()


def source_folder(digest: str) -> Path:
    """Return where a source that was sent lies on this host."""
    return cache_folder("sources") / f"sent-{digest}"


def has_source(digest: str) -> bool:
    """Whether this host has a source; it appears whole or not at all."""
    return source_folder(digest).is_dir()


def put_source(digest: str, packed: bytes) -> None:
    """Unpack a source that was sent; one that is there already stays."""
    if has_source(digest):
        return
    with (
        new_folder(source_folder(digest)) as staging,
        tarfile.open(fileobj=io.BytesIO(packed), mode="r:") as tar,
    ):
        tar.extractall(staging, filter="data")


def offer_source(digest: str, packed: bytes | None) -> bool | Failure:
    """Take a source, if one is sent; returns whether this host has it, or why it cannot."""
    try:
        if packed is not None:
            put_source(digest, packed)
        return has_source(digest)
    except (OSError, tarfile.TarError) as error:
        return Failure("CACHE_UNUSABLE", f"the source cannot be kept there: {error}")


def pack_folder(folder: Path) -> bytes:
    """Return a folder as a tar, without ``.git`` and without owners."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            if path.name != ".git":
                tar.add(path, arcname=path.name, filter=_anonymous)
    return packed.getvalue()


def identity(request: BuildRequest, plan: BuildPlan) -> str:
    """Name what compiles a plan here: the engine's own answer, a devel image's digest included.

    Raises:
        FarmError: this host cannot build it.
    """
    quiet = BuildReport(Console(quiet=True))
    with closing(pipeline.choose_engine(request, plan.line, quiet)) as engine:
        pipeline.settled(engine, _of_the_plan(request, plan), plan.line, quiet)
        return engine.identity(plan)


def _of_the_plan(request: BuildRequest, plan: BuildPlan) -> BuildRequest:
    """Name the plan's line: this host's image or toolkit must make it, and chooses none."""
    return replace(request, line=plan.line.name)


def compilers(request: BuildRequest, plan: BuildPlan, farm: str) -> str | Failure:
    """Return this host's ``identity``, or why it cannot build: another checkout is a reason."""
    try:
        _require_same(farm)
        return identity(request, plan)
    except FarmError as error:
        return Failure.of(error)


def build(job: Job, reporter: Reporter, check: Callable[[], None]) -> Outcome:
    """Build a set on this host; every expected failure is an outcome, not an exception.

    Args:
        job: the set.
        reporter: is told how far it is.
        check: asked twice a second whether anybody waits for it; what it raises ends the build.
    """
    with tempfile.TemporaryDirectory(prefix="llama-farm-remote-") as folder:
        try:
            return _build(job, reporter, check, Path(folder))
        except FarmError as error:
            return Outcome(host_name(), _log(Path(folder), job.plan), Failure.of(error))


def _require_same(farm: str) -> None:
    if farm != FARM:
        raise EngineError(
            "FARM_DIFFERS",
            f"{host_name()} builds with another state of the farm than this checkout's",
            hint="check out the same commit there and start its worker again",
        )


def _build(job: Job, reporter: Reporter, check: Callable[[], None], folder: Path) -> Outcome:
    _require_same(job.farm)
    if not has_source(job.source):
        raise EngineError("SOURCE_MISSING", f"{host_name()} has no source {job.source[:12]}")
    quiet = BuildReport(Console(quiet=True))
    with closing(pipeline.choose_engine(job.request, job.plan.line, quiet)) as engine:
        line = pipeline.settled(engine, _of_the_plan(job.request, job.plan), job.plan.line, quiet)
        tree = replace(job.plan.source, tree=source_folder(job.source))
        plan = replace(job.plan, line=line, source=tree)
        fresh = job.request.fresh
        watched = WatchedEngine(engine, check)
        with execute(plan, watched, logs=folder, reporter=reporter, fresh=fresh) as built:
            products = pack_folder(built.folder)
    return Outcome(
        host=host_name(),
        log=_log(folder, job.plan),
        products=products,
        sha256=hashlib.sha256(products).hexdigest(),
        line=line,
        toolchain=built.toolchain,
        seconds=built.seconds,
        cub=built.cub,
    )


def _log(folder: Path, plan: BuildPlan) -> bytes:
    log = folder / f"{plan.key}.log"
    return log.read_bytes() if log.is_file() else b""


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry
