"""Who may have the model now, and who waits for a turn. Gradio's own queue tells no caller's place.

First come, first served. A visitor who leaves, however that happens, moves all others.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

from llama_space.worker import BEAT

if TYPE_CHECKING:
    from collections.abc import Iterator


class FullError(Exception):
    """As many wait already as may."""


@final
class Line:
    """Visitors in the order in which they came. Safe to use from threads.

    Args:
        at_once: how many have their turn at the same time.
        waiting: how many more may wait.
    """

    def __init__(self, at_once: int, waiting: int) -> None:
        self._at_once = at_once
        self._longest = at_once + waiting
        self._tickets: list[object] = []
        self._moved = threading.Condition()

    @contextmanager
    def places(self) -> Iterator[Iterator[int]]:
        """Stand in line until the block ends; it gets the places, which end with the turn.

        Place 1 is the next whose turn it is. It is yielded again every quarter of a second.

        Raises:
            FullError: too many stand in line already.
        """
        mine = object()
        with self._moved:
            if len(self._tickets) >= self._longest:
                raise FullError
            self._tickets.append(mine)
        try:
            yield self._until_turn(mine)
        finally:
            with self._moved:
                self._tickets.remove(mine)
                self._moved.notify_all()

    def _until_turn(self, ticket: object) -> Iterator[int]:
        while True:
            with self._moved:
                place = self._tickets.index(ticket) - self._at_once + 1
            if place <= 0:
                return
            yield place
            with self._moved:
                self._moved.wait(BEAT)
