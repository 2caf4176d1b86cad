"""Keeps a model's files in the page cache, so that a worker loads them from main memory.

The kernel drops pages that nothing has used for a while. While the app runs, one thread looks which
were dropped (mincore(2)) and reads them again, at the lowest priority for processor and disk.
"""

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from llama_loader import cgroups, gguf_header
from llama_space.values import Ready, log

EVERY, _SELDOM = 30.0, 3600.0
"""Seconds between two checks; longer after each one that found dropped pages: memory is short."""
_SHARE: Final = 0.6
"""Of main memory: a model that takes more would push itself out of the page cache."""
_WINDOW, _PIECE = 64 << 20, 1 << 20
"""Bytes that are mapped to be looked at, and that are read at once."""
_LAST: Final = 19
"""The nice value of the thread that reads again; the kernel puts its reads last by it, too."""
_libc: Final = ctypes.CDLL(None)


def keep(ready: Ready, over: threading.Event) -> None:
    """Check repeatedly, and read dropped pages, until ``over`` is set; needs its own thread."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LAST)
    pause = EVERY
    while not over.wait(pause):
        found = fill(ready, again=True)
        pause = min(pause * 2, _SELDOM) if found else EVERY
        if found:
            log(f"read {found / 1e6:.0f} MB of the model again, which the page cache had dropped")


def fill(ready: Ready, *, again: bool = False) -> int:
    """Read a model, or ``again`` what the page cache lacks of it; return the bytes that were read.

    Nothing is read where main memory has no room for it.
    """
    found = 0
    if ready.size <= cgroups.memory() * _SHARE:
        buffer = bytearray(_PIECE)
        with contextlib.suppress(OSError, ValueError):  # the second: a file is cut short meanwhile
            for path in gguf_header.files(ready.model):
                places = lacking(path) if again else range(0, path.stat().st_size, _PIECE)
                with path.open("rb", buffering=0) as file:
                    found += sum(os.preadv(file.fileno(), [buffer], at) for at in places)
    return found


def lacking(path: Path) -> Iterator[int]:
    """Yield where the pieces of a file begin of which the page cache lacks a part.

    The kernel reports it only to users who may write to the file; others see none missing.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, _WINDOW):
            length = min(_WINDOW, size - start)
            pages = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start) as mapped:
                first = ctypes.c_char.from_buffer(mapped)
                place = ctypes.c_void_p(ctypes.addressof(first))
                refused = _libc.mincore(place, ctypes.c_size_t(length), pages)
                del first  # or it could not be unmapped
            told, each = b"" if refused else pages.raw, _PIECE // mmap.PAGESIZE
            for at in range(0, len(told), each):
                if b"\0" in told[at : at + each]:
                    yield start + at * mmap.PAGESIZE
