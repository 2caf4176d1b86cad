"""Calls llama-server's HTTP API with the standard library: health, completion, streamed chat.

One connection for each request, no pool: the server is on loopback, and closing the connection is
how a stream is stopped (the server notices and frees the slot). Each request has a deadline, which
a server that sends a byte now and then cannot put off.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, final

import msgspec
from msgspec import Meta

from llama_loader.errors import ServerError

_MOST: Final = 4 * 1024 * 1024
"""Bytes of an answer or an event. Another program on the port must not fill the memory."""
_MOST_SENT: Final = 4 * _MOST
"""Bytes that come for it: headers, and the chunks' own sizes."""
_READ_OF_REFUSAL, _SHOWN = 4096, 300
_OK, _UNAUTHORIZED = 200, 401


@dataclass(frozen=True)
class Piece:
    """An answer, or a part of one: the new words, and whether the answer ends with them.

    ``tokens`` are those generated so far. Both figures are None where the server does not say.
    ``reason`` is why the answer ended, ``stop`` or ``length``; empty before its end.
    """

    text: str
    finished: bool = True
    tokens: int | None = None
    tokens_per_second: float | None = None
    reason: str = ""


@dataclass
class Client:
    """Calls one llama-server, on ``port`` of 127.0.0.1.

    Its methods raise ``ServerError``: no answer, none in time, none of llama-server's, a refusal.
    """

    port: int
    api_key: str | None = field(repr=False)  # None if the server requires none
    timeout: float = 60.0  # seconds for each whole answer, and for each event of a stream
    # called when connected, before anything is sent; what it raises prevents that
    require_ours: Callable[[], None] = lambda: None

    def status(self, path: str, timeout: float) -> int:
        """Return the status of a GET; the body is not read."""
        with self.request(path, timeout) as response:
            return response.status

    def health(self, *, timeout: float = 2.0) -> int | None:
        """Return the status of ``/health``: 200 ready, 503 loading; None without an answer.

        200 means that the model was loaded once; only a completion proves an answer. Sends no key.
        """
        try:
            return Client(self.port, None).status("/health", timeout)
        except ServerError:
            return None

    def refuses_wrong_keys(self, *, timeout: float = 5.0) -> bool:
        """Return whether a request with a wrong key is refused, as our own server does."""
        return Client(self.port, "not-the-key").status("/props", timeout) == _UNAUTHORIZED

    def completion(self, prompt: str, *, timeout: float | None = None, **asked: Any) -> Piece:
        """Complete a text in one piece; ``asked`` as for ``chat``."""
        body = _body(prompt=prompt, **asked)
        with self.request("/v1/completions", timeout or self.timeout, body) as response:
            return _piece(response.read(_MOST))

    def chat(self, messages: Sequence[Mapping[str, Any]], **asked: Any) -> ChatStream:
        """Return a chat's answer as a stream.

        ``asked``: ``max_tokens`` of the answer, ``temperature`` (by default 0), and what else
        llama-server takes in a request, unchanged.
        """
        body = _body(messages=list(messages), stream=True, **asked)
        return ChatStream(self, "/v1/chat/completions", body)

    def complete(self, prompt: str, **asked: Any) -> ChatStream:
        """Return a text's continuation as a stream; ``asked`` as for ``chat``."""
        return ChatStream(self, "/v1/completions", _body(prompt=prompt, stream=True, **asked))

    @contextlib.contextmanager
    def request(
        self,
        path: str,
        timeout: float,
        body: Mapping[str, Any] | None = None,
        connection: Connection | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request; the response's body is unread."""
        headers: dict[str, str | bytes] = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}".encode()
        data = None if body is None else json.dumps(body).encode()
        try:
            with connection or Connection(timeout) as sock:
                sock.connect(("127.0.0.1", self.port))
                self.require_ours()
                asking = http.client.HTTPConnection("127.0.0.1", self.port)
                asking.sock = sock
                asking.request("GET" if data is None else "POST", path, data, headers)
                with asking.getresponse() as response:
                    if data is not None and response.status != _OK:
                        raise _refused(path, response.status, response.read(_READ_OF_REFUSAL))
                    yield response
        except TimeoutError as error:
            raise ServerError("ANSWER_TIMEOUT", seconds=timeout, path=path) from error
        # http.client takes a chunk of any length: https://github.com/python/cpython/issues/150751
        except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
            raise ServerError("NO_ANSWER", path=path, error=error) from error


@final
class ChatStream:
    """One streamed answer: iterate over it once. ``stop`` may come from any thread, at any time.

    The server sees the connection close, frees the slot, and is ready for the next request.
    """

    def __init__(self, client: Client, path: str, body: Mapping[str, Any]) -> None:
        self._client, self._path, self._body = client, path, body
        self._connection = Connection(client.timeout)

    def __iter__(self) -> Generator[Piece, None, None]:
        """Send the request and yield each piece of the answer.

        It comes as server-sent events: ``data: {…}`` lines, the last ``data: [DONE]``. Only an
        event gives the next one its time, not a comment or half a line. Nothing is raised after
        ``stop``.
        """
        timeout, sock = self._client.timeout, self._connection
        try:
            with self._client.request(self._path, timeout, self._body, sock) as response:
                while line := response.readline(_MOST):
                    name, _, value = line.strip().partition(b":")
                    if value.strip() == b"[DONE]":
                        return
                    if name in {b"data", b"error"}:
                        sock.renew()
                        yield _piece(value)
        except ServerError:
            if not sock.stopped.is_set():
                raise
        else:
            if not sock.stopped.is_set():
                raise ServerError("ANSWER_CUT")

    def stop(self) -> None:
        """End it, also while a thread waits for the next piece; safe to call twice."""
        self._connection.stop()


class Connection(socket.socket):
    """A connection whose connecting, sending and reading each end, however slowly bytes come.

    All reads share one deadline, and one bound of bytes: ``http.client`` takes a chunk of -1 bytes
    for all that comes. For the other two the socket's own timeout is one (``sendall``).
    """

    def __init__(self, timeout: float) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self._seconds = timeout
        self.settimeout(timeout)
        self.renew()
        self.stopped = threading.Event()

    def connect(self, address: Any) -> None:
        """Connect, unless ``stop`` was called before."""
        super().connect(address)
        if self.stopped.is_set():
            raise ConnectionAbortedError

    def stop(self) -> None:
        """End the connection, also while another thread waits for it."""
        self.stopped.set()
        with contextlib.suppress(OSError):  # it has ended by itself, or has not begun
            self.shutdown(socket.SHUT_RDWR)

    def renew(self) -> None:
        """Reset the time and the count of bytes."""
        self._deadline = time.monotonic() + self._seconds
        self._room = _MOST_SENT

    def recv_into(self, *args: Any) -> int:
        """Receive, at the latest until the deadline."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self._room < 0:
            raise OSError(f"more than {_MOST_SENT} bytes came")
        self.settimeout(left)
        size = super().recv_into(*args)
        self._room -= size
        return size


def _body(*, max_tokens: int, temperature: float = 0.0, **others: Any) -> dict[str, Any]:
    """Return a request's body, with the settings by which llama-server picks the next token.

    At temperature 0 it is the likeliest, but the usual chain of samplers computes other things
    first, and Gemma's vocabulary has 262,144 tokens: with the last of the chain alone the answer
    is the same and llama-server takes its greedy short cut (common/sampling.cpp), on the GPU where
    the logits are (``backend_sampling``; docs/gpu.md has what that brings).
    """
    greedy = {"samplers": ["temperature"], "backend_sampling": True} if temperature == 0 else {}
    return {"max_tokens": max_tokens, "temperature": temperature, **greedy, **others}


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    text: str = ""
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Timings(msgspec.Struct, frozen=True):
    predicted_n: Annotated[int, Meta(ge=0, le=10**12)] | None = None
    predicted_per_second: Annotated[float, Meta(ge=0, le=1e12)] | None = None


class _Answer(msgspec.Struct, frozen=True):
    choices: list[_Choice]
    timings: _Timings = _Timings()


class _Refusal(msgspec.Struct, frozen=True):
    error: dict[str, Any] | str


def _piece(data: bytes) -> Piece:
    """Read an answer, or one event of a stream."""
    try:
        answer = msgspec.json.decode(data, type=_Answer)
    except (ValueError, RecursionError) as error:
        if _complaint(data):
            raise _refused("the stream", 500, data) from error
        shown = data[:_SHOWN].decode("utf-8", "replace")
        raise ServerError("NOT_LLAMA_SERVER", shown=shown) from error
    choice = answer.choices[0] if answer.choices else _Choice()
    told, reason = answer.timings, choice.finish_reason or ""
    text = choice.text or choice.delta.content or ""
    return Piece(text, bool(reason), told.predicted_n, told.predicted_per_second, reason)


def _complaint(data: bytes) -> str:
    """Return the message of an answer that is an error; empty where it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        told = msgspec.json.decode(data, type=_Refusal).error
        return told if isinstance(told, str) else str(told.get("message", told))
    return ""


def _refused(path: str, status: int, data: bytes) -> ServerError:
    text = (_complaint(data) or data.decode("utf-8", "replace"))[:_SHOWN]
    name = "REQUEST_REFUSED/context" if "context size" in text else "REQUEST_REFUSED"
    return ServerError(name, path=path, status=status, text=text)
