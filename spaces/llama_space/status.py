"""Collects what this process learns about the engine, and returns it as one ``Status``.

A ZeroGPU worker is a process that the app cannot look into: what the worker knows arrives as one
``Report`` in the stream of each call.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from llama_loader import processes
from llama_loader.events import Note, Stage
from llama_space import values
from llama_space.reservation import Reserved
from llama_space.values import Failure, Figures, Piece, Progress, Report, Status

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from llama_loader.events import Event
    from llama_space.preparation import Ready
    from llama_space.values import Item

_AGAIN_AFTER: Final = 30.0
"""Seconds after which a failure, such as an unreachable Hub, is no answer to a new call."""
_KEPT_CALLS: Final = 20
_KEPT_LINES: Final = 6


class Record:
    """What is known so far, and how far the preparation is. Safe to use from threads."""

    def __init__(self, status: Status | None = None, ready: Ready | None = None) -> None:
        self.ready = ready
        self.failure: Failure | None = None
        self._status = status or Status("preparing")
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._progress: dict[str, Progress] = {}
        self._began: float | None = None
        self._ended = 0.0

    def copy(self) -> Record:
        """Return a record for a forked child; takes no lock, because its owner is not there."""
        return Record(self._status, self.ready)

    def status(self) -> Status:
        """Return what is known now."""
        with self._changed:
            pid = self._status.server_pid
            return replace(
                self._status,
                progress=tuple(self._progress.values())[-_KEPT_LINES:],
                elapsed=None if self._began is None else time.monotonic() - self._began,
                warm=pid is not None and processes.lives(pid),
            )

    def change(self, **fields: Any) -> None:
        """Set fields of the status."""
        with self._changed:
            self._status = replace(self._status, **fields)

    def begin(self, *, again: bool) -> bool:
        """Note that a preparation begins; False where one runs, or none is needed.

        A try that has failed in the last half minute is only repeated ``again``.
        """
        with self._changed:
            again = again or self._status.phase == "closed"
            fresh = not again and time.monotonic() - self._ended < _AGAIN_AFTER
            if self._began is not None or self.ready or (self.failure and fresh):
                return False
            self._began, self._events, self.failure = time.monotonic(), [], None
            self._progress.clear()
            self.change(phase="preparing", failure=None)
            return True

    def ended(self, ready: Ready | None, failure: Failure | None) -> None:
        """Note that the preparation has ended, well where there is no failure."""
        with self._changed:
            self._began, self._ended = None, time.monotonic()
            self.ready, self.failure = ready, failure
            if self._status.phase != "closed":
                self.change(phase="failed" if failure else "ready", failure=failure)
                log(failure.error().render() if failure else "ready")
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds; True where no preparation runs."""
        with self._changed:
            return self._changed.wait_for(lambda: self._began is None, timeout)

    def events(self) -> Iterator[Event]:
        """Yield the events of the present or latest preparation, from its first to its last."""
        events = self._events
        for number in itertools.count():
            with self._changed:
                while len(events) == number:
                    if self._began is None or self._events is not events:
                        return
                    self._changed.wait()
            yield events[number]

    def hear(self, event: Event) -> None:
        """Keep an event; a note stays, and goes to the log."""
        known = values.plain(event)
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
            if not isinstance(event, Stage):
                # the next news of the same file replaces this
                about = f"{type(event).__name__} {getattr(event, 'name', '')}"
                self.say(about, Progress("prepare", known))
        if isinstance(known, Note):
            self.add(notes=(known,))
            log(values.event_line(known))

    def say(self, about: str, progress: Progress) -> None:
        """Keep the latest news of something that the preparation waits for."""
        with self._changed:
            self._progress.pop(about, None)
            self._progress[about] = progress

    def reported(self, report: Report) -> None:
        """Keep what a worker reports; after ``Engine.close`` there is a server again."""
        phase = self._status.phase
        self.change(**report.running, phase="ready" if phase == "closed" else phase)
        self.add(timeline=report.timeline, notes=report.notes)

    def add(
        self, *, timeline: tuple[tuple[str, float], ...] = (), notes: tuple[Note, ...] = ()
    ) -> None:
        """Add stages of this start, and notes."""
        with self._changed:
            self.change(
                timeline=tuple({**self._status.seconds, **dict(timeline)}.items()),
                notes=tuple(dict.fromkeys((*self._status.notes, *notes))),
            )

    def measured(
        self, made: Generator[Item | Report | Reserved, None, None]
    ) -> Generator[Item, None, Figures | None]:
        """Pass a call's items on and keep what they say of it, however it ends.

        Returns:
            The figures of a call that reached a server; None where it reached none.
        """
        figures, began, lent = Figures(time.time()), time.monotonic(), None
        served, reserved, item = False, 0, None
        try:
            with contextlib.closing(made):
                for item in made:
                    if isinstance(item, Reserved):
                        reserved = item.seconds
                        continue
                    now = time.monotonic()
                    queued = isinstance(item, Progress) and item.stage == "queue"
                    if reserved and not (lent or queued or isinstance(item, Failure)):
                        lent = now
                    if isinstance(item, Report):
                        self.reported(item)
                        served, figures = True, replace(figures, warm=item.warm)
                        continue
                    if isinstance(item, Piece):
                        first = now - began if item.text else None
                        figures = replace(
                            figures,
                            first_token=first
                            if figures.first_token is None
                            else figures.first_token,
                            tokens=item.tokens or figures.tokens,
                            tokens_per_second=item.tokens_per_second or figures.tokens_per_second,
                            reason=item.reason,
                        )
                    yield item
        finally:
            now = time.monotonic()
            figures = replace(figures, seconds=now - began)
            if lent:
                figures = replace(figures, reserved=reserved, used=now - lent)
            with self._changed:
                known = self._status
                self.change(  # a call that reached no server only cost GPU seconds
                    calls=(*known.calls, figures)[-_KEPT_CALLS:] if served else known.calls,
                    tokens_per_second=figures.tokens_per_second or known.tokens_per_second,
                    gpu_seconds_reserved=known.gpu_seconds_reserved + figures.reserved,
                    gpu_seconds_used=known.gpu_seconds_used + figures.used,
                )
        if not isinstance(item, Failure):
            yield figures
        return figures if served else None


def log(text: str) -> None:
    """Write a line to the Space's log."""
    print(f"llama_space: {text}", file=sys.stderr, flush=True)
