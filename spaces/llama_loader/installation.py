"""From URLs to verified files in a staging folder, all at once: fetched, unpacked, synced."""

from __future__ import annotations

import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final

from llama_loader import unpack
from llama_loader.errors import IntegrityError
from llama_loader.events import Stage
from llama_loader.partial import Partial, Wanted

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from llama_loader.events import Sink
    from llama_loader.fetch import Fetcher
    from llama_loader.manifest import Artifact

AHEAD: Final = 1
"""Chunks that may wait to be unpacked. They have 4 MiB each."""


def wanted(artifact: Artifact) -> Wanted:
    """Return what is to be fetched."""
    return Wanted(
        artifact.name,
        artifact.size,
        artifact.sha256,
        artifact.chunk_size,
        artifact.chunks,
        artifact.format,
    )


@contextmanager
def resumable(folder: Path, artifact: Artifact, sink: Sink) -> Iterator[Partial]:
    """Give what is here of an artifact. It stays if the work is cut off, and goes when it is done.

    It goes too where the archive itself is refused, and where the disk has no room.
    """
    with Partial(folder, wanted(artifact), sink) as partial:
        try:
            yield partial
        except (IntegrityError, OSError):
            partial.discard()
            raise
        partial.discard()


def fetch_and_unpack(
    artifact: Artifact,
    urls: Sequence[str],
    fetcher: Fetcher,
    into: Path,
    *,
    partial: Partial,
    sink: Sink,
) -> None:
    """Fill the empty folder ``into`` with an artifact's files, every byte verified and synced.

    Raises:
        NetworkError: it cannot be had from any URL.
        IntegrityError: what was had is not what the manifest says.
        OSError: the disk is full or broken.
    """
    clock, started = _Clock(), time.monotonic()
    fetched = fetcher.chunks(wanted(artifact), urls, partial, ahead=AHEAD)
    unpack.unpack(clock.around(fetched), artifact, into, sink=sink)
    unpacking = time.monotonic() - started - clock.seconds
    sink(Stage("fetch", clock.seconds, artifact.size))
    sink(Stage("unpack", unpacking, artifact.unpacked_size))


class _Clock:
    """Adds up the time that an iterator takes; the rest is its consumer's."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, chunks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
        with closing(chunks):
            while True:
                started = time.monotonic()
                chunk = next(chunks, None)
                self.seconds += time.monotonic() - started
                if chunk is None:
                    return
                yield chunk
