"""ZeroGPU: the one function that reserves a GPU, and the worker processes that it runs in.

A worker is a fork of the app's process. Each decorated function has workers of its own, and each
worker a server: a second function would hold the model twice.
"""

import contextlib
import fcntl
import importlib
import pkgutil
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, Final

import llama_loader
from llama_loader.errors import HostError, ServerError, SettingError
from llama_space import worker
from llama_space.request import Request
from llama_space.values import Failure, Item, Progress, Ready, Reserved, Status

Answer = Callable[[Ready, Request], Iterator[Item | Status]]
_ABORTED: Final = "ZEROGPU_ABORTED"
_UNSENT: Final = (TypeError, BrokenPipeError)
"""Of a request whose worker ends while it is written: the first if the package closes the queue."""
_PIPE: Final = 1 << 20
"""Bytes of a pipe to a worker, the most that Linux allows; a request has some 650 kB at most."""
_NAMES: Final = {
    "ZeroGPU quota exceeded": "ZEROGPU_QUOTA",
    "ZeroGPU pending credits exceeded": "ZEROGPU_QUOTA/pending",
    "ZeroGPU illegal duration": "ZEROGPU_DURATION",
    "ZeroGPU queue timeout": "ZEROGPU_BUSY",
    "ZeroGPU client error": "ZEROGPU_BUSY/client",
    "ZeroGPU worker error": _ABORTED,
}
"""Titles of the `spaces` package's errors (spaces/zero/client.py, wrappers.py), and our names."""


def entry_point(size: str) -> Answer:
    """Return ``worker.answer``, decorated: it runs in a worker with a GPU.

    Must be called before the app is launched. ``size`` is ``large`` or ``xlarge``.

    Raises:
        SettingError: SPACES_ZERO_GPU is set, but the package is not installed.
    """
    # a worker must import nothing: it is forked while the app prepares, and a module that another
    # thread imports at that moment stays locked in the worker for ever
    for module in pkgutil.iter_modules(llama_loader.__path__):
        if module.name != "__main__":
            importlib.import_module(f"llama_loader.{module.name}")
    worker.watch_forks()
    try:
        # by its name: the Space's own folder may be called so too, and a type checker finds that
        gpu = importlib.import_module("spaces").GPU
        _widen_pipes(importlib.import_module("spaces.utils").SimpleQueue)
    except (ImportError, AttributeError, AssertionError) as error:  # the last for a variable unset
        raise SettingError("SPACES_MISSING", error=error) from error
    seconds: Callable[[Ready, Request], int] = lambda _, wanted: wanted.reserved.seconds  # noqa: E731
    decorated: Answer = gpu(duration=seconds, size=size)(worker.answer)
    return decorated


def _widen_pipes(queue: Any) -> None:
    """Have a queue hold a whole request: writing a longer one waits for a worker that has ended."""
    make = queue.__init__

    def made(self: Any, *given: Any) -> None:
        make(self, *given)
        with contextlib.suppress(OSError):  # a user's pipes have a common limit (pipe(7))
            fcntl.fcntl(self._writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)

    queue.__init__ = made


def call(
    decorated: Answer, ready: Ready, request: Request
) -> Generator[Item | Status | Reserved, None, None]:
    """Have a worker answer; a refusal of ZeroGPU becomes a ``Failure``.

    The request is sent once more where the first try told how: a worker that yields nothing at
    all, not even ``Progress``, was being ended when the request came; a refusal says how many GPU
    seconds are left, and they can be enough.
    """
    yield Progress("queue")
    began = False
    for last in (False, True):
        yield request.reserved
        try:
            for item in decorated(ready, request):
                began = True
                yield item
        except _expected() as error:
            failure = _explained(error)
            less = request.reserved.after(failure.message)
            if last or began or not (less or failure.code == _ABORTED):
                yield failure
                return
            request = replace(request, reserved=less or request.reserved)
        else:
            return


def _expected() -> tuple[type[Exception], ...]:
    """Return what the package raises: gradio's error with a title, its own, HTTP's, JSON's."""
    import gradio

    http = (sys.modules["httpx"].HTTPError,) if "httpx" in sys.modules else ()
    return (gradio.Error, RuntimeError, OSError, ValueError, *_UNSENT, *http)


def _explained(error: Any) -> Failure:
    title = getattr(error, "title", "")
    message = str(getattr(error, "message", error))
    ended = _ABORTED if isinstance(error, _UNSENT) else "ZEROGPU_FAILED"
    name = _NAMES.get(title, ended)
    kind = ServerError if name == _ABORTED else HostError
    return Failure.of(kind(name, told=f"{title}: {message}" if title else message))
