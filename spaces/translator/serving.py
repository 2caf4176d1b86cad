"""The one llama-server of this process: started once, shared by its calls, supervised.

On ZeroGPU this process is a worker, a fork that lives for several calls, each in a thread of its
own. The server is kept in a global of the module, and ``llama_loader.processes`` ties its life to
the worker's from a thread that outlives the call.
"""

from __future__ import annotations

import os
import threading
import time
from multiprocessing import util
from typing import TYPE_CHECKING, Final, final

from llama_loader import (
    client,
    gguf_header,
    launch,
    processes,
    self_test,
    server_plan,
    settings,
)
from llama_loader.background import Background
from llama_loader.events import Note
from llama_loader.prepare import prepare
from translator import preparation, prompt, words
from translator.values import Report

if TYPE_CHECKING:
    from llama_loader.events import Event
    from llama_loader.supervisor import Supervisor
    from translator.preparation import Ready
    from translator.values import Runtime

# a fork imports nothing: another thread may have held an import lock when it was made
_USED_LATER = (client, gguf_header, self_test, server_plan)


@final
class Serving:
    """A server that is being started, or runs. Safe to use from threads."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        self._latest = "starting llama-server"
        self._notes: dict[Note, None] = {}
        self._runtime: Runtime | None = None
        self._timeline: tuple[tuple[str, float], ...] = ()
        self._stopped = threading.Event()
        self.start: Background[Supervisor] = Background(self._start)

    @property
    def latest(self) -> str:
        """What is being done, in words."""
        return self._latest

    def report(self, supervisor: Supervisor, *, warm: bool) -> Report:
        """Say what runs now."""
        if self._runtime is None:
            raise AssertionError("a server that runs has a runtime")
        server = supervisor.server
        return Report(
            runtime=self._runtime,
            devices=server.plan.devices,
            memory=server.report.buffers,
            server_pid=server.pid,
            worker_pid=os.getpid(),
            warm=warm,
            timeline=self._timeline,
            notes=tuple(self._notes),
        )

    def stop(self) -> None:
        """End the server, or have its start end it; safe to call twice."""
        self._stopped.set()
        if self.start.wait(0) and self.start.error is None:
            self.start.result().stop()

    def _start(self) -> Supervisor:
        """Find the runtime for the GPU that is here now, hash it once more, and start it."""
        processes.spawn_soon()
        ours = settings.renewed(self.ready.settings)
        prepared = prepare(ours, released=self.ready.released, sink=self._hear)
        self._runtime = preparation.runtime(prepared, pinned=self.ready.pinned)
        launch.require_libraries(prepared, allow_cpu=ours.allow_cpu or ours.cpu_chosen)
        self._latest = f"llama-server loads {self.ready.model.name}"
        told = prompt.server_arguments(gguf_header.chat_template(self.ready.model))
        supervisor = launch.start(ours, prepared, self.ready.model, told, sink=self._hear)
        self._timeline = preparation.summed(prepared.timeline.stages)
        if self._stopped.is_set():
            supervisor.stop()
        return supervisor

    def _hear(self, event: Event) -> None:
        self._latest = words.event(event)
        if isinstance(event, Note):
            self._notes[words.plain(event)] = None


_lock = threading.Lock()
_shared: tuple[int, Serving] | None = None
_finalizer: tuple[int, util.Finalize] | None = None
_watched: int | None = None
_LOOK: Final = 0.5
"""Seconds between two looks at whether the app's process is there."""


def _renew_lock() -> None:
    """A fork while another thread held the lock would leave it locked for ever in the child."""
    global _lock  # noqa: PLW0603 - there is one lock for each process
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def shared(ready: Ready) -> Serving:
    """Return this process's server: the one there is, or a new one.

    A start that failed is tried again; another model or release takes the place of the old.
    """
    global _shared  # noqa: PLW0603 - one server for each process is the point
    with _lock:
        if _shared is not None and _shared[0] == os.getpid():
            serving = _shared[1]
            failed = serving.start.wait(0) and serving.start.error is not None
            if serving.ready == ready and not failed:
                return serving
            serving.stop()
        serving = Serving(ready)
        _shared = (os.getpid(), serving)
        _stop_at_exit()
        return serving


def end_with(parent: int) -> None:
    """End this process, a worker, and its server when the app's process has ended.

    A worker waits for calls on a pipe whose other end it has inherited, so it would wait for ever.
    The kernel's parent-death signal is of no use to it: it would come at the end of the thread of
    the app that happened to fork it.
    """
    global _watched  # noqa: PLW0603 - one watch for each process
    with _lock:
        if _watched == os.getpid():
            return
        _watched = os.getpid()
    threading.Thread(target=_watch, args=(parent,), name="translator-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    stop()
    os._exit(0)


def _stop_at_exit() -> None:
    """Finalizers run where a worker ends by SIGTERM; what ``atexit`` knows does not."""
    global _finalizer  # noqa: PLW0603 - one for each process, too
    if _finalizer is None or _finalizer[0] != os.getpid():
        _finalizer = (os.getpid(), util.Finalize(None, stop, exitpriority=100))


def stop() -> None:
    """End this process's server; nothing where there is none."""
    global _shared
    with _lock:
        found, _shared = _shared, None
    if found is not None and found[0] == os.getpid():
        found[1].stop()
