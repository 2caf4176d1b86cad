"""The engine behind the page: prepares runtime and model, streams answers, says what is running.

The page calls ``stream`` in the app's process, on ZeroGPU too. There the answer comes out of a
worker, a fork that this process cannot look into: what the worker knows (devices, memory, times)
arrives as one ``Report`` in its stream, is taken out here and remembered.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from llama_loader import doctor, processes
from llama_loader.errors import LoaderError
from llama_loader.events import Note, ignore
from translator import answering, duration, preparation, serving, words, zerogpu
from translator.answering import Job
from translator.values import Ask, Call, Failure, Item, Phase, Piece, Progress, Report, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_loader.events import Event
    from llama_loader.settings import Settings
    from translator.preparation import Preparation, Ready
    from translator.values import Runtime

__all__ = ["Ask", "Call", "Engine", "Failure", "Item", "Phase", "Piece", "Progress", "State"]

_KEPT_CALLS: Final = 20
_KEPT_WORDS: Final = 6
_OF_A_START: Final = frozenset({"devices", "start", "first token"})
_LOOK: Final = 0.5
"""Seconds between two looks at whether the preparation is over."""


class Engine:
    """One for each app. ``stream`` is what a page calls; everything else says how things stand."""

    def __init__(self, settings: Settings) -> None:
        """Keep the settings; on ZeroGPU decorate the entry point, which must be before the launch.

        Raises:
            SettingError: ZeroGPU without the ``spaces`` package.
        """
        self._settings = settings
        self._decorated = zerogpu.entry_point(settings.zerogpu_size) if settings.zerogpu else None
        self._lock = threading.Lock()
        self._over = threading.Condition(self._lock)
        self._state = State("preparing")
        self._ready: Ready | None = None
        self._busy = False
        self._told: dict[str, str] = {}
        self._began = time.monotonic()
        self._workers: dict[int, Report] = {}
        self._speeds = duration.Speeds()

    def begin(self) -> None:
        """Begin to get everything ready that needs no GPU; returns at once.

        Outside ZeroGPU the server is started too.
        """
        with self._lock:
            if self._busy or self._ready is not None:
                return
            self._busy = True
            self._began = time.monotonic()
            self._told.clear()
            self._state = replace(self._state, phase="preparing", failure=None, progress=())
        threading.Thread(target=self._prepare, name="translator-prepare", daemon=True).start()

    def retry(self) -> None:
        """Prepare again after a failure; nothing where it is under way or done."""
        self.begin()

    def state(self) -> State:
        """Return what is known now."""
        with self._lock:
            state = replace(self._state, progress=tuple(self._told.values())[-_KEPT_WORDS:])
            elapsed = time.monotonic() - self._began if self._busy else None
        return replace(state, warm=self._warm(), elapsed=elapsed)

    def stream(self, ask: Ask) -> Iterator[Item]:
        """Stream an answer: progress, pieces, and a ``Failure`` as the last item where it fails.

        Closing the iterator stops the generation and leaves the server for the next call. Waits
        for the preparation, without a GPU; after a failed one its ``Failure`` comes at once.
        """
        yield from self._wait()
        with self._lock:
            ready, failure = self._ready, self._state.failure
        if ready is None:
            yield failure or Failure("NOT_BEGUN", "the engine was not begun", "", 1)
            return
        job = Job(ready, ask, self.duration(ask), os.getpid())
        made = answering.answer(job)
        if self._decorated is not None:
            made = zerogpu.call(self._decorated, job)
        yield from self._watched(made)

    def duration(self, ask: Ask) -> int:
        """Return the seconds of GPU time to ask ZeroGPU for; the owner's own number wins."""
        if self._settings.zerogpu_duration is not None:
            return self._settings.zerogpu_duration
        count = duration.characters(ask.messages)
        return duration.seconds(count, ask.max_tokens, self._speeds, warm=self._warm())

    def doctor(self) -> str:
        """Return the doctor's page as text, without secrets. Takes seconds: not for a UI thread."""
        return doctor.examine(lambda: self._settings, sink=ignore).as_text()

    def close(self) -> None:
        """End the server; safe to call twice."""
        serving.stop()

    def _wait(self) -> Iterator[Progress]:
        while True:
            with self._over:
                if not self._busy or self._over.wait_for(lambda: not self._busy, _LOOK):
                    return
                latest = next(reversed(self._told.values()), "preparing")
            yield Progress("prepare", latest)

    def _watched(self, made: Iterator[Item | Report]) -> Iterator[Item]:
        """Pass the page what is for it; remember the rest, however the call ends."""
        seen = _Seen()
        try:
            for item in made:
                if isinstance(item, Report):
                    seen.report = item
                    self._remember(item)
                else:
                    seen.note(item)
                    yield item
        finally:
            if seen.report is not None:
                self._count(seen)

    def _remember(self, report: Report) -> None:
        runtime = report.runtime
        with self._lock:
            self._workers = {pid: one for pid, one in self._workers.items() if _lives(one)}
            self._workers[report.worker_pid] = report
            notes = (*self._state.notes, *report.notes)
            state = _with_runtime(self._state, runtime)
            self._state = replace(
                state,
                devices=report.devices,
                memory=dict(report.memory),
                server_pid=report.server_pid,
                timeline=_joined(state.timeline, report.timeline),
                notes=tuple(dict.fromkeys(notes)),
            )
            if not report.warm:
                start = sum(seconds for _, seconds in report.timeline)
                self._speeds = replace(self._speeds, start=start)

    def _count(self, seen: _Seen) -> None:
        with self._lock:
            calls = (*self._state.calls, seen.call())[-_KEPT_CALLS:]
            self._state = replace(self._state, calls=calls)
            if seen.speed:
                self._state = replace(self._state, tokens_per_second=seen.speed)
                self._speeds = replace(self._speeds, tokens=seen.speed)

    def _warm(self) -> bool:
        """Whether a worker that has a server lives; ZeroGPU may still choose another GPU."""
        return any(_lives(one) for one in tuple(self._workers.values()))

    def _prepare(self) -> None:
        """Prepare; whatever happens, nobody waits for ever."""
        failure: Failure | None = Failure(
            "UNEXPECTED",
            "the preparation ended unexpectedly; the Space's log has the place",
            "this is a defect: please report it with the log",
            1,
        )
        try:
            prepared = preparation.run(self._settings, self._hear)
            self._done(prepared)
            failure = None
        except LoaderError as error:
            failure = Failure.of(error)
        except OSError as error:
            failure = Failure("SYSTEM", str(error), "is there room on the disk?", 6)
        finally:
            with self._over:
                if failure is not None:
                    self._ready = None
                    self._state = replace(self._state, phase="failed", failure=failure)
                self._busy = False
                self._over.notify_all()
            if failure is not None:
                _log(f"error[{failure.code}]: {failure.message}\nhint: {failure.hint}")
        if failure is None and self._decorated is not None:
            self._warm_page_cache(prepared)

    def _done(self, prepared: Preparation) -> None:
        """Keep what was prepared; outside ZeroGPU start the server with it."""
        with self._lock:
            self._ready = prepared.ready
            self._state = replace(
                _with_runtime(self._state, prepared.runtimes[0]),
                model=prepared.ready.model.name,
                model_sha256=prepared.model_sha256,
                timeline=prepared.timeline,
            )
        if self._decorated is None:
            found = serving.shared(prepared.ready)
            while not found.start.wait(_LOOK):
                with self._lock:
                    self._told["server"] = found.latest
            supervisor = found.start.result()
            self._remember(found.report(supervisor, warm=False))
        with self._lock:
            self._state = replace(self._state, phase="ready")
        _log("ready")

    def _warm_page_cache(self, prepared: Preparation) -> None:
        """Read the model once, so that a worker's server finds it in main memory."""
        began = time.monotonic()
        if preparation.warm(prepared.ready.model, prepared.memory):
            took = ("page cache", round(time.monotonic() - began, 4))
            with self._lock:
                self._state = replace(self._state, timeline=_joined(self._state.timeline, (took,)))

    def _hear(self, event: Event) -> None:
        said = words.event(event)
        with self._lock:
            self._told.pop(words.about(event), None)
            self._told[words.about(event)] = said
            if isinstance(event, Note):
                notes = dict.fromkeys((*self._state.notes, words.plain(event)))
                self._state = replace(self._state, notes=tuple(notes))
        if isinstance(event, Note):
            _log(said)


class _Seen:
    """What one call was like, as the page saw it."""

    def __init__(self) -> None:
        self.report: Report | None = None
        self.speed: float | None = None
        self._when = time.time()
        self._began = time.monotonic()
        self._first: float | None = None
        self._tokens: int | None = None

    def note(self, item: Item) -> None:
        if not isinstance(item, Piece):
            return
        if item.text and self._first is None:
            self._first = time.monotonic() - self._began
        self._tokens = item.tokens or self._tokens
        self.speed = item.tokens_per_second or self.speed

    def call(self) -> Call:
        warm = self.report is not None and self.report.warm
        seconds = time.monotonic() - self._began
        return Call(self._when, self._first, seconds, self._tokens, warm)


def _with_runtime(state: State, runtime: Runtime) -> State:
    return replace(
        state,
        release=runtime.release,
        artifact=runtime.artifact,
        architecture=runtime.architecture,
        digest=runtime.digest,
        verified=runtime.verified,
    )


def _joined(
    old: tuple[tuple[str, float], ...], new: tuple[tuple[str, float], ...]
) -> tuple[tuple[str, float], ...]:
    """Add the stages of a server's start; a worker's second look at the store does not count."""
    known = dict(old)
    later = {name: seconds for name, seconds in new if name not in known or name in _OF_A_START}
    return tuple({**known, **later}.items())


def _lives(report: Report) -> bool:
    pids = (report.worker_pid, report.server_pid)
    return all(pid is not None and processes.lives(pid) for pid in pids)


def _log(text: str) -> None:
    """One or two lines for the Space's log."""
    sys.stderr.write(f"translator: {text}\n")
    sys.stderr.flush()
