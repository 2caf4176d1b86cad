"""Prepares everything that needs no GPU: manifest, runtimes, model, page cache.

On ZeroGPU the app's process has no GPU, and may not know which one a worker will get: then the
runtimes for both kinds of GPU that ZeroGPU has are fetched (docs/zerogpu.md).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from llama_loader import host, model, report
from llama_loader.errors import HostError, LoaderError, SettingError
from llama_loader.events import Note, Stage, Timeline
from llama_loader.loader import prepare
from llama_space.values import Failure, Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from llama_loader.events import Event, Sink
    from llama_loader.host import HostFacts
    from llama_loader.loader import Prepared
    from llama_loader.manifest import Manifest
    from llama_loader.settings import Settings
    from llama_space.status import Record

ZEROGPU_ARCHITECTURES: Final = ("120", "90")
"""Half an RTX Pro 6000 Blackwell today, slices of an H200 before that and as the fallback."""
STAGES_OF_A_START: Final = ("devices", "start", "first token")
"""What the start of a server adds to the stages of the preparation."""
_AGAIN_AFTER: Final = 30.0
"""Seconds after which a failure, such as an unreachable Hub, is no answer to a new call."""
_BLOCK: Final = 16 * 1024 * 1024
_CACHE_SHARE: Final = 0.6
"""Of main memory: a model that takes more would push itself out of the page cache."""


@dataclass(frozen=True)
class Ready:
    """All that a worker needs to start a server: picklable, and it opens no connection.

    Attributes:
        settings: as given; an archive without a pin is pinned to what was fetched.
        released: the trusted manifest and its URL; None where a tarball was given by URL.
        model: the model's file.
    """

    settings: Settings
    released: tuple[Manifest, str] | None
    model: Path


@dataclass(frozen=True)
class Preparation:
    """What was prepared.

    Attributes:
        ready: what workers get.
        runtimes: one for each architecture that may be needed; the likeliest first.
        verified: a pin or a signature of the person's vouches for them.
        timeline: (stage, seconds), each stage once.
        memory: bytes of main memory that this process may use; 0 for unknown.
    """

    ready: Ready
    runtimes: tuple[Runtime, ...]
    verified: bool
    timeline: tuple[tuple[str, float], ...]
    memory: int


_UNEXPECTED: Final = Failure(
    "UNEXPECTED",
    "the preparation ended unexpectedly; the Space's log has the place",
    "this is a defect: please report it with the log",
    1,
)


class Preparing:
    """A preparation in a thread of its own; any number of callers can follow its events.

    Args:
        work: prepares, and tells a sink about it.
        record: is told when the work begins and ends, and of its events.
        done: nothing is left to do.
    """

    def __init__(self, work: Callable[[Sink], None], record: Record, *, done: bool = False) -> None:
        self._work = work
        self._record = record
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._running, self._ended = False, 0.0
        self.done = done
        self.failure: Failure | None = None

    def begin(self, *, again: bool = False) -> None:
        """Begin; does nothing while it runs or once it is done.

        Args:
            again: begin also where an earlier try has failed in the last half minute.
        """
        with self._changed:
            fresh = time.monotonic() - self._ended < _AGAIN_AFTER
            if self._running or self.done or (self.failure is not None and fresh and not again):
                return
            self._running, self.failure, self._events = True, None, []
            self._record.begin()
        threading.Thread(target=self._run, name="llama-space-prepare", daemon=True).start()

    def wait(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds; True where it does not run."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout)

    def events(self) -> Iterator[Event]:
        """Yield the events of the present or latest try, from its first to its last."""
        with self._changed:
            events, seen = self._events, 0
        while True:
            with self._changed:
                over = not self._running or self._events is not events
                if not over and len(events) == seen:
                    self._changed.wait()
                    continue
                new = events[seen:]
            yield from new
            seen += len(new)
            if over:
                return

    def _run(self) -> None:
        """Do the work; whatever happens, no caller waits for ever."""
        failure: Failure | None = _UNEXPECTED
        try:
            self._work(self._hear)
            failure = None
        except (LoaderError, OSError) as error:
            failure = Failure.of(error)
        finally:
            with self._changed:
                self._running, self.done, self.failure = False, failure is None, failure
                self._ended = time.monotonic()
                self._record.ended(failure)
                self._changed.notify_all()

    def _hear(self, event: Event) -> None:
        self._record.hear(event)
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()


def run(settings: Settings, sink: Sink) -> Preparation:
    """Fetch and verify whatever is not in the store yet.

    Raises:
        LoaderError: any of ``prepare``'s and ``model.get``'s.
    """
    looking = host.begin(settings)
    timeline = Timeline()
    prepared = _runtimes(settings, looking.result(), timeline.listening(sink))
    for note in report.notes(prepared[0]):
        sink(note)
    with timeline.stage("model"):
        path = _model(settings, sink)
    stages = [stage for one in prepared for stage in one.timeline.stages]
    pinned = replace(settings, sha256=prepared[0].installed.sha256) if settings.url else settings
    return Preparation(
        ready=Ready(pinned, prepared[0].released, path),
        runtimes=tuple(map(runtime, prepared)),
        verified=report.trust(settings, prepared[0]) in {"pinned", "signed"},
        timeline=summed([*stages, *(one for one in timeline.stages if one.name == "model")]),
        memory=prepared[0].host.memory,
    )


def _runtimes(settings: Settings, facts: HostFacts, sink: Sink) -> list[Prepared]:
    """Install what may be needed; an architecture that the release lacks becomes a note.

    Raises:
        HostError: the release lacks all of them.
    """
    found: list[Prepared] = []
    refused: list[HostError] = []
    for arch in likely(settings, facts):
        wished = replace(settings, cuda_arch=arch)
        released = found[0].released if found else None
        try:
            found.append(prepare(wished, released=released, sink=sink))
        except HostError as error:
            if error.code != "NO_ARTIFACT_FOR_GPU":
                raise
            refused.append(error)
    if not found:
        raise refused[0]
    for one in refused:
        sink(Note(one.code, one.message, one.hint))
    return found


def likely(settings: Settings, facts: HostFacts) -> tuple[str | None, ...]:
    """Return the compute capabilities to prepare for; None is what this machine shows."""
    known = bool(facts.capabilities) and facts.gpu_source != "zerogpu"
    chosen = settings.cuda_arch or settings.url or settings.cpu_chosen
    if not settings.zerogpu or known or chosen:
        return (settings.cuda_arch,)
    return ZEROGPU_ARCHITECTURES


def runtime(prepared: Prepared) -> Runtime:
    """Return what was chosen."""
    installed = prepared.installed
    architecture = None
    if installed.artifact is not None:
        cuda = installed.artifact.cuda
        code = (*cuda.sass, *cuda.ptx) if cuda else ("cpu",)
        architecture = ";".join(dict.fromkeys(code))
    return Runtime(installed.release, architecture, installed.sha256)


def summed(stages: list[Stage]) -> tuple[tuple[str, float], ...]:
    """Add up stages of one name, in the order of their first."""
    seconds: dict[str, float] = {}
    for one in stages:
        seconds[one.name] = seconds.get(one.name, 0.0) + one.seconds
    return tuple((name, round(took, 4)) for name, took in seconds.items())


def _model(settings: Settings, sink: Sink) -> Path:
    """Fetch the model; a local one must be there, or a GPU would be asked for in vain."""
    path = model.get(model.from_settings(settings), settings, sink=sink)
    if not path.is_file():
        raise SettingError(
            "MODEL_MISSING",
            f"there is no file {path}",
            hint="correct YAKULINGO_SPACES_GGUF_PATH (Engine's gguf_path), or leave it out to have"
            " the model fetched",
        )
    return path


def warm(path: Path, memory: int) -> bool:
    """Read a file once, so that the next reader finds it in main memory; return whether it was.

    ``memory`` is that of the machine in bytes; 0 stands for unknown, then nothing is read.
    """
    try:
        if path.stat().st_size > memory * _CACHE_SHARE:
            return False
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass
    except OSError:
        return False
    return True
