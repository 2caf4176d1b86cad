"""What a person adds to a build: CMake definitions and further programs.

What would make a tarball other than its manifest promises is refused before anything starts: a
definition that the farm makes itself, one that changes compilers, flags or search paths, and one
that brings a library which no host is promised to have.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from farm.errors import UsageError
from farm.inputs import recipe
from farm.plan import HOST_DEFINES, TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from farm.request import BuildRequest

PROGRAMS: Final = ("llama-bench", "llama-quantize", "rpc-server")
"""What ``--also`` takes: programs of llama.cpp that a tarball can hold beside the server."""
RPC_SERVER: Final = "ggml-rpc-server"
"""How llama.cpp names the program ``rpc-server`` since 2026."""
SHIPPED: Final = (*PROGRAMS, RPC_SERVER)
_RPC: Final = {
    "GGML_RPC": "ON",
    # ON where libibverbs is found: the plugin would need it on the host.
    "GGML_RPC_RDMA": "OFF",
}
"""Without these CMake has no ``rpc-server``."""

_DEFINITION: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,99})=([^\x00-\x1f\x7f]{0,1000})")
_CONTRADICTIONS: Final = {
    r"LLAMA_BUILD_(NUMBER|COMMIT|SERVER|TOOLS|COMMON)": "the release's source and programs",
    r"GGML_CUDA(_COMPRESSION_MODE|_NCCL)?": "backend and GPU code; --archs and --format set them",
    r"CMAKE_CUDA_ARCHITECTURES": "the architectures; --arch-set and --archs set them",
    r"CMAKE_.*RPATH.*|GGML_BACKEND_DIR": "that libraries are looked for beside the program alone",
    r"CMAKE_(\w+_)?FLAGS(_\w+)?|GGML_(LTO|GPROF)|(GGML|LLAMA)_SANITIZE_\w+": "what the compiler's "
    "flags decide: processor, GPU code, folders",
    r"CMAKE_(C|CXX|CUDA|ASM|HIP)_(COMPILER|STANDARD)\w*|CMAKE_(TOOLCHAIN_FILE|MAKE_PROGRAM)"
    r"|CMAKE_(SYSTEM|CROSSCOMPILING|GENERATOR|SYSROOT|FIND|PREFIX|PROJECT|INSTALL)\w*"
    r"|CMAKE_\w+_OUTPUT_DIRECTORY|CUDAToolkit_\w+|CUDA_PATH": "which toolchain compiled it, where",
    r"GGML_(VULKAN|HIP|MUSA|SYCL|METAL|BLAS|OPENCL|OPENVINO|CANN|WEBGPU|ZDNN|ZENDNN|VIRTGPU"
    r"|ET|HEXAGON|ACCELERATE|OPENMP|CPU_HBM|CPU_KLEIDIAI|RPC_RDMA)(_\w+)?"
    r"|LLAMA_(CURL|LLGUIDANCE|USE_SYSTEM_GGML)": "which libraries the host must have",
    r"GGML_(CPU|STATIC)|FARM_\w+": "that it runs on every x86-64 processor",
}
"""What a definition's name matches in whole → what of the manifest it would make untrue."""


def definitions(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Parse ``NAME=VALUE`` of ``--define``, in the order of their names.

    A definition that the farm makes in the same words adds nothing.

    Raises:
        UsageError: ``DEFINE_INVALID``: one is no definition, or a name has two values;
            ``DEFINE_CONTRADICTS``: the manifest would not be true any more.
    """
    found: dict[str, str] = {}
    for text in texts:
        parsed = _DEFINITION.fullmatch(text)
        if parsed is None:
            raise UsageError("DEFINE_INVALID", f"--define {text[:80]!r} is not NAME=VALUE")
        name, value = parsed.groups()
        if found.setdefault(name, value) != value:
            raise UsageError("DEFINE_INVALID", f"--define {name} is given two values")
        _refuse_contradiction(name, value)
    own = dict(HOST_DEFINES)
    return tuple(sorted((name, value) for name, value in found.items() if name not in own))


def _refuse_contradiction(name: str, value: str) -> None:
    own = dict(HOST_DEFINES).get(name)
    promises = [what for names, what in _CONTRADICTIONS.items() if re.fullmatch(names, name)]
    if own is not None and own != value:
        promises.append(f"what {name}={own} gives")
    elif own is not None:
        return
    if promises:
        raise UsageError(
            "DEFINE_CONTRADICTS",
            f"--define {name}={value} contradicts what the manifest promises: {promises[0]}",
            hint="leave it out; a build of your own, without the farm, can have it",
        )


def programs(texts: Iterable[str]) -> tuple[str, ...]:
    """Parse names of ``--also``, alone or with commas between them; each once, in order.

    Raises:
        UsageError: ``TARGET_INVALID``: one is no program that a tarball can hold.
    """
    names = sorted({name.strip() for text in texts for name in text.split(",") if name.strip()})
    for name in names:
        if name not in SHIPPED:
            raise UsageError(
                "TARGET_INVALID",
                f"--also {name[:80]!r} is no program that a tarball can hold",
                hint=f"it is one of {', '.join(PROGRAMS)}",
            )
    return tuple(dict.fromkeys("rpc-server" if name == RPC_SERVER else name for name in names))


def targets(also: Iterable[str], tree: Path) -> tuple[str, ...]:
    """Return the programs' targets in a source tree, under the names that it has for them."""
    cmake = tree / "tools" / "rpc" / "CMakeLists.txt"
    renamed = cmake.is_file() and RPC_SERVER in cmake.read_text("utf-8", "replace")
    return tuple(RPC_SERVER if name == "rpc-server" and renamed else name for name in also)


def options(
    request: BuildRequest, tree: Path
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return a plan's ``targets`` and ``defined``: what CMake builds, and what it is told more.

    Args:
        request: what a person asked for.
        tree: the source.
    """
    defined = dict(request.define)
    if "rpc-server" in request.also:
        defined |= _RPC
    if request.this_cpu and (variants := recipe.of_this_machine(tree)):
        defined[recipe.DEFINITION] = ";".join(variants)
    return (*TARGETS, *targets(request.also, tree)), tuple(sorted(defined.items()))
