"""The connection to a Dask scheduler: connect, reconnect, list the hosts, call functions there."""

from __future__ import annotations

import logging
import socket
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import requests
from distributed import Client, Future, LocalCluster, Worker

from farm.cluster import host
from farm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from farm.cluster.host import Job, Outcome
    from farm.options import BuildRequest

RESOURCE: Final = "FARM_BUILD"
"""The resource that a worker declares: how many builds it takes at a time."""
POLL: Final = 0.25

_DASHBOARD: Final = "127.0.0.1:0"
"""For this machine's users only, as the scheduler is; any free port: None would be Dask's own."""
_DASHBOARD_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 10.0

Event = tuple[float, dict[str, Any]]


class _Worker(Worker):
    """A worker without Dask's HTTP server, which listens on every address of the machine."""

    def start_http_server(self, *_: object) -> None:
        """Listen nowhere."""


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
    with (
        # Dask's own is one folder of all users, in which another one can put links
        tempfile.TemporaryDirectory(prefix="llama-farm-dask-") as private,
        LocalCluster(
            n_workers=min(request.workers or 1, sets),
            threads_per_worker=1,
            worker_class=_Worker,
            processes=False,  # builds are processes of their own
            protocol="inproc",  # through a port, any user of this machine could run code as this
            dashboard_address=_DASHBOARD,
            silence_logs=False,
            local_directory=private,
            scheduler_kwargs={"local_directory": private},
            resources={RESOURCE: 1},
        ) as local,
    ):
        yield local.scheduler_address


class Connection:
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
        """Connect again, with retries until a time of the monotonic clock.

        Raises:
            EngineError: ``SCHEDULER_UNREACHABLE``.
        """
        while True:
            try:
                self._client = self._connect()
            except EngineError:
                if time.monotonic() > until:
                    raise
                time.sleep(POLL)
            else:
                return

    def dashboard(self) -> str | None:
        """Return the address of Dask's dashboard, None if it does not answer.

        A scheduler without dashboard names an address as well (``--no-dashboard``).
        """
        try:
            # of a scheduler in this process Dask names localhost, which may lead elsewhere
            link = str(self._client.dashboard_link or "").replace("//localhost:", "//127.0.0.1:")
            with requests.Session() as direct:
                direct.trust_env = False  # a proxy knows nothing of this machine's loopback
                answers = link and direct.get(link, timeout=_DASHBOARD_SECONDS).ok
        except (KeyError, OSError):  # requests' errors are OSErrors
            return None
        return link if answers else None

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
        """Run a function on hosts, beside their builds.

        Returns:
            Each host's result; an ``OSError`` if the host or the scheduler is lost.
        """
        where: dict[str, Any] = {"workers": hosts, "on_error": "return"}
        if not hosts:  # none would be all of them
            return {}
        try:
            answers: dict[str, Any] = self._client.run(host.aside, function, *args, **where)
        except (OSError, ValueError) as error:
            return dict.fromkeys(hosts, OSError(str(error)))
        return answers

    def submit(self, worker: str, job: Job) -> Future[Outcome]:
        """Hand a job to a host."""
        where: dict[str, Any] = {"workers": [worker], "resources": {RESOURCE: 1}}
        future: Future[Outcome] = self._client.submit(host.build, job, **where, pure=False)
        return future

    def _connect(self) -> Any:
        try:
            _knock(self.address)
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


def _knock(address: str) -> None:
    """Test whether a scheduler listens: Dask's own client fails with many more lines.

    Raises:
        OSError: none does.
    """
    scheme, _, rest = address.rpartition("://")
    if scheme == "inproc":
        return
    parts = urlsplit(f"//{rest}")
    where = (parts.hostname or "", parts.port or 0)
    with socket.create_connection(where, _CONNECT_SECONDS) as knocking:
        # over plain TCP a scheduler speaks first
        if scheme in {"", "tcp"} and not knocking.recv(1):
            raise ConnectionResetError("it ends the connection")
