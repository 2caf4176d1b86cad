"""Who may have the model now, and who waits for a turn. Gradio's own queue says nobody's place.

First come, first served. A ticket that is given back, however its visitor left, moves all others.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Iterator


class FullError(Exception):
    """As many wait already as may."""


@final
class Ticket:
    """A place in a line; ``Line.ticket`` hands it out."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def place(self) -> int:
        """Return 0 for "your turn", else how far behind that: 1 is the next."""
        return self._line.place_of(self)

    def await_change(self, seconds: float) -> None:
        """Wait until somebody left the line, or so long."""
        self._line.await_change(seconds)


@final
class Line:
    """Tickets in the order in which they were drawn. Safe to use from threads.

    Args:
        at_once: how many have their turn at the same time.
        waiting: how many more may wait.
    """

    def __init__(self, at_once: int, waiting: int) -> None:
        self._at_once = at_once
        self._longest = at_once + waiting
        self._tickets: list[Ticket] = []
        self._moved = threading.Condition()

    @contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """Stand in line until the block ends.

        Raises:
            FullError: too many do already.
        """
        mine = Ticket(self)
        with self._moved:
            if len(self._tickets) >= self._longest:
                raise FullError
            self._tickets.append(mine)
        try:
            yield mine
        finally:
            with self._moved:
                self._tickets.remove(mine)
                self._moved.notify_all()

    def place_of(self, ticket: Ticket) -> int:
        """Return a ticket's place; 0 is a turn."""
        with self._moved:
            return max(0, self._tickets.index(ticket) - self._at_once + 1)

    def await_change(self, seconds: float) -> None:
        """Wait until somebody left, or so long."""
        with self._moved:
            self._moved.wait(seconds)
