"""Which release this Space trusts: ``release.json`` beside ``app.py``.

``{"manifest_url": …, "manifest_sha256": …}`` pins one release exactly. That is the default, and
needs no key. With ``public_key`` instead of the digest it follows a signed channel (``channel``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from llama_loader import manifest as schema
from llama_loader import strict_json
from llama_loader.errors import IntegrityError, SettingError
from llama_loader.events import ignore

if TYPE_CHECKING:
    from llama_loader.events import Sink
    from llama_loader.fetch import Fetcher
    from llama_loader.manifest import Manifest
    from llama_loader.settings import Settings
    from llama_loader.store import Store

RELEASE_FILE: Final = Path(__file__).resolve().parent.parent / "release.json"
_MAX_BYTES: Final = 64 * 1024


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """One release, to the last byte (``manifest_sha256``), or a signed channel."""

    manifest_url: schema.Text
    manifest_sha256: schema.Sha256 | None = None
    public_key: schema.Text | None = None
    min_serial: Annotated[int, Meta(ge=0, le=2**53 - 1)] | None = None


def manifest(
    settings: Settings, store: Store, fetcher: Fetcher, sink: Sink = ignore
) -> tuple[Manifest, str]:
    """Return the manifest that is trusted, and its URL: the settings' own, else release.json's.

    A digest in the settings pins, whatever release.json says.

    Raises:
        SettingError: nothing says which release to run.
        NetworkError: it cannot be had.
        IntegrityError: it is not what is pinned, not what a channel may offer, or malformed.
    """
    if settings.manifest_url is not None:
        url, sha256, least = settings.manifest_url, settings.manifest_sha256, None
    else:
        pin = read(RELEASE_FILE)
        url, sha256 = pin.manifest_url, settings.manifest_sha256 or pin.manifest_sha256
        least = pin.min_serial
        if pin.public_key is not None and sha256 is None:
            from llama_loader.channel import Channel

            channel = Channel(url, pin.public_key, least or 0, store=store, sink=sink)
            return channel.manifest(fetcher), url
    found = store.manifest(url, sha256, fetcher)
    if least is not None and found.serial < least:
        raise IntegrityError(
            "SERIAL_TOO_LOW",
            f"manifest {url} has serial {found.serial}; {RELEASE_FILE.name} asks for {least}",
            hint="it is older than the releases that this Space may run",
        )
    return found, url


def read(path: Path = RELEASE_FILE) -> Pin:
    """Read ``release.json``.

    Raises:
        SettingError: there is none, so nothing says which release to trust.
        IntegrityError: it is malformed, or neither pins a release nor names a channel's key, or
            does both.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingError(
            "RELEASE_NOT_CHOSEN",
            f"nothing says which release to run: {path.name} cannot be read ({error.strerror})",
            hint="set YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL (and …_SHA256), or write "
            f"{path.name}",
        ) from error
    tree = strict_json.loads(data, what=path.name, max_bytes=_MAX_BYTES)
    pin = schema.convert(tree, Pin, what=path.name, code="RELEASE_INVALID")
    if pin.manifest_sha256 is None and pin.public_key is None:
        raise IntegrityError(
            "RELEASE_NOT_PINNED",
            f"{path.name} has neither manifest_sha256 nor public_key",
            hint="add the manifest's sha256",
        )
    if pin.manifest_sha256 is not None and pin.public_key is not None:
        raise IntegrityError(
            "RELEASE_INVALID",
            f"{path.name} has both manifest_sha256 and public_key",
            hint="the one pins a release, the other follows a channel: keep one of them",
        )
    return pin
