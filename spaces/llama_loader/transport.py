"""Open one file, behind HTTP or on this machine, and read its bytes as they are sent.

``requests`` does TLS, proxies and certificates. Redirects are followed here and nothing is decoded:
what is hashed is what was sent. Retries, mirrors and digests are in ``fetch``.

Every wait has an end. A socket's timeout begins anew with every byte, and ``http.client`` reads on
until headers or a chunk's length are whole. So a ``Watch`` judges each read of a connection.
"""

from __future__ import annotations

import io
import re
import socket
import ssl
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPResponse
from typing import TYPE_CHECKING, Any, ClassVar, Final

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from llama_loader import locations
from llama_loader.errors import without_secrets
from llama_loader.locations import Local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llama_loader.locations import Web

MAX_REDIRECTS: Final = 5

_OK: Final = 200
_PARTIAL: Final = 206
_UNSATISFIABLE: Final = 416
_MISSING: Final = frozenset({404, 410})
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOST_WRAPPING: Final = 1 << 20
"""Bytes between two pieces of a file: lengths of chunks, extensions, trailers; one piece itself."""
_SHORTEST: Final = 0.001
"""Seconds. A timeout of 0 would mean not to wait at all."""
_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_RANGE: Final = re.compile(
    r"bytes (?P<first>[0-9]{1,18})-(?P<last>[0-9]{1,18})/(?P<total>[0-9]{1,18}|\*)"
)


@dataclass(frozen=True)
class Patience:
    """How long a server may take.

    Attributes:
        connect: seconds until a connection stands.
        silence: seconds between two bytes.
        headers: seconds until all of an answer's headers are here: names, connections, TLS and
            redirects included.
        rate: bytes a second that must come, over every ``window`` seconds of waiting for them.
        window: see ``rate``.
        attempts: how often one URL may fail with nothing gained in between.
        longest_wait: seconds; a server that asks for more is left for the next mirror.
        deadline: seconds for a whole file, all attempts and all mirrors together.
    """

    connect: float = 10.0
    silence: float = 20.0
    headers: float = 30.0
    rate: int = 16 * 1024
    window: float = 20.0
    attempts: int = 4
    longest_wait: float = 60.0
    deadline: float = 3600.0


class AttemptError(Exception):
    """One attempt failed; another one may succeed, unless it is ``final``.

    ``wait`` is the seconds that the server asks to wait, ``missing`` that it has no such file.
    """

    def __init__(
        self, reason: str, *, wait: float | None = None, final: bool = False, missing: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait, self.final, self.missing = wait, final, missing


class RangeError(AttemptError):
    """The server answered a request for a part of a file with another part."""


class Watch:
    """Judges how long one request takes: by a deadline for its headers, then by its rate.

    Every method raises ``AttemptError`` when the server took too long.
    """

    def __init__(self, patience: Patience, deadline: float) -> None:
        self._patience = patience
        self._deadline = deadline
        self._headers: float | None = time.monotonic() + patience.headers
        self._seconds, self._bytes, self._wrapping = 0.0, 0, 0

    def headers_came(self) -> None:
        """From now on the rate counts."""
        self._headers, self._seconds, self._wrapping = None, 0.0, 0

    def left(self) -> float:
        """Return the seconds that the next read may take."""
        now = time.monotonic()
        if now > self._deadline:
            raise AttemptError(f"not done within {self._patience.deadline:g} s", final=True)
        if self._headers is None:
            return self._deadline - now
        if now >= self._headers:
            raise AttemptError(f"no answer within {self._patience.headers:g} s")
        return min(self._deadline, self._headers) - now

    def waited(self, seconds: float, count: int) -> None:
        """Count the time of a read (not that of unpacking) and its bytes, of whatever kind."""
        self._seconds += seconds
        self._wrapping += count
        self.left()
        if self._headers is None and self._wrapping > _MOST_WRAPPING:
            raise AttemptError("sends no end of what is not the file")
        if self._headers is None and self._seconds >= 2 * self._patience.window:
            self._require_rate()

    def came(self, count: int) -> None:
        """Count bytes of the file, which alone are progress."""
        self._bytes += count
        self._wrapping = 0
        if self._seconds >= self._patience.window:
            self._require_rate()

    def _require_rate(self) -> None:
        if self._bytes < self._patience.rate * self._seconds:
            raise AttemptError(f"slower than {self._patience.rate} bytes a second")
        self._seconds, self._bytes = 0.0, 0


@dataclass(frozen=True)
class Body:
    """A file's bytes, as they come.

    Attributes:
        start: offset in the file of the first byte that comes.
        total: the whole file's size in bytes, where the server says it.
        validator: a strong ETag, which names this very content, else None.
        read: returns 1 to n bytes, or none at the end; raises ``AttemptError``.
        is_local: it is a file of this machine.
    """

    start: int
    total: int | None
    validator: str | None
    read: Callable[[int], bytes]
    is_local: bool = False


@contextmanager
def opened(
    place: Web | Local,
    *,
    start: int = 0,
    end: int | None = None,
    validator: str | None = None,
    patience: Patience,
    deadline: float,
) -> Iterator[Body]:
    """Open a file at ``start``; the answer may begin at 0 all the same (``Body.start``).

    Args:
        place: where the file is.
        start: offset in bytes.
        end: offset behind the last byte that is wanted, None for all the rest.
        validator: of the content that is wanted: any other comes from its beginning.
        patience: how long the server may take.
        deadline: the moment, by ``time.monotonic``, after which the loader waits no longer.

    Raises:
        AttemptError: no bytes from there, this time.
    """
    if isinstance(place, Local):
        with _opened_file(place, start) as body:
            yield body
        return
    here, watch = place.url, Watch(patience, deadline)
    with closing(_WatchedAdapter(watch)) as adapter:
        for _ in range(MAX_REDIRECTS + 1):
            headers = {"Accept-Encoding": "identity", "User-Agent": "llama-loader"}
            if start or end is not None:
                headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
                headers |= {"If-Range": validator} if validator else {}
            if place.token and locations.origin(here) == locations.origin(place.url):
                headers["Authorization"] = f"Bearer {place.token}"
            seconds = (min(patience.connect, watch.left()), patience.silence)
            with closing(_asked(adapter, here, headers, seconds)) as answer:
                if answer.status_code not in _REDIRECTS:
                    _require_success(answer, patience)
                    watch.headers_came()
                    yield _body(answer, start, watch)
                    return
                location = _text(answer, "Location")
                target = locations.redirected(here, location)
            if target is None:
                to = locations.shown(location)
                raise AttemptError(f"redirected to {to!r}, which is not https", final=True)
            here = target
    raise AttemptError(f"more than {MAX_REDIRECTS} redirects", final=True)


@contextmanager
def _opened_file(place: Local, start: int) -> Iterator[Body]:
    def read(size: int) -> bytes:
        try:
            return stream.read(size)
        except OSError as error:
            raise AttemptError(error.strerror or str(error), final=True) from error

    try:
        size = place.path.stat().st_size
        if not place.path.is_file():  # a FIFO would be waited for without end
            raise AttemptError("it is not a file", final=True)
        stream = place.path.open("rb")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise AttemptError(error.strerror or str(error), final=True, missing=missing) from error
    with stream:
        stream.seek(start)
        yield Body(start, size, None, read, is_local=True)


def _asked(
    adapter: HTTPAdapter, url: str, headers: dict[str, str], seconds: tuple[float, float]
) -> requests.Response:
    """Send one request. Not through a session, which follows redirects and reads ~/.netrc."""
    try:
        request = requests.Request("GET", url, headers=headers).prepare()
        environment = requests.Session().merge_environment_settings(
            url, {}, stream=True, verify=None, cert=None
        )
        proxies = {} if locations.is_this_machine(url) else environment["proxies"]
        verify = environment["verify"]
        if not isinstance(verify, str):
            verify = _certificates()
        return adapter.send(request, stream=True, timeout=seconds, verify=verify, proxies=proxies)
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        # requests' errors about the URL or the proxy's URL itself are values' errors
        raise AttemptError(_reason(error, url), final=isinstance(error, ValueError)) from error


def _require_success(answer: requests.Response, patience: Patience) -> None:
    status = answer.status_code
    if status in (_OK, _PARTIAL):
        return
    if status == _UNSATISFIABLE:
        raise RangeError("HTTP status 416")
    wait = _retry_after(_text(answer, "Retry-After"))
    asked = f", to be asked again in {wait:.0f} s" if wait is not None else ""
    raise AttemptError(
        f"HTTP status {status}{asked}",
        wait=wait,
        final=status not in _AGAIN or (wait or 0.0) > patience.longest_wait,
        missing=status in _MISSING,
    )


def _body(answer: requests.Response, start: int, watch: Watch) -> Body:
    first, total = 0, _number(_text(answer, "Content-Length"))
    if answer.status_code == _PARTIAL:
        given = _text(answer, "Content-Range")
        match = _RANGE.fullmatch(given)
        if match is None or int(match["first"]) != start:
            raise RangeError(f"asked for bytes from {start} on, answered with {given!r}")
        first, total = start, _number(match["total"])

    def read(size: int) -> bytes:
        try:
            # read1 returns what is there: read would wait for all of it, byte by byte.
            data: bytes = answer.raw.read1(size, decode_content=False) or b""
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise AttemptError(_reason(error, answer.url)) from error
        if data:
            watch.came(len(data))
        return data

    etag = _text(answer, "ETag")
    return Body(first, total, etag if etag.startswith('"') else None, read)


def _text(answer: requests.Response, name: str) -> str:
    """Return a header; an empty text where it is missing, or not printable ASCII."""
    text = answer.headers.get(name, "")
    return text if text.isascii() and text.isprintable() else ""


def _number(text: str) -> int | None:
    """Return what a header counts; None where it is no number, or an impossibly long one."""
    return int(text) if _NUMBER.fullmatch(text) else None


def _retry_after(text: str) -> float | None:
    """Return the seconds that a Retry-After asks for: a number, or an HTTP date."""
    seconds = _number(text)
    if seconds is not None:
        return float(seconds)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())


def _certificates() -> str | bool:
    """Return ``SSL_CERT_FILE`` where it is set, else True: requests' own certificates."""
    paths = ssl.get_default_verify_paths()
    if paths.cafile and paths.cafile != paths.openssl_cafile:
        return paths.cafile
    return True


def _reason(error: BaseException, url: str) -> str:
    """Return the sentence of the first cause (requests and urllib3 wrap it), without secrets."""
    while error.__context__ is not None:
        error = error.__context__
    said = without_secrets(str(error) or type(error).__name__)
    query = url.partition("?")[2]
    return said.replace(query, "…") if query else said


class _WatchedAdapter(HTTPAdapter):
    """Has requests connect, and read answers, under a watch; SOCKS proxies are not watched."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._pools = _pools(watch)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Return the pools of connections through a proxy."""
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(watch: Watch) -> dict[str, type[HTTPConnectionPool]]:
    """Return pools whose connections know the watch: urllib3 makes both out of classes."""
    plain = type("Plain", (_Connection,), {"watch": watch, "is_plain": True})
    tls = type("Tls", (_Connection, HTTPSConnection), {"watch": watch})
    return {
        "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("TlsPool", (HTTPSConnectionPool,), {"ConnectionCls": tls}),
    }


class _Connection(HTTPConnection):
    watch: ClassVar[Watch]
    is_plain: ClassVar[bool] = False
    """Of an ``http://`` URL: connects to this machine alone, whatever its name resolves to."""

    def response_class(self, sock: socket.socket, *args: Any, **kwargs: Any) -> HTTPResponse:  # type: ignore[override]
        """Parse an answer, also that of a proxy to CONNECT, out of watched reads."""
        answer = HTTPResponse(sock, *args, **kwargs)
        answer.fp = io.BufferedReader(_Reads(answer.fp.detach(), sock, self.watch))
        return answer

    def _new_conn(self) -> socket.socket:
        """Connect to one address after the other, each within its share of the time left."""
        addresses = self._addresses()
        for others in reversed(range(len(addresses))):
            share = min(float(self.timeout or 0), self.watch.left() / (others + 1))
            try:
                made = socket.create_connection((addresses[-1 - others], self.port), share)
            except OSError:
                if others:
                    continue
                raise
            for option in self.socket_options or ():
                made.setsockopt(*option)
            made.settimeout(min(float(self.timeout or 0), self.watch.left()))
            return made
        raise OSError(f"{self.host} has no address")

    def _addresses(self) -> list[str]:
        try:
            found = socket.getaddrinfo(self.host.strip("[]"), self.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:  # a label is empty or too long
            reason = f"{self.host[:80]!r} is no host's name"
            raise AttemptError(reason, final=True) from error
        addresses = [str(entry[4][0]) for entry in found]
        if not self.is_plain:
            return addresses
        loopback = [address for address in addresses if locations.is_loopback(address)]
        if addresses and not loopback:
            raise AttemptError(
                f"{self.host} leads to {addresses[0]}, which is not this machine: use https",
                final=True,
            )
        return loopback


class _Reads(io.RawIOBase):
    """A socket's reads, each one watched."""

    def __init__(self, raw: Any, sock: socket.socket, watch: Watch) -> None:
        self._raw = raw
        self._sock = sock
        self._watch = watch
        self._silence = self._timeout = sock.gettimeout() or _SHORTEST

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        timeout = min(self._silence, max(self._watch.left(), _SHORTEST))
        if timeout != self._timeout:  # each change is a system call
            self._sock.settimeout(timeout)
            self._timeout = timeout
        began, count = time.monotonic(), 0
        try:
            count = self._raw.readinto(buffer) or 0
        finally:
            self._watch.waited(time.monotonic() - began, count)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
