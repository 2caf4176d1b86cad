"""Handlers of the page's buttons, and the texts that they show."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import gradio as gr

from llama_space.values import Progress
from translator import advice, documents, panels, texts
from translator.session import Answer, InLine, Job, VisitorQueue, translate
from translator.texts import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llama_loader.settings import Settings
    from llama_space import Engine, Status
    from translator.session import Update

_STAGES = {"waiting": "working", "queue": "waiting_gpu"}
"""Words for a ``Progress``'s stage; for all others ``waiting``."""
_EXAMINATIONS: Final = 3
"""Examinations at the same time."""
_KEPT: Final = 100
"""Visitors whose unfinished texts are kept; a program can act as any number of them."""


class Handlers:
    """One for each page: gradio calls its methods with what its components hold."""

    def __init__(
        self, engine: Engine, settings: Settings, line: VisitorQueue, *, retries: bool = True
    ) -> None:
        self._engine = engine
        self._retries = retries
        self._settings = settings
        self._line = line
        self._examined = VisitorQueue(_EXAMINATIONS, waiting=0)
        self._stops: dict[threading.Event, str] = {}
        self._unfinished: OrderedDict[str, tuple[object, list[str]]] = OrderedDict()

    def again(self, request: gr.Request) -> list[Any]:
        """Prepare again after a failure."""
        self._engine.retry()
        return self.refresh(request)

    def refresh(self, request: gr.Request) -> list[Any]:
        """Write what is running."""
        words, state = _words(request), self._engine.status()
        failure = state.failure if state.phase == "failed" else None
        return [
            panels.pill(state, words),
            panels.failure(failure, words),
            gr.Button(visible=failure is not None and self._retries),
            panels.colophon(state, words),
        ]

    def press(
        self, text: str, source: str, target: str, chosen: str, request: gr.Request
    ) -> Iterator[list[Any]]:
        """Stream a translation onto the right page.

        ``chosen`` is empty as long as the visitor has not chosen a target. A text that was stopped,
        or whose GPU was lost, resumes at the piece where it ended.
        """
        words = _words(request)
        job = Job(text or "", source, target, automatic=not chosen)
        working = panels.status("working", words["working"])
        yield ["", working, gr.Button(interactive=True), gr.skip()]
        for update in self._updates(job, request):
            shown = _shown(update, words, self._engine.status())
            if isinstance(update, Answer) and update.target.code != target:
                target = shown[-1] = update.target.code  # once: the visitor may choose another
            yield shown

    def press_file(
        self, name: str, content: str, source: str, target: str, request: gr.Request
    ) -> Iterator[list[Any]]:
        """Translate a file that the browser has read; nothing of it goes to a disk.

        ``content`` is the file's bytes in base64. It yields the status, the stop button, and at the
        end the translated file as JSON, with its ``name`` and, in base64, its ``content``.
        """
        words = _words(request)
        if not name or not content:  # the browser has refused it, and shown why
            yield [gr.skip(), gr.skip(), ""]
            return
        document = documents.read(name, content, self._settings.max_chars)
        if isinstance(document, Refusal):
            yield [panels.status("failed", document.text(words)), gr.Button(interactive=False), ""]
            return
        yield [panels.status("working", words["working"]), gr.Button(interactive=True), ""]
        for update in self._updates(Job(document.text, source, target), request):
            yield _shown_of_file(document, update, words, self._engine.status())

    def _updates(self, job: Job, request: gr.Request) -> Iterator[Update | None]:
        """Yield the updates of a visitor's translation, None for one that was stopped.

        It ends the visitor's translation before, and resumes one of the same text.
        """
        self.end(request)
        visitor, stopped = str(request.session_hash), threading.Event()
        about = (job.text, *job.pair())
        before, so_far = self._unfinished.get(visitor, (about, []))
        done = list(so_far) if before == about else []
        updates, update = translate(self._engine, self._settings, job, self._line, done), None
        self._stops[stopped] = visitor
        try:
            for update in updates:
                if stopped.is_set():
                    break
                if done:
                    self._unfinished[visitor] = about, done
                    while len(self._unfinished) > _KEPT:
                        self._unfinished.popitem(last=False)
                yield update
        finally:
            updates.close()
            del self._stops[stopped]
        if stopped.is_set():
            yield None
        elif isinstance(update, Answer):
            self._unfinished.pop(visitor, None)

    def end(self, request: gr.Request) -> gr.Button:
        """Have this visitor's translation end with its next update, a quarter of a second away."""
        for stopped, visitor in list(self._stops.items()):
            if visitor == str(request.session_hash):
                stopped.set()
        return gr.Button(interactive=False)

    def leave(self, request: gr.Request) -> None:
        """End the requests of a visitor who left, and remove the visitor's data."""
        self.end(request)
        self._unfinished.pop(str(request.session_hash), None)

    def diagnose(self, request: gr.Request) -> Iterator[list[Any]]:
        """Run the doctor; a press for which there is no room ends at once.

        Gradio counts all who wait for anything together: they would keep translations out.
        """
        words = _words(request)
        yield [panels.status("working", words["examining"]), gr.skip(), gr.skip()]
        with self._examined.places() as room:
            report = None if room is None else self._engine.doctor()
        if report is None:
            yield [panels.status("failed", words["full"]), gr.skip(), gr.skip()]
            return
        known = dict.fromkeys([*advice.of_report(report), *advice.of_status(self._engine.status())])
        advised = panels.advices(tuple(known), words)
        well = panels.status("done", words["all_well"])
        yield [advised or well, gr.Textbox(report.as_text(), visible=True), gr.Button(visible=True)]


def _words(request: gr.Request) -> Mapping[str, str]:
    return texts.every()[texts.accepted(request.headers.get("accept-language"))]


def _shown_of_file(
    document: documents.Document, update: Update | None, words: Mapping[str, str], state: Status
) -> list[Any]:
    """Return the status, the stop button and, once it is done, the translated file."""
    _, line, stop, _ = _shown(update, words, state)
    if not isinstance(update, Answer):
        return [line, stop, ""]
    if not update.whole:
        so_far = {"name": document.name, "done": update.done, "count": update.count}
        return [panels.status("working", words["file_progress"].format(**so_far)), stop, ""]
    name = document.renamed(update.target.code)
    line = panels.status("done", words["file_done"].format(name=name))
    return [line, stop, json.dumps({"name": name, "content": document.written(update.text)})]


def _shown(update: Update | None, words: Mapping[str, str], state: Status) -> list[Any]:
    """Return the right page, the status, the stop button and, unchanged, the target."""
    over = gr.Button(interactive=False)
    if isinstance(update, Answer):
        return _answered(update, words, over)
    if isinstance(update, (InLine, Progress)):
        return [gr.skip(), _awaited(update, words, state), gr.skip(), gr.skip()]
    if update is None:
        line = panels.status("stopped", words["stopped"])
    elif isinstance(update, Refusal):
        line = panels.status("failed", update.text(words))
    else:
        line = panels.failure(update, words)
    return [gr.skip(), line, over, gr.skip()]


def _awaited(update: InLine | Progress, words: Mapping[str, str], state: Status) -> str:
    lately = panels.lately(state.calls, words)
    if isinstance(update, InLine):
        place = words["in_line"].format(place=update.place)
        return panels.status("waiting", place, " ".join(lately))
    why = [texts.patience(update, words["locale"]), *(lately if update.stage == "queue" else [])]
    return panels.status("working", words[_STAGES.get(update.stage, "waiting")], " · ".join(why))


def _answered(answer: Answer, words: Mapping[str, str], over: gr.Button) -> list[Any]:
    heard, last = answer.source.code, answer.last
    pair = f"\N{FIRST STRONG ISOLATE}{answer.source.native}\N{POP DIRECTIONAL ISOLATE} → "
    pair += f"\N{FIRST STRONG ISOLATE}{answer.target.native}\N{POP DIRECTIONAL ISOLATE}"
    if last is None or not last.finished:
        line = panels.status("working", words["working"], pair, heard)
        return [answer.text, line, gr.skip(), gr.skip()]
    if last.tokens_per_second is not None:
        pair += f" · {panels.rate(last.tokens_per_second)} {words['speed_unit']}"
    pair = " · ".join([pair, *panels.gpu(answer.calls, words)])
    line = panels.status("done", words["cut" if last.reason == "length" else "done"], pair, heard)
    return [answer.text, line, over, gr.skip()]
