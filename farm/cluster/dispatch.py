"""A run on the hosts of a cluster: the longest waiting set goes to a free host.

The set of a lost host waits again. ``build_spread`` finds the unbuilt sets, and packs what comes
back.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Final, Self

from farm import durable, pipeline
from farm.errors import BuildError, EngineError, FarmError, UsageError, remark
from farm.kept import KeptTree, digest, times
from farm.options import BuildRequest
from farm.pipeline import Made
from farm.plan import BuildPlan
from farm.terminal.progress import BUILT, FAILED, BuildReport, Fleet

try:
    from distributed import Future

    from farm.cluster import host
    from farm.cluster.host import BuildJob, Outcome, place
    from farm.cluster.scheduler import POLL, Event, SchedulerClient, cluster
except ModuleNotFoundError as error:
    raise UsageError("DASK_MISSING", name=error.name) from error

TRIES: Final = 2
LOSSES: Final = 3
"""A set is given up after so many failures, or after so many hosts were lost with it."""

_PATIENCE: Final = 600.0
"""Seconds without a scheduler or a host after which a run gives up."""
_HOSTS_SECONDS: Final = 20.0
"""Seconds at the beginning within which a host must be connected."""
_FETCH_SECONDS: Final = 300.0
_OTHER_COMPILER: Final = EngineError("COMPILER_DIFFERS/run")


@dataclass(eq=False)
class _Build:
    """A set that a host has; a slow one may be at a second host, too."""

    job: BuildJob
    worker: str
    future: Future[Outcome]

    @property
    def key(self) -> str:
        return self.job.key


class Dispatcher:
    """Hands jobs out and collects outcomes. Use as a context manager.

    ``source`` packs the source; it is called once, if a host lacks it.

    Raises:
        EngineError: ``SCHEDULER_UNREACHABLE``.
    """

    def __init__(self, address: str, source: Callable[[], bytes], fleet: Fleet) -> None:
        self.fleet = fleet
        self._source = source
        self._packed: bytes | None = None
        self._order: list[str] = []
        self._waiting: list[BuildJob] = []
        self._builds: list[_Build] = []
        self._failures: Counter[str] = Counter()
        self._losses: defaultdict[str, list[str]] = defaultdict(list)
        self._overtaken: set[str] = set()
        self._compilers: dict[str, str] = {}
        self._dropped: dict[str, str] = {}
        self._noted: set[str] = set()
        self._events: SimpleQueue[Event] = SimpleQueue()
        self.link = SchedulerClient(address, self._events.put)

    def __enter__(self) -> Self:
        """Use the open connection."""
        return self

    def __exit__(self, *error: object) -> None:
        """Cancel the running builds: the hosts end them within seconds."""
        for build in list(self._builds):
            self._give_up(build)
        self.link.close()

    def identities(self, job: BuildJob) -> list[str]:
        """Ask every host for the compiler of its first job; equal answers once.

        Raises:
            EngineError: ``WORKERS_MISSING``, ``HOSTS_UNUSABLE``: none of them can build, or
                ``SCHEDULER_UNREACHABLE``: it went away.
        """
        until = time.monotonic() + _HOSTS_SECONDS
        while not self._compilers:
            hosts = self.link.hosts()
            self._meet(hosts, job)
            self._usable(hosts)
            if not self._compilers:
                if time.monotonic() > until:
                    code = "WORKERS_MISSING" if self.link.is_open else "SCHEDULER_UNREACHABLE"
                    raise EngineError(code, address=self.link.address, why=" any more")
                time.sleep(POLL)
        return sorted(set(self._compilers.values()))

    def run(self, jobs: list[BuildJob]) -> Iterator[tuple[BuildJob, Outcome]]:
        """Build all jobs, given longest first; yield each with its outcome when it is done.

        Raises:
            EngineError: no scheduler or no host for ten minutes, or none that can build.
        """
        self._waiting, self._order = list(jobs), [job.key for job in jobs]
        seen = time.monotonic()
        while self._waiting or self._builds:
            if self.link.is_lost:
                self.fleet.say(remark("SCHEDULER_LOST"))
                self.link.reopen(seen + _PATIENCE)
            hosts = self._usable(self.link.hosts())
            if hosts:
                seen = time.monotonic()
            elif time.monotonic() - seen > _PATIENCE:
                raise EngineError("WORKERS_MISSING", address=self.link.address)
            self.fleet.hosts = max(len(hosts), 1)
            if self.link.is_open:
                yield from self._take_back(hosts)
            self._hand_out(hosts)
            while not self._events.empty():
                told = self._events.get()[1]
                # of a set at two hosts the later one is shown
                if self._hosts_of(told["key"])[-1:] == [told["where"]]:
                    self.fleet.hear(told["key"], told["what"], *told["values"])
            yield from self._take_in()
            time.sleep(POLL)

    def _meet(self, hosts: list[str], job: BuildJob) -> None:
        """Ask new hosts for their compiler; drop a host that has none or another one.

        Hosts that are connected at the beginning may have any compiler.
        """
        known = set(self._compilers.values())
        new = [one for one in hosts if one not in self._compilers and one not in self._dropped]
        for worker, answer in self.link.ask(new, host.compilers, job).items():
            if isinstance(answer, OSError):  # the connection's: retried, or lost soon
                continue
            if not isinstance(answer, str):
                self._drop(worker, answer)
            elif known and answer not in known:
                self._drop(worker, _OTHER_COMPILER)
            else:
                self._compilers[worker] = answer

    def _drop(self, worker: str, why: object) -> None:
        """Use a host no more in this run; ``_usable`` prints it, as a note or as the error."""
        self._dropped[worker] = why.line if isinstance(why, FarmError) else repr(why)

    def _usable(self, hosts: list[str]) -> list[str]:
        """Return the hosts that were not dropped; print a note of each that newly was."""
        good = [worker for worker in hosts if worker not in self._dropped]
        if hosts and not good and not self._builds:
            told = "; ".join(f"{place(worker)}: {self._dropped[worker]}" for worker in hosts)
            raise EngineError("HOSTS_UNUSABLE", told=told)
        for worker in self._dropped.keys() - self._noted:
            self.fleet.say(remark("HOST_DROPPED", host=place(worker), why=self._dropped[worker]))
            self._noted.add(worker)
        return good

    def _hand_out(self, hosts: list[str]) -> None:
        """Give free hosts the longest waiting set; without one, a set whose host is slow, once."""
        busy = {build.worker for build in self._builds}
        for worker in (one for one in hosts if one not in busy):
            left = (build for build in self._builds if build.key not in self._overtaken)
            slow = (build.job for build in left if self.fleet.is_slow(build.key))
            job = self._waiting[0] if self._waiting else next(slow, None)
            if job is not None and self._is_ready(worker, job):
                self._submit(worker, job)

    def _is_ready(self, worker: str, job: BuildJob) -> bool:
        """Send a host what it lacks: the first question if it joined later, the source."""
        self._meet([worker], job)
        if worker not in self._compilers:
            return False
        digest = job.plan.source.digest
        answer = self.link.ask([worker], host.offer_source, digest, None)[worker]
        if answer is False:
            self._packed = self._packed or self._source()
            self.fleet.say(f"source: {len(self._packed) / 1e6:.1f} MB to {place(worker)}")
            answer = self.link.ask([worker], host.offer_source, digest, self._packed)[worker]
        if answer is not True and not isinstance(answer, OSError):
            self._drop(worker, answer)
        return answer is True

    def _submit(self, worker: str, job: BuildJob) -> None:
        key = job.key
        if job in self._waiting:
            self._waiting.remove(job)
        else:
            self._overtaken.add(key)
            (slow,) = self._hosts_of(key)
            self.fleet.say(
                f"{key}: slow on {slow}; {place(worker)} builds it, too, and the first that is "
                "done counts"
            )
        self._builds.append(_Build(job, worker, self.link.submit(worker, job)))
        self.fleet.begin(key, place(worker))

    def _hosts_of(self, key: str) -> list[str]:
        return [place(build.worker) for build in self._builds if build.key == key]

    def _take_back(self, hosts: list[str]) -> Iterator[tuple[BuildJob, Outcome]]:
        """Let the sets of lost hosts wait again, and all sets after a lost scheduler.

        A set with which many hosts were lost is given up: it may be the cause.
        """
        for build in list(self._builds):
            forgotten = build.future.cancelled()
            if build.worker in hosts and not forgotten:
                continue
            self._give_up(build)
            gone = self._losses[build.key]
            gone += [] if forgotten else [place(build.worker)]
            where = "the scheduler was lost" if forgotten else f"{build.worker} was lost"
            if self._hosts_of(build.key):
                self.fleet.say(f"{build.key}: {where}; another host has it, too")
            elif len(gone) >= LOSSES:
                why = f"{len(gone)} hosts were lost while they built it: {', '.join(gone)}"
                hint = "is their memory too small for so many compilers? --jobs makes it fewer"
                yield build.job, Outcome(gone[-1], b"", BuildError("HOSTS_LOST", why, hint=hint))
            else:
                self._wait_again(build.job, f"{where}; it is built elsewhere")

    def _give_up(self, build: _Build) -> None:
        self._builds.remove(build)
        if self.link.is_open and not build.future.cancelled():
            build.future.cancel()

    def _wait_again(self, job: BuildJob, why: str) -> None:
        """Put a job back at its place in the order, which is longest first."""
        self._waiting.append(job)
        self._waiting.sort(key=lambda one: self._order.index(one.key))
        self.fleet.wait(job.key, why)

    def _take_in(self) -> Iterator[tuple[BuildJob, Outcome]]:
        for build in list(self._builds):
            # another host may have been sooner, a moment ago
            if build not in self._builds or not build.future.done() or build.future.cancelled():
                continue
            outcome = _outcome(build)
            self._builds.remove(build)
            failure, key = outcome.failure, build.key
            if failure is not None and self._hosts_of(key):
                self.fleet.say(f"{key}: failed on {place(build.worker)}")
                continue
            for other in [one for one in self._builds if one.key == key]:
                self._give_up(other)
            self._failures[key] += failure is not None
            if failure is not None and self._failures[key] < TRIES:
                self._wait_again(build.job, f"failed ({failure.code}); it is tried once more")
                continue
            yield build.job, outcome


def _outcome(build: _Build) -> Outcome:
    where = build.worker
    if build.future.status == "error":
        error = build.future.exception()
        return Outcome(where, b"", BuildError("WORKER_FAILED", where=where, error=error))
    try:
        outcome = build.future.result(timeout=_FETCH_SECONDS)
    except (OSError, TimeoutError) as error:
        return Outcome(where, b"", BuildError("WORKER_LOST", where=where, error=error))
    try:
        if outcome.failure is None:
            for _ in host.products(outcome):
                pass
    except BuildError as error:  # what cannot be used is tried again like any other failure
        return Outcome(outcome.host, outcome.log, error)
    return outcome


def build_spread(
    plans: list[BuildPlan], request: BuildRequest, report: BuildReport
) -> tuple[Made, ...]:
    """Build sets on the hosts of a Dask cluster, longest first; pack them here.

    Raises:
        EngineError: no scheduler or no host answers.
        FarmError: sets failed; the others are built and packed.
    """
    run = _ClusterRun(plans, request, report)
    made: list[Made] = []

    def pack(kept: KeptTree) -> None:
        try:
            made.append(pipeline.pack_kept(kept, request, report, began=run.began))
        except FarmError as error:
            run.failures[kept.plan.key] = error
            if len(plans) > 1:  # else the last line is the same
                report.say(error.render())

    # Beside the handing out: no host waits for a tarball of what another has built.
    with ThreadPoolExecutor(max_workers=1) as packer, closing(run.trees()) as trees:
        try:
            packing = [packer.submit(pack, kept) for kept in trees]
        except BaseException:
            packer.shutdown(wait=False, cancel_futures=True)
            raise
    for one in packing:
        one.result()
    return pipeline.conclude(made, run.failures, request, report)


@dataclass
class _ClusterRun:
    """One run. ``failures`` grow while ``trees`` is consumed."""

    plans: list[BuildPlan]
    request: BuildRequest
    report: BuildReport
    failures: dict[str, FarmError] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def trees(self) -> Generator[KeptTree, None, None]:
        """Yield the sets' trees: those of earlier runs first, then each when it is built."""
        plan, engine = self.plans[0], self.request.worker_engine
        # without folders of this machine
        own = replace(self.request, source=None, out=Path())
        asked = replace(own, engine=engine, line=plan.line.name)
        recorded = times(self.plans, pipeline.STATE)
        fleet = Fleet.longest_first(self.report, recorded)
        kept: dict[str, KeptTree] = {}

        with (
            cluster(self.request, len(self.plans)) as address,
            Dispatcher(address, lambda: host.pack_folder(plan.source.tree), fleet) as dispatcher,
        ):
            jobs = {one.key: host.BuildJob(one, asked) for one in self.plans}
            identities = dispatcher.identities(jobs[plan.key])
            if len(identities) > 1:
                self.report.say(remark("COMPILERS_DIFFER"))
            identity = "\n".join(identities)
            for one in self.plans:
                kept[one.key] = KeptTree(one, digest(one, identity), pipeline.STATE)
            waiting = []
            for key in fleet.expected:
                if pipeline.found_built(kept[key], self.report, fresh=asked.fresh):
                    fleet.before(key)
                    yield kept[key]
                else:
                    kept[key].begin()
                    waiting.append(jobs[key])
            with fleet:
                for job, outcome in dispatcher.run(waiting):
                    try:
                        self._take_over(kept[job.key], outcome)
                    except FarmError as error:
                        self.failures[job.key] = error
                        fleet.end(job.key, FAILED)
                        self.report.say(error.render())
                    else:
                        fleet.end(job.key, BUILT)
                        yield kept[job.key]

    def _take_over(self, kept: KeptTree, outcome: Outcome) -> None:
        log = pipeline.STATE / "logs" / f"{kept.plan.key}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(log, outcome.log, 0o644)
        if outcome.failure is not None:
            why = outcome.failure
            message = f"{why.message} (on {outcome.host})"
            raise BuildError(why.code, message, hint=why.hint, log=str(log))
        if outcome.built is None or outcome.line is None:
            raise BuildError("WORKER_FAILED/nothing", host=outcome.host, log=str(log))
        with tempfile.TemporaryDirectory(prefix="llama-farm-") as folder:
            host.unpack(outcome, Path(folder))
            promised = replace(kept, plan=replace(kept.plan, line=outcome.line))
            built = replace(outcome.built, folder=Path(folder))
            pipeline.keep(promised, built, self.request, self.report)
