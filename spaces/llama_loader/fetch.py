"""Bytes from a URL, verified before anybody sees them.

An artifact is fetched chunk by chunk: a chunk is handed over only when its digest is right. A cut
connection goes on at the last verified chunk, on the same URL or on the next mirror; a wrong chunk
is fetched once more and then refused.
"""

from __future__ import annotations

import hashlib
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

from llama_loader import locations
from llama_loader.errors import IntegrityError, LoaderError, NetworkError
from llama_loader.events import Downloading, Resolving, Sink, ignore
from llama_loader.locations import Hub, Local, Web
from llama_loader.manifest import MAX_MANIFEST_BYTES, Manifest, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PIECE: Final = 1 << 18
CONNECT_SECONDS: Final = 10.0
READ_SECONDS: Final = 30.0
MAX_REDIRECTS: Final = 5
ATTEMPTS: Final = 4
"""For each URL; the waits between them add up to at most about 14 seconds without Retry-After."""
MAX_WAIT: Final = 60.0
"""A server that asks for more is left for the next mirror."""
MIN_RATE: Final = 16 * 1024
"""Bytes a second over ``RATE_WINDOW``; less than that is as good as a dead connection."""
RATE_WINDOW: Final = 20.0

_Answer = TypeVar("_Answer")

_OK: Final = 200
_PARTIAL: Final = 206
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_AGAIN: Final = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Wanted:
    """What is fetched: known to the last byte.

    Attributes:
        name: for messages.
        size: bytes.
        sha256: of the whole.
        chunk_size: bytes of every chunk but the last.
        chunks: digests of the chunks.
    """

    name: str
    size: int
    sha256: str
    chunk_size: int
    chunks: tuple[str, ...]


class _AttemptError(Exception):
    """One attempt failed; ``wait`` is the server's Retry-After in seconds, if it gave one."""

    def __init__(self, reason: str, *, wait: float | None = None, final: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.final = final


class Fetcher:
    """Reads URLs. One per installation; opens nothing until it is asked to.

    Args:
        offline: refuse everything but ``file://`` before a connection is opened.
        token: for the Hugging Face Hub, never sent anywhere else.
        endpoint: the Hub's address where it is not the usual one.
        sink: told of progress.
        sleep: how to wait between attempts.
    """

    def __init__(
        self,
        *,
        offline: bool = False,
        token: str | None = None,
        endpoint: str | None = None,
        sink: Sink = ignore,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._offline = offline
        self._token = token
        self._endpoint = endpoint
        self._sink = sink
        self._sleep = sleep
        self._session: Any = None

    def manifest(self, url: str, sha256: str | None) -> Manifest:
        """Read, verify (against the pin, if there is one) and parse a manifest.

        Raises:
            SettingError: it is not a URL to load from.
            NetworkError: it cannot be had.
            IntegrityError: it is not what is pinned, or malformed.
        """
        return parse(self.manifest_bytes(url, sha256), what=f"manifest {url}")

    def manifest_bytes(self, url: str, sha256: str | None) -> bytes:
        """Return a manifest's bytes, verified against the pin if there is one."""
        self._sink(Resolving(url))
        data = self.read(url, limit=MAX_MANIFEST_BYTES)
        found = hashlib.sha256(data).hexdigest()
        if sha256 is not None and found != sha256:
            raise IntegrityError(
                "MANIFEST_PIN_MISMATCH",
                f"manifest {url} has sha256 {found}; {sha256} is pinned",
                hint="if the release is meant to change, pin the new digest; otherwise do not "
                "use it",
            )
        return data

    def read(self, url: str, *, limit: int) -> bytes:
        """Return a whole small file.

        Raises:
            NetworkError: it cannot be had, with every attempt's reason.
            IntegrityError: it is larger than ``limit`` bytes.
        """

        def attempt() -> bytes:
            received = bytearray()
            with self._open(url, 0) as (_, pieces):
                for piece in pieces:
                    received += piece
                    if len(received) > limit:
                        raise IntegrityError(
                            "FILE_TOO_LARGE", f"{url} is larger than {limit} bytes"
                        )
            return bytes(received)

        return self._with_retries(url, attempt)

    def chunks(self, wanted: Wanted, urls: Sequence[str]) -> Iterator[bytes]:
        """Yield an artifact's chunks in order, each one verified.

        Raises:
            NetworkError: it cannot be had from any URL; names each with its reason.
            IntegrityError: a chunk is wrong twice, or the whole is not what it must be.
        """
        whole, done = hashlib.sha256(), 0
        state = _Progress()
        while state.index < len(wanted.chunks):
            for chunk in self._run(wanted, urls, state):
                whole.update(chunk)
                done += len(chunk)
                self._sink(Downloading(wanted.name, done, wanted.size))
                yield chunk
        if whole.hexdigest() != wanted.sha256:
            raise IntegrityError(
                "SHA256_MISMATCH",
                f"{wanted.name}: every chunk is right, but the whole has sha256 "
                f"{whole.hexdigest()}, not {wanted.sha256}",
                hint="the manifest contradicts itself; ask who published it",
            )

    def copy(self, url: str, target: IO[bytes], *, limit: int) -> tuple[str, int]:
        """Copy a file whose size and digest are not known; return its sha256 and size.

        Raises:
            NetworkError: it cannot be had.
            IntegrityError: it is larger than ``limit`` bytes.
        """

        def attempt() -> tuple[str, int]:
            digest, received = hashlib.sha256(), 0
            target.seek(0)
            target.truncate()
            with self._open(url, 0) as (total, pieces):
                for piece in pieces:
                    received += len(piece)
                    if received > limit:
                        raise IntegrityError(
                            "FILE_TOO_LARGE", f"{url} is larger than {limit} bytes"
                        )
                    digest.update(piece)
                    target.write(piece)
                    self._sink(Downloading(url, received, total))
                if total is not None and received < total:
                    raise _AttemptError(f"ended after {received} of {total} bytes")
            return digest.hexdigest(), received

        return self._with_retries(url, attempt)

    def _run(self, wanted: Wanted, urls: Sequence[str], state: _Progress) -> Iterator[bytes]:
        """One connection's worth of verified chunks; moves ``state`` on, also when it fails."""
        url = urls[state.url % len(urls)]
        try:
            with self._open(url, state.index * wanted.chunk_size, wanted.size) as (_, pieces):
                for chunk in _cut(pieces, wanted, state.index):
                    self._check(chunk, wanted, state)
                    state.accept()
                    yield chunk
            _require_end(state.index == len(wanted.chunks))
        except _AttemptError as error:
            state.failed(url, error, len(urls))
            if state.attempts >= ATTEMPTS * len(urls):
                raise _unreachable(wanted.name, state.reasons) from error
            if not state.wrong_chunk:
                self._sleep(_wait(state.attempts, error.wait))

    def _check(self, chunk: bytes, wanted: Wanted, state: _Progress) -> None:
        found = hashlib.sha256(chunk).hexdigest()
        if found == wanted.chunks[state.index]:
            return
        if state.wrong_chunk:
            raise IntegrityError(
                "CHUNK_MISMATCH",
                f"{wanted.name}: bytes from {state.index * wanted.chunk_size} on are not what the "
                "manifest says, and were not when they were fetched again",
                hint="the file behind the URL is not the one that was published",
            )
        state.wrong_chunk = True
        raise _AttemptError(f"chunk {state.index} is wrong")

    def _with_retries(self, url: str, attempt: Callable[[], _Answer]) -> _Answer:
        reasons: list[str] = []
        for number in range(1, ATTEMPTS + 1):
            try:
                return attempt()
            except _AttemptError as error:
                reasons.append(f"{url}: {error}")
                if error.final or number == ATTEMPTS:
                    raise _unreachable(url, reasons) from error
                self._sleep(_wait(number, error.wait))
        raise AssertionError(reasons)

    @contextmanager
    def _open(
        self, url: str, start: int, size: int | None = None
    ) -> Iterator[tuple[int | None, Iterator[bytes]]]:
        """Give the size that is announced, if any, and the bytes from ``start`` on."""
        place = locations.parse(url)
        if isinstance(place, Local):
            with _opened_file(place) as stream:
                stream.seek(start)
                yield place.path.stat().st_size, iter(lambda: stream.read(PIECE), b"")
            return
        if self._offline:
            raise NetworkError(
                "OFFLINE",
                f"{url} is not here, and the loader may not open a connection",
                hint="unset YAKULINGO_SPACES_OFFLINE, or name a file:// URL",
            )
        with self._opened_web(place, start) as answer:
            yield _announced(answer), _body(answer, start, size)

    @contextmanager
    def _opened_web(self, place: Web | Hub, start: int) -> Iterator[Any]:
        import requests

        self._session = self._session or requests.Session()
        url = place.url if isinstance(place, Web) else self._hub_url(place)
        first_host = _host(url)
        for _ in range(MAX_REDIRECTS + 1):
            headers = {"Accept-Encoding": "identity", "User-Agent": "llama-loader"}
            if start:
                headers["Range"] = f"bytes={start}-"
            # The token goes to the Hub alone: it redirects to storage on other hosts.
            if isinstance(place, Hub) and self._token and _host(url) == first_host:
                headers["Authorization"] = f"Bearer {self._token}"
            answer = self._get(url, headers)
            with answer:
                if answer.status_code not in _REDIRECTS:
                    _require_success(answer)
                    yield answer
                    return
                url = _redirected(url, answer.headers.get("Location"))
        raise _AttemptError(f"more than {MAX_REDIRECTS} redirects", final=True)

    def _get(self, url: str, headers: dict[str, str]) -> Any:
        import requests

        try:
            return self._session.get(
                url,
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_SECONDS, READ_SECONDS),
            )
        except requests.RequestException as error:
            raise _AttemptError(_innermost(error)) from error

    def _hub_url(self, place: Hub) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(place.repo, place.path, revision=place.revision, endpoint=self._endpoint)


@dataclass
class _Progress:
    """Where a fetch stands. ``attempts`` counts failures since the last accepted chunk."""

    index: int = 0
    url: int = 0
    attempts: int = 0
    wrong_chunk: bool = False
    reasons: tuple[str, ...] = ()

    def accept(self) -> None:
        self.index += 1
        self.attempts = 0
        self.wrong_chunk = False

    def failed(self, url: str, error: _AttemptError, urls: int) -> None:
        self.reasons = (*self.reasons, f"{url}: {error}")
        self.attempts += ATTEMPTS if error.final and urls == 1 else 1
        self.url += 1


def _cut(pieces: Iterator[bytes], wanted: Wanted, index: int) -> Iterator[bytes]:
    """Cut a stream into the chunks that remain; stop at ``size``, refuse a byte more."""
    rest = bytearray()
    for piece in pieces:
        rest += piece
        while index < len(wanted.chunks) and len(rest) >= _length(wanted, index):
            length = _length(wanted, index)
            yield bytes(rest[:length])
            del rest[:length]
            index += 1
        if index == len(wanted.chunks) and rest:
            raise IntegrityError(
                "FILE_TOO_LARGE", f"{wanted.name} is larger than the {wanted.size} bytes it must be"
            )


def _require_end(reached: bool) -> None:  # noqa: FBT001 - it is what is asked
    if not reached:
        raise _AttemptError("the body is shorter than the manifest says")


def _length(wanted: Wanted, index: int) -> int:
    return min(wanted.chunk_size, wanted.size - index * wanted.chunk_size)


def _body(answer: Any, start: int, size: int | None) -> Iterator[bytes]:
    """Yield the body from ``start`` on, whether or not the server heeded the range."""
    import requests
    import urllib3

    skip = start
    if answer.status_code == _PARTIAL:
        given = answer.headers.get("Content-Range", "")
        if not given.startswith(f"bytes {start}-") or not _same_total(given, size):
            raise _AttemptError(f"answered with the wrong range: {given!r}")
        skip = 0
    began, received = time.monotonic(), 0
    try:
        for piece in answer.raw.stream(PIECE, decode_content=False):
            received += len(piece)
            elapsed = time.monotonic() - began
            if elapsed > RATE_WINDOW and received < MIN_RATE * elapsed:
                raise _AttemptError(f"slower than {MIN_RATE} bytes a second")
            taken, skip = piece[skip:], max(0, skip - len(piece))
            if taken:
                yield taken
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _AttemptError(_innermost(error)) from error


def _same_total(content_range: str, size: int | None) -> bool:
    total = content_range.rpartition("/")[2]
    return size is None or total in ("*", str(size))


def _announced(answer: Any) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _require_success(answer: Any) -> None:
    status = answer.status_code
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise _AttemptError("the server compresses what must come as it is", final=True)
    if status in (_OK, _PARTIAL):
        return
    wait = answer.headers.get("Retry-After", "")
    seconds = float(wait) if wait.isascii() and wait.isdigit() else None
    impatient = seconds is not None and seconds > MAX_WAIT
    raise _AttemptError(
        f"HTTP status {status}", wait=seconds, final=status not in _AGAIN or impatient
    )


def _redirected(url: str, location: str | None) -> str:
    from urllib.parse import urljoin

    target = urljoin(url, location or "")
    if not location or not locations.is_allowed_web(target):
        raise _AttemptError(f"redirected to {target!r}, which is not https", final=True)
    return target


def _host(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).netloc


@contextmanager
def _opened_file(place: Local) -> Iterator[IO[bytes]]:
    try:
        stream = place.path.open("rb")
    except OSError as error:
        raise _AttemptError(error.strerror or str(error), final=True) from error
    with stream:
        yield stream


def _wait(attempt: int, asked: float | None) -> float:
    """Seconds before the next attempt: what the server asked for, else 1, 2, 4 … jittered."""
    if asked is not None:
        return min(asked, MAX_WAIT)
    return float(min(2 ** (attempt - 1), 8)) * random.uniform(0.5, 1.5)  # noqa: S311 - no secret


def _innermost(error: BaseException) -> str:
    cause: BaseException = error
    while cause.__context__ is not None:
        cause = cause.__context__
    return str(cause) or type(cause).__name__


def _unreachable(name: str, reasons: Sequence[str]) -> LoaderError:
    told = "; ".join(dict.fromkeys(reasons))
    return NetworkError(
        "UNREACHABLE",
        f"{name} cannot be fetched: {told}",
        hint="is the address right, and does this machine reach it? A mirror can be listed in the "
        "manifest's urls, or the release opened as file://",
    )
