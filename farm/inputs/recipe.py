"""The farm's addition to llama.cpp's own CMake files: ``build/cmake/host_size.cmake``.

llama.cpp builds its CPU code once for each kind of x86-64 processor, and chooses the best variant
when it starts. The demo builds only the best one for this machine: of some 470 steps of a build,
190 are for the others.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Final

from farm import PROJECT_ROOT, durable

FILE: Final = PROJECT_ROOT / "build" / "cmake" / "host_size.cmake"
DEFINITION: Final = "FARM_CPU_VARIANTS"
"""The CMake variable with the CPU variants to build, separated by semicolons; without it: all."""
_BASELINE: Final = "x64"
"""The variant for every x86-64 processor."""
_VARIANT: Final = re.compile(
    r"^[ \t]*ggml_add_cpu_backend_variant\((\w+)((?: +\w+)*) *\)", re.MULTILINE
)
_FLAGS: Final = {
    "FMA": ("fma",),
    "F16C": ("f16c",),
    "SSE42": ("sse4_2",),
    "BMI2": ("bmi2",),
    "AVX": ("avx",),
    "AVX2": ("avx2",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "AVX512_VBMI": ("avx512vbmi",),
    "AVX512_BF16": ("avx512_bf16",),
    "AVX512_VNNI": ("avx512_vnni",),
    "AMX_TILE": ("amx_tile",),
    "AMX_INT8": ("amx_int8",),
}
"""llama.cpp's features, the weightier the later (its ``cpu-feats.cpp``) → what Linux calls them."""


@cache
def content() -> bytes:
    """Return the file's bytes, read once: the recorded bytes are those that are built with."""
    return FILE.read_bytes()


def sha256() -> str:
    """Return the file's digest for BUILD.json: the file decides the bytes of a build."""
    return hashlib.sha256(content()).hexdigest()


def of_this_machine(tree: Path, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the best variant that this machine runs.

    Empty if that is unknown: the processor is no x86-64, or the source has other variants.

    ``cpuinfo`` is the kernel's file about the processor.
    """
    cmake = tree / "ggml" / "src" / "CMakeLists.txt"
    if not (cmake.is_file() and cpuinfo.is_file()):
        return ""
    flags = _flags(cpuinfo.read_text("utf-8", "replace"))
    told = durable.head(cmake)
    variants = {name: words.split() for name, words in _VARIANT.findall(told)}
    running = {
        name: weight for name, words in variants.items() if (weight := _weight(words, flags))
    }
    if not flags or _BASELINE not in variants:
        return ""
    return max(running, key=lambda name: running[name], default=_BASELINE)


def _flags(cpuinfo: str) -> frozenset[str]:
    """Return the first processor's features; empty for another architecture."""
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def _weight(features: list[str], flags: frozenset[str]) -> int:
    """Return how good a variant is here: 0 if it does not run, or is for every processor."""
    if not all(name in _FLAGS and flags.issuperset(_FLAGS[name]) for name in features):
        return 0
    return sum(1 << list(_FLAGS).index(name) for name in features)
