"""Files on their way to the disk while others are written: a sync waits, the writer need not."""

from __future__ import annotations

import os
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, final

from llama_loader.concurrency import Background

if TYPE_CHECKING:
    from types import TracebackType

EVERY: Final = 16 << 20
"""Bytes of one file after which the disk may begin with it."""


@final
class Syncing:
    """Syncs files in a thread of its own. When the context ends without error, all are on the disk.

    Raises:
        OSError: one could not be synced; raised at the end of the context.
    """

    def __init__(self) -> None:
        self._files: SimpleQueue[int | None] = SimpleQueue()
        self._error: OSError | None = None
        self._worker = Background(self._run)

    def __enter__(self) -> Syncing:
        """Take files."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for them all; an error that is on its way already comes first."""
        self._files.put(None)
        self._worker.result()
        if self._error is not None and value is None:
            raise self._error

    def add(self, handle: int) -> None:
        """Have what was written to an open file so far on the disk, soon."""
        self._files.put(os.dup(handle))

    def _run(self) -> None:
        while (handle := self._files.get()) is not None:
            try:
                if self._error is None:
                    os.fsync(handle)
            except OSError as error:
                self._error = error
            finally:
                os.close(handle)
