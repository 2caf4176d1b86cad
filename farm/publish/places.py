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
    if colon and kind in {"github", "hf"}:
        if not _REPOSITORY.fullmatch(rest) or ".." in rest:
            raise UsageError("DESTINATION_INVALID", f"--to {text!r} is not {kind}:OWNER/REPO")
        return GitHub(rest) if kind == "github" else Hub(rest)
    if re.match(r"[a-z][a-z0-9+.-]+:", text):
        raise UsageError("DESTINATION_INVALID", f"--to {text!r} is not {_ACCEPTED}")
    return Directory(Path(text))
