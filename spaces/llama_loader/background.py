"""A call in a thread of its own, and its result.

``concurrent.futures`` does this and more, but it brings ``logging``, ``traceback`` and ``ast``
along: a tenth of all the time that the loader needs until a server is started.
"""

from __future__ import annotations

from threading import Thread
from typing import TYPE_CHECKING, Generic, TypeVar, final

if TYPE_CHECKING:
    from collections.abc import Callable

_Result = TypeVar("_Result")


@final
class Background(Generic[_Result]):
    """Calls ``work`` at once, in a daemon thread: one that hangs keeps no process from ending."""

    def __init__(self, work: Callable[[], _Result]) -> None:
        self._work = work
        self._found: _Result
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds; True where it is over."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What it raised, None where it did not, or goes on."""
        return self._error

    def result(self) -> _Result:
        """Wait for it; returns what it returned, raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def _run(self) -> None:
        try:
            self._found = self._work()
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._error = error
