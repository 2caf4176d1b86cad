"""The connection to a Docker engine, and its failures in our words."""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import docker
import requests
from docker.errors import APIError, BuildError, DockerException
from docker.utils import parse_host

from farm.engines.docker import address, ssh
from farm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farm.engines.docker.address import Address

_PING_SECONDS: Final = 10
_STREAM_SECONDS: Final = 24 * 3600
"""docker-py's timeout is between two reads, and one CUDA object can take many silent minutes."""


class _Client(docker.DockerClient):
    """A client that also closes what leads to its engine."""

    def __init__(self, address: Address, way: ExitStack, timeout: int) -> None:
        super().__init__(base_url=address.url, tls=address.tls or False, timeout=timeout)
        self._way = way

    def close(self) -> None:
        """Close the connections, and the ssh that they went through."""
        super().close()
        self._way.close()


def connect(patience: int | None = None) -> docker.DockerClient:
    """Connect to the engine: DOCKER_HOST's, else the current Docker context's, else the socket's.

    Args:
        patience: seconds for every answer; None waits as long as a compiler may be silent.

    Raises:
        EngineError: none answers, this user may not talk to it, or its address is none. It names
            the address, and what named it.
    """
    try:
        named = address.find()
    except DockerException as error:
        raise _unusable("DOCKER_HOST", error) from error
    with ExitStack() as way:
        try:
            reached = named
            if named.url.startswith("ssh://"):
                reached = replace(named, url=way.enter_context(ssh.forwarded(named.url)))
            _knock(reached)
            with closing(_Client(reached, ExitStack(), patience or _PING_SECONDS)) as probe:
                probe.ping()
            return _Client(reached, way.pop_all(), patience or _STREAM_SECONDS)
        except (DockerException, requests.RequestException, OSError) as error:
            raise _silent(named, error) from error
        except ValueError as error:  # of a port that is no number, before anybody was asked
            raise _unusable(str(named), error) from error


def _silent(named: Address, error: Exception) -> EngineError:
    said = reason(error)
    if "Permission denied" in said:
        return EngineError(
            "ENGINE_PERMISSION",
            f"a Docker engine is at {named}, but this user may not use it: {said}",
            hint="add the user to the group docker and log in again, or use --engine local",
        )
    return EngineError(
        "ENGINE_NOT_RUNNING",
        f"no Docker engine answers at {named}: {said}",
        hint="start one, name one with DOCKER_HOST or a Docker context, or use --engine local",
    )


def _unusable(named: str, error: Exception) -> EngineError:
    return EngineError(
        "ENGINE_ADDRESS_INVALID",
        f"{named} is not the address of an engine: {error}",
        hint="DOCKER_HOST is like unix:///var/run/docker.sock or tcp://builder.example:2376",
    )


def _knock(reached: Address) -> None:
    """Open the engine's Unix socket once by ourselves: where that fails docker-py leaks its own.

    Raises:
        OSError: nobody listens there, or this user may not.
        DockerException: the address cannot be read.
    """
    scheme, _, path = str(parse_host(reached.url)).partition("://")
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
