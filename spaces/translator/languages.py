"""The languages of the page, and which one a caller means by a name. Pure.

``languages.json`` holds the 55 languages and variants that TranslateGemma was trained and measured
on (its report, arXiv 2601.09012, names WMT24++), and English. The codes are those that its chat
template takes.
"""

from __future__ import annotations

import difflib
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from translator import texts

if TYPE_CHECKING:
    from collections.abc import Mapping

AUTO: Final = "auto"
FIRST: Final = ("ja", "en")
"""The pair that this page is made for: listed first."""
_LONGEST_NAME: Final = 60


@dataclass(frozen=True)
class Language:
    """One row of ``languages.json``.

    Attributes:
        code: as TranslateGemma's template takes it.
        english, native, japanese: its name, in English, in itself and in Japanese.
        thanks: "Thank you." in it: the one example that a base model is shown.
        direction: ``ltr`` or ``rtl``.
        also: other codes and names, separated by spaces.
        script: whose letters it is written in, as Unicode names them; empty for a variant.
        eld: its name there, where that is not its code.
        words: frequent ones, where several languages share the script.
        parts: groups of letters that its words often have, where ``eld`` does not know it.
    """

    code: str
    english: str
    native: str
    japanese: str
    thanks: str
    direction: str = "ltr"
    also: str = ""
    script: str = ""
    eld: str = ""
    words: str = ""
    parts: str = ""


@cache
def rows() -> tuple[Language, ...]:
    """Return the languages as the file has them: the most usual of each script first."""
    return tuple(Language(**row) for row in texts.read("languages.json"))


@cache
def known() -> Mapping[str, Language]:
    """Return the languages by code: the first pair, then by English name."""
    others = sorted(rows(), key=lambda one: one.english)
    by_code = {one.code: one for one in others}
    return {code: by_code[code] for code in (*FIRST, *by_code)}


def shown(code: str, locale: str) -> str:
    """Return a language's name in itself and in a locale, such as ``Deutsch · German``."""
    one = known()[code]
    name = one.japanese if locale == "ja" else one.english
    return one.native if name == one.native else f"{one.native} · {name}"


def find(name: str) -> Language | None:
    """Return the language that a person or a program means, None for an unknown one.

    Takes a code, a BCP 47 tag (``zh-TW``, ``en-US``), an English, native or Japanese name. A region
    or script that the page does not tell apart is passed over: ``de-AT`` is German.
    """
    wanted = _plain(name)
    while wanted:
        if wanted in _names():
            return known()[_names()[wanted]]
        wanted = wanted.rpartition("-")[0]
    return None


def near(name: str) -> list[str]:
    """Return at most four names and codes that are like an unknown one."""
    found = difflib.get_close_matches(_plain(name), _names(), 12, 0.6)
    return list(dict.fromkeys(known()[_names()[one]].english for one in found))[:4]


@cache
def _names() -> Mapping[str, str]:
    """Return the codes of the languages by everything that they are called, in lower case."""
    found: dict[str, str] = {}
    for one in known().values():
        called = [one.code, one.english, one.native, one.japanese, *one.also.split()]
        found |= {_plain(name): one.code for name in called}
    for one in known().values():  # "ar" and "sw" name the first of those that begin so
        found.setdefault(one.code.partition("-")[0].casefold(), one.code)
    return found


def _plain(name: str) -> str:
    """Fold a name for comparison; a text that is too long for a name is cut, to save time."""
    return unicodedata.normalize("NFC", name[:_LONGEST_NAME]).strip().replace("_", "-").casefold()
