"""The request for a build: options → a line, sets, a source. Nothing is started here.

Definitions that would make the manifest untrue are refused before anything starts: a definition
that the farm makes itself, one that changes compilers, flags or search paths, and one that needs a
library which the manifest does not require of a host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from farm import durable, source, targets
from farm.errors import UsageError
from farm.inputs import patches, pins
from farm.options import BuildRequest, require_known
from farm.pack import ALSO, RPC_SERVER, SHIPPED
from farm.plan import HOST_DEFINES, TARGETS
from farm.source import SourceTree
from farm.tarball import archive
from farm.targets import ArchSet, Line, Targets

ENGINES: Final = ("auto", "docker", "local", "dask")
SCHEMES: Final = ("tcp", "tls", "ws", "wss")
"""What a scheduler's address may begin with; ``tcp`` where it begins with nothing."""
RPC: Final = {
    "GGML_RPC": "ON",
    # ON where libibverbs is found: the plugin would need it on the host.
    "GGML_RPC_RDMA": "OFF",
}
"""Definitions without which CMake has no target ``rpc-server``."""

_DEFINITION: Final = re.compile(
    r"([A-Za-z_]\w{,99})=([^\0-\x1f\x7f\ud800-\udfff]{,1000})", re.ASCII
)
_CONTRADICTIONS: Final = {
    r"LLAMA_BUILD_(NUMBER|COMMIT|SERVER|TOOLS|COMMON)": "the release's source and programs",
    r"GGML_CUDA(_COMPRESSION_MODE|_NCCL)?": "backend and GPU code; --archs and --format set them",
    r"CMAKE_CUDA_ARCHITECTURES": "the architectures; --arch-set and --archs set them",
    r"CMAKE_.*RPATH.*|GGML_BACKEND_DIR": "that libraries are looked for beside the program alone",
    r"CMAKE_(\w+_)?FLAGS(_\w+)?|GGML_(LTO|GPROF)|(GGML|LLAMA)_SANITIZE_\w+": "what the compiler's "
    "flags decide: processor, GPU code, folders",
    r"CMAKE_(C|CXX|CUDA|ASM|HIP)_(COMPILER|LINKER|STANDARD)\w*|CMAKE_(TOOLCHAIN_FILE|MAKE_PROGRAM)"
    r"|CMAKE_(LINKER|AR|RANLIB|NM|STRIP|OBJCOPY)\w*|\w+_EXECUTABLE"
    r"|CMAKE_(SYSTEM|CROSSCOMPILING|GENERATOR|SYSROOT|FIND|PREFIX|PROJECT|INSTALL)\w*"
    r"|CMAKE_\w+_OUTPUT_DIRECTORY|CUDAToolkit_\w+|CUDA_PATH": "which toolchain compiled it, where",
    r"GGML_(VULKAN|HIP|MUSA|SYCL|METAL|BLAS|OPENCL|OPENVINO|CANN|WEBGPU|ZDNN|ZENDNN|VIRTGPU"
    r"|ET|HEXAGON|ACCELERATE|OPENMP|CPU_HBM|CPU_KLEIDIAI|RPC_RDMA)(_\w+)?"
    r"|LLAMA_(CURL|LLGUIDANCE|USE_SYSTEM_GGML)": "which libraries the host must have",
    r"GGML_(CPU|STATIC)|FARM_\w+": "that it runs on every x86-64 processor",
}
"""Patterns of definitions' whole names → what the manifest states and they would make untrue."""


def resolve(request: BuildRequest) -> tuple[Line | None, tuple[ArchSet, ...]]:
    """Turn names into a line and sets, refusing what cannot be built.

    The line is None if only the image can tell it (``pipeline.settled``).

    Raises:
        UsageError: an unknown name, a malformed option, or a combination that nvcc cannot build.
    """
    table = targets.load()
    line = _line(table, request)
    if request.arch_set and request.archs:
        raise UsageError("SET_AND_ARCHS")
    if request.format is not None:
        archive.require_format(request.format)
    require_known("ENGINE_UNKNOWN", "--worker-engine", request.worker_engine, ENGINES[:-1])
    require_known("PATCHES_INVALID", "--patches", request.patches, patches.CHOICES)
    definitions(request.define)
    programs(request.also)
    given = [f"--{name}" for name in ("scheduler", "workers") if getattr(request, name)]
    if request.engine != "dask" and given:
        raise UsageError("CLUSTER_WITHOUT_DASK", given=" and ".join(given))
    if request.scheduler is not None and not _is_address(request.scheduler):
        raise UsageError("SCHEDULER_INVALID", scheduler=request.scheduler)
    sets = (
        (table.custom(request.archs),)
        if request.archs is not None
        else table.resolve(request.arch_set or "zerogpu")
    )
    if request.copy is not None and len(sets) > 1:
        raise UsageError("COPY_OF_SEVERAL", sets=len(sets))
    require_buildable(line, sets)
    if request.format is None:
        return line, sets
    return line, tuple(msgspec.structs.replace(s, format=request.format) for s in sets)


def _line(table: Targets, request: BuildRequest) -> Line | None:
    """Return the line that the options name; None if the image or the toolkit decides."""
    if request.line is None and (request.image or request.engine == "local"):
        return table.line_of_image(request.image)
    line = table.line(request.line or targets.DEFAULT_LINE)
    if not line.image and not request.image and request.engine != "local":
        raise UsageError("LINE_HAS_NO_IMAGE", line=line.name, toolkit=line.toolkit)
    return line


def require_buildable(line: Line | None, sets: tuple[ArchSet, ...]) -> None:
    """Refuse sets that a line cannot build; what only an image can tell is checked later.

    Raises:
        UsageError: names the set, or its architecture, and the line.
    """
    for arch_set in sets:
        if line is not None:
            targets.check_buildable(line, arch_set)
        if not arch_set.archs and (line is None or line.is_cuda):
            raise UsageError("SET_HAS_NO_CUDA", name=arch_set.name)


def _is_address(text: str) -> bool:
    scheme, mark, rest = text.partition("://")
    if mark and scheme not in SCHEMES:
        return False
    try:
        parts = urlsplit(f"//{rest if mark else text}")
        return bool(parts.hostname and parts.port) and parts.netloc == parts.geturl()[2:]
    except ValueError:  # the port is no number, or out of range
        return False


def choose_source(request: BuildRequest) -> SourceTree:
    """Return the source that ``--ref`` or ``--source`` names, else the pinned archive; patched.

    Raises:
        UsageError: both are given, the ref does not exist, or a patch does not fit.
        SourceError: it cannot be fetched, or differs from its pin.
    """
    if request.ref and request.source:
        raise UsageError("REF_AND_SOURCE")
    left_out: tuple[str, ...] = ()
    if request.source:
        found = source.from_folder(request.source)
    elif request.ref:
        found = source.from_ref(request.ref)
    elif request.assume_build is not None:
        raise UsageError("ASSUMED_BUILD_IS_KNOWN")
    else:
        pin = pins.load().source
        found, left_out = source.from_archive(pin), pin.without_patches
    if request.assume_build is not None:
        found = source.assume_build(found, request.assume_build)
    if request.patches == "none":
        return found
    chosen = (one for one in patches.load() if one.patch.name not in left_out)
    return source.patched(found, tuple(chosen))


def definitions(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Parse ``NAME=VALUE`` of ``--define``, in the order of their names.

    A definition that the farm makes with the same value adds nothing.

    Raises:
        UsageError: ``DEFINE_INVALID``: one is no definition, or a name has two values;
            ``DEFINE_CONTRADICTS``: the manifest would be untrue.
    """
    found: dict[str, str] = {}
    for text in texts:
        parsed = _DEFINITION.fullmatch(text)
        if parsed is None:
            raise UsageError("DEFINE_INVALID", text=text[:80])
        name, value = parsed.groups()
        if found.setdefault(name, value) != value:
            raise UsageError("DEFINE_INVALID/twice", name=name)
    own = dict(HOST_DEFINES)
    for name, value in found.items():
        promises = [what for names, what in _CONTRADICTIONS.items() if re.fullmatch(names, name)]
        promises += [f"what {name}={own[name]} gives"] if own.get(name, value) != value else []
        if promises and own.get(name) != value:
            raise UsageError("DEFINE_CONTRADICTS", name=name, value=value, promises=promises[0])
    return tuple(sorted((name, value) for name, value in found.items() if name not in own))


def programs(texts: Iterable[str]) -> tuple[str, ...]:
    """Parse names of ``--also``, single or separated by commas; each once, in order.

    Raises:
        UsageError: ``TARGET_INVALID``: one is no program that a tarball can hold.
    """
    names = sorted({name.strip() for text in texts for name in text.split(",") if name.strip()})
    for name in names:
        if name not in SHIPPED:
            raise UsageError("TARGET_INVALID", name=name[:80], also=", ".join(ALSO))
    return tuple(dict.fromkeys("rpc-server" if name == RPC_SERVER else name for name in names))


def program_targets(also: Iterable[str], tree: Path) -> tuple[str, ...]:
    """Return the programs' targets under the names that this source tree has for them."""
    cmake = tree / "tools" / "rpc" / "CMakeLists.txt"
    renamed = cmake.is_file() and RPC_SERVER in durable.head(cmake)
    return tuple(RPC_SERVER if name == "rpc-server" and renamed else name for name in also)


def options(
    request: BuildRequest, tree: Path
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return a plan's ``targets`` and ``defined``: CMake's targets and further definitions."""
    defined, also = dict(definitions(request.define)), programs(request.also)
    if "rpc-server" in also:
        defined |= RPC
    if request.this_cpu and (variant := patches.cpu_variant(tree)):
        defined[patches.CPU_VARIANTS] = variant
    return (*TARGETS, *program_targets(also, tree)), tuple(sorted(defined.items()))
