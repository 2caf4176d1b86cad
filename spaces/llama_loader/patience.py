"""How long a server may take, and what it is when it took longer, or failed.

Nothing here knows of connections: who reads tells what it waited for and what came.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_WRAPPING: Final = 1 << 20
"""Bytes between two pieces of a file: lengths of chunks, extensions, trailers; one piece itself."""


@dataclass(frozen=True)
class Patience:
    """How long a server may take.

    Attributes:
        connect: seconds until a connection stands.
        silence: seconds between two bytes.
        headers: seconds until all of an answer's headers are here: names, connections, TLS and
            redirects included.
        rate: bytes a second that must come, over every ``window`` seconds of waiting for them.
        window: see ``rate``.
        attempts: how often one URL may fail with nothing gained in between.
        longest_wait: seconds; a server that asks for more is left for the next mirror.
        deadline: seconds for a whole file, all attempts and all mirrors together.
    """

    connect: float = 10.0
    silence: float = 20.0
    headers: float = 30.0
    rate: int = 16 * 1024
    window: float = 20.0
    attempts: int = 4
    longest_wait: float = 60.0
    deadline: float = 3600.0


class AttemptError(Exception):
    """One attempt failed, and another may not.

    Attributes:
        wait: seconds that the server asks to wait, None where it does not say.
        final: this URL need not be asked again.
        missing: there is nothing behind it.
    """

    def __init__(
        self,
        reason: str,
        *,
        wait: float | None = None,
        final: bool = False,
        missing: bool = False,
    ) -> None:
        super().__init__(reason)
        self.wait = wait
        self.final = final
        self.missing = missing


class RangeError(AttemptError):
    """The server answered a request for a part with another part."""


class Deadline:
    """A moment after which nothing is waited for."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def remaining(self) -> float:
        """Seconds left; negative when it is over."""
        return self._end - self._clock()

    def check(self) -> None:
        """Raise ``AttemptError`` when it is over."""
        if self.remaining() < 0:
            raise AttemptError(f"not done within {self._seconds:g} s", final=True)


class Waiting:
    """How long a server may keep us waiting: for all headers together, then by what it brings.

    It is asked before, and told after, each read of the connection (``connections.Watch``).
    """

    def __init__(self, patience: Patience, deadline: Deadline) -> None:
        self._patience = patience
        self._deadline = deadline
        self._headers: Deadline | None = Deadline(patience.headers)
        self._seconds = 0.0
        self._bytes = 0
        self._wrapping = 0

    def headers_came(self) -> None:
        """From now on the rate counts."""
        self._headers, self._seconds, self._wrapping = None, 0.0, 0

    def left(self) -> float:
        """Seconds that may still be waited.

        Raises:
            AttemptError: there are none.
        """
        self._deadline.check()
        left = self._deadline.remaining()
        if self._headers is None:
            return left
        if self._headers.remaining() <= 0:
            raise AttemptError(f"no answer within {self._patience.headers:g} s")
        return min(left, self._headers.remaining())

    def waited(self, seconds: float, count: int) -> None:
        """Count time spent waiting (unpacking is not the server's fault) and bytes of any kind.

        Raises:
            AttemptError: it took too long in all, or nothing of the file comes any more.
        """
        self._seconds += seconds
        self._wrapping += count
        self.left()
        if self._headers is None and self._wrapping > _MOST_WRAPPING:
            raise AttemptError("sends no end of what is not the file")
        if self._headers is None and self._seconds >= 2 * self._patience.window:
            self._require_pace()

    def came(self, count: int) -> None:
        """Count bytes of the file: what else a server sends is no progress.

        Raises:
            AttemptError: it only trickles.
        """
        self._bytes += count
        self._wrapping = 0
        if self._seconds >= self._patience.window:
            self._require_pace()

    def _require_pace(self) -> None:
        if self._bytes < self._patience.rate * self._seconds:
            raise AttemptError(f"slower than {self._patience.rate} bytes a second")
        self._seconds, self._bytes = 0.0, 0
