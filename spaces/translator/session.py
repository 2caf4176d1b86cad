"""One translation, from the request to what is shown: checks, queue, pieces.

First come, first served: ``VisitorQueue`` holds who has the model now, and who waits for it.
"""

from __future__ import annotations

import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Union, final

from llama_loader import gguf_header, model
from llama_space.values import Failure, Figures, Piece, Progress
from llama_space.worker import BEAT
from translator import detection, pieces, prompt
from translator.texts import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from llama_loader.settings import Settings
    from llama_space import Engine
    from translator.languages import Language

_OF_CONTEXT: Final = 8
"""A piece takes an eighth of the context, by an estimate: in some scripts a tokenizer makes three
tokens of a character, and the sentences before it and the answer need room, too."""
_LEAST, _MOST = 16, 600
"""Tokens of a piece. A translation that ended early resumes at its piece."""
_FINER_LEAST, _FINER_EACH = 50, 20
"""Requests for finer parts: so many for each text, and one more for so many of its characters."""
_LOST: Final = frozenset({"ZEROGPU_ABORTED", "NO_ANSWER", "ANSWER_CUT", "ANSWER_TIMEOUT"})
"""Failures of a GPU or server that went away in the middle of an answer."""
_SHOW_EVERY: Final = 0.04
"""Seconds. A visitor sees no more than 25 updates in a second; the first is shown at once."""


@dataclass(frozen=True)
class Job:
    """The request of a person.

    Attributes:
        source: a code, or ``auto``.
        target: a code.
        automatic: the visitor did not choose the target; a text in that language reverses the pair.
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
    """The translation so far.

    Attributes:
        last: the newest part of a model's answer, None before the first; it is ``finished`` only
            with the whole text.
        done, count: pieces of the text that are translated, and all.
        calls: the figures of the calls that made the whole text; ZeroGPU lent a GPU for each.
    """

    text: str
    source: Language
    target: Language
    last: Piece | None
    done: int = 0
    count: int = 1
    calls: tuple[Figures, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether this is the answer's last update."""
        return self.last is not None and self.last.finished


Update = Union[Progress, InLine, Answer, Refusal, Failure]  # noqa: UP007 - evaluated on 3.10 too


@final
class VisitorQueue:
    """Visitors in the order in which they came; gradio's own queue has no visitor's place.

    A visitor who leaves, however that happens, moves all others. Safe to use from threads.

    Args:
        at_once: how many have their turn at the same time.
        waiting: how many more may wait.
    """

    def __init__(self, at_once: int, waiting: int) -> None:
        self._at_once = at_once
        self._longest = at_once + waiting
        self._tickets: list[object] = []
        self._moved = threading.Condition()

    @contextmanager
    def places(self) -> Iterator[Iterator[int] | None]:
        """Stand in line until the block ends; it gets the places, which end with the turn.

        Place 1 is the next whose turn it is. It is yielded again every quarter of a second. The
        block gets None if too many wait in the queue already.
        """
        mine = object()
        with self._moved:
            full = len(self._tickets) >= self._longest
            self._tickets += [] if full else [mine]
        if full:
            yield None
            return
        try:
            yield self._until_turn(mine)
        finally:
            with self._moved:
                self._tickets.remove(mine)
                self._moved.notify_all()

    def _until_turn(self, ticket: object) -> Iterator[int]:
        while True:
            with self._moved:
                place = self._tickets.index(ticket) - self._at_once + 1
            if place <= 0:
                return
            yield place
            with self._moved:
                self._moved.wait(BEAT)


def refusal(job: Job, max_chars: int) -> Refusal | None:
    """Return the error of a job, or None. No side effects."""
    if not job.text.strip():
        return Refusal("nothing")
    if len(job.text) > max_chars:
        return Refusal("too_long", {"count": len(job.text), "limit": max_chars})
    source, target = job.pair()
    return Refusal("same", {"language": source.native}) if source == target else None


def translate(
    engine: Engine,
    settings: Settings,
    job: Job,
    line: VisitorQueue | None = None,
    done: list[str] | None = None,
) -> Generator[Update, None, None]:
    """Translate; the last update is a finished answer, a refusal or a failure.

    Closing the iterator stops the generation.

    Args:
        engine: the engine that runs the model.
        settings: limits, and which model it is.
        job: what to translate.
        line: where the job waits for its turn, None where there is no line.
        done: answers to the job's first pieces, from a translation that ended early; this one
            resumes after them, and appends each further one.
    """
    if refused := refusal(job, settings.max_chars):
        yield refused
        return
    with (line or VisitorQueue(1, 0)).places() as places:
        if places is None:
            yield Refusal("full")
            return
        yield from _in_turn(engine, settings, job, places, [] if done is None else done)


def _in_turn(
    engine: Engine, settings: Settings, job: Job, places: Iterator[int], done: list[str]
) -> Generator[Update, None, None]:
    """Wait for the model and for the turn, then stream; once more where a GPU was lost."""
    for update in _prepared(engine):
        yield update
        if isinstance(update, Failure):
            return
    yield from map(InLine, places)
    path = model.at_hand(settings)  # one that is not here has failed, or fails, for that reason
    kind = "chat" if path is None else _format(path)
    most = pieces.TOKEN * min(max(settings.n_ctx // _OF_CONTEXT, _LEAST), _MOST)
    run = _Run(pieces.cut(job.text, most, by_line=kind == "base"), kind, job.pair(), most)
    calls: list[Figures] = []
    known = -1
    while True:
        last = yield from _on_one_gpu(engine, run, done, calls)
        if isinstance(last, Answer):
            yield replace(last, calls=tuple(calls))
            return
        if last is None:  # its seconds were up
            continue
        if last.code not in _LOST or known == len(done):
            yield last
            return
        known = len(done)
        yield Progress("restart")


def _on_one_gpu(
    engine: Engine, run: _Run, done: list[str], calls: list[Figures]
) -> Generator[Update, None, Answer | Failure | None]:
    """Translate as many pieces as the seconds allow; return what the last of them ended with."""
    run = replace(run, done=[*done])
    left = [part.text for part in run.parts if not part.kept][len(done) :]
    last: Answer | Failure | None = None
    made = engine.together(run, left) if left else run(engine.events, lambda: True)
    with closing(made) as updates:
        for update in updates:
            if isinstance(update, str):  # the answer to a piece
                done.append(update)
            elif isinstance(update, Figures):
                calls.append(update)
            elif isinstance(update, Failure) or (isinstance(update, Answer) and update.whole):
                last = update
            elif not isinstance(update, Piece):
                yield update
    return last


@dataclass
class _Run:
    """The translation of one text, piece by piece; it crosses a process.

    Attributes:
        parts: of the text.
        most: weight of a piece.
        done: answers to the first pieces; each further one is appended.
        before: the sentences before the next piece, and their translation.
        last: the newest part of an answer.
        finer: requests for parts of pieces so far.
        cut: the context ended an answer.
        ask: the function that sends a request to the model.
    """

    parts: list[pieces.Slice]
    kind: prompt.Format
    pair: tuple[Language, Language]
    most: int
    done: list[str] = field(default_factory=list)
    before: tuple[str, str] | None = None
    last: Piece | None = None
    finer: int = 0
    cut: bool = False
    ask: Any = None

    def __call__(self, ask: Any, enough: Callable[[], bool]) -> Generator[Any, None, None]:
        """Translate from the first piece that is not done; a failure, or too little time, ends it.

        It is resumed by another call with what is done by then.
        """
        self.ask, first, number, shown = ask, len(self.done), 0, ""
        for part in self.parts:
            if part.kept:
                shown += part.text
                continue
            if number == len(self.done):
                if number > first and not enough():
                    return
                answer = yield from self._piece(part.text, shown)
                if answer is None:
                    return
                self.done.append(answer)
                yield answer
            shown += self.done[number]
            self.before = pieces.context(part.text, self.done[number], self.most // 2)
            number += 1
            if number < self._count:
                yield self._answer(shown)
        reason = "length" if self.cut else "stop"
        last = self.last or Piece("", finished=True, tokens=None, tokens_per_second=None, reason="")
        yield self._answer(shown, replace(last, finished=True, reason=reason))

    @property
    def _count(self) -> int:
        return sum(not part.kept for part in self.parts)

    def _piece(self, source: str, shown: str) -> Generator[Update, None, str | None]:
        """Translate a piece; one whose answer lost its lines, links or marks is cut finer.

        Returns:
            None after a failure.
        """
        answer = yield from self._asked(source, shown)
        if answer is None:
            return None
        ended = self.last is None or self.last.reason != "length"
        if ended and pieces.faithful(source, answer):
            return pieces.mended(source, answer)
        parts = pieces.finer(source)
        finer = self.finer + sum(not part.kept for part in parts)
        most = _FINER_LEAST + sum(len(part.text) for part in self.parts) // _FINER_EACH
        if not parts or finer > most:
            self.cut |= not ended
            return pieces.mended(source, answer)
        self.finer = finer
        made = ""
        for part in parts:
            told = part.text if part.kept else (yield from self._piece(part.text, shown + made))
            if told is None:
                return None
            made += told
            if not part.kept:
                self.before = pieces.context(part.text, told, self.most // 2)
        return made

    def _asked(self, source: str, shown: str) -> Generator[Update, None, str | None]:
        """Stream the answer to one request, at a steady pace, after the text that is shown."""
        messages, options = prompt.ask(self.kind, source, self.pair, self.before)
        text, seen, looked = "", "", 0.0
        self.last = None
        with closing(self.ask(messages, **options)) as items:
            for item in items:
                if isinstance(item, Failure):
                    yield item
                    return None
                if isinstance(item, Progress):
                    if text != seen:  # a pause: show what was held back for a steady pace
                        seen = text
                        yield self._answer(shown + text)
                    yield item
                elif isinstance(item, Piece):
                    text = (text + item.text).lstrip()
                    self.last = item
                    if text != seen and time.monotonic() - looked >= _SHOW_EVERY:
                        seen, looked = text, time.monotonic()
                        if not item.finished:
                            yield self._answer(shown + text, item)
        return text.rstrip()

    def _answer(self, text: str, last: Piece | None = None) -> Answer:
        return Answer(text, *self.pair, last, len(self.done), self._count)


def _prepared(engine: Engine) -> Iterator[Progress | Failure]:
    """Wait until the model is downloaded: its header decides the form of the prompt."""
    while (state := engine.status()).phase == "preparing":
        yield state.progress or Progress("prepare")
        time.sleep(BEAT)
    if state.phase == "failed" and state.failure is not None:
        yield state.failure


@cache
def _format(path: Path) -> prompt.Format:
    """Look at a model; its header is read once: Gemma's has 262,144 tokens to skip."""
    return prompt.format_of(gguf_header.chat_template(path))
