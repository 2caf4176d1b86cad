"""ZeroGPU: the one function that asks for a GPU, and the worker processes that it runs in.

A worker is a fork of the app's process. Each decorated function has workers of its own, and each
worker a server: a second function would hold the model twice.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

import llama_loader
from llama_loader.concurrency import Background
from llama_loader.errors import SettingError
from llama_space import shared_server, worker
from llama_space.values import Failure, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from llama_space.values import Item, Report
    from llama_space.worker import Job

_ABORTED: Final = "ZEROGPU_ABORTED"
_CODES: Final = {
    # titles of the `spaces` package's errors (spaces/zero/client.py, wrappers.py): code, hint
    "ZeroGPU quota exceeded": (
        "ZEROGPU_QUOTA",
        "log in to Hugging Face for more GPU time, or come back later",
    ),
    "ZeroGPU pending credits exceeded": (
        "ZEROGPU_QUOTA",
        "wait until your other tasks on ZeroGPU have ended",
    ),
    "ZeroGPU illegal duration": (
        "ZEROGPU_DURATION",
        "send a shorter text; the Space's owner can set YAKULINGO_SPACES_ZEROGPU_DURATION",
    ),
    "ZeroGPU queue timeout": ("ZEROGPU_BUSY", "no GPU became free: try again in a minute"),
    "ZeroGPU client error": ("ZEROGPU_BUSY", "reload the page and try again in a minute"),
    "ZeroGPU worker error": (
        _ABORTED,
        "the GPU was taken away, mostly for taking too long: try again with a shorter text",
    ),
}
_UNREACHABLE_HINT: Final = "this is ZeroGPU's own trouble: try again in a minute"
_HOST, _SERVER = 5, 7
"""Exit statuses (docs/faults.md)."""


def entry_point(size: str) -> Callable[[Job], Iterator[Item | Report]]:
    """Return ``answer_in_worker``, decorated: it runs in a worker with a GPU.

    Must be called before the app is launched. Every call returns the same function.

    Args:
        size: ``large`` or ``xlarge``.

    Raises:
        SettingError: SPACES_ZERO_GPU is set, but the package is not installed.
    """
    _import_all()
    _watch_forks()
    try:
        # by its name: the Space's own folder may be called so too, and a type checker finds that
        gpu = importlib.import_module("spaces").GPU
    except (
        ImportError,
        AttributeError,
        AssertionError,
    ) as error:  # its word for a variable that is not set
        raise SettingError(
            "SPACES_MISSING",
            f"SPACES_ZERO_GPU is set, but the package 'spaces' cannot be used: {error}",
            hint="pip install spaces, or unset SPACES_ZERO_GPU: outside ZeroGPU it is not needed",
        ) from error
    decorated: Callable[[Job], Iterator[Item | Report]]
    decorated = gpu(duration=_seconds, size=size)(answer_in_worker)
    return decorated


def _import_all() -> None:
    """Import the whole loader: a worker must import nothing.

    It is forked while the app prepares. A module that another thread imports at that moment stays
    locked in the worker for ever.
    """
    for module in pkgutil.iter_modules(llama_loader.__path__):
        if module.name != "__main__":
            importlib.import_module(f"llama_loader.{module.name}")


def _seconds(job: Job) -> int:
    return job.seconds


def answer_in_worker(job: Job) -> Iterator[Item | Report]:
    """Answer a call in a worker, which from now on ends with the app."""
    end_with_app()
    yield from worker.answer(job)


def call(
    decorated: Callable[[Job], Iterator[Item | Report]], job: Job
) -> Generator[Item | Report, None, None]:
    """Run a job in a worker; a refusal of ZeroGPU becomes a ``Failure``.

    A worker that yields nothing at all, not even ``Progress``, was being ended when the job came:
    the job is given to another worker, once.
    """
    yield Progress("queue")
    began = False
    for last in (False, True):
        try:
            for item in decorated(job):
                began = True
                yield item
        except _expected() as error:
            failure = _explained(error)
            if last or began or failure.code != _ABORTED:
                yield failure
                return
        else:
            return


def _expected() -> tuple[type[Exception], ...]:
    """Return what the package raises: gradio's error with a title, its own, HTTP's, JSON's."""
    import gradio

    libraries = [sys.modules[name] for name in ("httpx",) if name in sys.modules]
    return (gradio.Error, RuntimeError, OSError, ValueError, *(one.HTTPError for one in libraries))


def _explained(error: Any) -> Failure:
    title = getattr(error, "title", "")
    message = " ".join(str(getattr(error, "message", error)).split())
    code, hint = _CODES.get(title, ("ZEROGPU_FAILED", _UNREACHABLE_HINT))
    status = _SERVER if code == _ABORTED else _HOST
    return Failure(code, f"{title}: {message}" if title else message, hint, status)


_APP_GONE, _TERMINATED = 0, 128 + signal.SIGTERM
"""Exit statuses of a worker."""
_LAST_WORK: Final = 0.4
"""Seconds that a worker takes at its end to remove the server's folder."""
_alive: tuple[int, int] | None = None
"""A pipe. Only the app's process holds its second end, so the first one ends with the app."""
_signals: int | None = None
"""In a worker: where the numbers of its signals can be read."""
_ending: bool = False
"""This worker ends with the app already."""


def in_worker() -> bool:
    """Whether this process is a worker: ``multiprocessing`` has forked it."""
    return multiprocessing.parent_process() is not None


def _watch_forks() -> None:
    """Have every later fork know when this process, the app's, ends."""
    global _alive  # noqa: PLW0603 - one pipe for each app
    if _alive is None and not in_worker():
        _alive = os.pipe()
        os.register_at_fork(after_in_child=_forked)


def _forked() -> None:
    """Let go of the app's end of the pipe, and have signals written where a thread can wait."""
    global _signals, _ending  # noqa: PLW0603 - one for each worker
    if _alive is not None and _signals is None:
        os.close(_alive[1])
    _ending = False
    _signals, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)


def end_with_app() -> None:
    """End this process, a worker, and its server as soon as the app has ended, or on SIGTERM.

    A worker waits for calls on a pipe whose other end it has inherited, so it would wait for ever.
    The kernel's parent-death signal is of no use: it would come at the end of the thread of the app
    that happened to fork the worker. On SIGTERM the package's worker first ends its call, which may
    take minutes.
    """
    global _ending  # noqa: PLW0603 - one watch for each process
    if _ending:
        return
    _ending = True
    threading.Thread(target=_watch, name="llama-space-end", daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    app = _alive[0] if _alive is not None else parent.sentinel if parent is not None else None
    waiting = select.poll()
    for end in (app, _signals):
        if end is not None:
            waiting.register(end, select.POLLIN)
    status = None
    while status is None:
        ready = [end for end, _ in waiting.poll()]
        if app in ready:
            status = _APP_GONE
        elif signal.SIGTERM in os.read(ready[0], 512):
            status = _TERMINATED
    Background(shared_server.remove_scratch).wait(_LAST_WORK)
    os._exit(status)  # the kernel ends the server with this process
