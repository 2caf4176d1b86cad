"""Two small pictures: what this start took, and what the last calls took. SVG, pure.

Colours come from the page's style sheet by class, so that light and dark need one drawing. The
view is narrow on purpose: its letters stay readable on a phone.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llama_space.values import Figures

_WIDTH: Final = 380.0
_LEFT: Final = 112.0
_RIGHT: Final = 62.0
_ROW: Final = 24.0
_BAR: Final = 8.0
_LEAST: Final = 2.0
"""Width of the shortest bar: a stage of a millisecond was a stage."""
_SPAN: Final = _WIDTH - _LEFT - _RIGHT
_CALLS: Final = 8
_THOUSANDTH, _TENTH, _TEN = 0.001, 0.1, 10.0


def seconds(value: float) -> str:
    """Write a duration with as many digits as mean something."""
    if value < _THOUSANDTH:
        return "<1 ms"
    if value < _TENTH:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < _TEN else f"{value:.0f} s"


def start(stages: Sequence[tuple[str, float]], words: Mapping[str, str]) -> str:
    """Draw a start: one row a stage, each bar beginning where the one before ended.

    Args:
        stages: name and seconds, in order.
        words: ``texts`` of one locale.
    """
    total = sum(took for _, took in stages) or 1.0
    rows, begun = [], 0.0
    for index, (name, took) in enumerate(stages):
        x = _LEFT + _SPAN * begun / total
        width = min(max(_SPAN * took / total, _LEAST), _WIDTH - _RIGHT - x)
        bar = _bar(x, width, index, _kind(name))
        rows.append(_row(index, words.get(f"stage_{name}", name), bar, seconds(took)))
        begun += took
    return _svg(rows, words["this_start"], f"{words['this_start']}: {seconds(begun)}")


def calls(made: Sequence[Figures], words: Mapping[str, str]) -> str:
    """Draw the last calls, newest first: until the first words, then until the end."""
    latest = list(made)[-_CALLS:][::-1]
    longest = max((call.seconds for call in latest), default=0.0) or 1.0
    rows = []
    for index, call in enumerate(latest):
        first = call.first_token if call.first_token is not None else call.seconds
        split = max(_SPAN * min(first, call.seconds) / longest, _LEAST)
        whole = max(_SPAN * call.seconds / longest, split)
        bar = _bar(_LEFT, whole, index, "answer") + _bar(_LEFT, split, index, "wait")
        label = f"{call.tokens} tok" if call.tokens is not None else "·"
        label += "" if call.warm else f" · {words['cold']}"
        rows.append(_row(index, label, bar, seconds(call.seconds)))
    return _svg(rows, words["last_calls"], words["last_calls"])


def _kind(stage: str) -> str:
    """The loader's own work, or the server's."""
    return "server" if stage in {"start", "first token", "devices", "test run"} else "loader"


def _bar(x: float, width: float, index: int, kind: str) -> str:
    y = index * _ROW + (_ROW - _BAR) / 2
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" rx="1"/>'
    )


def _row(index: int, label: str, bar: str, figure: str) -> str:
    y = index * _ROW + _ROW / 2
    rule = f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
    return (
        f'{rule}{bar}<text x="0" y="{y + 4}">{escape(label)}</text>'
        f'<text class="figure" x="{_WIDTH}" y="{y + 4}">{escape(figure)}</text>'
    )


def _svg(rows: Sequence[str], title: str, described: str) -> str:
    height = max(len(rows), 1) * _ROW
    return (
        f'<svg class="picture" role="img" viewBox="0 0 {_WIDTH:g} {height:g}"'
        f' aria-label="{escape(described)}"><title>{escape(title)}</title>{"".join(rows)}</svg>'
    )
