"""The engine's values, progress as lines of text, and the record that collects what is known.

The values are frozen and picklable, because workers send them to the app's process. A ZeroGPU
worker is a process that the app cannot inspect: its facts arrive as a ``Status`` in the
stream of each call, before the first piece.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from llama_loader import events, processes
from llama_loader.client import Piece as Piece  # noqa: PLC0414 - one of the engine's values
from llama_loader.errors import LoaderError, StoreError
from llama_loader.events import Event, Note, Stage
from llama_loader.host import HostFacts
from llama_loader.manifest import Manifest
from llama_loader.settings import Settings

Stages = tuple[tuple[str, float], ...]
"""Stages of a start in their order, with their seconds."""
Phase = Literal["preparing", "ready", "failed", "closed"]
Waiting = Literal["prepare", "queue", "start", "load", "restart", "waiting"]

_WORDS: Final[Mapping[Waiting, str]] = {
    "prepare": "preparing",
    "queue": "ZeroGPU lends a GPU as soon as one is free",
    "start": "starting llama-server",
    "load": "llama-server loads the model",
    "restart": "llama-server is restarted",
    "waiting": "waiting for words",
}
_AGAIN_AFTER: Final = 30.0
"""Seconds after which a failure, such as an unreachable Hub, is no answer to a new call."""
_KEPT_CALLS: Final = 20
_REFUSED: Final = re.compile(r"\(([0-9]{1,6})s requested vs\. ([0-9]{1,6})s left\)")
"""A part of the `spaces` package's message (spaces/zero/client.py)."""

_OF_A_SERVER: Final = (
    *("release", "architecture", "digest"),
    *("devices", "memory", "server_pid", "timeline", "notes"),
)
"""A worker's facts: its runtime differs from the prepared one if its GPU differs."""


@dataclass(frozen=True)
class Ready:
    """All that a worker needs to start a server: picklable, and it opens no connection."""

    settings: Settings  # as given; an archive without a pin is pinned to what was fetched
    # the trusted manifest and its URL; None where a tarball was given by URL
    released: tuple[Manifest, str] | None
    # the (first) file of the model, and the bytes of all its files
    model: Path
    size: int = 0
    # this machine's; a worker only asks the driver for its GPU
    facts: HostFacts | None = field(default=None, compare=False)
    told: tuple[str, ...] = ()  # what llama-server must be told about the model


class Reserved(NamedTuple):
    """GPU seconds: what a call reserves on ZeroGPU, and the least that can be enough for it.

    ``left`` is what the visitor had left, where ZeroGPU has reported it.
    """

    seconds: int = 0
    least: int = 0
    left: int | None = None

    def after(self, refusal: str) -> Reserved | None:
        """Return what to ask for after a refusal that says how much is left; None: give up.

        ZeroGPU multiplies the reserved seconds by its own factor, so the message's share counts.
        """
        told = _REFUSED.search(refusal)
        if told is None or not int(told[1]):
            return None
        seconds = math.floor(self.seconds * int(told[2]) / int(told[1]))
        enough = self.least <= seconds < self.seconds
        return Reserved(seconds, self.least, int(told[2])) if enough else None


@dataclass(frozen=True)
class Progress:
    """What is being waited for, the loader's latest event about it, and the seconds so far."""

    stage: Waiting
    event: Event | None = None
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """A line for a person, in English; seconds are left out below one."""
        line = events.line(self.event) if self.event else _WORDS[self.stage]
        return f"{line} ({int(self.seconds)} s)" if self.seconds >= 1 else line


@dataclass(frozen=True)
class Failure:
    """An error as a value: raised in a ZeroGPU worker, an exception would cost that worker.

    The fields are those of ``LoaderError``: single lines, without secrets.
    """

    code: str
    message: str
    hint: str
    exit_status: int

    @property
    def status(self) -> int:
        """The exit status, under the name that a ``Check`` gives it."""
        return self.exit_status

    @classmethod
    def of(cls, error: LoaderError | OSError) -> Failure:
        """Return an error as a value; one of the system's is disk trouble."""
        if isinstance(error, OSError):
            error = StoreError("SYSTEM/files", error=error)
        return cls(error.code, error.message, error.hint, error.exit_status)

    def error(self) -> LoaderError:
        """Return this value as an error, to be raised."""
        kinds = {kind.exit_status: kind for kind in LoaderError.__subclasses__()}
        return kinds.get(self.exit_status, LoaderError)(self.code, self.message, hint=self.hint)


@dataclass(frozen=True)
class Figures:
    """One call in numbers; the last item of an answer that ended well.

    Attributes:
        when: seconds since the epoch at its begin.
        first_token: seconds until the first words; None where there were none.
        tokens, tokens_per_second, reason: as in the last ``Piece``.
        warm: the server ran already.
        reserved, used: GPU seconds that the call reserved, and those from the worker's first
            sign of life to the end; 0 outside ZeroGPU.
        left: GPU seconds that the visitor had left before, where ZeroGPU has reported it.
    """

    when: float
    first_token: float | None = None
    seconds: float = 0.0
    tokens: int | None = None
    warm: bool = False
    tokens_per_second: float | None = None
    reason: str = ""
    reserved: float = 0.0
    used: float = 0.0
    left: int | None = None


@dataclass(frozen=True)
class Address:
    """Where an OpenAI client finds the server, which refuses requests without the key."""

    base_url: str
    api_key: str = field(repr=False)


@dataclass(frozen=True)
class Status:
    """What is running, by the facts of this process.

    Attributes:
        phase: ``ready`` once everything that needs no GPU is done; ``closed`` after
            ``Engine.close``, until a call restarts the server; ``failure`` is why it is ``failed``.
        release, digest: None for an archive by URL; the tarball's sha256.
        architecture: what its binaries were compiled for (``90``, ``cpu``), None for unknown.
        verified: a pin or a signature vouches for the tarball.
        model_sha256: what the model's file was compared with; None where no digest is pinned.
        devices: llama-server's names; empty for the CPU, and before the first start.
        memory: bytes of weights by buffer, in llama-server's words.
        gpu_seconds_reserved, gpu_seconds_used: sums of reserved and of used GPU seconds.
        server_pid: of the server of the last call.
        warm: that server runs; ZeroGPU may still choose another GPU for the next call.
        calls: the last ones, oldest first.
        progress, elapsed: the latest news of the preparation, and its seconds while it runs.
        notes: what a person should know: not as asked, or not verified.
    """

    phase: Phase
    release: str | None = None
    architecture: str | None = None
    digest: str | None = None
    verified: bool = False
    model: str | None = None
    model_sha256: str | None = None
    devices: tuple[str, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    tokens_per_second: float | None = None
    gpu_seconds_reserved: float = 0.0
    gpu_seconds_used: float = 0.0
    server_pid: int | None = None
    warm: bool = False
    timeline: Stages = ()
    calls: tuple[Figures, ...] = ()
    progress: Progress | None = None
    elapsed: float | None = None
    failure: Failure | None = None
    notes: tuple[Note, ...] = ()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, such as ``resolve``, ``fetch``, ``model`` or ``start``."""
        return dict(self.timeline)

    @property
    def device(self) -> str | None:
        """Where the model runs: device names, or ``CPU``; None before the first start."""
        if self.devices:
            return ", ".join(self.devices)
        return "CPU" if self.server_pid is not None or self.calls else None


Item = Progress | Piece | Figures | Failure
"""One of the values that ``Engine.events`` yields."""


class Record:
    """What is known so far, and how far the preparation is. Safe to use from threads."""

    def __init__(self, status: Status | None = None, ready: Ready | None = None) -> None:
        self.ready = ready
        self.failure: Failure | None = None
        self._status = status or Status("preparing")
        self._changed = threading.Condition()
        self._events: list[Event] = []
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
                elapsed=None if self._began is None else time.monotonic() - self._began,
                warm=pid is not None and processes.lives(pid),
            )

    def change(self, *, timeline: Stages = (), notes: Iterable[Note] = (), **fields: Any) -> None:
        """Set fields of the status; stages of this start, and notes, are added."""
        with self._changed:
            stages = {**self._status.seconds, **dict(timeline)}
            fields["notes"] = tuple(dict.fromkeys((*self._status.notes, *notes)))
            self._status = replace(self._status, timeline=tuple(stages.items()), **fields)

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
            self.change(phase="preparing", progress=None, failure=None)
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
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
            if not isinstance(event, Stage):
                self.change(progress=Progress("prepare", event))
        if isinstance(event, Note):
            self.change(notes=(event,))
            log(events.line(event))

    def reported(self, found: Status) -> None:
        """Keep what a worker reports; after ``Engine.close`` there is a server again."""
        phase = self._status.phase
        told = {name: getattr(found, name) for name in _OF_A_SERVER}
        self.change(phase="ready" if phase == "closed" else phase, **told)

    def measured(
        self, made: Generator[Item | Status | Reserved, None, None]
    ) -> Generator[Item, None, Figures | None]:
        """Pass a call's items on and keep what they say of it, however it ends.

        Returns:
            The figures of a call that reached a server; None where it reached none.
        """
        figures, began, lent = Figures(time.time()), time.monotonic(), None
        served, reserved, item, told = False, Reserved(), None, 0
        try:
            with contextlib.closing(made):
                for item in made:
                    if isinstance(item, Reserved):
                        reserved = item
                        continue
                    now = time.monotonic()
                    if reserved.seconds and not (
                        lent or item == Progress("queue") or isinstance(item, Failure)
                    ):
                        lent = now
                    if isinstance(item, Status):
                        self.reported(item)
                        served, figures = True, replace(figures, warm=item.warm)
                        continue
                    if isinstance(item, Piece):
                        figures = replace(
                            figures,
                            first_token=figures.first_token or (now - began if item.text else None),
                            tokens=told + item.tokens if item.tokens else figures.tokens,
                            tokens_per_second=item.tokens_per_second or figures.tokens_per_second,
                            reason=item.reason,
                        )
                        told = (figures.tokens or 0) if item.finished else told
                    yield item
        finally:
            now = time.monotonic()
            asked, _, left = reserved if lent else Reserved()
            figures = replace(figures, seconds=now - began, reserved=asked, left=left)
            figures = replace(figures, used=now - (lent or now))
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
