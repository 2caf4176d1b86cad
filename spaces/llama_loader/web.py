"""One HTTP request: its redirects in our own hands, its body as it comes over the wire.

``requests`` does TLS, proxies and the environment's certificates (``REQUESTS_CA_BUNDLE``, and here
also ``SSL_CERT_FILE``). It follows no redirect and decodes nothing: what is hashed is what was
sent.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final

from llama_loader import locations
from llama_loader.errors import mistyped
from llama_loader.patience import AttemptError, RangeError, Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from llama_loader.patience import Deadline, Patience

MAX_REDIRECTS: Final = 5

_OK: Final = 200
_PARTIAL: Final = 206
_UNSATISFIABLE: Final = 416
_MISSING: Final = frozenset({404, 410})
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_DIRECTLY: Final = {"http": None, "https": None, "all": None}
"""What requests takes for: by no proxy, whatever the environment says."""
_SETTLED: Final = timedelta(minutes=1)
"""A file that changed so shortly before it was sent may change again and keep its date."""
_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_RANGE: Final = re.compile(
    r"bytes (?P<first>[0-9]{1,18})-(?P<last>[0-9]{1,18})/(?P<total>[0-9]{1,18}|\*)"
)


@dataclass(frozen=True)
class Body:
    """A file's bytes, on their way.

    Attributes:
        start: offset in the file of the first byte that comes.
        total: the whole file's size in bytes, where the server says it.
        etag: names this very content (a strong ETag), else None.
        modified: when it changed last, as the server wrote it; None where it may have changed
            twice within that second (RFC 9110, 8.8.2.2).
        read: returns 1 to n bytes, or none at the end; raises ``AttemptError``.
        ranges: the server says that it sends parts.
        is_local: it is a file of this machine.
    """

    start: int
    total: int | None
    etag: str | None
    modified: str | None
    read: Callable[[int], bytes]
    ranges: bool = False
    is_local: bool = False


@contextmanager
def opened(
    url: str,
    *,
    start: int = 0,
    end: int | None = None,
    validator: str | None = None,
    token: str | None = None,
    patience: Patience,
    deadline: Deadline,
) -> Iterator[Body]:
    """Ask for a file from ``start`` on, following redirects.

    Args:
        url: https, or http on loopback.
        start: offset in bytes; the answer may begin at 0 all the same (``Body.start``).
        end: offset behind the last byte that is wanted, None for all the rest.
        validator: of the content whose first bytes are here: other content comes from its
            beginning.
        token: sent to this URL's own host and to no other.
        patience: how long the server may take.
        deadline: when to give up whatever happens.

    Raises:
        AttemptError: no bytes from there, this time.
    """
    here, waiting = url, Waiting(patience, deadline)
    with _session(waiting) as session:
        for _ in range(MAX_REDIRECTS + 1):
            headers = _headers(start, end, validator)
            if token and _origin(here) == _origin(url):
                headers["Authorization"] = f"Bearer {token}"
            seconds = (min(patience.connect, waiting.left()), patience.silence)
            with _asked(session, here, headers, seconds) as answer:
                if answer.status_code not in _REDIRECTS:
                    _require_success(answer, patience)
                    waiting.headers_came()
                    yield _body(answer, start, waiting)
                    return
                here = _next(here, answer.headers.get("Location", ""))
    raise AttemptError(f"more than {MAX_REDIRECTS} redirects", final=True)


def _session(waiting: Waiting) -> Any:
    import requests

    from llama_loader.connections import Watched

    session: Any = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, Watched(waiting))
    session.auth = _no_auth
    session.verify = _certificates()
    # Told not to follow redirects, requests still reads their bodies to the end, endless or not.
    session.get_redirect_target = _no_redirect
    return session


def _headers(start: int, end: int | None, validator: str | None) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", "User-Agent": "llama-loader"}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        if validator:
            headers["If-Range"] = validator
    return headers


def _asked(session: Any, url: str, headers: dict[str, str], seconds: tuple[float, float]) -> Any:
    import requests
    import urllib3

    try:
        return session.get(
            url,
            headers=headers,
            stream=True,
            allow_redirects=False,
            proxies=_DIRECTLY if locations.is_loopback(url) else None,
            timeout=seconds,
        )
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise AttemptError(_innermost(error)) from error


def _next(url: str, location: str) -> str:
    target = locations.redirected(url, location)
    if target is None:
        raise AttemptError(f"redirected to {mistyped(location)!r}, which is not https", final=True)
    return target


def _body(answer: Any, start: int, waiting: Waiting) -> Body:
    first, total = 0, _number(answer.headers.get("Content-Length"))
    if answer.status_code == _PARTIAL:
        given = answer.headers.get("Content-Range", "")
        match = _RANGE.fullmatch(given)
        if match is None or int(match["first"]) != start:
            raise RangeError(f"asked for bytes from {start} on, answered with {given!r}")
        first, total = start, _number(match["total"])
    etag = answer.headers.get("ETag", "")
    strong = etag if etag.startswith('"') and etag.isascii() and etag.isprintable() else None
    ranges = answer.status_code == _PARTIAL or answer.headers.get("Accept-Ranges") == "bytes"
    return Body(
        first, total, strong, _modified(answer.headers), _Reader(answer.raw, waiting).read, ranges
    )


def _require_success(answer: Any, patience: Patience) -> None:
    status = answer.status_code
    if status in (_OK, _PARTIAL):
        return
    if status == _UNSATISFIABLE:
        raise RangeError("HTTP status 416")
    wait = _retry_after(answer.headers.get("Retry-After", ""))
    impatient = wait is not None and wait > patience.longest_wait
    asked = f", to be asked again in {wait:.0f} s" if wait is not None else ""
    final = status not in _AGAIN or impatient
    missing = status in _MISSING
    raise AttemptError(f"HTTP status {status}{asked}", wait=wait, final=final, missing=missing)


class _Reader:
    """Reads a response undecoded, as it comes."""

    def __init__(self, raw: Any, waiting: Waiting) -> None:
        self._raw = raw
        self._waiting = waiting

    def read(self, size: int) -> bytes:
        import urllib3

        try:
            # read1 returns what is there: read would wait for all of it, byte by byte.
            data: bytes = self._raw.read1(size, decode_content=False) or b""
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise AttemptError(_innermost(error)) from error
        if data:
            self._waiting.came(len(data))
        return data


def _certificates() -> str | bool:
    """``SSL_CERT_FILE`` where it is set; ``REQUESTS_CA_BUNDLE`` wins over it inside requests."""
    import ssl

    paths = ssl.get_default_verify_paths()
    if paths.cafile and paths.cafile != paths.openssl_cafile:
        return paths.cafile
    return True


def _no_auth(request: Any) -> Any:
    """Keep requests from taking passwords out of ``~/.netrc``, over our own header."""
    return request


def _no_redirect(answer: Any) -> None:
    """Keep requests from looking where a redirect leads."""
    del answer


def _number(text: str | None) -> int | None:
    """What a header counts; None where it is no number, or one of a length that nothing has."""
    return int(text) if text and _NUMBER.fullmatch(text) else None


def _modified(headers: Mapping[str, str]) -> str | None:
    changed, sent = (_moment(headers.get(name, "")) for name in ("Last-Modified", "Date"))
    settled = changed is not None and sent is not None and sent - changed >= _SETTLED
    return headers["Last-Modified"] if settled else None


def _retry_after(text: str) -> float | None:
    """Seconds that a Retry-After asks for: a number, or a date."""
    seconds = _number(text)
    if seconds is not None:
        return float(seconds)
    moment = _moment(text)
    if moment is None:
        return None
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())


def _moment(text: str) -> datetime | None:
    """The moment that an HTTP date names, None where it is none."""
    from email.utils import parsedate_to_datetime

    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _origin(url: str) -> tuple[str, str]:
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _innermost(error: BaseException) -> str:
    """The sentence of the first cause: requests and urllib3 wrap it three times."""
    cause: BaseException = error
    while cause.__context__ is not None:
        cause = cause.__context__
    return str(cause) or type(cause).__name__
