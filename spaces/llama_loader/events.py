"""What happens while a release is fetched, as plain frozen data.

A terminal, a Gradio bar and a log show the same events; nobody prints in the middle of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Resolving:
    """A manifest is being read."""

    url: str


@dataclass(frozen=True)
class Downloading:
    """``done`` of ``total`` bytes are here and verified; ``total`` is None where not known."""

    name: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Unpacking:
    """``done`` of ``total`` unpacked bytes are written and verified."""

    name: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Stage:
    """A stage of an installation took ``seconds``; ``size`` bytes went through it."""

    name: str
    seconds: float
    size: int | None = None


@dataclass(frozen=True)
class Note:
    """Something that a person should know: not as asked, or not verified."""

    code: str
    message: str
    hint: str = ""


Event = Resolving | Downloading | Unpacking | Stage | Note
Sink = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Take an event and do nothing."""
    del event
