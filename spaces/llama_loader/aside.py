"""Pieces that somebody uses in a thread of its own on their way to somebody else.

A file is hashed so while it is written: hashing and writing cost about the same, and both let go of
the interpreter's lock.
"""

from __future__ import annotations

from queue import SimpleQueue
from threading import Semaphore
from typing import TYPE_CHECKING, Final

from llama_loader.background import Background

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

WAITING: Final = 4
"""Pieces that may wait to be looked at; more would be memory."""


def aside(
    pieces: Iterable[memoryview], look: Callable[[memoryview], object]
) -> Iterator[memoryview]:
    """Yield the pieces as they are; when the iterator ends, ``look`` has seen them all, in order.

    Args:
        pieces: not changed while it is looked at.
        look: called with each, in another thread; its error is raised at the end.
    """
    waiting: SimpleQueue[memoryview | None] = SimpleQueue()
    room = Semaphore(WAITING)
    over: list[None] = []

    def work() -> None:
        try:
            while (piece := waiting.get()) is not None:
                look(piece)
                room.release()
        finally:
            over.append(None)
            room.release()

    looking = Background(work)
    try:
        for piece in pieces:
            room.acquire()
            if over:  # it failed
                break
            waiting.put(piece)
            yield piece
    finally:
        waiting.put(None)
    looking.result()
