"""Tell apart the kinds of URL that the loader reads from, and say what an attempt to read one is.

Opens no connection. This machine is an address, 127.0.0.0/8 or ::1, and no name: a resolver may
give ``localhost`` the address of another machine. A URL that cannot be used is a ``SettingError``.
"""

import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
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


@dataclass(frozen=True)
class Web:
    """A file behind HTTP; ``token`` is for the URL's own origin and no other."""

    url: str
    token: str | None = field(default=None, repr=False)


def resolve(url: str, *, endpoint: str = HUB, token: str | None = None) -> Web | Path:
    """Return where a URL's file is: behind HTTP, or at a path of this machine.

    ``endpoint`` and ``token`` are for files on the Hub.
    """
    match = _HF.fullmatch(url)
    if match is not None and url.isprintable():
        return _on_hub(url, match, endpoint, token)
    parts = _split(url)
    if parts is not None and "@" in parts.netloc:  # errors quote URLs, and a Space's log is public
        raise _refused(url, "it has a user name or password in it")
    if parts is not None and parts.scheme == "file" and parts.hostname in (None, "localhost"):
        path = unquote(parts.path)
        if path and "\0" not in path:
            return Path(path)
    if is_allowed_web(url):
        return Web(url)
    raise _refused(url)


def require_endpoint(endpoint: str) -> None:
    """Refuse an address of the Hub to which no token may be sent."""
    if not is_allowed_web(endpoint) or {"?", "#"} & set(endpoint):
        raise SettingError("ENDPOINT_REFUSED", endpoint=mistyped(endpoint))


def is_allowed_web(url: str) -> bool:
    """Return whether a URL is https, or http to an address of this machine."""
    parts = _split(url)
    # For requests a backslash ends the host's name, for urlsplit it does not.
    if parts is None or not parts.hostname or "@" in parts.netloc or "\\" in url:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))


def is_loopback(address: str) -> bool:
    """Return whether a text is an IP address in 127.0.0.0/8, or ::1."""
    try:
        found = ip_address(address)
    except ValueError:
        return False
    return any(found in network for network in _LOOPBACK)


def redirected(url: str, location: str) -> str | None:
    """Return where a redirect leads, or None where it may not be followed.

    https stays https: else another machine's server could choose what this one's own are asked.
    """
    try:
        target = urljoin(url, location)
    except ValueError:
        return None
    if not location or not is_allowed_web(target):
        return None
    return None if origin(url)[0] == "https" != origin(target)[0] else target


def origin(url: str) -> tuple[str, str, int | None]:
    """Return the scheme, host and port of a URL that ``resolve`` took; None for no port."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port


def shown(url: str) -> str:
    """Return a URL as errors, events and notes show it: without user, password and query."""
    return url if _HF.fullmatch(url) else mistyped(url)


def _on_hub(url: str, match: re.Match[str], endpoint: str, token: str | None) -> Web:
    repo, revision, path = match["repo"], match["revision"] or "main", match["path"]
    # HTTP clients resolve ".." in a path: the token would go to another page of the Hub
    whole = f"{repo}/{revision}/{path}"
    while (decoded := unquote(whole)) != whole:
        whole = decoded
    steps = {"", ".", ".."} & {*re.split(r"[/\\]", whole)}
    if steps or not _REPO.fullmatch(repo) or "--" in repo or ".." in repo:
        raise _refused(url)
    require_endpoint(endpoint)
    return Web(f"{endpoint}/{repo}/resolve/{quote(revision, safe='')}/{quote(path)}", token)


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


def _refused(url: str, why: str = "it is not a URL to load from") -> SettingError:
    return SettingError("URL_REFUSED", url=mistyped(url), why=why)


@dataclass(frozen=True)
class Patience:
    """Timeouts of a download: in seconds, unless a comment names another unit."""

    connect: float = 10.0
    silence: float = 20.0  # between two bytes
    # until all headers are here: names, connections, TLS and redirects included
    headers: float = 30.0
    # bytes a second that must come, over every ``window`` of waiting for them
    rate: int = 16 * 1024
    window: float = 20.0
    attempts: int = 4  # how often one URL may fail with nothing gained in between
    longest_wait: float = 60.0  # after a longer Retry-After the next mirror is used
    deadline: float = 3600.0  # for a whole file, all attempts and all mirrors together


@dataclass(eq=False)
class AttemptError(Exception):
    """One attempt failed; another one may succeed, unless it is ``final``."""

    reason: str
    _: KW_ONLY
    wait: float | None = None  # seconds to wait, by the server's answer
    final: bool = False
    refusal: int = 0  # the status of an answer that will not change
    wrong: str = ""  # the error's code where the bytes are not those that were published


class RangeError(AttemptError):
    """The server answered a request for a part of a file with another part."""


@dataclass(frozen=True)
class Body:
    """A file's bytes, as they arrive: from ``start`` on, ``size`` of them if the server states it.

    ``read`` returns 1 to n bytes, or none at the end; raises ``AttemptError``.
    """

    start: int
    size: int | None
    read: Callable[[int], bytes]
