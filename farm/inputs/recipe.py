"""What the farm adds to llama.cpp's own CMake files: one file of ``build/cmake``."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Final

from farm import PROJECT_ROOT

FILE: Final = PROJECT_ROOT / "build" / "cmake" / "host_size.cmake"


@cache
def content() -> bytes:
    """Return the file's bytes, read once: what is built with is what is recorded."""
    return FILE.read_bytes()


def sha256() -> str:
    """Return the digest: it decides the bytes of a build, so BUILD.json has it."""
    return hashlib.sha256(content()).hexdigest()
