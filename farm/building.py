"""What `invoke build-cuda` does: sets are built on this machine, or spread over a cluster."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from farm import pipeline, preflight, run_lock
from farm.errors import FarmError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from farm.kept import KeptTree
    from farm.pipeline import Made
    from farm.plan import BuildPlan
    from farm.request import BuildRequest
    from farm.terminal.report import BuildReport


def build(request: BuildRequest, report: BuildReport) -> tuple[Made, ...]:
    """Build, pack and list everything that ``request`` names.

    A set that fails does not stop the others; it is named at the end.

    Returns:
        The tarballs that were made, one for each set that did not fail.

    Raises:
        UsageError: what is asked for does not exist or cannot be built; nothing was started, and
            the error shows everything that stands in the way.
        BuildError: ``SET_IS_BEING_BUILT``: another run has the checkout or the folder.
        FarmError: a build, or the packing of one, failed.
    """
    with preflight.opened(request, report) as ready, _alone(ready.plans, request):
        if ready.engine is None:
            return build_spread(ready.plans, request, report)
        return pipeline.build_all(ready.plans, ready.engine, request, report)


def _alone(plans: list[BuildPlan], request: BuildRequest) -> AbstractContextManager[None]:
    """Keep other runs off the sets' trees of this checkout, and off their tarballs."""
    folders = (pipeline.STATE / "locks", request.out)
    run_lock.use(pipeline.STATE)
    return run_lock.held([plan.key for plan in plans], folders)


def build_spread(
    plans: list[BuildPlan], request: BuildRequest, report: BuildReport
) -> tuple[Made, ...]:
    """Build sets on the hosts of a Dask cluster, longest first; pack them here.

    Raises:
        UsageError: the farm's group ``cluster`` is not installed.
        EngineError: no scheduler or no host answers.
        FarmError: sets failed; the others are built and packed.
    """
    from farm.cluster.spread import Spread  # noqa: PLC0415 - needs the optional group

    spread = Spread(plans, request, report, pipeline.STATE)

    def pack(kept: KeptTree) -> None:
        try:
            spread.made.append(pipeline.pack_kept(kept, request, report, began=spread.began))
        except FarmError as error:
            spread.failures[kept.plan.key] = error
            if len(plans) > 1:  # else it is all that is said at the end
                report.say(error.render())

    # Beside the handing out: no host waits for a tarball of what another has built.
    with ThreadPoolExecutor(max_workers=1) as packer, closing(spread.run()) as trees:
        try:
            packing = [packer.submit(pack, kept) for kept in trees]
        except BaseException:
            packer.shutdown(wait=False, cancel_futures=True)
            raise
    for one in packing:
        one.result()
    return pipeline.conclude(spread.made, spread.failures, request, report)
