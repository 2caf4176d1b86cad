"""What a person reads, in English and Japanese; the browser says which. Pure.

The loader speaks English. ``sentences_ja.json`` has a Japanese sentence and what to do for each of
its codes, and the lines of progress. The English of an error, with its values, stands beneath.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llama_loader.events import Downloading, Note, size
from llama_space import values
from translator import languages

if TYPE_CHECKING:
    from collections.abc import Mapping

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


@dataclass(frozen=True)
class Said:
    """A failure or note for a person.

    Attributes:
        what: happened.
        hint: what to do; empty where the loader knows nothing to do.
        original: the loader's own words where these are a translation, else empty.
    """

    what: str
    hint: str
    original: str = ""


@cache
def every() -> Mapping[str, Mapping[str, str]]:
    """Return all words: locale → name → words."""
    found: Mapping[str, Mapping[str, str]] = read("texts.json")
    return {locale: {name: words[locale] for name, words in found.items()} for locale in LOCALES}


@cache
def language(code: str, locale: str) -> str:
    """Return a language's name in itself and in a locale, such as ``Deutsch · German``."""
    known = languages.known()[code]
    name = known.japanese if locale == "ja" else known.english
    return known.native if name == known.native else f"{known.native} · {name}"


@cache
def sentences(locale: str) -> Mapping[str, Any]:
    """Return ``codes`` and ``progress`` of a locale; English is the loader's own."""
    english = {"codes": {}, "progress": values.ENGLISH}
    found: Mapping[str, Any] = read("sentences_ja.json") if locale == "ja" else english
    return found


def say(one: Failure | Note, locale: str) -> Said:
    """Return a failure or note in a locale."""
    known = sentences(locale)["codes"].get(one.code)
    return (
        Said(**known, original=f"{one.message}\n{one.hint}")
        if known
        else Said(one.message, one.hint)
    )


def progress(one: Progress, locale: str) -> str:
    """Return a line about what is being waited for, in a locale."""
    known = sentences(locale)
    if isinstance(one.event, Note) and one.event.code in known["codes"]:
        return say(one.event, locale).what
    return values.line(one, {**every()[locale], **known["progress"]})


def patience(one: Progress, locale: str) -> str:
    """Return what a visitor waits for, without names of files and programs, in a locale."""
    words = every()[locale]
    line, event = words[f"wait_{one.stage}"], one.event
    if isinstance(event, Downloading) and event.total:
        done, total = size(event.done), size(event.total)
        known = sentences(locale)["progress"]
        share = known["share"].format(
            done=done, total=total, share=f"{event.done / event.total:.0%}"
        )
        line = words["wait_amount"].format(amount=share)
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


def read(name: str) -> Any:
    """Return what one of the files beside this one holds, in JSON."""
    return json.loads(Path(__file__).with_name(name).read_text("utf-8"))
