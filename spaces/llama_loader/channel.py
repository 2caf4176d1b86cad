"""A signed channel: a manifest that may change, as long as its author says so and time goes on.

A pin trusts bytes. A channel trusts a key: the manifest must carry that key's minisign signature,
must not have expired, and its serial must never go back, so that nobody between its author and
this machine can offer an old release with a hole, or hold a new one back for ever.

What was accepted is kept in the store, a file for each serial (``<channel>/<serial>.json`` and its
``.minisig``): the highest name is the high-water mark, which processes that write at the same time
can only raise, and the release to go on with where the channel is out of reach.
"""

from __future__ import annotations

import hashlib
import re
import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

from llama_loader import disk, notes
from llama_loader import manifest as schema
from llama_loader.errors import IntegrityError, NetworkError, SettingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from llama_loader.events import Sink
    from llama_loader.fetch import Fetcher
    from llama_loader.manifest import Manifest
    from llama_loader.store import Store

SUFFIX: Final = ".minisig"
SKEW: Final = timedelta(days=1)
"""A clock may be off by so much, and time zones be confused, before that is called wrong."""
_MAX_SIGNATURE: Final = 4096
"""Bytes. A minisign signature has some 350, most of them comments."""
_NAME: Final = re.compile(r"([0-9]{1,16})\.json", re.ASCII)
_TRIES, _BETWEEN = 3, 1.0
"""How often a manifest and its signature are fetched until they belong together, and the seconds
between: a promotion replaces two files, one after the other."""
_KEPT: Final = 3
"""Manifests of a channel that stay in the store: the last one, and two to look back at."""


class Signed(NamedTuple):
    """A manifest's bytes, and what lies beside them."""

    data: bytes
    signature: bytes


class Channel:
    """Where a channel is, whose it is, and what was accepted from it.

    Args:
        url: of the manifest; the signature lies at the same place with ``.minisig`` behind it.
        public_key: minisign's, one line of base64.
        min_serial: what it must have on a machine that never saw it.
        store: keeps what was accepted.
        sink: told where the channel is out of reach.
        now: what the clock says.
        sleep: waits between two tries.
    """

    def __init__(
        self,
        url: str,
        public_key: str,
        min_serial: int,
        *,
        store: Store,
        sink: Sink,
        now: datetime | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = url
        self._public_key = public_key
        self._min_serial = min_serial
        self._store = store
        self._sink = sink
        self._sleep = sleep
        self._now = now or datetime.now(timezone.utc)
        # of another key or place, serials mean something else
        self._name = hashlib.sha256(f"{public_key}\n{url}".encode()).hexdigest()[:32]

    def manifest(self, fetcher: Fetcher) -> Manifest:
        """Return the channel's present manifest; the last accepted one where it is out of reach.

        Raises:
            SettingError: the public key is none.
            NetworkError: it cannot be had, and none was accepted before.
            IntegrityError: it is not signed by the key, has expired, or is older than one that
                was accepted.
            StoreError: it cannot be kept.
        """
        try:
            signed = self._signed(fetcher)
        except NetworkError as error:
            highest = self._highest()
            if highest is None:
                raise
            self._sink(notes.channel_out_of_reach(self._url, highest, error.message))
            signed = self._kept(highest)
            self._verify(signed)
        found = schema.parse(signed.data, what=f"manifest {self._url}")
        self._require_current(found, self._highest())
        if signed != self._kept(found.serial):
            self._keep(found.serial, signed)
            # another process may have accepted a later one meanwhile
            self._require_current(found, self._highest())
        return found

    def _signed(self, fetcher: Fetcher) -> Signed:
        """Fetch the pair and verify it; once more where a promotion came between its two files."""
        for left in reversed(range(_TRIES)):
            try:
                signed = self._fetch(fetcher)
                self._verify(signed)
            except IntegrityError:
                if not left:
                    raise
                self._sleep(_BETWEEN)
            else:
                return signed
        raise AssertionError("unreachable: the last try raises")

    def _fetch(self, fetcher: Fetcher) -> Signed:
        data = fetcher.manifest_bytes(self._url, None)
        place = urlsplit(self._url)
        beside = place._replace(path=f"{place.path}{SUFFIX}").geturl()
        try:
            return Signed(data, fetcher.read(beside, limit=_MAX_SIGNATURE))
        except NetworkError as error:
            if not error.missing:
                raise
            raise IntegrityError(
                "SIGNATURE_MISSING",
                f"manifest {self._url} has no signature: {error.message}",
                hint="a channel is signed when it is promoted; a release alone is pinned with"
                " manifest_sha256",
            ) from error

    def _verify(self, signed: Signed) -> None:
        import minisign  # brings cryptography: not for those who pin

        try:
            key = minisign.PublicKey.from_base64(self._public_key)
        except (minisign.Error, ValueError) as error:
            raise SettingError(
                "PUBLIC_KEY_INVALID",
                f"{self._public_key[:80]!r} is not a minisign public key: {error}",
                hint="give the line of base64 in the key's .pub file, which begins with RW",
            ) from error
        try:
            key.verify(signed.data, minisign.Signature.from_bytes(signed.signature))
        except (minisign.Error, ValueError) as error:
            raise IntegrityError(
                "SIGNATURE_INVALID",
                f"manifest {self._url} is not signed by {self._public_key}: {error}",
                hint="it was changed on its way or signed with another key: do not use it before"
                " its author confirms the key",
            ) from error

    def _require_current(self, found: Manifest, highest: int | None) -> None:
        least = max(highest or 0, self._min_serial)
        if found.serial < least:
            why = "was accepted before" if least == highest else "is asked for"
            raise IntegrityError(
                "SERIAL_TOO_LOW",
                f"manifest {self._url} has serial {found.serial}; {least} {why}",
                hint="a rollback has a higher serial: an older release is being offered as new",
            )
        if found.created > self._now + SKEW:
            raise IntegrityError(
                "CLOCK_WRONG",
                f"manifest {self._url} was made on {found.created:%Y-%m-%d}, but this machine's"
                f" clock says {self._now:%Y-%m-%d}",
                hint="set the clock: with a wrong one nobody can tell whether a release expired",
            )
        if found.expires is None or found.expires <= self._now:
            when = f"expired on {found.expires:%Y-%m-%d}" if found.expires else "never expires"
            raise IntegrityError(
                "MANIFEST_EXPIRED",
                f"manifest {self._url} {when}; this machine's clock says {self._now:%Y-%m-%d}",
                hint="is the clock right? Otherwise its author must promote a release again: a"
                " channel that does not expire could be held back for ever",
            )

    @property
    def _folders(self) -> tuple[Path, ...]:
        """Where manifests may have been kept: a store that cannot be written has a stand-in."""
        roots = dict.fromkeys((self._store.root, disk.private_place("llama-loader")))
        return tuple(root / "channels" / self._name for root in roots if root is not None)

    def _serials(self, folder: Path) -> Iterator[int]:
        with disk.errors(folder):
            names = [path.name for path in folder.glob("*.json")]
        return (int(named[1]) for name in names if (named := _NAME.fullmatch(name)))

    def _highest(self) -> int | None:
        """Return the high-water mark, None on a machine that never saw the channel."""
        found = [serial for folder in self._folders for serial in self._serials(folder)]
        return max(found, default=None)

    def _kept(self, serial: int) -> Signed:
        for folder in self._folders:
            place = folder / f"{serial}.json"
            with disk.errors(place):
                data = disk.read_if_there(place)
                signature = disk.read_if_there(place.with_name(f"{place.name}{SUFFIX}"))
            if data is not None:
                return Signed(data, signature or b"")
        return Signed(b"", b"")

    def _keep(self, serial: int, signed: Signed) -> None:
        folder = self._store.folder("channels", self._name)
        name = f"{serial}.json"
        with disk.errors(folder):
            self._store.write_whole(folder / f"{name}{SUFFIX}", signed.signature)
            self._store.write_whole(folder / name, signed.data)
            for old in sorted(self._serials(folder))[:-_KEPT]:
                (folder / f"{old}.json").unlink(missing_ok=True)
                (folder / f"{old}.json{SUFFIX}").unlink(missing_ok=True)
