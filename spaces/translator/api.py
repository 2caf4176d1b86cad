"""The endpoints for programs, ``translate`` and ``detect``: API routes, and MCP tools.

No ``from __future__ import annotations`` here: gradio reads the hints as they are.
"""

import reprlib
from collections.abc import Callable, Iterator
from typing import Final

import gradio as gr

from llama_loader.settings import Settings
from llama_space import Engine, Failure
from translator import detection, languages, session, texts
from translator.session import Answer, Job, Update, VisitorQueue
from translator.texts import Refusal

_TRANSLATE: Final = """Translate a text with the model that this Space serves.

The target is the language that you name. Languages: {all}. Each may be given by its code, by a BCP
47 tag such as zh-CN, en-US or pt-BR, or by its English or native name.

Args:
    text: what to translate; at most {limit} characters. Line breaks, markdown and code stay.
    target_language: such as en, ja, zh-Hans, pt-BR, German.
    source_language: likewise, or auto to have it detected.
"""


def endpoint(
    engine: Engine, settings: Settings, line: VisitorQueue
) -> Callable[..., Iterator[str]]:
    """Return the function behind the endpoint; its callers wait in the page's queue."""

    def translate(
        text: str, target_language: str = "en", source_language: str = "auto"
    ) -> Iterator[str]:
        _require_texts(text=text, target_language=target_language, source_language=source_language)
        if target_language.strip().lower() == languages.AUTO:
            raise _refused("LANGUAGE_UNKNOWN: name a target_language; only a source can be auto")
        job = Job(text, _code(source_language), _code(target_language))
        shown = ""
        for update in session.translate(engine, settings, job, line):
            _raise(update)
            if isinstance(update, Answer) and update.text != shown:
                shown = update.text
                yield shown

    translate.__doc__ = _TRANSLATE.format(
        limit=settings.max_chars,
        all=", ".join(f"{one.code} ({one.english})" for one in languages.known().values()),
    )
    # a caller gets a text; that it comes piece by piece gradio sees by itself
    translate.__annotations__["return"] = str
    return translate


def detect(text: str) -> dict[str, str | float]:
    """Guess which language a text is in.

    Returns the language's code and English name, and a confidence: 1 for certain, 0.5 where another
    language fits as well, 0 where the text has no letters.

    Args:
        text: a text of any length; its first 2,000 characters count.
    """
    _require_texts(text=text)
    guess = detection.detect(text)
    name = languages.known()[guess.code].english
    return {"language": guess.code, "name": name, "confidence": round(guess.confidence, 3)}


def _require_texts(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, str):
            raise _refused(f"TEXT_EXPECTED: {name} must be a text, not {reprlib.repr(value)}")


def _code(name: str) -> str:
    if name.strip().lower() == languages.AUTO:
        return languages.AUTO
    found = languages.find(name)
    if found is None:
        near = ", ".join(languages.near(name))
        hint = f"near ones: {near}" if near else "give a code (ja, pt-BR) or a name (German)"
        raise _refused(f"LANGUAGE_UNKNOWN: there is no language {reprlib.repr(name)}; {hint}")
    return found.code


def _raise(update: Update) -> None:
    """Raise a failure as ``gr.Error``: only its text reaches the caller."""
    if isinstance(update, Refusal) and update.name == "same":  # the page's words name its pages
        told = "the text is in the language of target_language already: name another one"
        raise _refused(f"LANGUAGE_SAME: {told}")
    if isinstance(update, Refusal):
        raise _refused(update.text(texts.every()["en"]))
    if isinstance(update, Failure):
        raise _refused(f"{update.code}: {update.message}; {update.hint}".rstrip("; "))


def _refused(sentence: str) -> gr.Error:
    """Return a caller's mistake as an error without a stack trace in the Space's log."""
    return gr.Error(sentence, print_exception=False)
