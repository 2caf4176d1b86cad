"""The languages of the page, and a guess which one a text is in. Pure.

``languages.json`` holds the 55 languages and variants that TranslateGemma was trained and measured
on (its report, arXiv 2601.09012, names WMT24++), and English. The codes are those that its chat
template takes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

AUTO: Final = "auto"
FIRST: Final = ("ja", "en")
"""The pair that this page is made for: listed first, and each other's counterpart."""
_SCRIPTS: Final = {
    # what unicodedata calls a letter's script → the language that it alone stands for
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "GREEK": "el",
    "HEBREW": "he",
    "THAI": "th",
    "BENGALI": "bn",
    "GURMUKHI": "pa",
    "GUJARATI": "gu",
    "TAMIL": "ta",
    "TELUGU": "te",
    "KANNADA": "kn",
    "MALAYALAM": "ml",
}
_SHARED: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    # scripts of several languages: letters that only one of them has; the last is the usual one
    "CYRILLIC": (("uk", "іїєґ"), ("sr", "јљњћђџ"), ("ru", "ыэё"), ("bg", "ъ"), ("ru", "")),
    "ARABIC": (("ur", "ٹڈڑےں"), ("fa", "پچژگ"), ("ar-SA", "")),
    "DEVANAGARI": (("mr", "ळ"), ("hi", "")),
    "CJK": (
        ("zh-Hans", "们这说时为个过还对吗东车书门问见马鱼鸟龙让谢请爱语译发电"),
        ("zh-Hant", "們這說沒嗎讓譯發體學對氣點變來會從將"),
        ("ja", ""),
    ),
}
_KANA_SHARE: Final = 0.05
"""Of Japanese letters at least this share is kana; a name in kana in a Chinese text is less."""


@dataclass(frozen=True)
class Language:
    """One row of ``languages.json``.

    Attributes:
        code: as TranslateGemma's template takes it.
        english, native: its name, in English and in itself.
        thanks: "Thank you." in it: the one example that a base model is shown.
        direction: ``ltr`` or ``rtl``.
        words: frequent short words, for languages in Latin script.
    """

    code: str
    english: str
    native: str
    thanks: str
    direction: str = "ltr"
    words: str = ""


@cache
def known() -> Mapping[str, Language]:
    """Return the languages by code: the first pair, then by English name."""
    text = Path(__file__).with_name("languages.json").read_text("utf-8")
    rows = [Language(**row) for row in json.loads(text)]
    rows.sort(
        key=lambda one: (FIRST.index(one.code) if one.code in FIRST else len(FIRST), one.english)
    )
    return {one.code: one for one in rows}


def find(name: str) -> Language | None:
    """Return the language that a person or a program means: by code, English or native name."""
    wanted = name.strip().replace("_", "-").casefold()
    for one in known().values():
        if wanted in {one.code.casefold(), one.english.casefold(), one.native.casefold()}:
            return one
    return next((one for one in known().values() if one.code.partition("-")[0] == wanted), None)


def detect(text: str) -> str:
    """Guess the code of a text's language; English where nothing speaks for another."""
    scripts = Counter(script for script in map(_script, text) if script)
    if not scripts:
        return "en"
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    han = scripts["CJK"]
    if kana and kana >= _KANA_SHARE * (kana + han):
        scripts = scripts - Counter({"CJK": han}) + Counter({"HIRAGANA": han})
    script = scripts.most_common(1)[0][0]
    if script == "LATIN":
        return _latin(text)
    if script in _SHARED:
        return _by_letters(text, _SHARED[script])
    return _SCRIPTS.get(script, "en")


def pair(source: str, target: str, text: str) -> tuple[Language, Language]:
    """Settle which language becomes which.

    A source of ``auto`` is guessed. Where it turns out to be the target, the target becomes its
    counterpart: English for everything but English, which goes to Japanese.
    """
    guessed = detect(text) if source == AUTO else source
    if guessed == target and source == AUTO:
        target = "ja" if guessed == "en" else "en"
    return known()[guessed], known()[target]


@cache
def _script(letter: str) -> str:
    """Return the first word of a letter's Unicode name, which is its script; empty for others."""
    if not letter.isalpha():
        return ""
    return unicodedata.name(letter, "").partition(" ")[0]


def _latin(text: str) -> str:
    """One frequent word alone proves nothing: "a" is English, and Hungarian for "the"."""
    words = Counter(re.findall(r"\w+", text.casefold()))
    scores = {
        one.code: sum(words[word] for word in one.words.split())
        for one in known().values()
        if one.words
    }
    best = max(scores, key=lambda code: scores[code])
    return best if scores[best] > max(scores["en"], 1) else "en"


def _by_letters(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    *special, (usual, _) = rules
    return next((code for code, only in special if any(letter in text for letter in only)), usual)
