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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, final

from llama_loader.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_MAX_ANSWER: Final = 64 * 1024 * 1024
"""Bytes. Far above any answer; another program on the port must not fill the memory."""
_MAX_LINE: Final = 4 * 1024 * 1024
_READ_OF_REFUSAL, _SHOWN = 4096, 300
_OK, _UNAUTHORIZED = 200, 401
_MOST: Final = 1e12
"""Larger figures are no count of tokens and no speed."""


@dataclass(frozen=True)
class Completion:
    """An answer, or a part of one.

    Attributes:
        text: the words.
        finished: nothing follows.
        reason: why it ended: ``stop``, ``length`` …; empty while it goes on.
        tokens: tokens made so far, None where the server does not say.
        tokens_per_second: None where the server does not say.
    """

    text: str
    finished: bool = True
    reason: str = ""
    tokens: int | None = None
    tokens_per_second: float | None = None


class Client:
    """Calls one llama-server.

    Args:
        port: on 127.0.0.1.
        api_key: None where the server asks for none.
        timeout: seconds for each whole answer, and for each event of a stream.
        require_ours: called when connected, before anything is sent; what it raises prevents that.
    """

    def __init__(
        self,
        port: int,
        api_key: str | None,
        *,
        timeout: float = 60.0,
        require_ours: Callable[[], None] = lambda: None,
    ) -> None:
        self.port = port
        self.api_key = api_key
        self.timeout = timeout
        self.require_ours = require_ours

    def status(self, path: str, timeout: float) -> int:
        """Return the status of a GET; the body is not read.

        Raises:
            ServerError: no answer, or none in time.
        """
        with self.request(path, timeout) as response:
            return response.status

    def health(self, *, timeout: float = 2.0) -> int | None:
        """Return the status of ``/health``: 200 ready, 503 loading; None without an answer.

        200 says that the model was loaded once, not that anything works now: only a completion
        proves life. The key is not sent.
        """
        try:
            return Client(self.port, None).status("/health", timeout)
        except ServerError:
            return None

    def refuses_wrong_keys(self, *, timeout: float = 5.0) -> bool:
        """Return whether a request with a wrong key is refused, as our own server does."""
        return Client(self.port, "not-the-key").status("/props", timeout) == _UNAUTHORIZED

    def completion(
        self,
        prompt: str,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        timeout: float | None = None,
        **extra: Any,
    ) -> Completion:
        """Complete a text in one piece.

        Raises:
            ServerError: no answer, none in time, not one of llama-server's, or a refusal.
        """
        body = {"prompt": prompt, "n_predict": max_tokens, **_sampling(temperature), **extra}
        with self.request("/completion", timeout or self.timeout, body) as response:
            data = response.read(_MAX_ANSWER)
        answer = _object(data)
        part = _part(data, answer.get("content"), answer.get("stop_type"), answer.get("timings"))
        return replace(part, finished=True, tokens=_count(answer.get("tokens_predicted")))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        **extra: Any,
    ) -> ChatStream:
        """Return a chat's answer as a stream, which any thread may stop.

        ``max_tokens`` limits the answer. ``extra`` goes into the request unchanged.
        """
        body = {"messages": list(messages), "max_tokens": max_tokens, **_sampling(temperature)}
        return ChatStream(self, "/v1/chat/completions", {**body, "stream": True, **extra})

    def complete(
        self, prompt: str, *, max_tokens: int, temperature: float = 0.0, **extra: Any
    ) -> ChatStream:
        """Return a text's continuation as a stream, which any thread may stop."""
        body = {"prompt": prompt, "max_tokens": max_tokens, **_sampling(temperature)}
        return ChatStream(self, "/v1/completions", {**body, "stream": True, **extra})

    @contextlib.contextmanager
    def request(
        self,
        path: str,
        timeout: float,
        body: Mapping[str, Any] | None = None,
        connected: Callable[[Connection], None] = lambda _: None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request; the response's body is unread.

        Raises:
            ServerError: no connection, no answer in time, or a ``body`` that was refused.
        """
        headers: dict[str, str | bytes] = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}".encode()
        data = None if body is None else json.dumps(body).encode()
        try:
            with Connection(timeout) as sock:
                sock.connect(("127.0.0.1", self.port))
                connected(sock)
                self.require_ours()
                connection = http.client.HTTPConnection("127.0.0.1", self.port)
                connection.sock = sock
                connection.request("GET" if data is None else "POST", path, data, headers)
                with connection.getresponse() as response:
                    if data is not None and response.status != _OK:
                        raise _refused(path, response.status, response.read(_READ_OF_REFUSAL))
                    yield response
        except TimeoutError as error:
            message = f"llama-server was silent for {timeout:g} s at {path}"
            raise ServerError("ANSWER_TIMEOUT", message) from error
        except (OSError, http.client.HTTPException) as error:
            message = f"llama-server does not answer at {path}: {error!r}"
            raise ServerError("NO_ANSWER", message) from error


@final
class ChatStream:
    """One streamed answer: iterate over it once. ``stop`` may come from any thread, at any time.

    The server sees the connection close, frees the slot, and is ready for the next request.
    """

    def __init__(self, client: Client, path: str, body: Mapping[str, Any]) -> None:
        self._client = client
        self._path = path
        self._body = body
        self._connection: Connection | None = None
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[Completion]:
        """Send the request and yield each piece of the answer.

        Raises:
            ServerError: as for ``Client.completion``; not after ``stop``.
        """
        ask = self._client.request(self._path, self._client.timeout, self._body, self._connected)
        try:
            with ask as response:
                yield from self._events(response)
        except ServerError:
            if not self._stopped.is_set():
                raise

    def stop(self) -> None:
        """End it, also while a thread waits for the next piece; safe to call twice."""
        self._stopped.set()
        if self._connection is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                self._connection.shutdown(socket.SHUT_RDWR)

    def _connected(self, connection: Connection) -> None:
        self._connection = connection
        if self._stopped.is_set():
            raise ServerError("ANSWER_CUT", "the stream was stopped before it began")

    def _events(self, response: http.client.HTTPResponse) -> Iterator[Completion]:
        """Read server-sent events: ``data: {…}`` lines, the last ``data: [DONE]``.

        Only an event gives the next one its time, not a comment or half a line.
        """
        while line := response.readline(_MAX_LINE):
            name, _, value = line.strip().partition(b":")
            if name not in {b"data", b"error"}:
                continue
            if value.strip() == b"[DONE]":
                return
            if self._connection is not None:
                self._connection.renew()
            event = _object(value)
            if name == b"error" or "error" in event:
                raise _refused("the stream", 500, value)
            yield _piece(value, event)
        raise ServerError("ANSWER_CUT", "llama-server ended in the middle of an answer")


class Connection(socket.socket):
    """A connection whose connecting, sending and reading each end, however slowly bytes come.

    All reads share one deadline. For the other two the socket's own timeout is one (``sendall``).
    """

    def __init__(self, timeout: float) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self._seconds = timeout
        self.settimeout(timeout)
        self.renew()

    def renew(self) -> None:
        """Start the time anew."""
        self._deadline = time.monotonic() + self._seconds

    def recv_into(self, *args: Any) -> int:
        """Receive, at the latest until the deadline."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)
        return super().recv_into(*args)


def _sampling(temperature: float) -> dict[str, Any]:
    """Return how the next token is picked.

    At temperature 0 it is the likeliest, whatever else the usual chain of samplers would look at
    first, and Gemma's vocabulary has 262,144 tokens: with the last of the chain alone the answer
    is the same and llama-server takes its greedy short cut (common/sampling.cpp), on the GPU where
    the logits are (``backend_sampling``; docs/gpu.md has what that brings).
    """
    greedy = {"samplers": ["temperature"], "backend_sampling": True} if temperature == 0 else {}
    return {"temperature": temperature, **greedy}


def _object(data: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(data)
        if isinstance(answer, dict):
            return answer
    raise _not_llama(data)


def _piece(data: bytes, event: dict[str, Any]) -> Completion:
    try:
        choice = event["choices"][0] if event["choices"] else {}
        text = choice.get("delta", {}).get("content") or choice.get("text") or ""
        return _part(data, text, choice.get("finish_reason"), event.get("timings"))
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_llama(data) from error


def _part(data: bytes, text: object, reason: object, timings: object) -> Completion:
    """Make a completion of what an answer has; figures that are none are left out."""
    if not isinstance(text, str):
        raise _not_llama(data)
    figures = timings if isinstance(timings, dict) else {}
    return Completion(
        _encodable(text),
        finished=bool(reason),
        reason=_encodable(reason) if isinstance(reason, str) else "",
        tokens=_count(figures.get("predicted_n")),
        tokens_per_second=_figure(figures.get("predicted_per_second")),
    )


def _count(value: object) -> int | None:
    figure = _figure(value)
    return None if figure is None else int(figure)


def _figure(value: object) -> float | None:
    """Return a figure; None for what is none, such as a list, NaN, or 400 digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < _MOST else None


def _encodable(text: str) -> str:
    """Return a text that can be printed: JSON may hold half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def _refused(path: str, status: int, data: bytes) -> ServerError:
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        message = json.loads(text)["error"]
        text = _encodable(str(message["message"] if isinstance(message, dict) else message))
    return ServerError(
        "REQUEST_REFUSED", f"llama-server refused {path} with status {status}: {text[:_SHOWN]}"
    )


def _not_llama(data: bytes) -> ServerError:
    shown = data[:_SHOWN].decode("utf-8", "replace")
    return ServerError("NOT_LLAMA_SERVER", f"what answers on the port is not llama-server: {shown}")
