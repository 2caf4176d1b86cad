"""Output and end of the command line: progress on a terminal, notes, Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import sys
import time
from typing import Final, TextIO

from llama_loader.errors import LoaderError, safe, tell
from llama_loader.events import Downloading, Event, Note, line
from llama_loader.settings import named

_CLEAR: Final = "\r\x1b[K"
"""Removes a terminal's present line."""
_EVERY: Final = 0.1
"""Seconds between two redraws."""
_AGAIN: Final = 0.01
"""Seconds after which an interruption that got lost is raised once more."""


class Console:
    """A sink for events: one line that is redrawn, and only where a person watches."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._next = 0.0

    def __call__(self, event: Event) -> None:
        """Show an event: a note always, progress where a person watches."""
        if isinstance(event, Note):
            lines = LoaderError(event.code, event.message, hint=event.hint).render()
            self.clear()
            tell(self._stream, named(lines.replace("error[", "warning[", 1)))
        elif isinstance(event, Downloading):
            now, done = time.monotonic(), event.done == event.total
            if now >= self._next or done:
                self._next = now + _EVERY
                self.stage(line(event))

    def stage(self, text: str) -> None:
        """Show the present stage on the line that is redrawn."""
        if self._live:
            tell(self._stream, f"{_CLEAR}{safe(text)[:118]}", end="")

    def clear(self) -> None:
        """Remove the line that is redrawn."""
        if self._live:
            tell(self._stream, _CLEAR, end="")


def clean_up_when_told() -> None:
    """Have SIGTERM and SIGINT raise ``KeyboardInterrupt`` once; further ones change nothing.

    Python runs a signal's handler between any two instructions, also those of a finalizer, which
    swallows the exception and prints it as ignored. Such an interruption is raised again,
    outside. Errors of half-initialised objects are suppressed while the process is interrupted.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    # also if a shell's `&` had it ignored: this process handles each signal that it gets
    signal.signal(signal.SIGINT, _interrupt)


def end_undisturbed() -> None:
    """Ignore SIGTERM and SIGINT: the last word is being printed, and it must stay true."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: object) -> None:
    del number, frame
    end_undisturbed()
    signal.signal(signal.SIGALRM, _interrupt)
    sys.unraisablehook = _swallowed
    raise KeyboardInterrupt


def _swallowed(left: sys.UnraisableHookArgs) -> None:
    if issubclass(left.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
