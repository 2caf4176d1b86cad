import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from waiting import comes

from llama_loader import processes
from llama_loader.client import Client, Piece
from llama_loader.errors import ServerError
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from tests.rigs import http_served
from tests.rigs.http_served import Answer, Request

DONE = b"data: [DONE]\n\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"delta": {"content": text}, "finish_reason": finish}])


@contextmanager
def answering(
    status: int, answer: bytes, *, stay: bool = False, seen: list[dict[str, object]] | None = None
) -> Iterator[int]:
    """A server that gives one answer to everything; ``stay`` keeps the connection open."""
    noted: list[dict[str, object]] = [] if seen is None else seen

    def staying() -> Iterator[bytes]:
        try:
            yield answer
            while True:
                time.sleep(0.05)
                yield b": ping\n"
        finally:
            noted.append({"gone": True})

    def answered(asked: Request) -> Answer:
        noted.append({"body": asked.json(), "key": asked.headers["Authorization"]})
        return Answer(status, staying() if stay else answer)

    with http_served.serving(answered) as url:
        yield int(url.rpartition(":")[2])


def chat(port: int, timeout: float = 5.0) -> list[Piece]:
    messages = [{"role": "user", "content": "Hi"}]
    return list(Client(port, "key", timeout=timeout).chat(messages, max_tokens=5))


def complete(port: int, timeout: float = 5.0) -> Piece:
    return Client(port, "key", timeout=timeout).completion("x", max_tokens=1)


def refused(ask: Callable[..., Any], *given: Any) -> ServerError:
    with pytest.raises(ServerError) as caught:
        ask(*given)
    assert len(caught.value.message) < 500
    return caught.value


def test_a_completion_with_its_key_and_figures() -> None:
    seen: list[dict[str, object]] = []
    answer = {
        "choices": [{"text": " Paris", "finish_reason": "length"}],
        "timings": {"predicted_n": 1, "predicted_per_second": 117.5},
    }
    with answering(200, json.dumps(answer).encode(), seen=seen) as port:
        found = Client(port, "鍵").completion("x", max_tokens=1, cache_prompt=False)
    assert found == Piece(
        " Paris", finished=True, tokens=1, tokens_per_second=117.5, reason="length"
    )
    assert str(seen[0]["key"]).encode("latin-1").decode() == "Bearer 鍵"
    assert seen[0]["body"] == {
        "prompt": "x",
        "max_tokens": 1,
        "temperature": 0.0,
        "samplers": ["temperature"],
        "backend_sampling": True,
        "cache_prompt": False,
    }


def test_a_chat_comes_piece_by_piece() -> None:
    last = {"predicted_n": 2, "predicted_per_second": 9.5}
    end = event(choices=[{"delta": {}, "finish_reason": "stop"}], timings=last)
    body = b": a comment\n\n" + delta("") + delta("あ") + delta("b") + end + DONE
    with answering(200, body) as port:
        pieces = chat(port)
    assert "".join(piece.text for piece in pieces) == "あb"
    assert [piece.finished for piece in pieces] == [False, False, False, True]
    assert pieces[-1] == Piece("", finished=True, tokens=2, tokens_per_second=9.5, reason="stop")


@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (400, b'{"error": {"message": "too long"}}', "REQUEST_REFUSED", "400: too long"),
        (400, b"over the available context size (9 tokens)", "REQUEST_REFUSED", "raise YAKULINGO"),
        (401, b'{"error": "no"}', "REQUEST_REFUSED", "401: no"),
        (500, b"<html>oops", "REQUEST_REFUSED", "<html>oops"),
        *(
            (500, body, "REQUEST_REFUSED", "with status 500")
            for body in (b'{"error": {"message": 5}}', b'{"error": []}', b'{"error":[[[', b"5")
        ),
        (500, b'{"error": null, "why": "busy"}', "REQUEST_REFUSED", "busy"),
        (200, delta("a"), "ANSWER_CUT", "in the middle"),
        (200, b"", "ANSWER_CUT", "in the middle"),
        (200, b"data: nonsense\n\n", "NOT_LLAMA_SERVER", "nonsense"),
        (200, event(error=None), "NOT_LLAMA_SERVER", "null"),
        (200, delta("a") + event(error={"message": "no room"}), "REQUEST_REFUSED", "no room"),
        (200, b'error: {"error": {"message": "late"}}\n', "REQUEST_REFUSED", "late"),
    ],
)
def test_what_goes_wrong_in_a_chat_is_a_sentence(
    status: int, body: bytes, code: str, words: str
) -> None:
    with answering(status, body) as port:
        error = refused(chat, port)
    assert error.code == code
    assert words in f"{error.message}; {error.hint}"


NO_FIGURES = ("9" * 400, "9" * 5000, "1e999", "NaN", "-1", "true", '"1"', "[1]")
NO_TIMINGS = (
    *("[]", "[1]", '"x"', "5", "null", "[" * 100_000),
    *(f'{{"predicted_n": {figure}}}' for figure in NO_FIGURES),
    *(f'{{"predicted_per_second": {figure}}}' for figure in NO_FIGURES),
)


@pytest.mark.parametrize(
    "body",
    [
        *(b"hello", b"[]", b"{}", b'{"choices": 5}', b'{"choices": [{"text": 5}]}', b"\xff"),
        *(b"[" * 100_000, b'{"choices": ' + b'[{"x": ' * 100_000),
        b'{"choices": [{"text": "a\\ud800"}]}',
        *(f'{{"choices": [], "timings": {one}}}'.encode() for one in NO_TIMINGS),
    ],
)
def test_a_stranger_is_not_taken_for_llama_server(body: bytes) -> None:
    with answering(200, body) as port:
        assert refused(complete, port).code == "NOT_LLAMA_SERVER"
    with answering(200, b"data: " + body + b"\n\n") as port:
        assert refused(chat, port).code == "NOT_LLAMA_SERVER"


def test_figures_that_the_server_cannot_tell_are_none() -> None:
    """It writes null for what is infinite: a time of zero."""
    told = event(choices=[], timings={"predicted_n": None, "predicted_per_second": None})
    for answer in (told, event(choices=[])):
        with answering(200, answer + DONE) as port:
            assert chat(port) == [Piece("", finished=False)]


@pytest.mark.parametrize("length", [b"-1", b"-5", b"f" * 16])
def test_chunk_of_impossible_length_is_no_answer(length: bytes) -> None:
    """Python reads 5 bytes less than none, or, for -1, all that comes into memory."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with http_served.sending(head + length + b"\r\n" + b"x" * (64 << 20)) as (port, _):
        tracemalloc.start()
        for ask in (complete, chat):
            assert refused(ask, port).code in {"NO_ANSWER", "NOT_LLAMA_SERVER"}
        assert tracemalloc.get_traced_memory()[1] < 150 << 20
        tracemalloc.stop()


def test_no_listener_and_silence_are_errors() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        assert Client(port, None).health() is None
        assert refused(complete, port).code == "NO_ANSWER"
        other.listen(1)
        error = refused(complete, port, 0.2)
    assert (error.code, "silent for 0.2 s" in error.message) == ("ANSWER_TIMEOUT", True)


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("piece", "first"),
    [
        (b"H", b""),
        (b"a: b\r\n", HEAD),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 5000, b""),
        (b" ", HEAD + b"Content-Length: 1000000\r\n\r\n"),
        (b"1\r\n \r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n"),
        (b": ping\n\n", HEAD + b"\r\n"),
        (b"d", HEAD + b"\r\ndata: "),
    ],
    ids=["status", "headers", "100s", "many-100s", "length", "chunks", "comments", "line"],
)
def test_a_request_has_a_deadline_that_drips_do_not_put_off(piece: bytes, first: bytes) -> None:
    with http_served.sending(first, piece) as (port, _):
        began = time.monotonic()
        assert Client(port, "key").health(timeout=0.3) in {None, 200}
        for ask in (complete, chat):
            assert refused(ask, port, 0.3).code in {"ANSWER_TIMEOUT", "NO_ANSWER"}
        assert time.monotonic() - began < 3 * 0.3 + 2


def test_a_stream_may_take_long_as_long_as_events_come() -> None:
    with http_served.sending(HEAD + b"\r\n", delta("a")) as (port, _):
        began = time.monotonic()
        for _ in Client(port, "key", timeout=0.2).chat([], max_tokens=1):
            if time.monotonic() - began > 0.5:
                return
    raise AssertionError("the stream ended")


def test_closing_the_stream_closes_the_connection() -> None:
    seen: list[dict[str, object]] = []
    with answering(200, delta("a"), stay=True, seen=seen) as port:
        stream = iter(Client(port, None, timeout=5.0).chat([], max_tokens=5))
        assert next(stream).text == "a"
        stream.close()
        assert comes(lambda: {"gone": True} in seen)


@pytest.mark.parametrize("body", [b"", delta("one")])
def test_another_thread_stops_a_stream_that_waits(body: bytes) -> None:
    """Also where not a single word has come: a reader must not wait for one to be told."""
    seen: list[dict[str, object]] = []
    got: list[Piece] = []
    with answering(200, body, stay=True, seen=seen) as port:
        stream = Client(port, "key").chat([{"role": "user"}], max_tokens=5)
        reader = threading.Thread(target=lambda: got.extend(stream))
        reader.start()
        assert comes(lambda: len(got) >= len(body[:1]) and bool(seen))
        stream.stop()
        reader.join(10)
        assert not reader.is_alive()
        assert comes(lambda: {"gone": True} in seen)


def test_a_stream_stopped_before_it_began_asks_nothing() -> None:
    seen: list[dict[str, object]] = []
    with answering(200, DONE, seen=seen) as port:
        stream = Client(port, None).chat([], max_tokens=1)
        stream.stop()
        stream.stop()
        assert list(stream) == []
    assert seen == []


def test_health_is_asked_without_the_key() -> None:
    seen: list[dict[str, object]] = []
    with answering(200, b"{}", seen=seen) as port:
        client = Client(port, "secret")
        assert client.health() == 200
    assert [one["key"] for one in seen] == [None]
    assert "secret" not in repr(client)


@pytest.mark.model
def test_the_real_server_answers_and_stops_when_the_client_goes_away(
    real_runtime: Path, real_model: Path
) -> None:
    """With one slot, a second answer comes only once the first one has ended."""
    plan = ServerPlan(real_runtime, real_model, processes.environment({}), pinned_build=True)
    with Server(replace(plan, extra=("--parallel", "1"))) as server:
        client = server.client()
        assert server.report.buffers
        assert client.health() == client.status("/slots", 10) == 200
        assert client.refuses_wrong_keys()
        answer = client.completion("The capital of France is", max_tokens=3)
        assert (answer.text[:6], answer.reason, answer.tokens) == (" Paris", "length", 3)
        assert answer.tokens_per_second
        question = [{"role": "user", "content": "Count to a thousand."}]
        pieces = list(client.chat(question, max_tokens=20))
        assert len([piece for piece in pieces if piece.text]) > 3
        assert pieces[-1].finished
        with pytest.raises(ServerError, match="400"):
            list(client.chat([{"role": "user"}], max_tokens=1))
        stream = iter(server.client().chat(question, max_tokens=4000))
        for _ in range(4):
            next(stream)
        stream.close()
        started = time.monotonic()
        assert server.client(timeout=10).completion("The", max_tokens=1).finished
        assert time.monotonic() - started < 5
