"""Two small pictures: what this start took, and what the last calls took. HTML, pure.

The style sheet places and colours the bars, so that light, dark and a phone need one drawing.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from llama_space.values import Figures

_CALLS: Final = 8
_THOUSANDTH, _TENTH, _TEN = 0.001, 0.1, 10.0
_OF_THE_SERVER: Final = frozenset({"start", "first token", "devices", "test run"})
"""Stages that llama-server takes; the loader takes all others."""


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
    for name, took in stages:
        kind = "server" if name in _OF_THE_SERVER else "loader"
        bar = _bar(kind, begun / total, took / total)
        rows.append(_row(words.get(f"stage_{name}", name), bar, seconds(took)))
        begun += took
    return _picture(rows, f"{words['this_start']}: {seconds(begun)}")


def calls(made: Sequence[Figures], words: Mapping[str, str]) -> str:
    """Draw the last calls, newest first: until the first words, then until the end."""
    latest = list(made)[-_CALLS:][::-1]
    longest = max((call.seconds for call in latest), default=0.0) or 1.0
    rows = []
    for call in latest:
        first = call.seconds if call.first_token is None else min(call.first_token, call.seconds)
        bars = _bar("answer", 0.0, call.seconds / longest) + _bar("wait", 0.0, first / longest)
        label = "·" if call.tokens is None else f"{call.tokens} tok"
        label += "" if call.warm else f" · {words['cold']}"
        rows.append(_row(label, bars, " · ".join([seconds(call.seconds), *gpu([call], words)[:1]])))
    borrowed = any(call.reserved for call in latest)
    return _picture(rows, words["last_calls"], "picture borrowed" if borrowed else "picture")


def gpu(made: Sequence[Figures], words: Mapping[str, str]) -> list[str]:
    """Return the GPU seconds that calls used and reserved, and those left before; or nothing."""
    if not any(call.reserved for call in made):
        return []
    used, reserved = (sum(getattr(call, name) for call in made) for name in ("used", "reserved"))
    said = [words["gpu_of"].format(used=f"{used:.1f}", reserved=f"{reserved:.0f}")]
    left = [call.left for call in made if call.left is not None]
    return [*said, words["gpu_left"].format(left=left[0])] if left else said


def lately(made: Sequence[Figures], words: Mapping[str, str]) -> list[str]:
    """Return how long the last calls took, for who waits for a turn; nothing before the first."""
    took = [call.seconds for call in made[-_CALLS:]]
    if not took:
        return []
    return [words["lately"].format(shortest=seconds(min(took)), longest=seconds(max(took)))]


def _bar(kind: str, begin: float, width: float) -> str:
    return f'<i class="{kind}" style="left:{begin:.1%};width:{width:.1%}"></i>'


def _row(label: str, bars: str, took: str) -> str:
    return f"<p>{escape(label)}<span>{bars}</span><b>{escape(took)}</b></p>"


def _picture(rows: Iterable[str], described: str, kind: str = "picture") -> str:
    shown = "".join(rows)
    return f'<div class="{kind}" role="img" aria-label="{escape(described)}">{shown}</div>'
