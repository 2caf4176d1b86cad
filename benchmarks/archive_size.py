"""How small a release tarball can be, and what reading it then costs.

    PYTHONPATH=.:spaces python benchmarks/archive_size.py TARBALL.tar.zst

Packs the tarball's own tar stream again in every way below, and each part of it alone with the
way that the farm uses. Prints one JSON object: bytes, seconds to make and to read (the latter the
best of three; one thread). docs/manifest.md bounds the window that the loader reads.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from backports import zstd

from farm.tarball import archive

if TYPE_CHECKING:
    from collections.abc import Callable

_LEVEL: Final = zstd.CompressionParameter.compression_level
_WINDOW: Final = zstd.CompressionParameter.window_log
_LONG: Final = zstd.CompressionParameter.enable_long_distance_matching
_LIMIT: Final[dict[int, int]] = {zstd.DecompressionParameter.window_log_max: 31}
_CUDA: Final = "libggml-cuda.so"


def _zstd(level: int, window: int, *, long: bool = False) -> Callable[[bytes], bytes]:
    options: dict[int, int] = {_LEVEL: level, _WINDOW: window, _LONG: int(long)}
    return partial(zstd.compress, options=options)


def _xz(preset: int, dictionary: int) -> Callable[[bytes], bytes]:
    chain = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary}]
    return partial(lzma.compress, format=lzma.FORMAT_XZ, filters=chain)


FARMS: Final = "zstd -19, window 8 MiB (the farm's)"
_read_zstd: Final = partial(zstd.decompress, options=_LIMIT)
WAYS: Final[dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]] = {
    "gzip -6": (partial(gzip.compress, compresslevel=6), gzip.decompress),
    "gzip -9": (partial(gzip.compress, compresslevel=9), gzip.decompress),
    "zstd -3, window 8 MiB": (_zstd(3, 23), _read_zstd),
    FARMS: (_zstd(archive.ZSTD_LEVEL, archive.ZSTD_WINDOW_LOG), _read_zstd),
    "zstd -22, window 8 MiB": (_zstd(22, 23), _read_zstd),
    "zstd -22, window 128 MiB": (_zstd(22, 27, long=True), _read_zstd),
    "xz -6, dictionary 8 MiB": (_xz(6, 8 << 20), lzma.decompress),
    "xz -9e, dictionary 64 MiB": (_xz(9 | lzma.PRESET_EXTREME, 64 << 20), lzma.decompress),
}


def main(tarball: Path) -> None:
    """Print the figures of one tarball."""
    with zstd.open(tarball, "rb") as stream:
        plain = stream.read()
    parts = _parts(plain)
    found: dict[str, Any] = {"tarball": tarball.name, "bytes": tarball.stat().st_size}
    found["unpacked"] = {name: len(data) for name, data in parts.items()}
    found["parts"] = {name: _tried(FARMS, data) for name, data in parts.items()}
    found["whole"] = {}
    for way in WAYS:
        found["whole"][way] = _tried(way, plain)
        print(way, found["whole"][way], file=sys.stderr, flush=True)
    print(json.dumps(found, indent=2))


def _tried(way: str, data: bytes) -> dict[str, float]:
    write, read = WAYS[way]
    began = time.process_time()
    packed = write(data)
    made = time.process_time() - began
    seconds = []
    for _ in range(3):
        began = time.process_time()
        read(packed)
        seconds.append(time.process_time() - began)
    return {
        "bytes": len(packed),
        "cpu_seconds_to_make": round(made, 1),
        "cpu_seconds_to_read": round(min(seconds), 3),
    }


def _parts(plain: bytes) -> dict[str, bytes]:
    """Split a runtime: the CUDA library, the CPU variants, everything else; in the tar's order."""
    parts = {"CUDA library": bytearray(), "CPU variants": bytearray(), "the rest": bytearray()}
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            name = Path(member.name).name
            part = (
                "CUDA library"
                if name == _CUDA
                else "CPU variants"
                if name.startswith("libggml-cpu")
                else "the rest"
            )
            parts[part] += stream.read() if stream else b""
    return {name: bytes(data) for name, data in parts.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
