"""The cpu set of the pinned llama.cpp, compiled in a container once for all processes of tests.

A cold build takes all of two cores for a quarter of an hour. So ``nox -s tests`` names a folder
in a variable: the first half of the tests builds into it beside the fast ones, the second half
finds the release there.
"""

import shutil
from pathlib import Path
from typing import Final

from verbs import PROJECT, Release, succeed

IMAGE: Final = "llama-farm-base:bookworm"
"""The Debian 12 devel image, made from the distribution's packages."""
VARIABLE: Final = "LLAMA_TEST_BUILD"
_TOLD: Final = "told.txt"
"""What the build printed; written last, so that a folder with it is whole."""


def found(folder: Path) -> Release | None:
    """Return the release that was built into a folder; None where there is none."""
    return _release(folder) if (folder / _TOLD).exists() else None


def build(folder: Path) -> Release:
    """Make the release, and keep a copy of its tree: other tests build the set, too."""
    # Nothing is known of an earlier run's build: this one is looked at.
    (PROJECT / ".farm" / "journal" / "cpu-cpu.json").unlink(missing_ok=True)
    for name in ("dist", "tree"):  # of a build that was interrupted
        shutil.rmtree(folder / name, ignore_errors=True)
    where = ("--out", str(folder / "dist"))
    log = succeed("build-cpu", "--engine", "docker", "--image", IMAGE, *where)
    trees = PROJECT / ".farm" / "trees"
    shutil.copytree(trees / "cpu-cpu", folder / "tree" / "cpu-cpu", symlinks=True)
    (folder / _TOLD).write_text(log, "utf-8")
    return _release(folder)


def _release(folder: Path) -> Release:
    told = (folder / _TOLD).read_text("utf-8")
    return Release(folder / "dist", told, folder / "tree" / "cpu-cpu")
