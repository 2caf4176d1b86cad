"""Prompts for a translation, chosen by the model's chat template. No side effects.

Three kinds of model. TranslateGemma's template makes the whole prompt out of the text and two
language codes. Other chat models get a sentence. A base model has no template: it is
shown one translation and continues with the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from translator.languages import Language

Format = Literal["translategemma", "chat", "base"]

_MARKS: Final = ("[source_lang_code]", "[target_lang_code]")
"""llama-server recognises TranslateGemma's template by these (common/chat.cpp), and so do we."""


def format_of(template: str | None) -> Format:
    """Return the kind of model that has this chat template; None means no template."""
    if template is None:
        return "base"
    return "translategemma" if all(mark in template for mark in _MARKS) else "chat"


def ask(
    kind: Format,
    text: str,
    pair: tuple[Language, Language],
    before: tuple[str, str] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages and options for one translation.

    Args:
        kind: of the model.
        text: for a base model a single line.
        pair: source and target.
        before: the sentences before the text, and their translation: the model continues there.
    """
    if kind == "base":
        return _base(text, *pair, before)
    source, target = pair
    codes = {"source_lang_code": source.code, "target_lang_code": target.code}
    gemma = kind == "translategemma"
    # as its model card documents it: one part of text with both codes
    content = [{"type": "text", "text": text, **codes}] if gemma else _chat(text, source, target)
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if before is not None:
        earlier, answer = before
        turn, _ = ask(kind, earlier, pair)
        messages = [*turn, {"role": "assistant", "content": answer}, *messages]
    # llama-server drops the codes of the part and takes those of ``chat_template_kwargs``: without
    # them it would translate from British English to British English
    return messages, {"chat_template_kwargs": codes} if gemma else {}


def _chat(text: str, source: Language, target: Language) -> str:
    return (
        f"Translate the following text from {source.english} to {target.english}."
        f" Answer with the translation alone.\n\n{text}"
    )


def _base(
    text: str, source: Language, target: Language, before: tuple[str, str] | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return examples in both languages, then the text; the answer ends with its line."""
    examples = [(source.thanks, target.thanks)]
    if before is not None:
        examples.append((" ".join(before[0].split()), " ".join(before[1].split())))
    shown = "".join(
        f"{source.english}: {one}\n{target.english}: {other}\n\n" for one, other in examples
    )
    content = f"{shown}{source.english}: {text.strip()}\n{target.english}:"
    return [{"role": "user", "content": content}], {"stop": [f"\n{source.english}:", "\n"]}
