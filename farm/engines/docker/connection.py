"""The connection to a Docker engine, and its failures in our words."""

from __future__ import annotations

import socket
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final

import docker
import requests
from docker.errors import APIError, BuildError, DockerException
from docker.utils import kwargs_from_env, parse_host

from farm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PING_SECONDS: Final = 10
_STREAM_SECONDS: Final = 24 * 3600
"""docker-py's timeout is between two reads, and one CUDA object can take many silent minutes."""


def connect(patience: int | None = None) -> docker.DockerClient:
    """Connect to the engine that the environment names (``DOCKER_HOST``, else the socket).

    Args:
        patience: seconds for every answer; None waits as long as a compiler may be silent.

    Raises:
        EngineError: none answers, this user may not talk to it, or its address is none.
    """
    try:
        _knock()
        with closing(docker.from_env(timeout=patience or _PING_SECONDS)) as probe:
            probe.ping()
        return docker.from_env(timeout=patience or _STREAM_SECONDS)
    except (DockerException, requests.RequestException, OSError) as error:
        said = reason(error)
        if "Permission denied" in said:
            raise EngineError(
                "ENGINE_PERMISSION",
                f"a Docker engine is there, but this user may not use it: {said}",
                hint="add the user to the group docker and log in again, or use --engine local",
            ) from error
        if "SSHHTTPAdapter" in said:
            raise EngineError(
                "ENGINE_SSH_MISSING",
                "DOCKER_HOST is an ssh:// address, and paramiko is not installed",
                hint="python3 -m pip install paramiko, or forward the host's socket by ssh -L",
            ) from error
        raise EngineError(
            "ENGINE_NOT_RUNNING",
            f"no Docker engine answers: {said}",
            hint="start one, name one with DOCKER_HOST, or use --engine local",
        ) from error
    except ValueError as error:  # of a port that is no number, before anybody was asked
        raise EngineError(
            "ENGINE_ADDRESS_INVALID",
            f"DOCKER_HOST is not the address of an engine: {error}",
            hint="it is like unix:///var/run/docker.sock or tcp://builder.example:2376",
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
def engine_errors(code: str, what: str) -> Iterator[None]:
    """Say a failure of the engine, of its connection or of a file under ``code``.

    Raises:
        EngineError: instead of what was raised in the block.
    """
    try:
        yield
    except (APIError, BuildError, DockerException, requests.RequestException, OSError) as error:
        raise EngineError(
            code, f"{what}: {reason(error)}", hint="is the Docker engine still running?"
        ) from error


def reason(error: BaseException) -> str:
    """Return the innermost sentence: docker-py wraps requests, which wraps urllib3."""
    explanation = getattr(error, "explanation", None)
    if explanation:
        return str(explanation)
    cause: BaseException = error
    while cause.__context__ is not None:
        cause = cause.__context__
    return str(cause)
