"""A timeline of named spans: lines for a terminal, and a picture for a page. Pure."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

_COLUMNS: Final = 96
_BAR: Final = 48
_COLOURS: Final = {"farm": "blue", "loader": "green", "server": "yellow"}
_TENTH: Final = 0.1
_TEN: Final = 10.0


@dataclass(frozen=True)
class Span:
    """One stage. ``seconds`` is wall time; ``size`` in bytes, None where none moved."""

    name: str
    owner: str
    seconds: float
    size: int | None = None
    note: str = ""

    @property
    def figures(self) -> str:
        """Seconds, and megabytes (10^6) where bytes moved."""
        amount = f" · {self.size / 1e6:.1f} MB" if self.size is not None else ""
        return f"{seconds(self.seconds)}{amount}"


def seconds(value: float) -> str:
    """Write a duration with as many digits as mean something."""
    if value < _TENTH:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < _TEN else f"{value:.0f} s"


def rows(spans: tuple[Span, ...]) -> list[str]:
    """Return one aligned plain line a span, and a total."""
    widest = max(len(span.name) for span in spans)
    lines = [f"  {span.name:<{widest}}  {span.figures:<22}{span.note}".rstrip() for span in spans]
    total = sum(span.seconds for span in spans)
    return [*lines, f"  {'total':<{widest}}  {seconds(total)}"]


def svg(spans: tuple[Span, ...], *, title: str) -> str:
    """Draw the spans one below the other: the farm's, then those of a start.

    A build takes minutes and a loader milliseconds: on one scale only the build could be seen, so
    the farm's rows and the others' have a scale each, and every row carries its figures.
    """
    table = Table("stage", "of", "", "", box=None, width=_COLUMNS)
    for _, members in groupby(spans, key=lambda span: span.owner == "farm"):
        group, begin = list(members), 0.0
        total = sum(span.seconds for span in group) or 1.0
        for span in group:
            bar = Bar(
                total, begin, begin + span.seconds, width=_BAR, color=_COLOURS.get(span.owner, "")
            )
            table.add_row(span.name, span.owner, bar, span.figures)
            begin += span.seconds
        table.add_row("", "", "", f"{seconds(begin)} in all")
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(table)
    # rich names fonts of a content network: a picture in a README must ask for nothing
    picture = console.export_svg(title=title, unique_id="timeline")
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
