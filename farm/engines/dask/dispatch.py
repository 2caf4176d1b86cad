"""Which set goes to which host: the longest that waits, to a host that is free.

A host that is gone gives its set back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Self

from farm.cluster import remote_build, remote_products
from farm.cluster.remote_build import Failure, Outcome
from farm.engines.dask.connection import POLL, Connection, no_hosts
from farm.engines.dask.worker import Introduction, introduce, packages, place, work
from farm.errors import BuildError, EngineError, PackError
from farm.plan import Step
from farm.terminal.fleet import SetReporter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Future

    from farm.cluster.remote_build import Job
    from farm.engines.dask.connection import Event
    from farm.execute import Reporter
    from farm.plan import BuildPlan
    from farm.request import BuildRequest
    from farm.terminal.fleet import Fleet

TRIES: Final = 2
LOSSES: Final = 3
"""A set is given up after so many failures, or after so many hosts were lost with it."""

_PATIENCE: Final = 600.0
"""Seconds without a scheduler or a host after which a run gives up."""
_MEETING_SECONDS: Final = 60.0
"""Seconds until one of the hosts that there are has said what it is."""
_OTHER_COMPILER: Final = Failure(
    "COMPILER_DIFFERS",
    "it came with another compiler than the run began with; the next run takes it",
)
_FETCH_SECONDS: Final = 300.0


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
        record: gives who is told of a set's steps, each time that it is handed out.
    """

    address: str
    source: Callable[[], bytes]
    fleet: Fleet
    patience: float = _PATIENCE
    record: Callable[[str], Reporter] | None = None
    _waiting: list[Job] = field(default_factory=list)
    _running: list[_Running] = field(default_factory=list)
    _failures: dict[str, int] = field(default_factory=dict)
    _losses: dict[str, list[str]] = field(default_factory=dict)
    _overtaken: set[str] = field(default_factory=set)
    _packed: bytes | None = None
    _compilers: dict[str, str] = field(default_factory=dict)
    _other: set[str] = field(default_factory=set)
    _dropped: dict[str, str] = field(default_factory=dict)
    _order: dict[str, int] = field(default_factory=dict)
    _reporters: dict[str, Reporter] = field(default_factory=dict)
    _events: SimpleQueue[Event] = field(default_factory=SimpleQueue)
    _link: Connection = field(init=False)

    def __enter__(self) -> Self:
        """Connect to the scheduler.

        Raises:
            EngineError: ``SCHEDULER_UNREACHABLE``.
        """
        self._link = Connection(self.address, self._events.put)
        return self

    def __exit__(self, *error: object) -> None:
        """Give up what still runs: the hosts end it within seconds."""
        self._drop_all()
        self._link.close()

    def dashboard(self) -> str | None:
        """Return the address of Dask's own pages, None where the scheduler has none."""
        return self._link.dashboard()

    def identities(self, request: BuildRequest, plan: BuildPlan) -> list[str]:
        """Ask every host for its compiler; equal answers once.

        Raises:
            EngineError: ``WORKERS_MISSING``, ``HOSTS_UNUSABLE``: none of them can build, or
                ``SCHEDULER_UNREACHABLE``: it went away.
        """
        self._compare("the scheduler", self._link.scheduler_packages())
        until = time.monotonic() + _MEETING_SECONDS
        while not self._compilers:
            hosts = self._usable(self._link.await_hosts())
            answers = self._answers(hosts, introduce, request, plan, remote_build.FARM)
            self._meet(answers, known=set())
            self._usable(hosts)
            if not self._compilers:
                if time.monotonic() > until:
                    raise no_hosts(self.address)
                time.sleep(POLL)
        return sorted(set(self._compilers.values()))

    def run(self, jobs: list[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Build all jobs, given longest first; gives each with its outcome as it comes.

        Raises:
            EngineError: no scheduler or no host for ten minutes, or none that can build.
        """
        self._waiting = list(jobs)
        self._order = {job.plan.key: place for place, job in enumerate(jobs)}
        seen = time.monotonic()
        while self._waiting or self._running:
            if self._link.is_lost:
                self._drop_all()
                self.fleet.say("note[SCHEDULER_LOST]: the scheduler is gone; waiting for it")
                self._link.reopen(seen + self.patience)
                self._compare("the scheduler", self._link.scheduler_packages())
            hosts = self._usable(self._link.hosts())
            if hosts:
                seen = time.monotonic()
            elif time.monotonic() - seen > self.patience:
                raise no_hosts(self.address)
            self.fleet.hosts = max(len(hosts), 1)
            yield from self._take_back(hosts)
            self._hand_out(hosts)
            self._overtake(hosts)
            while not self._events.empty():
                self._told(self._events.get())
            yield from self._take_in()
            time.sleep(POLL)

    def _take_back(self, hosts: list[str]) -> Iterator[tuple[Job, Outcome]]:
        """Take sets from hosts that are gone, and all of them from a scheduler that is.

        A set with which many hosts were lost is given up: it may be what ends them.
        """
        if not self._link.is_open:
            return
        for running in list(self._running):
            lost = running.future.cancelled()
            if running.worker in hosts and not lost:
                continue
            self._running.remove(running)
            running.future.cancel()
            gone = self._losses.setdefault(running.key, [])
            gone += [] if lost else [place(running.worker)]
            where = "the scheduler was lost" if lost else f"{running.worker} was lost"
            if self._copies(running.key):
                self.fleet.say(f"{running.key}: {where}; another host has it, too")
                continue
            if len(gone) >= LOSSES:
                yield running.job, _hosts_lost(gone)
                continue
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
                    f"{slow[0].key}: slow on {place(slow[0].worker)}; {place(worker)} builds it, "
                    "too, and the first that is done counts"
                )

    def _submit(self, job: Job, worker: str) -> bool:
        if not (self._is_known(worker, job) and self._has_source(worker, job.source)):
            return False
        future = self._link.submit(worker, work, job)
        self._running.append(_Running(job, future, worker))
        key = job.plan.key
        self.fleet.begin(key, place(worker))
        self._reporters[key] = self.record(key) if self.record else SetReporter(self.fleet, key)
        return True

    def _is_known(self, worker: str, job: Job) -> bool:
        """Ask a host that came later what it is: another compiler than the run's is of no use."""
        if worker not in self._compilers:
            answers = self._answers([worker], introduce, job.request, job.plan, job.farm)
            self._meet(answers, known=set(self._compilers.values()))
        return worker in self._compilers

    def _meet(self, answers: dict[str, object], known: set[str]) -> None:
        """Take in what hosts say of themselves; those that cannot build are dropped.

        Args:
            answers: what each of them said.
            known: compilers of which theirs must be one; empty for any.
        """
        for worker, answer in answers.items():
            if isinstance(answer, OSError):  # the connection's: it is asked again, or missed soon
                continue
            compilers = answer
            if isinstance(answer, Introduction):
                self._compare(place(worker), answer.packages)
                compilers = answer.compilers
            if not isinstance(compilers, str):
                self._drop(worker, compilers)
            elif known and compilers not in known:
                self._drop(worker, _OTHER_COMPILER)
            else:
                self._compilers[worker] = compilers

    def _compare(self, where: str, theirs: dict[str, str | None]) -> None:
        """Say, once, which of Dask's packages have another version somewhere."""
        ours = packages()
        apart = [name for name, version in theirs.items() if ours.get(name, version) != version]
        if apart and where not in self._other:
            self._other.add(where)
            words = ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in apart)
            self.fleet.say(
                f"note[DASK_DIFFERS]: {where} has {words}; one lock on all hosts avoids what that"
                " may lead to (docs/scaling.md)"
            )

    def _has_source(self, worker: str, digest: str) -> bool:
        """Bring a host the source, if it has none; one that cannot keep it is not used."""
        answer = self._answer(worker, remote_build.offer_source, digest, None)
        if answer is False:
            if self._packed is None:
                self._packed = self.source()
            self.fleet.say(f"source: {len(self._packed) / 1e6:.1f} MB to {place(worker)}")
            answer = self._answer(worker, remote_build.offer_source, digest, self._packed)
        # an OSError is the connection's: a host that goes away is missed soon
        if answer is not True and not isinstance(answer, OSError):
            self._drop(worker, answer)
        return answer is True

    def _answers(
        self, hosts: list[str], question: Callable[..., object], *args: object
    ) -> dict[str, object]:
        """Ask all at once; an ``OSError`` stands for a scheduler or host that went away."""
        try:
            return self._link.ask(hosts, question, *args)
        except (OSError, ValueError) as error:
            lost = error if isinstance(error, OSError) else OSError(str(error))
            return dict.fromkeys(hosts, lost)

    def _answer(self, worker: str, question: Callable[..., object], *args: object) -> object:
        return self._answers([worker], question, *args)[worker]

    def _drop(self, worker: str, why: object) -> None:
        """Use a host no more in this run, and say so."""
        said = str(why) if isinstance(why, Failure) else repr(why)
        self._dropped[worker] = said
        self.fleet.say(f"note[HOST_DROPPED]: {place(worker)} is not used: {said}")

    def _usable(self, hosts: list[str]) -> list[str]:
        """Return the hosts that were not dropped.

        Raises:
            EngineError: ``HOSTS_UNUSABLE``: there are hosts, and all of them were.
        """
        good = [worker for worker in hosts if worker not in self._dropped]
        if hosts and not good and not self._running:
            told = "; ".join(f"{place(worker)}: {self._dropped[worker]}" for worker in hosts)
            raise EngineError("HOSTS_UNUSABLE", f"no host can build: {told}")
        return good

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
                self.fleet.say(f"{running.key}: failed on {place(running.worker)}")
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
            outcome = running.future.result(timeout=_FETCH_SECONDS)
        except (OSError, TimeoutError) as error:
            return Outcome(where, b"", Failure("WORKER_LOST", f"{where}: {error!r}"))
        return _checked(outcome)

    def _tries_again(self, job: Job, failure: Failure) -> bool:
        key = job.plan.key
        self._failures[key] = self._failures.get(key, 0) + 1
        if self._failures[key] >= TRIES:
            return False
        self._waiting.append(job)
        self.fleet.wait(key, f"failed ({failure.code}); it is tried once more")
        return True

    def _drop_all(self) -> None:
        for running in self._running:
            if self._link.is_open:
                running.future.cancel()
            if running.job not in self._waiting:  # a slow one has two hosts
                self._wait_again(running.job)
            key = running.key
            self.fleet.rows[key] = replace(self.fleet.rows[key], host="", state="waiting")
        self._running.clear()

    def _told(self, event: Event) -> None:
        told = event[1]
        copies = {place(running.worker): running for running in self._copies(told["key"])}
        if told["where"] not in copies or told["where"] != self.fleet.rows[told["key"]].host:
            return
        try:
            self._report(copies[told["where"]].job.plan, told)
        except PackError as error:  # the journal cannot be written; the set may still be built
            self.fleet.say(error.render())
            self._reporters[told["key"]] = SetReporter(self.fleet, told["key"])

    def _report(self, plan: BuildPlan, told: dict[str, Any]) -> None:
        reporter = self._reporters[plan.key]
        if told["what"] == "note":
            self.fleet.say(f"{plan.key}: {told['line']}")
        elif told["what"] == "step":
            reporter.step(plan, Step(told["name"], ()))
        elif told["what"] == "count":
            reporter.count(told["done"], told["total"])


def _checked(outcome: Outcome) -> Outcome:
    """Make a failure of products that cannot be used: it is tried again like any other."""
    if outcome.failure is not None:
        return outcome
    try:
        remote_products.check(outcome)
    except BuildError as error:
        return Outcome(outcome.host, outcome.log, Failure.of(error))
    return outcome


def _hosts_lost(gone: list[str]) -> Outcome:
    why = f"{len(gone)} hosts were lost while they built it: {', '.join(gone)}"
    hint = "is their memory too small for so many compilers? --jobs makes it fewer"
    return Outcome(gone[-1], b"", Failure("HOSTS_LOST", why, hint))
