"""Open one file behind HTTP, and read its bytes as they are sent.

``requests`` does TLS, proxies and certificates. Redirects are followed here and nothing is decoded:
what is hashed is what was sent. Retries, mirrors and digests are in ``fetch``.

Every wait has an end: a socket's own timeout restarts with every byte, so each read from a
connection is given the time that is left for all of them. What fails is an ``AttemptError``.
"""

from __future__ import annotations

import io
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPResponse
from typing import Any, Final

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader

from llama_loader import locations, settings
from llama_loader.errors import without_secrets
from llama_loader.locations import AttemptError, Body, Patience, RangeError, Web

MAX_REDIRECTS: Final = 5

_OK: Final = 200
_PARTIAL: Final = 206
_UNSATISFIABLE: Final = 416
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/(?:[0-9]{1,18}|\*)")


@contextmanager
def opened(place: Web, start: int, patience: Patience, deadline: float) -> Iterator[Body]:
    """Open a file at an offset; the answer may still begin at 0 (``Body.start``).

    ``deadline`` is by ``time.monotonic``.
    """
    here, headers_by = place.url, time.monotonic() + patience.headers
    for _ in range(MAX_REDIRECTS + 1):
        headers = {"Accept-Encoding": "identity", "User-Agent": "llama-loader"}
        if start:
            headers["Range"] = f"bytes={start}-"
        if place.token and locations.origin(here) == locations.origin(place.url):
            headers["Authorization"] = f"Bearer {place.token}"
        with (
            closing(_TimedAdapter(here, patience, deadline)) as adapter,
            closing(adapter.ask(headers, headers_by)) as answer,
        ):
            if answer.status_code not in _REDIRECTS:
                _require_success(answer, patience)
                yield _body(adapter, answer, start, patience)
                return
            location = _text(answer, "Location")
        target = locations.redirected(here, location)
        if target is None:
            to = locations.shown(location)
            told = f"redirected to {to!r}, which is not https"
            raise AttemptError(told, final=True, refusal=answer.status_code)
        here = target
    raise AttemptError(f"more than {MAX_REDIRECTS} redirects", final=True)


def _require_success(answer: requests.Response, patience: Patience) -> None:
    status = answer.status_code
    if status in (_OK, _PARTIAL):
        return
    if status == _UNSATISFIABLE:
        raise RangeError("HTTP status 416")
    wait = None
    with suppress(InvalidHeader, ValueError, OverflowError):  # a number of seconds, or a date
        wait = float(urllib3.Retry().parse_retry_after(_text(answer, "Retry-After")))
    asked = f", to be asked again in {wait:.0f} s" if wait is not None else ""
    raise AttemptError(
        f"HTTP status {status}{asked}",
        wait=wait,
        final=status not in _AGAIN or (wait or 0.0) > patience.longest_wait,
        refusal=0 if status in _AGAIN else status,
    )


def _body(
    adapter: _TimedAdapter, answer: requests.Response, start: int, patience: Patience
) -> Body:
    first = 0
    if answer.status_code == _PARTIAL:
        given = _text(answer, "Content-Range")
        match = _RANGE.fullmatch(given)
        if match is None or int(match[1]) != start:
            raise RangeError(f"asked for bytes from {start} on, answered with {given!r}")
        first = start
    seconds, came = 0.0, 0

    def read(size: int) -> bytes:
        nonlocal seconds, came
        began = time.monotonic()
        with adapter.waiting(began + patience.silence, f"no data within {patience.silence:g} s"):
            # read1 returns what is there: read would wait for all of it, byte by byte. Of a chunk
            # with a length below zero it returns more than it may.
            data: bytes = (answer.raw.read1(size, decode_content=False) or b"")[:size]
        seconds, came = seconds + time.monotonic() - began, came + len(data)
        if data and seconds >= patience.window:
            if came < patience.rate * seconds:
                raise AttemptError(f"slower than {patience.rate} bytes a second")
            seconds, came = 0.0, 0
        return data

    length = _text(answer, "Content-Length")
    return Body(first, int(length) if _NUMBER.fullmatch(length) else None, read)


def _text(answer: requests.Response, name: str) -> str:
    """Return a header; an empty text where it is missing, or not printable ASCII."""
    text = answer.headers.get(name, "")
    return text if text.isascii() and text.isprintable() else ""


def _reason(error: BaseException, url: str) -> str:
    """Return the sentence of the first cause (requests and urllib3 wrap it), without secrets."""
    while error.__context__ is not None:
        error = error.__context__
    said = without_secrets(str(error) or type(error).__name__)
    query = url.partition("?")[2]
    return said.replace(query, "…") if query else said


class _TimedAdapter(HTTPAdapter):
    """Requests one URL; every read from its connection ends by the deadline, or raises."""

    def __init__(self, url: str, patience: Patience, deadline: float) -> None:
        super().__init__()
        self._url = url
        self._patience = patience
        self._deadline = deadline
        self._until = deadline
        self._connect = patience.connect

    def ask(self, headers: dict[str, str], until: float) -> requests.Response:
        """Send one request. Not through a session, which follows redirects and reads ~/.netrc."""
        with self.waiting(until, f"no answer within {self._patience.headers:g} s"):
            session = requests.Session()
            session.verify = settings.certificate_file() or True
            options: Any = session.merge_environment_settings(
                self._url, {}, stream=True, verify=None, cert=None
            )
            if locations.is_loopback(locations.origin(self._url)[1]):
                options["proxies"] = {}
            request = requests.Request("GET", self._url, headers=headers).prepare()
            self._connect = min(self._patience.connect, self.left() / 2)
            return self.send(request, timeout=(self._connect, self._patience.silence), **options)
        raise AssertionError

    @contextmanager
    def waiting(self, until: float, reason: str) -> Iterator[None]:
        """Wait for the server until then or the deadline; ``reason`` is the error's text."""
        late = AttemptError(reason)
        if self._deadline < until:
            until = self._deadline
            late = AttemptError(f"not done within {self._patience.deadline:g} s", final=True)
        self._until = until
        try:
            self.left()
            yield
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            if time.monotonic() >= until:
                raise late from error
            # requests' errors about the URL or the proxy's URL itself are values' errors
            final = isinstance(error, ValueError)
            raise AttemptError(_reason(error, self._url), final=final) from error

    def left(self) -> float:
        """Return the seconds that the present wait may still take; ``TimeoutError`` for none."""
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        """Keep no cookies, which nothing uses: of 6 MB of them requests would make 300 MB."""
        del resp._original_response.msg["Set-Cookie"]  # noqa: SLF001 - where requests reads them
        return super().build_response(req, resp)

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        """Return a pool whose answers, those of a proxy too, are read through ``_Timed``."""
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)

        def answer(sock: socket.socket, *args: Any, **kwargs: Any) -> HTTPResponse:
            made = HTTPResponse(sock, *args, **kwargs)
            made.fp = io.BufferedReader(_Timed(sock, made.fp.detach(), self.left))
            return made

        left, connect = self.left, self._connect

        class Options(list[Any]):
            """urllib3 sets them for each address of a name, and gives each the whole timeout."""

            def __iter__(self) -> Iterator[Any]:
                if left() < connect:
                    raise TimeoutError("there is no time left for another of its addresses")
                return super().__iter__()

        usual = pool.ConnectionCls.default_socket_options
        pool.conn_kw["socket_options"] = Options(pool.conn_kw.get("socket_options", usual))
        timed = {"response_class": staticmethod(answer)}
        pool.ConnectionCls = type("Connection", (pool.ConnectionCls,), timed)
        return pool


class _Timed(io.RawIOBase):
    """Reads from a socket; each read may take the seconds that ``left`` returns."""

    def __init__(self, sock: socket.socket, raw: Any, left: Callable[[], float]) -> None:
        self._socket, self._raw, self._left = sock, raw, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._left())
        size: int | None = self._raw.readinto(buffer)
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()
