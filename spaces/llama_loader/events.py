"""What happens while a release is fetched, as plain frozen data.

A terminal, a Gradio bar and a log show the same events: the work prints nothing, it calls a
``Sink``. A sink that raises ``KeyboardInterrupt`` ends the work, which cleans up as after Ctrl-C.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from llama_loader.errors import safe, sentence, without_secrets

_STEPS: Final = 10_000
"""Steps of a download, each of which is one event."""
_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class Downloading:
    """``done`` of ``total`` bytes are here and verified; ``total`` is None where not known."""

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
    """Something that a person should know: not as asked, or not verified; lines without secrets."""

    code: str
    message: str
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("message", "hint"):
            object.__setattr__(self, name, safe(getattr(self, name)))

    @classmethod
    def of(cls, code: str, **values: object) -> "Note":
        """Return the note with the words of a code, as ``LoaderError`` has them."""
        return cls(*sentence(code, "", values))


Event = Downloading | Stage | Note
Sink = Callable[[Event], None]


def line(one: Event) -> str:
    """Return one line about an event, without secrets."""
    if isinstance(one, Note):
        return f"{one.code}: {one.message}{one.hint and f'; {one.hint}'}"
    if isinstance(one, Stage):
        return f"{one.name}: {one.seconds:.1f} s"
    amount = size(one.done)
    if one.total:
        amount = f"{amount} of {size(one.total)} ({one.done / one.total:.0%})"
    return f"downloading {without_secrets(one.name)}: {amount}"


def size(count: int) -> str:
    """Return a number of bytes with three digits and a unit."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def summed(stages: Iterable[Stage]) -> tuple[tuple[str, float], ...]:
    """Return the seconds of stages, those of one name added up, in the order of their first."""
    seconds: dict[str, float] = {}
    for one in stages:
        seconds[one.name] = seconds.get(one.name, 0.0) + one.seconds
    return tuple((name, round(took, 4)) for name, took in seconds.items())


def ignore(event: Event) -> None:
    """Take an event and do nothing."""
    del event


class Timeline:
    """A sink that keeps what the way to the first token cost, in the order of the work.

    Of a download it passes on steps of a ten-thousandth: a server may send it byte by byte, and
    who listens may keep what it hears. The stages are resolve (facts, manifest, choice), fetch,
    unpack, verify, devices, start (until the model is loaded) and first token. A stage that was not
    needed is not there.
    """

    def __init__(self, sink: Sink = ignore) -> None:
        self.stages: list[Stage] = []
        self._told: Downloading | None = None
        self._pass_on = sink

    def __call__(self, event: Event) -> None:
        """Keep a stage; pass on what is news."""
        if isinstance(event, Downloading):
            told, self._told = self._told, event
            if told is not None and told.name == event.name and event.done >= told.done:
                step, whole = event.done - told.done, event.total or event.done
                if not step or (step * _STEPS < whole and event.done != event.total):
                    self._told = told  # too small a step to be seen
                    return
        if isinstance(event, Stage):
            self.stages.append(event)
        self._pass_on(event)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; an error in it leaves no stage."""
        began = time.monotonic()
        yield
        self(Stage(name, time.monotonic() - began))
