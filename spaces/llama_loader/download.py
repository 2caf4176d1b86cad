"""One artifact's way here: kept chunks first, then mirrors, over one connection or several."""

from __future__ import annotations

import hashlib
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llama_loader import chunks as bytes_of
from llama_loader.mirrors import Mirrors
from llama_loader.patience import AttemptError, Deadline, RangeError
from llama_loader.together import Together

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from llama_loader.chunks import Keeper, Wanted
    from llama_loader.mirrors import Mirror
    from llama_loader.patience import Patience
    from llama_loader.sources import Sources
    from llama_loader.together import Pace
    from llama_loader.web import Body


class Download:
    """Hands over verified chunks in order, wherever they come from.

    Args:
        wanted: the artifact.
        urls: where it is, in order of preference.
        sources: opens them.
        patience: how long servers may take.
        pace: when to use several connections.
        sleep: how to wait.
        keeper: has what an earlier process got, and keeps what comes; None for neither.
    """

    def __init__(
        self,
        wanted: Wanted,
        urls: Sequence[str],
        *,
        sources: Sources,
        patience: Patience,
        pace: Pace,
        sleep: Callable[[float], None],
        keeper: Keeper | None,
    ) -> None:
        self._wanted = wanted
        self._sources = sources
        self._pace = pace
        self._sleep = sleep
        self._keeper = keeper
        self._mirrors = Mirrors(wanted.name, urls, patience)
        self._deadline = Deadline(patience.deadline)
        self._index = 0

    def chunks(self) -> Generator[bytes, None, None]:
        """Yield the chunks, the last one only if the whole is right.

        Raises:
            NetworkError: it cannot be had from any URL; names each with its reason.
            IntegrityError: what comes is not what was published.
        """
        wanted, whole = self._wanted, hashlib.sha256()
        for chunk in self._in_order():
            whole.update(chunk)
            self._index += 1
            if self._index > wanted.last:
                bytes_of.require_whole(wanted, whole.hexdigest())
            yield chunk

    def _in_order(self) -> Iterator[bytes]:
        while self._index <= self._wanted.last:
            kept = self._keeper.get(self._index) if self._keeper else None
            if kept is not None:
                yield kept
                continue
            mirror = best(self._mirrors, self._deadline, self._sleep)
            try:
                for chunk in self._from(mirror):
                    mirror.gained()
                    yield chunk
            except AttemptError as error:
                mirror.alone = mirror.alone or mirror.slow
                mirror.slow = False
                self._mirrors.failed(mirror, error)

    def _from(self, mirror: Mirror) -> Iterator[bytes]:
        if self._keeper is None or not mirror.slow:
            return self._stream(mirror)
        missing = (at for at in range(self._index, self._wanted.last + 1) if not self._has(at))
        together = Together(lambda at: self._one(mirror, at), self._keeper, missing, self._pace)
        return together.chunks(self._index, self._wanted.last + 1)

    def _stream(self, mirror: Mirror) -> Iterator[bytes]:
        """One connection's worth of chunks, up to the next one that is here."""
        wanted, first = self._wanted, self._index
        end = next((at for at in range(first, wanted.last + 1) if self._has(at)), wanted.last + 1)
        until = wanted.start(end) if end <= wanted.last else None
        with self._opened(mirror, first, until) as body:
            bytes_of.skip(body, wanted.start(first) - body.start)
            for index in range(first, end):
                began = time.monotonic()
                chunk = bytes_of.read(body, wanted, index)
                self._judge(mirror, body, index, time.monotonic() - began)
                if index == wanted.last and body.read(1):
                    raise bytes_of.too_large(wanted, None)
                if self._keeper is not None and not body.is_local:
                    self._keeper.keep(index, chunk)
                yield chunk
                if mirror.slow:
                    return

    def _one(self, mirror: Mirror, index: int) -> bytes:
        """One chunk over a connection of its own."""
        start = self._wanted.start(index)
        with self._opened(mirror, index, start + self._wanted.length(index)) as body:
            if body.start != start:
                raise RangeError("asked for a part, answered with the whole")
            return bytes_of.read(body, self._wanted, index)

    @contextmanager
    def _opened(self, mirror: Mirror, index: int, end: int | None) -> Iterator[Body]:
        start = self._wanted.start(index)
        with self._sources.opened(mirror, start, self._deadline, end=end) as body:
            if body.total is not None and body.total > self._wanted.size:
                raise bytes_of.too_large(self._wanted, body.total)
            yield body

    def _judge(self, mirror: Mirror, body: Body, index: int, seconds: float) -> None:
        """Whether what is left is worth more connections, by the chunk that just came."""
        if self._keeper is None or mirror.alone or not body.ranges:
            return
        rate = self._wanted.length(index) / max(seconds, 1e-6)
        left = self._wanted.size - self._wanted.start(index + 1)
        several = index + 2 <= self._wanted.last
        mirror.slow = several and self._pace.calls_for_more(rate, left)

    def _has(self, index: int) -> bool:
        return self._keeper is not None and self._keeper.has(index)


def best(mirrors: Mirrors, deadline: Deadline, sleep: Callable[[float], None]) -> Mirror:
    """Return the mirror to ask, after the wait that is due.

    Raises:
        LoaderError: none is left, or the wait would be longer than there is time.
    """
    mirror = mirrors.best()
    if mirror.failures and mirror.wait:
        if mirror.wait > deadline.remaining():
            raise mirrors.given_up()
        sleep(mirror.wait)
    return mirror
