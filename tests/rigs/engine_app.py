"""A Space without a page, on the engine: does what lines on stdin say.

Each line is ``{"id": 1, "do": "chat"}``; what comes of it are lines on stdout with that id, the
last one with ``end`` or ``error``. Runs under ``zerogpu.Emulator`` with the real package.
"""

import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import spaces
from llama_loader.errors import LoaderError
from llama_space import Engine, Figures, Piece, worker

CHAT = [{"role": "user", "content": "Count."}]
engine = Engine()
_printing = threading.Lock()


def chat() -> Iterator[Any]:
    """An answer, for which a GPU is borrowed."""
    yield from engine.chat(CHAT)


def complete() -> Iterator[Any]:
    """A continuation."""
    yield from engine.complete("Count:")


def events() -> Iterator[Any]:
    """The values of an answer."""
    for item in engine.events(CHAT):
        yield {"kind": type(item).__name__, **asdict(item)}


def together() -> Iterator[Any]:
    """The values of three answers on one GPU, as many as its seconds allow."""
    for item in engine.together(_three, ["Count."] * 3):
        if isinstance(item, dict):
            yield item
        elif isinstance(item, Figures):
            yield asdict(item)


def _three(ask: Callable[..., Iterator[Any]], enough: Callable[[], bool]) -> Iterator[Any]:
    for _ in range(3):
        words = "".join(item.text for item in ask(CHAT) if isinstance(item, Piece))
        yield {"words": words, "worker": os.getpid()}
        if not enough():
            return


def closed() -> Iterator[Any]:
    """An answer that is let go after its first piece: the seconds that this takes."""
    words = engine.chat(CHAT)
    yield next(words)
    began = time.monotonic()
    words.close()  # type: ignore[attr-defined]
    yield time.monotonic() - began


@spaces.GPU(duration=20)
def own() -> Iterator[Any]:
    """Three answers in one lease of the owner's own."""
    for _ in range(3):
        text = "".join(engine.chat(CHAT))
        status = engine.status()
        yield {"text": text, "worker": os.getpid(), "server": status.server_pid}


@spaces.GPU(duration=20)
def own_words() -> Iterator[Any]:
    """One answer in the owner's own function, word by word."""
    for word in engine.chat(CHAT):
        yield {"text": word, "worker": os.getpid(), "server": engine.status().server_pid}


@spaces.GPU(duration=20)
def over_http() -> Iterator[Any]:
    """One answer as any OpenAI client gets it."""
    with engine.server() as found:
        request = urllib.request.Request(
            f"{found.base_url}/chat/completions",
            json.dumps({"messages": CHAT}).encode(),
            {"Authorization": f"Bearer {found.api_key}"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            yield {"text": answer.read().decode(), "worker": os.getpid()}


def server() -> Iterator[Any]:
    """The server of the main process, which has none on ZeroGPU."""
    with engine.server() as found:
        yield found.base_url


def status() -> Iterator[Any]:
    """What is running."""
    yield asdict(engine.status())


def ready() -> Iterator[Any]:
    """Wait for the preparation."""
    yield [type(event).__name__ for event in engine.prepare()]


def shared() -> Iterator[Any]:
    """Whether this process has a server of its own."""
    yield worker._shared is not None


DOING: dict[str, Callable[[], Iterator[Any]]] = {
    one.__name__: one
    for one in (
        *(chat, complete, events, closed, own, own_words, over_http, server, status),
        *(ready, shared, together),
    )
}


def told(**values: Any) -> None:
    """Print a line."""
    with _printing:
        print(json.dumps(values), flush=True)


def do(name: str, number: int) -> None:
    """Do one thing."""
    try:
        for value in DOING[name]():
            told(id=number, value=value)
        told(id=number, end=True)
    except LoaderError as error:
        told(id=number, error=error.code, status=error.exit_status, hint=error.hint)


def main() -> None:
    """Do what stdin says until it ends."""
    told(id=0, end=True)
    # not sys.stdin: a fork closes it, and would wait for ever for the lock that a reader holds
    for line in os.fdopen(os.dup(0)):
        wanted = json.loads(line)
        threading.Thread(target=do, args=(wanted["do"], wanted["id"]), daemon=True).start()


if __name__ == "__main__":
    main()
