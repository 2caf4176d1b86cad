"""Write ``spaces/release.json``: which release a Space trusts (DESIGN.md 3.3, docs/trust.md)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import requests
import urllib3

from farm import PROJECT_ROOT, durable, trust
from farm.errors import PublishError, UsageError
from farm.inputs import packages
from farm.publish import channels
from farm.release import MANIFEST
from llama_loader import manifest as schema

if TYPE_CHECKING:
    from farm.publish.destination import Destination

_TIMEOUT: Final = (10.0, 60.0)
FILE: Final = PROJECT_ROOT / "spaces" / "release.json"


def url(manifest_url: str) -> dict[str, Any]:
    """Pin the manifest at a URL: https, http on loopback, or file.

    Raises:
        UsageError: it is another kind of URL.
        PublishError: it cannot be had.
        IntegrityError: it is no manifest.
    """
    content = _fetch(manifest_url)
    schema.parse(content, what=manifest_url)
    return _pin(manifest_url, content)


def release(destination: Destination, name: str) -> dict[str, Any]:
    """Pin a published release.

    Raises:
        PublishError: it is not published.
    """
    content = destination.small(name, MANIFEST)
    schema.parse(content, what=f"{name} of {destination.where}")
    return _pin(destination.manifest_url(name), content)


def channel(
    destination: Destination, name: str, public_key: str, project: str | None = None
) -> dict[str, Any]:
    """Follow a channel, from the serial on that it has now.

    Args:
        destination: where it is.
        name: the channel's.
        public_key: the key that must have signed it.
        project: the project that it must be signed for; None for the destination's own.

    Raises:
        PublishError: there is no such channel, it is not signed by that key, or not for this
            channel of this project.
    """
    content = destination.channel_file(name, MANIFEST)
    what = f"channel {name} of {destination.where}"
    if content is None:
        raise PublishError("CHANNEL_MISSING", f"there is no {what}", hint="invoke promote makes it")
    signature = destination.channel_file(name, f"{MANIFEST}.minisig") or b""
    project = project or destination.project
    comment = trust.require_signed(content, signature, public_key, what=what)
    if not comment.startswith("project "):
        raise PublishError(
            "CHANNEL_NOT_SIGNED_FOR",
            f"{what} was signed by an older farm, which did not name the project",
            hint="invoke promote signs it anew",
        )
    channels.require_signed_for(comment, project, name, what=what)
    return {
        "manifest_url": destination.channel_url(name),
        "public_key": public_key,
        "project": project,
        "channel": name,
        "min_serial": schema.parse(content, what=what).serial,
    }


def write(pin: dict[str, Any], file: Path = FILE) -> None:
    """Write ``release.json`` so that it is the old one or the new one at every moment.

    Raises:
        PublishError: it cannot be written.
    """
    try:
        durable.replace(file, f"{json.dumps(pin, indent=2)}\n".encode(), 0o644)
    except OSError as error:
        raise PublishError("PIN_NOT_WRITTEN", f"{file}: {error.strerror}") from error


def _fetch(manifest_url: str) -> bytes:
    parts = urlsplit(manifest_url)
    if parts.scheme == "file":
        try:
            return Path(unquote(parts.path)).read_bytes()
        except OSError as error:
            raise PublishError("MANIFEST_MISSING", f"{manifest_url}: {error.strerror}") from error
    own = parts.scheme == "http" and packages.is_loopback(parts.hostname or "")
    if parts.scheme != "https" and not own:
        raise UsageError(
            "MANIFEST_URL_INVALID",
            f"--manifest {manifest_url!r} is not https://… or file://…",
            hint="of a repository of the Hub: --to hf:OWNER/REPO --release NAME",
        )
    try:
        with (
            packages.session() as web,
            web.get(manifest_url, timeout=_TIMEOUT, stream=True) as answer,
        ):
            answer.raise_for_status()
            content = answer.raw.read(schema.MAX_MANIFEST_BYTES + 1, decode_content=True)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise PublishError("MANIFEST_UNREACHABLE", f"{manifest_url}: {error}") from error
    return bytes(content)


def _pin(manifest_url: str, content: bytes) -> dict[str, Any]:
    return {"manifest_url": manifest_url, "manifest_sha256": hashlib.sha256(content).hexdigest()}
