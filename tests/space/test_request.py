"""What a call asks llama-server for, and ZeroGPU: checks, GPU seconds, refusals, what is kept."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_loader import settings
from llama_loader.errors import SettingError
from llama_space import request
from llama_space.request import LONGEST, SHORTEST, Request, Shown
from llama_space.values import Figures, Reserved
from tests.rigs.refusals import refused

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


def test_limits_come_from_the_settings_or_the_context_where_the_caller_gives_none() -> None:
    few = replace(SETTINGS, max_new_tokens=7, temperature=0.5)
    for given in ({}, {"max_tokens": None, "temperature": None, "seed": None, "stop": ()}):
        assert request.chat(CHAT, given, few).options == {"max_tokens": 7, "temperature": 0.5}
    assert SETTINGS.max_new_tokens is None
    assert request.chat(CHAT, {}, replace(SETTINGS, n_ctx=512)).options["max_tokens"] == 512


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
        (CHAT[0], "{'content': 'Count.'"),
        ([], "empty"),
        (["Hello"], "message 1 is 'Hello'"),
        ([*CHAT, ["Hello", "Hi"]], "message 2 is ['Hello', 'Hi']"),
        ([{"content": "Hello"}], "role of message 1 is None"),
        ([{"role": "usr", "content": "Hello"}], "role of message 1 is 'usr'"),
        ([{"role": ["user"], "content": "Hello"}], "role of message 1 is ['user']"),
        ([{"role": "user"}], "content of message 1 is None"),
        ([{"role": "user", "content": 7}], "content of message 1 is 7"),
        ([{"role": "user", "content": ["Hello"]}], "content of message 1 is ['Hello']"),
    ],
)
def test_messages_that_make_no_sense_are_named_with_what_would_be_right(
    messages: Any, named: str
) -> None:
    with refused("MESSAGE_INVALID", SettingError) as caught:
        request.chat(messages, {}, SETTINGS)
    assert named in caught.value.message
    assert '[{"role": "user", "content": "Hello"}]' in caught.value.hint


def test_a_call_of_tools_needs_no_content() -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "1"}], "content": None}
    assert request.chat([*CHAT, call], {}, SETTINGS).asked[1] == {
        "role": "assistant",
        "tool_calls": [{"id": "1"}],
    }


def test_other_fields_of_llama_servers_request_pass() -> None:
    for name in ("top_k", "top_p", "min_p", "samplers", "grammar", "n_probs"):
        assert request.chat(CHAT, {name: 1}, SETTINGS).options[name] == 1


@pytest.mark.parametrize(
    ("options", "named", "hint"),
    [
        ({"max_tokens": "10"}, "max_tokens", ""),
        ({"max_tokens": 0}, "max_tokens", ""),
        ({"max_tokens": True}, "max_tokens", ""),
        ({"temperature": "hot"}, "temperature", ""),
        ({"temperature": -1}, "temperature", ""),
        ({"temperature": 99}, "temperature", "0 to 10"),
        ({"temperature": float("nan")}, "temperature", ""),
        ({"seed": 0.5}, "seed", ""),
        ({"stop": 7}, "stop", ""),
        ({"stop": ["a", 7]}, "stop", ""),
        ({"logit_bias": {1, 2}}, "JSON", ""),
        ({"top_p": float("inf")}, "JSON", ""),
        # misspelt, or the engine's own
        ({"max_token": 1}, "max_token", "did you mean max_tokens?"),
        *(({name: 1}, name, "leave it out") for name in ("stream", "n", "messages")),
    ],
)
def test_an_option_that_cannot_be_sent_is_named(
    options: dict[str, Any], named: str, hint: str
) -> None:
    with refused("REQUEST_INVALID", SettingError) as caught:
        request.chat(CHAT, options, SETTINGS)
    assert named in caught.value.message
    assert hint in caught.value.hint


def test_a_prompt_that_is_no_text_is_an_error() -> None:
    with pytest.raises(SettingError, match="REQUEST_INVALID") as caught:
        request.completion(CHAT, {}, SETTINGS)
    assert "engine.chat()" in caught.value.hint


# --- GPU seconds ------------------------------------------------------------------------


SIZES = {"4b": 3_300_000_000, "12b": 8_100_000_000, "27b": 17_700_000_000}
SENTENCES = {
    "English": "Good morning, how are you today? ",
    "Japanese": "おはようございます、今日はお元気ですか。",
    "Chinese": "早上好今天你过得怎么样我希望一切都好",
    "Greek": "Καλημέρα, πώς είστε σήμερα το πρωί; ",
}
NEW = Shown()


def text(language: str, characters: int) -> str:
    return (SENTENCES[language] * characters)[:characters]


def reserve(
    asked: str,
    shown: Shown = NEW,
    *,
    size: str = "27b",
    warm: bool = False,
    most: int | None = None,
) -> int:
    wanted = Request(asked, {"max_tokens": most} if most else {})
    return shown.reserve(wanted, SIZES[size], warm=warm).seconds


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("language", SENTENCES)
def test_first_call_fits_into_the_quota_of_an_anonymous_visitor(language: str, size: str) -> None:
    assert reserve(text(language, 500), size=size) <= 30
    assert reserve(text(language, 2000), size=size) <= 60


def test_short_text_asks_for_the_least_and_a_warm_worker_for_less() -> None:
    assert reserve("Good morning.") == SHORTEST
    cold, warm = (reserve(text("Chinese", 1000), warm=warm) for warm in (False, True))
    assert warm < cold - 5


def test_slowest_start_and_slowest_answer_that_were_shown_count() -> None:
    shown = Shown(starts=(4.0, 20.0, 5.0), speeds=(40.0, 20.0, 60.0))
    slow = reserve(text("Chinese", 1000), shown)
    assert slow > reserve(text("Chinese", 1000), Shown((4.0,), (40.0,))) + 20
    assert slow == reserve(text("Chinese", 1000), Shown((20.0,), (20.0,)))


def test_answer_that_may_not_be_long_is_not_paid_for() -> None:
    few, many = (reserve(text("Chinese", 2000), warm=True, most=most) for most in (100, 5000))
    assert few < many == reserve(text("Chinese", 2000), warm=True)


@pytest.mark.parametrize("speed", [0.01, 1e6])
def test_seconds_stay_within_what_zerogpu_takes(speed: float) -> None:
    for warm in (True, False):
        reserved = Shown((1.0,), (speed,)).reserve(Request("x" * 2000, {}), SIZES["4b"], warm=warm)
        assert SHORTEST <= reserved.seconds <= LONGEST
        assert reserved.least <= reserved.seconds


def test_tokens_are_counted_by_script_in_contents_of_every_form() -> None:
    assert request.tokens("x" * 100) == 25
    assert request.tokens("字" * 100) == 70
    assert request.tokens("ж" * 100) == 50
    assert request.tokens("x" * 100 + "字" * 100) == 95
    parts = [{"role": "user", "content": [{"type": "text", "text": "x" * 100}]}]
    assert request.tokens(parts) == 1 + 1 + 25
    assert request.tokens([]) == 0


@pytest.mark.parametrize(
    ("refusal", "again"),
    [
        ("(40s requested vs. 30s left). Try again in 1:00:00.", Reserved(30, 20, 30)),
        ("(60s requested vs. 30s left). Try again", Reserved(20, 20, 30)),  # ZeroGPU counts 1.5
        ("(60s requested vs. 29s left). Try again", None),  # not enough
        ("(40s requested vs. 40s left)", None),  # this was refused already
        ("(0s requested vs. 40s left)", None),
        ("Space app has reached its GPU limit.", None),
    ],
)
def test_refusal_that_says_what_is_left_is_answered_with_that_if_it_can_be_enough(
    refusal: str, again: Reserved | None
) -> None:
    assert Reserved(40, 20).after(refusal) == again


def test_cold_start_and_answer_of_some_length_are_learned() -> None:
    cold = Figures(1.0, tokens=50, tokens_per_second=33.33, warm=False)
    assert NEW.after(cold, 4.567) == Shown((4.57,), (33.3,))
    assert NEW.after(Figures(1.0, tokens=3, tokens_per_second=200.0, warm=True), 4.5) == NEW
    many = NEW
    for seconds in range(1, 9):
        many = many.after(cold, float(seconds))
    assert many.starts == (4.0, 5.0, 6.0, 7.0, 8.0)


def test_what_was_shown_is_kept_for_the_model_in_the_store(tmp_path: Path) -> None:
    store, model, shown = tmp_path / "store", Path("m.gguf"), Shown((4.0,), (33.0,))
    assert request.recall(store, model, 5) == NEW
    request.remember(store, model, 5, shown)
    assert request.recall(store, model, 5) == shown
    assert request.recall(store, model, 6) == NEW
    assert request.recall(store, Path("other.gguf"), 5) == NEW


@pytest.mark.parametrize(
    "kept", [b"", b"[]", b"\xff", b'{"starts": [-1]}', b'{"speeds": ["x"]}', b"x" * 5000]
)
def test_file_that_cannot_be_read_is_no_knowledge(kept: bytes, tmp_path: Path) -> None:
    store, model = tmp_path / "store", Path("m.gguf")
    request.remember(store, model, 5, Shown((4.0,)))
    (path,) = (store / "shown").iterdir()
    path.write_bytes(kept)
    assert request.recall(store, model, 5) == NEW
    path.unlink()
    os.mkfifo(path)
    assert request.recall(store, model, 5) == NEW
