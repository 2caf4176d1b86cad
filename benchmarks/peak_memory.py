"""Peak memory of installing an artifact of a size, made of noise so that it stays that large.

    PYTHONPATH=.:spaces python benchmarks/peak_memory.py [MEGABYTES]

Prints one JSON object. The server is in another process than the installer.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from farm.serve import ReleaseServer
from tests.rigs import archives, installer

CHUNK: int = 4 << 20
"""As the farm writes them."""


def make(folder: Path, megabytes: int) -> None:
    """Write a release of one artifact."""
    noise = archives.Entry("runtime/libnoise.so", os.urandom(megabytes * 1_000_000))
    packed, artifact = archives.release((archives.SERVER, noise), "tar.zst", chunk_size=CHUNK)
    (folder / artifact.urls[0]).write_bytes(packed)
    (folder / "manifest.json").write_bytes(archives.manifest(artifact))


def main(megabytes: int) -> None:
    """Install it once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in a process of its own: what a parent had before exec counts as its child's
        subprocess.run([sys.executable, __file__, str(megabytes), name], check=True)
        data = (folder / "manifest.json").read_bytes()
        with ReleaseServer(folder) as server:
            url, digest = f"{server.url}manifest.json", hashlib.sha256(data).hexdigest()
            argv = installer.command(folder / "store", url, digest)
            with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    print(json.dumps({"megabytes": megabytes, "peak_bytes": usage.ru_maxrss * 1024}))


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    if sys.argv[2:]:
        make(Path(sys.argv[2]), size)
    else:
        main(size)
