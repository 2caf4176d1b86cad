"""The one function that asks ZeroGPU for a GPU.

Each decorated function has workers of its own, and each worker a server: a second function would
hold the model twice.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Final

from llama_loader.errors import SettingError
from translator import answering
from translator.values import Failure, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from translator.answering import Job
    from translator.values import Item, Report

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
        "translate a shorter text; the Space's owner can set YAKULINGO_SPACES_ZEROGPU_DURATION",
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
    """Return ``answering.answer_in_worker``, decorated: it runs in a worker with a GPU.

    Has to be called before the app is launched. The same function however often it is called.

    Args:
        size: ``large`` or ``xlarge``.

    Raises:
        SettingError: SPACES_ZERO_GPU is set, but the package is not installed.
    """
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
    decorated = gpu(duration=_seconds, size=size)(answering.answer_in_worker)
    return decorated


def _seconds(job: Job) -> int:
    return job.seconds


def call(decorated: Callable[[Job], Iterator[Item | Report]], job: Job) -> Iterator[Item | Report]:
    """Run a job in a worker; what ZeroGPU refuses becomes a ``Failure``.

    A worker that says nothing at all, not even that it waits, was being ended when the job came:
    the job is given to another one, once.
    """
    yield Progress("queue", "ZeroGPU lends a GPU as soon as one is free")
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
    """What the package raises: gradio's error with a title, its own, HTTP's, bad JSON's."""
    import gradio

    libraries = [sys.modules[name] for name in ("httpx",) if name in sys.modules]
    return (gradio.Error, RuntimeError, OSError, ValueError, *(one.HTTPError for one in libraries))


def _explained(error: Any) -> Failure:
    title = getattr(error, "title", "")
    message = " ".join(str(getattr(error, "message", error)).split())
    code, hint = _CODES.get(title, ("ZEROGPU_FAILED", _UNREACHABLE_HINT))
    status = _SERVER if code == _ABORTED else _HOST
    return Failure(code, f"{title}: {message}" if title else message, hint, status)
