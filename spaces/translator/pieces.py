"""Cut a text into pieces that fit a context, and put the answers into the text's form. Pure.

A text is cut at paragraphs, long paragraphs at lines, long lines at sentences. What no model should
touch stays out of the pieces or is put back around the answers: line breaks, indentation, the marks
of lists, headings and tables, and code. Texts come from outside: each regular expression takes time
in proportion to the text, because its alternatives begin with different letters or are bounded.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FENCES: Final = ("```", "~~~")
_HEAD: Final = re.compile(
    r"(?:\s|[-*+•◦▪–](?=\s|$)|[>|・]|\[[ xX]\]|#{1,7}(?=\s)|\d{1,4}[.)](?=\s))*"
)
"""The indentation and marks before a line's words: of lists, quotes, tables, tasks, headings."""
_CODE: Final = ("{", "}", "();", "()", " = ", "==", "=>", "->", "</", "/>")
"""An indented line after an empty one is code if it contains one of these."""
_INDENTED: Final = ("    ", "\t")
_END: Final = re.compile(
    r"[。！？…｡．][。！？…｡．\"')\]」』）”’»]*|[.!?;:؟۔][\"')\]」』）”’»]*(?=\s)|\n"
)
"""The end of a sentence, with its closing marks: most scripts put a space behind it."""
_LINK: Final = re.compile(r"(?:https?://|www\.|mailto:)[^\s<>\"'`)\]}」』）、。，]*")
_KEPT: Final = re.compile(
    r"`[^`]*`|`"
    r"|<(?![ <=0-9])[^>]{0,80}>|\{\\[^}]{0,80}\}"  # tags, in subtitles also {\an8}
    rf"|{_LINK.pattern}"
    r"|\]\([^)]{0,2000}\)|\*\*|__|~~|!\[|\]\(|[\[*|]"
)
"""Code, tags, links and marks inside a line."""
_ASCII_COST, _OTHER_COST = 1, 3
TOKEN: Final = 3
"""Weight of a token: three letters of English, or one character of most other scripts."""


@dataclass(frozen=True)
class Slice:
    """A part of a text; one that is ``kept`` is not translated."""

    text: str
    kept: bool = False


@dataclass(frozen=True)
class _Line:
    """A line: the text to translate, and the characters before and after it."""

    head: str
    body: str
    tail: str
    code: bool = False

    @property
    def text(self) -> str:
        return self.head + self.body + self.tail


def weight(text: str) -> int:
    """Estimate from above what a text takes of a context, in thirds of a token."""
    return sum(_ASCII_COST if letter.isascii() else _OTHER_COST for letter in text)


def cut(text: str, most: int, *, by_line: bool = False) -> list[Slice]:
    """Return the pieces of a text; joined they are the text.

    Args:
        text: a text of any kind.
        most: the weight that no piece to translate exceeds; at least that of a character.
        by_line: no piece has more than one line.
    """
    made: list[Slice] = []
    group: list[_Line] = []
    held = 0
    for unit in _units(_lines(text), most, by_line=by_line):
        heavy = sum(weight(line.text) for line in unit)
        if group and (by_line or unit[0].code != group[0].code or held + heavy > most):
            made += _pieces(group, most)
            group, held = [], 0
        group += unit
        held += heavy
    return made + _pieces(group, most)


def finer(text: str) -> list[Slice]:
    """Cut a piece whose answer lost its form: at its lines, else at the marks inside its line.

    Returns:
        Nothing where it cannot be cut any further.
    """
    lines = _lines(text)
    if len(lines) > 1:
        return [piece for line in lines for piece in _of_line(line)]
    parts = [part for part in _spans(text) if part.text]
    return parts if len(parts) > 1 else []


def faithful(source: str, answer: str) -> bool:
    """Tell whether an answer has as many lines as its source, and the links and marks in them."""
    asked, told = _bodies(source), _bodies(answer)
    if len(asked) != len(told):
        return False
    return not _marks(asked) - _marks(told)


def mended(source: str, answer: str) -> str:
    """Return an answer with the line breaks, indentation and marks of its source's lines.

    An answer with another number of lines becomes one line.
    """
    told = _bodies(answer)
    # its first line is no block of code: what it follows in the text is another piece
    start = len(source) - len(source.lstrip())
    lines = _lines(source[start:])
    if len(told) != sum(bool(line.body) for line in lines):
        return " ".join(answer.split())
    bodies = iter(told if len(lines) > 1 else [" ".join(answer.split())])
    return source[:start] + "".join(
        line.head + next(bodies) + line.tail if line.body else line.text for line in lines
    )


def context(source: str, answer: str, most: int) -> tuple[str, str] | None:
    """Return the last sentences of a piece and of its answer, to be shown before the next piece.

    Two of each where both have as many, else one; None where they are heavier than ``most``.
    """
    asked, told = _sentences(source), _sentences(answer)
    count = 2 if len(asked) == len(told) > 1 else 1
    pair = "".join(asked[-count:]).strip(), "".join(told[-count:]).strip()
    return pair if all(pair) and weight("".join(pair)) <= most else None


def _units(lines: list[_Line], most: int, *, by_line: bool) -> Iterator[list[_Line]]:
    """Yield what is not cut unless it must be: paragraphs with the empty lines after them."""
    unit: list[_Line] = []
    for line in lines:
        ended = bool(unit) and not unit[-1].text.strip() and bool(line.text.strip())
        if unit and (ended or by_line or line.code != unit[-1].code):
            yield from _bounded(unit, most)
            unit = []
        unit.append(line)
    yield from _bounded(unit, most)


def _bounded(unit: list[_Line], most: int) -> Iterator[list[_Line]]:
    if sum(weight(line.text) for line in unit) > most:
        yield from ([line] for line in unit)
    elif unit:
        yield unit


def _pieces(group: list[_Line], most: int) -> list[Slice]:
    """Return a block between what is kept before and after it; a heavy line becomes several."""
    with_words = [number for number, line in enumerate(group) if line.body]
    if not with_words or group[0].code:
        return [Slice(whole, kept=True)] if (whole := _joined(group)) else []
    first, last = with_words[0], with_words[-1]
    before, after = _joined(group[:first]), _joined(group[last + 1 :])
    if first == last:
        inside = _of_line(group[first], most)
    else:
        block = _joined(group[first:last]) + group[last].head + group[last].body
        inside = [Slice(block), Slice(group[last].tail, kept=True)]
    around = [Slice(before, kept=True), *inside, Slice(after, kept=True)]
    return [piece for piece in around if piece.text]


def _joined(lines: Iterable[_Line]) -> str:
    return "".join(line.text for line in lines)


def _of_line(line: _Line, most: int | None = None) -> list[Slice]:
    portions = [line.body] if most is None else _portions(line.body, most)
    words = [part for one in portions for part in _trimmed(one)]
    around = [Slice(line.head, kept=True), *words, Slice(line.tail, kept=True)]
    return [piece for piece in around if piece.text]


def _trimmed(text: str) -> list[Slice]:
    """Keep the spaces around a text out of what is translated."""
    if not _has_words(text):
        return [Slice(text, kept=True)]
    head, tail = len(text) - len(text.lstrip()), len(text.rstrip())
    return [Slice(text[:head], kept=True), Slice(text[head:tail]), Slice(text[tail:], kept=True)]


def _has_words(text: str) -> bool:
    return any(map(str.isalpha, text))


def _lines(text: str) -> list[_Line]:
    made: list[_Line] = []
    fence = ""
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if fence or bare.startswith(_FENCES):
            made.append(_Line(line, "", "", code=True))
            closes = bare.startswith(fence) and not bare.strip(fence[:1])
            fence = bare[:3] if not fence else "" if closes else fence
        elif _is_indented_code(line, made):
            made.append(_Line(line, "", "", code=True))
        else:
            made.append(_parsed(line))
    return made


def _is_indented_code(line: str, before: list[_Line]) -> bool:
    follows = not before or before[-1].code or not before[-1].text.strip()
    return follows and line.startswith(_INDENTED) and any(one in line for one in _CODE)


def _parsed(line: str) -> _Line:
    """Split off the indentation and marks before a line's words, and the space after them."""
    end = len(line.rstrip())
    if line[:end].endswith("|"):
        end = len(line[: end - 1].rstrip())
    found = _HEAD.match(line, 0, end)
    start = found.end() if found else 0
    head, body, tail = line[:start], line[start:end], line[end:]
    if not _has_words(body) or (_LINK.match(body) and len(body.split()) == 1):
        return _Line(line, "", "")
    return _Line(head, body, tail)


def _bodies(text: str) -> list[str]:
    return [line.body for line in _lines(text.strip()) if line.body]


def _marks(bodies: Iterable[str]) -> Counter[str]:
    return Counter(mark for body in bodies for mark in _KEPT.findall(body))


def _spans(line: str) -> Iterator[Slice]:
    """Yield a line's words apart from the links, code and marks between them."""
    start = 0
    for found in _KEPT.finditer(line):
        yield from _trimmed(line[start : found.start()])
        yield Slice(found[0], kept=True)
        start = found.end()
    yield from _trimmed(line[start:])


def _portions(text: str, most: int) -> Iterator[str]:
    """Cut a line at the last sentence that fits, else at the last space, else anywhere."""
    ends = {found.end() for found in _END.finditer(text)}
    start = sentence = space = held = 0
    for index, letter in enumerate(text):
        sentence = index if index in ends else sentence
        space = index if letter.isspace() else space
        held += weight(letter)
        if held > most:
            end = next((one for one in (sentence, space) if one > start), index)
            yield text[start:end]
            start, held = end, weight(text[end : index + 1])
    yield text[start:]


def _sentences(text: str) -> list[str]:
    ends = [found.end() for found in _END.finditer(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if text[a:b]]
