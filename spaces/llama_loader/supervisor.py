"""Restarts a llama-server that has died or hangs, until a restart is of no use.

A caller that sends requests calls ``ensure`` before each, and ``suspect`` when no answer came: the
server is asked for one token, with a deadline, and replaced if it stays silent (``/health`` would
still be 200). ``watch`` is for a process that only serves.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from llama_loader import notes
from llama_loader.errors import LoaderError, ServerError
from llama_loader.events import Note, ignore
from llama_loader.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_loader.events import Sink

LIMIT: Final = 5
WINDOW: Final = 600.0
"""Seconds: after ``LIMIT`` ends within them the cause is not bad luck."""
TRANSIENT: Final = frozenset({"SERVER_KILLED", "SERVER_CRASHED", "SERVER_ENDED", "CUDA_ERROR"})
"""Ends that another try may cure, unlike a bad model or too little memory."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
"""Seconds before a new start; doubled each time within the window."""
PROBE_EVERY: Final = 15.0
"""Seconds between two looks at whether the server's main loop turns."""
PROBE_DEADLINE: Final = 120.0
"""Seconds. One step of a long prompt may take tens of seconds on a CPU."""
TOKEN_DEADLINE: Final = 20.0
"""Seconds for the one token of ``suspect``; it may queue behind other answers."""


class Supervisor:
    """Owns a server and its successors on the same port; threads may share it."""

    def __init__(
        self,
        server: Server,
        *,
        sink: Sink = ignore,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._sink = sink
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=LIMIT)
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait

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
            try:
                self._server.start()
            except ServerError as error:
                if error.code not in TRANSIENT:
                    raise
                self._replace(error)
            return self._server

    def ensure(self) -> Server:
        """Return a server that runs; restart it if it has ended.

        Raises:
            ServerError: it died too often; the message has the last reason.
            LoaderError: what a new start cannot cure.
        """
        with self._lock:
            try:
                self._server.check()
            except LoaderError as error:
                if self._stopped.is_set():
                    raise
                self._replace(error)
            return self._server

    def suspect(self, *, deadline: float = TOKEN_DEADLINE) -> Server:
        """Return a server that gave a token just now; replace one that hangs.

        Raises:
            LoaderError: as for ``ensure``.
        """
        with self._lock:
            server = self.ensure()
            try:
                server.client().completion("1", max_tokens=1, timeout=deadline)
            except ServerError as error:
                server.wait(0.5)  # a broken connection comes before the end of the process
                self._replace_silent(error.message, deadline)
            return self._server

    def watch(self, *, every: float = PROBE_EVERY, deadline: float = PROBE_DEADLINE) -> None:
        """Keep it alive until ``stop``.

        Raises:
            LoaderError: as for ``ensure``.
        """
        while not self._stopped.is_set():
            server = self._server
            if server.wait(every):
                if not self._stopped.is_set():
                    self.ensure()
            elif not server.client().turns(timeout=deadline):
                with self._lock:
                    self._replace_silent("its main loop does not turn", deadline)

    def stop(self) -> None:
        """End it for good; a restart that another thread has begun leaves nothing behind."""
        self._stopped.set()
        self._server.stop()
        with self._lock:
            self._server.stop()

    def _replace_silent(self, why: str, deadline: float) -> None:
        """Replace a server that gave no answer, because it has ended or hangs."""
        hangs = f"llama-server hangs: no token within {deadline:g} s ({why})"
        reason: LoaderError = ServerError("SERVER_HANGS", hangs)
        try:
            self._server.check()
        except LoaderError as end:
            reason = end
        self._replace(reason)

    def _replace(self, reason: LoaderError) -> None:
        """Start a successor, again and again with growing pauses, or give up."""
        while True:
            self._server.stop()
            self._require_running()
            self._count(reason)
            pause = min(_FIRST_PAUSE * 2 ** (len(self._ends) - 1), _LONGEST_PAUSE)
            self._sink(Note("SERVER_RESTARTED", f"{reason.message}; started anew in {pause:g} s"))
            self._sleep(pause)
            # as it was asked for: what one start had to give up is tried again
            again = replace(self._server.asked, port=self._server.port)
            self._server = Server(again, before=self._server.before)
            self._require_running()  # ``stop`` ends this server, or came before it was here
            try:
                self._server.start()
            except ServerError as error:
                reason = error
            else:
                for note in notes.not_as_asked(self._server):
                    self._sink(note)
                return

    def _require_running(self) -> None:
        if self._stopped.is_set():
            raise ServerError("SERVER_STOPPED", "llama-server was stopped")

    def _count(self, reason: LoaderError) -> None:
        now = self._clock()
        while self._ends and self._ends[0] < now - WINDOW:
            self._ends.popleft()
        self._ends.append(now)
        if len(self._ends) == LIMIT:
            raise ServerError(
                "SERVER_GAVE_UP",
                f"llama-server ended {LIMIT} times within {WINDOW / 60:g} minutes; the last time:"
                f" {reason.message}",
                hint=reason.hint,
            ) from reason
