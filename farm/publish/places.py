"""From what a person wrote behind ``--to`` to the place that is meant."""

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
_ACCEPTED: Final = "a folder, github:OWNER/REPO or hf:OWNER/REPO"


def parse(text: str | None) -> Destination:
    """Tell what kind of place is meant.

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
    """Return a folder that is there, or that can be made where it is said to be.

    ``OWNER/REPO`` without its ``hf:`` would otherwise be a folder's name, made in silence.
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
