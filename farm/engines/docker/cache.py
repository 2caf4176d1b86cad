"""What the compiler cache in the engine's volume says of itself."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final

from docker.errors import NotFound

from farm.engines.docker.connection import engine_errors
from farm.engines.docker.engine import CACHE_FOLDER
from farm.engines.docker.left_behind import LABEL
from farm.errors import EngineError

if TYPE_CHECKING:
    import docker

_SECONDS: Final = 10
"""For one look at counters; on an idle machine it takes half of one."""


def cache_counters(client: docker.DockerClient, volume: str) -> list[str] | None:
    """Return what ``ccache --print-stats`` says of a volume, None where there is no such volume.

    A container of a builder image reads the volume, with no network and nothing to write.

    Raises:
        EngineError: the engine has no builder image, or is out of reach.
    """
    with engine_errors("ENGINE_FAILED", "the compiler cache could not be read"):
        if not _is_there(client, volume):
            return None
        builders = client.images.list(filters={"label": f"{LABEL}=builder"})
        if not builders:
            raise EngineError(
                "NO_BUILDER_IMAGE",
                f"no builder image to read volume {volume} with; a build makes one",
            )
        container = _reader(client, str(builders[0].id), volume)
        try:
            container.start()
            container.wait(timeout=_SECONDS)
            return str(container.logs(stdout=True, stderr=False), "utf-8", "replace").splitlines()
        finally:
            container.remove(force=True)


def _is_there(client: docker.DockerClient, volume: str) -> bool:
    try:
        client.volumes.get(volume)
    except NotFound:
        return False
    return True


def _reader(client: docker.DockerClient, image: str, volume: str) -> Any:
    return client.containers.create(
        image,
        ["ccache", "--print-stats"],
        name=f"llama-farm-cache-{secrets.token_hex(4)}",
        network_mode="none",
        labels={LABEL: "cache"},
        environment={"CCACHE_DIR": str(CACHE_FOLDER)},
        volumes={volume: {"bind": str(CACHE_FOLDER), "mode": "ro"}},
    )
