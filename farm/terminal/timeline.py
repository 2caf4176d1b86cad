"""A timeline of named spans: a table for a terminal, an SVG picture for a page. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH: Final = 960
_LEFT: Final = 150
_RIGHT: Final = 190
_ROW: Final = 30
_TOP: Final = 76
_MIN_BAR: Final = 3.0
_SCALES: Final = "the farm's rows and the rows of a start each have a scale of their own"
_INK: Final = "#1d2733"
_COLOURS: Final = {"farm": "#3b6ea8", "loader": "#2f8f5b", "server": "#c2782b"}
_OWNERS: Final = {"farm": "the farm, once", "loader": "the loader", "server": "llama-server"}
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
    """Draw the spans one below the other, each group of one owner on a scale of its own.

    A build takes minutes and a loader milliseconds: on one scale only the build could be seen, so
    the farm's rows and the others' have a scale each, and every row carries its figures.
    """
    height = _TOP + _ROW * len(spans) + 40
    parts = [
        f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"
  width="{_WIDTH}" height="{height}" font-family="system-ui, sans-serif" font-size="14">""",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f"""<text x="24" y="34" font-size="18" font-weight="600" fill="{_INK}">
  {escape(title)}</text>""",
        f"""<text x="24" y="56" font-size="13" fill="#48566a">{_SCALES}</text>""",
    ]
    farm = tuple(span for span in spans if span.owner == "farm")
    rest = tuple(span for span in spans if span.owner != "farm")
    y = float(_TOP)
    for group in (farm, rest):
        parts += _group(group, y)
        y += _ROW * len(group)
    parts.append(_legend(spans, y + 24))
    return "\n".join([*parts, "</svg>", ""])


def _group(spans: tuple[Span, ...], top: float) -> list[str]:
    total = sum(span.seconds for span in spans) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / total
    parts: list[str] = []
    start = 0.0
    for index, span in enumerate(spans):
        y = top + index * _ROW
        x = _LEFT + start * scale
        width = max(span.seconds * scale, _MIN_BAR)
        colour = _COLOURS.get(span.owner, "#777777")
        right = _WIDTH - _RIGHT
        parts.append(
            f"""<line x1="{_LEFT}" x2="{right}" y1="{y + 26}" y2="{y + 26}" stroke="#e6eaef"/>
<text x="{_LEFT - 12}" y="{y + 19}" text-anchor="end" fill="{_INK}">{escape(span.name)}</text>
<rect x="{x:.1f}" y="{y + 6}" width="{width:.1f}" height="16" rx="3" fill="{colour}"/>
<text x="{right + 12}" y="{y + 19}" fill="#48566a">{escape(span.figures)}</text>"""
        )
        start += span.seconds
    return parts


def _legend(spans: tuple[Span, ...], y: float) -> str:
    parts = []
    x = float(_LEFT)
    for owner, text in _OWNERS.items():
        total = sum(span.seconds for span in spans if span.owner == owner)
        parts.append(
            f'<rect x="{x}" y="{y - 11}" width="12" height="12" rx="2" fill="{_COLOURS[owner]}"/>'
            f'<text x="{x + 18}" y="{y}" fill="#48566a">{text}: {seconds(total)}</text>'
        )
        x += 190
    return "".join(parts)
