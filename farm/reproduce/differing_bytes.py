"""Two runs of bytes → where they differ, and the text that stands there. Reads in pieces."""

from __future__ import annotations

import operator
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

Span = tuple[BinaryIO, int, int]
"""A seekable stream, an offset and a size in it, in bytes."""

_BLOCK: Final = 1 << 20
_BEFORE, _AFTER = 48, 64
"""Bytes around the first difference in which text is looked for."""
_SHOWN: Final = 48
_TEXT: Final = re.compile(rb"[ -~]{6,}")
_CAUSES: Final = (
    (
        re.compile(r"_INTERNAL_[0-9a-f]{8}_"),
        "nvcc's own name for a source file, made from its folder's: equal in folders of one name",
    ),
    (re.compile(r"tmpxft_"), "a temporary file of nvcc's, named after its process"),
    (re.compile(r"\b\d\d:\d\d:\d\d\b"), "a time of day: __TIME__, or a time stamp of the build"),
    (re.compile(r"\b[A-Z][a-z]{2} [ \d]\d 20\d\d\b|\b20\d\d-\d\d-\d\d\b"), "a date of the build"),
    (
        re.compile(r"(?:^|[^\w.])/\w[\w.+-]*/"),
        "a folder of the build, such as __FILE__ without a map",
    ),
)
"""What the text at the first difference looks like → what put it there."""


@dataclass(frozen=True)
class Differing:
    """How two runs of bytes differ.

    Attributes:
        sizes: of both, in bytes.
        first: the offset of the first byte that differs, in what was compared.
        count: how many bytes differ, None where the sizes do.
        texts: the printable text at that place in both, empty where there is none.
    """

    sizes: tuple[int, int]
    first: int
    count: int | None
    texts: tuple[str, str] = ("", "")

    def render(self) -> str:
        """Return it in words."""
        if self.count is None:
            said = (
                f"{self.sizes[0]} / {self.sizes[1]} bytes, the first other one at {self.first:#x}"
            )
        else:
            said = f"{self.count} of {self.sizes[0]} bytes, the first at {self.first:#x}"
        if any(self.texts):
            said += f": {self.texts[0][:_SHOWN]!r} / {self.texts[1][:_SHOWN]!r}"
        return said

    @property
    def cause(self) -> str:
        """What the text there is known to come from, empty where nothing is known."""
        for pattern, cause in _CAUSES:
            if any(pattern.search(text) for text in self.texts):
                return cause
        return ""


def compare(first: Path | Span, second: Path | Span) -> Differing | None:
    """Compare two files, or parts of them; None where they are the same.

    Raises:
        OSError: one cannot be read.
    """
    with ExitStack() as opened:
        one, other = (_span(part, opened) for part in (first, second))
        at, count = _walk(one, other)
        if at is None:
            if one[2] == other[2]:
                return None
            at = min(one[2], other[2])
        same_size = one[2] == other[2]
        texts = (_text_at(one, at), _text_at(other, at))
        shown = texts if texts[0] != texts[1] else ("", "")
        return Differing((one[2], other[2]), at, count if same_size else None, shown)


def _span(part: Path | Span, opened: ExitStack) -> Span:
    if not isinstance(part, Path):
        return part
    return opened.enter_context(part.open("rb")), 0, part.stat().st_size


def _walk(one: Span, other: Span) -> tuple[int | None, int]:
    """Return the first difference within the shorter of both, and how many there are."""
    first, count = None, 0
    for start in range(0, min(one[2], other[2]), _BLOCK):
        size = min(_BLOCK, min(one[2], other[2]) - start)
        ours, theirs = (_read(part, start, size) for part in (one, other))
        if ours == theirs:
            continue
        differing = list(map(operator.ne, ours, theirs))
        count += sum(differing)
        if first is None:
            first = start + differing.index(True)
    return first, count


def _read(part: Span, start: int, size: int) -> bytes:
    stream, offset, _ = part
    stream.seek(offset + start)
    return stream.read(size)


def _text_at(part: Span, at: int) -> str:
    """Return the text that has or is nearest to a byte, where there is one of six letters."""
    start = max(0, at - _BEFORE)
    around = _read(part, start, min(at + _AFTER, part[2]) - start)
    for match in _TEXT.finditer(around):
        if match.end() > at - start:
            return match[0].decode("ascii") if match.start() <= at - start else ""
    return ""
