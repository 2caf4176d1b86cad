"""Find the CUDA libraries of this machine: their folders, versions and the packages on PyPI.

A ``cu124`` server needs ``libcublas.so.12``, a ``cu130`` one ``libcublas.so.13``. On a
Space they come with torch, in ``site-packages/nvidia``, which the dynamic linker does not search:
the server gets ``LD_LIBRARY_PATH`` with exactly the folders that it needs.
"""

import contextlib
import glob
import itertools
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from llama_loader import processes

_FILE: Final = re.compile(
    r"(?P<soname>lib(?P<stem>cublasLt|cublas|cudart|nvrtc)\.so\.(?P<major>[0-9]+))"
    r"(?P<rest>(?:\.[0-9]+)*)"
)
_NEEDED: Final = re.compile(rb"(?<=\x00)lib(?:cublasLt|cublas|cudart)\.so\.[0-9]{1,6}(?=\x00)")
_PACKAGE: Final = {
    "cublas": "nvidia-cublas",
    "cublasLt": "nvidia-cublas",
    "cudart": "nvidia-cuda-runtime",
    "nvrtc": "nvidia-cuda-nvrtc",
}
_TOOLKITS: Final = ("usr/local/cuda*/lib64", "cuda-image/usr/local/cuda-*/lib64")
"""A link to this machine's folder under ``targets``. The second is where ZeroGPU mounts it."""
_DRIVER: Final = "libcuda.so.1"
_LDCONFIG_TIMEOUT: Final = 10.0


@dataclass(frozen=True)
class Library:
    """One CUDA library; its version (``12.8.4.1``) as exactly as it can be known.

    ``origin``: ``LD_LIBRARY_PATH``, ``site-packages``, ``ldconfig``, ``toolkit`` or ``release``.
    """

    soname: str
    folder: Path
    version: str | None
    origin: str


def find_libraries(
    library_path: Sequence[Path], cache: Sequence[Path], python_path: Sequence[Path], root: Path
) -> tuple[Library, ...]:
    """List the CUDA libraries, in the order in which they are taken: the person's choice first."""
    # not Path's: it raises where this user may not look, as in the working folder of another one
    patterns = [f"{glob.escape(str(entry))}/nvidia/*/lib" for entry in python_path]
    wheels = [Path(lib) for pattern in patterns for lib in sorted(glob.glob(pattern))]  # noqa: PTH207
    kits = [lib for pattern in _TOOLKITS for lib in sorted(root.glob(pattern), reverse=True)]
    places = (
        ("LD_LIBRARY_PATH", library_path),
        ("site-packages", wheels),
        ("ldconfig", dict.fromkeys(path.parent for path in cache if _FILE.fullmatch(path.name))),
        ("toolkit", kits),
    )
    found: dict[tuple[str, Path], Library] = {}
    for origin, folders in places:
        for folder in folders:
            for library in _in_folder(folder, origin):
                # /usr/local/cuda, cuda/lib64 and the like are links to one and the same folder
                found.setdefault((library.soname, library.folder.resolve()), library)
    return tuple(found.values())


def _in_folder(folder: Path, origin: str) -> list[Library]:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
    files = filter(None, map(_FILE.fullmatch, names))
    # of libcublas.so.12 and libcublas.so.12.8.4.1 the second is last, and counts
    versions = {file["soname"]: file["major"] + file["rest"] for file in files}
    return [
        Library(soname, folder, _version(soname, version, folder), origin)
        for soname, version in versions.items()
        if os.path.isfile(folder / soname)  # noqa: PTH113 - Path's raises for some links
    ]


def _version(soname: str, from_name: str, folder: Path) -> str | None:
    """Return the version in a file's name, else of the wheel that the folder belongs to."""
    if "." in from_name:
        return from_name
    (package,) = packages([soname])
    pattern = f"{package.replace('-', '_')}-*.dist-info"
    wheels = (info.stem for site in folder.parents[2:3] for info in site.glob(pattern))
    return next((name.partition("-")[2] for name in wheels), None)


def linker_cache(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the files in the dynamic linker's cache, as ``ldconfig -p`` prints them."""
    done = processes.run(["/sbin/ldconfig", "-p"], environ, timeout=_LDCONFIG_TIMEOUT)
    return tuple(map(Path, re.findall(r"=> (/[^\s\0]+)$", done.output, re.MULTILINE)))


def driver_folders(library_path: Iterable[Path], cache: Iterable[Path]) -> tuple[Path, ...]:
    """Return the folders of LD_LIBRARY_PATH that alone lead to NVIDIA's driver, each once.

    On GKE and NixOS the dynamic linker's cache does not know it. The ``libcuda.so`` of a toolkit's
    ``stubs`` folder is for linking: a program that loads it finds no GPU.
    """
    known = {path.parent.resolve() for path in cache if path.name == _DRIVER}
    return tuple(
        folder
        for folder in dict.fromkeys(library_path)
        if os.path.isfile(folder / _DRIVER)  # noqa: PTH113 - Path's raises in some folders
        and (folder / _DRIVER).resolve().parent.name != "stubs"
        and folder.resolve() not in known
    )


def packages(sonames: Iterable[str]) -> tuple[str, ...]:
    """Return the packages on PyPI that bring these libraries: for ``libcublas.so.12`` its wheel."""
    found: dict[str, None] = {}
    for matched in filter(None, map(_FILE.fullmatch, sonames)):
        # from CUDA 13 on, the name is plain
        suffix = f"-cu{matched['major']}" if matched["major"] in {"11", "12"} else ""
        found[_PACKAGE[matched["stem"]] + suffix] = None
    return tuple(found)


@lru_cache(maxsize=8)
def read_needs(folders: tuple[Path, ...]) -> tuple[str, ...]:
    """Find the CUDA libraries that a foreign archive, which has no manifest, does not bring itself.

    A soname lies between two zero bytes, in the dynamic string table. A runtime, whose path has the
    archive's digest, is read once: that takes a second, also of a ZeroGPU worker's.
    """
    found: set[str] = set()
    for path in (path for folder in folders for path in folder.glob("*.so*")):
        with (
            contextlib.suppress(OSError, ValueError),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            found.update(one[0].decode("ascii") for one in _NEEDED.finditer(data))
    return tuple(sorted(one for one in found if not any((it / one).exists() for it in folders)))


def split_needs(
    needs: Iterable[str], libraries: Sequence[Library]
) -> tuple[tuple[Library, ...], tuple[str, ...]]:
    """Pair what an artifact needs with what there is: the libraries to take, the names missing.

    What is not the CUDA toolkit's is not looked for. cuBLAS and its cuBLASLt are from one folder or
    of one version, or both are missing, and come first: no other folder may come before theirs.
    """
    taken: list[Library] = []
    missing: list[str] = []
    cuda = [need for need in dict.fromkeys(needs) if _FILE.fullmatch(need)]
    for need in sorted(cuda, key=lambda need: not need.startswith("libcublas.")):
        # a server does not name the cuBLASLt that its cuBLAS needs
        names = [*dict.fromkeys((need, need.replace("libcublas.", "libcublasLt.")))]
        if need in (*missing, *(one.soname for one in taken)):
            continue
        each = [[one for one in libraries if one.soname == name] for name in names]
        ways = [
            way
            for way in itertools.product(*each)
            if len({one.folder for one in way}) == 1
            or (way[0].version and len({one.version for one in way}) == 1)
        ]
        # from where the others are, if it can be: one more folder could hide some of theirs
        homes = {folders([one]) for one in taken}
        near = [way for way in ways if any(folders([one]) in homes for one in way)]
        taken += next(iter(near or ways), ())
        missing += names if not ways else ()
    return tuple(taken), tuple(missing)


def folders(libraries: Iterable[Library]) -> tuple[Path, ...]:
    """Return the folders for LD_LIBRARY_PATH: each once, none that the linker searches anyway."""
    return tuple(dict.fromkeys(one.folder for one in libraries if one.origin != "ldconfig"))
