"""A container in which one plan is built: the source goes in, commands run, products come out."""

from __future__ import annotations

import codecs
import io
import tarfile
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final

from docker.utils.socket import frames_iter

from farm import durable
from farm.engines.docker.connection import engine_errors
from farm.errors import EngineError
from farm.inputs import recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path, PurePath

    from farm.engines.base import LineSink
    from farm.engines.images import ImageFacts
    from farm.plan import Layout


@dataclass(frozen=True)
class DockerWorkspace:
    """A running container that holds the source."""

    container: Any
    layout: Layout
    jobs: int
    image: ImageFacts | None
    ccache_dir: PurePath | None

    def run(self, argv: tuple[str, ...], environment: Mapping[str, str], sink: LineSink) -> int:
        """Run one command in the container.

        Raises:
            EngineError: the engine or the container went away in the middle.
        """
        api = self.container.client.api
        with _engine():
            execution = api.exec_create(
                self.container.id,
                list(argv),
                environment=dict(environment),
                workdir=str(self.layout.build),
            )["Id"]
        with _output(api, execution) as pieces:
            # Outside of the engine's errors: a log that cannot be written is no engine's fault.
            _split_lines(pieces, sink)
        with _engine():
            status = api.exec_inspect(execution)["ExitCode"]
        if status is None:
            raise EngineError("ENGINE_LOST", "the container ended in the middle of a step")
        return int(status)

    def collect(self, products: PurePath, into: Path) -> None:
        """Copy a folder out of the container, links as links.

        Raises:
            EngineError: the engine or the container went away.
            PackError: ``WRITE_FAILED``: the disk is full here.
        """
        what = "the products could not be copied out"
        with engine_errors("ENGINE_LOST", what):
            stream, _ = self.container.get_archive(str(products))
        with durable.writing(into), tempfile.TemporaryFile() as spool:
            for piece in _guarded(iter(stream), what):
                spool.write(piece)
            spool.seek(0)
            _extract(spool, products.name, into)


_LOST: Final = "the Docker engine went away in the middle of a step"


def _engine() -> AbstractContextManager[None]:
    return engine_errors("ENGINE_LOST", _LOST)


def _guarded(pieces: Iterator[bytes], what: str) -> Iterator[bytes]:
    """Hand on what the engine sends; only reading it can be the engine's failure."""
    while True:
        with engine_errors("ENGINE_LOST", what):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


@contextmanager
def _output(api: Any, execution: str) -> Iterator[Iterator[bytes]]:
    """Start a command and give its output; docker-py's own stream never closes its socket."""
    with _engine():
        stream = api.exec_start(execution, socket=True)
    frames = frames_iter(stream, tty=False)  # type: ignore[no-untyped-call]
    try:
        yield _guarded((data for _, data in frames), _LOST)
    finally:
        stream._response.close()  # noqa: SLF001 - docker-py keeps the answer there


def _split_lines(pieces: Iterator[bytes], sink: LineSink) -> None:
    """Turn a stream of pieces of any size into lines."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + decoder.decode(piece)).split("\n")
        for line in lines:
            sink(line.rstrip("\r"))
    if rest:
        sink(rest)


def copy_in(container: Any, tree: Path, layout: Layout) -> None:
    """Copy a source tree and the recipe into a container, as root's and without ``.git``.

    Raises:
        EngineError: the engine or a file failed.
    """
    with (
        engine_errors("ENGINE_LOST", "the source could not be copied in"),
        tempfile.TemporaryFile() as spool,
    ):
        with tarfile.open(fileobj=spool, mode="w") as tar:
            for folder in (layout.source, layout.build):
                entry = tarfile.TarInfo(str(folder).lstrip("/"))
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            tar.add(tree, arcname=str(layout.source).lstrip("/"), filter=_without_git)
            entry = tarfile.TarInfo(str(layout.recipe).lstrip("/"))
            entry.size = len(recipe.content())
            tar.addfile(entry, io.BytesIO(recipe.content()))
        spool.seek(0)
        container.put_archive("/", spool)


def _without_git(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "/.git/" in f"/{entry.name}/":
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _extract(spool: IO[bytes], root: str, into: Path) -> None:
    """Unpack docker's archive of one folder without its first path component."""
    with tarfile.open(fileobj=spool) as tar:
        for member in tar:
            member.name = member.name.removeprefix(root).lstrip("/")
            if member.name:
                tar.extract(member, into, filter="data")
