"""Invoke verbs as a person runs them: another process, from the project's root."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
INVOKE = (sys.executable, "-m", "invoke")
Here = Callable[..., tuple[int, str, str]]
"""Runs a verb in a test's own process; gives its exit status and what it printed."""


def invoke(*argv: str, timeout: float = 3000) -> subprocess.CompletedProcess[str]:
    """Run an invoke verb as a person would, from the project's root."""
    return subprocess.run(
        [*INVOKE, *argv], cwd=PROJECT, capture_output=True, text=True, timeout=timeout, check=False
    )


def succeed(*argv: str, timeout: float = 3000) -> str:
    """Run an invoke verb that must succeed; returns what it printed."""
    done = invoke(*argv, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Release:
    """A folder with a built release, what the build printed, and the kept tree that it is of."""

    folder: Path
    log: str
    tree: Path
