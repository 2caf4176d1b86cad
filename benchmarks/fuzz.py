"""Feed changed samples to every parser of bytes from outside; print one line a parser.

    PYTHONPATH=.:spaces python benchmarks/fuzz.py [--inputs 100000] [--seed 1] [TARGET…]

``tests/rigs/fuzz_targets.py`` has the parsers, ``tests/rigs/mutations.py`` changes the samples.
Each parser runs in a process of its own, which may take ``MEMORY`` bytes more than at its start. An
input may take ``SECONDS`` of a processor, and ``WAITED`` in all, as other programs run here too.
What fails is kept in a file and named. The same seed makes the same inputs. The exit status is 1
where anything was found.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from llama_loader.errors import LoaderError
from tests.rigs.fuzz_targets import TARGETS

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import SynchronizedArray

MEMORY: Final = 256 << 20
SECONDS: Final = 5.0
WAITED: Final = 60.0
_DONE, _UNTYPED, _PEAK = range(3)
"""What a parser's process tells: inputs begun, untyped errors, its most kB."""


def main() -> int:
    """Print the table; return 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("targets", nargs="*", metavar="TARGET", choices=[[], *TARGETS])
    options = parser.parse_args()
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print("| parser | inputs | untyped errors | hangs | peak memory | seconds |", flush=True)
    found = [
        fuzz(name, options.inputs // TARGETS[name].share, options.seed, kept)
        for name in options.targets or TARGETS
    ]
    return int(any(found))


def fuzz(name: str, inputs: int, seed: int, kept: Path) -> bool:
    """Feed one parser, with a new process after each hang; return whether anything was found."""
    context = multiprocessing.get_context("spawn")
    told, hangs, began = context.Array("q", 3), 0, time.monotonic()
    while told[_DONE] < inputs:
        process = context.Process(target=_feed, args=(name, inputs, seed, kept, told))
        process.start()
        process.join()
        if process.exitcode:
            hangs += 1
            _keep(name, seed, told[_DONE] - 1, kept, f"ended by {process.exitcode}")
    figures = (f"{inputs:,}", told[_UNTYPED], hangs, f"{told[_PEAK] // 1024} MB")
    seconds = f"{time.monotonic() - began:.0f} |"
    print(f"| {name} |", *(f"{one} |" for one in figures), seconds, flush=True)
    return bool(hangs or told[_UNTYPED])


def made(name: str, seed: int, index: int) -> bytes:
    """Return an input: a seed's inputs do not depend on one another."""
    return TARGETS[name].make(Random(f"{seed} {name} {index}"))  # noqa: S311 - no secret


def _keep(name: str, seed: int, index: int, kept: Path, why: str) -> None:
    data, place = made(name, seed, index), kept / f"{name.replace(' ', '-')}-{index}"
    place.write_bytes(data)
    print(f"{name}: input {index}: {why}; {len(data)} bytes in {place}", file=sys.stderr)


def _feed(name: str, inputs: int, seed: int, kept: Path, told: SynchronizedArray[int]) -> None:
    """Run in the parser's process; told has where the one before it ended."""
    # Prints where the parser hangs, then ends this process: a handler in Python would wait for it.
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
        faulthandler.register(number, chain=True)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    places: set[str] = set()
    sys.setswitchinterval(1e-4)  # the server that sends the input is a thread of this process
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") * 1024 + MEMORY, hard))
        while told[_DONE] < inputs:
            index = told[_DONE]
            told[_DONE] = index + 1
            data = made(name, seed, index)
            _set_alarms(SECONDS, WAITED)
            try:
                TARGETS[name].read(data, Path(folder))
            except LoaderError:
                pass
            except Exception as error:  # noqa: BLE001  whatever it is, it is a finding
                told[_UNTYPED] += 1
                at = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{error!r:.200} at {Path(at.filename).name}:{at.lineno}"
                if where not in places:
                    places.add(where)
                    _keep(name, seed, index, kept, where)
            finally:
                _set_alarms(0.0, 0.0)
            if index % 1000 == 0 or index == inputs - 1:
                told[_PEAK] = max(told[_PEAK], _status("VmHWM"))


def _set_alarms(computed: float, waited: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, computed)
    signal.setitimer(signal.ITIMER_REAL, waited)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*([0-9]+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


if __name__ == "__main__":
    sys.exit(main())
