"""Bytes from a URL, verified before anybody sees them.

An artifact is fetched chunk by chunk: a chunk is handed over only when its digest is right. A cut
connection goes on at the last verified chunk, on the same URL or on the next mirror; a wrong chunk
is fetched once more and then refused.
"""

from __future__ import annotations

import hashlib
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any, Final

from llama_loader import locations, web
from llama_loader.errors import IntegrityError, NetworkError, SettingError
from llama_loader.events import Downloading, Resolving, Sink, ignore
from llama_loader.locations import Hub, Local, Web
from llama_loader.manifest import MAX_MANIFEST_BYTES, Manifest, parse
from llama_loader.mirrors import Mirror, Mirrors, WrongBytesError
from llama_loader.web import AttemptError, Body, Deadline, Patience, RangeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

PIECE: Final = 1 << 18
SMALL_FILE_SECONDS: Final = 120.0
"""A manifest has some hundred kilobytes: who waits for longer waits in vain."""
_WORTH_ANOTHER: Final = 1 << 20
"""Bytes that a resumed copy must have gained for its failures to be forgiven."""
_BEGINNINGS: Final = {
    "tar.gz": b"\x1f\x8b",
    "tar.xz": b"\xfd7zXZ\x00",
    "tar.zst": b"\x28\xb5\x2f\xfd",
}


@dataclass(frozen=True)
class Wanted:
    """What is fetched: known to the last byte.

    Attributes:
        name: for messages.
        size: bytes.
        sha256: of the whole.
        chunk_size: bytes of every chunk but the last.
        chunks: digests of the chunks.
        format: of the archive; tells a login page from a file that was cut.
    """

    name: str
    size: int
    sha256: str
    chunk_size: int
    chunks: tuple[str, ...]
    format: str = ""

    def length(self, index: int) -> int:
        """Bytes of a chunk."""
        return min(self.chunk_size, self.size - index * self.chunk_size)


class Fetcher:
    """Reads URLs. Opens nothing until it is asked to, and keeps no connection.

    Args:
        offline: refuse everything but ``file://`` before a connection is opened.
        token: for the Hugging Face Hub, never sent anywhere else.
        endpoint: the Hub's address where it is not the usual one.
        sink: told of progress.
        sleep: how to wait between attempts, in seconds.
        patience: how long servers may take.
    """

    def __init__(
        self,
        *,
        offline: bool = False,
        token: str | None = None,
        endpoint: str | None = None,
        sink: Sink = ignore,
        sleep: Callable[[float], None] = time.sleep,
        patience: Patience | None = None,
    ) -> None:
        self._offline = offline
        self._token = token
        self._endpoint = endpoint
        self._sink = sink
        self._sleep = sleep
        self._patience = patience or Patience()

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
            SettingError: it is not a URL to load from.
            NetworkError: it cannot be had, with every attempt's reason.
            IntegrityError: it is larger than ``limit`` bytes.
        """
        target = BytesIO()
        seconds = min(SMALL_FILE_SECONDS, self._patience.deadline)
        self._copy(url, target, limit, replace(self._patience, deadline=seconds), ignore)
        return target.getvalue()

    def copy(self, url: str, target: IO[bytes], *, limit: int) -> tuple[str, int]:
        """Copy a file whose size and digest are not known; return its sha256 and size.

        A cut connection goes on where it was cut if the server names its content (a strong ETag);
        else from the beginning.

        Raises:
            SettingError: it is not a URL to load from.
            NetworkError: it cannot be had.
            IntegrityError: it is larger than ``limit`` bytes.
            OSError: ``target`` cannot be written.
        """
        return self._copy(url, target, limit, self._patience, self._sink)

    def chunks(self, wanted: Wanted, urls: Sequence[str]) -> Iterator[bytes]:
        """Yield an artifact's chunks in order, each one verified, the last only if the whole is.

        Raises:
            NetworkError: it cannot be had from any URL; names each with its reason.
            IntegrityError: what comes is not what was published.
        """
        mirrors = Mirrors(wanted.name, self._allowed(urls), self._patience)
        deadline = Deadline(self._patience.deadline)
        whole, index = hashlib.sha256(), 0
        while index < len(wanted.chunks):
            mirror = self._best(mirrors, deadline)
            try:
                for chunk in self._chunks_from(mirror, wanted, index, deadline):
                    whole.update(chunk)
                    index += 1
                    mirror.gained()
                    done = min(index * wanted.chunk_size, wanted.size)
                    if done == wanted.size:
                        _require_whole(wanted, whole.hexdigest())
                    self._sink(Downloading(wanted.name, done, wanted.size))
                    yield chunk
            except AttemptError as error:
                mirrors.failed(mirror, error)

    def _chunks_from(
        self, mirror: Mirror, wanted: Wanted, first: int, deadline: Deadline
    ) -> Iterator[bytes]:
        """One connection's worth of verified chunks."""
        start = first * wanted.chunk_size
        with self._open(mirror, start, deadline) as body:
            if body.total is not None and body.total > wanted.size:
                raise _too_large(wanted, body.total)
            _skip(body, start - body.start)
            for index in range(first, len(wanted.chunks)):
                chunk = _read_chunk(body, wanted, index)
                if hashlib.sha256(chunk).hexdigest() != wanted.chunks[index]:
                    raise WrongBytesError(
                        "CHUNK_MISMATCH",
                        f"the {len(chunk)} bytes from {index * wanted.chunk_size} on are wrong",
                    )
                if index == len(wanted.chunks) - 1 and body.read(1):
                    raise _too_large(wanted, None)
                yield chunk

    def _copy(
        self, url: str, target: IO[bytes], limit: int, patience: Patience, sink: Sink
    ) -> tuple[str, int]:
        place = locations.parse(url)  # a setting that is no URL is not the network's fault
        mirrors = Mirrors(url, self._allowed((url,)), patience)
        if isinstance(place, Hub):
            self._hub_url(place)
        deadline = Deadline(patience.deadline)
        copy = _Copy(target)
        while True:
            mirror = self._best(mirrors, deadline)
            before = copy.size
            try:
                with self._open(mirror, copy.size if mirror.etag else 0, deadline) as body:
                    copy.take(body, url, limit, sink)
                return copy.digest.hexdigest(), copy.size
            except AttemptError as error:
                if mirror.etag and copy.size - before >= _WORTH_ANOTHER:
                    mirror.gained()
                mirrors.failed(mirror, error)

    def _allowed(self, urls: Sequence[str]) -> Sequence[str]:
        """Return the URLs that may be asked: offline, those of files.

        Raises:
            NetworkError: there are none.
        """
        if not self._offline:
            return urls
        local = [url for url in urls if url.startswith("file:")]
        if not local:
            raise NetworkError(
                "OFFLINE",
                f"{', '.join(urls)} is not here, and the loader may not open a connection",
                hint="unset YAKULINGO_SPACES_OFFLINE, or name a file:// URL",
            )
        return local

    def _best(self, mirrors: Mirrors, deadline: Deadline) -> Mirror:
        """Return the mirror to ask, after the wait that is due."""
        mirror = mirrors.best()
        if mirror.failures and mirror.wait:
            if mirror.wait > deadline.remaining():
                raise mirrors.given_up()
            self._sleep(mirror.wait)
        return mirror

    @contextmanager
    def _open(self, mirror: Mirror, start: int, deadline: Deadline) -> Iterator[Body]:
        """Open a mirror at ``start``, or at 0 where it cannot serve parts."""
        try:
            place = locations.parse(mirror.url)
            opened = self._opened(place, start if mirror.ranges else 0, mirror.etag, deadline)
        except SettingError as error:
            # One of the manifest's mirrors; the others may do.
            raise AttemptError(error.message, final=True) from error
        with opened as body:
            if body.start and mirror.etag not in (None, body.etag):
                raise RangeError("the file changed in the middle")
            mirror.etag = body.etag
            yield body

    def _opened(
        self, place: Web | Local | Hub, start: int, etag: str | None, deadline: Deadline
    ) -> AbstractContextManager[Body]:
        if isinstance(place, Local):
            return _opened_file(place, start)
        url = place.url if isinstance(place, Web) else self._hub_url(place)
        return web.opened(
            url,
            start=start,
            etag=etag,
            token=self._token if isinstance(place, Hub) else None,
            patience=self._patience,
            deadline=deadline,
        )

    def _hub_url(self, place: Hub) -> str:
        try:
            from huggingface_hub import hf_hub_url
        except ImportError as error:
            raise SettingError(
                "HUB_CLIENT_MISSING",
                "huggingface_hub is not installed, so no hf:// URL can be read",
                hint="pip install huggingface_hub, or give an https:// URL",
            ) from error
        try:
            url = hf_hub_url(
                place.repo, place.path, revision=place.revision, endpoint=self._endpoint
            )
        except ValueError as error:
            raise SettingError("URL_REFUSED", f"{place.repo!r}: {error}") from error
        if not locations.is_allowed_web(url):  # the token would go over the wire in clear
            raise SettingError(
                "ENDPOINT_REFUSED",
                f"{self._endpoint} is neither https nor on loopback",
                hint="correct HF_ENDPOINT",
            )
        return url


class _Copy:
    """A file of unknown size on its way into ``target``."""

    def __init__(self, target: IO[bytes]) -> None:
        self.target = target
        self.digest = hashlib.sha256()
        self.size = 0

    def take(self, body: Body, url: str, limit: int, sink: Sink) -> None:
        """Append a body that goes on where the last one ended; start over with any other."""
        if body.start != self.size:
            self.target.seek(0)
            self.target.truncate()
            self.digest, self.size = hashlib.sha256(), 0
        while piece := body.read(min(PIECE, limit + 1 - self.size)):
            self.size += len(piece)
            if self.size > limit:
                raise IntegrityError("FILE_TOO_LARGE", f"{url} is larger than {limit} bytes")
            self.digest.update(piece)
            self.target.write(piece)
            sink(Downloading(url, self.size, body.total))


def _read_chunk(body: Body, wanted: Wanted, index: int) -> bytes:
    chunk = bytearray()
    length = wanted.length(index)
    while len(chunk) < length:
        piece = body.read(min(PIECE, length - len(chunk)))
        if not piece:
            raise _too_short(bytes(chunk), wanted, index)
        chunk += piece
    return bytes(chunk)


def _too_short(begun: bytes, wanted: Wanted, index: int) -> AttemptError:
    """A body that ended early was cut; one that also begins otherwise is another file."""
    got = index * wanted.chunk_size + len(begun)
    beginning = _BEGINNINGS.get(wanted.format, b"")
    if index == 0 and begun and not begun.startswith(beginning):
        return WrongBytesError(
            "NOT_THE_FILE", f"{got} bytes that are no {wanted.format} came with status 200"
        )
    return AttemptError(f"ended after {got} of {wanted.size} bytes")


def _too_large(wanted: Wanted, size: int | None) -> WrongBytesError:
    found = "longer" if size is None else f"{size} bytes long"
    return WrongBytesError("FILE_TOO_LARGE", f"it is {found}, and must be {wanted.size} bytes")


def _require_whole(wanted: Wanted, found: str) -> None:
    if found != wanted.sha256:
        raise IntegrityError(
            "SHA256_MISMATCH",
            f"{wanted.name}: every chunk is right, but the whole has sha256 {found}, not "
            f"{wanted.sha256}",
            hint="the manifest contradicts itself; ask who published it",
        )


def _skip(body: Body, count: int) -> None:
    """Read over what is here already: the server did not heed the range."""
    while count > 0:
        piece = body.read(min(PIECE, count))
        if not piece:
            raise AttemptError("ended before what is here already")
        count -= len(piece)


@contextmanager
def _opened_file(place: Local, start: int) -> Iterator[Body]:
    try:
        status = place.path.stat()
        if not stat.S_ISREG(status.st_mode):  # a FIFO would be waited for, for ever
            raise AttemptError("it is not a file", final=True)
        stream = place.path.open("rb")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = error.strerror or str(error)
        raise AttemptError(reason, final=True, missing=missing) from error
    with stream:
        stream.seek(start)
        yield Body(start, status.st_size, None, _read_local(stream))


def _read_local(stream: Any) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        try:
            data: bytes = stream.read(size)
        except OSError as error:
            raise AttemptError(error.strerror or str(error), final=True) from error
        return data

    return read
