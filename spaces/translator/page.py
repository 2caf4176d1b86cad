"""The page: what is on it, and which handler each press calls. gradio 6."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import gradio as gr
from gradio.events import api as gradio_api
from starlette.middleware import Middleware

from translator import api, guard, handlers, languages, panels, texts
from translator.line import Line

if TYPE_CHECKING:
    from llama_loader.settings import Settings
    from translator.session import Engine

HERE: Final = Path(__file__).parent
CONCURRENCY: Final = 3
WAITING: Final = 20
"""Visitors who may wait for their turn, in a line of ours that says where one stands."""
_ALL: Final = CONCURRENCY + WAITING + 2
"""Gradio lets everybody in who may wait, and somebody more to be told that the line is full.
Each takes one of its 40 threads at times."""
_EXAMPLES: Final = (
    ("吾輩は猫である。名前はまだ無い。", "en"),
    ("It rained until noon, and then the whole street smelled of cedar.", "ja"),
    ("会議は三十分遅れて始まります。資料は先にお送りします。", "en"),
    (
        "Please confirm the delivery date by Friday; the parts are out of stock until the 12th.",
        "ja",
    ),
)
_NO_TOOLS: Final = (
    "warning[MCP_MISSING]: there is no MCP tool on this page\nhint: pip install 'gradio[mcp]'\n"
)


class Page:
    """Holds the components; ``build`` puts them on the page, ``launch`` serves it."""

    def __init__(self, engine: Engine, settings: Settings | None) -> None:
        self.engine = engine
        self._settings = settings
        self._line = Line(CONCURRENCY, WAITING)
        self._handlers = handlers.Handlers(engine, settings, self._line)
        self.i18n = gr.I18n(**{name: dict(words) for name, words in texts.every().items()})

    def build(self) -> gr.Blocks:
        """Return the page; ``launch`` starts it."""
        with gr.Blocks(title="YakuLingo", analytics_enabled=False, fill_width=True) as demo:
            self._masthead()
            self._spread()
            self._actions()
            self.colophon = gr.HTML(padding=False)
            self._doctor()
            self._wire(demo)
            if self._settings is not None:
                gradio_api(
                    api.endpoint(self.engine, self._settings, self._line),
                    api_name="translate",
                    concurrency_limit=_ALL,
                    concurrency_id="translate",
                )
            gradio_api(api.detect, api_name="detect", concurrency_id="detect")
        # gradio's own queue on ZeroGPU holds one caller; the rest would be turned away.
        # api_open=False: nobody skips the queue by a direct POST
        demo.queue(default_concurrency_limit=CONCURRENCY, max_size=WAITING, api_open=False)
        made: gr.Blocks = demo
        return made

    def launch(self, **options: Any) -> Any:
        """Build the page and serve it. ``options`` go to gradio's ``launch``."""
        tools = find_spec("mcp") is not None
        if not tools:
            sys.stderr.write(_NO_TOOLS)
        self.demo = self.build()
        limit = self._settings.max_chars if self._settings else 0
        return self.demo.launch(
            theme=theme(),
            css_paths=[HERE / "style.css"],
            head=f"<script>{(HERE / 'page.js').read_text('utf-8')}</script>",
            i18n=self.i18n,
            mcp_server=tools,
            ssr_mode=False,
            footer_links=["api"],
            app_kwargs={"middleware": [Middleware(guard.Guard, max_chars=limit)]},
            **options,
        )

    def _masthead(self) -> None:
        with gr.Row(elem_id="top"):
            self.head = gr.HTML(panels.masthead(texts.every()["en"]), padding=False)
            self.pill = gr.HTML(padding=False, elem_id="pill")
        self.failure = gr.HTML(padding=False, elem_id="failure")
        self.retry = gr.Button(self.i18n("retry"), visible=False, elem_id="retry", size="sm")

    def _spread(self) -> None:
        with gr.Row(elem_id="spread", equal_height=True):
            with gr.Column(elem_classes="leaf", elem_id="left"):
                self.source_language = self._language("source_language", languages.AUTO)
                self.source = self._text("source", "source_label", "placeholder", written=True)
                with gr.Row(elem_classes="foot"):
                    limit = self._settings.max_chars if self._settings else 0
                    count = f'<span id="count" data-limit="{limit}">0 / {limit}</span>'
                    gr.HTML(count, padding=False)
                    self.clear = gr.Button(self.i18n("clear"), size="sm", elem_classes="quiet")
            self.swap = gr.Button("⇄", elem_id="swap", size="sm", min_width=0)
            with gr.Column(elem_classes="leaf", elem_id="right"):
                self.target_language = self._language("target_language", "en")
                self.target = self._text("target", "target_label", "target_placeholder")
                with gr.Row(elem_classes="foot"):
                    self.status = gr.HTML(padding=False, elem_id="status")
                    self.copy = gr.Button(
                        self.i18n("copy"), size="sm", elem_classes="quiet", elem_id="copy"
                    )

    def _language(self, label: str, value: str) -> gr.Dropdown:
        choices: list[Any] = [(_named(one), one.code) for one in languages.known().values()]
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
            interactive=written,
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
            self.keys = gr.HTML(handlers.keys(texts.every()["en"]), padding=False, elem_id="keys")
        with gr.Row(elem_id="examples"):
            self.examples = [
                (gr.Button(text, size="sm", elem_classes="example"), text, target)
                for text, target in _EXAMPLES
            ]

    def _doctor(self) -> None:
        with gr.Column(elem_id="doctor"):
            self.doctor_head = gr.HTML(padding=False)
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
                interactive=False,
                elem_id="report",
            )

    def _wire(self, demo: gr.Blocks) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        react = self._handlers
        timer = gr.Timer(1.0)
        standing = [self.pill, self.failure, self.retry, self.colophon, timer]
        greeted = [self.head, self.keys, self.doctor_head, *standing]
        demo.load(react.greet, None, greeted, queue=False, **quiet)
        demo.unload(react.leave)
        timer.tick(react.refresh, None, standing, queue=False, **quiet)
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
        # not gradio's own `cancels`: a press right after it is lost, and the page says "Error"
        self.stop.click(react.end, None, [self.stop], queue=False, **quiet)
        self.examine.click(
            react.diagnose, None, [self.advice, self.report, self.copy_report], **quiet
        )
        self._wire_in_the_browser()

    def _wire_in_the_browser(self) -> None:
        """What needs no server: swap, clear, copy, examples, the counter."""
        here: dict[str, Any] = {"fn": None, "queue": False, "api_visibility": "private"}
        both = [self.source, self.target, self.source_language, self.target_language]
        self.target_language.input(js="() => 'yes'", outputs=[self.chosen], **here)
        self.swap.click(js="(...all) => pages.swap(...all)", inputs=both, outputs=both, **here)
        emptied = [self.source, self.target, self.status]
        self.clear.click(js="() => ['', '', '']", outputs=emptied, **here)
        self.copy.click(js="text => pages.copy(text, 'copy')", inputs=[self.target], **here)
        self.copy_report.click(
            js="text => pages.copy(text, 'copy_report')", inputs=[self.report], **here
        )
        self.source.change(js="text => pages.count(text)", inputs=[self.source], **here)
        for button, text, target in self.examples:
            chosen = [self.source, self.source_language, self.target_language]
            button.click(js=f"() => {[text, languages.AUTO, target]!r}", outputs=chosen, **here)


def theme() -> gr.themes.Base:
    """The bare theme: nothing is fetched from elsewhere. Fonts and style are in the CSS."""
    return gr.themes.Base(
        primary_hue="slate", neutral_hue="slate", font="sans-serif", font_mono="monospace"
    )


def _named(language: languages.Language) -> str:
    if language.native == language.english:
        return language.english
    return f"{language.native} · {language.english}"
