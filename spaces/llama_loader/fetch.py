"""Bytes from a URL, verified before anybody sees them.

An artifact is fetched chunk by chunk: a chunk is handed over only when its digest is right. A cut
connection goes on at the last verified chunk, on the same URL or on the next mirror; a wrong chunk
is fetched once more and then refused.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Final

from llama_loader import locations
from llama_loader.concurrency import ahead as in_thread
from llama_loader.copying import Copy
from llama_loader.download import Download, best
from llama_loader.errors import IntegrityError
from llama_loader.events import Downloading, Resolving, Sink, ignore
from llama_loader.manifest import MAX_MANIFEST_BYTES, Manifest, parse
from llama_loader.mirrors import Mirrors
from llama_loader.patience import AttemptError, Deadline, Patience
from llama_loader.sources import Sources
from llama_loader.together import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from llama_loader.chunks import Keeper, Wanted

SMALL_FILE_SECONDS: Final = 120.0
"""A manifest has some hundred kilobytes: who waits for longer waits in vain."""
_WORTH_ANOTHER: Final = 1 << 20
"""Bytes that a resumed copy must have gained for its failures to be forgiven."""


class Fetcher:
    """Reads URLs. Opens nothing until it is asked to, and keeps no connection.

    Args:
        offline: refuse everything but ``file://`` before a connection is opened.
        token: for the Hugging Face Hub, never sent anywhere else.
        endpoint: the Hub's address where it is not the usual one.
        sink: told of progress.
        sleep: how to wait between attempts, in seconds.
        patience: how long servers may take.
        pace: when to use several connections.
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
        pace: Pace | None = None,
    ) -> None:
        self._sink = sink
        self._sleep = sleep
        self._patience = patience or Patience()
        self._pace = pace or Pace()
        self._sources = Sources(
            offline=offline, token=token, endpoint=endpoint, patience=self._patience
        )

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
        self._copy(url, Copy(target), limit, replace(self._patience, deadline=seconds), ignore)
        return target.getvalue()

    def copy(self, url: str, copy: Copy, *, limit: int) -> tuple[str, int]:
        """Fetch what is missing of a file of unknown size and digest; return its sha256 and size.

        It goes on where it was cut if the server names its content (a strong ETag, or the date of
        its last change); else from the beginning.

        Raises:
            SettingError: it is not a URL to load from.
            NetworkError: it cannot be had.
            IntegrityError: it is larger than ``limit`` bytes.
            OSError: the copy cannot be written.
        """
        return self._copy(url, copy, limit, self._patience, self._sink)

    def chunks(
        self,
        wanted: Wanted,
        urls: Sequence[str],
        keeper: Keeper | None = None,
        *,
        ahead: int = 0,
    ) -> Generator[bytes, None, None]:
        """Yield an artifact's chunks in order, each one verified, the last only if the whole is.

        Args:
            wanted: the artifact.
            urls: where it is, tried in order.
            keeper: has what an earlier process got, and keeps what comes; with it, a slow server
                that sends parts is asked for several at once.
            ahead: chunks that are fetched, in another thread, before they are asked for.

        Raises:
            NetworkError: it cannot be had from any URL; names each with its reason.
            IntegrityError: what comes is not what was published.
        """
        download = Download(
            wanted,
            self._sources.allowed(urls),
            sources=self._sources,
            patience=self._patience,
            pace=self._pace,
            sleep=self._sleep,
            keeper=keeper,
        )
        fetched, done = download.chunks(), 0
        for chunk in in_thread(fetched, ahead) if ahead else fetched:
            done += len(chunk)
            self._sink(Downloading(wanted.name, done, wanted.size))
            yield chunk

    def _copy(
        self, url: str, copy: Copy, limit: int, patience: Patience, sink: Sink
    ) -> tuple[str, int]:
        locations.parse(url)  # a setting that is no URL is not the network's fault
        mirrors = Mirrors(url, self._sources.allowed((url,)), patience)
        self._sources.require_readable(url)
        deadline = Deadline(patience.deadline)
        while True:
            mirror = best(mirrors, deadline, self._sleep)
            before, mirror.validator = copy.size, copy.validator
            try:
                start = copy.size if copy.validator else 0
                with self._sources.opened(mirror, start, deadline) as body:
                    copy.take(body, url, limit, sink)
                return copy.digest.hexdigest(), copy.size
            except AttemptError as error:
                if copy.validator and copy.size - before >= _WORTH_ANOTHER:
                    mirror.gained()
                mirrors.failed(mirror, error)
