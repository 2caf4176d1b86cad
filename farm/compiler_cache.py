"""The Docker engine's compiler cache as one file, so that a machine that is gone tomorrow keeps it.

The cache is a named volume of the engine, which may be another machine's: it is copied out and in
through a container that is made and never started.
"""

from __future__ import annotations

import tarfile
from contextlib import closing, contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

from farm import durable, targets
from farm.engines.docker import (
    CACHE_FOLDER,
    CACHE_VOLUME,
    DockerImages,
    cache_container,
    connect,
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
        EngineError: no engine answers, or the devel image is out of reach.
        PackError: it cannot be written.
    """
    with durable.writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    with _holder(line, image) as container:
        stream, _ = container.get_archive(str(CACHE_FOLDER))
        # closed first: the engine waits for its reader before it removes the container
        with closing(stream), durable.writing(place), durable.replacing(place, 0o644) as out:
            for piece in stream:
                out.write(piece)
    return place.stat().st_size


def load(place: Path, *, line: str, image: str | None = None) -> int | None:
    """Copy a tar file that ``save`` made into the cache; returns its size in bytes.

    None for a file that is damaged: nothing of it is used, and a build without it takes longer.

    Raises:
        UsageError: there is no such file.
        EngineError: no engine answers, or the devel image is out of reach.
    """
    if not place.is_file():
        raise UsageError("CACHE_MISSING", f"{place} is not there", hint="--save writes it")
    if not _is_whole(place):
        return None
    with _holder(line, image) as container, place.open("rb") as stream:
        if not container.put_archive(_PARENT, stream):
            raise EngineError("CACHE_REFUSED", f"the engine did not take {place}")
    return place.stat().st_size


def _is_whole(place: Path) -> bool:
    """Whether a file is a tar from its begin to its end, with nothing but a cache in it."""
    try:
        with tarfile.open(place, mode="r:") as tar:
            return all(
                PurePath(member.name).parts[:1] == (CACHE_FOLDER.name,)
                and ".." not in PurePath(member.name).parts
                and (member.isfile() or member.isdir())
                for member in tar
            )
    except (tarfile.TarError, OSError):
        return False


@contextmanager
def _holder(line: str, image: str | None) -> Iterator[Any]:
    """Make a container that has the cache's volume and runs nothing."""
    reference = image or pins.load().image(targets.load().line(line).image).reference
    with closing(connect()) as client:
        images = DockerImages(client)
        found = images.find(reference) or images.pull(reference)
        with cache_container(client, found.id, CACHE_VOLUME) as container:
            yield container
