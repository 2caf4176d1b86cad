"""Collects what this process learns about the engine, and returns it as one ``Status``.

A ZeroGPU worker is a process that the app cannot look into: what the worker knows arrives as one
``Report`` in the stream of each call.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from llama_loader import processes
from llama_loader.events import Note
from llama_space import event_text
from llama_space.gpu_seconds import Speeds
from llama_space.preparation import STAGES_OF_A_START
from llama_space.values import Failure, Figures, Piece, Report, Status

if TYPE_CHECKING:
    from llama_loader.events import Event
    from llama_space.preparation import Preparation
    from llama_space.values import Item

_KEPT_CALLS: Final = 20
_KEPT_LINES: Final = 6


class Record:
    """What is known so far. Safe to use from threads."""

    def __init__(self, status: Status | None = None) -> None:
        self._status = status or Status("preparing")
        self._lock = threading.Lock()
        self._lines: dict[str, str] = {}
        self._began: float | None = None
        self._workers: dict[int, Report] = {}
        self._speeds = Speeds()

    def copy(self) -> Record:
        """Return a record for a forked child; takes no lock, because its owner is not there."""
        return Record(self._status)

    @property
    def speeds(self) -> Speeds:
        """What was measured of starts and answers."""
        return self._speeds

    @property
    def latest(self) -> str:
        """The latest line about the preparation."""
        with self._lock:
            return next(reversed(self._lines.values()), "preparing")

    def status(self) -> Status:
        """Return what is known now."""
        with self._lock:
            lines = tuple(self._lines.values())[-_KEPT_LINES:]
            elapsed = None if self._began is None else time.monotonic() - self._began
            status = replace(self._status, progress=lines, elapsed=elapsed)
        return replace(status, warm=self.warm())

    def warm(self) -> bool:
        """Whether a worker with a server lives; ZeroGPU may still choose another GPU."""
        return any(_lives(one) for one in tuple(self._workers.values()))

    def begin(self) -> None:
        """Note that a preparation begins."""
        with self._lock:
            self._began = time.monotonic()
            self._lines.clear()
            self._status = replace(self._status, phase="preparing", failure=None)

    def hear(self, event: Event) -> None:
        """Keep an event's line; a note stays, and goes to the log."""
        with self._lock:
            self._lines.pop(event_text.about(event), None)
            self._lines[event_text.about(event)] = event_text.event(event)
            if isinstance(event, Note):
                notes = dict.fromkeys((*self._status.notes, event_text.plain(event)))
                self._status = replace(self._status, notes=tuple(notes))
        if isinstance(event, Note):
            log(event_text.event(event))

    def say(self, line: str) -> None:
        """Keep a line about the server that is being started."""
        with self._lock:
            self._lines["server"] = line

    def prepared(self, found: Preparation) -> None:
        """Keep what was prepared."""
        with self._lock:
            self._status = replace(
                self._status,
                **vars(found.runtimes[0]),
                model=found.ready.model.name,
                model_sha256=found.model_sha256,
                timeline=found.timeline,
            )

    def ended(self, failure: Failure | None) -> None:
        """Note that the preparation has ended, well where there is no failure."""
        with self._lock:
            phase: Final = "ready" if failure is None else "failed"
            self._status = replace(self._status, phase=phase, failure=failure)
            self._began = None
        log("ready" if failure is None else failure.error().render())

    def timed(self, stage: str, seconds: float) -> None:
        """Keep the seconds of a stage."""
        with self._lock:
            timeline = _joined(self._status.timeline, ((stage, round(seconds, 4)),))
            self._status = replace(self._status, timeline=timeline)

    def reported(self, report: Report) -> None:
        """Keep what a worker reports."""
        with self._lock:
            self._workers = {pid: one for pid, one in self._workers.items() if _lives(one)}
            self._workers[report.worker_pid] = report
            notes = (*self._status.notes, *report.notes)
            status = self._status
            self._status = replace(
                status,
                **vars(report.runtime),
                devices=report.devices,
                memory=dict(report.memory),
                server_pid=report.server_pid,
                timeline=_joined(status.timeline, report.timeline),
                notes=tuple(dict.fromkeys(notes)),
            )
            if not report.warm:
                start = sum(seconds for _, seconds in report.timeline)
                self._speeds = replace(self._speeds, start=start)

    def counted(self, figures: Figures, *, served: bool) -> None:
        """Keep the figures of a call that has ended.

        Args:
            figures: of the call.
            served: the call reached a server; one that did not only cost GPU seconds.
        """
        speed = figures.tokens_per_second
        with self._lock:
            status = self._status
            calls = (*status.calls, figures)[-_KEPT_CALLS:] if served else status.calls
            self._status = replace(
                status,
                calls=calls,
                tokens_per_second=speed or status.tokens_per_second,
                gpu_seconds_reserved=status.gpu_seconds_reserved + figures.reserved,
                gpu_seconds_used=status.gpu_seconds_used + figures.used,
            )
            self._speeds = replace(self._speeds, tokens=speed or self._speeds.tokens)


class Meter:
    """Measures one call while its items pass by.

    Args:
        reserved: GPU seconds that ZeroGPU is asked for; 0 outside ZeroGPU.
    """

    def __init__(self, reserved: float) -> None:
        self.report: Report | None = None
        self._reserved = reserved
        self._when, self._began = time.time(), time.monotonic()
        self._lent: float | None = None
        self._first: float | None = None
        self._last = Piece("", finished=False, tokens=None, tokens_per_second=None, reason="")

    def take(self, item: Item | Report) -> None:
        """Take what an item says of the call."""
        now = time.monotonic()
        from_worker = not isinstance(item, Failure) and getattr(item, "stage", "") != "queue"
        if self._reserved and self._lent is None and from_worker:
            self._lent = now
        if isinstance(item, Report):
            self.report = item
        elif isinstance(item, Piece):
            if item.text and self._first is None:
                self._first = now - self._began
            speed = item.tokens_per_second or self._last.tokens_per_second
            tokens = item.tokens or self._last.tokens
            self._last = replace(item, tokens=tokens, tokens_per_second=speed)

    def figures(self) -> Figures:
        """Return the figures up to now."""
        now = time.monotonic()
        return Figures(
            when=self._when,
            first_token=self._first,
            seconds=now - self._began,
            tokens=self._last.tokens,
            warm=self.report is not None and self.report.warm,
            tokens_per_second=self._last.tokens_per_second,
            reason=self._last.reason,
            reserved=self._reserved if self._lent else 0.0,
            used=now - self._lent if self._lent else 0.0,
        )


def log(text: str) -> None:
    """Write a line to the Space's log."""
    sys.stderr.write(f"llama_space: {text}\n")
    sys.stderr.flush()


def _joined(
    old: tuple[tuple[str, float], ...], new: tuple[tuple[str, float], ...]
) -> tuple[tuple[str, float], ...]:
    """Add the stages of a server's start; a worker's second look at the store does not count."""
    known = dict(old)
    later = {
        name: seconds for name, seconds in new if name not in known or name in STAGES_OF_A_START
    }
    return tuple({**known, **later}.items())


def _lives(report: Report) -> bool:
    pids = (report.worker_pid, report.server_pid)
    return all(pid is not None and processes.lives(pid) for pid in pids)
