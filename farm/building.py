"""What `invoke build-cuda` does: sets are built on this machine, or spread over a cluster."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from farm import pipeline, run_lock
from farm.engines import shared_cache
from farm.errors import FarmError, UsageError
from farm.plan import TARGETS, BuildPlan
from farm.request import choose_source, require_buildable, resolve

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from farm.kept.kept_tree import KeptTree
    from farm.pipeline import Made
    from farm.request import BuildRequest
    from farm.source import Source
    from farm.targets import Line
    from farm.terminal.report import BuildReport


def build(request: BuildRequest, report: BuildReport) -> tuple[Made, ...]:
    """Build, pack and list everything that ``request`` names.

    A set that fails does not stop the others; it is named at the end.

    Returns:
        The tarballs that were made, one for each set that did not fail.

    Raises:
        UsageError: what is asked for does not exist or cannot be built; nothing was started.
        BuildError: ``SET_IS_BEING_BUILT``: another run has the checkout or the folder.
        FarmError: a build, or the packing of one, failed.
    """
    line, sets = resolve(request)
    if request.cached:
        shared_cache.check(report.note)
    named = choose_source(request) if request.source or request.ref else None
    if request.engine == "dask":
        line = _line_for_hosts(line)
        tree = named or choose_source(request)
        _say_source(tree, report)
        plans = [BuildPlan(arch_set, line, tree, (*TARGETS, *request.also)) for arch_set in sets]
        with _alone(plans, request):
            return build_spread(plans, request, report)
    with closing(pipeline.choose_engine(request, line, report)) as engine:
        line = pipeline.settled(engine, request, line, report)
        require_buildable(line, sets)
        tree = named or choose_source(request)
        _say_source(tree, report)
        plans = [BuildPlan(arch_set, line, tree, (*TARGETS, *request.also)) for arch_set in sets]
        with _alone(plans, request):
            return pipeline.build_all(plans, engine, request, report)


def _line_for_hosts(line: Line | None) -> Line:
    if line is None:
        raise UsageError(
            "LINE_OF_IMAGE_UNKNOWN",
            "the image's tag does not tell its CUDA, and hosts of a cluster are asked later",
            hint="--line names it, e.g. --line cu126",
        )
    return line


def _say_source(tree: Source, report: BuildReport) -> None:
    if tree.note:
        report.note(tree.note)
    report.say(f"source: llama.cpp b{tree.build} ({tree.short_commit}) from {tree.origin}")


def _alone(plans: list[BuildPlan], request: BuildRequest) -> AbstractContextManager[None]:
    """Keep other runs off the sets' trees of this checkout, and off their tarballs."""
    folders = (pipeline.STATE / "locks", request.out)
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
