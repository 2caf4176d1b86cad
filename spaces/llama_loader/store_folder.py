"""The store's folder: claims an empty one, refuses any other.

What is installed in it is not decided here (``store``). A folder that is no store, or of a newer
loader, raises ``StoreError``; one that cannot be opened, or keeps no modes of files, ``OSError``.
"""

import contextlib
import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

from llama_loader.disk import Folder
from llama_loader.errors import StoreError

FORMAT: Final = 2
PROGRAM: Final = "llama-loader-store "
MARKER: Final = f"{PROGRAM}{FORMAT}\n"
"""What the file FORMAT holds: no other program writes it."""
FOLDERS: Final = frozenset({"channels", "manifests", "partial", "runtimes", "shown", "staging"})
"""All folders that a store has."""
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
"""The name of a runtime."""
MARKER_MODE: Final = 0o755
"""A program's mode, on a text file: it shows whether the disk keeps the modes of files."""

_MAX_MARKER: Final = 64
_UNUSABLE: Final = re.compile(r"[:;$\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""``:;$`` split or change the linker's search path (ld.so(8)); a line break, a control code and
bytes that are no UTF-8 (surrogates in Python) do not survive being printed as a line."""


def require_usable(path: Path) -> None:
    """Refuse a path that the dynamic linker, or a program that reads our output, would misread."""
    odd = _UNUSABLE.search(f"{path}") or _UNUSABLE.search(os.path.realpath(path))
    if odd is not None:
        raise StoreError("STORE_PATH_UNUSABLE", path=str(odd.string), character=odd[0])


def open_store(place: Path, *, make: bool) -> Folder:
    """Open a store's folder; ``make`` a store of an empty one first, to write to it."""
    with contextlib.ExitStack() as opened:
        root = opened.enter_context(Folder.open(place))
        state = _state(root)
        if make:
            _claim(root, state)
        opened.pop_all()
        return root


def _state(root: Folder) -> str:
    """Return ``ours``, ``empty`` or ``damaged``; refuse any other folder."""
    names = set(root.names())
    data = root.read("FORMAT", _MAX_MARKER)
    marker = "" if data is None else data.decode("ascii", "replace")
    number = marker.removeprefix(PROGRAM).strip()
    if number.isdecimal() and int(number) > FORMAT:
        raise StoreError("STORE_NEWER", path=root.path, number=number, format=FORMAT)
    odd = [name for name in sorted(names & FOLDERS) if not root.has_folder(name)]
    if not odd and marker == MARKER:
        return "ours"
    if not names or (data is not None and names == {"FORMAT"} and MARKER.startswith(marker)):
        return "empty"
    if not odd and data is None and {"FORMAT", "runtimes"} <= names <= FOLDERS | {"FORMAT"}:
        with root.folder("runtimes") as runtimes:
            if any(DIGEST.fullmatch(name) for name in runtimes.names()):
                return "damaged"
    why = f"{odd[0]} in it is a link or a file" if odd else "it holds other files"
    raise StoreError("STORE_NOT_OURS", path=root.path, why=why)


def _claim(root: Folder, state: str) -> None:
    """Mark the folder as a store, before anything else is written; make what a store has."""
    if state == "empty":
        # Of a process that was killed here a part of the marker is left. Processes that do this
        # at once write the same bytes to the same place.
        root.write("FORMAT", MARKER.encode())
        root.sync()
    with root.folder("runtimes", make=0o755), root.folder("staging", make=0o700) as staging:
        if state == "damaged":
            root.replace("FORMAT", MARKER.encode(), staging=staging)
    handle = root.open_to_write("FORMAT", MARKER_MODE)
    try:
        os.fchmod(handle, MARKER_MODE)
        if stat.S_IMODE(os.fstat(handle).st_mode) != MARKER_MODE:
            raise PermissionError(errno.EPERM, "its disk keeps no modes of files")
    finally:
        os.close(handle)


def can_be_mended(root: Folder) -> bool:
    """Whether what is damaged can be replaced in this store: it can be written and keeps modes."""
    marker = root.status("FORMAT")
    keeps_modes = marker is not None and stat.S_IMODE(marker.st_mode) == MARKER_MODE
    return keeps_modes and os.access(root.path, os.W_OK)
