"""A running container of the farm: how it starts, what it may use, and how it ends."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final

import docker
from docker.errors import APIError, NotFound
from docker.utils.socket import frames_iter

from farm import durable
from farm.engines.docker.connection import engine_errors
from farm.errors import EngineError, SourceError
from farm.inputs.archives import unpack
from farm.inputs.images import ImageFacts
from farm.plan import CONTAINER_LAYOUT, LONGEST_LINE, LineSink, Workspace

LABEL: Final = "llama-farm"
"""The label of every container and image of ours: a person finds them with ``--filter label=…``."""
CONFLICT: Final = 409
"""The engine's answer if a container uses an object, or another process is removing it."""
_LOST: Final = "the Docker engine went away in the middle of a step"
_REMOVING_SECONDS: Final = 60
_STDIN: Final = {"stdin": 1, "stream": 1}
_MOST_PRODUCTS: Final = 8 << 30
"""Bytes of a build's products; a linker makes no library of more than 2 GiB."""
_PROCESSES, _PROCESSES_EACH = 4096, 64
"""Processes and threads of a container: at least, and for each processor. nvcc runs about ten."""
_MEMORY_PARTS: Final = 8
"""A container gets all but one of these parts of the memory: with more, the host may fail."""


@contextmanager
def running(
    client: docker.DockerClient,
    image: ImageFacts,
    key: str,
    *,
    network: str = "none",
    volumes: Mapping[str, dict[str, str]] | None = None,
) -> Iterator[DockerWorkspace]:
    """Run a container while this process runs: its only program reads from a pipe of this process.

    The engine removes it when that has ended, also of a process that is killed. The image's own
    entry point is not run. ``key`` is what the container is for, in its name and its label.

    Raises:
        EngineError: the engine is out of reach, or the image has no such program.
    """
    with contextlib.ExitStack() as stack:
        what = f"no container of image {image.reference or image.id} could be started"
        with engine_errors("ENGINE_FAILED", what):
            host = client.info()
            jobs = int(host["NCPU"])
            container = client.containers.create(
                image.id,
                entrypoint=["cat"],
                name=f"{LABEL}-{key}-{os.getpid()}-{secrets.token_hex(4)}",
                stdin_open=True,
                auto_remove=True,
                init=True,
                working_dir=str(CONTAINER_LAYOUT.build),  # the engine makes it
                network_mode=network,
                pids_limit=max(_PROCESSES, _PROCESSES_EACH * jobs),
                mem_limit=int(host["MemTotal"]) // _MEMORY_PARTS * (_MEMORY_PARTS - 1),
                labels={LABEL: key},
                volumes=dict(volumes or {}),
            )
            stack.enter_context(_closing(container.attach_socket(params=_STDIN)))
            stack.enter_context(_removing(container))
            container.start()
        yield DockerWorkspace(
            container=container, layout=CONTAINER_LAYOUT, jobs=jobs, image=image, ccache_dir=None
        )


def is_named_by_us(container: Any) -> bool:
    """Return whether a container with our label has a name of the form that ``running`` gives."""
    form = rf"{LABEL}-{re.escape(container.labels[LABEL])}-[0-9]+-[0-9a-f]{{8}}"
    return re.fullmatch(form, container.name) is not None


def remove_container(container: Any) -> None:
    """Remove a container and its own volumes, also while it runs."""
    what = f"container {container.name} could not be removed"
    with engine_errors("ENGINE_FAILED", what), suppress(NotFound):
        try:
            container.remove(force=True, v=True)
        except APIError as error:
            if error.status_code != CONFLICT:
                raise
            container.wait(timeout=_REMOVING_SECONDS, condition="removed")  # the engine is at it


@contextmanager
def _removing(container: Any) -> Iterator[None]:
    """Remove a container on every exit.

    If the engine has failed, its error is reported; the next run removes the container.
    """
    failed = False
    try:
        yield
    except EngineError:
        failed = True
        raise
    finally:
        with contextlib.suppress(EngineError) if failed else contextlib.nullcontext():
            remove_container(container)


@dataclass
class DockerWorkspace(Workspace):
    """A running container that contains the source."""

    container: Any

    def run(self, argv: tuple[str, ...], environment: Mapping[str, str], sink: LineSink) -> int:
        """Run one command in the container."""
        api = self.container.client.api
        with engine_errors("ENGINE_LOST", _LOST):
            execution = api.exec_create(
                self.container.id,
                list(argv),
                environment=dict(environment),
                workdir=str(self.layout.build),
            )["Id"]
            stream = api.exec_start(execution, socket=True)
        # Outside of the engine's errors: a log that cannot be written is no engine's fault.
        with _closing(stream):
            frames = frames_iter(stream, tty=False)  # type: ignore[no-untyped-call]
            _split_lines(_guarded((data for _, data in frames), _LOST), sink)
        with engine_errors("ENGINE_LOST", _LOST):
            status = api.exec_inspect(execution)["ExitCode"]
        if status is None:
            raise EngineError("ENGINE_LOST")
        return int(status)

    def collect(self, products: PurePath, into: Path) -> None:
        """Copy a folder out of the container, links as links. The container is paused from now on.

        Raises:
            EngineError: ``ENGINE_LOST``: the engine or the container went away.
            PackError: ``WRITE_FAILED``: the disk is full here.
            SourceError: ``ARCHIVE_UNSAFE``: the folder has what no build leaves.
        """
        what = "the products could not be copied out"
        with engine_errors("ENGINE_LOST", what):
            self.container.pause()  # what a build left running changes nothing while it is read
            stream, _ = self.container.get_archive(str(products))
        with durable.writing(into), tempfile.TemporaryFile() as spool:
            for piece in _guarded(iter(stream), what):
                if spool.tell() + len(piece) > _MOST_PRODUCTS:
                    raise SourceError("ARCHIVE_UNSAFE", name=products, error="it has no end")
                spool.write(piece)
            spool.seek(0)
            unpack(spool, into, what=str(products), mode="r:", most=_MOST_PRODUCTS)

    def end(self) -> None:
        """Remove the container and end its processes."""
        remove_container(self.container)


def _guarded(pieces: Iterator[bytes], what: str) -> Iterator[bytes]:
    """Yield the engine's items; only an error of reading them is the engine's failure."""
    while True:
        with engine_errors("ENGINE_LOST", what):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


@contextmanager
def _closing(stream: Any) -> Iterator[None]:
    """Close a socket of docker-py at the end: https://github.com/docker/docker-py/issues/2766."""
    try:
        yield
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
        if len(rest) > LONGEST_LINE:
            sink(rest)
            rest = ""
    if rest:
        sink(rest)
