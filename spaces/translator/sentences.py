"""The loader's sentences in the page's language, by error code. Pure.

The loader speaks English. ``sentences_ja.json`` has a Japanese sentence and what to do for every
code; a code whose English holds values lists its English with ``{blanks}`` too, so that the values
come along. Whatever no entry fits keeps the code's general sentence, and the English stands beside
it on the page.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from translator import texts

if TYPE_CHECKING:
    from collections.abc import Mapping

_BLANK: Final = re.compile(r"\{(\w+)\}")
_LONGEST: Final = 4000
"""Characters. What is longer quotes a log, and no entry need be tried on it."""
_CODED: Final = re.compile(r"(?P<code>[A-Z][A-Z0-9_]+): ")


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


def say(code: str, message: str, hint: str, locale: str) -> Said:
    """Return a failure or note in a locale; English is the loader's own."""
    if locale != "ja":
        return Said(message, hint)
    original = f"{message}\n{hint}" if hint else message
    found = _japanese(code, message, hint)
    return Said(*found, original) if found else Said(message, hint)


def progress(text: str, locale: str) -> str:
    """Return a line of progress (``words.event``, an item's ``text``) in a locale."""
    if locale != "ja":
        return text
    coded = _CODED.match(text)
    if coded and coded["code"] in _table()["codes"]:
        general: str = _table()["codes"][coded["code"]][-1]["what"]
        return general
    for form in _table()["progress"]:
        values = _values(form["en"], text)
        if values is not None:
            stage = texts.every()["ja"].get(f"stage_{values.get('stage')}")
            return _filled(form["ja"], {**values, "stage": stage} if stage else values)
    return text


def codes() -> frozenset[str]:
    """Return the codes that have a translation."""
    return frozenset(_table()["codes"])


def _japanese(code: str, message: str, hint: str) -> tuple[str, str] | None:
    """Take off what the loader puts around a sentence, then translate that."""
    for form in _table()["wrapped"]:
        values = _values(form["en"], message)
        if values is not None:
            inner = _japanese(code, values["inner"], hint)
            what, to_do = inner or (values["inner"], hint)
            return _filled(form["ja"], {**values, "inner": what}), form.get("hint", to_do)
    for form in _table()["codes"].get(code, ()):
        values = _values(form.get("en"), message)
        more = _values(form.get("en_hint"), hint)
        if values is not None and more is not None:
            all_ = {**values, **more}
            return _filled(form["what"], all_), _filled(form["hint"], all_)
    return None


def _values(template: str | None, text: str) -> Mapping[str, str] | None:
    """Return what fills a template's blanks; None where the text is not of that form."""
    if template is None:
        return {}
    found = _pattern(template).fullmatch(text) if len(text) <= _LONGEST else None
    return found.groupdict() if found else None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = _BLANK.split(template)  # text, name, text, name, … text
    made = [re.escape(part) if at % 2 == 0 else f"(?P<{part}>.*?)" for at, part in enumerate(parts)]
    return re.compile("".join(made), re.DOTALL)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Fill the blanks; a value that is itself English and known is translated."""
    known: Mapping[str, str] = _table()["words"]
    return _BLANK.sub(lambda blank: known.get(values[blank[1]], values[blank[1]]), template)


@cache
def _table() -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(
        Path(__file__).with_name("sentences_ja.json").read_text("utf-8")
    )
    return found
