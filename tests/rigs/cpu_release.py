"""The cpu set of the pinned llama.cpp, compiled in a container while other tests run.

A cold build takes all of two cores for a quarter of an hour, and most tests wait more than they
work: so it is begun first, in a process of its own, and waited for where a test needs it.

    PYTHONPATH=.:spaces:tests/rigs python tests/rigs/cpu_release.py FOLDER
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import pytest
from verbs import PROJECT, Release, succeed

if TYPE_CHECKING:
    from types import TracebackType

IMAGE: Final = "llama-farm-base:bookworm"
"""The Debian 12 devel image, made from the distribution's packages."""


class CpuBuild:
    """One build, into ``folder``. A context manager: it is ended with the tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "process.log"
        with self._log.open("wb") as log:
            argv = [sys.executable, str(Path(__file__).resolve()), str(folder)]
            self._process = subprocess.Popen(
                argv, cwd=PROJECT, env=_environment(), stdout=log, stderr=log
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def wait(self) -> None:
        """Return as soon as nothing is built any more, well or not."""
        self._process.wait()

    def release(self) -> Release:
        """Wait for the release; fails the test where there is none."""
        self.wait()
        told = _told(self._folder)
        # not the exit status: a tracer of these tests may have been given it (rigs/tracer.py)
        if not told.exists():
            pytest.fail(self._log.read_text())
        return Release(_dist(self._folder), told.read_text(), _tree(self._folder))


def build(folder: Path) -> None:
    """Make the image and the release, and keep a copy of its tree: other tests build the set."""
    succeed("base-image", "--line", "cpu", "--tag", IMAGE)
    # Nothing is known of an earlier run's build: this one is looked at.
    (PROJECT / ".farm" / "journal" / "cpu-cpu.json").unlink(missing_ok=True)
    where = ("--out", str(_dist(folder)))
    log = succeed("build-cpu", "--engine", "docker", "--image", IMAGE, *where)
    shutil.copytree(PROJECT / ".farm" / "trees" / "cpu-cpu", _tree(folder), symlinks=True)
    _told(folder).write_text(log)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": ":".join((str(PROJECT), str(PROJECT / "spaces")))}


def _dist(folder: Path) -> Path:
    return folder / "dist"


def _tree(folder: Path) -> Path:
    return folder / "tree" / "cpu-cpu"


def _told(folder: Path) -> Path:
    return folder / "told.txt"


if __name__ == "__main__":
    build(Path(sys.argv[1]))
