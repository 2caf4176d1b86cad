"""Parse the names that a person gives: a place, a release, a channel, a project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from farm.errors import UsageError
from farm.publish.directory import Directory
from farm.publish.github import GitHub
from farm.publish.hub import Hub

if TYPE_CHECKING:
    from farm.publish.destination import Destination

_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_PROJECT: Final = re.compile(r"[\w.-]{1,100}/[\w.-]{1,100}", re.ASCII)
_RESERVED: Final = re.compile(r"channels|channel-.*", re.IGNORECASE)
_ACCEPTED: Final = "a folder, github:OWNER/REPO or hf:OWNER/REPO"


def parse(text: str | None) -> Destination:
    """Return the place that ``--to`` names.

    Raises:
        UsageError: none was given, or it is of another kind.
    """
    if not text:
        raise UsageError("OPTION_MISSING", "--to was not given", hint=f"it takes {_ACCEPTED}")
    kind, colon, rest = text.partition(":")
    kind = kind.lower()
    if colon and kind in {"github", "hf"}:
        if not _REPOSITORY.fullmatch(rest) or ".." in rest:
            raise UsageError("DESTINATION_INVALID", f"--to {text!r} is not {kind}:OWNER/REPO")
        return GitHub(rest) if kind == "github" else Hub(rest)
    if re.match(r"[a-z][a-z0-9+.-]+:", text, re.IGNORECASE):
        raise UsageError("DESTINATION_INVALID", f"--to {text!r} is not {_ACCEPTED}")
    return Directory(_folder(text))


def _folder(text: str) -> Path:
    """Return an existing folder, or one whose parent folder exists.

    Otherwise ``OWNER/REPO`` without its ``hf:`` would silently become a folder.
    """
    folder = Path(text).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError("DESTINATION_INVALID", f"--to {text!r} is a file, not {_ACCEPTED}")
    if not folder.absolute().parent.is_dir():
        raise UsageError(
            "DESTINATION_MISSING",
            f"--to {text!r}: there is no folder {folder.parent} to make it in",
            hint=f"it takes {_ACCEPTED}",
        )
    return folder


def require_name(kind: str, name: str | None) -> str:
    """Return a release's or channel's name, which becomes a folder, a tag, part of a URL.

    Raises:
        UsageError: it cannot be one.
    """
    if kind == "release" and name and _RESERVED.fullmatch(name):
        raise UsageError(
            "NAME_INVALID", f"{name!r} is not a release's name: places keep their channels there"
        )
    if not name or not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            "NAME_INVALID",
            f"{name!r} is not a {kind}'s name" if name else f"no {kind} was named",
            hint="letters, digits, '.', '_' and '-', 64 at most: b11549-1, stable",
        )
    return name


def project(name: str | None) -> str | None:
    """Return a project's name as signatures contain it; None if none is given.

    Raises:
        UsageError: it is not ``OWNER/REPO``.
    """
    if name is not None and not _PROJECT.fullmatch(name):
        raise UsageError("NAME_INVALID", f"--project {name!r} is not OWNER/REPO")
    return name
