"""Make up manifests and archives, and count what becomes of them.

    PYTHONPATH=.:spaces python benchmarks/fuzz.py [--manifests 10000] [--archives 2000] [--out FILE]

Ours with their manifest's entry, and as many of others' by URL; what must hold for each is in
``tests/rigs/generated.py``. The exit status is 1 where one of them did not end as it must, and
hypothesis prints the smallest such example.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import hypothesis
from hypothesis import HealthCheck, given, settings

from tests.rigs import generated

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

_ROUND: Final = 500
"""Examples for a seed: hypothesis makes up the more alike ones the longer it runs."""


def main() -> int:
    """Print one JSON object with the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifests", type=int, default=10_000)
    parser.add_argument("--archives", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=1, help="the first of them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.monotonic()

    def ours(case: generated.Case) -> str:
        return f"{case.artifact.format}: {generated.check_case(case)}"

    def theirs(made: tuple[str, bytes]) -> str:
        return f"{made[0]}: {generated.check_theirs(made[1])}"

    seed = options.seed
    found: dict[str, Any] = {
        "seed": seed,
        "manifests": run(options.manifests, seed, generated.manifests(), generated.check_manifest),
        "archives": run(options.archives, seed, generated.cases(), ours),
        "archives by others": run(options.archives, seed, generated.theirs(), theirs),
        "seconds": round(time.monotonic() - started),
    }
    text = json.dumps(found, indent=2)
    if options.out:
        options.out.write_text(f"{text}\n")
    print(text)
    return int(any(found[kind]["failed"] for kind in found if isinstance(found[kind], dict)))


def run(
    count: int, seed: int, strategy: SearchStrategy[Any], check: Callable[[Any], str]
) -> dict[str, Any]:
    """Check at least ``count`` examples; return how they ended."""
    outcomes = Counter[str]()
    failures = 0
    while outcomes.total() < count:

        @hypothesis.seed(seed)
        @settings(
            max_examples=min(_ROUND, count - outcomes.total()),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def one(example: Any) -> None:
            outcomes[check(example)] += 1

        try:
            one()
        except Exception as error:  # noqa: BLE001  whatever it is, it is a finding
            failures += 1
            print(f"{error!r}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
            outcomes["failed"] += 1
        seed += 1
    return {"checked": outcomes.total(), "failed": failures, **dict(outcomes.most_common())}


if __name__ == "__main__":
    sys.exit(main())
