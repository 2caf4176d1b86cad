"""How a model is asked to translate: chosen by the chat template that it carries. Pure.

Three kinds of model. TranslateGemma's template makes the whole prompt out of the text and two
language codes. Any other chat model is asked in a sentence. A base model has no template: it is
shown one translation and goes on with the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from translator.languages import Language

Format = Literal["translategemma", "chat", "base"]

_MARKS: Final = ("[source_lang_code]", "[target_lang_code]")
"""By these llama-server knows TranslateGemma's template (common/chat.cpp), and so do we."""


def format_of(template: str | None) -> Format:
    """Tell what kind of model carries this chat template; None stands for no template."""
    if template is None:
        return "base"
    return "translategemma" if all(mark in template for mark in _MARKS) else "chat"


def ask(
    kind: Format, text: str, pair: tuple[Language, Language]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages and options for one translation; ``pair`` is source and target."""
    source, target = pair
    content, options = _CONTENTS[kind](text, source, target)
    return [{"role": "user", "content": content}], options


def _translategemma(text: str, source: Language, target: Language) -> tuple[Any, dict[str, Any]]:
    """As its model card documents it: one part of text with both codes.

    llama-server drops the codes of the part and takes those of ``chat_template_kwargs``; without
    them it would translate from British English to British English.
    """
    codes = {"source_lang_code": source.code, "target_lang_code": target.code}
    return [{"type": "text", "text": text, **codes}], {"chat_template_kwargs": codes}


def _chat(text: str, source: Language, target: Language) -> tuple[Any, dict[str, Any]]:
    return (
        f"Translate the following text from {source.english} to {target.english}."
        f" Answer with the translation alone.\n\n{text}"
    ), {}


def _base(text: str, source: Language, target: Language) -> tuple[Any, dict[str, Any]]:
    """One example in both languages, then the text; the next label would begin another one."""
    stop = [f"\n{source.english}:", "\n\n"]
    if "\n" not in text.strip():
        stop.append("\n")
    return (
        f"{source.english}: {source.thanks}\n{target.english}: {target.thanks}\n\n"
        f"{source.english}: {text.strip()}\n{target.english}:"
    ), {"stop": stop}


_CONTENTS: Final[Mapping[Format, Any]] = {
    "translategemma": _translategemma,
    "chat": _chat,
    "base": _base,
}
