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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from llama_loader.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_MAX_ANSWER: Final = 64 * 1024 * 1024
"""Bytes. Far above any answer; another program on the port must not fill the memory."""
_MAX_LINE: Final = 4 * 1024 * 1024
_SHOWN: Final = 300
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
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

    def health(self, *, timeout: float = 2.0) -> int | None:
        """Return the status of ``/health``: 200 ready, 503 loading; None without an answer.

        200 says that the model was loaded once, not that anything works now: only a completion
        proves life. The key is not sent.
        """
        try:
            keyless = Client(self.port, None)
            return keyless._status("/health", timeout)
        except ServerError:
            return None

    def refuses_wrong_keys(self, *, timeout: float = 5.0) -> bool:
        """Return whether a request with a wrong key is refused, as our own server does."""
        stranger = Client(self.port, "not-the-key")
        return stranger._status("/props", timeout) == _UNAUTHORIZED

    def turns(self, *, timeout: float) -> bool:
        """Return whether the server's main loop turns: ``/slots`` is answered from within it.

        Unlike a completion this does not wait for a free slot. A server that was told not to
        offer it (501, 403, 404) counts as turning.
        """
        try:
            self._status("/slots", timeout)
        except ServerError:
            return False
        return True

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
        limit = timeout or self.timeout
        with self.request("/completion", limit, body) as (response, _):
            data = response.read(_MAX_ANSWER)
        if response.status != _OK:
            raise _refused("/completion", response.status, data)
        answer = _object(data)
        reason, tokens = answer.get("stop_type"), answer.get("tokens_predicted")
        return _part(data, answer.get("content"), reason, answer, tokens=tokens, finished=True)

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
        return ChatStream(self, _CHAT, {**body, "stream": True, **extra})

    def complete(
        self, prompt: str, *, max_tokens: int, temperature: float = 0.0, **extra: Any
    ) -> ChatStream:
        """Return a text's continuation as a stream, which any thread may stop."""
        body = {"prompt": prompt, "max_tokens": max_tokens, **_sampling(temperature)}
        return ChatStream(self, _COMPLETIONS, {**body, "stream": True, **extra})

    def _status(self, path: str, timeout: float) -> int:
        """Return the status of a GET; the body is not read."""
        with self.request(path, timeout) as (response, _):
            return response.status

    @contextlib.contextmanager
    def request(
        self,
        path: str,
        timeout: float,
        body: Mapping[str, Any] | None = None,
        connected: Callable[[Connection], None] = lambda _: None,
    ) -> Iterator[tuple[http.client.HTTPResponse, Connection]]:
        """Send a request; the response's body is unread.

        Raises:
            ServerError: no connection, or no answer in time.
        """
        headers: dict[str, str | bytes] = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}".encode()
        data = None if body is None else json.dumps(body).encode()
        try:
            with Connection(self.port, timeout) as sock:
                connected(sock)
                self.require_ours()
                connection = http.client.HTTPConnection("127.0.0.1", self.port)
                connection.sock = sock
                connection.request("GET" if data is None else "POST", path, data, headers)
                with connection.getresponse() as response:
                    yield response, sock
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
        path, limit = self._path, self._client.timeout
        try:
            with self._client.request(path, limit, self._body, self._connected) as answered:
                response, connection = answered
                if response.status != _OK:
                    raise _refused(path, response.status, response.read(_SHOWN))
                yield from _events(response, connection)
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


class Connection(socket.socket):
    """A connection to loopback whose reads and writes all share one deadline."""

    def __init__(self, port: int, timeout: float) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self._seconds = timeout
        self.renew()
        try:
            self.settimeout(timeout)
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connect(("127.0.0.1", port))
        except BaseException:
            self.close()
            raise

    def renew(self) -> None:
        """Start the time anew."""
        self._deadline = time.monotonic() + self._seconds

    def recv_into(self, *args: Any) -> int:
        """Receive, at the latest until the deadline."""
        self._limit()
        return super().recv_into(*args)

    def sendall(self, *args: Any) -> None:
        """Send, at the latest until the deadline."""
        self._limit()
        super().sendall(*args)

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)


def _sampling(temperature: float) -> dict[str, Any]:
    """Return how the next token is picked.

    At temperature 0 it is the likeliest, whatever else the usual chain of samplers would look at
    first, and Gemma's vocabulary has 262,144 tokens: with the last of the chain alone the answer
    is the same and llama-server takes its greedy short cut (common/sampling.cpp), on the GPU where
    the logits are (``backend_sampling``; docs/gpu.md has what that brings).
    """
    greedy = {"samplers": ["temperature"], "backend_sampling": True} if temperature == 0 else {}
    return {"temperature": temperature, **greedy}


def _events(response: http.client.HTTPResponse, sock: Connection) -> Iterator[Completion]:
    """Read server-sent events: ``data: {…}`` lines, the last ``data: [DONE]``.

    Only an event gives the next one its time, not a comment or half a line.
    """
    while True:
        line = response.readline(_MAX_LINE)
        if not line:
            raise ServerError("ANSWER_CUT", "llama-server ended in the middle of an answer")
        name, _, value = line.strip().partition(b":")
        if name == b"error":
            raise _refused("the stream", 500, value)
        if name != b"data":
            continue
        if value.strip() == b"[DONE]":
            return
        sock.renew()
        yield _event(value)


def _event(value: bytes) -> Completion:
    event = _object(value)
    if "error" in event:
        raise _refused("the stream", 500, value)
    try:
        choices = event["choices"]
        choice = choices[0] if choices else {}
        text = choice.get("delta", {}).get("content") or choice.get("text")
        reason = choice.get("finish_reason")
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_llama(value) from error
    return _part(value, text or "", reason, event, finished=bool(reason))


def _object(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise _not_llama(data)
    return answer


def _part(
    data: bytes,
    text: object,
    reason: object,
    answer: dict[str, Any],
    *,
    tokens: object = None,
    finished: bool,
) -> Completion:
    """Make a completion of what an answer has; figures that are none are left out."""
    if not isinstance(text, str):
        raise _not_llama(data)
    timings = answer.get("timings")
    if not isinstance(timings, dict):
        timings = {}
    count = _number(timings.get("predicted_n") if tokens is None else tokens)
    return Completion(
        _encodable(text),
        finished=finished,
        reason=_encodable(reason) if isinstance(reason, str) else "",
        tokens=None if count is None else int(count),
        tokens_per_second=_number(timings.get("predicted_per_second")),
    )


def _number(value: object) -> float | None:
    """Return a figure; None for what is none, such as a list, NaN, or 400 digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < _MOST else None


def _encodable(text: str) -> str:
    """Return a text that can be printed: JSON may hold half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def _refused(path: str, status: int, data: bytes) -> ServerError:
    text = data[:4096].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        message = json.loads(text)["error"]
        text = _encodable(str(message["message"] if isinstance(message, dict) else message))
    return ServerError(
        "REQUEST_REFUSED", f"llama-server refused {path} with status {status}: {text[:_SHOWN]}"
    )


def _not_llama(data: bytes) -> ServerError:
    shown = data[:_SHOWN].decode("utf-8", "replace")
    return ServerError("NOT_LLAMA_SERVER", f"what answers on the port is not llama-server: {shown}")
