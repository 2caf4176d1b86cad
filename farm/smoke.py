"""Does each tarball start and compute? The loader installs it and asks it, on the CPU.

The loader is a process of its own with an empty store, as on a stranger's machine: it verifies
every byte, starts ``llama-server`` and compares a tiny model's answer with the known one. A tarball
with CUDA in it must do the same on a machine without a GPU, so this proves nothing about its
kernels; ``nox -s gpu`` does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Final

from farm import loader, release
from farm.errors import FarmError
from llama_loader.manifest import LLAMA_SERVER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llama_loader.manifest import Artifact

_SECONDS: Final = 600.0


def run(folder: Path) -> Iterator[str]:
    """Try the servers of a release folder, one after the other; gives a line for each.

    Raises:
        UsageError: the folder is no release.
        FarmError: ``SMOKE_FAILED``: names the tarball, and what the loader said.
    """
    for artifact in release.load(folder).artifacts:
        if artifact.kind == LLAMA_SERVER:
            told = _try(folder.resolve(), artifact)
            yield f"ok {artifact.name}: {told}"


def _try(folder: Path, artifact: Artifact) -> str:
    with tempfile.TemporaryDirectory(prefix="llama-farm-smoke-") as store:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "llama_loader", "fetch", "--json", "--allow-cpu"),
                *("--url", (folder / artifact.name).as_uri(), "--sha256", artifact.sha256),
                *("--store", store),
            ],
            capture_output=True,
            text=True,
            env=loader.environment({"CUDA_VISIBLE_DEVICES": ""}),  # also where there is a GPU
            timeout=_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise FarmError("SMOKE_FAILED", f"{artifact.name}: {done.stderr.strip()}")
        run_of_it = json.loads(done.stdout)["test_run"]
    if run_of_it is None:
        raise FarmError("SMOKE_FAILED", f"{artifact.name}: was not tried: {run_of_it}")
    if run_of_it["devices"]:
        raise FarmError("SMOKE_FAILED", f"{artifact.name}: was tried on {run_of_it['devices']}")
    return f"answers on the CPU in {run_of_it['seconds']:.1f} s"
