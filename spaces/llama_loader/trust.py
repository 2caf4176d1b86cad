"""Decide which manifest this Space trusts: the one that ``release.json`` pins, or a channel's.

A pin (``manifest_sha256``) trusts bytes; it is the default and needs no key. A channel trusts a
key: its manifest may change, but it must be signed for this project and channel, its serial never
goes back, and it expires. So a mirror can neither offer an old release nor hold back a new one.

The store keeps what was accepted of each project and channel, a pair of files for each serial
(``<serial>.json`` and its ``.minisig``). The highest serial is the mark; processes that write at
the same time can only raise it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from llama_loader import disk, locations, notes, strict_json
from llama_loader import manifest as schema
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
SUFFIX: Final = ".minisig"
SKEW: Final = timedelta(days=1)
"""How far a clock may be off, time zones included, before it is called wrong."""
WARNING: Final = timedelta(days=21)
"""How long before a channel expires the loader begins to warn."""
GRACE: Final = timedelta(days=30)
"""How long after its expiry a manifest that was accepted before still runs."""
_MAX_RELEASE_FILE: Final = 64 * 1024
_MAX_SIGNATURE: Final = 4096
"""Bytes. A minisign signature has some 350, most of them comments."""
_NAME: Final = re.compile(r"([0-9]{1,16})\.json", re.ASCII)
_COMMENT: Final = re.compile(r"project (\S+) channel (\S+) serial ([0-9]{1,16}) release (\S+)")
_TRIES, _BETWEEN = 3, 1.0
"""How often a manifest and its signature are fetched until they belong together, and the seconds
between: a promotion replaces two files, one after the other."""
_KEPT: Final = 3
"""Manifests of a channel that stay in the store: the last one, and two to look back at."""


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """What ``release.json`` says: one release (``manifest_sha256``), or a signed channel."""

    manifest_url: schema.Text
    manifest_sha256: schema.Sha256 | None = None
    public_key: schema.Text | None = None
    project: schema.Text | None = None
    channel: schema.Text | None = None
    min_serial: Annotated[int, Meta(ge=0, le=2**53 - 1)] | None = None


class TrustedComment(NamedTuple):
    """What a channel's signature is for. The farm writes it, the loader compares it."""

    project: str
    channel: str
    serial: int
    release: str

    def render(self) -> str:
        """Return the text for minisign's signed trusted comment."""
        return (
            f"project {self.project} channel {self.channel}"
            f" serial {self.serial} release {self.release}"
        )

    @classmethod
    def parse(cls, text: str) -> TrustedComment | None:
        """Read what ``render`` wrote; None for any other text."""
        found = _COMMENT.fullmatch(text)
        return cls(found[1], found[2], int(found[3]), found[4]) if found else None


class _Signed(NamedTuple):
    """A manifest, its bytes and those of its signature, which verified them."""

    manifest: Manifest
    data: bytes
    signature: bytes


def manifest(
    settings: Settings, store: Store, fetcher: Fetcher, sink: Sink = ignore
) -> tuple[Manifest, str]:
    """Return the trusted manifest and its URL: the settings' own, else that of ``release.json``.

    A digest in the settings pins, whatever ``release.json`` says.

    Raises:
        SettingError: nothing says which release to run.
        NetworkError: the manifest cannot be fetched.
        IntegrityError: it is not what is pinned, not what a channel may offer, or malformed.
    """
    if settings.manifest_url is not None:
        pin = Pin(manifest_url=settings.manifest_url)
    else:
        pin = read(release_file())
    url, sha256 = pin.manifest_url, settings.manifest_sha256 or pin.manifest_sha256
    if pin.public_key is not None and sha256 is None:
        return Channel(pin, store=store, sink=sink).manifest(fetcher), url
    found = store.manifest(url, sha256, fetcher)
    least = pin.min_serial or 0
    _require_serial(found, url, least, "is asked for")
    return found, url


def release_file() -> Path:
    """Return ``release.json`` beside the package, or beside the app of an installed package."""
    app = getattr(sys.modules["__main__"], "__file__", None)
    if app is None or RELEASE_FILE.exists():
        return RELEASE_FILE
    return Path(app).resolve().with_name(RELEASE_FILE.name)


def read(path: Path) -> Pin:
    """Read ``release.json``.

    Raises:
        SettingError: the file cannot be read, so nothing says which release to trust.
        IntegrityError: it is malformed, or has neither a digest nor a key, or has both.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingError(
            "RELEASE_NOT_CHOSEN",
            f"nothing says which release to run: {path.name} cannot be read ({error.strerror})",
            hint=f"put {path.name} beside the app, or set llama_cpp_manifest_url and"
            " llama_cpp_manifest_sha256 (as variables YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL and"
            " …_SHA256, as options --manifest and --manifest-sha256)",
        ) from error
    tree = strict_json.loads(data, what=path.name, max_bytes=_MAX_RELEASE_FILE)
    pin = schema.convert(tree, Pin, what=path.name, code="RELEASE_INVALID")
    digest, key = pin.manifest_sha256 is not None, pin.public_key is not None
    if digest == key:
        raise IntegrityError(
            "RELEASE_INVALID" if key else "RELEASE_NOT_PINNED",
            f"{path.name} has {'both' if key else 'neither'} of manifest_sha256 and public_key",
            hint="the one pins a release, the other follows a channel: exactly one must be there",
        )
    return pin


def _require_serial(found: Manifest, url: str, least: int, why: str) -> None:
    if found.serial < least:
        raise IntegrityError(
            "SERIAL_TOO_LOW",
            f"manifest {locations.shown(url)} has serial {found.serial}; {least} {why}",
            hint="an older release is offered as new: a rollback would have a higher serial",
        )


class Channel:
    """A signed channel, and what this store accepted from it.

    Args:
        pin: names URL, key, project and channel; the signature lies at the URL's path with
            ``.minisig`` behind it.
        store: keeps what was accepted.
        sink: told where the channel cannot be reached, and of its expiry.
        now: the present time.
        sleep: waits between two tries.

    Raises:
        IntegrityError: ``CHANNEL_NOT_NAMED``: the pin lacks project or channel.
    """

    def __init__(
        self,
        pin: Pin,
        *,
        store: Store,
        sink: Sink,
        now: datetime | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not pin.public_key or not pin.project or not pin.channel:
            raise IntegrityError(
                "CHANNEL_NOT_NAMED",
                f"{RELEASE_FILE.name} follows a channel, but does not name its project and channel",
                hint='add "project": "OWNER/REPO" and "channel": "stable", or write the file again'
                " with invoke pin-space",
            )
        self._url, self._least = pin.manifest_url, pin.min_serial or 0
        self._shown = locations.shown(pin.manifest_url)
        self._public_key, self._project, self._channel = pin.public_key, pin.project, pin.channel
        self._store, self._sink, self._sleep = store, sink, sleep
        self._now = now or datetime.now(timezone.utc)
        identity = f"{pin.public_key}\n{pin.project}\n{pin.channel}"
        self._name = hashlib.sha256(identity.encode()).hexdigest()[:32]

    def manifest(self, fetcher: Fetcher) -> Manifest:
        """Return the channel's present manifest; the last accepted one if it cannot be reached.

        Raises:
            SettingError: the public key is none.
            NetworkError: it cannot be fetched, and none was accepted before.
            IntegrityError: it is not signed by the key for this channel, has expired, is older
                than an accepted one, or another one than was accepted under its serial.
            StoreError: it cannot be kept.
        """
        try:
            signed = self._fetched(fetcher)
        except NetworkError as error:
            last = self._last()
            if last is None:
                raise
            signed = last
            self._sink(notes.channel_out_of_reach(self._shown, last.manifest.serial, error.message))
        self._require_not_older(signed.manifest)
        accepted = self._was_accepted(signed)
        if not accepted and self._left(signed.manifest) <= timedelta():
            # no new manifest is accepted after its expiry, but the accepted one may have its grace
            last = self._last()
            signed, accepted = last or signed, last is not None
        self._require_current(signed.manifest, accepted=accepted)
        if self._kept(signed.manifest.serial) != (signed.data, signed.signature):
            self._keep(signed)
            self._require_not_older(signed.manifest)  # another process may have accepted a later
        return signed.manifest

    def _fetched(self, fetcher: Fetcher) -> _Signed:
        """Fetch the pair until it belongs together: a promotion may come between its two files."""
        for _ in range(_TRIES - 1):
            try:
                return self._fetch(fetcher)
            except IntegrityError:
                self._sleep(_BETWEEN)
        return self._fetch(fetcher)

    def _fetch(self, fetcher: Fetcher) -> _Signed:
        data = fetcher.manifest_bytes(self._url, None)
        place = urlsplit(self._url)
        beside = place._replace(path=f"{place.path}{SUFFIX}").geturl()
        try:
            signature = fetcher.read(beside, limit=_MAX_SIGNATURE)
        except NetworkError as error:
            if not error.missing:
                raise
            raise IntegrityError(
                "SIGNATURE_MISSING",
                f"manifest {self._shown} has no signature: {error.message}",
                hint="a channel is signed when it is promoted; a release alone is pinned with"
                " manifest_sha256",
            ) from error
        return self._verified(data, signature)

    def _verified(self, data: bytes, signature: bytes) -> _Signed:
        """Verify and parse a pair; its comment must name this channel and this manifest."""
        text = self._signed_comment(data, signature)
        found = schema.parse(data, what=f"manifest {self._shown}")
        comment = TrustedComment.parse(text)
        if comment is None:
            raise IntegrityError(
                "CHANNEL_NOT_SIGNED_FOR",
                f"the signature of manifest {self._shown} names no project and channel: {text!r}",
                hint="its author must promote the release again, with a farm that signs them",
            )
        expected = TrustedComment(self._project, self._channel, found.serial, found.release)
        if comment != expected:
            raise IntegrityError(
                "CHANNEL_MISMATCH",
                f"manifest {self._shown} is signed as {text!r}, expected is {expected.render()!r}",
                hint=f"it belongs elsewhere, or {RELEASE_FILE.name} names the wrong project or"
                " channel",
            )
        return _Signed(found, data, signature)

    def _signed_comment(self, data: bytes, signature: bytes) -> str:
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
            parsed = minisign.Signature.from_bytes(signature)
            key.verify(data, parsed)
        except (minisign.Error, ValueError) as error:
            raise IntegrityError(
                "SIGNATURE_INVALID",
                f"manifest {self._shown} is not signed by {self._public_key}: {error}",
                hint="it was changed on its way or signed with another key: do not use it before"
                " its author confirms the key",
            ) from error
        return str(parsed.trusted_comment)

    def _require_not_older(self, found: Manifest) -> None:
        highest = max(self._serials(), default=0)
        _require_serial(found, self._url, highest, "was accepted before")
        _require_serial(found, self._url, self._least, "is asked for")

    def _was_accepted(self, signed: _Signed) -> bool:
        """Whether these bytes were accepted; others with the same serial are an error."""
        kept = self._kept(signed.manifest.serial)
        if kept is None or kept[0] == signed.data:
            return kept is not None
        try:
            self._verified(*kept)
        except IntegrityError:  # damaged on the disk: it says nothing
            return False
        raise IntegrityError(
            "SERIAL_REUSED",
            f"manifest {self._shown} has serial {signed.manifest.serial} with other content than"
            " the one that was accepted before",
            hint="two manifests were signed under one serial: ask its author which one is right",
        )

    def _left(self, found: Manifest) -> timedelta:
        """Return the time until expiry; a manifest that never expires counts as expired."""
        return found.expires - self._now if found.expires else timedelta()

    def _require_current(self, found: Manifest, *, accepted: bool) -> None:
        if found.created > self._now + SKEW:
            raise IntegrityError(
                "CLOCK_WRONG",
                f"manifest {self._shown} was made on {found.created:%Y-%m-%d}, but this machine's"
                f" clock says {self._now:%Y-%m-%d}",
                hint="set the clock: with a wrong one nobody can tell whether a release expired",
            )
        left = self._left(found)
        if left > WARNING:
            return
        if found.expires is None or (left <= timedelta() and not (accepted and -left < GRACE)):
            when = f"expired on {found.expires:%Y-%m-%d}" if found.expires else "never expires"
            raise IntegrityError(
                "MANIFEST_EXPIRED",
                f"manifest {self._shown} {when}; this machine's clock says {self._now:%Y-%m-%d}",
                hint="is the clock right? Otherwise its author must promote a release again: a"
                " channel that does not expire could be held back for ever",
            )
        self._sink(self._expiry_note(found.expires))

    def _expiry_note(self, expires: datetime) -> Note:
        if expires > self._now:
            return Note(
                "CHANNEL_EXPIRES_SOON",
                f"channel {self._shown} expires on {expires:%Y-%m-%d}",
                "its author renews it by promoting a release again",
            )
        return Note(
            "CHANNEL_EXPIRED",
            f"channel {self._shown} expired on {expires:%Y-%m-%d}; the release that was accepted"
            f" before runs until {expires + GRACE:%Y-%m-%d}",
            "its author must promote a release again; is this machine's clock right?",
        )

    def _folders(self) -> list[Path]:
        """Where manifests may have been kept: a store that cannot be written has a stand-in."""
        roots = (self._store.root, disk.private_place("llama-loader"))
        return [root / "channels" / self._name for root in roots if root is not None]

    def _serials(self) -> list[int]:
        """Return the serials that were accepted: none on a machine that never saw the channel."""
        return [serial for folder in self._folders() for serial in _serials(folder)]

    def _last(self) -> _Signed | None:
        """Return what was accepted last, verified anew."""
        kept = self._kept(max(self._serials(), default=-1))
        return None if kept is None else self._verified(*kept)

    def _kept(self, serial: int) -> tuple[bytes, bytes] | None:
        """Return the manifest and the signature that were accepted under a serial."""
        for folder in self._folders():
            name = f"{serial}.json"
            with (
                disk.errors(folder / name),
                contextlib.suppress(FileNotFoundError),
                disk.Folder.open(folder) as place,
            ):
                data = place.read(name, schema.MAX_MANIFEST_BYTES)
                signature = place.read(f"{name}{SUFFIX}", _MAX_SIGNATURE)
                if data is not None:
                    return data, signature or b""
        return None

    def _keep(self, signed: _Signed) -> None:
        name = f"{signed.manifest.serial}.json"
        self._store.write("channels", self._name, f"{name}{SUFFIX}", data=signed.signature)
        self._store.write("channels", self._name, name, data=signed.data)
        folder = self._store.root / "channels" / self._name
        with disk.errors(folder):
            for old in sorted(_serials(folder))[:-_KEPT]:
                (folder / f"{old}.json").unlink(missing_ok=True)
                (folder / f"{old}.json{SUFFIX}").unlink(missing_ok=True)


def _serials(folder: Path) -> list[int]:
    with disk.errors(folder):
        names = [path.name for path in folder.glob("*.json")]
    return [int(named[1]) for name in names if (named := _NAME.fullmatch(name))]
