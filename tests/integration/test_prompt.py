"""What a real llama-server makes of our requests, with Gemma 3's real tokenizer."""

import http.client
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gemma
import pytest
from needs import must_or_skip

from farm.errors import SourceError
from llama_loader import gguf_header, processes
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from llama_space import preparation
from translator import languages, prompt

pytestmark = [pytest.mark.docker, pytest.mark.model]

JA, EN = languages.known()["ja"], languages.known()["en"]
TEXT = "今日はいい天気です。"


@pytest.fixture(scope="module")
def base_model() -> Path:
    try:
        return gemma.model()
    except SourceError as error:
        must_or_skip(error.message)


@pytest.fixture(scope="module")
def template() -> str:
    try:
        return gemma.translategemma_template()
    except SourceError as error:
        must_or_skip(error.message)


def started(runtime: Path, model: Path, *extra: str) -> Server:
    environ = processes.environment({})
    return Server(ServerPlan(runtime, model, environ, n_ctx=1024, key=None, extra=extra))


@pytest.fixture(scope="module")
def its_model(
    base_model: Path, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Gemma's weights and tokenizer, with TranslateGemma's own template in the file's header."""
    del base_model
    path = gemma.carrying(template, tmp_path_factory.mktemp("template"))
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def translategemma(real_runtime: Path, its_model: Path) -> Iterator[Server]:
    """A server as the Space starts it: it gets only the content of the file."""
    told = preparation.server_arguments(gguf_header.chat_template(its_model))
    assert told == ()
    with started(real_runtime, its_model, *told) as server:
        yield server


@pytest.fixture(scope="module")
def base(real_runtime: Path, base_model: Path) -> Iterator[Server]:
    told = preparation.server_arguments(gguf_header.chat_template(base_model))
    with started(real_runtime, base_model, *told) as server:
        yield server


def post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def applied(server: Server, asked: tuple[list[dict[str, Any]], dict[str, Any]]) -> str:
    """The prompt that llama-server makes of a request."""
    messages, options = asked
    made = post(server, "/apply-template", {"messages": messages, **options})
    assert "prompt" in made, made
    return str(made["prompt"])


def test_the_template_is_read_from_the_file_and_recognised(its_model: Path, template: str) -> None:
    assert gguf_header.chat_template(its_model) == template
    assert prompt.format_of(template) == "translategemma"


def test_the_server_has_taken_the_template_from_the_file(
    translategemma: Server, template: str
) -> None:
    with urllib.request.urlopen(f"{translategemma.url}/props") as response:
        assert json.load(response)["chat_template"].strip() == template.strip()


def test_the_chat_that_the_page_sends_is_answered(translategemma: Server) -> None:
    messages, options = prompt.ask("translategemma", TEXT, (JA, EN))
    pieces = list(translategemma.client().chat(messages, max_tokens=8, **options))
    assert pieces[-1].reason in {"stop", "length"}
    assert "".join(piece.text for piece in pieces).strip()


def test_the_template_knows_every_language_of_the_page(template: str) -> None:
    unknown = [code for code in languages.known() if f'"{code}": "' not in template]
    assert not unknown


def test_translategemma_is_asked_from_the_source_into_the_target(translategemma: Server) -> None:
    made = applied(translategemma, prompt.ask("translategemma", TEXT, (JA, EN)))
    assert made.startswith("<start_of_turn>user\n")
    assert "Japanese (ja) to English (en)" in made
    assert made.endswith(f"\n\n\n{TEXT}<end_of_turn>\n<start_of_turn>model\n")
    assert "en-GB" not in made


def test_translategemma_sees_the_sentences_before_as_an_earlier_turn(
    translategemma: Server,
) -> None:
    made = applied(translategemma, prompt.ask("translategemma", TEXT, (JA, EN), ("犬。", "A dog.")))
    assert made.count("<start_of_turn>user\n") == 2
    assert made.count("Japanese (ja) to English (en)") == 2
    assert "犬。<end_of_turn>\n" in made
    assert "A dog.<end_of_turn>\n" in made
    assert made.endswith(f"\n\n\n{TEXT}<end_of_turn>\n<start_of_turn>model\n")


@pytest.mark.parametrize("code", ["zh-Hans", "fil-PH", "pt-BR", "sr"])
def test_codes_with_a_region_or_script_reach_the_prompt(translategemma: Server, code: str) -> None:
    pair = languages.known()[code], EN
    assert f"({code}) to English (en)" in applied(
        translategemma, prompt.ask("translategemma", "x", pair)
    )


def test_the_turn_s_marks_are_single_tokens_of_gemma_s_vocabulary(translategemma: Server) -> None:
    made = applied(translategemma, prompt.ask("translategemma", TEXT, (JA, EN)))
    body = {"content": made, "parse_special": True, "with_pieces": True}
    pieces = [one["piece"] for one in post(translategemma, "/tokenize", body)["tokens"]]
    assert pieces.count("<start_of_turn>") == 2
    assert pieces.count("<end_of_turn>") == 1


def test_the_base_model_carries_no_template(base_model: Path, real_model: Path) -> None:
    assert gguf_header.chat_template(base_model) is None
    assert "<|im_start|>" in (gguf_header.chat_template(real_model) or "")


def test_a_base_model_s_prompt_is_the_text_and_nothing_else(base: Server) -> None:
    asked = prompt.ask("base", TEXT, (JA, EN))
    assert applied(base, asked) == asked[0][0]["content"]


def test_a_base_model_translates_by_example_and_stops_at_the_line_s_end(base: Server) -> None:
    messages, options = prompt.ask("base", TEXT, (JA, EN))
    pieces = list(base.client().chat(messages, max_tokens=24, **options))
    answer = "".join(piece.text for piece in pieces).strip()
    assert pieces[-1].reason == "stop"
    assert "\n" not in answer
    assert "day" in answer or "weather" in answer
