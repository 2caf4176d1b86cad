"""The real page on an engine whose answers end when they are let go: no model is as punctual.

Run with a port: ``begun`` on stdout for each answer that begins, a number on stdin lets so many
end, a name of ``STATES`` is what the engine says from then on, the end of stdin ends it.
"""

import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any

from llama_loader import settings
from llama_loader.doctor import Examination
from llama_loader.events import Downloading
from llama_space.request import Work
from llama_space.values import Failure, Item, Piece, Progress, Status
from translator.page import Page

BEAT = 0.05
STATES = {
    "ready": Status("ready", release="b1-1", verified=True, server_pid=1, warm=True),
    "unpinned": Status("ready", release="b1-1", digest="ab" * 32, server_pid=1, warm=True),
    "ended": Status("ready", release="b1-1", verified=True, server_pid=1, warm=False),
    "failed": Status("failed", failure=Failure("NO_GPU", "no NVIDIA GPU found", "add one", 5)),
    "preparing": Status(
        "preparing",
        progress=Progress("prepare", Downloading("model.gguf", 3_210_000_000, 16_500_000_000)),
    ),
}


class Stub:
    """What an engine has that no test of the page looks at."""

    events: Any

    def retry(self) -> None: ...

    def close(self) -> None: ...

    def doctor(self) -> Examination:
        return Examination()

    def together(self, work: Work, texts: object) -> Iterator[Any]:
        del texts
        return work(self.events, lambda: True)


class Held(Stub):
    """An engine that is ready, and answers "A cat"."""

    def __init__(self) -> None:
        self._over = threading.Semaphore(0)
        self.state = STATES["ready"]

    def status(self) -> Status:
        return self.state

    def let_go(self, count: int) -> None:
        self._over.release(count)

    def events(self, asked: object, **options: object) -> Generator[Item, None, None]:
        del asked, options
        print("begun", flush=True)
        yield Piece("A cat", finished=False, tokens=1, tokens_per_second=1.0, reason="")
        while not self._over.acquire(timeout=BEAT):
            yield Progress("waiting", seconds=1)
        yield Piece("", finished=True, tokens=2, tokens_per_second=1.0, reason="stop")


def main() -> None:
    """Serve until stdin ends."""
    engine = Held()
    page = Page(engine, settings.load(environ={}))
    page.launch(prevent_thread_lock=True, server_port=int(sys.argv[1]), quiet=True)
    print("serving", flush=True)
    for line in sys.stdin:
        if line.strip() in STATES:
            engine.state = STATES[line.strip()]
        else:
            engine.let_go(int(line))


if __name__ == "__main__":
    main()
