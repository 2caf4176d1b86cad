"""Architecture set + line + source → ``BuildPlan``: frozen steps that any engine can run. Pure.

A plan names no folder of any machine. An engine has a ``Layout``; ``BuildPlan.steps(layout)``
returns the command lines for it. The plan alone decides the content of the binaries, so two engines
with the same compiler make the same bytes (docs/decisions/0002-plan-without-paths.md). The last
part is the interface of every engine: open a workspace for a plan, run commands, return files.
"""

from __future__ import annotations

import posixpath
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from threading import Timer
from typing import TYPE_CHECKING, Final, Protocol

from farm.errors import EngineError

if TYPE_CHECKING:
    from farm.inputs.images import ImageFacts
    from farm.source import SourceTree
    from farm.tarball.build_record import LineRecord
    from farm.targets import ArchSet, Line

TARGETS: Final = ("llama-server", "llama-cli")

SOURCE_DATE_EPOCH: Final = 1_577_836_800
"""2020-01-01: the time of every file in a tarball, and of ``__DATE__`` should a source use it."""

_COMPRESSION_MODE_SINCE: Final = (12, 8)
"""nvcc's ``--compress-mode`` came with CUDA 12.8; before it there is only ``--no-compress``."""

HOST_DEFINES: Final = (
    ("CMAKE_BUILD_TYPE", "Release"),
    ("BUILD_SHARED_LIBS", "ON"),
    # Plugins: the same tarball starts on a machine with no NVIDIA driver.
    ("GGML_BACKEND_DL", "ON"),
    ("GGML_CPU_ALL_VARIANTS", "ON"),
    ("GGML_NATIVE", "OFF"),
    # ggml's own thread pool: with OpenMP the server would need libgomp.so.1 on the host.
    ("GGML_OPENMP", "OFF"),
    # ccache is put in front by CMake's launchers below, for CUDA too.
    ("GGML_CCACHE", "OFF"),
    # With OpenSSL found the server would need libssl.so.3 on the host.
    ("LLAMA_OPENSSL", "OFF"),
    # ON by default, and would download from the network while building.
    ("LLAMA_USE_PREBUILT_UI", "OFF"),
    ("LLAMA_BUILD_UI", "OFF"),
    ("LLAMA_BUILD_TESTS", "OFF"),
    ("LLAMA_BUILD_EXAMPLES", "OFF"),
    ("LLAMA_BUILD_APP", "OFF"),
    # Programs and libraries lie in one folder, and look for each other nowhere else.
    ("CMAKE_BUILD_WITH_INSTALL_RPATH", "ON"),
    ("CMAKE_INSTALL_RPATH", "$ORIGIN"),
    ("CMAKE_EXE_LINKER_FLAGS", "-Wl,-s"),
    ("CMAKE_SHARED_LINKER_FLAGS", "-Wl,-s"),
    ("CMAKE_MODULE_LINKER_FLAGS", "-Wl,-s"),
)


@dataclass(frozen=True)
class Layout:
    """The folders and programs of an engine.

    Attributes:
        source: llama.cpp's tree.
        build: where CMake builds.
        recipe: ``build/cmake/host_size.cmake``.
        cuda: the toolkit's root, None for the CPU line.
        launcher: the compiler launcher (ccache), empty where there is none.
        cmake, ninja: the programs.
        passing: whether the next build has other folders.
    """

    source: PurePath
    build: PurePath
    recipe: PurePath
    cuda: PurePath | None = None
    launcher: str = ""
    cmake: str = "cmake"
    ninja: str = "ninja"
    passing: bool = False

    @property
    def products(self) -> PurePath:
        """The folder in which CMake leaves programs and libraries."""
        return self.build / "bin"


CACHE_FOLDER: Final = PurePosixPath("/farm/ccache")
"""Where a container has the compiler cache."""
CACHE_CONFIG: Final = "/dev/null"
"""ccache's settings: none. Builds may write to the cache's folder, and so to its own."""
CONTAINER_LAYOUT: Final = Layout(
    source=PurePosixPath("/farm/source"),
    build=PurePosixPath("/farm/build"),
    recipe=PurePosixPath("/farm/host_size.cmake"),
    cuda=PurePosixPath("/usr/local/cuda"),
    launcher="ccache",
)


@dataclass(frozen=True)
class Step:
    """One command of a build. ``counts``: its output contains ninja's ``[n/m]``."""

    name: str
    argv: tuple[str, ...]
    counts: bool = False


@dataclass(frozen=True)
class BuildPlan:
    """What is built: everything that decides the bytes of the products."""

    arch_set: ArchSet
    line: Line
    source: SourceTree
    targets: tuple[str, ...] = TARGETS
    defined: tuple[tuple[str, str], ...] = ()
    """Definitions that a person added (``farm.request``)."""

    @property
    def key(self) -> str:
        """What the plan is called in logs and container names, e.g. ``cu128-sm90``."""
        return f"{self.line.name}-{self.arch_set.name}"

    @property
    def artifact_name(self) -> str:
        """The tarball's name."""
        return artifact_name(self.source.build, self.line, self.arch_set.name, self.arch_set.format)

    def defines(self) -> tuple[tuple[str, str], ...]:
        """Return CMake's cache entries that contain no folder of the engine."""
        return (
            *HOST_DEFINES,
            ("LLAMA_BUILD_NUMBER", str(self.source.build)),
            ("LLAMA_BUILD_COMMIT", self.source.short_commit),
            *self.source.defines,
            *(self._cuda_defines() if self.line.is_cuda else (("GGML_CUDA", "OFF"),)),
            *self.defined,
        )

    def _cuda_defines(self) -> tuple[tuple[str, str], ...]:
        mode = "none" if self.arch_set.format == "tar.zst" else "size"
        return (
            ("GGML_CUDA", "ON"),
            ("CMAKE_CUDA_ARCHITECTURES", self.arch_set.archs),
            # One compressor over the whole archive beats nvcc's, cubin by cubin (docs/size.md).
            ("GGML_CUDA_COMPRESSION_MODE", mode),
            # Of nvcc, -O is for the host half alone: launching 7,100 kernels, a seventh smaller
            # than with -O3. The machine code is the same to the byte (docs/size.md).
            ("CMAKE_CUDA_FLAGS_RELEASE", "-O2 -DNDEBUG"),
            # ON by default where NCCL is found: the library would need libnccl.so.2 on the host.
            ("GGML_CUDA_NCCL", "OFF"),
        )

    def steps(self, layout: Layout, *, jobs: int) -> tuple[Step, ...]:
        """Return the commands for an engine with this layout; ``jobs`` compilers at a time."""
        build = str(layout.build)
        defines = (*self.defines(), *self._layout_defines(layout))
        folders = ("-S", str(layout.source), "-B", build, "-G", "Ninja")
        defined = (f"-D{name}={value}" for name, value in defines)
        compile_argv = ("--build", build, "-j", str(jobs), "--target", *self.targets)
        return (
            Step("configure", (layout.cmake, *folders, *defined)),
            Step("compile", (layout.cmake, *compile_argv), counts=True),
        )

    def _layout_defines(self, layout: Layout) -> tuple[tuple[str, str], ...]:
        prefix_maps = (
            f"-ffile-prefix-map={layout.source}=llama.cpp",
            f"-ffile-prefix-map={layout.build}=build",
            # ccache rewrites paths below CCACHE_BASEDIR: the compiler is then given these.
            f"-ffile-prefix-map={posixpath.relpath(layout.source, layout.build)}=llama.cpp",
        )
        host_flags = " ".join(prefix_maps)
        launchers = ("C", "CXX", "CUDA") if self.line.is_cuda else ("C", "CXX")
        return (
            ("CMAKE_MAKE_PROGRAM", layout.ninja),
            ("CMAKE_PROJECT_INCLUDE", str(layout.recipe)),
            ("CMAKE_C_FLAGS", host_flags),
            ("CMAKE_CXX_FLAGS", host_flags),
            *(
                (f"CMAKE_{language}_COMPILER_LAUNCHER", layout.launcher)
                for language in launchers
                if layout.launcher
            ),
            *(self._cuda_layout_defines(layout, prefix_maps) if self.line.is_cuda else ()),
        )

    def _cuda_layout_defines(
        self, layout: Layout, prefix_maps: tuple[str, ...]
    ) -> tuple[tuple[str, str], ...]:
        cuda = layout.cuda
        if layout.passing and layout.launcher:
            # ccache does not map folders' names behind -Xcompiler, and nvcc
            # gets relative paths from it: the last map is the one that counts.
            prefix_maps = prefix_maps[-1:]
        flags = [f"-Xcompiler={prefix_map}" for prefix_map in prefix_maps]
        toolkit = tuple(int(part) for part in (self.line.toolkit or "0").split("."))
        if self.arch_set.format == "tar.zst" and toolkit < _COMPRESSION_MODE_SINCE:
            flags.append("--no-compress")
        return (
            ("CMAKE_CUDA_FLAGS", " ".join(flags)),
            ("CMAKE_CUDA_COMPILER", str(cuda / "bin" / "nvcc") if cuda else "nvcc"),
            *((("CUDAToolkit_ROOT", str(cuda)),) if cuda else ()),
        )

    def environment(self, layout: Layout, *, ccache_dir: PurePath | None) -> dict[str, str]:
        """Return the variables of every step; the engine adds its own PATH and HOME."""
        variables = {"LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)}
        if ccache_dir is None:
            return variables
        below = (one for one in layout.source.parents if layout.build.is_relative_to(one))
        return variables | {
            "CCACHE_DIR": str(ccache_dir),
            "CCACHE_CONFIGPATH": CACHE_CONFIG,
            # Paths below the common parent become relative: other machines' folders hit too.
            "CCACHE_BASEDIR": str(next(below)),
            "CCACHE_NOHASHDIR": "1",
            # Images are rebuilt with new file times: a compiler is known by its content.
            "CCACHE_COMPILERCHECK": "content",
        }


def artifact_name(build: int, line: LineRecord | Line, arch_set: str, archive_format: str) -> str:
    """Return a tarball's name (a contract: docs/manifest.md)."""
    return f"llama-server-b{build}-{line.name}-{arch_set}-linux-{line.machine}.{archive_format}"


LineSink = Callable[[str], None]
"""Takes one line of output, without its newline; of a longer one than ``LONGEST_LINE``, pieces."""
LONGEST_LINE: Final = 1 << 16
MOST_ANSWERED: Final = 1 << 20
"""Maximum characters of a program's answer."""
ANSWER_SECONDS: Final = 300.0
"""Timeout of a program's answer, such as the sha256 of a toolkit's programs in a large image."""


@dataclass(frozen=True)
class Toolchain:
    """The compilers of a build, for BUILD.json; they are never part of a binary.

    ``image`` and ``image_digest`` are None for the local engine. ``programs``: the sha256 of each
    program by name: ``cc1plus``, ``ld``, ``cicc`` and so on.
    """

    engine: str
    compiler: str
    cmake: str
    nvcc: str | None
    image: str | None = None
    image_digest: str | None = None
    programs: dict[str, str] = field(default_factory=dict)


@dataclass
class Workspace(ABC):
    """A place with the plan's source. Closing it removes it with everything in it.

    Attributes:
        layout: the folders and programs, as paths of the workspace.
        jobs: how many compilers fit at a time.
        image: the devel image below it, None for the local engine.
        ccache_dir: the compiler cache's folder, or None.
    """

    layout: Layout
    jobs: int
    image: ImageFacts | None
    ccache_dir: PurePath | None

    @abstractmethod
    def run(self, argv: tuple[str, ...], environment: Mapping[str, str], sink: LineSink) -> int:
        """Run one command, pass on its output (stdout and stderr) by lines; return its status."""

    def ask(self, *argv: str, environment: Mapping[str, str] | None = None) -> list[str]:
        """Run a short program, of an image or of a foreign source perhaps; return its lines.

        Raises:
            EngineError: ``ANSWER_ENDLESS``: it printed more than a MiB, or took five minutes.
        """
        lines: list[str] = []
        left = MOST_ANSWERED

        def keep(line: str) -> None:
            nonlocal left
            left -= len(line) + 1
            if left < 0:
                raise EngineError("ANSWER_ENDLESS", program=argv[0])
            lines.append(line)

        end = time.monotonic() + ANSWER_SECONDS
        late = Timer(ANSWER_SECONDS, self.end)
        late.daemon = True
        late.start()
        try:
            self.run(argv, environment or {}, keep)
        except EngineError:
            if time.monotonic() < end:
                raise
        finally:
            late.cancel()
        if time.monotonic() >= end:
            raise EngineError("ANSWER_ENDLESS", program=argv[0])
        return lines

    @abstractmethod
    def collect(self, products: PurePath, into: Path) -> None:
        """Copy the folder ``products`` into the existing, empty folder ``into``."""

    @abstractmethod
    def end(self) -> None:
        """End the running command, from another thread; every later command fails."""


class BuildEngine(Protocol):
    """Opens workspaces. A closed one leaves nothing behind, also after errors and Ctrl-C."""

    @property
    def name(self) -> str:
        """The word for ``--engine``."""

    def identity(self, plan: BuildPlan) -> str:
        """Return the identity of ``plan``'s compilers: with another one the bytes may differ.

        Raises:
            EngineError: the image or a compiler is missing.
        """

    def open(self, plan: BuildPlan, sink: LineSink) -> AbstractContextManager[Workspace]:
        """Make a workspace for ``plan`` with its source inside.

        Raises:
            EngineError: the engine or an image cannot be reached.
        """

    def close(self) -> None:
        """Close what the engine holds open, after all workspaces are closed."""
