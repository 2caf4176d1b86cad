"""A folder → one digest of all that is in it. Reads files, changes none."""

from __future__ import annotations

import hashlib
import stat
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def folder_digest(folder: Path) -> str:
    """Return the sha256 of a folder's names, modes, links and contents, ``.git`` left out.

    Nothing is read from what is neither a file nor a link: a pipe would wait for ever.
    """
    whole = hashlib.sha256()
    for path in files(folder):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            kind, content = "link", _encodable(str(path.readlink()))
        elif not path.is_file():
            kind, content = "other", ""
        else:
            kind = "program" if path.stat().st_mode & stat.S_IXUSR else "file"
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(msgspec.json.encode([_encodable(name), kind, content]) + b"\n")
    return whole.hexdigest()


def _encodable(name: str) -> str:
    """Return a name as it is where it is UTF-8, else with its other bytes escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def files(folder: Path) -> Iterator[Path]:
    """Give what is in a folder and below it and is no folder, in order, ``.git`` left out."""
    for path in sorted(folder.iterdir()):
        if path.name == ".git":
            continue
        if path.is_dir() and not path.is_symlink():
            yield from files(path)
        else:
            yield path
