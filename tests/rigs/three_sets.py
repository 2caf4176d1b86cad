"""Builds three sets of the tiny llama.cpp for real, as `invoke build-cuda` does, on this terminal.

    python tests/rigs/three_sets.py FOLDER local|dask [NAME_OF_A_SET_THAT_FAILS]

State, cache and tarballs go below FOLDER.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from farm import pipeline, source, targets
from farm.cluster.dispatch import build_spread
from farm.engines.local import LocalEngine
from farm.errors import FarmError
from farm.options import BuildRequest
from farm.plan import BuildPlan
from farm.terminal.progress import BuildReport

TINY = Path(__file__).parent / "tiny_llama"
SETS = ("first", "second", "third")


def main(folder: Path, engine: str, fails: str | None = None) -> int:
    """Build; returns the exit status."""
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "CCACHE_DIR": str(folder / "ccache")}
    pipeline.STATE = folder / "state"  # type: ignore[misc] - a checkout of its own
    line = targets.load().line("cpu")
    line = pipeline.promise_of_this_host(line, BuildReport(Console(quiet=True)))
    origin = source.from_folder(TINY)
    plans = [BuildPlan(targets.ArchSet(name, ""), line, origin) for name in SETS]
    plans = [
        replace(plan, targets=("no-such-target",)) if plan.arch_set.name == fails else plan
        for plan in plans
    ]
    request = BuildRequest(
        engine=engine, worker_engine="local", workers=2, jobs=1, out=folder / "dist"
    )
    with BuildReport() as report:
        report.say(f"source: llama.cpp b{origin.build} from {origin.origin}")
        try:
            if engine == "dask":
                build_spread(plans, request, report)
            else:
                pipeline.build_all(plans, LocalEngine(jobs=1), request, report)
        except FarmError as error:
            print(error.render(), file=sys.stderr)
            return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
