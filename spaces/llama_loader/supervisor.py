"""Restarts a llama-server that has died or hangs, until a restart is of no use.

A caller that sends requests calls ``ensure`` before each, and ``suspect`` when no answer came: the
server is asked for one token, with a deadline, and replaced if it stays silent (``/health`` would
still be 200). ``watch`` is for a process that only serves. Ends that no restart cures are raised.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from llama_loader import server_plan
from llama_loader.errors import LoaderError, ServerError
from llama_loader.events import Note, ignore
from llama_loader.gguf_header import ALL_LAYERS
from llama_loader.server import SETTLED, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llama_loader.client import Client
    from llama_loader.events import Sink

LIMIT: Final = 5
WINDOW: Final = 600.0
"""Seconds: after ``LIMIT`` ends within them the cause is not bad luck."""
TRANSIENT: Final = frozenset({"SERVER_KILLED", "SERVER_CRASHED", "SERVER_ENDED", "CUDA_ERROR"})
"""Ends that another try may cure, unlike a bad model or too little memory."""
_PAUSE: Final = 0.25
"""Seconds before a new start; doubled each time within the window."""
PROBE_EVERY: Final = 15.0
"""Seconds between two looks at whether the server's main loop answers ``/slots``."""
PROBE_DEADLINE: Final = 120.0
"""Seconds. One step of a long prompt may take tens of seconds on a CPU."""
TOKEN_DEADLINE: Final = 20.0
"""Seconds for the one token of ``suspect``; it may queue behind other answers."""


class Supervisor:
    """Owns a server and its successors on the same port; threads may share it."""

    def __init__(self, server: Server, *, sink: Sink = ignore) -> None:
        self._server = server
        self._sink = sink
        self._restarts: list[float] = []
        self._reason: LoaderError | None = None  # why the present server does not run
        self._lock = threading.RLock()
        self._stopped = threading.Event()

    @property
    def server(self) -> Server:
        """The present server; it may have died a moment ago."""
        return self._server

    def start(self) -> Server:
        """Start the first server; one that is killed or crashes while it loads is tried again.

        Raises:
            LoaderError: as for ``Server.start``, or that it died too often.
        """
        with self._lock:
            return self._started()

    def ensure(self, probe: Callable[[Client], object] = lambda _: None) -> Server:
        """Return a server that runs; restart it if it has ended, or if ``probe`` gets no answer.

        Raises:
            ServerError: it died too often; the message has the last reason.
            LoaderError: what a new start cannot cure.
        """
        with self._lock:
            server = self._server
            try:
                server.check()
                try:
                    probe(server.client())
                except ServerError as error:
                    server.check(within=SETTLED)
                    hangs = f"llama-server hangs: {error.message}"
                    raise ServerError("SERVER_HANGS", hangs) from error
            except LoaderError as error:
                self._reason = self._reason or error
                return self._started()
            return server

    def suspect(self) -> Server:
        """Return a server that gave a token just now; replace one that hangs.

        Raises:
            LoaderError: as for ``ensure``.
        """
        return self.ensure(
            lambda client: client.completion("1", max_tokens=1, timeout=TOKEN_DEADLINE)
        )

    def watch(self) -> None:
        """Keep it alive until ``stop``.

        Raises:
            LoaderError: as for ``ensure``.
        """
        while not self._stopped.is_set():
            self._server.wait(PROBE_EVERY)
            if not self._stopped.is_set():  # unlike a completion, this waits for no free slot
                self.ensure(lambda client: client.status("/slots", PROBE_DEADLINE))

    def stop(self) -> None:
        """End it for good; a restart that another thread has begun leaves nothing behind."""
        self._stopped.set()
        self._server.stop()
        with self._lock:
            self._server.stop()

    def _started(self) -> Server:
        """Start the present server, or a successor of one that ended, until one answers."""
        while True:
            if self._reason is not None:
                self._succeed(self._reason)
            self._require_running()  # ``stop`` ends this server, or came before it was here
            try:
                self._server.start()
            except LoaderError as error:
                self._reason = error
                if error.code not in TRANSIENT:
                    raise
            else:
                self._reason = None
                for note in not_as_asked(self._server):
                    self._sink(note)
                return self._server

    def _succeed(self, reason: LoaderError) -> None:
        """Put a new server in the place of one that ended, after a growing pause, or give up."""
        self._require_running()
        self._server.stop()
        now = time.monotonic()
        self._restarts = [one for one in self._restarts if one >= now - WINDOW]
        if len(self._restarts) == LIMIT - 1:
            raise ServerError(
                "SERVER_GAVE_UP",
                f"llama-server ended {LIMIT} times within {WINDOW / 60:g} minutes; the last"
                f" time: {reason.message}",
                hint=reason.hint,
            ) from reason
        pause = _PAUSE * 2 ** len(self._restarts)
        self._restarts.append(now)
        self._sink(Note("SERVER_RESTARTED", f"{reason.message}; started anew in {pause:g} s"))
        self._stopped.wait(pause)
        # as it was asked for: what one start had to give up is tried again
        again = replace(self._server.asked, port=self._server.port)
        self._server = Server(again, before=self._server.before)

    def _require_running(self) -> None:
        if self._stopped.is_set():
            raise ServerError("SERVER_STOPPED", "llama-server was stopped")


def not_as_asked(server: Server) -> Iterator[Note]:
    """Return what people should know of a start that succeeded with less than was asked for.

    A model that is on none of its devices is ``MODEL_ON_CPU``, an error, unless the CPU is allowed.
    """
    plan, asked, report = server.plan, server.asked, server.report
    if not plan.repacked:
        yield Note(
            "CPU_NOT_REPACKED",
            "this CPU announces instructions (AMX, AVX-512) that it then refuses (SIGILL);"
            " llama-server was started anew without weights laid out for them (--no-repack), so"
            " prompts take longer on the CPU",
            "nothing is wrong on the GPU; otherwise choose another machine type",
        )
    if plan.devices != asked.devices:
        yield Note(
            "DEVICES_ADDED",
            f"{', '.join(asked.devices)} had no room for the model, although it was reckoned to"
            f" fit; it is on {', '.join(plan.devices)} now",
            "another program may use that GPU; to start on all at once, name them in"
            " YAKULINGO_SPACES_LLAMA_DEVICE",
        )
    own_layers = server_plan.last(plan.extra, "-ngl", "--gpu-layers", "--n-gpu-layers")
    all_asked = asked.n_gpu_layers >= ALL_LAYERS and own_layers is None
    if all_asked and report.offloaded and report.offloaded < (report.layers or 0):
        yield Note(
            "LAYERS_LEFT_OVER",
            f"{report.offloaded} of {report.layers} layers are on the GPU, although all were asked"
            " for; the CPU does the rest, and each token waits for it",
            "where the GPU has no room for all, take a smaller quantisation or model, or lower"
            " YAKULINGO_SPACES_N_CTX",
        )
    owners = report.owners(plan.devices)
    unused = [name for name in plan.devices if name not in owners]
    if owners and unused:
        yield Note(
            "DEVICE_UNUSED",
            f"{', '.join(unused)} got no part of the model, by llama-server's own report",
            "it is free for something else: leave it out of YAKULINGO_SPACES_LLAMA_DEVICE",
        )
    if plan.devices and plan.n_gpu_layers and not (report.told or plan.allow_cpu):
        yield Note(
            "DEVICES_NOT_CHECKED",
            f"whether the model is on {', '.join(plan.devices)} could not be checked: llama-server"
            " did not say where it put it, so this start proves nothing of the GPU",
            "leave out --log-disable and --log-verbosity after --; nvidia-smi shows what a GPU"
            " holds",
        )
