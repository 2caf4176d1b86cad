"""A file of which nobody says beforehand how large it is or what is in it, on its way here."""

from __future__ import annotations

import hashlib
from typing import IO, TYPE_CHECKING

from llama_loader.chunks import PIECE
from llama_loader.errors import IntegrityError
from llama_loader.events import Downloading
from llama_loader.patience import RangeError

if TYPE_CHECKING:
    from llama_loader.events import Sink
    from llama_loader.web import Body


class Copy:
    """What came of a file so far.

    Attributes:
        target: holds it.
        digest: of all of it, sha256.
        size: bytes.
        validator: what its server calls this very content, None where it does not say.
        total: bytes of the whole, None where the server does not say.
    """

    def __init__(self, target: IO[bytes]) -> None:
        self.target = target
        self.digest = hashlib.sha256()
        self.size = 0
        self.validator: str | None = None
        self.total: int | None = None

    def take(self, body: Body, url: str, limit: int, sink: Sink) -> None:
        """Append a body that goes on where the last one ended; begin anew with any other.

        Raises:
            RangeError: it is a part of another file.
            AttemptError: it was cut off.
            IntegrityError: the file is larger than ``limit`` bytes.
            OSError: ``target`` cannot be written.
        """
        if not body.start or body.start != self.size:
            self.begin(body.etag or body.modified, body.total)
        elif self.total is not None and body.total not in (None, self.total):
            raise RangeError("the file changed in the middle")
        while piece := body.read(min(PIECE, limit + 1 - self.size)):
            if self.size + len(piece) > limit:
                raise IntegrityError("FILE_TOO_LARGE", f"{url} is larger than {limit} bytes")
            self.append(piece)
            sink(Downloading(url, self.size, body.total))

    def begin(self, validator: str | None, total: int | None) -> None:
        """Forget what is here; what comes now has this name and size."""
        self.target.seek(0)
        self.target.truncate()
        self.digest, self.size = hashlib.sha256(), 0
        self.validator, self.total = validator, total

    def append(self, piece: bytes) -> None:
        """Take what comes next."""
        self.target.write(piece)
        self.digest.update(piece)
        self.size += len(piece)
