"""An archive by URL, as far as it came: it outlives the process that fetched it.

Nobody lists its chunks, so its own digest, as it stood after every chunk, is written down beside
it, with the name that its server gives the content (a strong ETag, or the date of its last
change). The next process hashes what is here, goes on where that agrees with the last digest, and
asks for the rest of that very content only. A pin is checked over the whole, as ever.

``<folder>/<sha256 of the URL>`` holds ``bytes`` and ``journal``. Whoever works on it renames it to
a name of its own first, which says who that is (``disk.new_folder``): a rename has one winner, so
no two processes write or unpack the same file, with or without working locks. What a killed
process leaves under such a name is taken over when its owner is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Annotated, Final, Literal, final

import msgspec
from msgspec import Meta

from llama_loader import disk, notes
from llama_loader.chunks import PIECE
from llama_loader.copying import Copy
from llama_loader.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llama_loader.events import Sink

CHUNK: Final = 4 << 20
"""Bytes between two digests in the journal: what may come twice."""
BYTES: Final = "bytes"
JOURNAL: Final = "journal"

_PRIVATE: Final = 0o700
_FILE_MODE: Final = 0o600
_MAX_JOURNAL: Final = 1 << 20


class _Head(msgspec.Struct, frozen=True):
    """The journal's first line: which content it is about."""

    validator: Annotated[str, Meta(pattern=r"^[!-~ ]+$")] | None
    total: Annotated[int, Meta(ge=0)] | None
    format: Literal[1] = 1


@contextmanager
def kept(folder: Path, url: str, *, staging: Path, sink: Sink) -> Iterator[Copy]:
    """Give what is here of an archive. It stays if its fetching is cut off, else it goes.

    Args:
        folder: where such archives lie; made if need be.
        url: the archive's.
        staging: for a file without a name, where nothing can be kept.
        sink: told of that.

    Raises:
        OSError: there is no room.
    """
    name = hashlib.sha256(url.encode()).hexdigest()
    try:
        place = _claimed(folder, name)
        opened = KeptArchive(place)
    except OSError as error:
        sink(notes.partial_not_kept(folder, error))
        with tempfile.TemporaryFile(dir=staging) as spool:
            yield Copy(spool)
        return
    with opened:
        try:
            yield opened
        except (IntegrityError, OSError):  # refused, or no room: it is of no use
            shutil.rmtree(place, ignore_errors=True)
            raise
        except BaseException:
            if opened.is_worth_it:
                _leave(place, folder / name)
            else:
                shutil.rmtree(place, ignore_errors=True)
            raise
        shutil.rmtree(place, ignore_errors=True)


@final
class KeptArchive(Copy):
    """An archive whose bytes are in a folder of their own, with what is needed to go on.

    Args:
        place: the folder, this process's alone; what it holds is verified first.

    Raises:
        OSError: it cannot be read or written.
    """

    def __init__(self, place: Path) -> None:
        super().__init__(_opened(place / BYTES))
        self._journal = _opened(place / JOURNAL)
        self._go_on()

    def __enter__(self) -> KeptArchive:
        """Do nothing: it is open."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close its files."""
        for stream in (self.target, self._journal):
            with contextlib.suppress(OSError):  # what could not be written was said already
                stream.close()

    @property
    def is_worth_it(self) -> bool:
        """Whether there is something here that could be gone on with."""
        return self.validator is not None and self.size >= CHUNK

    def begin(self, validator: str | None, total: int | None) -> None:
        """Forget what is here; what comes now has this name and size."""
        super().begin(validator, total)
        self._write_journal([])

    def append(self, piece: bytes) -> None:
        """Take what comes next; at the end of a chunk, note the digest of all so far."""
        while piece:
            room = CHUNK - self.size % CHUNK
            super().append(piece[:room])
            piece = piece[room:]
            if self.size % CHUNK == 0:
                self.target.flush()
                self._note(self.digest.hexdigest())

    def _note(self, line: str) -> None:
        self._journal.write(f"{line}\n".encode("ascii"))
        self._journal.flush()

    def _write_journal(self, digests: list[str]) -> None:
        self._journal.seek(0)
        self._journal.truncate()
        head = msgspec.json.encode(_Head(self.validator, self.total)).decode("ascii")
        for line in (head, *digests):
            self._note(line)

    def _go_on(self) -> None:
        """Verify what is here; what does not agree with the journal is cut off."""
        head, digests = _read_journal(self._journal)
        if head is None or head.validator is None:
            return
        self.validator, self.total = head.validator, head.total
        # of a whole file there is nothing left to ask for: the last chunk is asked for again
        most = len(digests) if self.total is None else max(self.total - 1, 0) // CHUNK
        right = [digest for digest in digests[:most] if self._has_next(digest)]
        self.target.seek(self.size)
        self.target.truncate()
        self._write_journal(right)

    def _has_next(self, wanted: str) -> bool:
        """Whether the next chunk is right; it counts as here then."""
        self.target.seek(self.size)
        digest, left = self.digest.copy(), CHUNK
        while left and (piece := self.target.read(min(PIECE, left))):
            digest.update(piece)
            left -= len(piece)
        if left or digest.hexdigest() != wanted:
            return False
        self.digest, self.size = digest, self.size + CHUNK
        return True


def _claimed(folder: Path, name: str) -> Path:
    """Return a folder that is this process's alone, with what an earlier one left, if anything."""
    folder.mkdir(mode=_PRIVATE, exist_ok=True)
    if not disk.is_private(folder):  # others could change what is being unpacked
        raise PermissionError(0, "others may write there, or it is not this user's", str(folder))
    mine = disk.new_folder(folder, name)
    left = [place for place in folder.glob(f"{name}.*") if place != mine and disk.is_stale(place)]
    for place in (folder / name, *left):
        try:
            place.rename(mine)
        except OSError:  # not there, or another process was faster
            continue
        break
    return mine


def _leave(place: Path, name: Path) -> None:
    """Give it the name that the next process looks for; another one's is as good."""
    try:
        place.rename(name)
    except OSError:
        shutil.rmtree(place, ignore_errors=True)


def _opened(path: Path) -> IO[bytes]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, _FILE_MODE), "r+b")


def _read_journal(stream: IO[bytes]) -> tuple[_Head | None, list[str]]:
    """Return the head and the digests; what cannot be read is as good as nothing."""
    lines = stream.read(_MAX_JOURNAL).splitlines()
    try:
        head = msgspec.json.decode(lines[0] if lines else b"", type=_Head)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None, []
    return head, [line.decode("ascii", "replace") for line in lines[1:]]
