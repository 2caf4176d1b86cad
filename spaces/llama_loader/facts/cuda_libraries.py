"""Which CUDA libraries this machine has, where, in which version, and which package brings them.

A ``cu124`` server asks for ``libcublas.so.12``, a ``cu130`` one for ``libcublas.so.13``. On a
Space they come with torch, in ``site-packages/nvidia``, which the dynamic linker does not search:
the server gets ``LD_LIBRARY_PATH`` with exactly the folders that it needs.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llama_loader import processes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_FILE: Final = re.compile(
    r"(?P<soname>lib(?P<stem>cublasLt|cublas|cudart|nvrtc)\.so\.(?P<major>[0-9]+))"
    r"(?P<rest>(?:\.[0-9]+)*)"
)
_NEEDED: Final = re.compile(rb"(?<=\x00)lib(?:cublasLt|cublas|cudart)\.so\.[0-9]+(?=\x00)")
_PACKAGE: Final = {
    "cublas": "nvidia-cublas",
    "cublasLt": "nvidia-cublas",
    "cudart": "nvidia-cuda-runtime",
    "nvrtc": "nvidia-cuda-nvrtc",
}
_SUFFIXED: Final = frozenset({"11", "12"})
"""CUDA majors whose wheels carry it in their name; from 13 on the name is plain (FACTS §2)."""
_PULLED_IN: Final = {"cublas": "cublasLt"}
"""libcublas needs libcublasLt of the same major, which the server itself does not name."""
_TOOLKITS: Final = (
    "usr/local/cuda*/lib64",
    "usr/local/cuda*/targets/*/lib",
    "cuda-image/usr/local/cuda-13.0/lib64",
    "cuda-image/usr/local/cuda-*/lib64",
    "cuda-image/usr/local/cuda-*/targets/*/lib",
)
_LDCONFIG_TIMEOUT: Final = 10.0


@dataclass(frozen=True)
class Library:
    """One CUDA library.

    Attributes:
        soname: what a binary asks for, e.g. ``libcublas.so.12``.
        folder: where it lies.
        version: as exactly as it can be known (``12.8.4.1``), else None.
        origin: who brought it: ``LD_LIBRARY_PATH``, ``site-packages``, ``toolkit``, ``ldconfig``.
    """

    soname: str
    folder: Path
    version: str | None
    origin: str


def find_libraries(
    library_path: Sequence[Path],
    cache: Sequence[Path],
    python_path: Sequence[Path],
    root: Path = Path("/"),
) -> tuple[Library, ...]:
    """List what is there, in the order in which it is taken: the person's choice first.

    Args:
        library_path: folders of LD_LIBRARY_PATH.
        cache: files that the dynamic linker's cache knows (``linker_cache``).
        python_path: folders that may hold an ``nvidia`` folder of wheels.
        root: where the toolkits are looked for.
    """
    wheels = [lib for entry in python_path for lib in sorted(entry.glob("nvidia/*/lib"))]
    toolkits = [lib for pattern in _TOOLKITS for lib in sorted(root.glob(pattern), reverse=True)]
    linked = dict.fromkeys(path.parent for path in cache if _FILE.fullmatch(path.name))
    places = (
        ("LD_LIBRARY_PATH", library_path),
        ("site-packages", wheels),
        ("ldconfig", tuple(linked)),
        ("toolkit", toolkits),
    )
    found: dict[tuple[str, Path], Library] = {}
    for origin, folders in places:
        for folder in folders:
            for library in _in_folder(folder, origin):
                # /usr/local/cuda, cuda/lib64 and the like are links to one and the same folder
                found.setdefault((library.soname, library.folder.resolve()), library)
    return tuple(found.values())


def _in_folder(folder: Path, origin: str) -> Iterable[Library]:
    versions: dict[str, str] = {}
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return ()
    for name in names:
        matched = _FILE.fullmatch(name)
        if matched:  # libcublas.so.12 and libcublas.so.12.8.4.1: the longer one is last
            versions[matched["soname"]] = matched["major"] + matched["rest"]
    return [
        Library(soname, folder, _version(soname, version, folder), origin)
        for soname, version in versions.items()
        if (folder / soname).is_file()
    ]


def _version(soname: str, from_name: str, folder: Path) -> str | None:
    """The version in a file's name, else of the wheel that the folder belongs to."""
    if "." in from_name:
        return from_name
    site = next((parent.parent for parent in folder.parents if parent.name == "nvidia"), None)
    if site is None:
        return None
    package = pip_package(soname)
    for info in site.glob(f"{(package or '').replace('-', '_')}-*.dist-info"):
        return info.name.removesuffix(".dist-info").split("-")[1]
    return None


def linker_cache(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the files in the dynamic linker's cache, as ``ldconfig -p`` prints them."""
    for program in ("/sbin/ldconfig", "/usr/sbin/ldconfig"):
        done = processes.run([program, "-p"], environ, timeout=_LDCONFIG_TIMEOUT)
        if done.status == 0:
            found = re.findall(r"=> (/\S+)$", done.output, re.MULTILINE)
            return tuple(Path(path) for path in found)
    return ()


def pip_package(soname: str) -> str | None:
    """Return the package on PyPI that brings a library: ``libcublas.so.12`` → its -cu12 wheel."""
    matched = _FILE.fullmatch(soname)
    if not matched:
        return None
    package = _PACKAGE[matched["stem"]]
    return f"{package}-cu{matched['major']}" if matched["major"] in _SUFFIXED else package


def read_needs(runtime: Path) -> tuple[str, ...]:
    """Find the CUDA libraries that a runtime's own libraries name, where no manifest says it.

    For archives given by URL. A soname stands in the file between two zero bytes, in the dynamic
    string table; one that the runtime brings along itself is not needed.
    """
    found: set[str] = set()
    for path in sorted(runtime.glob("*.so*")):
        with contextlib.suppress(OSError, ValueError):
            found.update(name.decode("ascii") for name in _named_in(path))
    return tuple(sorted(name for name in found if not (runtime / name).exists()))


def _named_in(path: Path) -> list[bytes]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _NEEDED.findall(data)


def split_needs(
    needs: Iterable[str], libraries: Sequence[Library]
) -> tuple[tuple[Library, ...], tuple[str, ...]]:
    """Pair what an artifact needs with what there is: the libraries to take, the names missing.

    Needs that are not CUDA toolkit libraries are not looked for: ``libcuda.so.1`` comes with the
    driver, and the rest is the operating system's.
    """
    taken: list[Library] = []
    missing: list[str] = []
    for need in _with_pulled_in(needs):
        library = next((one for one in libraries if one.soname == need), None)
        if library is None:
            missing.append(need)
        else:
            taken.append(library)
    return tuple(taken), tuple(missing)


def _with_pulled_in(needs: Iterable[str]) -> tuple[str, ...]:
    wanted: dict[str, None] = {}
    for need in needs:
        matched = _FILE.fullmatch(need)
        if matched:
            wanted[need] = None
            if matched["stem"] in _PULLED_IN:
                wanted[f"lib{_PULLED_IN[matched['stem']]}.so.{matched['major']}"] = None
    return tuple(wanted)


def folders(libraries: Iterable[Library]) -> tuple[Path, ...]:
    """Return the folders for LD_LIBRARY_PATH: each once, none that the linker searches anyway."""
    return tuple(dict.fromkeys(one.folder for one in libraries if one.origin != "ldconfig"))


def packages(sonames: Iterable[str]) -> tuple[str, ...]:
    """Return the packages on PyPI that bring these libraries, each once."""
    found = (pip_package(soname) for soname in sonames)
    return tuple(dict.fromkeys(package for package in found if package))
