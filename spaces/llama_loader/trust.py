"""Decide which manifest this Space trusts: the one that ``release.json`` pins, or a channel's.

A pin (``manifest_sha256``) trusts bytes; it is the default and needs no key. A channel trusts a
key: its manifest may change, but it must be signed for this project and channel, its serial never
goes back, and it expires. So a mirror can neither offer an old release nor hold back a new one.

The store keeps what was accepted of each project and channel in ``<serial>.json``. The highest
name is the mark: processes that accept at the same time can only raise it.

If no setting names a release, or the key is malformed, that is a ``SettingError``. A manifest
that is not what is pinned, or not signed for this channel, has expired, is older than an accepted
one, or another one of its serial is an ``IntegrityError``. So is a malformed ``release.json``: with
neither a digest nor a key, with both, or with a channel that it does not name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from llama_loader import disk, locations
from llama_loader import manifest as schema
from llama_loader.disk import Folder
from llama_loader.errors import IntegrityError, NetworkError, SettingError
from llama_loader.events import Note, ignore

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_loader.events import Sink
    from llama_loader.fetch import Fetcher
    from llama_loader.manifest import Manifest
    from llama_loader.settings import Settings
    from llama_loader.store import Store

RELEASE_FILE: Final = Path(__file__).resolve().parent.parent / "release.json"
SKEW: Final = timedelta(days=1)
"""How far a clock may be off, time zones included, before it is called wrong."""
WARNING: Final = timedelta(days=21)
"""How long before a channel expires the loader begins to warn."""
GRACE: Final = timedelta(days=30)
"""How long after its expiry a manifest that was accepted before still runs."""
_KEPT: Final = re.compile(r"([0-9]{1,16})\.json", re.ASCII)
_MAX_KEPT: Final = 2 * schema.MAX_MANIFEST_BYTES
"""Bytes: base64 makes four out of three."""
_MAX_RELEASE_FILE: Final = 64 * 1024
_MAX_SIGNATURE: Final = 4096
"""Bytes. A minisign signature has some 350, most of them comments."""
_TRIES, _BETWEEN = 3, 1.0
"""How often a manifest and its signature are fetched until they belong together, and the seconds
between: a promotion replaces two files, one after the other."""


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``release.json``: one release (``manifest_sha256``), or a signed channel."""

    manifest_url: schema.Text
    manifest_sha256: schema.Sha256 | None = None
    public_key: schema.Text = ""
    project: schema.Text = ""
    channel: schema.Text = ""
    min_serial: Annotated[int, Meta(ge=0, le=2**53 - 1)] | None = None


class _Signed(NamedTuple):
    manifest: Manifest
    data: bytes
    signature: bytes


def manifest(
    settings: Settings, store: Store, fetcher: Fetcher, sink: Sink = ignore
) -> tuple[Manifest, str]:
    """Return the trusted manifest and its URL: the settings' own, else that of ``release.json``.

    A digest in the settings pins, also where ``release.json`` has another one.
    """
    if settings.manifest_url is not None:
        pin = Pin(manifest_url=settings.manifest_url)
    else:
        pin = read(release_file())
    url, sha256 = pin.manifest_url, settings.manifest_sha256 or pin.manifest_sha256
    if pin.public_key and sha256 is None:
        return SignedChannel(pin, store=store, sink=sink).manifest(fetcher), url
    return store.manifest(url, sha256, fetcher), url


def release_file() -> Path:
    """Return ``release.json`` beside the package, or beside the app of an installed package."""
    app = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__).resolve()
    by_module = app.parent == Path(__file__).resolve().parent  # python3 -m llama_loader
    if by_module or RELEASE_FILE.exists():
        return RELEASE_FILE
    return app.with_name(RELEASE_FILE.name)


def read(path: Path) -> Pin:
    """Read ``release.json``."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingError(
            "RELEASE_NOT_CHOSEN", path=path, file=path.name, why=error.strerror
        ) from error
    tree = schema.strict_json(data, what=path.name, max_bytes=_MAX_RELEASE_FILE)
    pin = schema.convert(tree, Pin, what=path.name, code="RELEASE_INVALID/field")
    digest, key = pin.manifest_sha256 is not None, bool(pin.public_key)
    if digest == key:
        raise IntegrityError("RELEASE_INVALID" if key else "RELEASE_NOT_PINNED", file=path.name)
    if key and not (pin.project and pin.channel):
        raise IntegrityError("CHANNEL_NOT_NAMED", file=path.name)
    return pin


def signed_for(project: str, channel: str, serial: int, release: str) -> str:
    """Return the trusted comment of a channel's signature: it names what the signature is for."""
    return f"project {project} channel {channel} serial {serial} release {release}"


def signed_comment(content: bytes, signature: bytes, public_key: str, what: str) -> str:
    """Verify a minisign signature; return its trusted comment, which is signed as well."""
    import minisign  # brings cryptography: not for those who pin

    try:
        key = minisign.PublicKey.from_base64(public_key)
    except (minisign.Error, ValueError) as error:
        raise SettingError("PUBLIC_KEY_INVALID", key=public_key[:80], error=error) from error
    try:
        parsed = minisign.Signature.from_bytes(signature)
        key.verify(content, parsed)
    except (minisign.Error, ValueError) as error:
        raise IntegrityError(
            "SIGNATURE_INVALID", what=what, public_key=public_key, error=error
        ) from error
    return str(parsed.trusted_comment)


@dataclass(frozen=True)
class SignedChannel:
    """A signed channel, and what ``store`` keeps of it; its signature is ``URL.minisig``."""

    pin: Pin
    store: Store
    sink: Sink
    now: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    sleep: Callable[[float], None] = time.sleep

    @property
    def _url(self) -> str:
        return locations.shown(self.pin.manifest_url)

    @property
    def _folder(self) -> str:
        identity = f"{self.pin.public_key}\n{self.pin.project}\n{self.pin.channel}"
        return hashlib.sha256(identity.encode()).hexdigest()[:32]

    def manifest(self, fetcher: Fetcher) -> Manifest:
        """Return the channel's present manifest; the last accepted one if it cannot be reached."""
        try:
            offered = self._fetched(fetcher)
            mark, last = self._accepted()  # another process may have accepted a later one by now
        except NetworkError as error:
            mark, last = self._accepted()
            if last is None:
                raise
            offered = last
            self.sink(Note.of("CHANNEL_OUT_OF_REACH", url=self._url, why=error.message, mark=mark))
        serial, asked = offered.manifest.serial, (self.pin.min_serial or 0, "is asked for")
        least, why = max(asked, (mark, "was accepted before"))
        if serial < least:
            raise IntegrityError(
                "SERIAL_TOO_LOW", url=self._url, serial=serial, least=least, why=why
            )
        accepted = last is not None and last.data == offered.data
        if last and not accepted and last.manifest.serial == serial:
            raise IntegrityError("SERIAL_REUSED", url=self._url, mark=mark)
        has_ended = self._left(offered.manifest) <= timedelta()
        if last and has_ended and last.manifest.serial >= asked[0]:
            offered, accepted = last, True  # no new one is accepted now; the last has its grace
        self._require_current(offered.manifest, accepted=accepted)
        if offered != last:
            data = msgspec.json.encode((offered.data, offered.signature))
            name = f"{offered.manifest.serial}.json"
            self.store.write("channels", self._folder, name, data=data)
        return offered.manifest

    def _fetched(self, fetcher: Fetcher) -> _Signed:
        """Fetch the pair until it belongs together: a promotion may come between its two files."""
        for _ in range(_TRIES - 1):
            with contextlib.suppress(IntegrityError):
                return self._fetch(fetcher)
            self.sleep(_BETWEEN)
        return self._fetch(fetcher)

    def _fetch(self, fetcher: Fetcher) -> _Signed:
        data = fetcher.manifest_bytes(self.pin.manifest_url)
        place = urlsplit(self.pin.manifest_url)
        beside = place._replace(path=f"{place.path}.minisig").geturl()
        try:
            signature = fetcher.read(beside, limit=_MAX_SIGNATURE)
        except NetworkError as error:
            if not error.refusals <= {404, 410}:  # a server may have it, and not give it
                raise
            raise IntegrityError("SIGNATURE_MISSING", url=self._url, why=error.message) from error
        return self._verified(data, signature)

    def _verified(self, data: bytes, signature: bytes) -> _Signed:
        """Verify and parse a manifest; its signature must name this channel and its serial."""
        comment = signed_comment(data, signature, self.pin.public_key, f"manifest {self._url}")
        found = schema.parse(data, what=f"manifest {self._url}")
        expected = signed_for(self.pin.project, self.pin.channel, found.serial, found.release)
        if comment != expected:
            url, file = self._url, RELEASE_FILE.name
            raise IntegrityError(
                "CHANNEL_MISMATCH", url=url, comment=comment, expected=expected, file=file
            )
        return _Signed(found, data, signature)

    def _left(self, found: Manifest) -> timedelta:
        """Return the time until expiry; a manifest that never expires counts as expired."""
        return found.expires - self.now if found.expires else timedelta()

    def _require_current(self, found: Manifest, *, accepted: bool) -> None:
        if found.created > self.now + SKEW:
            raise IntegrityError("CLOCK_WRONG", url=self._url, created=found.created, now=self.now)
        left = self._left(found)
        if found.expires is None or (left <= timedelta() and not (accepted and -left < GRACE)):
            when = f"expired on {found.expires:%Y-%m-%d}" if found.expires else "never expires"
            raise IntegrityError("MANIFEST_EXPIRED", url=self._url, when=when, now=self.now)
        if left <= WARNING:
            name = "CHANNEL_EXPIRED" if left <= timedelta() else "CHANNEL_EXPIRES_SOON"
            end = found.expires + GRACE
            self.sink(Note.of(name, url=self._url, expires=found.expires, end=end))

    def _accepted(self) -> tuple[int, _Signed | None]:
        """Return the highest serial accepted, and its manifest unless that was damaged since."""
        # A store that cannot be written has a stand-in: the higher serial of the two counts
        mark, data = 0, b""
        for root in (self.store.root, disk.private_folder()):
            place = root / "channels" / self._folder
            with (
                disk.errors(place),
                contextlib.suppress(FileNotFoundError),
                Folder.open(place) as at,
            ):
                if disk.why_not(os.fstat(at.handle), 0):  # another user made the stand-in
                    continue
                kept = filter(None, map(_KEPT.fullmatch, at.names()))
                highest = max((int(one[1]) for one in kept), default=0)
                if highest >= mark:
                    mark, data = highest, at.read(f"{highest}.json", _MAX_KEPT) or data
        with contextlib.suppress(msgspec.MsgspecError, IntegrityError):
            return mark, self._verified(*msgspec.json.decode(data, type=tuple[bytes, bytes]))
        return mark, None
