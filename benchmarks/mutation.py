"""How many small wrong versions of a module its own unit tests notice: the mutation score.

    PYTHONPATH=.:spaces nice -n 19 python benchmarks/mutation.py manifest trust --out FILE.json

Each mutant (``benchmarks/mutants.py``) runs in a forked process against the tests that call the
function it is in, the fastest first, until one fails. It counts as noticed where a test fails or
it takes many times as long as the sound module. Only what is imported in that process is mutated,
so a test that starts the loader as a program notices nothing here: the score is a lower bound.
``--sample N --seed S`` takes N of a module's mutants; ``--budget S`` leaves out the slowest tests,
so that all that are run take S seconds on the sound module.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import hypothesis
import pytest

from benchmarks.mutants import Mutant, mutants

if TYPE_CHECKING:
    import ast
    import types
    from collections.abc import Callable, Sequence

ROOT: Final = Path(__file__).resolve().parents[1]
LOADER: Final = ROOT / "spaces" / "llama_loader"
UNIT: Final = ROOT / "tests" / "unit"
ROOMS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "manifest": {"manifest": ("manifest", "strict_json")},
    "trust": {"trust": ("trust", "channel"), "channel": ("channel", "trust")},
    "unpack": {"unpack": ("unpack",), "tarball": ("unpack",), "decompress": ("unpack",)},
    "store": {"store": ("store",), "disk": ("store",), "receipt": ("store",)},
    "fetch": {"fetch": ("fetch",), "mirrors": ("fetch",), "web": ("fetch",)},
}
"""Each room: its modules, and the unit tests of each."""
_EQUIVALENT: Final = Path(__file__).with_name("equivalent_mutants.json")
_HEAVY: Final = ("requests", "minisign", "backports.zstd", "filelock", "jsonschema", "msgspec.json")
"""Imported once, before forking: what the tests need of others."""
_SLOWER: Final = 4.0
_LEAST_SECONDS: Final = 20.0


class _Calls:
    """A pytest plugin: how long each test takes, and which functions of a module it calls."""

    def __init__(self, module: Path) -> None:
        self._file = str(module)
        self._lines: set[int] = set()
        self.seconds: dict[str, float] = {}
        self.functions: dict[str, list[int]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Time one test with its fixtures."""
        self._lines = set()
        started = time.monotonic()
        _profile(self._seen)
        try:
            return (yield)
        finally:
            _profile(None)
            self.seconds[item.nodeid] = time.monotonic() - started
            self.functions[item.nodeid] = sorted(self._lines)

    def _seen(self, frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename == self._file:
            self._lines.add(frame.f_code.co_firstlineno)


def _profile(function: Any) -> None:
    threading.setprofile(function)
    sys.setprofile(function)


class _Chosen:
    """A pytest plugin: runs these tests, in this order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._tests = {name: place for place, name in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep and sort."""
        items[:] = sorted(
            (item for item in items if item.nodeid in self._tests),
            key=lambda item: self._tests[item.nodeid],
        )


class _MutantLoader(SourceFileLoader):
    """Gives a module's other version to whoever imports it."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self._tree = tree

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self._tree, self.get_filename(fullname), "exec", dont_inherit=True)


class _MutantFinder(MetaPathFinder):
    def __init__(self, path: Path, tree: ast.Module) -> None:
        self._name, self._path, self._tree = f"llama_loader.{path.stem}", path, tree

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        loader = _MutantLoader(fullname, str(self._path), self._tree)
        return spec_from_file_location(fullname, self._path, loader=loader)


def _run(arguments: Sequence[str], plugin: object) -> int:
    """Run pytest in this (forked) process, quietly; returns its status."""
    os.setsid()
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(devnull, descriptor)
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None)
    hypothesis.settings.load_profile("mutation")
    quiet = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # imported before, on purpose
    common = ("-q", "-x", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *quiet)
    return int(pytest.main([*common, *arguments], plugins=[plugin]))


def _forked(work: Callable[[], int], limit: float) -> int | None:
    """Return the exit status of ``work`` in a child; None where it took longer than ``limit``."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        except BaseException:  # noqa: BLE001  a child must never return into its parent's code
            traceback.print_exc()
            os._exit(70)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)  # a session of its own, with whatever it started
    os.waitpid(child, 0)
    return None


def baseline(module: Path, tests: Sequence[str]) -> _Calls:
    """Run all the tests on the sound module and learn what they call.

    Raises:
        SystemExit: they fail as it is.
    """
    calls = _Calls(module)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "calls.json"

        def work() -> int:
            status = _run(tests, calls)
            out.write_text(json.dumps([calls.seconds, calls.functions]))
            return status

        if _forked(work, 900) != 0:
            sys.exit(f"{module.name}: its tests fail without any change")
        calls.seconds, calls.functions = json.loads(out.read_text())
    return calls


def able(mutant: Mutant, calls: _Calls, budget: float) -> list[str]:
    """The tests that run what was changed, the fastest first, as many as fit into the budget."""
    found: list[str] = []
    spent = 0.0
    for test in sorted(calls.seconds, key=lambda name: calls.seconds[name]):
        if mutant.function is None or mutant.function in calls.functions[test]:
            spent += calls.seconds[test]
            if spent > budget and found:
                break
            found.append(test)
    return found


def survives(
    mutant: Mutant, module: Path, files: Sequence[str], tests: Sequence[str], seconds: float
) -> bool:
    """Whether no test notices a mutant."""

    def work() -> int:
        sys.meta_path.insert(0, _MutantFinder(module, mutant.tree))
        return _run(files, _Chosen(tests))

    return not tests or _forked(work, _LEAST_SECONDS + _SLOWER * seconds) == 0


def score(
    module: Path, files: Sequence[str], sample: int | None, seed: int, budget: float
) -> dict[str, Any]:
    """Run a module's mutants, all or a sample; returns the counts and the survivors."""
    source = module.read_text()
    every = list(mutants(source))
    chosen = every
    if sample is not None and sample < len(every):
        chosen = sorted(random.Random(seed).sample(every, sample), key=lambda one: one.line)  # noqa: S311
    started = time.monotonic()
    calls = baseline(module, files)
    known = json.loads(_EQUIVALENT.read_text()).get(module.stem, {}) if _EQUIVALENT.exists() else {}
    left: dict[str, list[str]] = defaultdict(list)
    for number, mutant in enumerate(chosen, 1):
        tests = able(mutant, calls, budget)
        if survives(mutant, module, files, tests, sum(calls.seconds[test] for test in tests)):
            kind = "equivalent" if mutant.change in known else "survivors"
            left[kind].append(f"{mutant.line}: {mutant.change}")
            print(f"{module.stem} {number}/{len(chosen)} {left[kind][-1]}", file=sys.stderr)
    found = len(chosen) - len(left["survivors"]) - len(left["equivalent"])
    return {
        "mutants": len(every),
        "run": len(chosen),
        "noticed": found,
        "score": round(100 * found / len(chosen), 1),
        "seconds": round(time.monotonic() - started),
        **left,
    }


def main() -> int:
    """Print one JSON object, a module in each entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "rooms", nargs="+", choices=[*ROOMS, *(m for r in ROOMS.values() for m in r)]
    )
    parser.add_argument("--sample", type=int, help="mutants of each module, where it has more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds of tests for a mutant")
    parser.add_argument(
        "--out", type=Path, help="written after each module, added to what is there"
    )
    options = parser.parse_args()
    for name in _HEAVY:
        __import__(name)
    found: dict[str, Any] = {}
    if options.out and options.out.exists():
        found = json.loads(options.out.read_text())
    modules = {name: tests for room in ROOMS.values() for name, tests in room.items()}
    for room in options.rooms:
        for name in ROOMS.get(room, {room: ()}):
            tests = [str(UNIT / f"test_{test}.py") for test in modules[name]]
            found[name] = score(
                LOADER / f"{name}.py", tests, options.sample, options.seed, options.budget
            )
            if options.out:
                options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
