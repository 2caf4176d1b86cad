"""How each kind of model is asked. What llama-server makes of it: tests/integration/test_prompt."""

import pytest

from llama_loader import settings
from llama_space import preparation, request
from translator import languages, prompt

JA, EN = languages.known()["ja"], languages.known()["en"]


def test_translategemma_is_known_by_both_codes_in_its_template() -> None:
    template = "{{ content['source_lang_code'] }}"
    assert prompt.format_of(template) == "chat"
    real = 'content["source_lang_code"] languages[source_lang_code] languages[target_lang_code]'
    assert prompt.format_of(real) == "translategemma"


def test_no_template_is_a_base_model_and_only_that_needs_a_server_argument() -> None:
    assert prompt.format_of(None) == "base"
    assert preparation.server_arguments(None) == ("--chat-template", preparation.PLAIN_TEMPLATE)
    assert preparation.server_arguments("{{ messages }}") == ()


def test_translategemma_gets_both_codes_in_the_part_and_in_the_template_s_arguments() -> None:
    messages, options = prompt.ask("translategemma", "猫", (JA, EN))
    codes = {"source_lang_code": "ja", "target_lang_code": "en"}
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "猫", **codes}]}]
    assert options == {"chat_template_kwargs": codes}


def test_a_chat_model_is_told_both_languages_by_name() -> None:
    (message,), _ = prompt.ask("chat", "猫", (JA, EN))
    assert "from Japanese to English" in message["content"]
    assert message["content"].endswith("\n\n猫")


def test_a_base_model_stops_at_the_line_s_end() -> None:
    (message,), options = prompt.ask("base", "猫", (JA, EN))
    assert message["content"].endswith("Japanese: 猫\nEnglish:")
    assert options == {"stop": ["\nJapanese:", "\n"]}


@pytest.mark.parametrize("kind", ["translategemma", "chat"])
def test_sentences_before_are_an_earlier_turn_of_a_chat(kind: prompt.Format) -> None:
    alone, options = prompt.ask(kind, "猫", (JA, EN))
    earlier, _ = prompt.ask(kind, "犬", (JA, EN))
    answer = {"role": "assistant", "content": "A dog"}
    made = prompt.ask(kind, "猫", (JA, EN), ("犬", "A dog"))
    assert made == ([*earlier, answer, *alone], options)


def test_sentences_before_are_an_example_of_a_base_model() -> None:
    (message,), _ = prompt.ask("base", "猫", (JA, EN), ("犬\n狼", "A dog\nA wolf"))
    shown = "\n\nJapanese: 犬 狼\nEnglish: A dog A wolf\n\nJapanese: 猫\nEnglish:"
    assert message["content"].endswith(shown)


@pytest.mark.parametrize("kind", ["translategemma", "chat", "base"])
def test_the_engine_takes_what_each_kind_of_model_is_asked(kind: prompt.Format) -> None:
    messages, options = prompt.ask(kind, "猫", (JA, EN), ("犬", "A dog"))
    assert request.chat(messages, options, settings.load(environ={})).asked == messages
