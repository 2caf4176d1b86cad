"""Programs that are run to their end, and what they printed."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOSTILE = "https://hostile.invalid/llama.cpp"


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


def repository(place: Path) -> Path:
    """Make a repository of the tiny source: three commits, the tag b2 at the second."""
    tree = Path(shutil.copytree(Path(__file__).parent / "tiny_llama", place))
    git(tree, "init", "--quiet", "--initial-branch=master")
    git(tree, "config", "uploadpack.allowFilter", "true")
    git(tree, "config", "uploadpack.allowAnySHA1InWant", "true")
    for number in (1, 2, 3):
        (tree / "NUMBER").write_text(str(number), "utf-8")
        git(tree, "add", "--all")
        git(tree, "commit", "--quiet", "-m", f"commit {number}")
        if number == 2:
            git(tree, "tag", "b2")
    return tree
