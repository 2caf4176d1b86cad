"""What each host of a cluster has: this checkout and its locked Python, apart from the tests' own.

As docs/scaling.md says, and with uv in pip's place because that has the packages already.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from verbs import PROJECT


def prepare(checkout: Path) -> Path:
    """Make the checkout and its environment; returns the environment's Python."""
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("farm", "build", "spaces"):
        shutil.copytree(PROJECT / name, checkout / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements-cluster.lock"):
        shutil.copy(PROJECT / name, checkout)
    uv = (sys.executable, "-m", "uv")
    environment = checkout / ".venv"
    python = environment / "bin" / "python"
    install = (*uv, "pip", "install", "--quiet", "--python", str(python))
    for command in (
        (*uv, "venv", "--quiet", "--python", sys.executable, str(environment)),
        (*install, "--require-hashes", "-r", "requirements-cluster.lock"),
        (*install, "--no-deps", "-e", "."),
        ("mkdir", "-p", ".venv/etc/dask"),
        ("sh", "-c", 'echo "temporary-directory: $PWD/.farm/dask" > .venv/etc/dask/farm.yaml'),
    ):
        subprocess.run(command, cwd=checkout, check=True)
    return python
