"""How many small wrong versions of a module its own unit tests notice: the mutation score.

    PYTHONPATH=.:spaces nice -n 19 python benchmarks/mutation.py manifest trust --out FILE.json

Each mutant (``benchmarks/mutants.py``) runs in a forked process against the tests that call the
function it is in, the fastest first, until one fails. It counts as noticed where a test fails or
it takes many times as long as the sound module. Only that process is mutated,
so a test that starts the loader as a program notices nothing here: the score is a lower bound.
``--sample N --seed S`` takes N of a module's mutants; ``--budget S`` leaves out the slowest tests,
so that all that are run take S seconds on the sound module.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import hypothesis
import pytest

from benchmarks.mutants import Mutant, mutants

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable, Sequence

ROOT: Final = Path(__file__).resolve().parents[1]
LOADER: Final = ROOT / "spaces" / "llama_loader"
UNIT: Final = ROOT / "tests" / "unit"
ROOMS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "manifest": {"manifest": ("manifest", "strict_json")},
    "trust": {"trust": ("trust",)},
    "unpack": {"unpack": ("unpack",), "tarball": ("unpack",)},
    "store": {
        "store": ("store", "resume"),
        "disk": ("disk", "store"),
        "receipt": ("receipt", "store"),
    },
    "fetch": {
        "fetch": ("fetch", "resume"),
        "partial": ("partial", "resume"),
        "locations": ("locations",),
        "transport": ("transport", "fetch"),
    },
}
"""Each room: its modules, and the unit tests of each."""
_EQUIVALENT: Final = Path(__file__).with_name("equivalent_mutants.json")
_HEAVY: Final = ("requests", "minisign", "backports.zstd", "filelock", "jsonschema", "msgspec.json")
"""Imported once, before forking: what the tests need of others."""
_SLOWER: Final = 4.0
_LEAST_SECONDS: Final = 20.0
_IMPORT, _BROKEN = 71, 70  # exit statuses: must be imported anew; failed before its tests


def dotted(module: Path) -> str:
    """The name that a module of the loader is imported by."""
    return ".".join(module.relative_to(LOADER.parent).with_suffix("").parts)


class _Session:
    """A pytest plugin: does something else with the collected tests than running them all."""

    def __init__(self, work: Callable[[list[pytest.Item]], None]) -> None:
        self._work = work

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Replace pytest's own loop."""
        self._work(session.items)
        return True


class _Failures:
    """A pytest plugin: whether a test failed in this process."""

    seen = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Look at a part of a test."""
        self.seen = self.seen or report.failed


class Calls(NamedTuple):
    """By the tests' names: how long each takes, and the first lines of the functions it calls."""

    seconds: dict[str, float]
    functions: dict[str, list[int]]


class _MutantLoader(SourceFileLoader):
    """Gives a module's other version to whoever imports it."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self._tree = tree

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self._tree, self.get_filename(fullname), "exec", dont_inherit=True)


class _MutantFinder(MetaPathFinder):
    def __init__(self, path: Path, tree: ast.Module) -> None:
        self._name, self._path, self._tree = dotted(path), path, tree

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        loader = _MutantLoader(fullname, str(self._path), self._tree)
        return spec_from_file_location(fullname, self._path, loader=loader)


def _collected(
    files: Sequence[str], work: Callable[[list[pytest.Item]], None], *more: object
) -> int:
    """Collect tests in this (forked) process, and do ``work`` with them."""
    os.setsid()
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(devnull, descriptor)
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None)
    hypothesis.settings.load_profile("mutation")
    quiet = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # imported before, on purpose
    common = ("-q", "-s", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *quiet)
    return int(pytest.main([*common, *files], plugins=[_Session(work), *more]))


def _first_failure(items: list[pytest.Item], names: Sequence[str], failures: _Failures) -> bool:
    """Run these tests in this order; whether one failed, which is then the last."""
    by_name = {item.nodeid: item for item in items}
    chosen = [by_name[name] for name in names if name in by_name]
    for item, following in zip(chosen, [*chosen[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if failures.seen:
            return True
    return False


def _forked(work: Callable[[], int], limit: float) -> int | None:
    """Return the exit status of ``work`` in a child; None where it took longer than ``limit``."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        except BaseException:  # noqa: BLE001  a child must never return into its parent's code
            traceback.print_exc()
            os._exit(_BROKEN)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    _end(child)
    return None


def _end(child: int) -> None:
    """End a child; where it has a session of its own, with whatever it started."""
    if os.getsid(child) == child:
        os.killpg(child, signal.SIGKILL)
    else:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _watched(items: list[pytest.Item], module: Path, failures: _Failures) -> Calls:
    """Run all the tests on the sound module, and learn what they call."""
    calls = Calls({}, {})
    lines = set[int]()

    def seen(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename == str(module):
            lines.add(frame.f_code.co_firstlineno)

    for item, following in zip(items, [*items[1:], None], strict=True):
        lines.clear()
        started = time.monotonic()
        threading.setprofile(seen)
        sys.setprofile(seen)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        sys.setprofile(None)
        threading.setprofile(None)
        if failures.seen:
            sys.exit(f"{module.name}: {item.nodeid} fails without any change")
        calls.seconds[item.nodeid] = time.monotonic() - started
        calls.functions[item.nodeid] = sorted(lines)
    return calls


def _put_in_place(tree: ast.Module, module: Path) -> bool:
    """Give every live function of a module its mutated code; whether all of them took it."""
    codes = {}
    waiting = [compile(tree, str(module), "exec", dont_inherit=True)]
    while waiting:
        code = waiting.pop()
        codes[code.co_qualname, code.co_firstlineno] = code
        waiting += [one for one in code.co_consts if isinstance(one, types.CodeType)]
    for function in gc.get_objects():
        if isinstance(function, types.FunctionType) and function.__code__.co_filename == str(
            module
        ):
            other = codes.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
            if other is not None and other.co_freevars != function.__code__.co_freevars:
                return False
            if other is not None:
                function.__code__ = other
    return True


def able(mutant: Mutant, calls: Calls, budget: float) -> list[str]:
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


def _limit(tests: Sequence[str], calls: Calls) -> float:
    return _LEAST_SECONDS + _SLOWER * sum(calls.seconds[test] for test in tests)


def run_in_place(
    chosen: Sequence[Mutant], module: Path, files: Sequence[str], budget: float, out: Path
) -> int:
    """Run the mutants of functions after collecting the tests once.

    Writes ``[calls, outcomes]``; an outcome is an exit status, None for one that had to be ended.
    A mutant that needs the module to be imported anew is left to ``run_anew``.
    """
    failures = _Failures()

    def each(items: list[pytest.Item]) -> None:
        import_module(dotted(module))  # it may only be imported while a test runs
        told = out.with_suffix(".calls")

        def learn() -> int:
            told.write_text(json.dumps(_watched(items, module, failures)))
            return 0

        if _forked(learn, 1800) != 0:
            sys.exit(f"{module.name}: its tests fail without any change")
        calls = Calls(*json.loads(told.read_text()))
        outcomes: dict[int, int | None] = {}
        for number, mutant in enumerate(chosen):
            tests = able(mutant, calls, budget)
            if mutant.function is not None:

                def attempt(mutant: Mutant = mutant, tests: list[str] = tests) -> int:
                    if not _put_in_place(mutant.tree, module):
                        return _IMPORT
                    return int(_first_failure(items, tests, failures))

                outcomes[number] = _forked(attempt, _limit(tests, calls)) if tests else 0
            _say(module, number, len(chosen), mutant, outcomes.get(number, _IMPORT))
        out.write_text(json.dumps([calls, outcomes]))

    return _collected(files, each, failures)


def run_anew(
    mutant: Mutant, module: Path, files: Sequence[str], calls: Calls, budget: float
) -> int | None:
    """Import the mutant as the module, collect the tests, run them until one fails."""
    tests = able(mutant, calls, budget)
    failures = _Failures()

    def work() -> int:
        sys.meta_path.insert(0, _MutantFinder(module, mutant.tree))
        found: list[bool] = []
        status = _collected(
            files, lambda items: found.append(_first_failure(items, tests, failures)), failures
        )
        return int(not found or found[0] or status not in (0, 1))

    return _forked(work, _LEAST_SECONDS + _limit(tests, calls))


def _say(module: Path, number: int, of: int, mutant: Mutant, outcome: int | None) -> None:
    if outcome == 0:
        words = f"{module.stem} {number + 1}/{of} {mutant.line}: {mutant.change}"
        print(words, file=sys.stderr, flush=True)


def score(
    module: Path, files: Sequence[str], sample: int | None, seed: int, budget: float
) -> dict[str, Any]:
    """Run a module's mutants, all or a sample; returns the counts and the survivors."""
    lines = module.read_text().splitlines()
    every = list(mutants(module.read_text()))
    chosen = every
    if sample is not None and sample < len(every):
        chosen = sorted(random.Random(seed).sample(every, sample), key=lambda one: one.line)  # noqa: S311
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        _forked(lambda: run_in_place(chosen, module, files, budget, out), 36_000)
        told, outcomes = json.loads(out.read_text())
    calls = Calls(*told)
    known = json.loads(_EQUIVALENT.read_text()).get(module.stem, {}) if _EQUIVALENT.exists() else {}
    left: dict[str, list[str]] = {"equivalent": [], "survivors": []}
    for number, mutant in enumerate(chosen):
        outcome = outcomes.get(str(number), _IMPORT)
        if outcome in (_IMPORT, _BROKEN):
            outcome = run_anew(mutant, module, files, calls, budget)
            _say(module, number, len(chosen), mutant, outcome)
        if outcome == 0:
            named = f"{lines[mutant.line - 1].strip()} | {mutant.change}"
            kind = "equivalent" if named in known else "survivors"
            left[kind].append(f"{mutant.line}: {mutant.change}")
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
            module = next(LOADER.rglob(f"{name}.py"))
            found[name] = score(module, tests, options.sample, options.seed, options.budget)
            if options.out:
                options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
