"""Try to have bytes executed that were not hashed: as another user, then as the same one.

    PYTHONPATH=.:spaces python benchmarks/swap_attack.py [--executions 10000] [--windows 200]
        [--release MANIFEST_URL --model MODEL --real 300] [--megabytes 190]

Another user's process (this needs root) tries to swap the files of a runtime while the loader asks
it for devices, starts it and starts it again after it was killed: a tiny runtime that starts in
milliseconds, and with ``--release`` the real server. How, and where the runtime lies, is in
``tests/rigs/swap_attack.py``. The exit status is 1 where one byte of the attacker's was executed.

For a process of the same user the window is measured, for each start that of the file for which it
is widest: from the loader's last look at the file (at the time of its last change, after all files
were hashed), and from the moment when the loader began to hash, until the dynamic linker has mapped
the file (the linker's audit interface tells when). A tiny runtime whose plugin has ``--megabytes``
stands for a CUDA release.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from llama_loader import receipt, self_test
from llama_loader.disk import Folder
from llama_loader.server import Server
from tests.rigs import swap_attack

_LISTINGS: Final = 8
_EACH: Final = _LISTINGS + 2
"""Executions of a round: ``--list-devices``, a start, a restart."""
_SHARES: Final = {"private": (0.4, 10), "sticky": (0.4, 10), "opened": (0.2, 1), "above": (0.02, 1)}
"""Of all executions, by the situation; and the rounds after which it is made anew."""
_AUDIT: Final = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
unsigned la_version(unsigned version) { return version; }
unsigned la_objopen(struct link_map *map, Lmid_t space, uintptr_t *cookie) {
    struct timespec now;
    char name[4096] = {0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (*map->l_name) snprintf(name, sizeof name, "%s", map->l_name);
    else if (readlink("/proc/self/exe", name, sizeof name - 1) < 0) return 0;
    int out = open(getenv("SWAP_ATTACK_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    dprintf(out, "%ld.%09ld %s\n", (long)now.tv_sec, now.tv_nsec, name);
    close(out);
    return 0;
}
"""
"""Writes down the moment when each file was mapped."""


def main() -> int:
    """Print one JSON object with the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=10_000)
    parser.add_argument("--real", type=int, default=300, help="executions of the real server")
    parser.add_argument("--windows", type=int, default=200, help="starts that are timed, of each")
    parser.add_argument("--megabytes", type=int, default=190)
    parser.add_argument("--release", help="the manifest's URL of a real release")
    parser.add_argument("--model", type=Path, default=self_test.MODEL)
    options = parser.parse_args()
    found: dict[str, Any] = {"cpus": os.cpu_count()}
    with swap_attack.open_to_all() as place, swap_attack.without_pauses():
        tiny = swap_attack.release(place / "tiny")
        large = swap_attack.release(place / "large", padding=options.megabytes * 1_000_000)
        attacks = {"tiny runtime": (tiny, self_test.MODEL, options.executions)}
        timed = {
            "tiny runtime": (tiny, self_test.MODEL),
            f"tiny runtime of {options.megabytes} MB": (large, self_test.MODEL),
        }
        if options.release:
            attacks["real server"] = (options.release, options.model, options.real)
            timed["real server"] = (options.release, options.model)
        found["windows of the same user, milliseconds"] = {
            name: windows(*one, place / f"windows-{number}", options.windows)
            for number, (name, one) in enumerate(timed.items())
        }
        found["attacks of another user"] = {
            name: attacks_by_situation(*one, place / f"attacks-{number}")
            for number, (name, one) in enumerate(attacks.items())
        }
    print(json.dumps(found, indent=2))
    every = found["attacks of another user"].values()
    return int(any(one["executed"] for attack in every for one in attack.values()))


def attacks_by_situation(
    manifest: str, model: Path, executions: int, place: Path
) -> dict[str, dict[str, Any]]:
    """Attack in each situation so often that all of them make so many executions."""
    place.mkdir()
    payload = swap_attack.payload(place / "payload")
    found: dict[str, dict[str, Any]] = {}
    for situation, (share, rounds) in _SHARES.items():
        total, began = swap_attack.Total(), time.monotonic()
        for number in range(math.ceil(executions * share / _EACH / rounds)):
            above = place / f"{situation}-{number}"
            above.mkdir()
            total.add(
                swap_attack.attack(manifest, above, payload, situation, rounds, _LISTINGS, model)
            )
            for used in (above, *payload.proof.with_name("staged").iterdir()):
                shutil.rmtree(used) if used.is_dir() else used.unlink()
        found[situation] = {
            "executions": total.executions,
            "refused": total.refused,
            "attempts": total.tried.total(),
            "allowed by the system": total.succeeded,
            "executed": payload.executed(),
        }
        print(f"{situation}, {time.monotonic() - began:.0f} s: {found[situation]}", file=sys.stderr)
    return found


def windows(manifest: str, model: Path, place: Path, count: int) -> dict[str, Any]:
    """Time so many starts; return the widest windows of each start, in milliseconds."""
    place.mkdir()
    audit, log = place / "audit.so", place / "mapped"
    (place / "audit.c").write_text(_AUDIT)
    command = ["gcc", "-shared", "-fPIC", "-o", str(audit), str(place / "audit.c")]
    subprocess.run(command, check=True)
    victim = swap_attack.Victim(manifest, place / "store", model)
    told = {"LD_AUDIT": str(audit), "SWAP_ATTACK_LOG": str(log)}
    plan = replace(victim.plan, environ={**victim.plan.environ, **told})
    looks, hashes = [], []
    for _ in range(count):
        log.unlink(missing_ok=True)
        began: list[float] = []

        def before(began: list[float] = began) -> None:
            began.append(time.monotonic())
            victim.prepared.require_sound()

        with last_looks() as looked, Server(plan, before=before):
            mapped = when_mapped(log)
        names = mapped.keys() & looked.keys()
        looks.append(max(mapped[name] - looked[name] for name in names) * 1000)
        hashes.append(max(mapped[name] - began[-1] for name in names) * 1000)
    return {
        "starts": count,
        "files": len(names),
        "megabytes": round(sum(one.size for one in victim.prepared.installed.files) / 1e6, 1),
        "since the last look": spread(looks),
        "since its hashing began": spread(hashes),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the maximum."""
    ordered = sorted(values)
    late = ordered[math.ceil(len(ordered) * 0.99) - 1]
    found = {"median": statistics.median(ordered), "99 %": late, "maximum": ordered[-1]}
    return {name: round(value, 1) for name, value in found.items()}


def when_mapped(log: Path) -> dict[str, float]:
    """Return the moment when each file was mapped first, by its name."""
    mapped: dict[str, float] = {}
    for line in log.read_text().splitlines():
        moment, path = line.split(" ", 1)
        mapped.setdefault(Path(path).name, float(moment))
    return mapped


@contextmanager
def last_looks() -> Iterator[dict[str, float]]:
    """Write down when the loader looked at each file for the last time, by its name."""
    looked: dict[str, float] = {}
    original = receipt.stamp

    def stamp(place: Folder, path: str) -> tuple[int, ...] | None:
        looked[path.rpartition("/")[2]] = time.monotonic()
        return original(place, path)

    with patch.object(receipt, "stamp", stamp):
        yield looked


if __name__ == "__main__":
    sys.exit(main())
