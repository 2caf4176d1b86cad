"""Compares two tarballs of one build, member by member.

Files that differ are kept, and diffoscope explains them if that program is installed.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Final

from farm import durable
from farm.errors import BuildError, PackError
from farm.pack import ROOT
from farm.tarball import archive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIDES: Final = ("first", "second")
_REPORT: Final = "diffoscope.txt"
_DIFFOSCOPE: Final = "diffoscope"
_DIFFOSCOPE_SECONDS: Final = 600
_DIFFERENT: Final = 1
"""diffoscope's exit status when it did its work and found differences."""
_FACTS: Final = ("other bytes, sha256", "mode", "time in the archive")
"""What is compared of two members of one name."""
_Facts = tuple[str, str, str]


def compare(first: Path, second: Path, kept: Path, say: Callable[[str], None]) -> tuple[str, ...]:
    """Compare two release tarballs; report, keep and explain what differs.

    The folder ``kept`` is replaced: by both versions of what differs, and diffoscope's report.

    Returns:
        A line for each file that differs; none if the tarballs are identical.

    Raises:
        PackError: one of them is damaged, or holds what no release may.
        BuildError: diffoscope failed, or took more than ten minutes.
        OSError: a file cannot be read or written.
    """
    if durable.sha256(first) == durable.sha256(second):
        return ()
    durable.remove(kept)
    one, other = (
        _unpack(tarball, kept / side) for tarball, side in zip((first, second), SIDES, strict=True)
    )
    paths = sorted({*one, *other})
    found = [f"{path}: {_difference(one.get(path), other.get(path))}" for path in paths
             if one.get(path) != other.get(path)]  # fmt: skip
    if not found:
        order = "members in another order" if [*one] != [*other] else "the same members"
        found = [f"{second.name}: {order}, in other compressed bytes"]
    for line in found:
        say(f"  differs: {line}")
    for path in one.keys() & other.keys():
        if one[path][0] == other[path][0]:
            for side in SIDES:
                (kept / side / path).unlink()
    _explain(kept, say)
    return tuple(found)


def _difference(first: _Facts | None, second: _Facts | None) -> str:
    """Return how two members of one name differ."""
    if first is None or second is None:
        return f"only the {'second' if first is None else 'first'} has it"
    facts = zip(_FACTS, first, second, strict=True)
    return next(f"{what} {one} / {other}" for what, one, other in facts if one != other)


def _unpack(tarball: Path, folder: Path) -> dict[str, _Facts]:
    """Unpack a release's tarball, and return the ``_FACTS`` of each member.

    Members are checked as everywhere (``archive.members``).
    """
    found = {}
    folder.mkdir(parents=True)
    try:
        with durable.open_regular(tarball) as raw:
            archive_format = archive.format_of(tarball.name)
            for member in archive.members(raw, archive_format, what=tarball.name, root=ROOT):
                place = folder / member.path
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as out:
                    shutil.copyfileobj(member.stream, out, archive.BLOCK)
                facts = (durable.sha256(place), f"{member.mode:04o}", str(member.mtime))
                found[member.path] = facts
    except archive.DAMAGE as error:
        raise PackError("ARCHIVE_DAMAGED", name=tarball.name, error=error) from error
    return found


def _explain(kept: Path, say: Callable[[str], None]) -> None:
    """Let diffoscope write its report on both versions, if it is installed."""
    if shutil.which(_DIFFOSCOPE) is None:
        say(
            f"note[NO_DIFFOSCOPE]: {_DIFFOSCOPE} is not installed (apt-get install "
            f"diffoscope-minimal), so nothing explains what differs; both sides are in {kept}"
        )
        return
    report = kept / _REPORT
    options = ("--exclude-directory-metadata=recursive", "--text", str(report))
    sides = (str(kept / side) for side in SIDES)
    try:
        done = subprocess.run(
            [_DIFFOSCOPE, *options, *sides],
            capture_output=True,
            text=True,
            timeout=_DIFFOSCOPE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError("DIFFOSCOPE_SLOW", seconds=_DIFFOSCOPE_SECONDS, log=str(report)) from error
    if done.returncode not in (0, _DIFFERENT):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BuildError("DIFFOSCOPE_FAILED", last=last[0])
    say(f"diffoscope's report: {report}")
