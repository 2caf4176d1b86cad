"""The kinds of URL that the loader reads from, told apart once. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from llama_loader.errors import SettingError, mistyped, without_secrets

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_HF: Final = re.compile(
    r"hf://(?P<repo>[^/@?#]+/[^/@?#]+)(?:@(?P<revision>[^/?#]+))?/(?P<path>[^?#]+)"
)
_ACCEPTED: Final = (
    "it is https://…, http:// on loopback only, file:///…, or hf://OWNER/REPO[@REVISION]/PATH"
)


@dataclass(frozen=True)
class Web:
    """A file behind HTTP."""

    url: str


@dataclass(frozen=True)
class Local:
    """A file of this machine."""

    path: Path


@dataclass(frozen=True)
class Hub:
    """A file in a model repository of the Hugging Face Hub."""

    repo: str
    revision: str | None
    path: str


def parse(url: str) -> Web | Local | Hub:
    """Tell what kind of location a URL is.

    Raises:
        SettingError: it is none that the loader reads from; says what is.
    """
    if not url.isprintable():
        raise _refused(url)
    match = _HF.fullmatch(url)
    if match is not None:
        return Hub(match["repo"], match["revision"], match["path"])
    parts = _split(url)
    if parts is None:
        raise _refused(url)
    if parts.username is not None or parts.password is not None:
        # Errors quote URLs, and a Space's log is public.
        shown = without_secrets(url)
        raise SettingError(
            "URL_REFUSED", f"{shown!r} has a user name or password in it", hint=_ACCEPTED
        )
    if parts.scheme == "file" and parts.hostname in (None, "localhost") and parts.path:
        path = unquote(parts.path)
        if "\0" not in path:
            return Local(Path(path))
    if is_allowed_web(url):
        return Web(url)
    raise _refused(url)


def is_allowed_web(url: str) -> bool:
    """Whether a URL is https, or http on loopback."""
    parts = _split(url)
    # For requests a backslash ends the host's name, for urlsplit it does not.
    if parts is None or not parts.hostname or "@" in parts.netloc or "\\" in url:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine; no proxy may stand in between."""
    parts = _split(url)
    return parts is not None and parts.hostname in LOOPBACK


def redirected(url: str, location: str) -> str | None:
    """Return where a redirect leads, or None where it may not be followed.

    https stays https: also a redirect to http on loopback would let a stranger's server choose
    what this machine's own services are asked.
    """
    try:
        target = urljoin(url, location)
    except ValueError:
        return None
    downgraded = url.startswith("https:") and not target.startswith("https:")
    return target if location and is_allowed_web(target) and not downgraded else None


def _split(url: str) -> SplitResult | None:
    """Split a URL; None where host or port are malformed."""
    try:
        parts = urlsplit(url)
        if parts.port == 0:
            return None
    except ValueError:
        return None
    return parts


def _refused(url: str) -> SettingError:
    return SettingError(
        "URL_REFUSED", f"{mistyped(url)!r} is not a URL to load from", hint=_ACCEPTED
    )
