"""The connection to a Docker engine, and its failures as the farm's errors.

DOCKER_HOST names the engine, else the current Docker context, else it is the usual socket. This is
the order of Docker's own command line, with the same files; the SDK reads only the variables. The
system's own ssh forwards the socket of an engine behind ``ssh://``, with the person's
configuration, keys and agent; the SDK would need paramiko, which reads only a part of them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import docker
import msgspec
import requests
import urllib3
from docker.constants import DEFAULT_UNIX_SOCKET
from docker.errors import DockerException
from docker.tls import TLSConfig
from docker.utils import kwargs_from_env, parse_host

from farm.errors import EngineError
from farm.inputs import packages

_DEFAULT: Final = "default"
"""The name of the context that means the variables or the usual socket."""


@dataclass(frozen=True)
class EngineAddress:
    """An engine's address, the setting that named it, and its certificates."""

    url: str
    named_by: str
    tls: TLSConfig | None = None

    def __str__(self) -> str:
        return f"{self.url} ({self.named_by})"


class _Config(msgspec.Struct, rename="camel", frozen=True):
    """The fields of ``~/.docker/config.json`` that the farm reads."""

    current_context: str = _DEFAULT


class _Endpoint(msgspec.Struct, rename="pascal", frozen=True):
    host: str
    skip_tls_verify: bool = msgspec.field(default=False, name="SkipTLSVerify")


class _Context(msgspec.Struct, rename="pascal", frozen=True):
    """The fields of a context's ``meta.json`` that the farm reads."""

    endpoints: dict[str, _Endpoint]


def find() -> EngineAddress:
    """Return the engine's address, and which setting named it.

    Raises:
        EngineError: ``ENGINE_CONTEXT_INVALID``: the context that is named does not exist, or a
            file of Docker's configuration cannot be read.
        DockerException: DOCKER_HOST's companions (DOCKER_TLS_VERIFY, …) cannot be used.
    """
    named = kwargs_from_env()
    if "base_url" in named:
        return EngineAddress(named["base_url"], "DOCKER_HOST", named.get("tls"))
    config = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    variable = os.environ.get("DOCKER_CONTEXT")
    context, file = variable or _DEFAULT, config / "config.json"
    if not variable and file.is_file():
        try:
            told = msgspec.json.decode(file.read_bytes(), type=_Config)
        except (OSError, msgspec.DecodeError) as error:
            raise _invalid(f"{file} cannot be read: {error}") from error
        context = told.current_context or _DEFAULT
    if context == _DEFAULT:
        url = DEFAULT_UNIX_SOCKET.removeprefix("http+")
        return EngineAddress(url, "Docker's usual socket", named.get("tls"))
    by = "DOCKER_CONTEXT" if variable else "the current context"
    return _of_context(config / "contexts", context, f"context {context!r}, {by}")


def _of_context(contexts: Path, name: str, told: str) -> EngineAddress:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    file = contexts / "meta" / digest / "meta.json"
    try:
        endpoint = msgspec.json.decode(file.read_bytes(), type=_Context).endpoints["docker"]
    except FileNotFoundError as error:
        raise _invalid(f"{told} does not exist: no {file}") from error
    except (OSError, KeyError, msgspec.DecodeError) as error:
        raise _invalid(f"{told} cannot be read: {file}: {error}") from error
    folder, tls = contexts / "tls" / digest / "docker", None
    if folder.is_dir():
        own, authority = (folder / "cert.pem", folder / "key.pem"), folder / "ca.pem"
        tls = TLSConfig(
            client_cert=(str(own[0]), str(own[1])) if own[0].is_file() else None,
            ca_cert=str(authority) if authority.is_file() else None,
            verify=not endpoint.skip_tls_verify,
        )
    return EngineAddress(endpoint.host, told, tls)


def _invalid(what: str) -> EngineError:
    return EngineError("ENGINE_CONTEXT_INVALID", what=what)


_REMOTE_SOCKET: Final = "/var/run/docker.sock"
_SSH_SECONDS: Final = 30.0
"""Timeout of a connection, which may lead to another continent or through a jump host."""
_PAUSE: Final = 0.05
_SSH_OPTIONS: Final = (
    *("-T", "-o", "BatchMode=yes"),
    *("-o", "ExitOnForwardFailure=yes", "-o", "ControlPath=none"),
)


@contextmanager
def _forwarded(address: str) -> Iterator[str]:
    """Yield a ``unix://`` address that forwards to the engine of an ``ssh://`` address."""
    ssh = shutil.which("ssh")
    if ssh is None:
        raise EngineError("ENGINE_SSH_MISSING", address=address)
    parts = urlsplit(address)
    if not parts.hostname:
        raise ValueError(f"{address} names no host")
    options = [*_SSH_OPTIONS, *([f"-p{parts.port}"] if parts.port else [])]
    options += ["-l", parts.username] if parts.username else []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llama-farm-ssh-"))
        here, said = Path(folder) / "docker.sock", stack.enter_context(tempfile.TemporaryFile())
        way = ("-L", f"{here}:{parts.path or _REMOTE_SOCKET}", "--", parts.hostname)
        process = stack.enter_context(
            subprocess.Popen(
                [ssh, *options, *way, "cat"],  # cat ends with our end of the pipe, ssh with it
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        )
        stack.callback(process.terminate)
        if not _answers(here, process):
            said.seek(0)
            words = said.read().decode("utf-8", "replace").strip()
            raise EngineError(
                "ENGINE_NOT_RUNNING/ssh",
                address=address,
                words=words or "no connection",
                hostname=parts.hostname,
            )
        yield f"unix://{here}"


def _answers(here: Path, process: subprocess.Popen[bytes]) -> bool:
    """Wait until ssh listens, or has ended."""
    deadline = time.monotonic() + _SSH_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with closing(socket.socket(socket.AF_UNIX)) as knocking:
            if knocking.connect_ex(str(here)) == 0:
                return True
        time.sleep(_PAUSE)
    return False


# urllib3's own error ends a broken stream: https://github.com/docker/docker-py/issues/1469
ENGINE_FAILURES: Final = (
    DockerException,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    OSError,
)
_PING_SECONDS: Final = 10
_STREAM_SECONDS: Final = 24 * 3600
"""docker-py's timeout is between two reads, and one CUDA object can take many silent minutes."""


class _API(docker.APIClient):
    """Keeps an engine's answer from filling the memory, unless it is a stream."""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request; an answer that is too long or late is a ``RequestException``."""
        ask = partial(super().send, request, **(options | {"stream": True}))
        return packages.received(ask, streamed=options.get("stream", False))


class _Client(docker.DockerClient):
    """A client that also closes the ssh connection to its engine."""

    def __init__(self, address: EngineAddress, way: ExitStack, timeout: int) -> None:
        self.api = _API(base_url=address.url, tls=address.tls or False, timeout=timeout)
        self._way = way

    def close(self) -> None:
        """Close the connections, and the ssh that they went through."""
        super().close()
        self._way.close()


def connect(patience: int | None = None) -> docker.DockerClient:
    """Connect to the engine: DOCKER_HOST's, else the current Docker context's, else the socket's.

    ``patience`` are seconds for every answer; None waits as long as a compiler may be silent.

    Raises:
        EngineError: no engine answers, this user may not use it, or its address is invalid. The
            error names the address and the setting that named it.
    """
    try:
        named = find()
    except DockerException as error:
        raise EngineError("ENGINE_ADDRESS_INVALID", named="DOCKER_HOST", error=error) from error
    with ExitStack() as way:
        try:
            reached = named
            if named.url.startswith("ssh://"):
                reached = replace(named, url=way.enter_context(_forwarded(named.url)))
            scheme, _, path = str(parse_host(reached.url)).partition("://")
            # a test: docker-py leaks a socket that it cannot connect
            if scheme == "http+unix":  # https://github.com/docker/docker-py/pull/3356
                with closing(socket.socket(socket.AF_UNIX)) as knocking:
                    knocking.settimeout(_PING_SECONDS)
                    knocking.connect(path)
            with closing(_Client(reached, ExitStack(), patience or _PING_SECONDS)) as probe:
                probe.ping()
            return _Client(reached, way.pop_all(), patience or _STREAM_SECONDS)
        except (DockerException, requests.RequestException, OSError) as error:
            said = reason(error)
            denied = "Permission denied" in said
            code = "ENGINE_PERMISSION" if denied else "ENGINE_NOT_RUNNING"
            raise EngineError(code, named=named, said=said) from error
        except (AttributeError, TypeError) as error:  # docker-py takes any JSON for its settings
            raise _invalid(f"Docker's config.json has no settings: {error}") from error
        except ValueError as error:  # of a port that is no number, before any connection was opened
            raise EngineError("ENGINE_ADDRESS_INVALID", named=named, error=error) from error


@contextmanager
def engine_errors(code: str, what: str) -> Iterator[None]:
    """Turn a failure of the engine, its connection or a file into an error with ``code``."""
    try:
        yield
    except ENGINE_FAILURES as error:
        raise EngineError(
            code, f"{what}: {reason(error)}", hint="is the Docker engine still running?"
        ) from error


def reason(error: BaseException) -> str:
    """Return the innermost message: docker-py wraps requests, which wraps urllib3."""
    explanation = getattr(error, "explanation", None)
    if explanation:
        return str(explanation)
    return packages.cause(error)
