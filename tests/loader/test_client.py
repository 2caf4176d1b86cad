from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from llama_loader import processes
from llama_loader.client import Client, Completion
from llama_loader.errors import ServerError
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if seen is not None:
                seen.append(
                    {"body": json.loads(data or b"null"), "key": self.headers["Authorization"]}
                )
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)
            self.wfile.flush()
            while stay:
                time.sleep(0.05)
                try:
                    self.wfile.write(b": ping\n")
                except OSError:
                    if seen is not None:
                        seen.append({"gone": True})
                    return

        do_GET = do_POST  # noqa: N815

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chat(port: int) -> list[Completion]:
    messages = [{"role": "user", "content": "Hi"}]
    return list(Client(port, "key", timeout=5.0).chat(messages, max_tokens=5))


def test_a_completion_with_its_key_and_figures() -> None:
    seen: list[dict[str, object]] = []
    answer = {
        "choices": [{"text": " Paris", "finish_reason": "length"}],
        "timings": {"predicted_n": 1, "predicted_per_second": 117.5},
    }
    with answering(200, json.dumps(answer).encode(), seen=seen) as port:
        found = Client(port, "key").completion("x", max_tokens=1, cache_prompt=False)
    assert found == Completion(
        " Paris", finished=True, reason="length", tokens=1, tokens_per_second=117.5
    )
    assert seen == [
        {
            "body": {
                "prompt": "x",
                "max_tokens": 1,
                "temperature": 0.0,
                "samplers": ["temperature"],
                "backend_sampling": True,
                "cache_prompt": False,
            },
            "key": "Bearer key",
        }
    ]


def test_a_chat_comes_piece_by_piece() -> None:
    body = (
        b": a comment\n\n"
        + delta("")
        + delta("あ")
        + delta("b")
        + event(
            choices=[{"delta": {}, "finish_reason": "stop"}],
            timings={"predicted_n": 2, "predicted_per_second": 9.5},
        )
        + DONE
    )
    with answering(200, body) as port:
        pieces = chat(port)
    assert "".join(piece.text for piece in pieces) == "あb"
    assert [piece.finished for piece in pieces] == [False, False, False, True]
    assert pieces[-1] == Completion(
        "", finished=True, reason="stop", tokens=2, tokens_per_second=9.5
    )


@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (400, b'{"error": {"message": "too long"}}', "REQUEST_REFUSED", "400: too long"),
        (401, b'{"error": "no"}', "REQUEST_REFUSED", "401: no"),
        (500, b"<html>oops", "REQUEST_REFUSED", "<html>oops"),
        (200, delta("a"), "ANSWER_CUT", "in the middle"),
        (200, b"", "ANSWER_CUT", "in the middle"),
        (200, b"data: nonsense\n\n", "NOT_LLAMA_SERVER", "nonsense"),
        (200, b'data: {"choices": 5}\n\n', "NOT_LLAMA_SERVER", "choices"),
        (200, b"data: []\n\n", "NOT_LLAMA_SERVER", "[]"),
        (
            200,
            delta("a") + event(error={"message": "out of memory"}),
            "REQUEST_REFUSED",
            "out of memory",
        ),
        (200, b'error: {"error": {"message": "late"}}\n', "REQUEST_REFUSED", "late"),
    ],
)
def test_what_goes_wrong_in_a_chat_is_a_sentence(
    status: int, body: bytes, code: str, words: str
) -> None:
    with answering(status, body) as port, pytest.raises(ServerError) as caught:
        chat(port)
    assert caught.value.code == code
    assert words in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        *(b"hello", b"[]", b"{}", b'{"choices": [{"text": 5}]}', b"[" * 100_000),
        *(b'{"choices": ' + b'[{"x": ' * 100_000, b'{"choices": [{"text": "a\\ud800"}]}', b"\xff"),
    ],
)
def test_a_stranger_is_not_taken_for_llama_server(body: bytes) -> None:
    with answering(200, body) as port, pytest.raises(ServerError) as caught:
        Client(port, None).completion("x", max_tokens=1)
    assert caught.value.code == "NOT_LLAMA_SERVER"
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("length", [b"-1", b"-5", b"f" * 16])
def test_chunk_of_impossible_length_is_no_answer(length: bytes) -> None:
    """Python reads 5 bytes less than none, or, for -1, all that comes into memory."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                connection.sendall(length + b"\r\n" + b"x" * (64 << 20))

    thread = threading.Thread(target=serve)
    thread.start()
    client = Client(listener.getsockname()[1], "key")
    tracemalloc.start()
    for ask in (lambda: client.completion("x", max_tokens=1), lambda: chat(client.port)):
        with pytest.raises(ServerError) as caught:
            ask()
        assert caught.value.code in {"NO_ANSWER", "NOT_LLAMA_SERVER"}
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()
    thread.join()
    listener.close()


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = Client(free.getsockname()[1], None)
        assert client.health() is None
        with pytest.raises(ServerError) as caught:
            client.completion("x", max_tokens=1)
    assert caught.value.code == "NO_ANSWER"


def test_silence_has_an_end() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(1)
        with pytest.raises(ServerError, match=r"silent for 0\.2 s") as caught:
            Client(deaf.getsockname()[1], None, timeout=0.2).completion("x", max_tokens=1)
    assert caught.value.code == "ANSWER_TIMEOUT"


def test_closing_the_stream_closes_the_connection() -> None:
    seen: list[dict[str, object]] = []
    with answering(200, delta("a"), stay=True, seen=seen) as port:
        stream = iter(Client(port, None, timeout=5.0).chat([], max_tokens=5))
        assert next(stream).text == "a"
        stream.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 3
        while {"gone": True} not in seen and time.monotonic() < deadline:
            time.sleep(0.01)
    assert {"gone": True} in seen


@pytest.mark.model
def test_the_real_server(real_runtime: Path, real_model: Path) -> None:
    environ = processes.environment({})
    with Server(ServerPlan(real_runtime, real_model, environ)) as server:
        client = server.client()
        assert client.health() == 200
        assert client.refuses_wrong_keys()
        answer = client.completion("The capital of France is", max_tokens=3)
        assert (answer.text[:6], answer.reason, answer.tokens) == (" Paris", "length", 3)
        assert answer.tokens_per_second
        question = [{"role": "user", "content": "What is the capital of France?"}]
        pieces = list(client.chat(question, max_tokens=20))
        assert len([piece for piece in pieces if piece.text]) > 3
        assert pieces[-1].finished
        assert client.status("/slots", 10) == 200
        with pytest.raises(ServerError, match="400"):
            list(client.chat([{"role": "user"}], max_tokens=1))


@pytest.mark.model
def test_the_real_server_stops_when_the_client_goes_away(
    real_runtime: Path, real_model: Path
) -> None:
    """FAULTS 60: with one slot, a second answer comes only once the first one has ended."""
    environ = processes.environment({})
    plan = ServerPlan(real_runtime, real_model, environ, extra=("--parallel", "1"))
    with Server(plan) as server:
        question = [{"role": "user", "content": "Count to a thousand."}]
        stream = iter(server.client().chat(question, max_tokens=4000))
        for _ in range(4):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        started = time.monotonic()
        assert server.client(timeout=10).completion("The", max_tokens=1).finished
        assert time.monotonic() - started < 5


def test_another_thread_stops_a_stream_that_waits() -> None:
    """Also where not a single word has come: a reader must not wait for one to be told."""
    seen: list[dict[str, object]] = []
    for body in (b"", delta("one")):
        with answering(200, body, stay=True, seen=seen) as port:
            stream = Client(port, "key").chat([{"role": "user"}], max_tokens=5)
            got: list[Completion] = []
            reader = threading.Thread(target=lambda s=stream, g=got: g.extend(s))
            reader.start()
            deadline = time.monotonic() + 20
            while len(got) < len(body[:1]) or not seen:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            stream.stop()
            reader.join(10)
            assert not reader.is_alive()
            while seen[-1] != {"gone": True}:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            seen.clear()


def test_a_stream_stopped_before_it_began_asks_nothing() -> None:
    seen: list[dict[str, object]] = []
    with answering(200, DONE, seen=seen) as port:
        stream = Client(port, None).chat([], max_tokens=1)
        stream.stop()
        stream.stop()
        assert list(stream) == []
    assert seen == []


@contextmanager
def dripping(piece: bytes, *, first: bytes = b"") -> Iterator[int]:
    """A server that sends a piece every 20 ms for as long as the client stays."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(first)
                while True:
                    connection.sendall(piece)
                    time.sleep(0.02)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


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
    with dripping(piece, first=first) as port:
        client = Client(port, "key", timeout=0.3)
        began = time.monotonic()
        assert client.health(timeout=0.3) in {None, 200}
        with contextlib.suppress(ServerError):
            client.status("/slots", 0.3)
        with pytest.raises(ServerError) as caught:
            client.completion("x", max_tokens=1)
        assert caught.value.code in {"ANSWER_TIMEOUT", "NO_ANSWER"}
        with pytest.raises(ServerError) as caught:
            list(client.chat([], max_tokens=1))
        assert caught.value.code in {"ANSWER_TIMEOUT", "NO_ANSWER"}
        assert time.monotonic() - began < 4 * 0.3 + 2


def test_a_stream_may_take_long_as_long_as_events_come() -> None:
    with dripping(delta("a"), first=HEAD + b"\r\n") as port:
        began = time.monotonic()
        for _ in Client(port, "key", timeout=0.2).chat([], max_tokens=1):
            if time.monotonic() - began > 0.5:
                return
    raise AssertionError("the stream ended")


FIGURES = ("9" * 400, "9" * 5000, "1e999", "NaN", "-1", "true", '"1"', "[1]")
"""What is no number of tokens and no speed."""


@pytest.mark.parametrize(
    "timings",
    [
        *("[]", "[1]", '"x"', "5", "null", "[" * 100_000),
        *(f'{{"predicted_n": {figure}}}' for figure in FIGURES),
        *(f'{{"predicted_per_second": {figure}}}' for figure in FIGURES),
    ],
)
def test_timings_that_are_none_are_not_llama_servers(timings: str) -> None:
    answer = f'{{"choices": [], "timings": {timings}}}'
    with answering(200, answer.encode()) as port, pytest.raises(ServerError) as caught:
        Client(port, None).completion("x", max_tokens=1)
    assert caught.value.code == "NOT_LLAMA_SERVER"
    with (
        answering(200, f"data: {answer}\n\n".encode()) as port,
        pytest.raises(ServerError) as caught,
    ):
        chat(port)
    assert caught.value.code == "NOT_LLAMA_SERVER"


def test_figures_that_the_server_cannot_tell_are_none() -> None:
    """It writes null for what is infinite: a time of zero."""
    told = event(choices=[], timings={"predicted_n": None, "predicted_per_second": None})
    for answer in (told, event(choices=[])):
        with answering(200, answer + DONE) as port:
            assert chat(port) == [Completion("", finished=False)]


@pytest.mark.parametrize(
    "body",
    [b'{"error": {"message": 5}}', b'{"error": []}', b'{"error":' + b"[" * 2000, b"5", b"{}"],
)
def test_a_refusal_in_any_form_is_a_sentence(body: bytes) -> None:
    with answering(500, body) as port, pytest.raises(ServerError, match="with status 500"):
        Client(port, None).completion("x", max_tokens=1)


def test_a_key_in_any_script_is_sent_as_utf_8() -> None:
    seen: list[dict[str, object]] = []
    with answering(200, b'{"choices": []}', seen=seen) as port:
        client = Client(port, "鍵")
        client.completion("x", max_tokens=1)
    assert str(seen[0]["key"]).encode("latin-1").decode() == "Bearer 鍵"


def test_the_key_is_not_shown_where_the_client_is() -> None:
    assert "secret" not in repr(Client(1, "secret"))


def test_health_is_asked_without_the_key() -> None:
    seen: list[dict[str, object]] = []
    with answering(200, b"{}", seen=seen) as port:
        assert Client(port, "key").health() == 200
    assert [one["key"] for one in seen] == [None]
