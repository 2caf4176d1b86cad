"""The Docker engine. The only module that imports ``docker``.

Works against any engine that ``DOCKER_HOST`` names: the source is copied in and the products are
copied out, nothing is mounted from this machine. Containers have no network, unless the compiler
cache is shared between machines.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import secrets
import socket
import tarfile
import tempfile
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Final

import docker
import requests
from docker.errors import APIError, BuildError, DockerException, ImageNotFound, NotFound
from docker.utils import kwargs_from_env, parse_host
from docker.utils.socket import frames_iter

from farm import recipe, shared_cache
from farm.errors import EngineError
from farm.images import BUILDER_DOCKERFILE, ImageFacts
from farm.plan import CONTAINER_LAYOUT, BuildPlan, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from farm.engines.base import LineSink

CACHE_VOLUME: Final = "llama-farm-ccache"
CACHE_FOLDER: Final = PurePosixPath("/farm/ccache")
LABEL: Final = "llama-farm"
"""On every container and image of ours, so that a person can find them: ``--filter label=…``."""

_PING_SECONDS: Final = 10
_STREAM_SECONDS: Final = 24 * 3600
"""docker-py's timeout is between two reads, and one CUDA object can take many silent minutes."""

_PIECE: Final = 1 << 20
_PULL_HINT: Final = (
    "where the image's registry cannot be reached, `invoke base-image --line LINE` makes one from "
    "the distribution's packages; give its name with --image"
)


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
        with _engine_errors("ENGINE_LOST", "the Docker engine went away in the middle of a step"):
            execution = api.exec_create(
                self.container.id,
                list(argv),
                environment=dict(environment),
                workdir=str(self.layout.build),
            )["Id"]
            with _output(api, execution) as pieces:
                _split_lines(pieces, sink)
            status = api.exec_inspect(execution)["ExitCode"]
        if status is None:
            raise EngineError("ENGINE_LOST", "the container ended in the middle of a step")
        return int(status)

    def collect(self, products: PurePath, into: Path) -> None:
        """Copy a folder out of the container, links as links."""
        with _engine_errors("ENGINE_LOST", "the products could not be copied out"):
            stream, _ = self.container.get_archive(str(products))
            with tempfile.TemporaryFile() as spool:
                for piece in stream:
                    spool.write(piece)
                spool.seek(0)
                _extract(spool, products.name, into)


class DockerEngine:
    """Builds in containers on top of one devel image.

    Args:
        reference: the devel image; an image that the engine has is used as it is, else pulled.
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

    def identity(self, plan: BuildPlan) -> str:
        """Name the devel image's content, and what is built on top of it.

        Raises:
            EngineError: the image cannot be had, or the engine is out of reach.
        """
        del plan  # all of a run's plans are built on one image
        return f"docker {self._base().id} {_builder_tag(self._base())}"

    @contextmanager
    def open(self, plan: BuildPlan, sink: LineSink) -> Iterator[DockerWorkspace]:
        """Start a container with the plan's source; it is removed on every exit.

        Raises:
            EngineError: the image cannot be had, or the engine is out of reach.
        """
        base = self._base()
        builder = self._builder_image(base, sink)
        container = self._start(plan, builder)
        try:
            _copy_in(container, plan.source.tree, CONTAINER_LAYOUT)
            yield DockerWorkspace(
                container=container,
                layout=CONTAINER_LAYOUT if self._cached else replace(CONTAINER_LAYOUT, launcher=""),
                jobs=self._jobs or int(self._client.info()["NCPU"]),
                image=ImageFacts(id=base.id, labels=base.labels, reference=self._reference),
                ccache_dir=CACHE_FOLDER if self._cached else None,
            )
        finally:
            with _engine_errors("ENGINE_LOST", f"container {container.name} may be left behind"):
                _remove(container)

    def close(self) -> None:
        """Close the connections to the engine."""
        self._client.close()

    def _base(self) -> ImageFacts:
        return self._images.find(self._reference) or self._images.pull(self._reference)

    def _builder_image(self, base: ImageFacts, sink: LineSink) -> ImageFacts:
        tag = _builder_tag(base)
        found = self._images.find(tag)
        if found is not None:
            return found
        sink(f"note[BUILDER_IMAGE]: making {tag} on top of {self._reference}")
        context = _tar_of({"Dockerfile": BUILDER_DOCKERFILE.read_bytes()})
        return self._images.build(
            context, tag, buildargs={"BASE": base.id}, labels={LABEL: "builder"}, log=sink
        )

    def _start(self, plan: BuildPlan, image: ImageFacts) -> Any:
        volumes = {CACHE_VOLUME: {"bind": str(CACHE_FOLDER), "mode": "rw"}}
        shared = self._cached and shared_cache.remote()
        with _engine_errors("ENGINE_FAILED", "the build container could not be started"):
            return self._client.containers.run(
                image.id,
                ["sleep", "infinity"],
                name=f"llama-farm-{plan.key}-{secrets.token_hex(4)}",
                detach=True,
                init=True,
                # Only a cache shared between machines needs one.
                network_mode="bridge" if shared else "none",
                labels={LABEL: plan.key},
                volumes=volumes if self._cached else {},
            )


class DockerImages:
    """Images of one engine; see ``farm.images.ImageStore``."""

    def __init__(self, client: docker.DockerClient) -> None:
        self._client = client

    def find(self, tag: str) -> ImageFacts | None:
        """Return what the engine has under ``tag``, None where it has nothing."""
        with _engine_errors("ENGINE_FAILED", f"image {tag} could not be looked up"):
            try:
                return _facts(self._client.images.get(tag), tag)
            except ImageNotFound:
                return None

    def pull(self, reference: str) -> ImageFacts:
        """Pull an image from its registry.

        Raises:
            EngineError: it cannot be pulled; names it and says what to do without it.
        """
        try:
            for event in self._client.api.pull(reference, stream=True, decode=True):
                if "error" in event:
                    raise EngineError(
                        "IMAGE_UNAVAILABLE",
                        f"image {reference} cannot be pulled: {event['error']}",
                        hint=_PULL_HINT,
                    )
            return _facts(self._client.images.get(reference), reference)
        except (DockerException, requests.RequestException) as error:
            raise EngineError(
                "IMAGE_UNAVAILABLE",
                f"image {reference} cannot be pulled: {_reason(error)}",
                hint=_PULL_HINT,
            ) from error

    def import_root(self, tar: IO[bytes], tag: str, labels: Mapping[str, str]) -> ImageFacts:
        """Make an image of one layer from a root file system's tar stream."""
        repository, _, version = tag.partition(":")
        changes = [f'LABEL "{name}"="{value}"' for name, value in sorted(labels.items())]
        with _engine_errors("ENGINE_FAILED", f"image {tag} could not be imported"):
            # An iterator: docker-py announces chunks, but requests sends a file in one piece.
            pieces = iter(lambda: tar.read(_PIECE), b"")
            self._client.api.import_image_from_stream(
                pieces, repository=repository, tag=version, changes=changes
            )
            return _facts(self._client.images.get(tag), tag)

    def build(
        self,
        context: IO[bytes],
        tag: str,
        *,
        buildargs: Mapping[str, str],
        labels: Mapping[str, str],
        log: Callable[[str], None],
    ) -> ImageFacts:
        """Build an image from a tar'ed context, handing over every line as it comes.

        Raises:
            EngineError: a step of the Dockerfile failed; shows its last lines.
        """
        lines: list[str] = []
        with _engine_errors("ENGINE_FAILED", f"image {tag} could not be built"):
            events = self._client.api.build(
                fileobj=context,
                custom_context=True,
                tag=tag,
                buildargs=dict(buildargs),
                labels=dict(labels),
                rm=True,
                forcerm=True,
                decode=True,
            )
            for event in events:
                if "error" in event:
                    shown = "\n".join(f"  | {line}" for line in lines[-12:])
                    raise EngineError(
                        "IMAGE_BUILD_FAILED",
                        f"image {tag}: {event['error'].strip()}\n{shown}",
                        hint="a package or the network is missing inside the build container",
                    )
                new = event.get("stream", "").splitlines()
                lines += [line for line in new if line.strip()]
                for line in new:
                    log(line)
            return _facts(self._client.images.get(tag), tag)


def _builder_tag(base: ImageFacts) -> str:
    inputs = hashlib.sha256(base.id.encode() + BUILDER_DOCKERFILE.read_bytes())
    return f"llama-farm-builder:{inputs.hexdigest()[:16]}"


def connect() -> docker.DockerClient:
    """Connect to the engine that the environment names (``DOCKER_HOST``, else the socket).

    Raises:
        EngineError: none answers, or this user may not talk to it.
    """
    try:
        _knock()
        with closing(docker.from_env(timeout=_PING_SECONDS)) as probe:
            probe.ping()
        return docker.from_env(timeout=_STREAM_SECONDS)
    except (DockerException, requests.RequestException, OSError) as error:
        reason = _reason(error)
        if "Permission denied" in reason:
            raise EngineError(
                "ENGINE_PERMISSION",
                f"a Docker engine is there, but this user may not use it: {reason}",
                hint="add the user to the group docker and log in again, or use --engine local",
            ) from error
        if "SSHHTTPAdapter" in reason:
            raise EngineError(
                "ENGINE_SSH_MISSING",
                "DOCKER_HOST is an ssh:// address, and paramiko is not installed",
                hint="python3 -m pip install paramiko, or forward the host's socket by ssh -L",
            ) from error
        raise EngineError(
            "ENGINE_NOT_RUNNING",
            f"no Docker engine answers: {reason}",
            hint="start one, name one with DOCKER_HOST, or use --engine local",
        ) from error


def _knock() -> None:
    """Open the engine's Unix socket once by ourselves: where that fails docker-py leaks its own.

    Raises:
        OSError: nobody listens there, or this user may not.
        DockerException: DOCKER_HOST or its companions cannot be read.
    """
    url = str(parse_host(kwargs_from_env().get("base_url")))
    scheme, _, path = url.partition("://")
    if scheme == "http+unix":
        with closing(socket.socket(socket.AF_UNIX)) as knocking:
            knocking.settimeout(_PING_SECONDS)
            knocking.connect(path)


@contextmanager
def _engine_errors(code: str, what: str) -> Iterator[None]:
    try:
        yield
    except (APIError, BuildError, DockerException, requests.RequestException, OSError) as error:
        raise EngineError(
            code, f"{what}: {_reason(error)}", hint="is the Docker engine still running?"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the innermost sentence: docker-py wraps requests, which wraps urllib3."""
    explanation = getattr(error, "explanation", None)
    if explanation:
        return str(explanation)
    cause: BaseException = error
    while cause.__context__ is not None:
        cause = cause.__context__
    return str(cause)


def _facts(image: Any, reference: str) -> ImageFacts:
    return ImageFacts(id=image.id, labels=dict(image.labels), reference=reference)


@contextmanager
def _output(api: Any, execution: str) -> Iterator[Iterator[bytes]]:
    """Start a command and give its output; docker-py's own stream never closes its socket."""
    stream = api.exec_start(execution, socket=True)
    try:
        yield (data for _, data in frames_iter(stream, tty=False))  # type: ignore[no-untyped-call]
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


def _copy_in(container: Any, tree: Path, layout: Layout) -> None:
    with (
        _engine_errors("ENGINE_LOST", "the source could not be copied in"),
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


def _remove(container: Any) -> None:
    try:
        container.remove(force=True, v=True)
    except NotFound:
        return


def _tar_of(files: Mapping[str, bytes]) -> io.BytesIO:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    packed.seek(0)
    return packed
