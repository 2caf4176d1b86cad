"""The cpu set of the pinned llama.cpp, compiled in a container while other tests run.

A cold build takes all of two cores for a quarter of an hour, and most tests wait more than they
work: so it is begun first, in a process of its own, and waited for where a test needs it.

    PYTHONPATH=.:spaces:tests/rigs python tests/rigs/cpu_release.py FOLDER
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from verbs import PROJECT, Release, succeed

IMAGE: Final = "llama-farm-base:bookworm"
"""The Debian 12 devel image, made from the distribution's packages."""


@dataclass(frozen=True)
class CpuBuild:
    """A build into ``folder`` that was begun."""

    folder: Path
    process: subprocess.Popen[bytes]

    def wait(self) -> None:
        """Return as soon as nothing is built any more, well or not."""
        self.process.wait()

    def release(self) -> Release:
        """Wait for the release; fails the test where there is none."""
        self.wait()
        told = _told(self.folder)
        # not the exit status: a tracer of these tests may have been given it (rigs/tracer.py)
        if not told.exists():
            pytest.fail(_log(self.folder).read_text())
        return Release(_dist(self.folder), told.read_text(), _tree(self.folder))


@contextmanager
def begun(folder: Path) -> Iterator[CpuBuild]:
    """Build in a process of its own, which is interrupted if it still runs when the block ends."""
    argv = [sys.executable, str(Path(__file__).resolve()), str(folder)]
    with (
        _log(folder).open("wb") as log,
        subprocess.Popen(
            argv, cwd=PROJECT, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            yield CpuBuild(folder, process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)


def build(folder: Path) -> None:
    """Make the image and the release, and keep a copy of its tree: other tests build the set."""
    succeed("base-image", "--line", "cpu", "--tag", IMAGE)
    # Nothing is known of an earlier run's build: this one is looked at.
    (PROJECT / ".farm" / "journal" / "cpu-cpu.json").unlink(missing_ok=True)
    where = ("--out", str(_dist(folder)))
    log = succeed("build-cpu", "--engine", "docker", "--image", IMAGE, *where)
    shutil.copytree(PROJECT / ".farm" / "trees" / "cpu-cpu", _tree(folder), symlinks=True)
    _told(folder).write_text(log)


def _dist(folder: Path) -> Path:
    return folder / "dist"


def _tree(folder: Path) -> Path:
    return folder / "tree" / "cpu-cpu"


def _log(folder: Path) -> Path:
    return folder / "process.log"


def _told(folder: Path) -> Path:
    return folder / "told.txt"


if __name__ == "__main__":
    # For the verb, which removes its container; who waits for it would kill it after 0.25 s
    signal.signal(signal.SIGINT, lambda *_: None)
    build(Path(sys.argv[1]))
