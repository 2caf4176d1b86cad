"""CPU time of single-architecture sets against the seed's flags, over a sample of ggml-cuda.

    PYTHONPATH=.:spaces python benchmarks/build_cost.py [--line cu130] [--sample 21]
        [--toolkit pypi] [--out FILE.json]

Method. Every set is configured by the farm's own plan, and CMake writes down the command of each
translation unit. Of the CUDA units, sorted by path, every n-th is taken (systematic sampling: the
large template instances, small operators and everything between come in their own proportion).
Each is compiled with the very command of its build, without the compiler cache, one after the
other: 80, 86, 89 and 90 as four sets (machine code only, fatbins not compressed), then once with
the seed's ``80;86;89;90`` (machine code and PTX, fatbins compressed). What counts is the user and
system time of all processes (``getrusage``), not the wall clock, so that a shared machine does not
matter.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path, PurePath
from typing import Final

from farm import source, targets
from farm.inputs import pins, recipe, toolkit
from farm.plan import BuildPlan, Layout

SINGLES: Final = ("sm80", "sm86", "sm89", "sm90")
TOGETHER: Final = "seed"


def configure(plan: BuildPlan, tools: toolkit.Toolkit, folder: Path) -> dict[str, list[str]]:
    """Configure a plan in ``folder``; returns the command of every CUDA unit by its name."""
    folder.mkdir()
    layout = Layout(
        source=PurePath(plan.source.tree), build=folder, recipe=recipe.FILE, cuda=tools.root
    )
    step = plan.steps(layout, jobs=1)[0]
    environ = {**os.environ, **plan.environment(layout, ccache_dir=None)}
    command = [*step.argv, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
    listed = json.loads((folder / "compile_commands.json").read_text())
    return {
        Path(one["file"]).name: shlex.split(one["command"])
        for one in listed
        if one["file"].endswith(".cu")
    }


def cpu_seconds(command: list[str], folder: Path) -> float:
    """Run a compiler; returns the user and system seconds of all of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Measure, print a line for each unit, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--line", default="cu130")
    parser.add_argument("--sample", type=int, default=21)
    parser.add_argument("--toolkit")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table, tree = targets.load(), source.from_archive(pins.load().source)
    tools = toolkit.locate(options.toolkit)
    line = table.line(options.line)
    with tempfile.TemporaryDirectory(prefix="build-cost-") as scratch:
        folders = {name: Path(scratch) / name for name in (*SINGLES, TOGETHER)}
        commands = {
            name: configure(BuildPlan(table.sets[name], line, tree), tools, folder)
            for name, folder in folders.items()
        }
        units = sorted(commands[TOGETHER])
        sample = units[:: max(1, len(units) // options.sample)]
        found = [_unit(unit, commands, folders) for unit in sample]
    result = _summary(found, len(units), tools.version)
    print(json.dumps({key: value for key, value in result.items() if key != "units"}, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def _unit(
    unit: str, commands: dict[str, dict[str, list[str]]], folders: dict[str, Path]
) -> dict[str, object]:
    times = {
        name: round(cpu_seconds(commands[name][unit], folders[name]), 2)
        for name in (*SINGLES, TOGETHER)
    }
    single = sum(times[name] for name in SINGLES)
    print(f"{unit:44} {single:8.1f} {times[TOGETHER]:8.1f} {single / times[TOGETHER]:6.2f}")
    sys.stdout.flush()
    return {"unit": unit, **times}


def _summary(found: list[dict[str, object]], units: int, toolkit_version: str) -> dict[str, object]:
    totals = {
        name: round(sum(float(str(one[name])) for one in found), 1) for name in (*SINGLES, TOGETHER)
    }
    singles = sum(totals[name] for name in SINGLES)
    return {
        "toolkit": toolkit_version,
        "units_sampled": len(found),
        "units_of_all": units,
        "cpu_seconds": totals,
        "four_single_sets": round(singles, 1),
        "ratio": round(singles / totals[TOGETHER], 3),
        "units": found,
    }


if __name__ == "__main__":
    main()
