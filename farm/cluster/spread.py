"""A run on the hosts of a cluster: find the unbuilt sets, hand them out, keep the results."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from farm import pipeline
from farm.errors import BuildError, FarmError, UsageError
from farm.kept import Journal, KeptTree, digest, source_digest
from farm.terminal.progress import BUILT, FAILED, Fleet

try:
    from farm.cluster import host
    from farm.cluster.dispatch import Dispatcher
    from farm.cluster.scheduler import cluster
except ModuleNotFoundError as error:
    raise UsageError(
        "DASK_MISSING",
        f"--engine dask needs {error.name}, which is not installed",
        hint="python3 -m pip install --require-hashes -r requirements-cluster.lock",
    ) from error

if TYPE_CHECKING:
    from collections.abc import Generator

    from farm.cluster.host import Outcome
    from farm.options import BuildRequest
    from farm.pipeline import Made
    from farm.plan import BuildPlan
    from farm.terminal.progress import BuildReport


def build_spread(
    plans: list[BuildPlan], request: BuildRequest, report: BuildReport
) -> tuple[Made, ...]:
    """Build sets on the hosts of a Dask cluster, longest first; pack them here.

    Raises:
        EngineError: no scheduler or no host answers.
        FarmError: sets failed; the others are built and packed.
    """
    run = _Run(plans, request, report)
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
class _Run:
    """One run. ``failures`` grow while ``trees`` is consumed."""

    plans: list[BuildPlan]
    request: BuildRequest
    report: BuildReport
    failures: dict[str, FarmError] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def trees(self) -> Generator[KeptTree, None, None]:
        """Yield the sets' trees: those of earlier runs first, then each when it is built.

        Raises:
            UsageError: an engine that hosts cannot use.
            EngineError: no scheduler or no host answers.
        """
        plan, asked = self.plans[0], self._for_hosts()
        recorded = Journal(pipeline.STATE / "journal").times(self.plans)
        fleet = Fleet.longest_first(self.report, recorded)
        kept: dict[str, KeptTree] = {}

        with (
            cluster(self.request, len(self.plans)) as address,
            Dispatcher(address, lambda: host.pack_folder(plan.source.tree), fleet) as dispatcher,
        ):
            if dashboard := dispatcher.link.dashboard():
                self.report.say(f"dashboard: {dashboard}")
            identity = "\n".join(self._identities(dispatcher, asked))
            kept |= {
                one.key: KeptTree(one, digest(one, identity), pipeline.STATE) for one in self.plans
            }
            source = source_digest(plan.source)
            jobs = []
            for key in fleet.expected:
                if pipeline.found_built(kept[key], self.report, fresh=asked.fresh):
                    fleet.before(key)
                    yield kept[key]
                else:
                    kept[key].begin()
                    jobs.append(host.Job(kept[key].plan, source, asked))
            with fleet:
                for job, outcome in dispatcher.run(jobs):
                    if self._took_over(kept[job.key], outcome, fleet):
                        yield kept[job.key]

    def _for_hosts(self) -> BuildRequest:
        """Return the request for hosts: with their engine, and without folders of this machine."""
        line, engine = self.plans[0].line.name, self.request.worker_engine
        return replace(self.request, engine=engine, line=line, source=None, out=Path())

    def _identities(self, dispatcher: Dispatcher, asked: BuildRequest) -> list[str]:
        told = dispatcher.identities(asked, self.plans[0])
        if len(told) > 1:
            self.report.say(
                "note[COMPILERS_DIFFER]: the hosts have different compilers: what they make may "
                "differ, and the cache is not shared between them"
            )
        return told

    def _took_over(self, kept: KeptTree, outcome: Outcome, fleet: Fleet) -> bool:
        key = kept.plan.key
        log = pipeline.STATE / "logs" / f"{key}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(outcome.log)
        try:
            self._take_over(kept, outcome, log)
        except FarmError as error:
            self.failures[key] = error
            fleet.end(key, FAILED)
            self.report.say(error.render())
            return False
        fleet.end(key, BUILT)
        return True

    def _take_over(self, kept: KeptTree, outcome: Outcome, log: Path) -> None:
        if outcome.failure is not None:
            why = outcome.failure
            raise BuildError(
                why.code, f"{why.message} (on {outcome.host})", hint=why.hint, log=str(log)
            )
        if outcome.toolchain is None or outcome.line is None:
            raise BuildError("WORKER_FAILED", f"{outcome.host} returned nothing", log=str(log))
        with tempfile.TemporaryDirectory(prefix="llama-farm-") as folder:
            host.unpack(outcome, Path(folder))
            promised = replace(kept, plan=replace(kept.plan, line=outcome.line))
            build_json, licences = pipeline.recorded(
                promised.plan, outcome.toolchain, outcome.cub, self.request, self.report
            )
            promised.keep(Path(folder), build_json, licences, outcome.seconds)
