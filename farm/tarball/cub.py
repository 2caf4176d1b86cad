"""CUB, the part of the CUDA toolkit that ggml-cuda compiles in: its version, digest and licence.

CUB is headers. What the compiler makes of them ends in ``libggml-cuda.so``, and their licence
(BSD) wants its text wherever that goes. The headers are read where the build is, because nothing
of a container's toolkit is on this machine.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final

from farm.tarball import licence_text
from farm.tarball.parts import Part

if TYPE_CHECKING:
    from pathlib import PurePath

LICENCE_FILE: Final = "cuda-include-cub.txt"
ORIGIN: Final = "https://github.com/NVIDIA/cccl"

_SCRIPT: Final = """
for folder in "$1/include" "$1/include/cccl"; do
    if [ -f "$folder/cub/cub.cuh" ]; then
        cd "$folder" || exit 1
        cat cub/cub.cuh cub/version.cuh
        echo "=== files"
        find cub -type f | LC_ALL=C sort | xargs sha256sum
        break
    fi
done
"""
"""CUDA 13 moved the headers below ``cccl``."""
_FILES: Final = "=== files"
_VERSION: Final = re.compile(r"#define\s+CUB_VERSION\s+(\d+)")


def command(cuda: PurePath) -> tuple[str, ...]:
    """Return the command that prints CUB's first headers and the digest of each of its files."""
    return ("sh", "-c", _SCRIPT, "sh", str(cuda))


def parse(lines: list[str]) -> tuple[Part, bytes] | None:
    """Turn what ``command`` printed into a part and its licence's text; None without CUB."""
    if _FILES not in lines:
        return None
    at = lines.index(_FILES)
    headers, files = "\n".join(lines[:at]), lines[at + 1 :]
    text = licence_text.in_comments(headers) or ""
    part = Part(
        name="CUB",
        path="cuda/include/cub",
        version=_version(headers),
        origin=ORIGIN,
        licence=licence_text.identify(text),
        licence_files=(LICENCE_FILE,) if text else (),
        sha256=hashlib.sha256("".join(f"{line}\n" for line in files).encode()).hexdigest(),
    )
    return part, text.encode()


def _version(headers: str) -> str | None:
    """Read ``CUB_VERSION``, whose digits are those of major, minor (3) and patch (2)."""
    match = _VERSION.search(headers)
    if match is None:
        return None
    number = int(match[1])
    return f"{number // 100_000}.{number // 100 % 1000}.{number % 100}"
