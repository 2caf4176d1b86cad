"""The Docker engine. The only package that imports ``docker``.

Works against any engine that ``DOCKER_HOST`` names: the source is copied in and the products are
copied out, nothing is mounted from this machine. Containers have no network, unless the compiler
cache is shared over one; a folder that machines share for it (``file:``) is the engine's host's.
"""

from farm.engines.docker.connection import connect
from farm.engines.docker.container import LABEL
from farm.engines.docker.engine import DockerEngine
from farm.engines.docker.inventory import (
    CACHE_VOLUME,
    DockerImages,
    Stored,
    cache_counters,
    stored,
)

__all__ = [
    "CACHE_VOLUME",
    "LABEL",
    "DockerEngine",
    "DockerImages",
    "Stored",
    "cache_counters",
    "connect",
    "stored",
]
