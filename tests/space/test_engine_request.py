from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llama_loader import settings
from llama_loader.errors import SettingError
from llama_space import request

SETTINGS = settings.load(environ={})
CHAT = [{"role": "user", "content": "Count."}]


def test_a_chat_is_sent_as_gradio_keeps_it_without_what_is_for_the_page() -> None:
    parts = [{"type": "text", "text": "Hello"}]
    history = [
        {"role": "user", "content": parts, "metadata": None, "options": None},
        {"role": "assistant", "content": "Hi", "metadata": {"title": None}, "options": []},
    ]
    options = {"max_tokens": 7, "temperature": 0.5, "seed": 0, "top_p": 0.9}
    asked = request.chat([*history, *CHAT], {**options, "stop": "\n"}, SETTINGS)
    assert asked.asked == [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Hi"},
        *CHAT,
    ]
    assert asked.options == {**options, "stop": ["\n"]}


def test_limits_come_from_the_settings_where_the_caller_gives_none() -> None:
    few = replace(SETTINGS, max_new_tokens=7, temperature=0.5)
    for given in ({}, {"max_tokens": None, "temperature": None, "seed": None, "stop": ()}):
        assert request.chat(CHAT, given, few).options == {"max_tokens": 7, "temperature": 0.5}


def test_answer_has_what_the_context_leaves_where_nothing_limits_it() -> None:
    assert SETTINGS.max_new_tokens is None
    roomy = replace(SETTINGS, n_ctx=512)
    assert request.chat(CHAT, {}, roomy).options["max_tokens"] == 512


@pytest.mark.parametrize(
    ("stop", "sent"),
    [(None, None), ((), None), ("\n", ["\n"]), (["a", "b"], ["a", "b"]), (("a",), ["a"])],
)
def test_stop_is_taken_as_openai_s_client_takes_it(stop: Any, sent: list[str] | None) -> None:
    assert request.chat(CHAT, {"stop": stop}, SETTINGS).options.get("stop") == sent


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ("Hello", "'Hello'"),
        (b"Hello", "b'Hello'"),
        (None, "None"),
        (7, "7"),
        (CHAT[0], "{'content': 'Count.'"),
        ([], "empty"),
        (["Hello"], "message 1 is 'Hello'"),
        ([*CHAT, ["Hello", "Hi"]], "message 2 is ['Hello', 'Hi']"),
        ([{"content": "Hello"}], "role of message 1 is None"),
        ([{"role": "usr", "content": "Hello"}], "role of message 1 is 'usr'"),
        ([{"role": 1, "content": "Hello"}], "role of message 1 is 1"),
        ([{"role": ["user"], "content": "Hello"}], "role of message 1 is ['user']"),
        ([{"role": "user"}], "content of message 1 is None"),
        ([{"role": "user", "content": 7}], "content of message 1 is 7"),
        ([{"role": "user", "content": ["Hello"]}], "content of message 1 is ['Hello']"),
    ],
)
def test_messages_that_make_no_sense_are_named_with_what_would_be_right(
    messages: Any, named: str
) -> None:
    with pytest.raises(SettingError) as caught:
        request.chat(messages, {}, SETTINGS)
    assert caught.value.code == "MESSAGE_INVALID"
    assert named in caught.value.message
    assert '[{"role": "user", "content": "Hello"}]' in caught.value.hint


def test_a_call_of_tools_needs_no_content() -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "1"}], "content": None}
    assert request.chat([*CHAT, call], {}, SETTINGS).asked[1] == {
        "role": "assistant",
        "tool_calls": [{"id": "1"}],
    }


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("max_token", "did you mean max_tokens?"),
        ("temprature", "did you mean temperature?"),
        ("stream", "leave it out"),
        ("n", "leave it out"),
        ("messages", "leave it out"),
    ],
)
def test_option_that_is_misspelt_or_the_engines_own_is_refused(name: str, named: str) -> None:
    with pytest.raises(SettingError) as refused:
        request.chat(CHAT, {name: 1}, SETTINGS)
    assert refused.value.code == "REQUEST_INVALID"
    assert named in refused.value.hint


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "samplers", "grammar", "n_probs"])
def test_other_fields_of_llama_servers_request_pass(name: str) -> None:
    assert request.chat(CHAT, {name: 1}, SETTINGS).options[name] == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": 0.5}, "seed"),
        ({"stop": 7}, "stop"),
        ({"stop": ["a", 7]}, "stop"),
        ({"logit_bias": {1, 2}}, "JSON"),
        ({"top_p": float("inf")}, "JSON"),
    ],
)
def test_an_option_that_cannot_be_sent_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError) as caught:
        request.chat(CHAT, options, SETTINGS)
    assert caught.value.code == "REQUEST_INVALID"
    assert named in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("prompt", [None, 7, CHAT, b"Once"])
def test_a_prompt_that_is_no_text_is_an_error(prompt: Any) -> None:
    with pytest.raises(SettingError) as caught:
        request.completion(prompt, {}, SETTINGS)
    assert caught.value.code == "REQUEST_INVALID"
    assert "engine.chat()" in caught.value.hint
