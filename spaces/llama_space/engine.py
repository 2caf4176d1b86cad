"""The engine: prepares a runtime and a model, streams answers, reports its status.

It works in three places. In the app's process on ZeroGPU every call borrows a GPU: the answer comes
out of a worker. In a ZeroGPU worker, inside the owner's own ``@spaces.GPU`` function, a call uses
that worker's GPU and server. Everywhere else the server is a child of the app's process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from llama_loader import doctor, hub_client, loader
from llama_loader import settings as loader_settings
from llama_loader.doctor import Examination
from llama_loader.errors import LoaderError, ServerError
from llama_loader.events import Event, Note, Sink, Stage, ignore
from llama_loader.loader import Prepared
from llama_loader.settings import Settings
from llama_space import page_cache, preparation, request, worker, zerogpu
from llama_space.request import STAGES_OF_A_START, Request, Shown, Work
from llama_space.values import (
    Address,
    Failure,
    Item,
    Piece,
    Progress,
    Ready,
    Record,
    Reserved,
    Status,
    log,
)

_Told = TypeVar("_Told", Failure, Note)
_Passed = Generator[Item | Status | Reserved, None, None]
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
"""A fork renews them: it has the threads and locks of none."""


def _one_line(*raised: Any) -> None:
    """End an app that does not catch a wrong setting with its line instead of a traceback."""
    if isinstance(raised[1], LoaderError):
        log(raised[1].render())
    else:
        sys.__excepthook__(*raised)


class Engine:
    """One for each app. Safe to use from threads, and in forked workers.

    Args:
        given: settings by their variables' names without prefix in lower case, such as
            ``n_ctx=8192``. What is not given comes from the environment.

    Raises:
        SettingError: a setting is unknown or cannot be read; or this is ZeroGPU, and the package
            ``spaces`` is missing.
    """

    def __init__(self, **given: Any) -> None:
        try:
            self.settings: Final[Settings] = loader_settings.load(**given)
        except LoaderError:
            if sys.excepthook is sys.__excepthook__:
                sys.excepthook = _one_line
            raise
        if "hf_home" in self.settings.keywords and self.settings.hf_home:
            hub_client.use_home(self.settings.hf_home)
        self._decorated = None
        if self.settings.zerogpu and multiprocessing.parent_process() is None:  # not in a worker
            self._decorated = zerogpu.entry_point(self.settings.zerogpu_size)
        self._record = Record()
        self._shown = Shown()
        self._closed = threading.Event()
        _engines.add(self)
        self._begin()

    def prepare(self) -> Iterator[Event]:
        """Wait for all that needs no GPU, and yield the loader's events from the first on.

        Several callers may iterate at the same time. After a failure it is tried again. Outside
        ZeroGPU the server's start is part of it.

        Raises:
            LoaderError: what the preparation failed with, after the last event.
        """
        self._begin(again=True)
        yield from self._record.events()
        if self._record.failure is not None:
            raise self._record.failure.error()

    def retry(self) -> None:
        """Prepare again after a failure; returns at once."""
        self._begin(again=True)

    def status(self) -> Status:
        """Return what is known now."""
        return self._record.status()

    def doctor(self) -> Examination:
        """Return the doctor's report, in seconds; it fetches nothing and runs what is prepared."""
        asked = replace(self.settings, no_test_run=True)
        return doctor.examine(lambda: asked, sink=ignore, prepare=self._installed)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | str | None = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield the answer to a chat, piece by piece. Closing the iterator stops the generation.

        Args:
            messages: with ``role`` and ``content``, as gradio's ``ChatInterface`` keeps them.
            max_tokens: the longest answer; None for the setting, or what the context leaves.
            temperature: 0 for the likeliest tokens; None for the setting.
            seed: makes sampling repeatable.
            stop: a text or texts before which the answer ends.
            sampling: further fields of llama-server's request, such as ``top_p``.

        Raises:
            SettingError: at once, where the request cannot be sent as it is.
            LoaderError: nothing could be prepared, no GPU was granted, or the server failed.
        """
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop}
        asked = request.chat(messages, {**sampling, **options}, self.settings)
        return self._text(self._items(asked))

    def complete(self, prompt: str, **options: Any) -> Iterator[str]:
        """Yield the continuation of a text; ``options`` and errors are those of ``chat``."""
        return self._text(self._items(request.completion(prompt, options, self.settings)))

    def events(
        self, asked: Sequence[Mapping[str, Any]] | str, **options: Any
    ) -> Generator[Item, None, None]:
        """Yield progress, pieces and final figures of a ``chat``, or of a ``complete`` for a text.

        A call that fails yields a ``Failure`` as its last item, and raises nothing. Closing the
        iterator stops the generation and leaves the server for the next call. ``options`` are
        those of ``chat``.
        """
        try:
            yield from self._items(request.checked(asked, options, self.settings))
        except LoaderError as error:
            yield self._named(Failure.of(error))

    def together(self, work: Work, texts: Sequence[str]) -> Generator[Any, None, None]:
        """Make several requests on one GPU; yield what ``work`` yields, and items as ``events``.

        Args:
            work: called with ``ask``, which takes and yields what ``events`` does, and ``enough``,
                which returns before a further request whether the GPU's seconds allow one. It runs
                where the GPU is, on ZeroGPU in a worker, so it must be picklable.
            texts: what it is about to send, to estimate seconds by.
        """
        try:
            yield from self._items(Request([*texts], {}, work=work))
        except LoaderError as error:
            yield self._named(Failure.of(error))

    @contextlib.contextmanager
    def server(self) -> Iterator[Address]:
        """Return this process's server for any OpenAI client, as a context manager.

        Enter it for each use: a restarted server has another ``api_key``.

        Raises:
            ServerError: this is ZeroGPU's main process, which has no GPU and so no server.
            LoaderError: nothing could be prepared, or the server failed.
        """
        if self._decorated is not None:
            raise ServerError("NO_SERVER_HERE")
        while (ready := self._prepared()) is None:
            pass
        try:
            server = worker.shared(ready).start.result().ensure()
        except (LoaderError, OSError) as error:
            raise self._named(Failure.of(error)).error() from error
        yield Address(f"{server.url}/v1", server.api_key or "")

    def close(self) -> None:
        """End this process's server, also one that is being started; safe to call twice.

        A later call starts a new server.
        """
        self._closed.set()
        self._record.change(phase="closed", server_pid=None)
        worker.stop()

    def _text(self, items: Generator[Item, None, None]) -> Iterator[str]:
        """Yield the texts of the pieces; raise what failed."""
        with contextlib.closing(items):
            for item in items:
                if isinstance(item, Failure):
                    raise item.error()
                if isinstance(item, Piece) and item.text:
                    yield item.text

    def _items(self, wanted: Request) -> Generator[Item, None, None]:
        """Yield what a call brings; raise what keeps anything from being prepared."""
        while (ready := self._prepared()) is None:
            yield self.status().progress or Progress("prepare")
        if self._decorated is None:
            yield from self._record.measured(self._own(worker.answer(ready, wanted)))
            return
        yield from self._borrowed(self._decorated, ready, wanted)

    def _borrowed(
        self, decorated: zerogpu.Answer, ready: Ready, wanted: Request
    ) -> Generator[Item, None, None]:
        """Answer on a GPU that ZeroGPU lends, and learn how long that takes."""
        fixed = self.settings.zerogpu_duration
        guessed = self._shown.reserve(wanted, ready.size, warm=self.status().warm)
        wanted = replace(wanted, reserved=guessed if fixed is None else Reserved(fixed, fixed))
        call = yield from self._record.measured(self._own(zerogpu.call(decorated, ready, wanted)))
        if call is None:
            return
        start = sum(self.status().seconds.get(stage, 0.0) for stage in STAGES_OF_A_START)
        known, self._shown = self._shown, self._shown.after(call, start)
        if self._shown != known:
            try:
                request.remember(self.settings.store, ready.model, ready.size, self._shown)
            except LoaderError as error:  # costs the next start of the app an estimate, no more
                log(error.render())

    def _installed(self, _: Settings, *, sink: Sink) -> Prepared:
        """Return the runtime that was prepared, opening no connection."""
        ready, failure = self._record.ready, self._record.failure
        if failure is not None:
            raise failure.error()
        if ready is None:
            raise ServerError("NOT_PREPARED")
        settled = replace(ready.settings, offline=True)
        return loader.prepare(settled, released=ready.released, sink=sink)

    def _prepared(self) -> Ready | None:
        """Return what was prepared; None while it is being prepared, after a moment."""
        # A failure is raised. A forked worker that has inherited nothing prepares for itself
        self._begin()
        if self._record.wait(worker.BEAT) and self._record.failure is not None:
            raise self._record.failure.error()
        return self._record.ready

    def _begin(self, *, again: bool = False) -> None:
        if self._record.begin(again=again):
            threading.Thread(target=self._prepare, name="llama-space-prepare", daemon=True).start()

    def _prepare(self) -> None:
        """Get everything ready that needs no GPU; outside ZeroGPU start the server too."""
        # also after an unexpected error no caller waits for ever
        ready, failure = None, Failure.of(LoaderError("UNEXPECTED/preparation"))
        try:
            found, known = preparation.run(self.settings, self._hear)
            self._record.change(**known)
            self._shown = request.recall(self.settings.store, found.model, found.size)
            for item in () if self.settings.zerogpu else worker.started(found):
                if isinstance(item, Progress):
                    self._record.change(progress=item)
                    continue
                self._record.reported(item)
                for stage in item.timeline:
                    self._record.hear(Stage(*stage))
            ready = found
        except (LoaderError, OSError) as error:
            failure = self._named(Failure.of(error))
        finally:
            self._record.ended(ready, None if ready else failure)
        if ready and self._decorated is not None:
            began = time.monotonic()
            page_cache.fill(ready)
            self._record.change(timeline=(("page cache", round(time.monotonic() - began, 4)),))
            page_cache.keep(ready, self._closed)

    def _hear(self, event: Event) -> None:
        self._record.hear(self._named(event) if isinstance(event, Note) else event)

    def _own(self, items: _Passed) -> _Passed:
        """Pass a call's items on; a failure names settings as the app's owner did."""
        with contextlib.closing(items):
            for item in items:
                yield self._named(item) if isinstance(item, Failure) else item

    def _named(self, told: _Told) -> _Told:
        """Name settings as the app's owner did."""
        told_of = (told.message, told.hint)
        message, hint = (loader_settings.named(text, self.settings) for text in told_of)
        return replace(told, message=message, hint=hint)

    def _renew(self) -> None:
        """Become the engine of this process, a fork: without threads and locks of the parent's."""
        _let_go(self.settings.store)
        self._decorated = None
        self._record = self._record.copy()


def _renew_engines() -> None:
    for engine in list(_engines):
        engine._renew()  # noqa: SLF001 - a hook for forks has no other way


os.register_at_fork(after_in_child=_renew_engines)


def _let_go(store: Path) -> None:
    """Let go of the store's files that a thread of the parent had open when this child was forked.

    A lock lasts until its last copy is closed, so a child would wait for itself. A program that
    any process has open for writing cannot be executed. The numbers stay taken: objects that the
    child has inherited may close them.
    """
    inside = f"{store.resolve()}/"
    with Path(os.devnull).open("rb") as nothing:
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()).startswith(inside):
                    os.dup2(nothing.fileno(), int(link.name), inheritable=False)
