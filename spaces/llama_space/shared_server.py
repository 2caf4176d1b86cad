"""The one llama-server of this process: started once, shared by all calls, supervised.

On ZeroGPU this process is a worker, a fork that lives for several calls, each in a thread of its
own. The server is kept in a global of the module, and ``llama_loader.processes`` ties its life to
the worker's from a thread that outlives the call.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from multiprocessing import util
from typing import TYPE_CHECKING, Final, final

from llama_loader import gguf_header, loader, settings
from llama_loader.concurrency import Background
from llama_loader.events import Note
from llama_loader.loader import prepare
from llama_space import event_text, preparation
from llama_space.values import Progress, Report

if TYPE_CHECKING:
    from llama_loader.events import Event
    from llama_loader.supervisor import Supervisor
    from llama_space.preparation import Ready
    from llama_space.values import Runtime

PLAIN_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template that adds nothing: with it llama-server's chat is a completion."""


@final
class SharedServer:
    """A server that is being started, or runs. Safe to use from threads."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        self.progress = Progress("start")
        self._notes: dict[Note, None] = {}
        self._runtime: Runtime | None = None
        self._timeline: tuple[tuple[str, float], ...] = ()
        self._stopped = threading.Event()
        self.supervisor: Supervisor | None = None
        self.start: Background[Supervisor] = Background(self._start)

    def report(self, supervisor: Supervisor, *, warm: bool) -> Report:
        """Return what runs now."""
        if self._runtime is None:
            raise AssertionError("a server that runs has a runtime")
        server = supervisor.server
        return Report(
            runtime=self._runtime,
            devices=server.plan.devices,
            memory=server.report.buffers,
            server_pid=server.pid,
            warm=warm,
            timeline=self._timeline,
            notes=tuple(self._notes),
        )

    def stop(self) -> None:
        """End the server, also one that is being started; safe to call twice."""
        self._stopped.set()
        if self.supervisor is not None:
            self.supervisor.stop()

    def _start(self) -> Supervisor:
        """Find the runtime for the GPU that is here now, hash it once more, and start it."""
        ours = settings.renewed(self.ready.settings)
        prepared = prepare(ours, released=self.ready.released, hashed=False, sink=self._hear)
        self._runtime = preparation.runtime(prepared)
        loader.require_libraries(ours, prepared)
        self.progress = Progress("load")
        told = server_arguments(gguf_header.chat_template(self.ready.model))
        supervisor = loader.start(
            ours, prepared, self.ready.model, told, sink=self._hear, made=self._made
        )
        self._timeline = preparation.summed(prepared.timeline.stages)
        return supervisor

    def _made(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        if self._stopped.is_set():
            supervisor.stop()

    def _hear(self, event: Event) -> None:
        event = event_text.plain(event)
        self.progress = Progress("start", event)
        if isinstance(event, Note):
            self._notes[event] = None


def server_arguments(template: str | None) -> tuple[str, ...]:
    """Return what llama-server must be told about the chat template in the model's header.

    A base model carries none. llama-server would take ChatML for it, whose marks a base model has
    never seen.
    """
    return ("--chat-template", PLAIN_TEMPLATE) if template is None else ()


_lock = threading.Lock()
_shared: SharedServer | None = None
_finalizer: util.Finalize | None = None


def _forget() -> None:
    """Begin anew in a forked child: the server is the parent's, and the lock may be held there."""
    global _lock, _shared, _finalizer
    _lock, _shared, _finalizer = threading.Lock(), None, None


os.register_at_fork(after_in_child=_forget)


def shared(ready: Ready) -> SharedServer:
    """Return this process's server: the one that runs or is being started, or a new one.

    A start that failed is tried again. A server of another model or release is replaced.
    """
    global _shared, _finalizer  # noqa: PLW0603 - one server for each process is the point
    with _lock:
        if _shared is not None:
            failed = _shared.start.wait(0) and _shared.start.error is not None
            if _shared.ready == ready and not failed:
                return _shared
            _shared.stop()
        _shared = SharedServer(ready)
        # finalizers run where a worker ends by SIGTERM; atexit's functions do not
        _finalizer = _finalizer or util.Finalize(None, stop, exitpriority=100)
        return _shared


def stop() -> None:
    """End this process's server; does nothing where there is none.

    Ctrl-C cannot interrupt it: a second one would leave the server's folder behind.
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


def remove_scratch() -> None:
    """Remove the server's log and key: for a process that ends without stopping its server."""
    supervisor = _shared.supervisor if _shared is not None else None
    log = supervisor.server.log_path if supervisor is not None else None
    if log is not None:
        shutil.rmtree(log.parent, ignore_errors=True)
