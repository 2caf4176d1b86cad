"""Second threads for work that overlaps: one call, or an iterator.

``concurrent.futures`` does more, but its imports take a tenth of the time until a server starts.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from queue import Empty, SimpleQueue
from threading import Semaphore, Thread
from typing import Any, Generic, TypeVar, final

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


@final
class Background(Generic[_Result]):
    """Calls ``work`` at once in a daemon thread: one that hangs keeps no process from ending."""

    def __init__(self, work: Callable[[], _Result]) -> None:
        self._work = work
        self._found: _Result
        self.error: BaseException | None = None  # what the call raised, once it has ended
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds; return True if the call has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def result(self) -> _Result:
        """Wait for the call; return what it returned, raise what it raised."""
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self._found

    def _run(self) -> None:
        try:
            self._found = self._work()
        except BaseException as error:  # noqa: BLE001 - raised again where the result is read
            self.error = error


def ahead(
    items: Generator[_Item, None, None],
    count: int,
    *,
    beat: float | None = None,
    idle: Callable[[], _Item] | None = None,
) -> Generator[_Item, None, None]:
    """Run an iterator in a second thread, and yield its items in order.

    At most ``count`` items wait, the one that comes next included, so memory stays bounded. An
    error of the iterator is raised where its item would be. Closed early, this leaves the iterator
    to its next item, and does not wait for that: the iterator may hang in a read. With ``idle``,
    what that returns is yielded after each ``beat`` seconds in which no item came.
    """
    ready: SimpleQueue[Any] = SimpleQueue()
    room = Semaphore(count - 1)
    over: list[None] = []

    def produce() -> None:
        try:
            with closing(items):
                for item in items:
                    ready.put((item,))
                    room.acquire()
                    if over:
                        return
        finally:
            ready.put(None)

    worker = Background(produce)
    try:
        while True:
            try:
                boxed = ready.get(timeout=beat)
            except Empty:
                if idle is not None:
                    yield idle()
                continue
            if boxed is None:
                break
            room.release()
            yield boxed[0]
        worker.result()
    finally:
        over.append(None)
        room.release()
