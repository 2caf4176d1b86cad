"""Text files and subtitles: what to translate in them, and how they are written back. Pure.

A file comes and goes as bytes in base64, in the encoding and with the line ends that it came with;
nothing is written to a disk. Of subtitles (``.srt``, ``.vtt``) only the words are translated:
numbers, times, notes and styles stay. Of every file the lines stay: ``pieces`` gives each line of a
text one line of the answer.
"""

from __future__ import annotations

import base64
import codecs
import re
import unicodedata
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from translator.texts import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS: Final = (".txt", ".md", ".srt", ".vtt")
_SUBTITLES: Final = (".srt", ".vtt")
_ENCODINGS: Final = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by the mark at a file's beginning; without a mark it is UTF-8."""
_LONGEST_NAME: Final = 80
_LAYOUT: Final = frozenset("\t\n\r\f\ufeff\u200c\u200d\u200e\u200f")
"""Control and format characters that texts have: the last ones join letters and turn directions."""
_ARROW: Final = "-->"


@dataclass(frozen=True)
class Document:
    """A file that was read.

    Attributes:
        name: without folders, as it may be shown.
        encoding: of its bytes.
        lines: with their line ends.
        worded: which of the lines are to be translated, in order.
    """

    name: str
    encoding: str
    lines: tuple[str, ...]
    worded: tuple[int, ...]

    @property
    def text(self) -> str:
        """What is to be translated; an empty line separates two subtitles."""
        return "\n".join(
            "" if at is None else self.lines[at].rstrip("\r\n") for at in self._order()
        )

    def written(self, answer: str) -> str:
        """Return the file's bytes in base64, with the answer to ``text`` in place of its words."""
        lines = list(self.lines)
        for at, told in zip(self._order(), answer.split("\n"), strict=False):
            if at is None:
                continue
            words = lines[at].rstrip("\r\n")
            made = told
            if self.name.lower().endswith(_SUBTITLES):  # an empty line or an arrow would break it
                made = told.replace(_ARROW, "→") if told.strip() else words
            lines[at] = made + lines[at][len(words) :]
        return base64.b64encode("".join(lines).encode(self.encoding, "replace")).decode()

    def _order(self) -> Iterator[int | None]:
        """Yield the numbers of the lines to be translated, None for a gap between them."""
        for before, at in zip((None, *self.worded), self.worded, strict=False):
            if before is not None and at > before + 1:
                yield None
            yield at

    def renamed(self, code: str) -> str:
        """Return the name of its translation: ``film.srt`` becomes ``film.ja.srt``."""
        stem, dot, kind = self.name.rpartition(".")
        return f"{stem}.{code}{dot}{kind}"


def read(name: str, content: str, max_chars: int) -> Document | Refusal:
    """Read a file; refuse one that is too large, of another kind, no text, or has no words.

    Args:
        name: on the visitor's machine; its ending decides the kind.
        content: its bytes in base64; ``guard`` and the browser bound them.
        max_chars: the most characters that are to be translated.
    """
    shown = _plain_name(name)
    kind = next((one for one in KINDS if shown.lower().endswith(one)), None)
    if kind is None:
        return Refusal("file_kind", {"kinds": ", ".join(KINDS)})
    try:
        data = base64.b64decode(content, validate=True)
        marked = (name for mark, name in _ENCODINGS.items() if data.startswith(mark))
        text = data.decode(encoding := next(marked, "utf-8"))
    except ValueError:
        return Refusal("file_not_text")
    if any(map(_is_control, text)):
        return Refusal("file_not_text")
    # at line feeds alone: a lone carriage return is part of a line
    lines = tuple(re.findall(r"[^\n]*\n|[^\n]+", text))
    worded = _cues(lines) if kind in _SUBTITLES else tuple(range(len(lines)))
    made = Document(shown, encoding, lines, worded)
    if not any(map(str.isalpha, made.text)):
        return Refusal("file_no_words")
    large = Refusal("file_large", {"limit": f"{max_chars:,}"})
    return large if len(made.text) > max_chars else made


def _is_control(letter: str) -> bool:
    return letter not in _LAYOUT and unicodedata.category(letter) in {"Cc", "Cf", "Cs"}


def _cues(lines: tuple[str, ...]) -> tuple[int, ...]:
    """Return the numbers of the lines between a line with times and the next empty line."""
    inside, found = False, []
    for number, line in enumerate(lines):
        if not line.strip():
            inside = False
        elif _ARROW in line:
            inside = True
        elif inside:
            found.append(number)
    return tuple(found)


def _plain_name(name: str) -> str:
    """Return a file's name without folders, and without characters that names cannot have."""
    last = name.replace("\\", "/").rpartition("/")[2]
    kept = [one for one in islice(last, 1000) if one.isalnum() or one in " ._-()"]
    stem, dot, kind = "".join(kept).rpartition(".")
    return f"{(stem.strip(' .') or 'text')[:_LONGEST_NAME]}{dot}{kind}"
