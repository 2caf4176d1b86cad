"""The commands that stand in the documentation, as a reader would type them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted(
    str(path.relative_to(PROJECT))
    for path in (
        *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "spaces/README.md")),
        *(PROJECT / "docs").rglob("*.md"),
    )
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"\s+# (.*)$")


@dataclass(frozen=True)
class Command:
    """One command, without the comment behind it."""

    page: str
    text: str
    comment: str = ""


def fences(page: str) -> Iterator[tuple[str, str]]:
    """Return the language and the text of every fenced block."""
    for match in _FENCE.finditer((PROJECT / page).read_text("utf-8")):
        yield match[1], match[2]


def commands(page: str) -> list[Command]:
    """Return the commands of a page in order; lines without a prompt are what they print."""
    found = []
    for language, text in fences(page):
        if language != "console":
            continue
        for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
            if line.startswith("$ "):
                comment = _COMMENT.search(line)
                command = _COMMENT.sub("", line[2:]).strip()
                found.append(
                    Command(page, re.sub(r" +", " ", command), comment[1] if comment else "")
                )
    return found


def in_sentences(page: str) -> Iterator[tuple[str, set[str]]]:
    """Return the verbs of invoke that a page's sentences name, each with its long options."""
    text = _FENCE.sub("", (PROJECT / page).read_text("utf-8"))
    for match in re.finditer(r"`(?:[A-Z_]+=\S+ )?invoke ([a-z][a-z-]*)([^`]*)`", text):
        yield match[1], set(re.findall(r"--[a-z][a-z0-9-]*", match[2]))
