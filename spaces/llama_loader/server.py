"""Starts a ``llama-server``, proves that it answers, keeps it alive, and ends it with its group.

It listens on loopback with a random key, which it reads from its standard input and which only its
own socket gets, so no other user of the machine can use it. It is ready when a one-token completion
has come back: ``/health`` alone stays 200 even after CUDA has hung. It dies with this process,
however that ends (see ``processes``), and leaves nothing on the disk.

A server that died or hangs is restarted, until restarts no longer help. A caller that sends
requests calls ``ensure`` before each, and ``suspect`` when no answer came.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar, final

from llama_loader import processes, server_log, server_plan
from llama_loader.errors import HostError, LoaderError, ServerError
from llama_loader.events import Note, Sink, ignore
from llama_loader.server_log import LoadReport, ServerLog
from llama_loader.server_plan import ServerPlan

if TYPE_CHECKING:
    from llama_loader.client import Client

STOP_GRACE: Final = 5.0
"""Seconds from SIGTERM to SIGKILL. A server that has loaded ends in 0.1 s."""
_POLL: Final = 0.01
"""Seconds between two checks of a server that is loading."""
_SETTLED: Final = 0.5
"""Seconds: a connection breaks a moment before the process's end can be seen."""
_TRIES: Final = 4
"""Tries of one start: with less, and on another port where one is lost before it is bound."""
LIMIT: Final = 5
WINDOW: Final = 600.0
"""Seconds: after ``LIMIT`` ends within them the cause is not bad luck."""
TRANSIENT: Final = frozenset({"SERVER_KILLED", "SERVER_CRASHED", "SERVER_ENDED", "CUDA_ERROR"})
"""Ends that another try may cure, unlike a bad model or too little memory."""
_PAUSE: Final = 0.25
"""Seconds before a new start; doubled each time within the window."""
PROBE_EVERY: Final = 15.0
"""Seconds between two checks whether the server's main loop answers ``/slots``."""
PROBE_DEADLINE: Final = 120.0
"""Seconds. One step of a long prompt may take tens of seconds on a CPU."""
TOKEN_DEADLINE: Final = 20.0
"""Seconds for the one token of ``suspect``; it may queue behind other answers."""

_Answer = TypeVar("_Answer")


@final
class Server:
    """A llama-server and its successors, one process at a time; threads may share it.

    Use as a context manager, or call ``stop``. All other methods raise what ended the server:
    ``ServerError`` (port taken, bad model, out of memory, killed, no answer in time, died too
    often …), ``HostError`` (a library, a device or code for the GPU is missing, or the model landed
    on the CPU), ``SettingError`` (it does not take one of ``extra``), or what ``before`` raises.

    Args:
        plan: what to run; later ``plan`` is what runs, ``asked`` what was planned.
        before: called each time that it is about to be executed; what it raises prevents that.
        sink: told of restarts, and of a start that gave up a part of what was planned.
    """

    def __init__(
        self, plan: ServerPlan, *, before: Callable[[], None] = lambda: None, sink: Sink = ignore
    ) -> None:
        self.plan = self.asked = plan
        self.before = before
        self.port = plan.port or 0
        self.api_key: str | None = None
        # seconds from the start to ``/health`` 200, and to the first token
        self.started: tuple[float, float] | None = None
        self._sink = sink
        self._program = processes.Program()
        self._held: socket.socket | None = None
        self._log = ServerLog()
        self._restarts: list[float] = []
        self._reason: LoaderError | None = None  # why it does not run, though it should
        self._lock = threading.RLock()
        self._stopped = threading.Event()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address at which the server listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Its process id, None where it does not run."""
        return self._program.pid

    @property
    def report(self) -> LoadReport:
        """On which devices the model's weights are, as llama-server's log reports."""
        return self._log.report

    def client(self, *, timeout: float = 60.0) -> Client:
        """Return a client, with its ``timeout``, that sends the key to the present process alone.

        Any user can bind the port once the process has ended, and must not get the key.
        """
        from llama_loader import client  # only now: it is imported while the server loads

        program = self._program

        def require_ours() -> None:
            if self._owns_its_port(program) is False:
                raise ServerError("NO_ANSWER/other", url=self.url)

        return client.Client(self.port, self.api_key, timeout, require_ours)

    def start(self) -> None:
        """Start it and wait for its first token.

        Where that cannot be as planned it is tried once more with less (``ServerPlan.eased``). Each
        try has ``startup_timeout``. Nothing is left of a start that fails or is interrupted.
        """
        try:
            self._begin()
        except BaseException:
            self._let_go()
            raise

    def keep(self) -> Server:
        """Start it; one that is killed or crashes while it loads is tried again."""
        with self._lock:
            while True:
                if self._reason is not None:
                    self._renew(self._reason)
                self._require_wanted()
                try:
                    self._begin()
                except LoaderError as error:
                    self._reason = error
                    if error.code not in TRANSIENT:
                        raise
                else:
                    self._reason = None
                    for note in server_plan.not_as_asked(self.plan, self.asked, self.report):
                        self._sink(note)
                    return self

    def ensure(self, probe: Callable[[Client], object] = lambda _: None) -> Server:
        """Return it running; restart it if it has ended, or if ``probe`` gets no answer."""
        with self._lock:
            try:
                self.check()
                try:
                    self.ask(probe)
                except ServerError as error:
                    raise ServerError("SERVER_HANGS", why=error.message) from error
            except LoaderError as error:
                self._reason = self._reason or error
                return self.keep()
            return self

    def suspect(self) -> Server:
        """Return it after it gave a token just now; replace a process that hangs."""
        left = TOKEN_DEADLINE
        return self.ensure(lambda client: client.completion("1", max_tokens=1, timeout=left))

    def watch(self) -> None:
        """Keep it alive until ``stop``."""
        while not self._stopped.is_set():
            self.wait(PROBE_EVERY)
            if not self._stopped.is_set():  # unlike a completion, this waits for no free slot
                self.ensure(lambda client: client.status("/slots", PROBE_DEADLINE))

    def check(self, *, within: float = 0.0) -> None:
        """Raise the error of its end, if it has ended or ends ``within`` so many seconds."""
        over = self._program.wait(within)
        self._require_wanted()
        if not over:
            return
        if self._program.status is None:
            raise ServerError("SERVER_NOT_STARTED")
        self._log.finish()
        lines, loading = self._log.tail(), self.started is None
        raise server_log.explain(self._program.status, lines, loading=loading)

    def ask(self, request: Callable[[Client], _Answer]) -> _Answer:
        """Return what a request returns; raise what ended the server, if that is why it failed."""
        try:
            return request(self.client())
        except ServerError:
            self.check(within=_SETTLED)
            raise

    def wait(self, timeout: float | None) -> bool:
        """Wait for its end, at most ``timeout`` seconds; True where it has ended or never ran."""
        return self._program.wait(timeout)

    def stop(self) -> None:
        """End it finally, and everything that it started; safe to call twice, from any thread."""
        self._stopped.set()  # a restart that another thread has begun leaves nothing behind
        self._end()
        with self._lock:
            self._end()
            self._let_go()

    def _begin(self) -> None:
        self.plan, self.started = self.asked, None
        try:
            self.started = self._start_eased()
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        """End the present process."""
        self._program.stop(grace=STOP_GRACE)
        self._log.finish()

    def _require_wanted(self) -> None:
        if self._stopped.is_set():
            raise ServerError("SERVER_STOPPED")

    def _renew(self, reason: LoaderError) -> None:
        """Make ready for a new start after an end, after a growing pause, or give up."""
        self._require_wanted()
        self._end()
        now = time.monotonic()
        self._restarts = [one for one in self._restarts if one >= now - WINDOW]
        if len(self._restarts) == LIMIT - 1:
            minutes, why, hint = WINDOW / 60, reason.message, reason.hint
            raise ServerError(
                "SERVER_GAVE_UP", limit=LIMIT, minutes=minutes, why=why, hint=hint
            ) from reason
        pause = _PAUSE * 2 ** len(self._restarts)
        self._restarts.append(now)
        self._sink(Note.of("SERVER_RESTARTED", why=reason.message, pause=pause))
        self._stopped.wait(pause)
        # on the same port, and as requested: what one start gave up is tried again
        self.asked = replace(self.asked, port=self.port or None)

    def _start_eased(self) -> tuple[float, float]:
        began, first = time.monotonic(), None
        for tries in range(1, _TRIES + 1):
            try:
                return self._start_once(began)
            except LoaderError as error:
                self._program.stop(grace=STOP_GRACE)
                if error.code == "PORT_IN_USE":
                    self._let_go()
                if first is not None and error.code == "SERVER_ARGUMENT_INVALID":
                    raise first from error  # a build of others, too old for what would ease it
                eased = self.plan.eased(error)
                if eased is None or tries == _TRIES:
                    raise
                self.plan, first = eased, error
        raise AssertionError("the last try returns or raises")

    def _start_once(self, began: float) -> tuple[float, float]:
        self.port = self._take_port()
        self._execute()
        deadline = time.monotonic() + self.plan.startup_timeout  # a repair downloaded before
        self._await_health(deadline)
        loaded = time.monotonic() - began
        self._first_token(deadline)
        first_token = time.monotonic() - began
        plan, report = self.plan, self.report
        on_gpu = plan.devices and plan.n_gpu_layers and not plan.allow_cpu
        if on_gpu and report.on_devices(plan.devices) is False:
            where = ", ".join(report.buffers) or "the CPU"
            raise HostError("MODEL_ON_CPU", devices=", ".join(plan.devices), where=where)
        return loaded, first_token

    def _take_port(self) -> int:
        """Return the port to listen on, which no other user can bind until this server stops."""
        wanted, keeps = self.plan.port or 0, self.plan.pinned_build and self.plan.keeps_port
        if not keeps:
            self._let_go()
            return free_port(wanted)
        if self._held is None:
            # It does not listen. While it is open, the kernel lets a program bind the port only if
            # that sets SO_REUSEPORT and runs as this user (``inet_bind_conflict`` of
            # linux/net/ipv4/inet_connection_sock.c).
            everywhere = server_plan.last(self.plan.extra, "--host") == "0.0.0.0"  # noqa: S104
            held = _bound(wanted, "0.0.0.0" if everywhere else "127.0.0.1")  # noqa: S104 - as asked
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._held = held
        return int(self._held.getsockname()[1])

    def _let_go(self) -> None:
        """Let other programs have the port."""
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def _execute(self) -> None:
        """Execute it with its key, as the last thing after ``before``."""

        def before() -> None:
            self.before()
            self._require_wanted()  # meanwhile another thread may have stopped it

        self.api_key = new_key() if self.plan.key == "" else self.plan.key
        argv, program = self.plan.argv(self.port), processes.Program()
        self._program, self._log = program, ServerLog()
        try:
            program.start(
                argv,
                {**self.plan.environ, "GGML_NO_BACKTRACE": "1"},
                read=self._log.read,
                text=f"{self.api_key or ''}\n".encode(),
                before=before,
            )
        except OSError as error:
            if error.filename != argv[0]:  # no more processes, say
                name = "SERVER_NOT_STARTED/system"
                raise ServerError(name, program=argv[0], error=error) from error
            why = f"{argv[0]}: {processes.why_not_executable(error)}"
            raise HostError("RUNTIME_NOT_EXECUTABLE", why=why) from error

    def _await_health(self, deadline: float) -> None:
        client = self.client()
        while True:
            self.check()
            status = client.health(timeout=min(2.0, max(0.1, deadline - time.monotonic())))
            if status is not None and self._owns_its_port(self._program) is False:
                self.check(within=_SETTLED)
                raise ServerError("PORT_IN_USE", port=self.port)
            if status == 200:  # noqa: PLR2004 - HTTP's OK
                return
            if time.monotonic() >= deadline:
                raise self._too_late("loads the model still" if status else "does not listen")
            time.sleep(_POLL)

    def _first_token(self, deadline: float) -> None:
        left = max(0.1, deadline - time.monotonic())

        def first(client: Client) -> None:
            ours = self._owns_its_port(self._program)
            if ours is None and self.api_key and not client.refuses_wrong_keys(timeout=left):
                raise ServerError("PORT_IN_USE", port=self.port)
            client.completion("1", max_tokens=1, timeout=left, cache_prompt=False)

        try:
            self.ask(first)
        except ServerError as error:
            if error.code == "ANSWER_TIMEOUT":
                raise self._too_late("is loaded, but does not answer") from error
            raise
        self.check()

    def _owns_its_port(self, program: processes.Program) -> bool | None:
        """Return whether that process listens on the port; None where that is not known."""
        pid = program.pid
        return processes.listens(pid, self.port) if pid else False

    def _too_late(self, what: str) -> ServerError:
        seconds, lines = self.plan.startup_timeout, server_log.quote(self._log.tail())
        return ServerError("START_TIMEOUT", what=what, seconds=seconds, lines=lines)


def new_key() -> str:
    """Return a random key of 256 bits."""
    return secrets.token_urlsafe(32)


def free_port(wanted: int = 0) -> int:
    """Return a TCP port of loopback, ``wanted`` or for 0 a free one; ``ServerError`` if taken."""
    with _bound(wanted, "127.0.0.1") as probe:
        return int(probe.getsockname()[1])


def _bound(wanted: int, host: str) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if wanted:  # as the server does: a connection that is still closing does not count
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, wanted))
    except OSError as error:
        opened.close()
        why = error.strerror
        raise ServerError("PORT_IN_USE/bind", wanted=wanted, host=host, why=why) from error
    return opened
