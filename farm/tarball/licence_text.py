"""Licence texts: which SPDX licence a text is, and which text stands in a file's comments.

Pure. Only what llama.cpp and its vendored parts carry is recognised; of anything else the answer
is that it is not known, never a guess.
"""

from __future__ import annotations

import re
from typing import Final

PUBLIC_DOMAIN: Final = "LicenseRef-public-domain"
"""SPDX has no identifier for a mere dedication; ``LicenseRef-`` names one of our own."""

_SPDX_LINE: Final = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+() -]*[A-Za-z0-9.+)])")
_MIT_GRANT: Final = "permission is hereby granted, free of charge"
_MIT_NOTICE: Final = "the above copyright notice and this permission notice shall be included in"
_PHRASES: Final = (
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("BSD-3-Clause", ("redistributions in binary form must reproduce", "neither the name")),
    ("BSD-2-Clause", ("redistributions in binary form must reproduce",)),
    ("BSL-1.0", ("boost software license - version 1.0",)),
    ("MIT", (_MIT_GRANT, _MIT_NOTICE)),
    ("MIT-0", (_MIT_GRANT,)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    (PUBLIC_DOMAIN, ("public domain",)),
)
"""Words that a licence's text always has."""
_EXCLUDING: Final = (
    ("BSD-3-Clause", "BSD-2-Clause"),
    ("MIT", "MIT-0"),
    ("Unlicense", PUBLIC_DOMAIN),
)
"""Where a text has the words of both, it is the first."""

_BLOCK_COMMENT: Final = re.compile(r"/\*.*?\*/", re.DOTALL)
_LINE_COMMENTS: Final = re.compile(r"(?:^[ \t]*//[^\n]*\n)+", re.MULTILINE)
_MARKS: Final = re.compile(r"^[ \t]*(?:/\*+|\*+/|//+|\*+) ?|\*+/[ \t]*$", re.MULTILINE)
_ENDS: Final = 16_384
"""Characters at each end of a file in which its licence is looked for; stb's fills 3,000."""


def identify(text: str) -> str | None:
    """Return the SPDX expression of a licence text, None where it is not known.

    A text that offers several licences gives them joined by ``OR``.
    """
    words = " ".join(_MARKS.sub(" ", text).lower().split())
    found = [name for name, phrases in _PHRASES if all(phrase in words for phrase in phrases)]
    for first, second in _EXCLUDING:
        if first in found and second in found:
            found.remove(second)
    return " OR ".join(found) or None


def declared(source: str) -> str | None:
    """Return what a source file's ``SPDX-License-Identifier`` says, None where it has none."""
    match = _SPDX_LINE.search(source[:_ENDS])
    return match[1].strip() if match else None


def in_comments(source: str) -> str | None:
    """Return the licence text in the comments at a source file's two ends, None without one.

    Comment marks are taken off; the words stay as they are. A licence's text goes before a mere
    mention of the public domain.
    """
    ends = (source,) if len(source) <= 2 * _ENDS else (source[:_ENDS], source[-_ENDS:])
    comments = [
        comment
        for end in ends
        for pattern in (_BLOCK_COMMENT, _LINE_COMMENTS)
        for comment in pattern.findall(end)
    ]
    known = [comment for comment in comments if identify(comment)]
    known.sort(key=lambda comment: identify(comment) == PUBLIC_DOMAIN)
    return _without_marks(known[0]) if known else None


def _without_marks(comment: str) -> str:
    lines = [line.rstrip() for line in _MARKS.sub("", comment).strip("\n").split("\n")]
    return "\n".join(lines).strip() + "\n"
