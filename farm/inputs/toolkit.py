"""A CUDA toolkit for the local engine: one that this host has, or one made of NVIDIA's wheels.

The wheels spread one toolkit over several packages, all below ``nvidia/cu13``. Three things are
missing for nvcc and CMake, and are added: ``lib64``, library names without a version, and a stub
of the driver's ``libcuda`` to link against on a machine with no driver. The stub never ships.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from farm.durable import new_folder
from farm.errors import EngineError, SourceError, UsageError
from farm.inputs import pins
from farm.inputs.archives import extract_wheel
from farm.inputs.packages import cache_folder, fetch_package

WHEELS: Final = "pypi"
"""What ``--toolkit`` takes for NVIDIA's wheels; anything else is a folder."""
WHEELS_LINE: Final = "cu130"
"""The one line whose nvcc NVIDIA publishes as wheels: those of CUDA 12 hold only ptxas."""
DEFAULT_ROOT: Final = Path("/usr/local/cuda")

RECIPE: Final = "1"
"""Changed by hand when ``_complete`` makes another tree out of the same wheels."""
_STUB_ERROR: Final = 34
"""CUDA_ERROR_STUB_LIBRARY, cuda.h: what NVIDIA's own stub returns."""


@dataclass(frozen=True)
class Toolkit:
    """A toolkit: ``root/bin/nvcc``, ``root/include``, ``root/lib64``.

    ``version`` is ``major.minor``; ``codes`` are the compute capabilities (times ten) that nvcc
    lists, none if it lists none.
    """

    root: Path
    version: str
    codes: tuple[int, ...] = ()


def locate(request: str | None = None) -> Toolkit:
    """Return the toolkit that ``--toolkit`` names, a folder or NVIDIA's wheels (``pypi``).

    None means ``CUDA_PATH``, else nvcc on PATH, else ``/usr/local/cuda``.

    Raises:
        UsageError: there is no toolkit, or the folder or ``CUDA_PATH`` is not one.
        SourceError: a wheel cannot be fetched.
    """
    if request == WHEELS:
        return from_wheels(pins.load().toolkit_of(WHEELS_LINE))
    if request:
        return _at(Path(request), "--toolkit")
    if os.environ.get("CUDA_PATH"):
        return _at(Path(os.environ["CUDA_PATH"]), "CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # it may be a wrapper script, so its own output names its toolkit's folder
        told = re.search(r"^#\$ _HERE_=(.+)$", _output((nvcc, "--dryrun", "x.cu")), re.MULTILINE)
        folder = Path(told[1] if told else Path(nvcc).resolve().parent)
        return _at(folder.parent, f"nvcc on PATH ({nvcc})")
    if (DEFAULT_ROOT / "bin" / "nvcc").is_file():
        return _at(DEFAULT_ROOT, str(DEFAULT_ROOT))
    raise UsageError("TOOLKIT_MISSING", root=DEFAULT_ROOT, wheels=shown_wheels())


def from_wheels(wheels: Sequence[pins.PackagePin]) -> Toolkit:
    """Fetch wheels and unpack them into one tree below the cache, unless it exists.

    Raises:
        SourceError: a wheel cannot be fetched, or they do not make a toolkit.
        EngineError: there is no C compiler for the driver's stub.
    """
    key = hashlib.sha256("\n".join([RECIPE, *(pin.sha256 for pin in wheels)]).encode()).hexdigest()
    folder = cache_folder("toolkits") / key[:32]
    if not folder.is_dir():
        with new_folder(folder) as staging:
            for pin in wheels:
                extract_wheel(fetch_package(pin), staging)
            _complete(_wheel_root(staging))
    return _asked(_wheel_root(folder))


def wheels_version() -> str:
    """Return the CUDA version of NVIDIA's wheels, ``major.minor``, as they are pinned."""
    pinned = {pin.package: pin.version for pin in pins.load().toolkit_of(WHEELS_LINE)}
    return pinned["nvidia-cuda-nvcc"].rpartition(".")[0]


def shown_wheels() -> str:
    """Return what hints say of the wheels: their version, and the line that takes them."""
    return f"CUDA {wheels_version()}: with --line {WHEELS_LINE}"


def nvcc_version(nvcc: Path) -> str:
    """Ask an nvcc for its version, ``major.minor``.

    Raises:
        UsageError: it does not run, or prints no version.
    """
    told = _output((str(nvcc), "--version"))
    match = re.search(r"release ([0-9]{1,4}\.[0-9]{1,4})\b", told)
    if match is None:
        raise UsageError("TOOLKIT_INVALID", nvcc=nvcc, wheels=shown_wheels())
    return match[1]


def _at(root: Path, said_by: str) -> Toolkit:
    parts = ("bin/nvcc", "include/cuda_runtime.h")
    missing = [part for part in parts if not (root / part).is_file()]
    beside = root.parent.parent / "math_libs" / root.name  # of NVIDIA's HPC SDK
    for part, pattern in (("cublas_v2.h", "include"), ("libcublas.so", "lib*")):
        if not any((*root.glob(f"{pattern}/{part}"), *beside.glob(f"{pattern}/{part}"))):
            missing.append(f"{pattern.replace('*', '64')}/{part}")
    if missing:
        raise UsageError(
            "TOOLKIT_INVALID/incomplete",
            said_by=said_by,
            root=root,
            missing=" and ".join(missing),
            wheels=shown_wheels(),
        )
    # Not resolved: /usr/local/cuda stays what it is called, and what is built there is cached.
    return _asked(root)


def _asked(root: Path) -> Toolkit:
    nvcc = root / "bin" / "nvcc"
    return Toolkit(root, nvcc_version(nvcc), listed(_output((str(nvcc), "--list-gpu-code"))))


def listed(told: str) -> tuple[int, ...]:
    """Return each compute capability (times ten) in the output of ``nvcc --list-gpu-code``."""
    return tuple(dict.fromkeys(map(int, re.findall(r"\bsm_([0-9]{1,4})\b", told))))


def _output(argv: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        code, wheels = "TOOLKIT_INVALID/runs", shown_wheels()
        raise UsageError(code, program=argv[0], error=error, wheels=wheels) from error
    return done.stdout + done.stderr


def _wheel_root(folder: Path) -> Path:
    roots = sorted((folder / "nvidia").glob("cu*"))
    if len(roots) != 1 or not (roots[0] / "bin" / "nvcc").is_file():
        raise SourceError("TOOLKIT_INCOMPLETE")
    return roots[0]


def _complete(root: Path) -> None:
    """Add the files that nvcc and CMake look for to the unpacked wheels."""
    for program in (*root.glob("bin/*"), *root.glob("nvvm/bin/*")):
        if program.is_file() and program.suffix != ".profile":
            program.chmod(0o755)
    (root / "lib64").symlink_to("lib")
    for library in sorted((root / "lib").glob("lib*.so.*")):
        link = root / "lib" / f"{library.name.partition('.so.')[0]}.so"
        if not link.exists():
            link.symlink_to(library.name)
    (root / "lib" / "stubs").mkdir()
    header = (root / "include" / "cuda.h").read_text("utf-8", "replace")
    make_stub(driver_functions(header), root / "lib" / "stubs" / "libcuda.so")
    (root / "lib" / "stubs" / "libcuda.so.1").symlink_to("libcuda.so")


def driver_functions(header: str) -> list[str]:
    """Return the names of the driver's functions that cuda.h declares, as the linker sees them.

    The header renames some (``#define cuMemAlloc cuMemAlloc_v2``): both names are in the driver.
    """
    declared = re.findall(r"\bCUDAAPI\s+(cu[A-Z]\w*)\s*\(", header)
    renamed = re.findall(r"#\s*define\s+cu[A-Z]\w*\s+(cu[A-Z]\w*)\s*$", header, re.MULTILINE)
    return sorted({*declared, *renamed})


def make_stub(functions: Iterable[str], target: Path) -> None:
    """Compile a ``libcuda`` to link against, whose functions return that it is a stub.

    Raises:
        EngineError: there is no C compiler, or it failed.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise EngineError("COMPILER_MISSING/stub")
    source = "".join(f"int {name}(void) {{ return {_STUB_ERROR}; }}\n" for name in functions)
    linked = ("-Wl,-soname,libcuda.so.1", "-Wl,--build-id=none")
    flags = ("-shared", "-fPIC", "-O1", "-nostdlib", *linked)
    done = subprocess.run(
        (compiler, *flags, "-x", "c", "-", "-o", str(target)),
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise EngineError("STUB_FAILED", output=done.stderr)
