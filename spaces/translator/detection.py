"""Guess which language a text is in: by its script, else by the library ``eld`` and known words.

Hangul, Greek, Thai and ten more scripts stand for one language. Japanese and Chinese are told apart
by kana and by which characters each of the two writes. For the rest ``eld`` compares groups of
letters. It detects neither Indonesian, Swahili nor Zulu, and few greetings: the frequent words
of ``languages.json`` count beside its score.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final

from translator import languages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from translator.languages import Language

_LOOKED_AT: Final = 2000
"""Characters: the beginning of a text shows its language, and a longer text costs no more."""
_WORD, _PART = 0.8, 0.6
"""What a known word and a typical group of letters weigh beside eld's 0 to 1."""
_KANA_SHARE: Final = 0.05
"""Minimum share of kana in Japanese letters; a name in kana in a Chinese text is less."""
_LEVEL_1: Final = (b"\x88\x9f", b"\x98\x72")
"""The 2,965 characters of modern Japanese in Shift JIS, from the first to the last."""
_ONLY_CHINESE: Final = "我吃吗嗎喝妳"
"""Characters of that level, and others, that stand alone in Chinese but hardly in Japanese."""
_LONGEST_OF_KANJI: Final = 8
"""Characters of Japanese without kana: a name, a place, a heading."""
_CERTAIN: Final = 0.6
"""The confidence from which a sentence may turn the page's automatic target round."""
_SHORT: Final = 2
"""Words of a text that shows too few groups of letters to count them."""


@dataclass(frozen=True)
class Guess:
    """A language's code, and how likely it is against the next one: 0 for no letters, at most 1."""

    code: str
    confidence: float


def detect(text: str) -> Guess:
    """Guess the language of a text; English with confidence 0 if there is no evidence."""
    ranked = _ranked(text)
    return ranked[0] if ranked else Guess("en", 0.0)


def pair(
    source: str, target: str, text: str, *, automatic: bool = False
) -> tuple[Language, Language]:
    """Settle which language becomes which.

    Args:
        source: a code, or ``auto`` to have it detected.
        target: a code.
        text: what is to be translated.
        automatic: the visitor did not choose the target. A text certain to be in it goes to its
            counterpart: English for all languages but English, which goes to Japanese. A single
            word is too little for that. A target that was chosen is never replaced.
    """
    ranked = _ranked(text) if source == languages.AUTO else [Guess(source, 1.0)]
    guess = ranked[0] if ranked else Guess("en", 0.0)
    if guess.code == target and source == languages.AUTO:
        others = [one for one in ranked if one.code != target]
        if others and not (guess.confidence >= _CERTAIN and _length(text) > 1):
            guess = others[0]  # one word to be put into English is most likely not English
        elif automatic:
            target = "ja" if target == "en" else "en"
    return languages.known()[guess.code], languages.known()[target]


def _length(text: str) -> int:
    """Count words; in scripts without spaces a word has about three characters."""
    words = _words(text)
    return max(len(words), sum(map(len, words)) // 3 if not text.isascii() else 0)


def _ranked(text: str) -> list[Guess]:
    """Return the languages that a text may be in, the likeliest first; none without letters."""
    written = unicodedata.normalize("NFC", text[:_LOOKED_AT])
    text = " ".join(word for word in written.split() if "://" not in word and "@" not in word)
    scripts = Counter(script for script in map(_script, text) if script)
    if not scripts:
        return []
    kana, han = scripts["HIRAGANA"] + scripts["KATAKANA"], scripts["CJK"]
    if kana and kana >= _KANA_SHARE * (kana + han):
        scripts = scripts - Counter({"CJK": han}) + Counter({"HIRAGANA": han})
    script, count = scripts.most_common(1)[0]
    written_in = [one for one in languages.rows() if script in one.script.split()]
    if len(written_in) > 1:
        return _compared(text, written_in)
    code = _han(text) if script == "CJK" else next((one.code for one in written_in), "")
    return [Guess(code, count / scripts.total())] if code else []


@lru_cache(maxsize=10_000)
def _script(letter: str) -> str:
    """Return the first word of a letter's Unicode name, which is its script; empty for others."""
    if not letter.isalpha():
        return ""
    return unicodedata.name(letter, "").partition(" ")[0]


def _compared(text: str, inside: list[Language]) -> list[Guess]:
    """Rank the languages of one script, the most usual first, by all evidence."""
    words = _words(text)
    eld: Mapping[str, float] = _detector().detect(text).scores() or {}
    scores = {one.code: eld.get(one.eld or one.code, 0.0) for one in inside}
    for word in words:
        sharing = scores.keys() & _lexicon().get(word, ())
        for code in sharing:
            scores[code] += _WORD / len(words) / len(sharing)
    for one in inside:
        if one.parts and len(words) > _SHORT:
            typical = sum(any(part in word for part in one.parts.split()) for word in words)
            scores[one.code] += _PART * typical / len(words)
    if not any(scores.values()):
        return [Guess(code, 0.0) for code in scores]
    first, second, *_ = ranked = sorted(scores, key=lambda code: -scores[code])
    sure = scores[first] / (scores[first] + scores[second])
    return [Guess(code, sure if code == first else 1 - sure) for code in ranked]


@cache
def _detector() -> Any:
    """Load eld's table once: a tenth of a second, and 50 MB of memory."""
    from eld import LanguageDetector  # noqa: PLC0415 - only the first text needs it

    return LanguageDetector()


@cache
def _lexicon() -> Mapping[str, tuple[str, ...]]:
    """Return the codes of the languages in which a word is frequent."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for one in languages.known().values():
        for word in one.words.split():
            found[word].append(one.code)
    return {word: tuple(codes) for word, codes in found.items()}


def _words(text: str) -> list[str]:
    """Split at everything that is neither a letter, a mark on one, nor an apostrophe."""
    text = text[:_LOOKED_AT].lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    kept = (one if one == "'" or unicodedata.category(one)[0] in "LM" else " " for one in text)
    return [word for part in "".join(kept).split() if (word := part.strip("'"))]


def _han(text: str) -> str:
    """Tell Japanese and both ways to write Chinese apart, by how many characters each one has."""
    for word in _words(text)[:1]:
        if word in _lexicon():
            return _lexicon()[word][0]
    letters = [letter for letter in text if _script(letter) == "CJK"]
    japanese = chinese = simplified = 0
    for letter in letters:
        modern = _LEVEL_1[0] <= letter.encode("shift_jis", "replace") <= _LEVEL_1[1]
        mainland, taiwan = (letter.encode(one, "ignore") != b"" for one in ("gb2312", "big5"))
        japanese += modern and not (mainland or taiwan)
        chinese += letter in _ONLY_CHINESE or not modern
        simplified += mainland - taiwan
    if japanese > chinese or (not chinese and len(letters) <= _LONGEST_OF_KANJI):
        return "ja"
    return "zh-Hans" if simplified >= 0 else "zh-Hant"
