"""Install a release over loopback against ``curl | zstd -d | tar x`` on the same bytes, in turn.

    PYTHONPATH=.:spaces python benchmarks/install_speed.py RELEASE_FOLDER [ROUNDS]

Prints one JSON object: seconds of each round, peak memory of the loader's process, a warm start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from farm.serve import ReleaseServer
from llama_loader import manifest
from tests.rigs import installer


def main(release: Path, rounds: int) -> None:
    """Print the figures of one release folder with one artifact."""
    data = (release / "manifest.json").read_bytes()
    artifact = manifest.parse(data).artifacts[0]
    figures: dict[str, list[float]] = {"loader": [], "pipe": [], "warm": []}
    memory = 0
    with tempfile.TemporaryDirectory(dir=".") as folder, ReleaseServer(release) as server:
        url = f"{server.url}manifest.json"
        pipe = f"curl -s {server.url}{artifact.urls[0]} | zstd -dc | tar x -C"
        argv = installer.command(Path(folder) / "store", url, hashlib.sha256(data).hexdigest())
        for _ in range(rounds):
            for kind in ("loader", "warm"):
                seconds, peak = _timed(argv)
                figures[kind].append(seconds)
                memory = max(memory, peak)
            shutil.rmtree(Path(folder) / "store")
            (Path(folder) / "plain").mkdir()
            figures["pipe"].append(_timed(["sh", "-c", f"{pipe} {folder}/plain"])[0])
            shutil.rmtree(Path(folder) / "plain")
    medians = {kind: round(statistics.median(values), 3) for kind, values in figures.items()}
    print(
        json.dumps(
            {
                "artifact": artifact.name,
                "bytes": artifact.size,
                "unpacked": artifact.unpacked_size,
                "median_seconds": medians,
                "ratio": round(medians["loader"] / medians["pipe"], 2),
                "peak_bytes": memory,
            }
        )
    )


def _timed(argv: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the most memory that it ever had, in bytes."""
    began = time.monotonic()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    return time.monotonic() - began, usage.ru_maxrss * 1024


if __name__ == "__main__":
    folder, *count = sys.argv[1:]
    main(Path(folder), int(count[0]) if count else 5)
