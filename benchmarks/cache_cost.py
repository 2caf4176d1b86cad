"""What the compiler cache spares: unchanged, for a second architecture, after one changed file.

    PYTHONPATH=.:spaces python benchmarks/cache_cost.py [--toolkit pypi]

One run of five builds with one cache that is empty at first: a set, the same set again, a set of
another architecture, then one CUDA file is changed and both sets are built once more. Each build
is the farm's own (plan, local engine, executor) in a new folder, as after `invoke build-cuda`. The
source is the pinned llama.cpp: all host files of ggml, every CPU variant among them, and of ggml's
CUDA files those of ``UNITS``, since all 144 take an hour for each architecture on two cores.

CPU time is the user and system time of this process and of all that it started (``getrusage``),
configuring, copying and linking with it: a shared machine does not matter. Hits and misses are
ccache's own, file by file (its ``stats_log``).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest import mock

from farm import source, targets
from farm.engines.local import LocalEngine
from farm.execute import execute
from farm.inputs import pins, toolkit
from farm.plan import BuildPlan
from tests.rigs.tiny_release import Silent

SETS: Final = ("sm90", "sm120")
LINE: Final = "cu130"
TARGETS: Final = ("ggml",)
UNITS: Final = (
    "argsort.cu",
    "concat.cu",
    "getrows.cu",
    "norm.cu",
    "rope.cu",
    "softmax.cu",
    "mmq-instance-q4_0.cu",
    "fattn-vec-instance-f16-f16.cu",
)
CHANGED: Final = "norm.cu"
HITS: Final = frozenset({"direct_cache_hit", "preprocessed_cache_hit"})


def reduced(tree: Path, into: Path) -> Path:
    """Copy llama.cpp without the CUDA files that are not in ``UNITS``."""
    shutil.copytree(tree, into, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    for unit in (into / "ggml" / "src" / "ggml-cuda").rglob("*.cu"):
        if unit.name not in UNITS:
            unit.unlink()
    # The only units that CMake does not look for but names.
    options = into / "ggml" / "CMakeLists.txt"
    named = '(GGML_CUDA_FA_QUANTS "q4_0-q4_0;q8_0-q8_0;f16-f16;bf16-bf16"'
    text = options.read_text("utf-8")
    if named not in text:
        raise ValueError(f"{options} does not name the units any more: {named}")
    options.write_text(text.replace(named, '(GGML_CUDA_FA_QUANTS "f16-f16"'), "utf-8")
    return into


def results(log: Path) -> list[tuple[str, bool]]:
    """Read ccache's stats log: each compilation's file, and whether it was a hit."""
    found = []
    for entry in log.read_text("utf-8").split("# ")[1:]:
        name, *counters = entry.split("\n")
        if counted := {*HITS, "cache_miss"} & {*counters}:
            found.append((Path(name).name, bool(counted & HITS)))
    return found


def measure(plan: BuildPlan, engine: LocalEngine, scratch: Path) -> dict[str, Any]:
    """Build once; returns CPU seconds, and hits and misses of host and CUDA files."""
    log = scratch / "stats.log"
    log.unlink(missing_ok=True)
    before, began = _cpu(), time.monotonic()
    with execute(plan, engine, logs=scratch / "logs", reporter=Silent()):
        pass
    files = results(log)
    cuda = [(name, hit) for name, hit in files if name in UNITS]
    host = [(name, hit) for name, hit in files if not name.endswith(".cu")]
    return {
        "set": plan.arch_set.name,
        "cpu_seconds": round(_cpu() - before, 1),
        "wall_seconds": round(time.monotonic() - began, 1),
        "host": {"hits": sum(hit for _, hit in host), "misses": sum(not hit for _, hit in host)},
        "cuda": {"hits": sum(hit for _, hit in cuda), "misses": sum(not hit for _, hit in cuda)},
        "missed": dict(Counter(name for name, hit in files if not hit)),
    }


def _cpu() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


def run(toolkit_name: str | None, scratch: Path) -> dict[str, Any]:
    """Do the five builds."""
    cache = scratch / "ccache"
    cache.mkdir()
    (cache / "ccache.conf").write_text(f"stats_log = {scratch}/stats.log\n", "utf-8")
    mock.patch("farm.plan.CACHE_CONFIG", f"{cache}/ccache.conf").start()
    os.environ["CCACHE_DIR"] = str(cache)
    table, tools = targets.load(), toolkit.locate(toolkit_name)
    whole = source.from_archive(pins.load().source)
    tree = replace(whole, tree=reduced(whole.tree, scratch / "llama.cpp"))
    engine = LocalEngine(cuda=tools.root)
    first, second = (BuildPlan(table.sets[name], table.line(LINE), tree, TARGETS) for name in SETS)
    builds = {
        "cold": measure(first, engine, scratch),
        "unchanged": measure(first, engine, scratch),
        "second_architecture": measure(second, engine, scratch),
    }
    unit = next((tree.tree / "ggml" / "src" / "ggml-cuda").rglob(CHANGED))
    unit.write_text(unit.read_text("utf-8") + "\nstatic const int changed = 1;\n", "utf-8")
    builds["changed_first"] = measure(first, engine, scratch)
    builds["changed_second"] = measure(second, engine, scratch)
    return _summary(builds)


def _summary(builds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    host = builds["second_architecture"]["host"]
    told = subprocess.run(["ccache", "--version"], capture_output=True, text=True, check=True)
    return {
        "ccache": told.stdout.splitlines()[0].rpartition(" ")[2],
        "cuda_units": len(UNITS),
        "unchanged_share_of_cold_cpu": round(
            builds["unchanged"]["cpu_seconds"] / builds["cold"]["cpu_seconds"], 4
        ),
        "second_architecture_host_hits": round(host["hits"] / (host["hits"] + host["misses"]), 4),
        "changed_unit": CHANGED,
        "recompiled_after_change": [
            builds[name]["missed"] for name in ("changed_first", "changed_second")
        ],
        "builds": builds,
    }


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toolkit", default=toolkit.WHEELS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cache-cost-") as scratch:
        print(json.dumps(run(options.toolkit, Path(scratch)), indent=2))


if __name__ == "__main__":
    main()
