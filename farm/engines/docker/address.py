"""Where the Docker engine is: DOCKER_HOST, else the current Docker context, else the socket.

The order and the files are those of Docker's own command line. The SDK reads the variables alone.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from docker.constants import DEFAULT_UNIX_SOCKET
from docker.tls import TLSConfig
from docker.utils import kwargs_from_env

from farm.errors import EngineError

_DEFAULT: Final = "default"
"""The context that is no context: the variables, or the socket."""


@dataclass(frozen=True)
class Address:
    """An engine's address, what named it, and the certificates for it."""

    url: str
    named_by: str
    tls: TLSConfig | None = None

    def __str__(self) -> str:
        return f"{self.url} ({self.named_by})"


class _Config(msgspec.Struct, rename="camel", frozen=True):
    """What we read of ``~/.docker/config.json``."""

    current_context: str = _DEFAULT


class _Endpoint(msgspec.Struct, rename="pascal", frozen=True):
    host: str
    skip_tls_verify: bool = msgspec.field(default=False, name="SkipTLSVerify")


class _Context(msgspec.Struct, rename="pascal", frozen=True):
    """What we read of a context's ``meta.json``."""

    endpoints: dict[str, _Endpoint]


def find() -> Address:
    """Return where the engine is, and what says so.

    Raises:
        EngineError: ``ENGINE_CONTEXT_INVALID``: the context that is named does not exist, or a
            file of Docker's configuration cannot be read.
        DockerException: DOCKER_HOST's companions (DOCKER_TLS_VERIFY, …) cannot be used.
    """
    named = kwargs_from_env()
    if "base_url" in named:
        return Address(named["base_url"], "DOCKER_HOST", named.get("tls"))
    config = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    variable = os.environ.get("DOCKER_CONTEXT")
    context = variable or _current(config / "config.json")
    if context == _DEFAULT:
        url = DEFAULT_UNIX_SOCKET.removeprefix("http+")
        return Address(url, "Docker's usual socket", named.get("tls"))
    told = "DOCKER_CONTEXT" if variable else "the current context"
    return _of_context(config / "contexts", context, f"context {context!r}, {told}")


def _current(file: Path) -> str:
    if not file.is_file():
        return _DEFAULT
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Config).current_context or _DEFAULT
    except (OSError, msgspec.DecodeError) as error:
        raise _invalid(f"{file} cannot be read: {error}") from error


def _of_context(contexts: Path, name: str, told: str) -> Address:
    digest = hashlib.sha256(name.encode()).hexdigest()
    file = contexts / "meta" / digest / "meta.json"
    try:
        endpoint = msgspec.json.decode(file.read_bytes(), type=_Context).endpoints["docker"]
    except FileNotFoundError as error:
        raise _invalid(f"{told} does not exist: no {file}") from error
    except (OSError, KeyError, msgspec.DecodeError) as error:
        raise _invalid(f"{told} cannot be read: {file}: {error}") from error
    return Address(endpoint.host, told, _tls(contexts / "tls" / digest / "docker", endpoint))


def _tls(folder: Path, endpoint: _Endpoint) -> TLSConfig | None:
    """Return the certificates that lie beside a context; None where none do."""
    if not folder.is_dir():
        return None
    own, authority = (folder / "cert.pem", folder / "key.pem"), folder / "ca.pem"
    return TLSConfig(
        client_cert=(str(own[0]), str(own[1])) if own[0].is_file() else None,
        ca_cert=str(authority) if authority.is_file() else None,
        verify=not endpoint.skip_tls_verify,
    )


def _invalid(what: str) -> EngineError:
    return EngineError(
        "ENGINE_CONTEXT_INVALID",
        f"no Docker engine is named: {what}",
        hint="docker context ls shows the contexts; DOCKER_HOST names an engine without one",
    )
