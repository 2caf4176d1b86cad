"""Fetch files from URLs, with retries and mirrors, and verify an artifact chunk by chunk.

A chunk is handed over only when its digest is right. After a cut the download resumes at the last
verified chunk, on the same URL or on the next mirror. A wrong chunk is fetched once more and then
refused.

What cannot be fetched raises ``NetworkError``, which names every attempt's reason; what is too
large, or not what was published, ``IntegrityError``; a URL that cannot be loaded from
``SettingError``; and a file that cannot be written ``OSError``.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import IO, Final

from llama_loader import locations
from llama_loader.concurrency import ahead
from llama_loader.errors import IntegrityError, LoaderError, NetworkError, SettingError
from llama_loader.events import Downloading, Sink, ignore
from llama_loader.locations import AttemptError, Body, Patience, RangeError, Web
from llama_loader.manifest import MAX_MANIFEST_BYTES, Artifact

SMALL_FILE_SECONDS: Final = 60.0
"""A manifest has some hundred kilobytes: it comes within this time, all attempts together."""
MAX_WRONG: Final = 2
"""Wrong bytes are fetched once more from the same URL; then the file itself is wrong."""
PIECE: Final = 1 << 18
_LARGEST: Final = 1 << 40
"""Most bytes of a file whose size is not known before its download."""

_SLOWEST_BACKOFF: Final = 8.0
_MOST_REASONS: Final = 400
"""Reasons that an error tells, the last ones, and characters of each: a download of hours may fail
often."""


@dataclass(frozen=True, kw_only=True)
class Fetcher:
    """Reads URLs. Opens nothing before a call, and keeps no connection."""

    offline: bool = False  # refuse everything but ``file://`` before a connection is opened
    # for the Hugging Face Hub, never sent anywhere else
    token: str | None = field(default=None, repr=False)
    endpoint: str = locations.HUB  # the Hub's address, without a slash at its end
    sink: Sink = ignore
    sleep: Callable[[float], None] = time.sleep  # waits between attempts
    patience: Patience = field(default_factory=Patience)

    def manifest_bytes(self, url: str) -> bytes:
        """Return a manifest's bytes; errors are those of ``copy``."""
        self.sink(Downloading(locations.shown(url), 0, None))
        return self.read(url, limit=MAX_MANIFEST_BYTES)

    def read(self, url: str, *, limit: int) -> bytes:
        """Return a small file, within ``SMALL_FILE_SECONDS``; errors are those of ``copy``."""
        target, seconds = BytesIO(), min(SMALL_FILE_SECONDS, self.patience.deadline)
        hasty = replace(self, patience=replace(self.patience, deadline=seconds))
        hasty.copy(url, target, limit=limit)
        return target.getvalue()

    def copy(self, url: str, target: IO[bytes], *, limit: int) -> tuple[str, int]:
        """Fetch a file of unknown size and digest into ``target``; return its sha256 and size.

        After a cut it starts over, because nothing can verify the bytes that have come.
        """
        self.resolve(url)  # a URL that cannot be used is a setting's fault, not the network's
        name = locations.shown(url)
        mirrors = self._mirrors(name, (url,))
        while True:
            with mirrors.attempt() as mirror, mirrors.opened(mirror, 0) as body:
                target.seek(0)
                target.truncate()
                digest, size = hashlib.sha256(), 0
                while piece := body.read(min(PIECE, limit + 1 - size)):
                    size += len(piece)
                    if size > limit:
                        raise IntegrityError("FILE_TOO_LARGE", name=name, limit=limit)
                    target.write(piece)
                    digest.update(piece)
                    self.sink(Downloading(name, size, body.size))
                return digest.hexdigest(), size

    def resume(self, place: Web, target: IO[bytes], size: int | None) -> None:
        """Fetch what a file of ``size`` bytes lacks at its end; what is there is taken for right.

        Without a size the first answer's counts, and without that one the end of the answer.
        A server without ranges sends it all again. There is no deadline: the rate has a limit.
        """
        name, patience = locations.shown(place.url), replace(self.patience, deadline=math.inf)
        mirrors = Mirrors(name, (), replace(self, patience=patience), (place,))
        forgiven = done = target.seek(0, SEEK_END)
        limit = math.inf if size is not None else _LARGEST
        while size is None or done < size:
            with mirrors.attempt() as mirror, mirrors.opened(mirror, done) as body:
                if size is None and body.size is not None:
                    size = body.start + body.size
                if size is not None and body.size not in {None, size - body.start}:
                    told = f"{body.size} bytes instead of {size} came"
                    raise AttemptError(told, final=True, refusal=200)
                done = target.seek(body.start)
                target.truncate()
                while piece := body.read(min(PIECE, (size or done + PIECE) - done)):
                    if max(done, size or 0) > limit:
                        told = f"it is larger than {_LARGEST} bytes"
                        raise AttemptError(told, final=True, refusal=200)
                    done += target.write(piece)
                    target.flush()  # this process may be killed now
                    if done >= forgiven + PIECE:  # less would do for ever, a byte at a time
                        forgiven, mirror.failures = done, 0
                    self.sink(Downloading(name, done, size))
                if size is None:
                    return
                if done < size:
                    raise AttemptError(f"ended after {done} of {size} bytes")

    def chunks(
        self, artifact: Artifact, urls: Sequence[str], kept: IO[bytes] | None = None
    ) -> Generator[bytes, None, None]:
        """Yield an artifact's chunks in order, each one verified, the last only if the whole is.

        Another thread fetches the next chunk before the caller reads it. The URLs are tried in
        order. ``kept`` is a file that may hold chunks of an earlier process: those that are right
        come first, and those that are fetched are written there.
        """
        mirrors, done = self._mirrors(artifact.name, urls), 0
        for chunk in ahead(_verified(artifact, mirrors, kept), 1):
            done += len(chunk)
            self.sink(Downloading(artifact.name, done, artifact.size))
            yield chunk

    def resolve(self, url: str) -> Web | Path:
        """Return where a URL's file is, as ``locations.resolve`` does."""
        return locations.resolve(url, endpoint=self.endpoint, token=self.token)

    def _mirrors(self, name: str, urls: Sequence[str]) -> Mirrors:
        allowed = [url for url in urls if url.startswith("file:")] if self.offline else urls
        if urls and not allowed:
            raise NetworkError("OFFLINE", urls=", ".join(map(locations.shown, urls)))
        return Mirrors(name, allowed, self)


@dataclass(eq=False)
class Mirror:
    """A URL, and how it did since the download last made progress on it."""

    name: str
    place: Web | Path
    ranges: bool = True  # it serves parts of a file
    failures: int = 0
    wrong: int = 0  # of the failures, those with wrong bytes
    wait: float = 0.0  # seconds before its next request


class Mirrors:
    """The usable URLs of one file: which to ask next and when, and the error if none is left."""

    def __init__(
        self, name: str, urls: Sequence[str], fetcher: Fetcher, places: Sequence[Web] = ()
    ) -> None:
        self._name = name
        self._patience = fetcher.patience
        self._sleep = fetcher.sleep
        self._deadline = time.monotonic() + fetcher.patience.deadline
        self._reasons: list[str] = []
        self._refusals: set[int] = set()
        self._code = ""
        self._left = [Mirror(name, place) for place in places]
        for url in urls:
            try:
                self._left.append(Mirror(locations.shown(url), fetcher.resolve(url)))
            except SettingError as error:
                self._reasons.append(f"{locations.shown(url)}: {error.message}")
                self._refusals.add(0)

    @contextmanager
    def attempt(self) -> Iterator[Mirror]:
        """Choose the best mirror; an attempt on it that fails is recorded and ended.

        With none left, or no time for the next, the error of the whole download is raised.
        """
        mirror = self._best()
        try:
            yield mirror
        except AttemptError as error:
            self._failed(mirror, error)

    def opened(self, mirror: Mirror, start: int) -> AbstractContextManager[Body]:
        """Open a mirror at ``start``, or at 0 where it cannot serve parts (``Body.start``)."""
        begin = start if mirror.ranges else 0
        if isinstance(mirror.place, Path):
            return _opened_file(mirror.place, begin)
        from llama_loader import http_transport  # a start that downloads nothing needs no requests

        return http_transport.opened(mirror.place, begin, self._patience, self._deadline)

    def _best(self) -> Mirror:
        """Return the first of the mirrors that failed least, after the wait that is due."""
        if not self._left:
            raise self._error()
        mirror = min(self._left, key=lambda mirror: mirror.failures)
        if mirror.failures and mirror.wait:
            if time.monotonic() + mirror.wait > self._deadline:
                self._reasons.append(f"not done within {self._patience.deadline:g} s")
                raise self._error()
            self._sleep(mirror.wait)
        return mirror

    def _failed(self, mirror: Mirror, error: AttemptError) -> None:
        self._reasons.append(f"{mirror.name}: {error}"[:_MOST_REASONS])
        del self._reasons[:-_MOST_REASONS]
        mirror.failures += 1
        mirror.wait = backoff(mirror.failures, error.wait, self._patience)
        if isinstance(error, RangeError):
            mirror.ranges, mirror.wait = False, 0.0
        elif error.wrong:
            mirror.wrong, mirror.wait = mirror.wrong + 1, 0.0
            self._code = error.wrong if mirror.wrong >= MAX_WRONG else self._code
        exhausted = mirror.failures >= self._patience.attempts or mirror.wrong >= MAX_WRONG
        if error.final or exhausted:
            self._left.remove(mirror)
            self._refusals.add(error.refusal)

    def _error(self) -> LoaderError:
        reasons = "; ".join(dict.fromkeys(self._reasons))
        if self._code:
            return IntegrityError(self._code, file=self._name, reasons=reasons)
        answered = self._refusals and not self._left and 0 not in self._refusals
        code = "UNREACHABLE/answered" if answered else "UNREACHABLE"
        error = NetworkError(code, file=self._name, reasons=reasons)
        error.refusals = frozenset({0} if self._left else self._refusals)
        return error


@contextmanager
def _opened_file(path: Path, start: int) -> Iterator[Body]:
    with _local_errors():
        if path.exists() and not path.is_file():  # a FIFO would be waited for without end
            named = f"; a release's manifest in it is {(path / 'manifest.json').as_uri()}"
            why = f"it is not a file{named if path.is_dir() else ''}"
            raise AttemptError(why, final=True)
        stream = path.open("rb")
    with stream:
        stream.seek(start)
        yield Body(start, None, _local_errors()(stream.read))


@contextmanager
def _local_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        status = 404 if isinstance(error, FileNotFoundError) else 0
        raise AttemptError(error.strerror or str(error), final=True, refusal=status) from error


def backoff(failures: int, asked: float | None, patience: Patience) -> float:
    """Return the seconds before the next attempt: the server's wish, else 1, 2, 4, 8, jittered."""
    jitter = random.uniform(0.5, 1.5)  # noqa: S311 - no secret
    own = float(min(2 ** (failures - 1), _SLOWEST_BACKOFF)) * jitter
    return own if asked is None else min(asked, patience.longest_wait)


def _verified(
    artifact: Artifact, mirrors: Mirrors, kept: IO[bytes] | None
) -> Generator[bytes, None, None]:
    """Yield the chunks in order, the last one only if the whole has the right digest."""
    whole = hashlib.sha256()
    for number, chunk in enumerate(_each(artifact, mirrors, kept), 1):
        whole.update(chunk)
        digest, sha256 = whole.hexdigest(), artifact.sha256
        if number == len(artifact.chunks) and digest != sha256:
            raise IntegrityError(
                "SHA256_MISMATCH", artifact=artifact.name, digest=digest, sha256=sha256
            )
        yield chunk


def _each(artifact: Artifact, mirrors: Mirrors, kept: IO[bytes] | None) -> Iterator[bytes]:
    """Yield the chunks that are kept, then those of one connection after another."""
    done, count, size = 0, len(artifact.chunks), artifact.chunk_size
    while kept and done < count:
        kept.seek(done * size)
        chunk = kept.read(min(size, artifact.size - done * size))
        if hashlib.sha256(chunk).hexdigest() != artifact.chunks[done]:
            break
        done += 1
        yield chunk
    while done < count:
        with mirrors.attempt() as mirror, mirrors.opened(mirror, done * size) as body:
            for index in range(body.start // size, count):
                chunk = _read_chunk(body, artifact, index)
                if index < done:  # the server sends all of the file
                    continue
                if index == count - 1 and body.read(1):
                    told = f"it is longer than {artifact.size} bytes"
                    raise AttemptError(told, wrong="FILE_TOO_LARGE/published")
                if kept and isinstance(mirror.place, Web):
                    # Other processes may do the same: a place only ever gets what belongs there.
                    kept.seek(index * size)
                    kept.write(chunk)
                    kept.flush()
                mirror.failures = mirror.wrong = 0  # the download makes progress
                done += 1
                yield chunk


def _read_chunk(body: Body, artifact: Artifact, index: int) -> bytes:
    """Read and verify the chunk that begins at the position of ``body``."""
    start = index * artifact.chunk_size
    length = min(artifact.chunk_size, artifact.size - start)
    begun = BytesIO()  # hands its buffer over without a copy
    while rest := length - begun.tell():
        piece = body.read(min(PIECE, rest))
        if not piece:
            break
        begun.write(piece)
    chunk, got = begun.getvalue(), start + begun.tell()
    if got == start + length:
        if hashlib.sha256(chunk).hexdigest() == artifact.chunks[index]:
            return chunk
        raise AttemptError(f"the {length} bytes from {start} on are wrong", wrong="CHUNK_MISMATCH")
    from llama_loader import unpack

    forms = {form for magic, form in unpack.MAGIC.items() if chunk.startswith(magic[:got])}
    if index == 0 and artifact.format not in forms:
        raise AttemptError(
            f"{got} bytes that are no {artifact.format} came with status 200", wrong="NOT_THE_FILE"
        )
    raise AttemptError(f"ended after {got} of {artifact.size} bytes")
