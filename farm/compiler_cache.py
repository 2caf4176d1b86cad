"""The Docker engine's compiler cache as one file, so that a machine that is gone tomorrow keeps it.

The cache is a named volume of the engine, which may be another machine's: it is copied out and in
through a container that is made and never started.
"""

from __future__ import annotations

import secrets
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final

from farm import durable, targets
from farm.engines.docker import (
    CACHE_FOLDER,
    CACHE_VOLUME,
    DockerImages,
    connect,
    labels,
    make_volume,
)
from farm.errors import EngineError, UsageError
from farm.inputs import pins

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PARENT: Final = str(CACHE_FOLDER.parent)


def save(place: Path, *, line: str, image: str | None = None) -> int:
    """Copy the cache into a tar file; returns its size in bytes.

    Raises:
        EngineError: no engine answers, or the devel image cannot be had.
        PackError: it cannot be written.
    """
    with durable.writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    with _holder(line, image) as container:
        stream, _ = container.get_archive(str(CACHE_FOLDER))
        # closed first: the engine waits for whoever reads before it removes the container
        with closing(stream), durable.writing(place), durable.replacing(place, 0o644) as out:
            for piece in stream:
                out.write(piece)
    return place.stat().st_size


def load(place: Path, *, line: str, image: str | None = None) -> int:
    """Copy a tar file that ``save`` made into the cache; returns its size in bytes.

    Raises:
        UsageError: there is no such file.
        EngineError: no engine answers, the devel image cannot be had, or the file is no tar.
    """
    if not place.is_file():
        raise UsageError("CACHE_MISSING", f"{place} is not there", hint="--save writes it")
    with _holder(line, image) as container, place.open("rb") as stream:
        if not container.put_archive(_PARENT, stream):
            raise EngineError("CACHE_REFUSED", f"the engine did not take {place}")
    return place.stat().st_size


@contextmanager
def _holder(line: str, image: str | None) -> Iterator[Any]:
    """Make a container that has the cache's volume and runs nothing."""
    reference = image or pins.load().image(targets.load().line(line).image).reference
    with closing(connect()) as client:
        images = DockerImages(client)
        found = images.find(reference) or images.pull(reference)
        make_volume(client, CACHE_VOLUME)
        container = client.containers.create(
            found.id,
            ["true"],
            name=f"llama-farm-cache-{secrets.token_hex(4)}",
            network_mode="none",
            labels=labels("cache"),
            volumes={CACHE_VOLUME: {"bind": str(CACHE_FOLDER), "mode": "rw"}},
        )
        try:
            yield container
        finally:
            container.remove(force=True)
