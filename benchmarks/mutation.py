"""Measure how many small wrong versions of a module its own unit tests notice.

    pip install cosmic-ray==8.7.0
    PYTHONPATH=.:spaces nice -n 19 python benchmarks/mutation.py trust unpack --sample 60

cosmic-ray changes one operator, constant, condition or statement at a time. Each mutant is tested
in a copy of the project, in a process of its own; ``--workers`` of them at once. A mutant counts as
noticed where a test fails or takes many times as long as the sound module. The score is printed for
each module, then each mutant that no test noticed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT: Final = Path(__file__).resolve().parents[1]
TESTS: Final[dict[str, tuple[str, ...]]] = {
    "manifest": ("manifest",),
    "trust": ("trust",),
    "unpack": ("unpack",),
    "foreign": ("unpack",),
    "store": ("store",),
    "disk": ("disk", "store"),
    "receipt": ("receipt", "store"),
    "fetch": ("fetch", "resume"),
    "locations": ("locations", "fetch"),
    "http_transport": ("http_transport", "fetch"),
}
"""What verifies, and the unit tests of each module."""
_COPIED: Final = ("spaces", "tests", "farm", "build", "benchmarks", "pyproject.toml")
_SAME: Final = ("core/ReplaceBinaryOperator_BitOr_", "core/ZeroIterationForLoop_type")
"""Mutations that cannot be noticed: most ``|`` are in annotations, which are never evaluated."""
_SLOWER, _LEAST_SECONDS = 5.0, 20.0


def _command(module: str) -> str:
    files = " ".join(f"tests/loader/test_{name}.py" for name in TESTS[module])
    return f"{sys.executable} -m pytest -x -q -p no:cacheprovider --timeout 120 {files}"


def _mutants(module: str, sample: int, seed: int) -> list[Any]:
    """Return cosmic-ray's work items for a module, at most ``sample``, drawn by ``seed``."""
    from cosmic_ray.commands import init  # noqa: PLC0415 - not a requirement
    from cosmic_ray.work_db import WorkDB, use_db  # noqa: PLC0415 - not a requirement

    with tempfile.TemporaryDirectory() as folder:
        database = str(Path(folder) / "session.sqlite")
        with use_db(database, WorkDB.Mode.create) as work:
            init([Path("spaces/llama_loader") / f"{module}.py"], work, {})
            found = [
                item
                for item in work.work_items
                if not item.mutations[0].operator_name.startswith(_SAME)
            ]
    found.sort(key=lambda item: (item.mutations[0].operator_name, item.mutations[0].start_pos))
    return found if len(found) <= sample else random.Random(seed).sample(found, sample)  # noqa: S311


def _settle(root: str) -> None:
    """Give this worker process a copy of the project to mutate."""
    place = Path(tempfile.mkdtemp(prefix="mutants-", dir=root))
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place / name)
    os.chdir(place)
    os.environ |= {"PYTHONPATH": f"{place}:{place / 'spaces'}", "PYTHONDONTWRITEBYTECODE": "1"}


def _judge(module: str, mutations: Any, seconds: float) -> tuple[bool, str]:
    """Return whether a test noticed one mutant, and what it changed."""
    from cosmic_ray.mutating import mutate_and_test  # noqa: PLC0415 - not a requirement

    result = mutate_and_test(mutations, _command(module), seconds)
    return result.is_killed, result.diff or ""


def _sound(module: str) -> float:
    """Return the seconds that the tests of a module take; they must pass."""
    from cosmic_ray.testing import run_tests  # noqa: PLC0415 - not a requirement

    began = time.monotonic()
    outcome, output = run_tests(_command(module), 600.0)
    if outcome != "survived":
        sys.exit(f"the tests of {module} fail without any mutant:\n{output[-3000:]}")
    return time.monotonic() - began


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the modules that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", choices=[*TESTS, []], default=[])
    parser.add_argument("--sample", type=int, default=60, help="mutants of each module, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the scores as JSON, too")
    asked = parser.parse_args(arguments)
    os.chdir(ROOT)
    scores: dict[str, list[int]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="mutation-") as root,
        ProcessPoolExecutor(asked.workers, initializer=_settle, initargs=(root,)) as pool,
    ):
        modules = asked.modules or list(TESTS)
        sound = dict(zip(modules, pool.map(_sound, modules), strict=True))
        judged = {
            module: [
                pool.submit(_judge, module, item.mutations, _limit(sound[module]))
                for item in _mutants(module, asked.sample, asked.seed)
            ]
            for module in modules
        }
        for module, futures in judged.items():
            results = [future.result() for future in futures]
            noticed = sum(killed for killed, _ in results)
            scores[module] = [noticed, len(results)]
            print(f"{module}: {noticed} of {len(results)} ({100 * noticed / len(results):.0f} %)")
            for killed, change in results:
                if not killed:
                    print(_shown(change), flush=True)
    if asked.out is not None:
        asked.out.write_text(f"{json.dumps(scores, indent=1)}\n")


def _limit(sound: float) -> float:
    return max(_LEAST_SECONDS, _SLOWER * sound)


def _shown(change: str) -> str:
    """Return the changed lines of a diff."""
    kept = [line for line in change.splitlines() if line[:1] in "+-" and line[1:2] not in "+-"]
    place = next((line for line in change.splitlines() if line.startswith("@@")), "")
    return "\n".join([f"    {place}", *(f"    {line}" for line in kept)])


if __name__ == "__main__":
    main()
