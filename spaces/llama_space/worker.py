"""Answers one call with this process's server: in a ZeroGPU worker, or in the app's process.

The generator yields something every ``BEAT`` seconds, whatever the server does: a ZeroGPU worker
notices only at a ``yield`` that the visitor has gone.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from llama_loader.concurrency import Background
from llama_loader.errors import LoaderError, ServerError
from llama_space import shared_server
from llama_space.values import Failure, Piece, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from llama_loader.client import ChatStream, Completion
    from llama_loader.server import Server
    from llama_space.preparation import Ready
    from llama_space.values import Ask, Item, Report

BEAT: Final = 0.25
"""Seconds between two signs of life."""
SYSTEM_HINT: Final = "is the disk full, or are too many files open?"
SILENCE: Final = 120.0
"""Seconds without a word after which the server is suspected: a long prompt on a CPU takes some."""
_BROKEN: Final = frozenset({"NO_ANSWER", "ANSWER_TIMEOUT", "ANSWER_CUT"})
"""Errors of a server that died or hangs; another one may answer."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Job:
    """What a worker gets: everything by value, whenever it was forked.

    Attributes:
        ready: how to start a server.
        ask: the request.
        seconds: GPU seconds to ask for.
    """

    ready: Ready
    ask: Ask
    seconds: int


def answer(job: Job) -> Generator[Item | Report, None, None]:
    """Yield progress, one ``Report``, then pieces; an error is a ``Failure``, the last item.

    Closing the generator stops the generation; the server stays for the next call.
    """
    try:
        yield from _answer(job)
    except LoaderError as error:
        yield Failure.of(error)
    except OSError as error:
        yield Failure("SYSTEM", str(error), SYSTEM_HINT, 6)


def _answer(job: Job) -> Iterator[Item | Report]:
    found = shared_server.shared(job.ready)
    warm = found.start.wait(0)
    supervisor = yield from _patiently(found.start, "start", lambda: found.latest)
    server = yield from _patiently(Background(supervisor.ensure), "restart", _restarting)
    yield found.report(supervisor, warm=warm)
    said = False
    try:
        for item in _streamed(server, job.ask):
            said = said or isinstance(item, Piece)
            yield item
    except ServerError as error:
        if error.code not in _BROKEN:
            raise
        # found out now and replaced if need be, so that the next call has a server again
        again = Background(supervisor.suspect)
        if said:
            raise _cut(error) from error
        server = yield from _patiently(again, "restart", _restarting)
        yield found.report(supervisor, warm=False)
        yield from _streamed(server, job.ask)


def _patiently(
    work: Background[_Result], stage: str, say: Callable[[], str]
) -> Generator[Progress, None, _Result]:
    """Wait for work in another thread, and yield a sign of life now and then."""
    began = time.monotonic()
    while not work.wait(BEAT):
        yield Progress(stage, f"{say()} ({time.monotonic() - began:.0f} s)")
    return work.result()


def _restarting() -> str:
    return "llama-server is started anew"


def _cut(error: ServerError) -> ServerError:
    return ServerError(
        error.code,
        f"the answer broke off: {error.message}",
        hint="ask again: llama-server is started anew where it has died",
    )


def _streamed(server: Server, ask: Ask) -> Iterator[Piece | Progress]:
    """Stream one answer; the generation ends with this generator."""
    client = server.client(timeout=SILENCE)
    ask_for = client.chat if ask.prompt is None else client.complete
    asked: Any = ask.messages if ask.prompt is None else ask.prompt
    stream = ask_for(asked, max_tokens=ask.max_tokens, temperature=ask.temperature, **ask.extra)
    parts: queue.SimpleQueue[Completion | LoaderError | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(stream, parts), daemon=True)
    reader.start()
    try:
        yield from _pieces(parts)
    finally:
        stream.stop()
        reader.join()


def _read(stream: ChatStream, parts: queue.SimpleQueue[Completion | LoaderError | None]) -> None:
    try:
        for part in stream:
            parts.put(part)
    except LoaderError as error:
        parts.put(error)
    finally:
        parts.put(None)


def _pieces(
    parts: queue.SimpleQueue[Completion | LoaderError | None],
) -> Iterator[Piece | Progress]:
    began = time.monotonic()
    finished = False
    while True:
        try:
            part = parts.get(timeout=BEAT)
        except queue.Empty:
            yield Progress("waiting", f"waiting for words ({time.monotonic() - began:.0f} s)")
            continue
        began = time.monotonic()
        if isinstance(part, LoaderError):
            raise part
        if part is None:
            break
        finished = part.finished
        yield Piece(part.text, finished, part.tokens, part.tokens_per_second, part.reason)
    if not finished:
        yield Piece("", finished=True, tokens=None, tokens_per_second=None, reason="")
