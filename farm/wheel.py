"""Build the wheel ``llama-space``: the loader and the engine, for anyone's Space.

The wheel is built from a copy of ``spaces/`` with fixed times and modes, so that the same sources
give the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from farm import PROJECT_ROOT, durable
from farm.errors import PackError
from farm.plan import SOURCE_DATE_EPOCH

SOURCE: Final = PROJECT_ROOT / "spaces"
PATTERN: Final = "llama_space-*-py3-none-any.whl"
_PARTS: Final = ("pyproject.toml", "requirements.txt", "llama_loader", "llama_space")
_SHOWN: Final = 2000
"""Characters of the build's output in an error."""


def build(into: Path, source: Path = SOURCE) -> Path:
    """Build the wheel into a folder and return its path; a wheel of the same name is replaced.

    Raises:
        PackError: setuptools cannot build it; the message has its last output.
        OSError: the folder cannot be written.
    """
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llama-farm-wheel-") as place:
        copy, made = Path(place) / "spaces", Path(place) / "made"
        _copy(source, copy)
        argv = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(made))
        environ = os.environ | {"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)}
        built = subprocess.run(
            (*argv, str(copy)),
            env=environ,
            umask=0o022,
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode != 0:
            raise PackError(
                "WHEEL_FAILED",
                f"the wheel cannot be built: {(built.stdout + built.stderr)[-_SHOWN:]}",
            )
        found = next(made.glob(PATTERN))
        durable.replace(into / found.name, found.read_bytes(), mode=0o644)
    return into / found.name


def _copy(source: Path, target: Path) -> None:
    """Copy the wheel's sources, with modes that do not depend on this user's umask."""
    target.mkdir()
    for name in _PARTS:
        if (source / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source / name, target / name, ignore=ignore)
        else:
            shutil.copyfile(source / name, target / name)
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT_ROOT / "dist"))
