"""Which release this Space trusts: ``release.json`` beside ``app.py``.

``{"manifest_url": …, "manifest_sha256": …}`` pins one release exactly. That is the default, and
needs no key.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from llama_loader import manifest as schema
from llama_loader import strict_json
from llama_loader.errors import IntegrityError, SettingError

if TYPE_CHECKING:
    from llama_loader.fetch import Fetcher
    from llama_loader.manifest import Manifest
    from llama_loader.settings import Settings
    from llama_loader.store import Store

RELEASE_FILE: Final = Path(__file__).resolve().parent.parent / "release.json"
_MAX_BYTES: Final = 64 * 1024


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """One release, to the last byte; ``public_key`` is here to be refused."""

    manifest_url: schema.Text
    manifest_sha256: schema.Sha256 | None = None
    public_key: str | None = None
    min_serial: int | None = None


def manifest(settings: Settings, store: Store, fetcher: Fetcher) -> tuple[Manifest, str]:
    """Return the manifest that is trusted, and its URL: the settings' own, else the pinned one.

    Raises:
        SettingError: nothing says which release to run.
        NetworkError: it cannot be had.
        IntegrityError: it is not what is pinned, or malformed.
    """
    if settings.manifest_url is not None:
        url, sha256, least = settings.manifest_url, settings.manifest_sha256, None
    else:
        pin = read(RELEASE_FILE)
        url, sha256 = pin.manifest_url, settings.manifest_sha256 or pin.manifest_sha256
        least = pin.min_serial
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
        IntegrityError: it is malformed, pins nothing, or names a signed channel, which this loader
            does not follow.
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
    if pin.public_key is not None:
        raise IntegrityError(
            "CHANNEL_UNSUPPORTED",
            f"{path.name} names a signed channel, which this loader cannot check",
            hint="pin a release with manifest_sha256, or update the loader",
        )
    if pin.manifest_sha256 is None:
        raise IntegrityError(
            "RELEASE_NOT_PINNED",
            f"{path.name} has neither manifest_sha256 nor public_key",
            hint="add the manifest's sha256",
        )
    return pin
