"""The loader's events as lines of text, for a page and a log. Has no side effects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_loader.errors import without_secrets
from llama_loader.events import Downloading, Note, Resolving, Stage, Unpacking

if TYPE_CHECKING:
    from llama_loader.events import Event

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def event(one: Event) -> str:
    """Return one line about an event."""
    if isinstance(one, Resolving):
        return f"reading {without_secrets(one.url)}"
    if isinstance(one, Downloading):
        return f"downloading {one.name}: {_progress(one.done, one.total)}"
    if isinstance(one, Unpacking):
        return f"unpacking {one.name}: {_progress(one.done, one.total)}"
    if isinstance(one, Stage):
        through = f" ({size(one.size)})" if one.size else ""
        return f"{one.name}: {one.seconds:.1f} s{through}"
    return note(one)


def plain(one: Note) -> Note:
    """Return the note without secrets, so that a page may show it."""
    return Note(one.code, without_secrets(one.message), without_secrets(one.hint))


def note(one: Note) -> str:
    """Return one line about a note, with its hint."""
    hint = f"; {one.hint}" if one.hint else ""
    return without_secrets(f"{one.code}: {one.message}{hint}")


def about(one: Event) -> str:
    """Return what an event is about: a later event about the same replaces it on a page."""
    name = getattr(one, "name", "") or getattr(one, "code", "")
    return f"{type(one).__name__} {name}"


def size(count: int) -> str:
    """Return a number of bytes with three digits and a unit."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def _progress(done: int, total: int | None) -> str:
    if not total:
        return size(done)
    return f"{size(done)} of {size(total)} ({done / total:.0%})"
