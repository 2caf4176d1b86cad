"""One translation, from what a person asked for to what is shown: checks, prompt, pieces."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Protocol, Union

from llama_loader import gguf_header, model
from llama_space.values import Failure, Figures, Piece, Progress
from llama_space.worker import BEAT
from translator import detection, prompt
from translator.line import FullError, Line

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from llama_loader.doctor import Examination
    from llama_loader.settings import Settings
    from llama_space.values import Item, Status
    from translator.languages import Language

_SHOW_EVERY: Final = 0.04
"""Seconds. More than 25 updates in a second nobody sees; the first is shown at once."""


class Engine(Protocol):
    """What the page asks of an engine: ``llama_space.Engine``, or one that refuses."""

    def status(self) -> Status:
        """Return what is known now."""

    def retry(self) -> None:
        """Prepare again after a failure."""

    def events(
        self, asked: Sequence[Mapping[str, Any]] | str, **options: Any
    ) -> Generator[Item, None, None]:
        """Stream an answer; closing the generator stops it."""

    def doctor(self) -> Examination:
        """Return the doctor's report."""

    def close(self) -> None:
        """End the server."""


@dataclass(frozen=True)
class Job:
    """What a person asked for.

    Attributes:
        source: a code, or ``auto``.
        target: a code.
        automatic: the target is nobody's choice, and a text that is in it may turn it round.
    """

    text: str
    source: str
    target: str
    automatic: bool = False

    def pair(self) -> tuple[Language, Language]:
        """Return source and target."""
        return detection.pair(self.source, self.target, self.text, automatic=self.automatic)


@dataclass(frozen=True)
class InLine:
    """Others are before this visitor; ``place`` 1 is the next whose turn it is."""

    place: int


@dataclass(frozen=True)
class Answer:
    """The translation so far; ``last`` is the newest piece, None before the first."""

    text: str
    source: Language
    target: Language
    last: Piece | None


@dataclass(frozen=True)
class Refusal:
    """The job cannot be done as it is; ``name`` is that of the words in ``texts.json``."""

    name: str
    values: Mapping[str, object] = field(default_factory=dict)


Update = Union[Progress, InLine, Answer, Refusal, Failure]  # noqa: UP007 - evaluated on 3.10 too


def refusal(job: Job, max_chars: int) -> Refusal | None:
    """Say what is wrong with a job; None for nothing. Pure."""
    if not job.text.strip():
        return Refusal("nothing")
    if len(job.text) > max_chars:
        return Refusal("too_long", {"count": len(job.text), "limit": max_chars})
    source, target = job.pair()
    return Refusal("same", {"language": source.native}) if source == target else None


def translate(
    engine: Engine, settings: Settings, job: Job, line: Line | None = None
) -> Generator[Update, None, None]:
    """Translate; the last update is a finished answer, a refusal or a failure.

    Closing the iterator stops the generation. ``line`` is where the job waits for its turn, None
    where nobody else asks.
    """
    refused = refusal(job, settings.max_chars)
    if refused:
        yield refused
        return
    try:
        with (line or Line(1, 0)).places() as places:
            yield from _in_turn(engine, settings, job, places)
    except FullError:
        yield Refusal("full")


def _in_turn(
    engine: Engine, settings: Settings, job: Job, places: Iterator[int]
) -> Generator[Update, None, None]:
    """Wait for the model and for the turn, then stream."""
    for update in _prepared(engine):
        yield update
        if isinstance(update, Failure):
            return
    yield from map(InLine, places)
    pair = job.pair()
    messages, options = prompt.ask(_format(settings), job.text, pair)
    with closing(engine.events(messages, **options)) as items:
        yield from _answers(items, pair)


def _prepared(engine: Engine) -> Iterator[Progress | Failure]:
    """Wait until the model is here: its header says how it wants to be asked."""
    while (state := engine.status()).phase == "preparing":
        yield state.latest
        time.sleep(BEAT)
    if state.phase == "failed" and state.failure is not None:
        yield state.failure


def _answers(stream: Iterator[Item], pair: tuple[Language, Language]) -> Iterator[Update]:
    text, shown, last = "", "", 0.0
    for item in stream:
        if isinstance(item, Failure):
            yield item
            return
        if isinstance(item, Figures):
            return
        if isinstance(item, Progress):
            if text != shown:  # a pause: show what was held back for the sake of a steady pace
                shown = text
                yield Answer(text, *pair, None)
            yield item
            continue
        text = (text + item.text).lstrip()
        now = time.monotonic()
        if item.finished or (text and now - last >= _SHOW_EVERY):
            shown, last = text, now
            yield Answer(text.rstrip() if item.finished else text, *pair, item)


def _format(settings: Settings) -> prompt.Format:
    """Look at the model that is here; one that is not has failed, or fails, for that reason."""
    path = model.at_hand(model.from_settings(settings))
    return "chat" if path is None else prompt.format_of(_template(path))


@cache
def _template(path: Path) -> str | None:
    """A header is read once: Gemma's has 262,144 tokens to skip."""
    return gguf_header.chat_template(path)
