"""The page: what is on it, and which handler each press calls. gradio 6.

With any wrong setting there is still a page, which names the setting.
"""

from __future__ import annotations

import json
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final

import gradio as gr
from gradio import routes
from gradio.events import api as gradio_api
from jinja2 import ChoiceLoader, DictLoader, FileSystemLoader
from starlette.responses import JSONResponse
from starlette.routing import Route

from llama_loader import doctor, settings
from llama_loader.errors import LoaderError
from llama_loader.events import ignore
from llama_space import Engine, Failure, Status, guard
from translator import api, documents, handlers, languages, panels, texts
from translator.session import VisitorQueue

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from starlette.requests import Request

    from llama_loader.doctor import Examination
    from llama_loader.settings import Settings
    from llama_space.values import Item

HERE: Final = Path(__file__).parent
_HTML: Final = "frontend/index.html"
_FILES: Final = FileSystemLoader(Path(gr.__file__).parent / "templates")
"""Gradio's own HTML."""
CONCURRENCY: Final = 3
WAITING: Final = 20
"""Visitors who may wait in the page's own line, which shows each visitor's place."""
_ALL: Final = CONCURRENCY + WAITING + 2
"""Visitors that gradio lets in: those who may wait, and two to be told that the line is full.
Each takes one of its threads for events at times (``guard``)."""
_EXAMPLES: Final = (
    ("吾輩は猫である。名前はまだ無い。", "en"),
    ("It rained until noon, and then the whole street smelled of cedar.", "ja"),
    ("会議は三十分遅れて始まります。資料は先にお送りします。", "en"),
    ("Please confirm the delivery date by Friday; the parts are out of stock.", "ja"),
)
_SCRIPTED: Final = (
    *("swap_title", "no_language", "detected", "lost"),
    *("file_too_large", "file_no_words", "file_not_read"),
)
"""Words that the script writes."""
_OF_LANGUAGES: Final = ("code", "english", "native", "japanese", "also", "direction")
_BYTES_EACH: Final = 8
"""Bytes of a file for each character that the page takes: subtitles have numbers and times."""
_SAID: Final = (
    '<p id="lost" role="alert" hidden></p><p id="spoken" role="status" class="unseen"></p>'
)
"""The script's texts: the server does not answer; a translation begins, or ends."""
_HERE: Final[Mapping[str, Any]] = {"fn": None, "queue": False, "api_visibility": "private"}
"""Options of events that only the browser handles."""


class RefusingEngine(Engine):
    """Replaces an engine whose settings cannot be read: the page shows which one and why."""

    def __init__(self, error: LoaderError) -> None:  # starts nothing, unlike its base
        self._failure = Failure.of(error)

    def retry(self) -> None:
        """Do nothing: a setting only changes with a restart."""

    close = retry

    def status(self) -> Status:
        """Return the failure."""
        return Status("failed", failure=self._failure)

    def events(self, *asked: object, **options: Any) -> Generator[Item, None, None]:
        """Yield the failure."""
        del asked, options
        yield self._failure

    together = events

    def doctor(self) -> Examination:
        """Return the doctor's report: it takes settings that cannot be read as a finding."""
        return doctor.examine(settings.load, sink=ignore)


class Page:
    """Holds the components; ``build`` puts them on the page, ``launch`` serves it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self._settings = settings
        self._line = VisitorQueue(CONCURRENCY, WAITING)
        self._start = token_hex(8)
        retries = not isinstance(engine, RefusingEngine)
        self._handlers = handlers.Handlers(engine, settings, self._line, retries=retries)
        self.i18n = gr.I18n(**{locale: _words(locale) for locale in texts.LOCALES})

    def build(self) -> gr.Blocks:
        """Return the page; ``launch`` starts it."""
        with gr.Blocks(title="YakuLingo", analytics_enabled=False, fill_width=True) as demo:
            self._masthead()
            self._spread()
            self._actions()
            self._backstage()
            self._wire(demo)
            gradio_api(
                api.endpoint(self.engine, self._settings, self._line),
                api_name="translate",
                concurrency_limit=_ALL,
                concurrency_id="translate",
            )
            gradio_api(api.detect, api_name="detect", concurrency_id="detect")
        # gradio's own queue on ZeroGPU holds one caller; the rest would be turned away.
        demo.queue(default_concurrency_limit=CONCURRENCY, max_size=WAITING)
        made: gr.Blocks = demo
        return made

    def launch(self, **options: Any) -> Any:
        """Build the page and serve it. ``options`` go to gradio's ``launch``."""
        self.demo = self.build()
        limit = self._settings.max_chars
        into_html(head(limit))
        return self.demo.launch(
            # the bare theme: nothing is fetched from elsewhere; fonts and style are in the CSS
            theme=gr.themes.Base(
                primary_hue="slate", neutral_hue="slate", font="sans-serif", font_mono="monospace"
            ),
            css_paths=[HERE / "style.css"],
            i18n=self.i18n,
            mcp_server=find_spec("mcp") is not None,
            footer_links=["api"],
            **guard.options(limit, Route("/state", self._state)),
            **options,
        )

    def _state(self, _: Request) -> JSONResponse:
        """Return whether there is something new to show; the page polls it.

        ``start`` is another one after a restart of the app, ``seen`` where the engine's state is.
        """
        now = self.engine.status()
        seen = repr((now.phase, now.warm, now.failure, now.progress, int(now.elapsed or 0)))
        known = {"start": self._start, "phase": now.phase, "seen": zlib.crc32(seen.encode())}
        return JSONResponse(known, headers={"Cache-Control": "no-store"})

    def _masthead(self) -> None:
        gr.HTML(_SAID, padding=False, elem_id="said")
        with gr.Row(elem_id="top"):
            gr.HTML(self.i18n("masthead"), padding=False)
            self.pill = gr.HTML(padding=False, elem_id="pill")
        self.failure = gr.HTML(padding=False, elem_id="failure")
        self.retry = gr.Button(self.i18n("retry"), visible=False, elem_id="retry", size="sm")

    def _spread(self) -> None:
        with gr.Row(elem_id="spread", equal_height=True):
            with gr.Column(elem_classes="leaf", elem_id="left"):
                self.source_language = self._language("source_language", languages.AUTO)
                self.source = self._text("source", "source_label", "placeholder", written=True)
                with gr.Row(elem_classes="foot"):
                    limit = self._settings.max_chars
                    count = f'<span id="count" data-limit="{limit}">0 / {limit:,}</span>'
                    gr.HTML(count, padding=False)
                    self._quiet("open_file")
                    self.link = self._quiet("link")
                    self.clear = self._quiet("clear")
            self.swap = gr.Button("⇄", elem_id="swap", size="sm", min_width=0)
            with gr.Column(elem_classes="leaf", elem_id="right"):
                self.target_language = self._language("target_language", "en")
                self.target = self._text("target", "target_label", "target_placeholder")
                with gr.Row(elem_classes="foot"):
                    self.status = gr.HTML(padding=False, elem_id="status")
                    self.save = self._quiet("save")
                    self.copy = self._quiet("copy")

    def _quiet(self, name: str) -> gr.Button:
        return gr.Button(self.i18n(name), size="sm", elem_classes="quiet", elem_id=name)

    def _language(self, label: str, value: str) -> gr.Dropdown:
        choices: list[Any] = [(self.i18n(f"language_{code}"), code) for code in languages.known()]
        if value == languages.AUTO:
            choices.insert(0, (self.i18n("detect"), languages.AUTO))
        return gr.Dropdown(
            choices,
            value=value,
            label=self.i18n(label),
            container=False,
            elem_id=label,
            elem_classes="language",
        )

    def _text(self, name: str, label: str, hint: str, *, written: bool = False) -> gr.Textbox:
        return gr.Textbox(
            label=self.i18n(label),
            placeholder=self.i18n(hint),
            lines=7,
            max_lines=24,
            container=False,
            interactive=True,  # or it could not be focused; the script makes it read-only
            autofocus=written,
            elem_id=name,
            elem_classes="paper",
            html_attributes=gr.InputHTMLAttributes(spellcheck=False),
        )

    def _actions(self) -> None:
        self.chosen = gr.Textbox(visible=False, elem_id="chosen")  # the target, by the visitor
        with gr.Row(elem_id="actions"):
            self.go = gr.Button(self.i18n("translate"), variant="primary", elem_id="go")
            self.stop = gr.Button(self.i18n("stop"), elem_id="stop", interactive=False)
            gr.HTML(self.i18n("keys"), padding=False, elem_id="keys")
        with gr.Row(elem_id="examples"):
            self.examples = [
                (gr.Button(text, size="sm", elem_classes="example"), text, target)
                for text, target in _EXAMPLES
            ]

    def _backstage(self) -> None:
        """Make what only the owner needs, folded under one line; the script opens it."""
        gr.Button(self.i18n("owners"), size="sm", elem_classes="quiet", elem_id="owners")
        with gr.Column(elem_id="backstage"):
            self.colophon = gr.HTML(padding=False)
            with gr.Column(elem_id="doctor"):
                gr.HTML(self.i18n("doctor_head"), padding=False)
                with gr.Row(elem_classes="line"):
                    self.examine = gr.Button(self.i18n("examine"), size="sm", elem_id="examine")
                    self.copy_report = gr.Button(
                        self.i18n("copy_report"), size="sm", visible=False, elem_id="copy_report"
                    )
                self.advice = gr.HTML(padding=False, elem_id="advice")
                self.report = gr.Textbox(
                    label=self.i18n("report"),
                    visible=False,
                    container=False,
                    lines=12,
                    max_lines=40,
                    interactive=True,
                    elem_id="report",
                )

    def _wire(self, demo: gr.Blocks) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        react = self._handlers
        refreshed = gr.Button(visible="hidden", elem_id="refresh")  # the script presses it
        standing = [self.pill, self.failure, self.retry, self.colophon]
        demo.load(react.refresh, None, standing, queue=False, **quiet)
        demo.unload(react.leave)
        refreshed.click(react.refresh, None, standing, queue=False, **quiet)
        self.retry.click(react.again, None, standing, queue=False, **quiet)
        run = self.go.click(
            react.press,
            [self.source, self.source_language, self.target_language, self.chosen],
            [self.target, self.status, self.stop, self.target_language],
            concurrency_limit=_ALL,
            concurrency_id="translate",
            trigger_mode="always_last",  # pressed while it runs or is being stopped: next
            **quiet,
        )
        run.then(react.refresh, None, standing, queue=False, **quiet)
        # a text that was cleared while it was being translated stays cleared
        shown = [self.target, self.status]
        run.then(js="(...all) => pages.over(...all)", inputs=shown, outputs=shown, **_HERE)
        # not gradio's own `cancels`: a press within 0.1 s of it is lost (6.31), or shows "Error"
        self.stop.click(react.end, None, [self.stop], queue=False, **quiet)
        report = [self.advice, self.report, self.copy_report]
        self.examine.click(react.diagnose, None, report, concurrency_limit=_ALL, **quiet)
        self._wire_in_the_browser()
        self._wire_what_is_kept(demo)
        self._wire_files(quiet)

    def _wire_files(self, quiet: dict[str, Any]) -> None:
        """Have the browser read a file and save its translation; the server keeps neither."""
        name, content, made = (gr.Textbox(visible=False) for _ in range(3))
        held = gr.Button(visible="hidden", elem_id="file_held")  # the script presses it
        read = held.click(js="() => pages.file()", outputs=[name, content, self.status], **_HERE)
        translated = read.then(
            self._handlers.press_file,
            [name, content, self.source_language, self.target_language],
            [self.status, self.stop, made],
            concurrency_limit=_ALL,
            concurrency_id="translate",
            **quiet,
        )
        translated.then(js="made => pages.saveFile(made)", inputs=[made], **_HERE)
        self.save.click(js="text => pages.save(text)", inputs=[self.target], **_HERE)

    def _wire_what_is_kept(self, demo: gr.Blocks) -> None:
        """Keep texts and languages over a reload, in the visitor's browser and nowhere else."""
        kept: dict[str, gr.Textbox | gr.Dropdown] = {
            "source": self.source,
            "target": self.target,
            "from": self.source_language,
            "to": self.target_language,
        }
        restored = [*kept.values(), self.chosen]
        demo.load(js="() => pages.restore()", outputs=restored, **_HERE)
        for name, component in kept.items():
            component.change(
                js=f"value => pages.keep({name!r}, value)", inputs=[component], **_HERE
            )

    def _wire_in_the_browser(self) -> None:
        """Wire what needs no server: swap, clear, copy, examples, the counter."""
        both = [self.source, self.target, self.source_language, self.target_language]
        self.target_language.select(
            js="() => (pages.keep('chosen', 'yes'), 'yes')", outputs=[self.chosen], **_HERE
        )
        self.swap.click(js="(...all) => pages.swap(...all)", inputs=both, outputs=both, **_HERE)
        emptied = [self.source, self.target, self.status]
        self.clear.click(js="() => ['', '', '']", outputs=emptied, **_HERE)
        self.copy.click(js="text => pages.copy(text, 'copy')", inputs=[self.target], **_HERE)
        self.copy_report.click(
            js="text => pages.copy(text, 'copy_report')", inputs=[self.report], **_HERE
        )
        self.link.click(js="() => pages.copy(pages.link(), 'link')", **_HERE)
        for button, text, target in self.examples:
            chosen = [self.source, self.source_language, self.target_language]
            filled = button.click(
                js=f"() => {[text, languages.AUTO, target]!r}", outputs=chosen, **_HERE
            )
            filled.then(js="() => pages.press('go')", **_HERE)


def head(max_chars: int) -> str:
    """Return the first frame's style, what the page's script needs to know, and the script."""
    rows = [
        {name: getattr(one, name) for name in _OF_LANGUAGES} for one in languages.known().values()
    ]
    words = {
        locale: {name: every[name] for name in _SCRIPTED} for locale, every in texts.every().items()
    }
    limit = max_chars * _BYTES_EACH
    told = {"languages": rows, "words": words, "kinds": documents.KINDS, "limit": limit}
    facts = json.dumps(told).replace("<", "\\u003c")
    style, script = ((HERE / name).read_text("utf-8") for name in ("first.css", "page.js"))
    known = f"<script>window.translator = {facts};</script>"
    return f"<style>{style}</style>{known}<script>{script}</script>"


def into_html(head: str) -> None:
    """Put a head into the HTML that gradio serves.

    Gradio's own ``head`` is added by its programs, once they have arrived: nothing was to be seen
    until then but its "Loading…".
    """
    source, *_ = _FILES.get_source(routes.templates.env, _HTML)
    whole = source.replace("<head>", "<head>{% raw %}" + head + "{% endraw %}", 1)
    routes.templates.env.loader = ChoiceLoader([DictLoader({_HTML: whole}), _FILES])


def _words(locale: str) -> dict[str, str]:
    words = texts.every()[locale]
    named = {f"language_{code}": languages.shown(code, locale) for code in languages.known()}
    doctor_head = f"<h2>{words['doctor']}</h2><p>{words['doctor_text']}</p>"
    return {**words, **named, "masthead": panels.masthead(words), "doctor_head": doctor_head}


def app() -> Page:
    """Read the settings and build the page; on ZeroGPU this also decorates the entry point."""
    try:
        engine = Engine()
    except LoaderError as error:
        sys.stderr.write(f"{error.render()}\n")
        return Page(RefusingEngine(error), settings.load(environ={}))
    return Page(engine, engine.settings)


def run(made: Page, **options: Any) -> None:
    """Serve the page until the process is ended."""
    try:
        made.launch(**options)
    finally:
        made.engine.close()
