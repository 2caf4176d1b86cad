"""Collects what this process learns about the engine, and returns it as one ``Status``.

A ZeroGPU worker is a process that the app cannot look into: what the worker knows arrives as one
``Report`` in the stream of each call.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from llama_loader import processes
from llama_loader.events import Note
from llama_space import event_text
from llama_space.preparation import STAGES_OF_A_START
from llama_space.request import Speeds
from llama_space.values import Failure, Figures, Piece, Progress, Report, Status

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
        self._progress: dict[str, Progress] = {}
        self._began: float | None = None
        self.speeds = Speeds()

    def copy(self) -> Record:
        """Return a record for a forked child; takes no lock, because its owner is not there."""
        return Record(self._status)

    @property
    def latest(self) -> Progress:
        """The latest news of the preparation."""
        with self._lock:
            return next(reversed(self._progress.values()), Progress("prepare"))

    def status(self) -> Status:
        """Return what is known now."""
        with self._lock:
            return replace(
                self._status,
                progress=tuple(self._progress.values())[-_KEPT_LINES:],
                elapsed=None if self._began is None else time.monotonic() - self._began,
                warm=self.warm(),
            )

    def warm(self) -> bool:
        """Whether the server of the last call runs; ZeroGPU may still choose another GPU."""
        pid = self._status.server_pid
        return pid is not None and processes.lives(pid)

    def begin(self) -> None:
        """Note that a preparation begins."""
        with self._lock:
            self._began = time.monotonic()
            self._progress.clear()
            self._change(phase="preparing", failure=None)

    def hear(self, event: Event) -> None:
        """Keep an event; a note stays, and goes to the log."""
        event = event_text.plain(event)
        with self._lock:
            self._progress.pop(event_text.about(event), None)
            self._progress[event_text.about(event)] = Progress("prepare", event)
            if isinstance(event, Note):
                self._note(event)
        if isinstance(event, Note):
            log(event_text.event(event))

    def say(self, progress: Progress) -> None:
        """Keep what the server that is being started does."""
        with self._lock:
            self._progress["server"] = progress

    def prepared(self, found: Preparation) -> None:
        """Keep what was prepared."""
        with self._lock:
            self._change(
                **vars(found.runtimes[0]),
                verified=found.verified,
                model=found.ready.model.name,
                model_sha256=found.ready.settings.gguf_sha256,
                timeline=found.timeline,
            )

    def ended(self, failure: Failure | None) -> None:
        """Note that the preparation has ended, well where there is no failure."""
        with self._lock:
            self._began = None
            if self._status.phase == "closed":
                return
            self._change(phase="ready" if failure is None else "failed", failure=failure)
        log("ready" if failure is None else failure.error().render())

    def closed(self) -> None:
        """Note that the server was ended on purpose."""
        with self._lock:
            self._change(phase="closed", server_pid=None)

    def timed(self, stage: str, seconds: float) -> None:
        """Keep the seconds of a stage."""
        with self._lock:
            self._time((stage, round(seconds, 4)))

    def reported(self, report: Report) -> None:
        """Keep what a worker reports."""
        with self._lock:
            self._change(
                **vars(report.runtime),
                phase="ready" if self._status.phase == "closed" else self._status.phase,
                devices=report.devices,
                memory=dict(report.memory),
                server_pid=report.server_pid,
            )
            self._time(*report.timeline)
            self._note(*report.notes)
            if not report.warm:
                start = sum(seconds for _, seconds in report.timeline)
                self.speeds = replace(self.speeds, start=start)

    def counted(self, figures: Figures, *, served: bool) -> None:
        """Keep the figures of a call; one that reached no server only cost GPU seconds."""
        speed = figures.tokens_per_second
        with self._lock:
            status = self._status
            self._change(
                calls=(*status.calls, figures)[-_KEPT_CALLS:] if served else status.calls,
                tokens_per_second=speed or status.tokens_per_second,
                gpu_seconds_reserved=status.gpu_seconds_reserved + figures.reserved,
                gpu_seconds_used=status.gpu_seconds_used + figures.used,
            )
            self.speeds = replace(self.speeds, tokens=speed or self.speeds.tokens)

    def _change(self, **fields: Any) -> None:
        self._status = replace(self._status, **fields)

    def _note(self, *notes: Note) -> None:
        self._change(notes=tuple(dict.fromkeys((*self._status.notes, *notes))))

    def _time(self, *stages: tuple[str, float]) -> None:
        """Add the stages of a server's start; a worker's second look at the store is not one."""
        known = dict(self._status.timeline)
        for name, seconds in stages:
            if name not in known or name in STAGES_OF_A_START:
                known[name] = seconds
        self._change(timeline=tuple(known.items()))


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
