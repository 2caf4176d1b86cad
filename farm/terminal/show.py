"""Tables and lines for people; and numbers out of their options. No decisions."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from farm import targets as table_of_targets
from farm.errors import UsageError
from farm.terminal.report import BuildReport
from llama_loader.manifest import CUDA_RUNTIME, LLAMA_SERVER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from farm.clean import Leavings
    from llama_loader.manifest import Artifact, Manifest

_LONGEST: Final = 3650
"""Days. A channel that lives longer than that has no expiry worth the name."""
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_NUMBER: Final = re.compile(r"[0-9]{1,9}")


def report() -> BuildReport:
    """Return the reporter of builds for this process's terminal."""
    return BuildReport()


def line(text: str) -> None:
    """Print one line to stdout."""
    print(text)


def note(text: str) -> None:
    """Print one line to stderr, beside what was asked for."""
    print(text, file=sys.stderr)


def positive(option: str, text: str | None) -> int | None:
    """Parse a positive number of at most nine digits; None stays None.

    Raises:
        UsageError: names the option and what it takes.
    """
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or int(text) < 1:
        raise UsageError("NUMBER_INVALID", f"{option} {text[:40]!r} is not a positive number")
    return int(text)


def days(option: str, text: str) -> int:
    """Parse a number of days from now.

    Raises:
        UsageError: names the option and what it takes.
    """
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= _LONGEST:
        raise UsageError(
            "NUMBER_INVALID", f"{option} {text[:40]!r} is not a number of days up to {_LONGEST}"
        )
    return int(text)


def sha256(option: str, text: str | None) -> str | None:
    """Parse a digest in hexadecimal; None stays None.

    Raises:
        UsageError: names the option and what it takes.
    """
    if text is not None and not _SHA256.fullmatch(text):
        raise UsageError("SHA256_INVALID", f"{option} {text[:80]!r} is not 64 hexadecimal digits")
    return text and text.lower()


def given(option: str, path: Path | None) -> Path:
    """Return a path that has no default.

    Raises:
        UsageError: it was not given.
    """
    if path is None:
        raise UsageError("OPTION_MISSING", f"{option} was not given")
    return path


def text(option: str, value: str | None) -> str:
    """Return a text that has no default.

    Raises:
        UsageError: it was not given.
    """
    if not value:
        raise UsageError("OPTION_MISSING", f"{option} was not given")
    return value


def one_of(options: Mapping[str, str | None]) -> None:
    """Require exactly one of several options.

    Raises:
        UsageError: none or more than one was given.
    """
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            "OPTIONS_INVALID", f"one of {', '.join(options)} is needed, not {len(given)} of them"
        )


def port(option: str, text: str) -> int:
    """Parse a TCP port; 0 asks for a free one.

    Raises:
        UsageError: names the option and what it takes.
    """
    if not _NUMBER.fullmatch(text) or int(text) > 65535:  # noqa: PLR2004 - TCP's limit
        raise UsageError("PORT_INVALID", f"{option} {text[:40]!r} is not a port from 0 to 65535")
    return int(text)


def targets() -> None:
    """Print the lines, sets and groups of build/targets.toml."""
    rows = table_of_targets.load()
    console = Console(highlight=False)
    lines = Table("line", "CUDA", "architectures", "driver", "devel image", box=None)
    for name, row in rows.lines.items():
        span = f"{row.oldest} to {row.newest}" if row.is_cuda else ""
        lines.add_row(name, row.toolkit or "", span, row.min_driver or "", row.image)
    for major, cuda in rows.cuda.items():
        span = f"{cuda.oldest} to {cuda.newest[-1][1]}"
        lines.add_row(f"cu{major}N", f"{major}.N", span, cuda.min_driver, "any with its nvcc")
    sets = Table("set", "CMAKE_CUDA_ARCHITECTURES", "format", box=None)
    for name, arch_set in rows.sets.items():
        sets.add_row(name, arch_set.archs or "none", arch_set.format)
    groups = Table("group", "sets", box=None)
    for name, members in rows.groups.items():
        groups.add_row(name, ", ".join(members))
    for table in (lines, sets, groups):
        console.print(table)
        console.print()


def release_rows() -> None:
    """Print what a release holds as one line of JSON, a matrix in the words of GitHub's."""
    print(json.dumps({"include": table_of_targets.load().release_rows()}))


def status(manifest: Manifest) -> None:
    """Print a release's artifacts and the size of their parts, in MB (10^6 bytes)."""
    console = Console(highlight=False)
    console.print(
        f"{manifest.release}  llama.cpp {manifest.source.version} build {manifest.source.build}"
    )
    table = Table(box=None)
    table.add_column("artifact", overflow="fold", min_width=24)
    for column in ("download", "unpacked", "GPU code", "host code", "holds"):
        table.add_column(column)
    for artifact in manifest.artifacts:
        parts = _parts(artifact)
        table.add_row(
            artifact.name,
            megabytes(artifact.size),
            megabytes(artifact.unpacked_size),
            *(megabytes(parts[kind]) if kind in parts else "" for kind in ("gpu", "host")),
            _holds(artifact),
        )
    console.print(table)


def verified(names: Iterable[str]) -> None:
    """Print one line for each artifact that was read again and found to be as listed."""
    for name in names:
        line(f"ok {name}")


def leavings(left: Leavings) -> None:
    """Print what the farm left on this machine and in the engine, and the sum."""
    for thing in left.things:
        stays = f"  (stays: {thing.kept})" if thing.kept else ""
        line(f"{megabytes(thing.size):>12}  {thing.what}{stays}")
    if left.engine:
        note(f"note[ENGINE_NOT_ASKED]: {left.engine}")
    line(f"{megabytes(left.size):>12}  in all")


def _parts(artifact: Artifact) -> Counter[str]:
    sizes: Counter[str] = Counter()
    if artifact.kind != LLAMA_SERVER:
        return sizes
    sizes["gpu"] = 0
    for entry in artifact.files:
        sizes["gpu" if entry.path.endswith("libggml-cuda.so") else "host"] += entry.size
    return sizes


def _holds(artifact: Artifact) -> str:
    if artifact.cuda is None:
        return "no CUDA"
    if artifact.kind == CUDA_RUNTIME:
        return f"CUDA {artifact.cuda.toolkit} libraries"
    ptx = f", PTX {' '.join(artifact.cuda.ptx)}" if artifact.cuda.ptx else ""
    return f"SASS {' '.join(artifact.cuda.sass)}{ptx}"


def megabytes(size: int) -> str:
    """Return a size in words; MB are 10^6 bytes."""
    return f"{size / 1e6:.1f} MB"
