"""Compressed chunks → plain pieces, with bounded memory whatever the data asks for."""

from __future__ import annotations

import lzma
import sys
import zlib
from typing import TYPE_CHECKING, Any, Final

from llama_loader.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

PIECE: Final = 1 << 19
"""The largest piece that is handed on, in bytes."""
WINDOW_LOG: Final = 23
"""zstd windows of at most 8 MiB: what the farm writes (docs/manifest.md), and little memory."""
XZ_MEMORY: Final = 80 << 20
"""Bytes; xz -9 asks for 65 MiB."""

_FEED: Final = 1 << 18
_MAGIC: Final = {
    b"\x1f\x8b": "tar.gz",
    b"\xfd7zXZ\x00": "tar.xz",
    b"\x28\xb5\x2f\xfd": "tar.zst",
    b"PK\x03\x04": "zip",
}


def refused(name: str, why: str) -> IntegrityError:
    """Return the error of an archive that is damaged or unsafe."""
    return IntegrityError(
        "ARCHIVE_REFUSED", f"{name}: {why}", hint="nothing of it was kept, and nothing was run"
    )


def kind(head: bytes, name: str) -> str:
    """Tell an archive's format from its first bytes.

    Raises:
        IntegrityError: it is none that is known.
    """
    for magic, found in _MAGIC.items():
        if head.startswith(magic):
            return found
    raise IntegrityError(
        "ARCHIVE_UNKNOWN",
        f"{name} is neither gzip, xz, zstd nor zip data (it begins with {head[:8]!r})",
        hint="a page that asks for a login comes with status 200: open the URL in a browser",
    )


def decompressed(chunks: Iterator[bytes], form: str, name: str) -> Generator[bytes, None, None]:
    """Yield the plain bytes of a ``tar.gz``, ``tar.xz`` or ``tar.zst``, ``PIECE`` at most each.

    Args:
        chunks: the compressed bytes.
        form: which of the three.
        name: the archive's, for errors.

    Raises:
        IntegrityError: damaged, truncated, followed by anything, or in need of too much memory.
    """
    make, failure = _decoder(form, name)
    decoder = None
    try:
        for fed in _slices(chunks):
            data: Any = fed
            while data or (decoder is not None and not decoder.needs_input):
                decoder = decoder or make()
                piece = decoder.decompress(data, PIECE)
                data = b""
                if piece:
                    yield piece
                if decoder.eof:  # what follows must be another member, or it is garbage
                    data, decoder = decoder.unused_data, None
    except failure as error:
        raise refused(name, f"it is damaged: {error}") from error
    if decoder is not None:
        raise refused(name, "it is damaged: it ends in the middle of the compressed data")


def _slices(chunks: Iterator[bytes]) -> Iterator[memoryview]:
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), _FEED):
            yield view[start : start + _FEED]


class _Gzip:
    """zlib's decompressor with the manners of the other two."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail and not self._full

    def decompress(self, data: memoryview | bytes, limit: int) -> bytes:
        tail = self._inner.unconsumed_tail
        plain = self._inner.decompress(tail + bytes(data) if tail else data, limit)
        self._full = len(plain) == limit
        return plain


def _decoder(form: str, name: str) -> tuple[Callable[[], Any], type[Exception]]:
    if form == "tar.gz":
        return _Gzip, zlib.error
    if form == "tar.xz":
        return (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)), lzma.LZMAError
    if form == "tar.zst":
        zstd = _zstd()
        options = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
        return (lambda: zstd.ZstdDecompressor(options=options)), zstd.ZstdError
    raise IntegrityError(
        "FORMAT_UNKNOWN", f"{name}: this loader cannot read {form!r}", hint="update the loader"
    )


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
