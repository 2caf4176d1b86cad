"""Sets on a Dask cluster. The only module that imports ``distributed``.

Dask brings the connections, the hosts' coming and going, the resource that keeps it at one build
a host, and the dashboard. Which set goes where is decided here: the longest that waits, to a host
that is free. A host that is gone gives its set back.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Self

from distributed import Client, LocalCluster, get_worker
from distributed.core import Status

from farm import remote_build
from farm.errors import EngineError
from farm.remote_build import Failure, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Future

    from farm.fleet import Fleet
    from farm.plan import BuildPlan, Step
    from farm.remote_build import Job
    from farm.request import BuildRequest
    from farm.targets import Line

RESOURCE: Final = "FARM_BUILD"
"""What a worker declares: how many builds it takes at a time."""
TOPIC: Final = "llama-farm"
TRIES: Final = 2
LOSSES: Final = 3
"""A set is given up after so many failures, or after so many hosts were lost with it."""

_POLL: Final = 0.25
_CONNECT_SECONDS: Final = 20.0
_PATIENCE: Final = 600.0
"""Seconds without a scheduler or a host after which a run gives up."""
_FETCH_SECONDS: Final = 300.0
_COUNT_SECONDS: Final = 1.0


class AbandonedError(BaseException):
    """Nobody waits for this build any more: ends it like Ctrl-C."""


@contextmanager
def cluster(request: BuildRequest, sets: int) -> Iterator[str]:
    """Give the scheduler's address: the one that was named, else one of this machine.

    Raises:
        EngineError: none answers at that address.
    """
    if request.scheduler is not None:
        yield request.scheduler
        return
    # A person reads the table, not Dask's own log; its workers write there after their end, too.
    for handler in logging.getLogger("distributed").handlers:
        handler.setLevel(logging.CRITICAL)
    with LocalCluster(
        n_workers=min(request.workers or 1, sets),
        threads_per_worker=1,
        processes=False,  # builds are processes of their own
        protocol="tcp",
        dashboard_address=None,
        silence_logs=False,
        resources={RESOURCE: 1},
    ) as local:
        yield local.scheduler_address


@dataclass(eq=False)
class _Running:
    job: Job
    future: Future[Outcome]
    worker: str

    @property
    def key(self) -> str:
        return self.job.plan.key


@dataclass
class Dispatcher:
    """Hands jobs out and takes outcomes in. Use as a context manager.

    Args:
        address: the scheduler's.
        source: packs the source; called once, if a host lacks it.
        fleet: is told everything.
    """

    address: str
    source: Callable[[], bytes]
    fleet: Fleet
    patience: float = _PATIENCE
    _client: Any = None
    _waiting: list[Job] = field(default_factory=list)
    _running: list[_Running] = field(default_factory=list)
    _failures: dict[str, int] = field(default_factory=dict)
    _losses: dict[str, int] = field(default_factory=dict)
    _overtaken: set[str] = field(default_factory=set)
    _packed: bytes | None = None
    _known: list[str] = field(default_factory=list)
    _order: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Self:
        """Connect to the scheduler.

        Raises:
            EngineError: ``SCHEDULER_UNREACHABLE``.
        """
        self._client = self._connect()
        return self

    def __exit__(self, *error: object) -> None:
        """Give up what still runs: the hosts end it at their compiler's next line."""
        self._drop_all()
        self._client.close()

    def identities(self, request: BuildRequest, line: Line) -> list[str]:
        """Ask every host for its compiler; equal answers once."""
        self._await_hosts()
        told = self._client.run(remote_build.identity, request, line, workers=self._hosts())
        return sorted(set(told.values()))

    def run(self, jobs: list[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Build all jobs, given longest first; gives each with its outcome as it comes.

        Raises:
            EngineError: no scheduler or no host for ten minutes.
        """
        self._waiting = list(jobs)
        self._order = {job.plan.key: place for place, job in enumerate(jobs)}
        seen = time.monotonic()
        while self._waiting or self._running:
            if self._client.status == "closed":
                self._drop_all()
                self._client = self._reconnect(seen + self.patience)
            hosts = self._hosts()
            if hosts:
                seen = time.monotonic()
            elif time.monotonic() - seen > self.patience:
                raise _no_hosts(self.address)
            self.fleet.hosts = max(len(hosts), 1)
            self._take_back(hosts)
            self._hand_out(hosts)
            self._overtake(hosts)
            yield from self._take_in()
            time.sleep(_POLL)

    def _connect(self) -> Any:
        try:
            client = Client(
                self.address,
                timeout=_CONNECT_SECONDS,
                set_as_default=False,
                direct_to_workers=False,
            )
        except (OSError, ValueError) as error:
            raise EngineError(
                "SCHEDULER_UNREACHABLE",
                f"no Dask scheduler answers at {self.address}: {error}",
                hint="start one with `dask scheduler`; docs/scaling.md",
            ) from error
        client.subscribe_topic(TOPIC, self._told)
        return client

    def _reconnect(self, until: float) -> Any:
        self.fleet.say("note[SCHEDULER_LOST]: the scheduler is gone; waiting for it")
        while True:
            try:
                return self._connect()
            except EngineError:
                if time.monotonic() > until:
                    raise
                time.sleep(_POLL)

    def _hosts(self) -> list[str]:
        """Return the addresses of the workers that build.

        Not from ``Client.scheduler_info``: a timer of the client's puts an answer without workers
        in the place of the one that was asked for, and every build would count as lost.
        """
        if self._client.status != "running":
            return []
        try:
            told = self._client.sync(self._client.scheduler.identity, n_workers=-1)
        except OSError:  # the connection has ended, and the client has not seen it yet
            return self._known
        workers = told["workers"].items()
        self._known = [where for where, facts in workers if facts["resources"].get(RESOURCE)]
        return self._known

    def _await_hosts(self) -> None:
        until = time.monotonic() + _CONNECT_SECONDS
        while not self._hosts():
            if time.monotonic() > until:
                raise _no_hosts(self.address)
            time.sleep(_POLL)

    def _take_back(self, hosts: list[str]) -> None:
        """Take sets from hosts that are gone, and all of them from a scheduler that is."""
        if self._client.status != "running":
            return
        for running in list(self._running):
            lost = running.future.cancelled()
            if running.worker in hosts and not lost:
                continue
            self._running.remove(running)
            running.future.cancel()
            where = "the scheduler was lost" if lost else f"{running.worker} was lost"
            if self._copies(running.key):
                self.fleet.say(f"{running.key}: {where}; another host has it, too")
                continue
            self._losses[running.key] = self._losses.get(running.key, 0) + (not lost)
            self._wait_again(running.job)
            self.fleet.wait(running.key, f"{where}; it is built elsewhere")

    def _wait_again(self, job: Job) -> None:
        """Put a job back where it was in the order, which is longest first."""
        place = self._order[job.plan.key]
        waiting = enumerate(self._waiting)
        later = (at for at, other in waiting if self._order[other.plan.key] > place)
        self._waiting.insert(next(later, len(self._waiting)), job)

    def _copies(self, key: str) -> list[_Running]:
        return [running for running in self._running if running.key == key]

    def _hand_out(self, hosts: list[str]) -> None:
        for worker in self._idle(hosts):
            if not self._waiting:
                return
            if self._submit(self._waiting[0], worker):
                del self._waiting[0]

    def _idle(self, hosts: list[str]) -> list[str]:
        busy = {running.worker for running in self._running}
        return [worker for worker in hosts if worker not in busy]

    def _overtake(self, hosts: list[str]) -> None:
        """Hand a set that is slow where it is to a host that has nothing to do, once."""
        if self._waiting:
            return
        for worker in self._idle(hosts):
            slow = [r for r in self._running if len(self._copies(r.key)) == 1
                    and r.key not in self._overtaken and self.fleet.is_slow(r.key)]  # fmt: skip
            if not slow:
                return
            if self._submit(slow[0].job, worker):
                self._overtaken.add(slow[0].key)
                self.fleet.say(
                    f"{slow[0].key}: slow on {_place(slow[0].worker)}; {_place(worker)} builds it, "
                    "too, and the first that is done counts"
                )

    def _submit(self, job: Job, worker: str) -> bool:
        try:
            self._send_source(worker, job.source)
        except (OSError, KeyError, ValueError):  # it went away meanwhile
            return False
        future = self._client.submit(
            _work,
            job,
            workers=[worker],
            resources={RESOURCE: 1},
            pure=False,
            retries=0,
        )
        self._running.append(_Running(job, future, worker))
        self.fleet.begin(job.plan.key, _place(worker))
        return True

    def _send_source(self, worker: str, digest: str) -> None:
        has = self._client.run(remote_build.has_source, digest, workers=[worker])
        if has[worker]:
            return
        if self._packed is None:
            self._packed = self.source()
        self.fleet.say(f"source: {len(self._packed) / 1e6:.1f} MB to {_place(worker)}")
        self._client.run(remote_build.put_source, digest, self._packed, workers=[worker])

    def _take_in(self) -> Iterator[tuple[Job, Outcome]]:
        for running in list(self._running):
            if not running.future.done() or running.future.cancelled():
                continue
            if running not in self._running:  # another host was sooner, a moment ago
                continue
            outcome = self._outcome(running)
            self._running.remove(running)
            others = self._copies(running.key)
            if outcome.failure is not None and others:
                self.fleet.say(f"{running.key}: failed on {_place(running.worker)}")
                continue
            for other in others:
                other.future.cancel()
                self._running.remove(other)
            if outcome.failure is not None and self._tries_again(running.job, outcome.failure):
                continue
            yield running.job, outcome

    def _outcome(self, running: _Running) -> Outcome:
        where = running.worker
        if running.future.status == "error":
            error = running.future.exception()
            return Outcome(where, b"", Failure("WORKER_FAILED", f"{where}: {error!r}"))
        try:
            return running.future.result(timeout=_FETCH_SECONDS)
        except (OSError, TimeoutError) as error:
            return Outcome(where, b"", Failure("WORKER_LOST", f"{where}: {error!r}"))

    def _tries_again(self, job: Job, failure: Failure) -> bool:
        key = job.plan.key
        self._failures[key] = self._failures.get(key, 0) + 1
        if self._failures[key] >= TRIES or self._losses.get(key, 0) >= LOSSES:
            return False
        self._waiting.append(job)
        self.fleet.wait(key, f"failed ({failure.code}); it is tried once more")
        return True

    def _drop_all(self) -> None:
        for running in self._running:
            if self._client.status == "running":
                running.future.cancel()
            if running.job not in self._waiting:  # a slow one has two hosts
                self._wait_again(running.job)
            key = running.key
            self.fleet.rows[key] = replace(self.fleet.rows[key], host="", state="waiting")
        self._running.clear()

    def _told(self, event: tuple[float, dict[str, Any]]) -> None:
        told = event[1]
        places = [_place(running.worker) for running in self._copies(told["key"])]
        if told["where"] not in places or told["where"] != self.fleet.rows[told["key"]].host:
            return
        if told["what"] == "note":
            self.fleet.say(f"{told['key']}: {told['line']}")
        elif told["what"] == "step":
            self.fleet.step(told["key"], told["name"])
        elif told["what"] == "count":
            self.fleet.counted(told["key"], told["done"], told["total"])


class _Telling:
    """A reporter on a worker: tells the client, and ends a build that nobody waits for."""

    def __init__(self, key: str) -> None:
        self._worker = get_worker()
        self._task = self._worker.get_current_task()
        self._key = key
        self._due = 0.0

    def step(self, plan: BuildPlan, step: Step) -> None:
        """Tell that a step has begun."""
        del plan
        self._tell(what="step", name=step.name)

    def count(self, done: int, total: int) -> None:
        """Tell ninja's counter, once a second."""
        self._check()
        now = time.monotonic()
        if now >= self._due or done == total:
            self._due = now + _COUNT_SECONDS
            self._tell(what="count", done=done, total=total)

    def note(self, line: str) -> None:
        """Tell a coded line of a host."""
        self._tell(what="note", line=line)

    def _tell(self, **what: object) -> None:
        self._check()
        where = _place(self._worker.address)
        self._worker.log_event(TOPIC, {"key": self._key, "where": where, **what})

    def _check(self) -> None:
        task = self._worker.state.tasks.get(self._task)
        if task is None or task.state == "cancelled" or self._worker.status is not Status.running:
            raise AbandonedError


def _work(job: Job) -> Outcome:
    return remote_build.build(job, _Telling(job.plan.key))


def _place(worker: str) -> str:
    """Return a worker's address without its protocol."""
    return worker.rpartition("://")[2]


def _no_hosts(address: str) -> EngineError:
    return EngineError(
        "WORKERS_MISSING",
        f"the scheduler at {address} has no worker that takes builds",
        hint=f"start one with `dask worker {address} --nthreads 1 --resources {RESOURCE}=1`; "
        "docs/scaling.md",
    )
