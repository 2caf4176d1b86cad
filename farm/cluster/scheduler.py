"""The connection to a Dask scheduler: connect, reconnect, list the hosts, call functions there."""

from __future__ import annotations

import asyncio
import logging
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from distributed import Client, Future, Scheduler, SpecCluster, Worker

from farm.cluster import host
from farm.cluster.host import BuildJob, Outcome
from farm.errors import EngineError
from farm.options import BuildRequest

RESOURCE: Final = "FARM_BUILD"
"""The resource that a worker declares: how many builds it takes at a time."""
POLL: Final = 0.25

_CONNECT_SECONDS: Final = 10.0

Event = tuple[float, dict[str, Any]]


class _Portless:
    """A worker or scheduler without Dask's HTTP server.

    A worker's listens on every address of the machine. A scheduler's has the dashboard, which keeps
    what each of its pages shows until the page's reader, any user of the machine, has read it.
    """

    def start_http_server(self, *_: object, **__: object) -> None:
        """Listen nowhere."""


class _Worker(_Portless, Worker):
    pass


class _Scheduler(_Portless, Scheduler):
    pass


@contextmanager
def cluster(request: BuildRequest, sets: int) -> Iterator[str]:
    """Yield a scheduler's address: the named one, else that of a scheduler of this machine.

    Raises:
        EngineError: none answers at that address.
    """
    if request.scheduler is not None:
        yield request.scheduler
        return
    # A person reads the table, not Dask's own log; its workers write there after their end, too,
    # and its scheduler a traceback of level CRITICAL where Ctrl-C has closed the client meanwhile.
    for handler in logging.getLogger("distributed").handlers:
        handler.setLevel(logging.CRITICAL + 1)
    # Dask's own is one folder of all users, in which another one can put links
    with tempfile.TemporaryDirectory(prefix="llama-farm-dask-") as private:
        # through a port, any user of this machine could run code as this
        options: dict[str, Any] = {"protocol": "inproc", "local_directory": private}
        scheduler = {"cls": _Scheduler, "options": {**options, "dashboard": False}}
        # builds are processes of their own, which a limit of this one's memory would stop
        options |= {"nthreads": 1, "memory_limit": None, "resources": {RESOURCE: 1}}
        worker = {"cls": _Worker, "options": options}
        sets = min(request.workers or 1, sets)
        with SpecCluster(dict.fromkeys(range(sets), worker), scheduler) as local:
            yield local.scheduler_address


class SchedulerClient:
    """A client of the scheduler at ``address``; ``told`` receives the workers' events.

    Raises:
        EngineError: ``SCHEDULER_UNREACHABLE``.
    """

    def __init__(self, address: str, told: Callable[[Event], None]) -> None:
        self.address = address
        self._told = told
        self._known: list[str] = []
        self._client = self._connect()

    def close(self) -> None:
        """Close the connection: the scheduler then cancels this client's jobs."""
        self._client.close()

    @property
    def is_open(self) -> bool:
        """Whether the scheduler is connected."""
        return bool(self._client.status == "running")

    @property
    def is_lost(self) -> bool:
        """Whether the connection to the scheduler is lost for ever."""
        return bool(self._client.status == "closed")

    def reopen(self, until: float) -> None:
        """Connect again, with retries until a time of the monotonic clock."""
        while True:
            try:
                self._client = self._connect()
            except EngineError:
                if time.monotonic() > until:
                    raise
                time.sleep(POLL)
            else:
                return

    def hosts(self) -> list[str]:
        """Return the addresses of the workers that build.

        ``Client.scheduler_info`` is not used: a timer of the client replaces its answer by one
        without workers, and every build would count as lost.
        """
        if not self.is_open:
            return []
        try:
            told = self._client.sync(self._client.scheduler.identity, n_workers=-1)
        except OSError:  # the connection has ended, and the client has not seen it yet
            return self._known
        workers = told["workers"].items()
        self._known = [where for where, facts in workers if facts["resources"].get(RESOURCE)]
        return self._known

    def ask(self, hosts: list[str], function: Callable[..., Any], *args: object) -> dict[str, Any]:
        """Run a function on hosts, beside their builds; return each host's result.

        It is an ``OSError`` if the host or the scheduler is lost.
        """
        where: dict[str, Any] = {"workers": hosts, "on_error": "return"}
        if not hosts:  # none would be all of them
            return {}
        try:
            answers: dict[str, Any] = self._client.run(asyncio.to_thread, function, *args, **where)
        except (OSError, ValueError) as error:
            return dict.fromkeys(hosts, OSError(str(error)))
        return answers

    def submit(self, worker: str, job: BuildJob) -> Future[Outcome]:
        """Hand a job to a host."""
        where: dict[str, Any] = {"workers": [worker], "resources": {RESOURCE: 1}}
        future: Future[Outcome] = self._client.submit(host.build, job, **where, pure=False)
        return future

    def _connect(self) -> Any:
        try:
            scheme, _, rest = self.address.rpartition("://")
            if scheme != "inproc":  # without a listener Dask's client prints many lines
                parts = urlsplit(f"//{rest}")
                where = (parts.hostname or "", parts.port or 0)
                with socket.create_connection(where, _CONNECT_SECONDS) as knocking:
                    # over plain TCP a scheduler sends first
                    if scheme in {"", "tcp"} and not knocking.recv(1):
                        raise ConnectionResetError("it ends the connection")
            client = Client(
                self.address,
                timeout=_CONNECT_SECONDS,
                set_as_default=False,
                direct_to_workers=False,
            )
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            why = f": {error}"
            raise EngineError("SCHEDULER_UNREACHABLE", address=self.address, why=why) from error
        client.subscribe_topic(host.TOPIC, self._told)
        return client
