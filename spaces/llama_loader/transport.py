"""What one attempt to read a file is: how long it may take, how it fails, the bytes that come.

Files of this machine are opened here; what is behind HTTP is ``http_transport``'s, which is
imported when the first such file is opened: a start that downloads nothing needs no ``requests``.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llama_loader.locations import Web


@dataclass(frozen=True)
class Patience:
    """How long a server may take, in seconds where nothing else is said.

    Attributes:
        connect: until a connection stands.
        silence: between two bytes.
        headers: until all headers are here: names, connections, TLS and redirects included.
        rate: bytes a second that must come, over every ``window`` of waiting for them.
        window: see ``rate``.
        attempts: how often one URL may fail with nothing gained in between.
        longest_wait: a server that asks for more is left for the next mirror.
        deadline: for a whole file, all attempts and all mirrors together.
    """

    connect: float = 10.0
    silence: float = 20.0
    headers: float = 30.0
    rate: int = 16 * 1024
    window: float = 20.0
    attempts: int = 4
    longest_wait: float = 60.0
    deadline: float = 3600.0


@dataclass(eq=False)
class AttemptError(Exception):
    """One attempt failed; another one may succeed, unless it is ``final``.

    ``wait`` is the seconds that the server asks to wait, ``missing`` that it has no such file,
    ``wrong`` the error's code where its bytes are not those that were published.
    """

    reason: str
    _: KW_ONLY
    wait: float | None = None
    final: bool = False
    missing: bool = False
    wrong: str = ""


class RangeError(AttemptError):
    """The server answered a request for a part of a file with another part."""


@dataclass(frozen=True)
class Body:
    """A file's bytes, as they come.

    Attributes:
        start: offset in the file of the first byte that comes.
        size: in bytes of all that comes, where the server says it.
        read: returns 1 to n bytes, or none at the end; raises ``AttemptError``.
    """

    start: int
    size: int | None
    read: Callable[[int], bytes]


@contextmanager
def opened(place: Web | Path, start: int, patience: Patience, deadline: float) -> Iterator[Body]:
    """Open a file at an offset; the answer may begin at 0 all the same (``Body.start``).

    The loader waits until the moment ``deadline``, by ``time.monotonic``, and no longer.

    Raises:
        AttemptError: no bytes from there, this time.
    """
    if isinstance(place, Path):
        with _opened_file(place, start) as body:
            yield body
        return
    from llama_loader import http_transport

    with http_transport.opened(place, start, patience, deadline) as body:
        yield body


@contextmanager
def _opened_file(path: Path, start: int) -> Iterator[Body]:
    with _local_errors():
        if path.exists() and not path.is_file():  # a FIFO would be waited for without end
            raise AttemptError("it is not a file", final=True)
        stream = path.open("rb")
    with stream:
        stream.seek(start)
        yield Body(start, None, _local_errors()(stream.read))


@contextmanager
def _local_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise AttemptError(error.strerror or str(error), final=True, missing=missing) from error
