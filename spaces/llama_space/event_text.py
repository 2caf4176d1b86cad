"""Writes the loader's events and the engine's progress as lines of text. Has no side effects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from llama_loader.errors import without_secrets
from llama_loader.events import Downloading, Note, Resolving, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llama_loader.events import Event
    from llama_space.values import Progress

ENGLISH: Final[Mapping[str, str]] = {
    "resolving": "reading {url}",
    "downloading": "downloading {name}: {amount}",
    "unpacking": "unpacking {name}: {amount}",
    "share": "{done} of {total} ({share})",
    "so_far": "{line} ({seconds} s)",
    "prepare": "preparing",
    "queue": "ZeroGPU lends a GPU as soon as one is free",
    "start": "starting llama-server",
    "load": "llama-server loads the model",
    "restart": "llama-server is started anew",
    "waiting": "waiting for words",
}
"""What the lines are made of. A page in another language has texts of its own by these names."""
_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def progress(one: Progress, forms: Mapping[str, str] = ENGLISH) -> str:
    """Return one line about what is being waited for; seconds are left out below one."""
    line = forms[one.stage] if one.event is None else event(one.event, forms)
    return forms["so_far"].format(line=line, seconds=int(one.seconds)) if one.seconds >= 1 else line


def event(one: Event, forms: Mapping[str, str] = ENGLISH) -> str:
    """Return one line about an event."""
    if isinstance(one, Resolving):
        return forms["resolving"].format(url=without_secrets(one.url))
    if isinstance(one, Note):
        return without_secrets(f"{one.code}: {one.message}{one.hint and f'; {one.hint}'}")
    if isinstance(one, Stage):
        return f"{one.name}: {one.seconds:.1f} s"
    amount = size(one.done)
    if one.total:
        share = f"{one.done / one.total:.0%}"
        amount = forms["share"].format(done=amount, total=size(one.total), share=share)
    kind = "downloading" if isinstance(one, Downloading) else "unpacking"
    return forms[kind].format(name=one.name, amount=amount)


def plain(one: Event) -> Event:
    """Return the event without secrets, so that a page may show it."""
    if isinstance(one, Resolving):
        return Resolving(without_secrets(one.url))
    if isinstance(one, Note):
        return Note(one.code, without_secrets(one.message), without_secrets(one.hint))
    return one


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
