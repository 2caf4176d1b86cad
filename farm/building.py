"""What `invoke build-cuda` does: sets are built on this machine, or spread over a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farm import pipeline, preflight, run_lock

if TYPE_CHECKING:
    from farm.pipeline import Made
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
    with preflight.opened(request, report) as ready:
        run_lock.use(pipeline.STATE)
        keys = [plan.key for plan in ready.plans]
        with run_lock.held(keys, (pipeline.STATE / "locks", request.out)):
            if ready.engine is not None:
                return pipeline.build_all(ready.plans, ready.engine, request, report)
            from farm.cluster.spread import build_spread  # noqa: PLC0415 - an optional group

            return build_spread(ready.plans, request, report)
