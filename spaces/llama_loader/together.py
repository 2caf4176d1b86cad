"""One artifact over several connections, where one alone is slow and the server sends parts.

Each worker takes the next chunk that nobody has, asks for just that, verifies it and has it kept;
whoever reads gets the chunks in order, from there. So memory holds a chunk for each connection and
no more, and what is cut off loses no chunk that was whole. There are two connections at first, and
one more as long as the last one made it faster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from threading import Condition
from typing import TYPE_CHECKING

from llama_loader.concurrency import Background
from llama_loader.patience import AttemptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llama_loader.chunks import Keeper


@dataclass(frozen=True)
class Pace:
    """When more than one connection is worth it.

    Attributes:
        slow: bytes a second; a connection that is faster is left alone.
        left: seconds that the rest would still take over one connection.
        most: connections at the same time.
        window: seconds over which a rate is measured before one more is tried.
        gain: how much faster it must have become for that.
    """

    slow: float = 16e6
    left: float = 5.0
    most: int = 4
    window: float = 2.0
    gain: float = 1.15

    def calls_for_more(self, rate: float, left: int) -> bool:
        """Whether to ask for ``left`` bytes over more connections than one of this rate."""
        return self.most > 1 and rate < self.slow and left > self.left * rate


class Together:
    """Workers that fetch chunks out of order.

    Args:
        fetch: returns one verified chunk; raises ``AttemptError``.
        keeper: gets what they fetched.
        indexes: the chunks that are missing, in order.
        pace: how many workers.
    """

    def __init__(
        self, fetch: Callable[[int], bytes], keeper: Keeper, indexes: Iterator[int], pace: Pace
    ) -> None:
        self._fetch = fetch
        self._keeper = keeper
        self._indexes = indexes
        self._pace = pace
        self._changed = Condition()
        self._error: BaseException | None = None
        self._over = False
        self._workers: list[Background[None]] = []
        self._bytes = 0
        self._since = time.monotonic()
        self._rate = 0.0

    def chunks(self, first: int, end: int) -> Iterator[bytes]:
        """Yield the chunks ``[first, end)`` in order.

        Raises:
            AttemptError: a worker failed; what the others had begun is kept then.
        """
        try:
            for _ in range(min(2, self._pace.most)):
                self._hire()
            for index in range(first, end):
                yield self._awaited(index)
        except AttemptError:
            self._end()
            for worker in self._workers:  # what they are about to finish need not be asked again
                worker.result()
            raise
        finally:
            self._end()

    def _awaited(self, index: int) -> bytes:
        with self._changed:
            while not self._keeper.has(index):
                if self._error is not None:
                    raise self._error
                self._changed.wait(self._pace.window / 4)
                self._grow()
        data = self._keeper.get(index)
        if data is None:
            raise AttemptError(f"chunk {index} was damaged on the disk")
        return data

    def _grow(self) -> None:
        """One more, where the last one helped."""
        seconds = time.monotonic() - self._since
        if seconds < self._pace.window or len(self._workers) >= self._pace.most:
            return
        rate, self._since, self._bytes = self._bytes / seconds, time.monotonic(), 0
        if rate > self._pace.gain * self._rate:
            self._rate = rate
            self._hire()

    def _hire(self) -> None:
        self._workers.append(Background(self._work))

    def _work(self) -> None:
        try:
            while (index := self._claim()) is not None:
                self._bring(index)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for chunks
            with self._changed:
                self._error = self._error or error
                self._over = True
                self._changed.notify_all()

    def _bring(self, index: int) -> None:
        data = self._fetch(index)
        if not self._keeper.keep(index, data):
            raise AttemptError("chunks cannot be kept on the disk")
        with self._changed:
            self._bytes += len(data)
            self._changed.notify_all()

    def _claim(self) -> int | None:
        with self._changed:
            return None if self._over else next(self._indexes, None)

    def _end(self) -> None:
        with self._changed:
            self._over = True
