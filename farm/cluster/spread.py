"""A run on the hosts of a cluster: which sets are left, handed out, kept as they come back."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from farm import pipeline
from farm.cluster import remote_build, remote_products
from farm.cluster.remote_build import Job
from farm.errors import BuildError, FarmError, UsageError
from farm.kept import KeptTree, Recording, digest, source_digest
from farm.pipeline import Made, found_built
from farm.terminal import schedule
from farm.terminal.fleet import BUILT, FAILED, Fleet, SetReporter

try:
    from farm.engines.dask import Dispatcher, cluster
except ModuleNotFoundError as error:
    raise UsageError(
        "DASK_MISSING",
        f"--engine dask needs {error.name}, which is not installed",
        hint="python3 -m pip install --require-hashes -r requirements-cluster.lock",
    ) from error

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from farm.cluster.remote_build import Outcome
    from farm.plan import BuildPlan
    from farm.request import BuildRequest
    from farm.terminal.report import BuildReport


@dataclass
class Spread:
    """One run. ``made`` and ``failures`` fill while ``run`` is consumed."""

    plans: list[BuildPlan]
    request: BuildRequest
    report: BuildReport
    state: Path
    made: list[Made] = field(default_factory=list)
    failures: dict[str, FarmError] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def run(self) -> Generator[KeptTree, None, None]:
        """Give the sets' trees: those of earlier runs first, then as they are built.

        Raises:
            UsageError: an engine that hosts cannot use.
            EngineError: no scheduler or no host answers.
        """
        inner = self._inner()
        plan = self.plans[0]
        source = source_digest(plan.source)
        recorded = {p.key: KeptTree(p, "", self.state).journal.seconds(p.key) for p in self.plans}
        known = {key: seconds for key, seconds in recorded.items() if seconds is not None}
        expected = schedule.expected([p.key for p in self.plans], known)
        with cluster(self.request, len(self.plans)) as address:
            fleet = Fleet(
                self.report,
                {key: expected[key] for key in schedule.longest_first(expected)},
                known=bool(known),
            )
            tree = plan.source.tree
            kept: dict[str, KeptTree] = {}
            with Dispatcher(
                address,
                lambda: remote_build.pack_folder(tree),
                fleet,
                record=lambda key: _recording(fleet, kept[key]),
            ) as hosts:
                if dashboard := hosts.dashboard():
                    self.report.say(f"dashboard: {dashboard}")
                told = hosts.identities(inner, plan)
                self._compare(told)
                for one in self.plans:
                    kept[one.key] = KeptTree(one, digest(one, "\n".join(told)), self.state)
                built = [k for k in kept.values()
                         if found_built(k, self.report, fresh=inner.fresh)]  # fmt: skip
                yield from built
                jobs = {key: Job(kept[key].plan, source, inner)
                        for key in schedule.longest_first(expected)
                        if kept[key] not in built}  # fmt: skip
                for done in built:
                    fleet.before(done.plan.key)
                with fleet:
                    for job, outcome in hosts.run(list(jobs.values())):
                        yield from self._keep(kept[job.plan.key], outcome, fleet)

    def _inner(self) -> BuildRequest:
        return replace(
            self.request,
            engine=self.request.worker_engine,
            line=self.plans[0].line.name,
            source=None,
            out=Path(),
        )

    def _compare(self, told: list[str]) -> None:
        if len(told) > 1:
            self.report.note(
                "note[COMPILERS_DIFFER]: the hosts have different compilers: what they make may "
                "differ, and the cache is not shared between them"
            )

    def _keep(self, kept: KeptTree, outcome: Outcome, fleet: Fleet) -> Iterator[KeptTree]:
        key = kept.plan.key
        logs = self.state / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{key}.log"
        log.write_bytes(outcome.log)
        try:
            self._take_over(kept, outcome, log)
        except FarmError as error:
            self.failures[key] = error
            fleet.end(key, FAILED)
            self.report.say(error.render())
            return
        fleet.end(key, BUILT)
        yield kept

    def _take_over(self, kept: KeptTree, outcome: Outcome, log: Path) -> None:
        failure = outcome.failure
        if failure is not None or outcome.toolchain is None or outcome.line is None:
            code, message, hint = (
                (failure.code, failure.message, failure.hint)
                if failure
                else ("WORKER_FAILED", f"{outcome.host} gave nothing back", "")
            )
            raise BuildError(code, f"{message} (on {outcome.host})", hint=hint, log=str(log))
        with tempfile.TemporaryDirectory(prefix="llama-farm-") as folder:
            remote_products.unpack(outcome, Path(folder))
            promised = replace(kept, plan=replace(kept.plan, line=outcome.line))
            build_json, licences = pipeline.recorded(
                promised.plan, outcome.toolchain, outcome.cub, self.request, self.report
            )
            promised.keep(Path(folder), build_json, licences, outcome.seconds or {})


def _recording(fleet: Fleet, kept: KeptTree) -> Recording:
    """Write a build's steps into the journal; what an earlier build had come to is over."""
    entry = msgspec.structs.replace(kept.entry(), steps={}, running=None, count=None)
    return Recording(SetReporter(fleet, kept.plan.key), kept.journal, entry)
