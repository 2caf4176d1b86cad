"""Bytes fetched again after a kill at 10, 50 and 90 % of a download, by the next process.

    PYTHONPATH=.:spaces python benchmarks/resume.py RELEASE_FOLDER

The server stops in the middle; the installer is killed with SIGKILL there; another process resumes
from another mirror. Prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llama_loader import manifest
from llama_loader.fetch import Fetcher
from llama_loader.store import Store
from tests.rigs import fault_server as faults
from tests.rigs import installer

SECONDS = 120.0
"""What it may take until everything that was sent is verified and kept."""


def main(release: Path) -> None:
    """Print the figures of one release folder with one artifact."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        again = {
            f"{share} %": _fetched_again(release, Path(folder) / str(share), share)
            for share in (10, 50, 90)
        }
    artifact = manifest.parse((release / "manifest.json").read_bytes()).artifacts[0]
    print(
        json.dumps(
            {
                "artifact": artifact.name,
                "bytes": artifact.size,
                "chunk_size": artifact.chunk_size,
                "bytes_fetched_again": again,
            }
        )
    )


def _fetched_again(release: Path, root: Path, share: int) -> int:
    data = (release / "manifest.json").read_bytes()
    artifact = manifest.parse(data).artifacts[0]
    packed = (release / artifact.urls[0]).read_bytes()
    after = len(packed) * share // 100
    with faults.FaultServer() as server:
        url = server.put("/manifest.json", data)
        server.put(f"/{artifact.urls[0]}", packed)
        server.fail(f"/{artifact.urls[0]}", faults.stalls(after), always=True)
        argv = installer.command(root, url, hashlib.sha256(data).hexdigest())
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
            _await_chunks(root, artifact, after // artifact.chunk_size)
            process.kill()
        mirror = server.put("/mirror", packed)
        Store(root).install(artifact, [mirror], Fetcher(), release="measured")
        return server.sent("/mirror") + after - len(packed)


def _await_chunks(root: Path, artifact: manifest.Artifact, count: int) -> None:
    """Wait until the store has kept so many chunks; each is verified before it is written."""
    kept, end = root / "partial" / artifact.sha256, time.monotonic() + SECONDS
    while time.monotonic() < end:
        if kept.exists() and kept.stat().st_size == count * artifact.chunk_size:
            return
        time.sleep(0.1)
    raise TimeoutError(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
