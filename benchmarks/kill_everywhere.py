"""Kill an installation with SIGKILL at every system call that changes the store, one at a time.

After each: the runtime is whole or not there, and the next installation succeeds with no clean-up.

    PYTHONPATH=.:spaces python benchmarks/kill_everywhere.py
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from llama_loader.errors import LoaderError
from llama_loader.store import Store
from tests.rigs import archives, installer
from tests.rigs.fault_server import FaultServer


def main() -> int:
    """Print one JSON object; 1 where something was left that should not be."""
    with tempfile.TemporaryDirectory() as folder, FaultServer() as server:
        packed, artifact = archives.release()
        server.put(f"/{artifact.urls[0]}", packed)
        data = archives.manifest(artifact)
        url = server.put("/manifest.json", data)
        root, log = Path(folder) / "store", Path(folder) / "log"
        argv = installer.command(root, url, hashlib.sha256(data).hexdigest())
        points = installer.trace(argv, log)
        counts = {"killed": 0, "whole": 0, "absent": 0, "partial": 0, "not repaired": 0}
        for point in points:
            shutil.rmtree(root)
            counts["killed"] += installer.kill_at(point, argv, log) == -signal.SIGKILL
            counts[_state(root, artifact.sha256)] += 1
            again = subprocess.run(argv, capture_output=True, check=False)
            left = [path for path in (root / "staging").iterdir() if path.is_dir()]
            clean = again.returncode == 0 and not left and _state(root, artifact.sha256) == "whole"
            counts["not repaired"] += not clean
    print(json.dumps({"points": len(points), **counts}))
    return int(counts["partial"] > 0 or counts["not repaired"] > 0)


def _state(root: Path, sha256: str) -> str:
    place = root / "runtimes" / sha256
    if not place.exists():
        return "absent"
    try:
        Store(root).verify(place)
    except LoaderError:
        return "partial"
    return "whole"


if __name__ == "__main__":
    sys.exit(main())
