"""diffoscope's report on what differs, where that program is installed; both sides are kept."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Final

from farm.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from farm.reproduce.reproducibility import Difference

PROGRAM: Final = "diffoscope"
REPORT: Final = "diffoscope.txt"
_SECONDS: Final = 600
_DIFFERENT: Final = 1
"""diffoscope's exit status when it did its work and found differences."""


def keep(
    first: Path,
    second: Path,
    found: Iterable[Difference],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Copy what differs into ``folder/first`` and ``folder/second``; let diffoscope look at it.

    Raises:
        BuildError: diffoscope failed, or took more than ten minutes.
    """
    if folder.exists():
        shutil.rmtree(folder)
    sides = (folder / "first", folder / "second")
    for name in sorted({difference.path for difference in found}):
        for source, side in zip((first, second), sides, strict=True):
            if (source / name).is_file():
                (side / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / name, side / name)
    for side in sides:
        side.mkdir(parents=True, exist_ok=True)
    if shutil.which(PROGRAM) is None:
        say(
            f"note[NO_DIFFOSCOPE]: {PROGRAM} is not installed, so there is no report of its "
            f"(apt-get install diffoscope-minimal); what differs is in {folder}"
        )
        return
    say(f"diffoscope's report: {_report(sides, folder / REPORT)}")


def _report(sides: tuple[Path, Path], report: Path) -> Path:
    command = (PROGRAM, "--exclude-directory-metadata=recursive", "--text", str(report))
    try:
        done = subprocess.run(
            [*command, *map(str, sides)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            "DIFFOSCOPE_SLOW", f"diffoscope had not ended after {_SECONDS} s", log=str(report)
        ) from error
    if done.returncode not in (0, _DIFFERENT):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BuildError("DIFFOSCOPE_FAILED", f"diffoscope: {last[0]}")
    return report
