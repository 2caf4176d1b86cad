"""What happens while a release is fetched, as plain frozen data.

A terminal, a Gradio bar and a log show the same events: the work prints nothing, it calls a
``Sink``. A sink that raises ``KeyboardInterrupt`` ends the work, which cleans up as after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from llama_loader.errors import without_secrets

ENGLISH: Final[Mapping[str, str]] = {
    "resolving": "reading {url}",
    "downloading": "downloading {name}: {amount}",
    "unpacking": "unpacking {name}: {amount}",
    "share": "{done} of {total} ({share})",
}
"""What ``line`` is made of. A page in another language has texts of its own by these names."""
_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


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


def line(one: Event, forms: Mapping[str, str] = ENGLISH) -> str:
    """Return one line about an event, without secrets."""
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


def size(count: int) -> str:
    """Return a number of bytes with three digits and a unit."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def ignore(event: Event) -> None:
    """Take an event and do nothing."""
    del event


class Timeline:
    """What the way to the first token cost, in the order of the work.

    The stages are resolve (facts, manifest, choice), fetch, unpack, verify, devices, start (until
    the model is loaded) and first token. A stage that was not needed is not there.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; an error in it leaves no stage."""
        began = time.monotonic()
        yield
        self.add(name, time.monotonic() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add a stage that was timed elsewhere."""
        self.stages.append(Stage(name, seconds))

    def listening(self, sink: Sink) -> Sink:
        """Return a sink that keeps the stages that it is told of, and passes everything on."""

        def take(event: Event) -> None:
            if isinstance(event, Stage):
                self.stages.append(event)
            sink(event)

        return take
