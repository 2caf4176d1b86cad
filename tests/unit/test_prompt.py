"""How each kind of model is asked. What llama-server makes of it: tests/integration/test_prompt."""

from __future__ import annotations

import pytest

from llama_loader import settings
from llama_space import shared_server
from translator import languages, prompt

JA, EN = languages.known()["ja"], languages.known()["en"]
SETTINGS = settings.load(environ={})


def test_translategemma_is_known_by_both_codes_in_its_template() -> None:
    template = "{{ content['source_lang_code'] }}"
    assert prompt.format_of(template) == "chat"
    real = 'content["source_lang_code"] languages[source_lang_code] languages[target_lang_code]'
    assert prompt.format_of(real) == "translategemma"


def test_no_template_is_a_base_model_and_only_that_needs_a_server_argument() -> None:
    assert prompt.format_of(None) == "base"
    assert shared_server.server_arguments(None) == ("--chat-template", shared_server.PLAIN_TEMPLATE)
    assert shared_server.server_arguments("{{ messages }}") == ()


def test_translategemma_gets_both_codes_in_the_part_and_in_the_template_s_arguments() -> None:
    asked = prompt.ask("translategemma", "猫", (JA, EN), SETTINGS)
    codes = {"source_lang_code": "ja", "target_lang_code": "en"}
    assert asked.messages == (
        {"role": "user", "content": [{"type": "text", "text": "猫", **codes}]},
    )
    assert asked.extra == {"chat_template_kwargs": codes}


def test_a_chat_model_is_told_both_languages_by_name() -> None:
    (message,) = prompt.ask("chat", "猫", (JA, EN), SETTINGS).messages
    assert "from Japanese to English" in message["content"]
    assert message["content"].endswith("\n\n猫")


@pytest.mark.parametrize(("text", "stops"), [("猫", True), ("猫\n犬", False)])
def test_a_base_model_stops_at_the_line_s_end_unless_the_text_has_lines(
    text: str, stops: bool
) -> None:
    asked = prompt.ask("base", text, (JA, EN), SETTINGS)
    assert asked.messages[0]["content"].endswith(f"Japanese: {text}\nEnglish:")
    assert ("\n" in asked.extra["stop"]) is stops


def test_limits_come_from_the_settings() -> None:
    few = settings.load(
        environ={"YAKULINGO_SPACES_MAX_NEW_TOKENS": "7", "YAKULINGO_SPACES_TEMPERATURE": "0.5"}
    )
    asked = prompt.ask("chat", "猫", (JA, EN), few)
    assert (asked.max_tokens, asked.temperature) == (7, 0.5)
