"""One installation in a process of its own: to be raced, traced and killed."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SPACES = Path(__file__).parents[2] / "spaces"
PROGRAM = """
import sys
spaces, root, url, sha256, locks, patience = sys.argv[1:]
sys.path.insert(0, spaces)
from pathlib import Path
from llama_loader import store as module
from llama_loader.errors import LoaderError
from llama_loader.fetch import Fetcher

def no_lock(handle, operation): pass

def failing_lock(handle, operation): raise OSError(37, "no locks here")

if locks != "locks":
    import fcntl
    fcntl.flock = {"no-locks": no_lock, "failing-locks": failing_lock}[locks]
module.LOCK_SECONDS = float(patience)
store, fetcher = module.Store(Path(root)), Fetcher()
try:
    manifest = store.manifest(url, sha256, fetcher)
    urls = manifest.artifacts[0].resolved_urls(url)
    installed = store.install(manifest.artifacts[0], urls, fetcher, release=manifest.release)
except LoaderError as error:
    sys.exit(error.render())
print(installed.folder)
"""
CALLS = (
    "mkdir", "write", "fsync", "rename", "fchmod", "chmod", "unlink", "unlinkat", "rmdir",
    "ftruncate", "flock", "pwrite64",
)  # fmt: skip
"""Calls that an installation makes and the start of an interpreter hardly does."""


class Point(NamedTuple):
    """The ``nth`` use of a system call, from 1."""

    call: str
    nth: int


def command(root: Path, url: str, sha256: str, locks: str = "locks", wait: float = 60) -> list[str]:
    """Return an installation's argv; it prints the folder."""
    return [sys.executable, "-c", PROGRAM, str(SPACES), str(root), url, sha256, locks, str(wait)]


def is_traceable() -> bool:
    """Whether ``strace`` is here and may trace."""
    if shutil.which("strace") is None:
        return False
    argv = ["strace", "-qq", "-o", "/dev/null", "true"]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def trace(argv: Sequence[str], log: Path) -> list[Point]:
    """Run to the end; return every use of ``CALLS``, in order.

    strace counts for each thread by itself: the nth use is that of whichever thread is first.
    """
    _strace(argv, log, f"trace={','.join(CALLS)}").check_returncode()
    lines = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
    used: dict[tuple[str, str], int] = {}
    points: dict[Point, None] = {}
    for thread, rest in lines:
        match = re.match(r"(\w+)\(", rest)
        if match:
            used[thread, match[1]] = used.get((thread, match[1]), 0) + 1
            points[Point(match[1], used[thread, match[1]])] = None
    return list(points)


def kill_at(point: Point, argv: Sequence[str], log: Path) -> int:
    """Run, and have the kernel send SIGKILL on entry to that call; return the status."""
    inject = f"inject={point.call}:signal=KILL:when={point.nth}"
    return _strace(argv, log, inject).returncode


def _strace(argv: Sequence[str], log: Path, expression: str) -> subprocess.CompletedProcess[str]:
    traced = ["strace", "-f", "-qq", "-o", str(log), "-e", expression, *argv]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(traced, capture_output=True, text=True, check=False, env=environment)
