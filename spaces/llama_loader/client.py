"""llama-server's HTTP API over the standard library: health, completion, streamed chat.

One connection for each request, no pool: the server is on loopback, and closing the connection is
how a stream is stopped (the server notices and frees the slot).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from llama_loader.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_MAX_ANSWER: Final = 64 * 1024 * 1024
"""Bytes. Far above any answer; a stranger on the port must not fill the memory."""
_MAX_LINE: Final = 4 * 1024 * 1024
_SHOWN: Final = 300
_CHAT: Final = "/v1/chat/completions"
_COMPLETIONS: Final = "/v1/completions"


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
    """One llama-server. ``timeout`` is seconds of silence, for connecting and between bytes."""

    def __init__(self, port: int, api_key: str | None, *, timeout: float = 60.0) -> None:
        self._port = port
        self._api_key = api_key
        self._timeout = timeout

    def health(self, *, timeout: float = 2.0) -> int | None:
        """Return the status of ``/health``: 200 ready, 503 loading; None where nobody answers.

        200 says that the model was loaded once, not that anything works now: only a completion
        proves life (FACTS §1).
        """
        try:
            return self._request("GET", "/health", None, timeout=timeout)[0]
        except ServerError:
            return None

    def refuses_strangers(self, *, timeout: float = 5.0) -> bool:
        """True where a request with a wrong key is refused: this is the server that got ours."""
        stranger = Client(self._port, "not-the-key", timeout=timeout)
        return stranger._request("GET", "/props", None, timeout=timeout)[0] == 401  # noqa: PLR2004

    def turns(self, *, timeout: float) -> bool:
        """Whether the server's main loop turns: ``/slots`` is answered from within it.

        Unlike a completion this does not wait for a free slot. A server that was told not to
        offer it (501, 403, 404) counts as turning.
        """
        try:
            self._request("GET", "/slots", None, timeout=timeout)
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
            ServerError: nobody answers, in time or in the right words, or it refuses.
        """
        body = {"prompt": prompt, "n_predict": max_tokens, **_sampling(temperature), **extra}
        answer = self._json("POST", "/completion", body, timeout=timeout or self._timeout)
        text = answer.get("content")
        if not isinstance(text, str):
            raise _not_llama(answer)
        timings = answer.get("timings") or {}
        return Completion(
            text,
            finished=True,
            reason=str(answer.get("stop_type") or ""),
            tokens=_whole(answer.get("tokens_predicted")),
            tokens_per_second=_number(timings.get("predicted_per_second")),
        )

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        **extra: Any,
    ) -> Iterator[Completion]:
        """Stream a chat's answer, piece by piece; closing the iterator stops the generation.

        ``max_tokens`` bounds the answer. ``extra`` goes into the request as it is.

        Raises:
            ServerError: as for ``completion``, also in the middle of an answer.
        """
        yield from self.chat(messages, max_tokens=max_tokens, temperature=temperature, **extra)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        **extra: Any,
    ) -> ChatStream:
        """Return a chat's answer as ``stream_chat`` gives it, which another thread may stop."""
        body = {
            "messages": list(messages),
            "max_tokens": max_tokens,
            **_sampling(temperature),
            "stream": True,
            **extra,
        }
        return ChatStream(self._connection(self._timeout), self._timeout, self._headers(), body)

    def complete(
        self,
        prompt: str,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        **extra: Any,
    ) -> ChatStream:
        """Return a text's continuation, which another thread may stop."""
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            **_sampling(temperature),
            "stream": True,
            **extra,
        }
        connection = self._connection(self._timeout)
        return ChatStream(connection, self._timeout, self._headers(), body, path=_COMPLETIONS)

    def tokens(self, text: str) -> int:
        """Count the tokens of a text."""
        answer = self._json("POST", "/tokenize", {"content": text}, timeout=self._timeout)
        found = answer.get("tokens")
        if not isinstance(found, list):
            raise _not_llama(answer)
        return len(found)

    def props(self) -> dict[str, Any]:
        """Return ``/props``: the chat template, the slots, the build."""
        return self._json("GET", "/props", None, timeout=self._timeout)

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, timeout: float
    ) -> dict[str, Any]:
        status, data = self._request(method, path, body, timeout=timeout)
        if status != 200:  # noqa: PLR2004 - the one status of success here
            raise _refused(path, status, data)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise _not_llama(data[:_SHOWN])
        return answer

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, timeout: float
    ) -> tuple[int, bytes]:
        connection = self._connection(timeout)
        try:
            with self._send(connection, method, path, body) as response:
                return response.status, response.read(_MAX_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            raise _silent(path, error, timeout) from error
        finally:
            connection.close()

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout)

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
    ) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, self._headers())
        return connection.getresponse()

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        return {"Content-Type": "application/json", **key}


@final
class ChatStream:
    """One streamed answer: iterate over it once. ``stop`` may come from any thread, at any time.

    The server sees the connection close, frees the slot, and is ready for the next request.
    """

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        timeout: float,
        headers: Mapping[str, str],
        body: Mapping[str, Any],
        path: str = _CHAT,
    ) -> None:
        self._path = path
        self._connection = connection
        self._timeout = timeout
        self._headers = headers
        self._body = body
        self._socket: socket.socket | None = None
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[Completion]:
        """Send the request and yield what comes.

        Raises:
            ServerError: as for ``Client.completion``; not after ``stop``.
        """
        try:
            yield from self._pieces()
        except (OSError, http.client.HTTPException) as error:
            if not self._stopped.is_set():
                raise _silent(self._path, error, self._timeout) from error
        except ServerError:
            if not self._stopped.is_set():
                raise
        finally:
            self._connection.close()

    def stop(self) -> None:
        """End it, also where a thread waits for the next words; safe to call twice."""
        self._stopped.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)

    def _pieces(self) -> Iterator[Completion]:
        self._connection.connect()
        self._socket = self._connection.sock
        if self._stopped.is_set():
            return
        data = json.dumps(self._body).encode()
        self._connection.request("POST", self._path, data, dict(self._headers))
        # closed by itself: the connection gives its socket away to an answer without length
        with self._connection.getresponse() as response:
            if response.status != 200:  # noqa: PLR2004 - the one status of success here
                raise _refused(self._path, response.status, response.read(_SHOWN))
            yield from _chunks(response)


def _sampling(temperature: float) -> dict[str, Any]:
    """Return how the next token is picked.

    At temperature 0 it is the likeliest, whatever else the usual chain of samplers would look at
    first, and Gemma's vocabulary has 262,144 tokens: with the last of the chain alone the answer
    is the same and llama-server takes its greedy short cut (common/sampling.cpp), on the GPU where
    the logits are (``backend_sampling``; docs/gpu.md has what that brings).
    """
    greedy = {"samplers": ["temperature"], "backend_sampling": True} if temperature == 0 else {}
    return {"temperature": temperature, **greedy}


def _chunks(response: http.client.HTTPResponse) -> Iterator[Completion]:
    """Read server-sent events: ``data: {…}`` lines, the last ``data: [DONE]``."""
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
        yield _chunk(value)


def _chunk(value: bytes) -> Completion:
    try:
        event = json.loads(value)
        if isinstance(event, dict) and "error" in event:
            raise _refused("the stream", 500, json.dumps(event).encode())
        choices = event["choices"]
        timings = event.get("timings") or {}
        delta, reason = "", ""
        if choices:
            delta = choices[0].get("delta", {}).get("content") or choices[0].get("text") or ""
            reason = choices[0].get("finish_reason") or ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _not_llama(value[:_SHOWN]) from error
    return Completion(
        str(delta),
        finished=bool(reason),
        reason=str(reason),
        tokens=_whole(timings.get("predicted_n")),
        tokens_per_second=_number(timings.get("predicted_per_second")),
    )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _silent(path: str, error: Exception, timeout: float) -> ServerError:
    if isinstance(error, TimeoutError):
        return ServerError("ANSWER_TIMEOUT", f"llama-server was silent for {timeout:g} s at {path}")
    return ServerError("NO_ANSWER", f"llama-server does not answer at {path}: {error!r}")


def _refused(path: str, status: int, data: bytes) -> ServerError:
    text = data[:4096].decode("utf-8", "replace")
    try:
        message = json.loads(text)["error"]
        text = message["message"] if isinstance(message, dict) else str(message)
    except (ValueError, KeyError, TypeError):
        pass
    return ServerError(
        "REQUEST_REFUSED", f"llama-server refused {path} with status {status}: {text[:_SHOWN]}"
    )


def _not_llama(answer: object) -> ServerError:
    return ServerError(
        "NOT_LLAMA_SERVER", f"what answers on the port is not llama-server: {str(answer)[:_SHOWN]}"
    )
