"""The line that a devel image makes, and what in an image contradicts a line. Pure.

What an image has to build with it tells itself (``farm.engines.images.PROBE``), before anything is
compiled on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from farm.elf import version_key
from farm.errors import UsageError

if TYPE_CHECKING:
    from farm.engines.images import ImageTools
    from farm.targets import Line, Targets

MACHINE: Final = "x86_64"
"""The processor that the farm builds for."""
_C23: Final = (2, 38)
"""The first glibc whose headers turn to the functions of C23."""


def line_of_tools(table: Targets, tools: ImageTools) -> tuple[Line, tuple[str, ...]]:
    """Return the line that a devel image makes, and notes on what it promises.

    Raises:
        UsageError: it has no nvcc, or one of a major version that the farm does not build for.
    """
    if tools.cuda is None:
        raise _no_nvcc(tools)
    line = table.line_of_toolkit(tools.cuda, what=tools.image)
    if tools.codes:
        line = msgspec.structs.replace(line, oldest=min(tools.codes), newest=max(tools.codes))
    notes = [note for note in (table.unchecked(line, listed=bool(tools.codes)),) if note]
    for beyond in _beyond(line, tools):
        line = msgspec.structs.replace(line, **{beyond.name: beyond.has})
        notes.append(
            f"note[{beyond.name.upper()}_OF_IMAGE]: {tools.image} has {beyond.name} "
            f"{beyond.has}; what is built there may need it, where other images of {line.name} "
            f"promise {beyond.promised}. The manifest says what it needs"
        )
    return line, tuple(notes)


def contradictions(line: Line, tools: ImageTools) -> tuple[UsageError, ...]:
    """Return everything in a devel image that cannot make what a line promises."""
    found = []
    if tools.machine != MACHINE:
        found.append(
            UsageError("IMAGE_MACHINE", f"{tools.image} is for {tools.machine}, not for {MACHINE}")
        )
    if line.is_cuda and tools.cuda is None:
        found.append(_no_nvcc(tools))
    elif line.is_cuda and not line.accepts_toolkit(str(tools.cuda)):
        found.append(
            UsageError(
                "TOOLKIT_NOT_OF_LINE",
                f"line {line.name} is CUDA {line.toolkit}; {tools.image} has CUDA {tools.cuda}",
                hint="leave --line out: the line then follows from the image",
            )
        )
    found += [
        UsageError(
            f"IMAGE_{beyond.name.upper()}_TOO_NEW",
            f"{tools.image} has {beyond.name} {beyond.has}: what is built there needs it, and line "
            f"{line.name} promises {beyond.promised}",
            hint="take an image of Ubuntu 22.04 or Debian 12; or leave --line out: the line then "
            "promises what the image has",
        )
        for beyond in _beyond(line, tools)
    ]
    gcc = int(tools.gcc.split(".")[0]) if tools.gcc else 0
    if line.is_cuda and tools.newest_gcc is not None and gcc > tools.newest_gcc:
        found.append(
            UsageError(
                "HOST_COMPILER_TOO_NEW",
                f"{tools.image} has g++ {tools.gcc}; its CUDA {tools.cuda} takes g++ "
                f"{tools.newest_gcc} at the newest",
            )
        )
    return tuple(found)


def _no_nvcc(tools: ImageTools) -> UsageError:
    return UsageError(
        "NVCC_MISSING",
        f"{tools.image} has no nvcc that runs, so nothing for GPUs can be built on it",
        hint="take a devel image, such as nvidia/cuda:12.8.1-devel-ubuntu22.04",
    )


class _Beyond(NamedTuple):
    """A library of an image that is newer than a line promises."""

    name: str
    has: str
    promised: str


def _beyond(line: Line, tools: ImageTools) -> list[_Beyond]:
    """Return what makes binaries of an image need more than their line promises.

    A glibc counts from 2.38 on: its headers turn ``strtol`` into ``__isoc23_strtol``, which older
    hosts lack. What was new in 2.36 and 2.37 llama.cpp does not use: Debian 12 (2.36) makes
    binaries for 2.34.
    """
    glibc = tools.glibc if version_key(tools.glibc or "0") >= _C23 else None
    has = (("glibc", glibc, line.glibc), ("glibcxx", tools.glibcxx, line.glibcxx))
    return [
        _Beyond(name, own, promised)
        for name, own, promised in has
        if own is not None and version_key(own) > version_key(promised)
    ]
