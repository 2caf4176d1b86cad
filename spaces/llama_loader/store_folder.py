"""The store's folder: claims an empty one, refuses any other, checks who can change it, locks it.

What is installed in it is not decided here (``store``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, final

from llama_loader import disk, notes
from llama_loader.disk import Folder
from llama_loader.errors import StoreError
from llama_loader.events import Note

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llama_loader.events import Sink

FORMAT: Final = 2
PROGRAM: Final = "llama-loader-store "
MARKER: Final = f"{PROGRAM}{FORMAT}\n"
"""What the file FORMAT holds: no other program writes it."""
NAMES: Final = frozenset(
    {"FORMAT", "channels", "current", "manifests", "partial", "runtimes", "self-tests", "staging"}
)
"""All names that a store has in its folder; earlier loaders wrote ``current``, ``self-tests``."""
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
"""The name of a runtime."""
PRIVATE: Final = "llama-loader"
"""The name, among the temporary files, of the store to use where the usual one cannot be."""

LOCK_SECONDS: Final = 900.0
"""An installation over a slow link; after that the other installer is taken for dead."""

_POLL_SECONDS: Final = 0.05
_MAX_MARKER: Final = 64
_SEPARATORS: Final = ":;$"
"""What LD_LIBRARY_PATH gives a meaning to (ld.so(8)): a part of the path would be searched."""


@final
class StoreFolder:
    """The folder of a store.

    Args:
        root: its path.
        sink: told if another folder is used.

    Attributes:
        root: its path; a private folder's once the usual one cannot be used.
    """

    def __init__(self, root: Path, sink: Sink) -> None:
        self.root = root.absolute()
        self._sink = sink
        self._is_private = False

    def open(self, *, make: bool) -> Folder:
        """Open it; a private folder if this user cannot use it, or others can change it.

        Args:
            make: make and claim it if need be, to write to it.

        Raises:
            FileNotFoundError: there is none, and none is made.
            StoreError: it is no store, or of a newer loader, or cannot be opened.
        """
        try:
            return self._open(make=make)
        except FileNotFoundError:
            if not make:
                raise
            with disk.errors(self.root):
                raise
        except OSError as error:
            self._use_private(error)
        with disk.errors(self.root):
            return self._open(make=True)

    @contextmanager
    def lock(self, root: Folder, sha256: str) -> Iterator[None]:
        """Be the only installer of a runtime, if locks work and no other takes too long.

        Raises:
            OSError: the disk is full.
        """
        end, is_said = time.monotonic() + LOCK_SECONDS, False
        with contextlib.ExitStack() as opened:
            try:
                staging = opened.enter_context(root.folder("staging"))
                handle = staging.open_to_write(f"{sha256}.lock", 0o600)
                opened.callback(os.close, handle)
                while not _is_locked(handle):
                    if time.monotonic() > end:
                        raise TimeoutError("another installer holds it too long")
                    if not is_said:
                        is_said = True
                        told = "another process installs it; waiting for that"
                        self._sink(Note("STORE_BUSY", told))
                    time.sleep(_POLL_SECONDS)
            except OSError as error:
                if disk.is_full(error):
                    raise
                self._sink(Note("STORE_NOT_LOCKED", f"installing without a lock: {error}"))
            yield

    def _use_private(self, error: OSError) -> None:
        usual = self.root
        with disk.errors(usual):
            if error.errno not in disk.NOT_WRITABLE or self._is_private:
                raise error
            self.root = disk.private_folder(PRIVATE)
        self._is_private = True
        self._sink(notes.store_temporary(usual, error, self.root))

    def _open(self, *, make: bool) -> Folder:
        place = self.root if self._is_private else disk.trusted(self.root)
        if set(_SEPARATORS) & set(f"{self.root}{place}"):
            raise StoreError(
                "STORE_PATH_UNUSABLE",
                f"the store's path {str(place)!r} has one of the characters {_SEPARATORS}, which"
                " the dynamic linker takes for more than a name",
                hint="use another store (HF_HOME, or --store)",
            )
        for missing in (*reversed(place.parents), place) if make else ():
            with contextlib.suppress(FileExistsError):
                if not missing.is_dir():
                    missing.mkdir(mode=0o755)
        with contextlib.ExitStack() as opened:
            root = opened.enter_context(Folder.open(place))
            root.path = self.root
            state = self._state(root)
            if make:
                _claim(root, state)
            opened.pop_all()
            return root

    def _state(self, root: Folder) -> str:
        """Return ``ours``, ``empty`` or ``unmarked``; refuse any other folder."""
        names = set(root.names())
        data = root.read("FORMAT", _MAX_MARKER)
        text = "" if data is None else data.decode("ascii", "replace")
        self._require_known(text)
        folders = names & NAMES - {"FORMAT", "current"}
        links = [name for name in sorted(folders) if not root.has_folder(name)]
        if not links and text == MARKER:
            return "ours"
        if not names or (data is not None and names == {"FORMAT"} and MARKER.startswith(text)):
            return "empty"
        of_format_1 = text.strip() == "1"
        if not links and names <= NAMES and (of_format_1 or _is_proven(root, names, data)):
            return "unmarked"
        why = f"{links[0]} in it is a link or a file" if links else "it holds other files"
        raise StoreError(
            "STORE_NOT_OURS",
            f"{self.root} is not a store of this loader: {why}",
            hint="give --store (or HF_HOME) a folder that is new, empty, or already a store",
        )

    def _require_known(self, marker: str) -> None:
        number = marker.removeprefix(PROGRAM).strip()
        known = FORMAT if marker.startswith(PROGRAM) else 1
        if number.isascii() and number.isdigit() and int(number) > known:
            raise StoreError(
                "STORE_NEWER",
                f"the store {self.root} has format {number}; this loader knows {FORMAT}",
                hint="update the loader, or use another store with --store",
            )


def _is_proven(root: Folder, names: set[str], marker: bytes | None) -> bool:
    """Whether a folder whose marker cannot be read holds runtimes, and nothing but our names."""
    if marker is not None or not {"FORMAT", "runtimes"} <= names:
        return False
    with root.folder("runtimes") as runtimes:
        return any(DIGEST.fullmatch(name) for name in runtimes.names())


def _claim(root: Folder, state: str) -> None:
    """Mark the folder as a store, before anything else is written; make what a store has."""
    if state == "empty":
        # Of a process that was killed here a part of the marker is left. Processes that do this
        # at once write the same bytes to the same place.
        with os.fdopen(root.open_to_write("FORMAT", 0o644), "wb") as stream:
            stream.write(MARKER.encode())
            stream.flush()
            os.fsync(stream.fileno())
        root.sync()
    for name in ("runtimes", "manifests"):
        root.folder(name, make=0o755).close()
    with root.folder("staging", make=0o700) as staging:
        # A folder may exist and not be writable: find out before anything is fetched.
        with staging.temporary("probe"):
            pass
        if state == "unmarked":
            root.replace("FORMAT", MARKER.encode(), staging=staging)


def _is_locked(handle: int) -> bool:
    """Lock an open file against other processes; return False while another has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
