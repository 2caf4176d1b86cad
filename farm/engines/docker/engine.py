"""Builds in containers on top of one devel image: the source goes in, the products come out."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import os
import secrets
import tempfile
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from docker.utils.socket import frames_iter

from farm import durable
from farm.engines import shared_cache
from farm.engines.docker.connection import engine_errors
from farm.engines.docker.inventory import (
    CACHE_VOLUME,
    LABEL,
    DockerImages,
    make_volume,
    remove_container,
)
from farm.errors import EngineError, SourceError
from farm.inputs import recipe
from farm.inputs.archives import unpack
from farm.inputs.images import BUILDER_DOCKERFILE, ImageFacts, ImageTools
from farm.plan import (
    CACHE_FOLDER,
    CONTAINER_LAYOUT,
    LONGEST_LINE,
    BuildPlan,
    Layout,
    LineSink,
    Workspace,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path, PurePath

    import docker


class DockerEngine:
    """Builds in containers on top of one devel image.

    Args:
        reference: the devel image; it is pulled unless the engine has it.
        jobs: compilers at a time; the engine's processor count when None.
        cached: False compiles everything, with no compiler cache in the container.
    """

    name = "docker"

    def __init__(
        self,
        client: docker.DockerClient,
        *,
        reference: str,
        jobs: int | None = None,
        cached: bool = True,
    ) -> None:
        self._client = client
        self._reference = reference
        self._jobs = jobs
        self._cached = cached
        self._images = DockerImages(client)
        self._tools: ImageTools | None = None
        self._pulled = False

    def tools(self) -> ImageTools:
        """Return the devel image's tools; the image is probed once.

        Raises:
            EngineError: the image is missing, or no program can be started in it.
        """
        if self._tools is None:
            self._tools = self._images.tools(replace(self._base(), reference=self._reference))
        return self._tools

    def identity(self, plan: BuildPlan) -> str:
        """Return the identity of the devel image's content and of the builder image's recipe.

        Raises:
            EngineError: the image is missing, or the engine cannot be reached.
        """
        del plan  # all of a run's plans are built on one image
        return f"docker {self._base().id} {_builder_tag(self._base())}"

    @contextmanager
    def open(self, plan: BuildPlan, sink: LineSink) -> Iterator[DockerWorkspace]:
        """Start a container with the plan's source; it is removed on every exit.

        Raises:
            EngineError: the image is missing, or the engine is out of reach.
        """
        base = self._base()
        builder = self._builder_image(base, sink)
        layout = CONTAINER_LAYOUT if self._cached else replace(CONTAINER_LAYOUT, launcher="")
        if plan.line.is_cuda:
            layout = replace(layout, cuda=self.tools().cuda_root)
        with self._container(plan, builder) as container:
            _copy_in(container, plan.source.tree, layout)
            yield DockerWorkspace(
                container=container,
                layout=layout,
                jobs=self._jobs or int(self._client.info()["NCPU"]),
                image=ImageFacts(id=base.id, labels=base.labels, reference=self._reference),
                ccache_dir=CACHE_FOLDER if self._cached else None,
            )

    def close(self) -> None:
        """Close the connections to the engine."""
        self._client.close()

    def has_image(self) -> bool:
        """Whether the engine has the devel image, so that it need not be pulled.

        Raises:
            EngineError: the engine is out of reach.
        """
        return self._images.find(self._reference) is not None

    def forget_pulled(self) -> None:
        """Remove the devel image if this engine pulled it; used after a check without a build.

        Raises:
            EngineError: the engine refused, because something else uses it by now.
        """
        if self._pulled:
            self._images.remove(self._reference)

    def _base(self) -> ImageFacts:
        found = self._images.find(self._reference)
        if found is None:
            found = self._images.pull(self._reference)
            self._pulled = True
        return found

    def _builder_image(self, base: ImageFacts, sink: LineSink) -> ImageFacts:
        tag = _builder_tag(base)
        found = self._images.find(tag)
        if found is not None:
            return found
        sink(f"note[BUILDER_IMAGE]: making {tag} on top of {self._reference}")
        context = io.BytesIO()
        durable.write_tar(context, {"Dockerfile": BUILDER_DOCKERFILE.read_bytes()})
        return self._images.build(
            context, tag, buildargs={"BASE": base.id}, labels={LABEL: "builder"}, log=sink
        )

    @contextmanager
    def _container(self, plan: BuildPlan, image: ImageFacts) -> Iterator[Any]:
        """Run a container as long as this process lives: its only program reads from here.

        The engine removes it when that has ended, also of a process that is killed.
        """
        own = plan.source.cache
        shared = self._cached and shared_cache.is_for(plan.source)
        folder = shared_cache.folder() if shared else None
        reached = shared and shared_cache.remote() and not folder
        volume = f"{CACHE_VOLUME}-{own}" if own else CACHE_VOLUME
        if self._cached:
            make_volume(self._client, volume)
        with contextlib.ExitStack() as stack:
            with engine_errors("ENGINE_FAILED", "the build container could not be started"):
                container = self._client.containers.create(
                    image.id,
                    ["cat"],
                    name=f"llama-farm-{plan.key}-{os.getpid()}-{secrets.token_hex(4)}",
                    stdin_open=True,
                    auto_remove=True,
                    init=True,
                    working_dir=str(CONTAINER_LAYOUT.build),  # the engine makes it
                    # Only a cache that machines share over one needs it.
                    network_mode="bridge" if reached else "none",
                    labels={LABEL: plan.key},
                    volumes=_volumes(volume, folder) if self._cached else {},
                )
                stack.enter_context(_closing(container.attach_socket(params=_STDIN)))
                stack.enter_context(_removing(container))
                container.start()
            yield container


_STDIN: Final = {"stdin": 1, "stream": 1}
_MOST_PRODUCTS: Final = 8 << 30
"""Bytes of a build's products; a linker makes no library of more than 2 GiB."""


def _volumes(volume: str, shared: str | None) -> dict[str, dict[str, str]]:
    volumes = {volume: {"bind": str(CACHE_FOLDER), "mode": "rw"}}
    # in the container alone it would take everything, and be gone with it
    return volumes | ({shared: {"bind": shared, "mode": "rw"}} if shared else {})


def _builder_tag(base: ImageFacts) -> str:
    inputs = hashlib.sha256(base.id.encode() + BUILDER_DOCKERFILE.read_bytes())
    return f"llama-farm-builder:{inputs.hexdigest()[:16]}"


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
            raise EngineError("ENGINE_LOST")
        return int(status)

    def collect(self, products: PurePath, into: Path) -> None:
        """Copy a folder out of the container, links as links. The container stands still from now.

        Raises:
            EngineError: the engine or the container went away.
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


_LOST: Final = "the Docker engine went away in the middle of a step"


def _engine() -> AbstractContextManager[None]:
    return engine_errors("ENGINE_LOST", _LOST)


def _guarded(pieces: Iterator[bytes], what: str) -> Iterator[bytes]:
    """Yield the engine's items; only an error of reading them is the engine's failure."""
    while True:
        with engine_errors("ENGINE_LOST", what):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


@contextmanager
def _output(api: Any, execution: str) -> Iterator[Iterator[bytes]]:
    """Start a command and yield its output; docker-py's own stream never closes its socket."""
    with _engine():
        stream = api.exec_start(execution, socket=True)
    with _closing(stream):
        frames = frames_iter(stream, tty=False)  # type: ignore[no-untyped-call]
        yield _guarded((data for _, data in frames), _LOST)


@contextmanager
def _closing(stream: Any) -> Iterator[None]:
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


def _copy_in(container: Any, tree: Path, layout: Layout) -> None:
    """Copy a source tree and the recipe into a container, owned by root and without ``.git``.

    Raises:
        EngineError: the engine or a file failed.
    """
    with (
        engine_errors("ENGINE_LOST", "the source could not be copied in"),
        tempfile.TemporaryFile() as spool,
    ):
        files: dict[str, Path | bytes] = {str(layout.source): tree}
        files[str(layout.recipe)] = recipe.content()
        durable.write_tar(spool, files)
        container.put_archive("/", spool)
