"""The kinds of URL that the loader reads from, told apart once. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from llama_loader.errors import SettingError

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_HF: Final = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<path>[^?#]+)")
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
    match = _HF.fullmatch(url)
    if match is not None:
        return Hub(match["repo"], match["revision"], match["path"])
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise _refused(url) from error
    if parts.scheme == "file" and host in (None, "", "localhost") and parts.path:
        return Local(Path(unquote(parts.path)))
    if is_allowed_web(url):
        return Web(url)
    raise _refused(url)


def is_allowed_web(url: str) -> bool:
    """Whether a URL is https, or http on loopback."""
    parts = urlsplit(url)
    secure = parts.scheme == "https" and bool(parts.hostname)
    return secure or (parts.scheme == "http" and parts.hostname in LOOPBACK)


def _refused(url: str) -> SettingError:
    return SettingError("URL_REFUSED", f"{url!r} is not a URL to load from", hint=_ACCEPTED)
