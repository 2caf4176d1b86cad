"""How long all sets take on several hosts, against the least that any schedule could take.

    PYTHONPATH=.:spaces python benchmarks/makespan.py > benchmarks/results/makespan.json

Simulated: every set of build/targets.toml on every CUDA line that can build it, with the CPU
seconds of ``results/build_cost.json`` (a set that was not measured: the median), handed out by the
recorded times while the real ones are off by up to a fifth. Real: targets of different length,
compiled through the Dask engine by workers of this machine with one compiler each; ``--hosts 2 4``
of them one after the other, by default as many as CPUs. With ``--throttled`` each is a process in a
control group (version 1, root) that gets its equal part of the CPUs and no more: a slow host.
"""

import argparse
import heapq
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

from distributed import Client
from rich.console import Console

from farm import source, targets
from farm.cluster.dispatch import Dispatcher
from farm.cluster.host import BuildJob, pack_folder
from farm.cluster.scheduler import RESOURCE, cluster
from farm.errors import FarmError
from farm.options import BuildRequest
from farm.plan import BuildPlan
from farm.terminal.progress import BuildReport, Fleet
from tests.rigs import control_group

PROJECT: Final = Path(__file__).parent.parent
TINY: Final = PROJECT / "tests" / "rigs" / "tiny_llama"
COST: Final = PROJECT / "benchmarks" / "results" / "build_cost.json"
UNITS: Final = (8, 6, 5, 4, 3, 2)
"""C++ files of six real targets; every one includes <regex> and <iostream> and instantiates."""
UNITS_FOR: Final = 2
"""Hosts that they are for; more get smaller ones, as many for each host."""
SECONDS: Final = 5.0
"""Of one CPU for a file, roughly: what a set may take before it counts as slow."""
HOSTS: Final = (2, 3, 4, 6, 8, 12, 16)
BIN: Final = "${CMAKE_BINARY_DIR}/bin"
DRAWS: Final = 200
ERROR: Final = 0.2

UNIT: Final = """#include <iostream>
#include <regex>
int unit_{number}() {{ std::regex r("a(b|c)*{number}"); return std::regex_match("abc", r); }}
"""


def matrix() -> dict[str, float]:
    """Return the recorded seconds of every set on every CUDA line that can build it."""
    measured: dict[str, float] = json.loads(COST.read_text("utf-8"))["cpu_seconds"]
    table = targets.load()
    keys: dict[str, str] = {}
    for line in table.lines.values():
        for arch_set in table.sets.values():
            try:
                targets.check_buildable(line, arch_set)
            except FarmError:
                continue
            if line.is_cuda and arch_set.archs:
                keys[f"{line.name}-{arch_set.name}"] = arch_set.name
    other = median(measured[name] for name in keys.values() if name in measured)
    return {key: measured.get(name, other) for key, name in keys.items()}


def finish(durations: Sequence[float], hosts: int) -> float:
    """Return when the last of ``durations`` ends, handed out in order to whichever host is free."""
    free = [0.0] * hosts
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def lower_bound(durations: Sequence[float], hosts: int) -> float:
    """Return the seconds below which no schedule on equal hosts can be."""
    return max(*durations, sum(durations) / hosts)


def simulate(recorded: dict[str, float], hosts: int) -> dict[str, float]:
    """Return makespan over the lower bound: as recorded, and with errors (mean, worst)."""
    order = sorted(recorded, key=lambda key: -recorded[key])
    draw = random.Random(hosts)  # noqa: S311 - a simulation that gives the same again
    ratios = []
    for _ in range(DRAWS):
        real = [recorded[key] * draw.uniform(1 - ERROR, 1 + ERROR) for key in order]
        ratios.append(finish(real, hosts) / lower_bound(real, hosts))
    exact = [recorded[key] for key in order]
    end, least = finish(exact, hosts), lower_bound(exact, hosts)
    return {
        "hosts": hosts,
        "as_recorded": round(end / least, 3),
        "with_errors_mean": round(sum(ratios) / DRAWS, 3),
        "with_errors_worst": round(max(ratios), 3),
        "single_longest_decides": max(exact) > sum(exact) / hosts,
    }


def units_for(hosts: int) -> tuple[int, ...]:
    """Return the number of C++ files of each target that so many hosts share, most first."""
    if hosts <= UNITS_FOR:
        return UNITS
    each = (1 + position % 4 for position in range(hosts * len(UNITS) // UNITS_FOR))
    return tuple(sorted(each, reverse=True))


@contextmanager
def throttled(hosts: int) -> Iterator[str]:
    """Give the address of a cluster whose hosts have an equal part of this machine's CPUs each."""
    program = (sys.executable, "-m")
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder, ExitStack() as ends:
        where = f"{folder}/scheduler.json"
        common = ("--no-dashboard", "--host", "127.0.0.1", "--scheduler-file", where)
        scheduler = (*program, "distributed.cli.dask_scheduler", "--port", "0", *common)
        worker = (*program, "distributed.cli.dask_worker", "--no-nanny", "--nthreads", "1", *common)
        declared = ("--resources", f"{RESOURCE}=1", "--local-directory", folder)
        _start(scheduler, ends)
        processes = [_start((*worker, *declared), ends) for _ in range(hosts)]
        with Client(scheduler_file=where, timeout=60) as client:  # type: ignore[no-untyped-call]
            client.wait_for_workers(hosts, timeout=120)
            address = client.scheduler.address
        for process in processes:
            ends.enter_context(control_group.capped(process.pid, (os.cpu_count() or 1) / hosts))
        yield address


def _start(command: Sequence[str], ends: ExitStack) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    process = ends.enter_context(subprocess.Popen(command, stdout=quiet, stderr=quiet))
    ends.callback(process.terminate)
    return process


def real(hosts: int, *, capped: bool) -> dict[str, Any]:
    """Compile targets of different length on so many hosts; times are wall seconds."""
    units, load = units_for(hosts), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="makespan-") as folder, ExitStack() as ends:
        os.environ["XDG_CACHE_HOME"] = folder
        os.environ["CCACHE_DIR"] = f"{folder}/ccache"
        tree = Path(shutil.copytree(TINY, Path(folder) / "llama.cpp"))
        _add_targets(tree, units)
        origin, line = source.from_folder(tree), targets.load().line("cpu")
        plans = [
            BuildPlan(targets.ArchSet(name, ""), line, origin, (name,)) for name in _names(units)
        ]
        request = BuildRequest(engine="local", jobs=1, workers=hosts, fresh=True)
        each = SECONDS * max(1.0, hosts / (os.cpu_count() or 1))
        expected = {plan.key: each * count for plan, count in zip(plans, units, strict=True)}
        fleet = Fleet(BuildReport(Console(stderr=True)), expected)
        address = ends.enter_context(throttled(hosts) if capped else cluster(request, len(plans)))
        jobs = [BuildJob(plan, request) for plan in plans]
        makespan = _run(jobs, address, tree, fleet)
    took = [fleet.took[plan.key] for plan in plans]
    least = lower_bound(took, hosts)
    ideal = finish(took, hosts)  # handed out in this order, in no time
    return {
        "hosts": hosts,
        "cpus_of_each": round((os.cpu_count() or 1) / hosts, 3) if capped else None,
        "units": units,
        "set_seconds": [round(seconds, 2) for seconds in took],
        "makespan": round(makespan, 2),
        "longest_first": round(ideal, 2),
        "lower_bound": round(least, 2),
        "over_longest_first": round(makespan / ideal, 3),
        "ratio": round(makespan / least, 3),
        "load_before": round(load, 1),
        "cores": os.cpu_count(),
    }


def _run(jobs: list[BuildJob], address: str, tree: Path, fleet: Fleet) -> float:
    """Build them all; returns the seconds from the first handing out to the last outcome."""
    packed = pack_folder(tree)
    with Dispatcher(address, lambda: packed, fleet) as hosts, fleet:
        began = time.monotonic()
        for job, outcome in hosts.run(jobs):
            if outcome.failure is not None:
                sys.exit(f"{job.plan.key}: {outcome.failure.line}")
            fleet.end(job.plan.key, "built")
        return time.monotonic() - began


def _names(units: Sequence[int]) -> list[str]:
    """Return a target's name for each number of files."""
    return [f"load{position}of{count}" for position, count in enumerate(units)]


def _add_targets(tree: Path, units: Sequence[int]) -> None:
    rows = []
    (tree / "load_main.cpp").write_text("int main() { return 0; }\n", "utf-8")
    for name, count in zip(_names(units), units, strict=True):
        files = [f"{name}_{number}.cpp" for number in range(count)]
        for number, file in enumerate(files):
            (tree / file).write_text(UNIT.format(number=number), "utf-8")
        rows += [
            f"add_executable({name} load_main.cpp {' '.join(files)})",
            # What a host sends is the target's program in CMake's bin folder.
            f"set_target_properties({name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY {BIN})",
        ]
    with (tree / "CMakeLists.txt").open("a", encoding="utf-8") as lists:
        lists.write("\n" + "\n".join(rows) + "\n")


def main() -> None:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="*", default=[os.cpu_count() or UNITS_FOR])
    parser.add_argument("--throttled", action="store_true", help="each has its part of the CPUs")
    options = parser.parse_args()
    recorded = matrix()
    result: dict[str, Any] = {
        "sets": len(recorded),
        "simulated": [simulate(recorded, hosts) for hosts in HOSTS],
        "real": [real(hosts, capped=options.throttled) for hosts in options.hosts],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
