"""Answers one call with this process's server: in a ZeroGPU worker, or in the app's process.

The generator yields something every ``BEAT`` seconds, whatever the server does: a ZeroGPU worker
notices only at a ``yield`` that the visitor has gone.
"""

from __future__ import annotations

import queue
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from llama_loader.concurrency import Background
from llama_loader.errors import LoaderError, ServerError
from llama_space import shared_server
from llama_space.values import Failure, Piece, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from llama_loader.client import ChatStream, Completion
    from llama_loader.server import Server
    from llama_loader.supervisor import Supervisor
    from llama_space.preparation import Ready
    from llama_space.request import Request
    from llama_space.shared_server import SharedServer
    from llama_space.values import Item, Report

BEAT: Final = 0.25
"""Seconds between two signs of life."""
SILENCE: Final = 120.0
"""Seconds without a word after which the server is suspected: a long prompt on a CPU takes some."""
_BROKEN: Final = frozenset({"NO_ANSWER", "ANSWER_TIMEOUT", "ANSWER_CUT"})
"""Errors of a server that died or hangs; another one may answer."""

_Result = TypeVar("_Result")


def answer(ready: Ready, request: Request) -> Generator[Item | Report, None, None]:
    """Yield progress, one ``Report``, then pieces; an error is a ``Failure``, the last item.

    Closing the generator stops the generation; the server stays for the next call. The arguments
    cross a process by value, whenever that was forked.
    """
    try:
        yield from _answer(ready, request)
    except (LoaderError, OSError) as error:
        yield Failure.of(error)


def started(ready: Ready) -> Generator[Progress | Report, None, tuple[SharedServer, Supervisor]]:
    """Start this process's server, or find it running; yield progress, then one ``Report``."""
    found = shared_server.shared(ready)
    warm = found.start.wait(0)
    supervisor = yield from _patiently(found.start, lambda: found.progress)
    yield from _patiently(Background(supervisor.ensure))
    yield found.report(warm=warm)
    return found, supervisor


def _answer(ready: Ready, request: Request) -> Iterator[Item | Report]:
    found, supervisor = yield from started(ready)
    said = False
    try:
        for item in _streamed(supervisor.server, request):
            said = said or isinstance(item, Piece)
            yield item
    except ServerError as error:
        if error.code not in _BROKEN:
            raise
        # found out now and replaced if need be, so that the next call has a server again
        again = Background(supervisor.suspect)
        if said:
            hint = "ask again: llama-server is started anew where it has died"
            message = f"the answer broke off: {error.message}"
            raise ServerError(error.code, message, hint=hint) from error
        server = yield from _patiently(again)
        yield found.report(warm=False)
        yield from _streamed(server, request)


def _patiently(
    work: Background[_Result], now: Callable[[], Progress] = lambda: Progress("restart")
) -> Generator[Progress, None, _Result]:
    """Wait for work in another thread, and yield what it does now as a sign of life."""
    began = time.monotonic()
    while not work.wait(BEAT):
        yield replace(now(), seconds=time.monotonic() - began)
    return work.result()


def _streamed(server: Server, request: Request) -> Iterator[Piece | Progress]:
    """Stream one answer; the generation ends with this generator."""
    client = server.client(timeout=SILENCE)
    ask_for: Any = client.complete if isinstance(request.asked, str) else client.chat
    stream: ChatStream = ask_for(request.asked, **request.options)
    parts: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for part in stream:
                parts.put(part)
        finally:
            parts.put(None)

    reading = Background(read)
    try:
        finished = yield from _pieces(parts)
        reading.result()
        if not finished:
            yield Piece("", finished=True, tokens=None, tokens_per_second=None, reason="")
    finally:
        stream.stop()
        reading.wait(SILENCE)


def _pieces(
    parts: queue.SimpleQueue[Completion | None],
) -> Generator[Piece | Progress, None, bool]:
    """Yield what comes; return whether the last piece was the answer's last."""
    began, finished = time.monotonic(), False
    while True:
        try:
            part = parts.get(timeout=BEAT)
        except queue.Empty:
            yield Progress("waiting", seconds=time.monotonic() - began)
            continue
        if part is None:
            return finished
        began, finished = time.monotonic(), part.finished
        yield Piece(part.text, part.finished, part.tokens, part.tokens_per_second, part.reason)
