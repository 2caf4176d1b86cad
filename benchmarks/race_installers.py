"""Race eight installations of one release, with locks that work, do nothing, or fail.

    PYTHONPATH=.:spaces python benchmarks/race_installers.py [--rounds 5] [--out FILE.json]

Each installer is a process of its own. All eight must succeed, on one runtime that is whole, with
nothing left in the making; where locks work, with one download.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from llama_loader.store import Store
from tests.rigs import archives, installer
from tests.rigs.fault_server import FaultServer

INSTALLERS: Final = 8
LOCKS: Final = ("locks", "no-locks", "failing-locks")


def main() -> int:
    """Print one JSON object; 1 where an installer failed or something was left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {locks: race(locks, options.rounds) for locks in LOCKS}
    text = json.dumps(found, indent=2)
    if options.out:
        options.out.write_text(f"{text}\n")
    print(text)
    bad = sum(one["failures"] + one["left"] + one["not whole"] for one in found.values())
    return int(bad > 0 or found["locks"]["downloads"] != options.rounds)


def race(locks: str, rounds: int) -> dict[str, Any]:
    """Race ``rounds`` times, into an empty store each time; return the sums."""
    sums = dict.fromkeys(("installers", "failures", "downloads", "not whole", "left"), 0)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder, FaultServer() as server:
            packed, artifact = archives.release()
            path = f"/{artifact.urls[0]}"
            server.put(path, packed)
            data = archives.manifest(artifact)
            url, root = server.put("/manifest.json", data), Path(folder) / "store"
            argv = installer.command(root, url, hashlib.sha256(data).hexdigest(), locks)
            racing = [subprocess.Popen(argv, stdout=subprocess.DEVNULL) for _ in range(INSTALLERS)]
            sums["failures"] += sum(process.wait() != 0 for process in racing)
            sums["installers"] += INSTALLERS
            sums["downloads"] += len(server.asked(path))
            whole = Store(root).find(artifact.sha256) is not None
            sums["not whole"] += not whole or len(list((root / "runtimes").iterdir())) != 1
            sums["left"] += sum(place.is_dir() for place in (root / "staging").iterdir())
    return {"rounds": rounds, **sums}


if __name__ == "__main__":
    sys.exit(main())
