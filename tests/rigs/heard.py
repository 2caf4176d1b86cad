"""Programs that are run to their end, and what they printed."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def heard(
    argv: Sequence[str | Path], *, check: bool = False, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program; the rest is as for ``subprocess.run``."""
    return subprocess.run(argv, capture_output=True, text=True, check=check, **more)


def script(path: Path, text: str) -> Path:
    """Write a program; its text says which interpreter runs it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    path.chmod(0o755)
    return path


def git(folder: Path, *argv: str) -> str:
    """Run git in a folder, as somebody; return what it printed."""
    who = ("-c", "user.name=t", "-c", "user.email=t@t.invalid")
    return heard(["git", "-C", folder, *who, *argv], check=True).stdout.strip()
