"""The interface's words in English and Japanese, chosen by what the browser asks for. Pure."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

LOCALES: Final = ("en", "ja")


@cache
def every() -> Mapping[str, Mapping[str, str]]:
    """Return all words: locale → name → words."""
    found: dict[str, dict[str, str]] = json.loads(
        Path(__file__).with_name("texts.json").read_text("utf-8")
    )
    return {locale: {name: words[locale] for name, words in found.items()} for locale in LOCALES}


def accepted(header: str | None) -> str:
    """Return the first locale of ours that an ``Accept-Language`` header names; English else.

    Browsers list languages by preference; weights that say otherwise are honoured.
    """
    ranked: list[tuple[float, str]] = []
    for part in (header or "").split(","):
        tag, _, parameters = part.strip().partition(";")
        locale = tag.partition("-")[0].lower()
        if locale in LOCALES:
            ranked.append((_weight(parameters), locale))
    best = max(ranked, key=lambda one: one[0], default=(0.0, "en"))
    return best[1] if best[0] > 0 else "en"


def _weight(parameters: str) -> float:
    name, _, value = parameters.strip().partition("=")
    if name.strip().lower() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0
