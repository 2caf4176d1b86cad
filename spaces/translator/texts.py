"""The page's texts in English and Japanese; the browser decides which. No side effects.

The loader speaks English. ``sentences_ja.json`` has a Japanese sentence and what to do for each of
its codes. The English of an error, with its values, is shown beneath.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llama_loader.events import Downloading, size
from llama_loader.settings import prefixed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llama_loader.events import Note
    from llama_space.values import Failure, Progress

LOCALES: Final = ("en", "ja")


@dataclass(frozen=True)
class Refusal:
    """What cannot be done as it was asked; ``name`` is that of the words in ``texts.json``."""

    name: str
    values: Mapping[str, object] = field(default_factory=dict)

    def text(self, words: Mapping[str, str]) -> str:
        """Return the sentence, in the words of one locale."""
        return words[self.name].format(**self.values)


@cache
def every() -> Mapping[str, Mapping[str, str]]:
    """Return all words: locale → name → words."""
    found: Mapping[str, Mapping[str, str]] = read("texts.json")
    return {locale: {name: words[locale] for name, words in found.items()} for locale in LOCALES}


def say(one: Failure | Note, locale: str) -> tuple[str, str, str]:
    """Return a failure's sentence and hint in a locale, and the English text under a translation.

    The hint is empty where the loader has none, and the third text where there is no translation.
    """
    known = read("sentences_ja.json").get(one.code) if locale == "ja" else None
    if known is None:
        return one.message, one.hint, ""
    return known["what"], prefixed(known["hint"]), f"{one.message}\n{one.hint}"


def patience(one: Progress, locale: str) -> str:
    """Return the line about what the page waits for, without names of files and programs."""
    words = every()[locale]
    line, event = words[f"wait_{one.stage}"], one.event
    if isinstance(event, Downloading) and event.total:
        share = f"{event.done / event.total:.0%}"
        so_far = {"done": size(event.done), "total": size(event.total), "share": share}
        line = words["wait_amount"].format(**so_far)
    if one.seconds < 1:
        return line
    return words["wait_seconds"].format(line=line, seconds=int(one.seconds))


def accepted(header: str | None) -> str:
    """Return the first locale of ours that an ``Accept-Language`` header names; English else.

    Browsers list languages by preference, so their weights tell nothing more.
    """
    tags = (part.partition(";")[0].strip() for part in (header or "").split(","))
    named = (tag.partition("-")[0].lower() for tag in tags)
    return next((name for name in named if name in LOCALES), LOCALES[0])


@cache
def read(name: str) -> Any:
    """Return what one of the files beside this one holds, in JSON."""
    return json.loads(Path(__file__).with_name(name).read_text("utf-8"))
