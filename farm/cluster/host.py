"""The functions of a host of a cluster: name its compilers, keep the source, build one set.

All but the check of the products run in a Dask worker. A build reports its progress to the client
by events of Dask.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import socket
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from distributed import get_worker
from distributed.core import Status
from rich.console import Console

from farm import PROJECT_ROOT, pipeline, run_lock
from farm.durable import folder_digest, new_folder, remove, require_own_temporary, write_tar
from farm.errors import BuildError, EngineError, FarmError, PackError
from farm.execute import BuiltTree, execute
from farm.inputs.packages import cache_folder
from farm.options import BuildRequest
from farm.pack import ROOT, select, write
from farm.plan import BuildEngine, BuildPlan
from farm.tarball import archive
from farm.tarball.archive import TarMember
from farm.targets import Line
from farm.terminal.progress import BuildReport

TOPIC: Final = "llama-farm"
"""The topic of the events that builds send."""
_COUNT_SECONDS: Final = 1.0
_FORMAT: Final = "tar.zst"
_LEVEL: Final = 3
"""zstd level of sent products: those of the CPU set, 31.7 MB, become 8.0 MB in 0.3 s of CPU."""
_MOST_SENT, _MOST_LOG = 1 << 30, 8 << 20
"""Bytes of a packed source or set, and of a log's end, that are sent; two hosts hold them."""


class _Packed(io.BytesIO):
    """A tar that is sent to another host."""

    def write(self, content: Any) -> int:
        if self.tell() + len(content) > _MOST_SENT:
            raise PackError("SENT_TOO_LARGE", most=_MOST_SENT >> 20)
        return super().write(content)


def _farm_digest() -> str:
    """Return the sha256 of this checkout's recipe, data and code, which decide BUILD.json."""
    whole = hashlib.sha256()
    for name in ("farm/**/*.py", "build/**/*", "spaces/llama_loader/**/*.py"):
        for path in sorted(PROJECT_ROOT.glob(name)):
            if path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                whole.update(f"{path.relative_to(PROJECT_ROOT)} {content}\n".encode())
    return whole.hexdigest()


FARM: Final = _farm_digest()
"""Computed when this process began, so it is the running code's, even if the checkout changes."""


@dataclass(frozen=True)
class BuildJob:
    """One set for another host, which has the source in a folder of its own."""

    plan: BuildPlan
    request: BuildRequest
    farm: str = FARM

    @property
    def key(self) -> str:
        """The plan's key."""
        return self.plan.key


@dataclass(frozen=True)
class Outcome:
    """The result of a job: ``products`` (an archive) and its compilers, or ``failure``.

    ``sha256`` is of ``products``, computed on the host; ``line``: the promises of the host's build.
    """

    host: str
    log: bytes
    failure: FarmError | None = None
    products: bytes = b""
    sha256: str = ""
    line: Line | None = None
    built: BuiltTree | None = None


def place(worker: str) -> str:
    """Return a worker's address without its protocol; a number for one of this process."""
    scheme, _, where = worker.rpartition("://")
    return f"worker {where.rpartition('/')[2]}" if scheme == "inproc" else where


def compilers(job: BuildJob) -> str | FarmError:
    """Return the identity of a job's compilers here, or the error why this host cannot build it.

    The identity is the engine's, with a devel image's digest.
    """
    try:
        with _engine(job) as (engine, _):
            return engine.identity(job.plan)
    except FarmError as error:
        return error


@contextmanager
def _engine(job: BuildJob) -> Iterator[tuple[BuildEngine, Line]]:
    """Open this host's engine, and check that it keeps the promises of the job's line."""
    if job.farm != FARM:
        raise EngineError("FARM_DIFFERS", host=socket.gethostname())
    require_own_temporary()
    quiet, line = BuildReport(Console(quiet=True)), job.plan.line
    with closing(pipeline.choose_engine(job.request, line, quiet)) as engine:
        yield engine, pipeline.settled(engine, job.request, line, quiet, (job.plan.arch_set,))


def offer_source(digest: str, packed: bytes | None) -> bool | FarmError:
    """Keep a source, if its tar is sent; return whether this host has it, or the error.

    It appears complete or not at all, and survives restarts; a changed one is removed.
    """
    try:
        folder = _source_folder(digest)
        with run_lock.turn(folder.parent, folder.name):
            if folder.is_dir() and folder_digest(folder) != digest and (why := remove(folder)):
                return EngineError("CACHE_UNUSABLE", error=why)
            if packed is not None and not folder.is_dir():
                with (
                    new_folder(folder) as staging,
                    tarfile.open(fileobj=io.BytesIO(packed), mode="r:") as tar,
                ):
                    # Python 3.11.2 has no filter; the sender may run code here in any case
                    tar.extraction_filter = getattr(tarfile, "data_filter", None)
                    tar.extractall(staging)  # noqa: S202
            return folder.is_dir()
    except (OSError, tarfile.TarError, BuildError) as error:
        return EngineError("CACHE_UNUSABLE", error=error)


def pack_folder(folder: Path) -> bytes:
    """Return a folder as a tar, without ``.git`` and without owners."""
    packed = _Packed()
    write_tar(packed, {path.name: path for path in sorted(folder.iterdir())})
    return packed.getvalue()


def pack_products(folder: Path, programs: tuple[str, ...]) -> bytes:
    """Return what a tarball holds of a build's ``bin``, packed as releases are."""
    packed = _Packed()
    write(packed, _FORMAT, select(folder, programs), {}, programs, level=_LEVEL)
    return packed.getvalue()


def build(job: BuildJob) -> Outcome:
    """Build a set on this host; every expected failure is an outcome, not an exception."""
    with tempfile.TemporaryDirectory(prefix="llama-farm-remote-") as name:
        log = Path(name) / f"{job.key}.log"
        try:
            outcome = _build(job, log)
        except FarmError as error:
            outcome = Outcome(socket.gethostname(), b"", error)
        with log.open("ab+") as stream:  # there is none where nothing was built
            stream.seek(before := max(0, stream.tell() - _MOST_LOG))
            said = f"[{before} bytes before this were not sent]\n" if before else ""
            return replace(outcome, log=said.encode() + stream.read(_MOST_LOG))


class _Telling:
    """A reporter on a worker that informs the client; tells whether the client still waits."""

    def __init__(self, key: str) -> None:
        self._worker = get_worker()
        self._task = self._worker.get_current_task()
        self._key = key
        self._due = 0.0

    def __call__(self, what: str, *values: Any) -> None:
        """Report an event; of ninja's counter, once a second."""
        now = time.monotonic()
        if self.is_abandoned() or (what == "count" and now < self._due and values[0] != values[1]):
            return
        if what == "count":
            self._due = now + _COUNT_SECONDS
        where = place(self._worker.address)
        told = {"key": self._key, "where": where, "what": what, "values": values}
        self._worker.log_event(TOPIC, told)

    def is_abandoned(self) -> bool:
        """Whether the client cancelled this build or ended, or this worker is being ended."""
        task = self._worker.state.tasks.get(self._task)
        running = self._worker.status is Status.running
        return task is None or task.state == "cancelled" or not running


def _build(job: BuildJob, log: Path) -> Outcome:
    telling = _Telling(job.key)
    with _engine(job) as (engine, line):
        folder = _source_folder(job.plan.source.digest).resolve()
        if not folder.is_dir():
            raise EngineError("SOURCE_MISSING", host=socket.gethostname())
        tree = replace(job.plan.source, tree=folder)
        with (
            tree.private() as own,
            execute(
                replace(job.plan, line=line, source=own),
                engine,
                logs=log.parent,
                reporter=telling,
                abandoned=telling.is_abandoned,
            ) as built,
        ):
            products = pack_products(built.folder, job.plan.targets)
    return Outcome(
        host=socket.gethostname(),
        log=b"",
        products=products,
        sha256=hashlib.sha256(products).hexdigest(),
        line=line,
        built=built,
    )


def _source_folder(digest: str) -> Path:
    return cache_folder("sources") / f"sent-{digest}"


def products(outcome: Outcome) -> Iterator[TarMember]:
    """Yield the files that a host sent, read as strictly as a release's tarball.

    Raises:
        BuildError: ``PRODUCTS_DAMAGED``: they differ from what the host packed, or are no archive;
            ``PRODUCTS_UNSAFE``: no build makes such an archive.
    """
    packed, sender, empty = outcome.products, f"what {outcome.host} sent", True
    try:
        if hashlib.sha256(packed).hexdigest() != outcome.sha256:
            raise EOFError("the sha256 is another")
        for member in archive.members(io.BytesIO(packed), _FORMAT, what=sender, root=ROOT):
            empty = False
            yield member
        if empty:
            raise EOFError("there is no file in it")
    except archive.DAMAGE as error:
        raise BuildError("PRODUCTS_DAMAGED", sender=sender, error=error) from error
    except PackError as error:
        hint = "nothing of it was used; look at that host"
        raise BuildError("PRODUCTS_UNSAFE", error.message, hint=hint) from error


def unpack(outcome: Outcome, into: Path) -> None:
    """Unpack the ``products`` as the ``bin`` of a build."""
    for member in products(outcome):
        place = into / PurePosixPath(member.path).name
        with place.open("wb") as stream:
            shutil.copyfileobj(member.stream, stream)
        place.chmod(member.mode)
