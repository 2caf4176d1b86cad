"""An iterator that works in a thread of its own while its items are used up in another.

Fetching, decompressing, and hashing and writing overlap so. At most ``count`` items wait: memory
stays bounded, and a slow consumer slows the producer down.
"""

from __future__ import annotations

from contextlib import closing
from queue import SimpleQueue
from threading import Semaphore
from typing import TYPE_CHECKING, Any, TypeVar

from llama_loader.background import Background

if TYPE_CHECKING:
    from collections.abc import Generator

_Item = TypeVar("_Item")


def ahead(items: Generator[_Item, None, None], count: int) -> Generator[_Item, None, None]:
    """Yield the items in order; an error of the iterator is raised where its item would be.

    Args:
        items: ends up closed, in its own thread.
        count: how many may wait; 1 is the one that comes next.

    Closed early, it lets go of the iterator at its next item and does not wait for that: it may
    hang in a read.
    """
    ready: SimpleQueue[Any] = SimpleQueue()
    room = Semaphore(count - 1)
    over: list[None] = []

    def produce() -> None:
        try:
            with closing(items):
                for item in items:
                    ready.put((item,))
                    room.acquire()
                    if over:
                        return
        finally:
            ready.put(None)

    worker = Background(produce)
    try:
        while (boxed := ready.get()) is not None:
            room.release()
            yield boxed[0]
        worker.result()
    finally:
        over.append(None)
        room.release()
