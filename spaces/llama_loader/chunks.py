"""What an artifact's bytes must be, chunk by chunk, and what is said where they are not. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Final, Protocol

from llama_loader.errors import IntegrityError
from llama_loader.mirrors import WrongBytesError
from llama_loader.patience import AttemptError

if TYPE_CHECKING:
    from llama_loader.web import Body

PIECE: Final = 1 << 18
_BEGINNINGS: Final = {
    "tar.gz": b"\x1f\x8b",
    "tar.xz": b"\xfd7zXZ\x00",
    "tar.zst": b"\x28\xb5\x2f\xfd",
}


@dataclass(frozen=True)
class Wanted:
    """What is fetched: known to the last byte.

    Attributes:
        name: for messages.
        size: bytes.
        sha256: of the whole.
        chunk_size: bytes of every chunk but the last.
        chunks: digests of the chunks.
        format: of the archive; tells a login page from a file that was cut.
    """

    name: str
    size: int
    sha256: str
    chunk_size: int
    chunks: tuple[str, ...]
    format: str = ""

    @property
    def last(self) -> int:
        """The last chunk's index."""
        return len(self.chunks) - 1

    def start(self, index: int) -> int:
        """Offset of a chunk in bytes."""
        return index * self.chunk_size

    def length(self, index: int) -> int:
        """Bytes of a chunk."""
        return min(self.chunk_size, self.size - index * self.chunk_size)

    def is_right(self, index: int, data: bytes | bytearray) -> bool:
        """Whether these are a chunk's bytes."""
        return hashlib.sha256(data).hexdigest() == self.chunks[index]


class Keeper(Protocol):
    """Keeps verified chunks, so that nobody has to fetch them again."""

    def has(self, index: int) -> bool:
        """Whether a chunk lies here; ``get`` may find it damaged all the same."""

    def get(self, index: int) -> bytes | None:
        """Return a chunk that is verified now, None where it is not here."""

    def keep(self, index: int, data: bytes) -> bool:
        """Keep a verified chunk; False where it could not be kept."""


def read(body: Body, wanted: Wanted, index: int) -> bytes:
    """Read a chunk that begins where ``body`` stands, and verify it.

    Raises:
        WrongBytesError: it is not what was published.
        AttemptError: the body ends before it does.
    """
    length = wanted.length(index)
    begun = BytesIO()  # hands its buffer over without a copy
    while begun.tell() < length:
        piece = body.read(min(PIECE, length - begun.tell()))
        if not piece:
            raise _too_short(begun.getvalue(), wanted, index)
        begun.write(piece)
    chunk = begun.getvalue()
    if not wanted.is_right(index, chunk):
        raise WrongBytesError(
            "CHUNK_MISMATCH", f"the {length} bytes from {wanted.start(index)} on are wrong"
        )
    return chunk


def skip(body: Body, count: int) -> None:
    """Read over what is here already: the server did not heed the range."""
    while count > 0:
        piece = body.read(min(PIECE, count))
        if not piece:
            raise AttemptError("ended before what is here already")
        count -= len(piece)


def too_large(wanted: Wanted, size: int | None) -> WrongBytesError:
    """Return the error of a body of another ``size``; None where nobody knows how long it is."""
    found = "longer" if size is None else f"{size} bytes long"
    return WrongBytesError("FILE_TOO_LARGE", f"it is {found}, and must be {wanted.size} bytes")


def require_whole(wanted: Wanted, found: str) -> None:
    """Refuse a whole whose digest is not what its right chunks promised."""
    if found != wanted.sha256:
        raise IntegrityError(
            "SHA256_MISMATCH",
            f"{wanted.name}: every chunk is right, but the whole has sha256 {found}, not "
            f"{wanted.sha256}",
            hint="the manifest contradicts itself; ask who published it",
        )


def _too_short(begun: bytes, wanted: Wanted, index: int) -> AttemptError:
    """A body that ended early was cut; one that also begins otherwise is another file."""
    got = wanted.start(index) + len(begun)
    beginning = _BEGINNINGS.get(wanted.format, b"")
    if index == 0 and begun and not begun.startswith(beginning):
        return WrongBytesError(
            "NOT_THE_FILE", f"{got} bytes that are no {wanted.format} came with status 200"
        )
    return AttemptError(f"ended after {got} of {wanted.size} bytes")
