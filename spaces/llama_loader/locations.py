"""Tell apart the kinds of URL that the loader reads from. Opens no connection.

This machine is an address, 127.0.0.0/8 or ::1. The name ``localhost`` passes here; ``transport``
checks the address that it leads to before it connects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from llama_loader.errors import SettingError, mistyped

HUB: Final = "https://huggingface.co"

_LOOPBACK: Final = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
_HF: Final = re.compile(
    r"hf://(?P<repo>[^/@?#]+/[^/@?#]+)(?:@(?P<revision>[^/?#]+))?/(?P<path>[^?#]+)"
)
_REPO: Final = re.compile(r"\b[\w.-]+\b/\b[\w.-]{1,96}\b", re.ASCII)
_ACCEPTED: Final = (
    "it is https://…, http:// on loopback only, file:///…, or hf://OWNER/REPO[@REVISION]/PATH"
)


@dataclass(frozen=True)
class Web:
    """A file behind HTTP; ``token`` is for the URL's own origin and no other."""

    url: str
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Local:
    """A file of this machine."""

    path: Path


def resolve(url: str, *, endpoint: str | None = None, token: str | None = None) -> Web | Local:
    """Return where a URL's file is.

    Args:
        url: of one of the four kinds that the loader reads from.
        endpoint: the Hugging Face Hub's address if it is not the usual one.
        token: for the Hub.

    Raises:
        SettingError: the URL, or for a file on the Hub its address or token, cannot be used.
    """
    match = _HF.fullmatch(url)
    if match is not None and url.isprintable():
        return _on_hub(url, match, endpoint, token)
    parts = _split(url)
    if parts is None:
        raise _refused(url)
    if "@" in parts.netloc:  # errors quote URLs, and a Space's log is public
        raise _refused(url, "has a user name or password in it")
    path = unquote(parts.path)
    if parts.scheme == "file" and parts.hostname in (None, "localhost") and path:
        if "\0" in path:
            raise _refused(url)
        return Local(Path(path))
    if is_allowed_web(url):
        return Web(url)
    raise _refused(url)


def require_endpoint(endpoint: str | None, *, by_address: bool = False) -> str:
    """Return the Hub's address, ``HUB`` for None; the Hub's own client logs it.

    Args:
        endpoint: as it was set.
        by_address: refuse the name ``localhost``: whoever uses it does not check where it leads.

    Raises:
        SettingError: it is neither https nor on loopback, or holds a user, a query or a fragment;
            the message shows none of these.
    """
    base = (endpoint or HUB).rstrip("/")
    usable = is_allowed_web(base) and not {"?", "#"} & set(base)
    if not usable or (by_address and base.startswith("http:") and not is_loopback(origin(base)[1])):
        raise SettingError(
            "ENDPOINT_REFUSED",
            f"{mistyped(base)!r} is neither https nor on loopback",
            hint="correct HF_ENDPOINT: no user, no query; on this machine give the address, such"
            " as 127.0.0.1",
        )
    return base


def is_allowed_web(url: str) -> bool:
    """Return whether a URL is https, or http to this machine."""
    parts = _split(url)
    # For requests a backslash ends the host's name, for urlsplit it does not.
    if parts is None or not parts.hostname or "@" in parts.netloc or "\\" in url:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_this_machine(parts.hostname))


def is_this_machine(host: str) -> bool:
    """Return whether a host is ``localhost`` or a loopback address, so needs no proxy."""
    return host == "localhost" or is_loopback(host)


def is_loopback(address: str) -> bool:
    """Return whether a text is an IP address in 127.0.0.0/8, or ::1."""
    try:
        found = ip_address(address)
    except ValueError:
        return False
    return any(found in network for network in _LOOPBACK)


def redirected(url: str, location: str) -> str | None:
    """Return where a redirect leads, or None where it may not be followed.

    https stays https. A redirect to http on loopback would let another machine's server choose
    what this machine's own services are asked.
    """
    try:
        target = urljoin(url, location)
    except ValueError:
        return None
    if not location or not is_allowed_web(target):
        return None
    return None if origin(url)[0] == "https" != origin(target)[0] else target


def origin(url: str) -> tuple[str, str, int | None]:
    """Return the scheme, host and port of a URL that ``resolve`` took."""
    parts = urlsplit(url)
    return (
        parts.scheme,
        parts.hostname or "",
        parts.port or {"https": 443, "http": 80}.get(parts.scheme),
    )


def shown(url: str) -> str:
    """Return a URL as errors, events and notes show it: without user, password and query."""
    return url if _HF.fullmatch(url) else mistyped(url)


def _on_hub(url: str, match: re.Match[str], endpoint: str | None, token: str | None) -> Web:
    repo, revision, path = match["repo"], match["revision"] or "main", match["path"]
    # HTTP clients resolve ".." in a path: the token would go to another page of the Hub.
    steps = any(map(_has_steps, (repo, revision, path)))
    if steps or not _REPO.fullmatch(repo) or "--" in repo or ".." in repo:
        raise _refused(url)
    base = require_endpoint(endpoint)
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise SettingError(
            "TOKEN_REFUSED",
            "the Hub's token is not one word of ASCII characters",
            hint="correct HF_TOKEN",
        )
    return Web(f"{base}/{repo}/resolve/{quote(revision, safe='')}/{quote(path)}", token)


def _has_steps(path: str) -> bool:
    """Return whether a path has an empty part, ``.`` or ``..``, however often it is encoded."""
    while (decoded := unquote(path)) != path:
        path = decoded
    return any(part in {"", ".", ".."} for part in re.split(r"[/\\]", path))


def _split(url: str) -> SplitResult | None:
    """Split a URL; return None where it is malformed."""
    # urlsplit drops blanks and line breaks, other parsers do not
    if not url.isprintable() or url != url.strip():
        return None
    try:
        parts = urlsplit(url)
        usable = parts.port != 0
    except ValueError:
        return None
    return parts if usable else None


def _refused(url: str, why: str = "is not a URL to load from") -> SettingError:
    return SettingError("URL_REFUSED", f"{mistyped(url)!r} {why}", hint=_ACCEPTED)
