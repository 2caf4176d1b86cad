"""The endpoint for programs: an API route and an MCP tool, both called ``translate``.

No ``from __future__ import annotations`` here: gradio reads the hints as they are.
"""

from collections.abc import Callable, Iterator

import gradio as gr

from llama_loader.settings import Settings
from llama_space.values import Failure
from translator import languages, session, texts
from translator.line import Line
from translator.session import Answer, Engine, Job, Refusal, Update


def endpoint(
    engine: Engine, settings: Settings, line: Line | None = None
) -> Callable[..., Iterator[str]]:
    """Return the function behind the endpoint; its callers stand in the page's line."""

    def translate(
        text: str, target_language: str = "en", source_language: str = "auto"
    ) -> Iterator[str]:
        """Translate a text with the model that this Space serves.

        Args:
            text: what to translate; at most as many characters as the page says.
            target_language: a code or a name, such as en, ja, zh-Hans, German.
            source_language: likewise, or auto to have it detected.
        """
        if not all(isinstance(one, str) for one in (text, target_language, source_language)):
            raise _refused("TEXT_EXPECTED: text and languages must be texts")
        job = Job(text, _code(source_language), _code(target_language))
        shown = ""
        for update in session.translate(engine, settings, job, line):
            _raise(update)
            if isinstance(update, Answer) and update.text != shown:
                shown = update.text
                yield shown

    # a caller gets a text; that it comes piece by piece gradio sees by itself
    translate.__annotations__["return"] = str
    return translate


def _code(name: str) -> str:
    if name.strip().lower() == languages.AUTO:
        return languages.AUTO
    found = languages.find(name)
    if found is None:
        some = ", ".join(list(languages.known())[:6])
        raise _refused(f"LANGUAGE_UNKNOWN: there is no language {name!r}; try {some} …")
    return found.code


def _raise(update: Update) -> None:
    """Only the text of a ``gr.Error`` reaches the caller."""
    if isinstance(update, Refusal):
        raise _refused(texts.every()["en"][update.name].format(**update.values))
    if isinstance(update, Failure):
        raise _refused(f"{update.code}: {update.message}; {update.hint}".rstrip("; "))


def _refused(sentence: str) -> gr.Error:
    """A caller's mistake is no reason for a stack trace in the Space's log."""
    return gr.Error(sentence, print_exception=False)
