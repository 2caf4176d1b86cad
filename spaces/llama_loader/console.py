"""How the command line talks: progress for a terminal, notes and errors for everybody."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final, TextIO

from llama_loader.errors import LoaderError, without_secrets
from llama_loader.events import Downloading, Note, Resolving, Stage, Unpacking

if TYPE_CHECKING:
    from llama_loader.events import Event
    from llama_loader.timeline import Timeline

_EVERY: Final = 0.1
"""Seconds between two redraws."""
_MB: Final = 1e6


class Console:
    """A sink for events: one line that is redrawn, and only where a person watches."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._drawn = False
        self._next = 0.0

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, Note):
            self.note(event)
        elif self._live and not isinstance(event, Stage):
            self._draw(event)

    def note(self, note: Note) -> None:
        """Print what a person must know, terminal or not."""
        self.clear()
        # LoaderError knows how foreign text is made safe to print
        lines = LoaderError(note.code, note.message, hint=note.hint).render()
        print(lines.replace("error[", "warning[", 1), file=self._stream, flush=True)

    def stage(self, text: str) -> None:
        """Show what goes on now."""
        if self._live:
            self._line(text)

    def timeline(self, timeline: Timeline) -> None:
        """Print what was needed, in a line, to a terminal."""
        self.clear()
        if self._live:
            parts = [f"{one.name} {one.seconds:.2f} s{_size(one.size)}" for one in timeline.stages]
            print(" · ".join(parts), file=self._stream, flush=True)

    def clear(self) -> None:
        """Remove the line that is redrawn."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False

    def _draw(self, event: Event) -> None:
        now = time.monotonic()
        done = isinstance(event, Downloading | Unpacking) and event.done == event.total
        if now < self._next and not done:
            return
        self._next = now + _EVERY
        if isinstance(event, Resolving):
            self._line(f"reading {event.url}")
        elif isinstance(event, Downloading | Unpacking):
            verb = "fetching" if isinstance(event, Downloading) else "unpacking"
            self._line(f"{verb} {event.name} {_share(event.done, event.total)}")

    def _line(self, text: str) -> None:
        known = without_secrets(text)
        safe = "".join(letter if letter.isprintable() else "?" for letter in known)
        self._stream.write(f"\r\x1b[K{safe[:118]}")
        self._stream.flush()
        self._drawn = True


def _share(done: int, total: int | None) -> str:
    if not total:
        return f"{done / _MB:.1f} MB"
    return f"{done / _MB:.1f} of {total / _MB:.1f} MB ({100 * done // total} %)"


def _size(size: int | None) -> str:
    return "" if size is None else f" {size / _MB:.1f} MB"
