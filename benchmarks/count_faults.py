"""Count the faults of docs/faults.md and the variants of each that the tests make happen.

    PYTHONPATH=.:spaces python benchmarks/count_faults.py [--out FILE.json]

A variant is one collected test: each set of parameters of each test that a row names. The exit
status is 1 where a row names no test, or one that pytest does not find.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
TABLE: Final = ROOT / "docs" / "faults.md"
_ROW: Final = re.compile(r"^\|([\d, ]*)\|(.*)$", re.MULTILINE)


def rows() -> dict[str, list[str]]:
    """The table's rows, by their numbers, with the tests that each names.

    A fault may have several rows; one without a number belongs to the fault before it.
    """
    found: dict[str, list[str]] = {}
    numbers = ""
    for given, rest in _ROW.findall(TABLE.read_text()):
        numbers = given.strip() or numbers
        tests = re.findall(r"`(test_\w+)`", rest)
        if given.strip() or tests:  # else it is the head of a table
            found.setdefault(numbers, []).extend(tests)
    return found


def collected() -> Counter[str]:
    """How many variants of each test function pytest collects."""
    folders = ("tests",)
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", *folders, "--ignore=tests/gpu"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    return Counter(re.findall(r"::(test_\w+)", done.stdout))


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    there = collected()
    by_row = {numbers: sum(there[test] for test in tests) for numbers, tests in rows().items()}
    named = {test for tests in rows().values() for test in tests}
    found: dict[str, Any] = {
        "faults": sum(len(numbers.split(",")) for numbers in by_row),
        "tests": len(named),
        "variants": sum(there[test] for test in named),
        "by row": by_row,
        "missing": sorted(test for test in named if not there[test]),
        "rows without a test": [numbers for numbers, count in by_row.items() if not count],
    }
    text = json.dumps(found, indent=2)
    if options.out:
        options.out.write_text(f"{text}\n")
    print(text)
    return int(bool(found["missing"] or found["rows without a test"]))


if __name__ == "__main__":
    sys.exit(main())
