"""NVIDIA's wheels in small: real ELF libraries with the real sonames, and a licence.

Also a small real CUDA server that needs them: it starts only where the linker finds them.
"""

import hashlib
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

from binaries import FATBINS, PRINT_LIBRARIES, library, program
from package_index import PackageIndex

from farm import release
from farm.inputs import pins
from farm.plan import Toolchain
from farm.tarball import build_record
from farm.tarball.build_record import BuildRecord, LineRecord
from llama_loader import manifest as schema

LICENCE = b"NVIDIA's licence, in small\n"
CUBLAS, CUDART = "nvidia-cublas", "nvidia-cuda-runtime"
VERSIONS = {CUBLAS: "13.0.2.14", CUDART: "13.0.96"}
TAIL = "py3-none-manylinux2014_x86_64.whl"
LIB = "nvidia/cu13/lib"
SONAMES = ("libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13")
LINE = LineRecord("cu130", "13.0", "580.65", "2.35")


def libraries(folder: Path) -> dict[str, bytes]:
    """Make the three libraries; returns their bytes by soname."""
    folder.mkdir(parents=True, exist_ok=True)
    library(folder, "libcublasLt.so.13")
    library(folder, "libcublas.so.13", "libcublasLt.so.13")
    library(folder, "libcudart.so.13")
    return {soname: (folder / soname).read_bytes() for soname in SONAMES}


def contents(made: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Spread the libraries over the packages as NVIDIA does, beside what is not wanted."""
    cublas = {name: made[name] for name in SONAMES if "cublas" in name}
    return {
        CUBLAS: {
            "nvidia/cu13/include/cublas.h": b"// a header\n",
            **{f"{LIB}/{name}": data for name, data in cublas.items()},
            f"{LIB}/libnvblas.so.13": made["libcublas.so.13"],
            f"nvidia_cublas-{VERSIONS[CUBLAS]}.dist-info/licenses/License.txt": LICENCE,
            f"nvidia_cublas-{VERSIONS[CUBLAS]}.dist-info/METADATA": b"Name: nvidia-cublas\n",
        },
        CUDART: {
            f"{LIB}/libcudart.so.13": made["libcudart.so.13"],
            f"{LIB}/libcudart_static.a": b"!<arch>\n",
            # the wheels of CUDA 12 have it here
            f"nvidia_cuda_runtime-{VERSIONS[CUDART]}.dist-info/License.txt": LICENCE,
        },
    }


def wheel(folder: Path, package: str, members: Mapping[str, bytes]) -> Path:
    """Write one wheel."""
    path = folder / f"{package.replace('-', '_')}-{VERSIONS[package]}-{TAIL}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path


def pin(package: str, path: Path) -> pins.ToolkitPin:
    """Return the pin of a wheel as it is."""
    data = path.read_bytes()
    return pins.ToolkitPin(
        line="cu130",
        package=package,
        version=VERSIONS[package],
        filename=path.name,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def publish(
    index: PackageIndex, folder: Path, wheels: Mapping[str, Mapping[str, bytes]]
) -> tuple[pins.ToolkitPin, ...]:
    """Put wheels on a package index; returns their pins."""
    pinned = []
    for package, members in wheels.items():
        path = wheel(folder, package, members)
        index.add(package, path.name, path.read_bytes())
        pinned.append(pin(package, path))
    return tuple(pinned)


def server(folder: Path, out: Path) -> Path:
    """Pack a server for sm_90 that needs the three libraries, and prints where it found one."""
    linked, tree = folder / "linked", folder / "tree"
    libraries(linked)
    (tree / "bin").mkdir(parents=True)
    (tree / "licenses").mkdir()
    library(linked, "libggml-cuda.so", *SONAMES, soname=None, fatbin=FATBINS / "sass-90.fatbin")
    needed = [name for name in SONAMES if "Lt" not in name]
    for name in ("llama-server", "llama-cli"):
        program(linked, name, *needed, source=PRINT_LIBRARIES)
        shutil.copy(linked / name, tree / "bin")
    shutil.copy(linked / "libggml-cuda.so", tree / "bin")
    (tree / "licenses" / "LICENSE").write_bytes(b"MIT\n")
    record = BuildRecord(
        source=schema.Source(
            project="llama.cpp",
            version="0.6.0",
            build=11549,
            commit=None,
            origin="a test",
            sha256=None,
        ),
        arch_set="sm90",
        archs="90-real",
        line=LINE,
        defines={},
        toolchain=Toolchain("local", "gcc", "4", "13.0"),
    )
    (tree / "BUILD.json").write_bytes(build_record.encode(record))
    return release.pack_tree(tree, out, "tar.zst").path
