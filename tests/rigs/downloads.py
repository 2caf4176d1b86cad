"""A fetcher that does not wait between attempts, and the file that tests of downloads fetch."""

import hashlib
import io
import random
import socket
from contextlib import closing
from typing import Any

import pytest

from llama_loader.errors import LoaderError
from llama_loader.events import Event
from llama_loader.fetch import Fetcher
from llama_loader.locations import Patience
from llama_loader.manifest import Artifact
from tests.rigs import archives
from tests.rigs.fault_server import FaultServer

CHUNK = 50_000
DATA = b"\x1f\x8b" + random.Random(7).randbytes(950_000)
OTHER = b"\x1f\x8b" + random.Random(8).randbytes(950_000)
IMPATIENT = Patience(connect=2, silence=1, rate=100_000, window=0.3, deadline=20)


def described(**fields: Any) -> Artifact:
    """Describe the file as a manifest does."""
    return archives.describe(DATA, (), chunk_size=CHUNK, **{"name": "a.tar.gz", **fields})


class Reader:
    """Writes down how long it would have waited between attempts, and the events."""

    def __init__(self, **options: Any) -> None:
        self.sleeps: list[float] = []
        self.events: list[Event] = []
        options.setdefault("patience", IMPATIENT)
        self.fetcher = Fetcher(sleep=self.sleeps.append, sink=self.events.append, **options)

    def fetch(self, *urls: str, **fields: Any) -> bytes:
        with closing(self.fetcher.chunks(described(**fields), urls)) as chunks:
            return b"".join(chunks)

    def copy(self, url: str, limit: int = 10_000_000) -> bytes:
        target = io.BytesIO()
        digest, size = self.fetcher.copy(url, target, limit=limit)
        data = target.getvalue()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (digest, size)
        return data


def refused(kind: type[LoaderError], code: str, reader: Reader, *urls: str, **fields: Any) -> str:
    """Fetch, and return the message of the error."""
    with pytest.raises(kind) as caught:
        reader.fetch(*urls, **fields)
    assert caught.value.code == code, caught.value.message
    return caught.value.message


def ranges(server: FaultServer, path: str = "/a") -> list[str | None]:
    """Return the Range of every request for a path."""
    return [request.headers.get("range") for request in server.asked(path)]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
