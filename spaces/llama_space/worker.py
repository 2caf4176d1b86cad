"""One llama-server for this process, and the answers to calls: in a ZeroGPU worker, or in the app.

On ZeroGPU this process is a worker, a fork that lives for several calls, each in a thread of its
own. All calls share the server, whose life ``llama_loader.processes`` ties to the worker's.

A generator of answers yields something every ``BEAT`` seconds, also from a silent server: a ZeroGPU
worker notices only at a ``yield`` that the visitor has left.
"""

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from multiprocessing import util
from typing import Any, Final, TypeVar, final

from llama_loader import host, loader, settings
from llama_loader.client import ChatStream
from llama_loader.concurrency import Background, ahead
from llama_loader.errors import LoaderError, ServerError
from llama_loader.events import Event, Note, Stage, summed
from llama_loader.loader import Prepared, prepare
from llama_loader.server import Server
from llama_space import preparation, values
from llama_space.request import MARGIN, STAGES_OF_A_START, Request, Work, checked
from llama_space.values import Failure, Item, Piece, Progress, Ready, Status

BEAT: Final = 0.25
"""Seconds between two signs of life."""
SILENCE: Final = 120.0
"""Seconds without a word after which the server is suspected: a long prompt on a CPU takes some."""
_UNREAD: Final = 256
"""Pieces that may wait for a caller that is slower than the server."""
_BROKEN: Final = frozenset({"NO_ANSWER", "ANSWER_TIMEOUT", "ANSWER_CUT"})
"""Errors of a server that died or hangs; another one may answer."""

_Result = TypeVar("_Result")


@final
class SharedServer:
    """A server that is being started, or runs. Safe to use from threads."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        self.progress = Progress("start")
        self.server: Server | None = None
        self._notes: dict[Note, None] = {}
        self._prepared: Prepared
        self._stopped = threading.Event()
        self.start: Background[Server] = Background(self._start)

    def report(self, *, warm: bool) -> Status:
        """Return what runs now, and whether it did before this call; it must have started."""
        server = self.start.result()
        stages = self._prepared.timeline.stages
        return Status(
            "ready",
            **preparation.runtime(self._prepared),
            devices=server.plan.devices,
            memory=dict(server.report.buffers),
            server_pid=server.pid,
            warm=warm,
            timeline=summed(one for one in stages if one.name in STAGES_OF_A_START),
            notes=tuple(self._notes),
        )

    def stop(self) -> None:
        """End the server, also one that is being started; safe to call twice."""
        self._stopped.set()
        if self.server is not None:
            self.server.stop()

    def _start(self) -> Server:
        """Find the runtime for the GPU that is here now, hash it once more, and start it."""
        ready, ours = self.ready, settings.renewed(self.ready.settings)
        looking = host.begin(ours, ready.facts)
        prepared = prepare(
            ours, looking=looking, released=ready.released, hashed=False, sink=self._hear
        )
        loader.require_libraries(ours, prepared)
        self._prepared, self.progress = prepared, Progress("load")
        told, made = ready.told, self._made
        return loader.start(ours, prepared, ready.model, told, sink=self._hear, made=made)

    def _made(self, server: Server) -> None:
        self.server = server
        if self._stopped.is_set():
            server.stop()

    def _hear(self, event: Event) -> None:
        if not isinstance(event, Stage):
            self.progress = Progress("start", event)
        if isinstance(event, Note):
            self._notes[event] = None


def answer(ready: Ready, request: Request) -> Generator[Item | Status, None, None]:
    """Yield progress, one ``Status``, then pieces; an error is a ``Failure``, the last item.

    Closing the generator stops the generation; the server stays for the next call. The arguments
    cross a process by value, whenever that was forked.
    """
    began = time.monotonic()
    try:
        found = yield from started(ready)
        if request.work is None:
            yield from _asked(found, request)
        else:
            yield from _worked(found, request.work, began, request.reserved.seconds)
    except (LoaderError, OSError) as error:
        yield Failure.of(error)


def started(ready: Ready) -> Generator[Progress | Status, None, SharedServer]:
    """Start this process's server, or find it running; yield progress, then one ``Status``."""
    found = shared(ready)
    warm = found.start.wait(0)
    server = yield from _patiently(found.start, lambda: found.progress)
    yield from _patiently(Background(server.ensure))
    yield found.report(warm=warm)
    return found


def _worked(found: SharedServer, work: Work, began: float, seconds: int) -> Iterator[Any]:
    """Do the work of a request; all pieces of its answers go to the caller besides."""
    aside: list[Piece | Status] = []
    slowest, before = 0.0, time.monotonic()

    def ask(asked: object, **options: Any) -> Iterator[Item]:
        try:
            for item in _asked(found, checked(asked, options, found.ready.settings)):
                if isinstance(item, Piece | values.Status):
                    aside.append(item)
                if not isinstance(item, values.Status):
                    yield item
        except (LoaderError, OSError) as error:
            yield Failure.of(error)

    def enough() -> bool:
        nonlocal slowest, before
        now = time.monotonic()
        slowest, before = max(slowest, now - before), now
        return not seconds or now - began + slowest * MARGIN <= seconds

    for update in work(ask, enough):
        while aside:
            yield aside.pop(0)
        yield update


def _asked(found: SharedServer, request: Request) -> Iterator[Item | Status]:
    """Stream the answer to one request; a server that hangs is replaced, and asked once more."""
    server, said = found.start.result(), False
    try:
        for item in _streamed(server, request):
            said = said or isinstance(item, Piece)
            yield item
    except ServerError as error:
        if error.code not in _BROKEN:
            raise
        # found out now and replaced if need be, so that the next call has a server again
        again = Background(server.suspect)
        if said:
            hint = "ask again: llama-server is restarted if it has died"
            message = f"the answer broke off: {error.message}"
            raise ServerError(error.code, message, hint=hint) from error
        yield from _patiently(again)
        yield found.report(warm=False)
        yield from _streamed(server, request)


def _patiently(
    work: Background[_Result], now: Callable[[], Progress] = lambda: Progress("restart")
) -> Generator[Progress, None, _Result]:
    """Wait for work in another thread, and yield what it does now as a sign of life."""
    began = time.monotonic()
    while not work.wait(BEAT):
        yield replace(now(), seconds=time.monotonic() - began)
    return work.result()


def _streamed(server: Server, request: Request) -> Iterator[Piece | Progress]:
    """Stream one answer; the generation ends with this generator."""
    client = server.client(timeout=SILENCE)
    ask_for: Any = client.complete if isinstance(request.asked, str) else client.chat
    stream: ChatStream = ask_for(request.asked, **request.options)
    words: Generator[Piece | Progress, None, None] = iter(stream)
    began, finished = time.monotonic(), False
    waiting: Callable[[], Progress] = lambda: Progress("waiting", seconds=time.monotonic() - began)  # noqa: E731
    try:
        for item in ahead(words, _UNREAD, beat=BEAT, idle=waiting):
            if isinstance(item, Piece):
                began, finished = time.monotonic(), item.finished
            yield item
        if not finished:
            yield Piece("")
    finally:
        stream.stop()


_alive: tuple[int, int] | None = None
"""A pipe. Only the app's process holds its second end, so the first one ends with the app."""
_signals: int | None = None
"""In a worker: the file descriptor from which its signals' numbers are read."""
_ending: bool = False
"""This worker ends with the app already."""
_lock = threading.Lock()
_shared: SharedServer | None = None


def watch_forks() -> None:
    """Have every later fork know when this process, the app's, ends."""
    global _alive  # noqa: PLW0603 - one pipe for each app
    _alive = _alive or os.pipe()


def _begin_anew() -> None:
    """Let go of what is the parent's: its server, a lock that may be held, the pipe's end."""
    # Signals are written where a thread can wait for them
    global _lock, _shared, _signals, _ending
    _lock, _shared, _ending = threading.Lock(), None, False
    if _alive is not None:
        if _signals is None:
            os.close(_alive[1])
        _signals, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)


os.register_at_fork(after_in_child=_begin_anew)


def shared(ready: Ready) -> SharedServer:
    """Return this process's server: the one that runs or is being started, or a new one.

    A start that failed is tried again. A server of another model or release is replaced. From now
    on a ZeroGPU worker ends with the app.
    """
    global _shared, _ending  # noqa: PLW0603 - one server for each process is the point
    with _lock:
        if ready.settings.zerogpu and multiprocessing.parent_process() and not _ending:
            _ending = True
            threading.Thread(target=_end_with_app, name="llama-space-end", daemon=True).start()
        if _shared is not None:
            if _shared.ready == ready and _shared.start.error is None:
                return _shared
            _shared.stop()
        _shared = SharedServer(ready)
        # runs where a worker ends by SIGTERM, too, unlike atexit's functions; not in a fork
        util.Finalize(None, stop, exitpriority=100)
        return _shared


def stop() -> None:
    """End this process's server; does nothing where there is none.

    Ctrl-C cannot interrupt it: a second one would leave the server behind.
    """
    global _shared
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        with _lock:
            found, _shared = _shared, None
        if found is not None:
            found.stop()
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _end_with_app() -> None:
    """End this process, a worker, and its server as soon as the app has ended, or on SIGTERM.

    A worker waits for calls on a pipe whose other end it has inherited, so it would wait for ever.
    The kernel's parent-death signal is of no use: it would come at the end of the thread of the app
    that happened to fork the worker. On SIGTERM the package's worker first ends its call, which may
    take minutes.
    """
    parent = multiprocessing.parent_process()
    app = _alive[0] if _alive is not None else parent.sentinel if parent is not None else None
    waiting = select.poll()
    for end in (app, _signals):
        if end is not None:
            waiting.register(end, select.POLLIN)
    while app not in (ready := [end for end, _ in waiting.poll()]):
        if signal.SIGTERM in os.read(ready[0], 512):
            break
    os._exit(128 + signal.SIGTERM)  # the kernel ends the server with this process
