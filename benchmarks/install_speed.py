"""Install a release over loopback against ``curl | zstd -d | tar x`` on the same bytes, in turn.

    PYTHONPATH=.:spaces python benchmarks/install_speed.py RELEASE_FOLDER [--rounds 5] [--store DIR]

Prints one JSON object of medians in seconds. ``process`` is from the interpreter's start to its
end, ``install`` what the installation takes in a process that has its modules (a Space's has),
``warm`` and ``warm_process`` the same where all is installed and every byte is hashed again,
``synced_pipe`` the pipe and a ``sync`` of what it wrote, for the loader syncs too. ``shaped`` is an
installation over a link of 20 MB/s, against the link's own time. The server is another process.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from farm.serve import ReleaseServer
from llama_loader import manifest
from tests.rigs import fault_server as faults
from tests.rigs import installer

RATE = 20e6
"""Bytes a second of the shaped link."""
PROGRAM = """
import sys, time
began = time.monotonic()
spaces, root, url, sha256, preload = sys.argv[1:]
sys.path.insert(0, spaces)
from pathlib import Path
from llama_loader.fetch import Fetcher
from llama_loader.store import Store
if preload == "1":
    import requests, urllib3
    from llama_loader import unpack
    unpack._decoder("tar.zst", "")
store, fetcher = Store(Path(root)), Fetcher()
manifest = store.manifest(url, sha256, fetcher)
artifact = manifest.artifacts[0]
loaded = time.monotonic()
store.install(artifact, artifact.resolved_urls(url), fetcher)
print(time.monotonic() - loaded)
"""


def main() -> None:
    """Print the figures of one release folder with one artifact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", type=Path, default=Path(), help="where to write to")
    options = parser.parse_args()
    data = (options.release / "manifest.json").read_bytes()
    artifact = manifest.parse(data).artifacts[0]
    with tempfile.TemporaryDirectory(dir=options.store) as folder:
        bench = _Bench(Path(folder), options.release, hashlib.sha256(data).hexdigest())
        with _served(options.release) as url:
            for _ in range(options.rounds):
                bench.round(url, artifact.urls[0])
        with _served(options.release, shaped=True) as url:
            for _ in range(options.rounds):
                bench.install(url, "shaped")
    medians = {kind: round(statistics.median(v), 3) for kind, v in bench.seconds.items()}
    print(
        json.dumps(
            {
                "artifact": artifact.name,
                "bytes": artifact.size,
                "unpacked": artifact.unpacked_size,
                "rounds": options.rounds,
                "processors": os.cpu_count(),
                "load_average": round(os.getloadavg()[0], 1),
                "median_seconds": medians,
                "install_to_pipe": round(medians["install"] / medians["pipe"], 2),
                "install_to_synced_pipe": round(medians["install"] / medians["synced_pipe"], 2),
                "process_to_pipe": round(medians["process"] / medians["pipe"], 2),
                "shaped_to_link": round(medians["shaped"] * RATE / artifact.size, 3),
                "processor_seconds": round(statistics.median(bench.processor_seconds), 3),
                "peak_bytes": bench.peak,
            }
        )
    )


class _Bench:
    """Runs installations and pipes, and keeps what they took."""

    def __init__(self, folder: Path, release: Path, sha256: str) -> None:
        self._folder, self._release, self._sha256 = folder, release, sha256
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.processor_seconds: list[float] = []
        self.peak = 0

    def round(self, url: str, name: str) -> None:
        """One of each, in turn."""
        self.install(url, "process", preload="0")
        self.install(url, "install", keep=True)
        self.install(url, "warm")
        pipe = f"curl -s {url}{name} | zstd -dc | tar x -C {self._folder}/plain"
        for kind, command in (("pipe", pipe), ("synced_pipe", f"{pipe} && sync -f {self._folder}")):
            (self._folder / "plain").mkdir()
            subprocess.run(["sync", "-f", self._folder], check=True)
            self.seconds[kind].append(_run(["sh", "-c", command])[0])
            shutil.rmtree(self._folder / "plain")

    def install(self, url: str, kind: str, *, preload: str = "1", keep: bool = False) -> None:
        """One installation in a process of its own; ``keep`` it for a warm start."""
        subprocess.run(["sync", "-f", self._folder], check=True)
        store = self._folder / "store"
        spaces, pin = str(installer.SPACES), (f"{url}manifest.json", self._sha256)
        argv = [sys.executable, "-c", PROGRAM, spaces, str(store), *pin, preload]
        wall, inner, usage = _run(argv)
        if kind == "warm":
            self.seconds["warm_process"].append(wall)
        elif kind == "process":
            self.processor_seconds.append(usage.ru_utime + usage.ru_stime)
        self.seconds[kind].append(wall if kind == "process" else inner)
        self.peak = max(self.peak, usage.ru_maxrss * 1024)
        if not keep:
            shutil.rmtree(store)


def _run(argv: list[str]) -> tuple[float, float, Any]:
    """Seconds of a command, the seconds that it printed, and what it used."""
    began = time.monotonic()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        printed = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    return wall, float(printed or "nan"), usage


@contextmanager
def _served(release: Path, *, shaped: bool = False) -> Iterator[str]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(release, there, shaped), daemon=True
    )
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


def _serve(release: Path, end: Connection, shaped: bool) -> None:  # noqa: FBT001
    if not shaped:
        with ReleaseServer(release) as server:
            end.send(server.url)
            end.recv()
        return
    with faults.FaultServer() as slow:
        for path in release.iterdir():
            slow.put(f"/{path.name}", path.read_bytes())
            if path.suffix == ".zst":
                slow.fail(f"/{path.name}", faults.shaped(RATE), always=True)
        end.send(f"{slow.url}/")
        end.recv()


if __name__ == "__main__":
    main()
