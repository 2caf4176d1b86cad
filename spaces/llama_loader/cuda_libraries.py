"""Find the CUDA libraries of this machine: their folders, versions and the packages on PyPI.

A ``cu124`` server asks for ``libcublas.so.12``, a ``cu130`` one for ``libcublas.so.13``. On a
Space they come with torch, in ``site-packages/nvidia``, which the dynamic linker does not search:
the server gets ``LD_LIBRARY_PATH`` with exactly the folders that it needs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
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
"""CUDA majors whose wheels carry it in their name; from 13 on the name is plain."""
_TOOLKITS: Final = (
    "usr/local/cuda*/lib64",
    "usr/local/cuda*/targets/*/lib",
    "cuda-image/usr/local/cuda-13.0/lib64",
    "cuda-image/usr/local/cuda-*/lib64",
    "cuda-image/usr/local/cuda-*/targets/*/lib",
)
_TARGETS: Final = {
    "x86_64": frozenset({"x86_64-linux"}),
    "aarch64": frozenset({"aarch64-linux", "sbsa-linux"}),
}
"""Folders under a toolkit's ``targets`` that are for a machine; others are for cross compiling."""
_DRIVER: Final = "libcuda.so.1"
_LDCONFIG_TIMEOUT: Final = 10.0


@dataclass(frozen=True)
class Library:
    """One CUDA library.

    Attributes:
        soname: what a binary asks for, e.g. ``libcublas.so.12``.
        folder: where it lies.
        version: as exactly as it can be known (``12.8.4.1``), else None.
        origin: ``LD_LIBRARY_PATH``, ``site-packages``, ``ldconfig``, ``toolkit`` or ``release``.
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
    machine: str = "x86_64",
) -> tuple[Library, ...]:
    """List the CUDA libraries, in the order in which they are taken: the person's choice first.

    Args:
        library_path: folders of LD_LIBRARY_PATH.
        cache: files that the dynamic linker's cache knows (``linker_cache``).
        python_path: folders that may hold an ``nvidia`` folder of wheels.
        root: where the toolkits are looked for.
        machine: what this machine is called, such as ``x86_64``.
    """
    wheels = [lib for entry in python_path for lib in sorted(entry.glob("nvidia/*/lib"))]
    kits = [lib for pattern in _TOOLKITS for lib in sorted(root.glob(pattern), reverse=True)]
    places = (
        ("LD_LIBRARY_PATH", library_path),
        ("site-packages", wheels),
        ("ldconfig", dict.fromkeys(path.parent for path in cache if _FILE.fullmatch(path.name))),
        ("toolkit", [lib for lib in kits if _is_for(machine, lib.resolve())]),
    )
    found: dict[tuple[str, Path], Library] = {}
    for origin, folders in places:
        for folder in folders:
            for library in _in_folder(folder, origin):
                # /usr/local/cuda, cuda/lib64 and the like are links to one and the same folder
                found.setdefault((library.soname, library.folder.resolve()), library)
    return tuple(found.values())


def _is_for(machine: str, folder: Path) -> bool:
    """Whether a toolkit's folder is for this machine, as far as its path says."""
    target = folder.parent
    wanted = _TARGETS.get(machine, {f"{machine}-linux"})
    return target.parent.name != "targets" or target.name in wanted


def _in_folder(folder: Path, origin: str) -> list[Library]:
    versions: dict[str, str] = {}
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
    for matched in filter(None, map(_FILE.fullmatch, names)):
        # libcublas.so.12 and libcublas.so.12.8.4.1: the longer one is last
        versions[matched["soname"]] = matched["major"] + matched["rest"]
    return [
        Library(soname, folder, _version(soname, version, folder), origin)
        for soname, version in versions.items()
        if _is_file(folder / soname)
    ]


def _version(soname: str, from_name: str, folder: Path) -> str | None:
    """Return the version in a file's name, else of the wheel that the folder belongs to."""
    if "." in from_name:
        return from_name
    wheels = [f"{package.replace('-', '_')}-*.dist-info" for package in packages([soname])]
    sites = [parent.parent for parent in folder.parents if parent.name == "nvidia"]
    found = (info for site in sites for wheel in wheels for info in site.glob(wheel))
    return next((info.name.removesuffix(".dist-info").split("-")[1] for info in found), None)


def linker_cache(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the files in the dynamic linker's cache, as ``ldconfig -p`` prints them."""
    for program in ("/sbin/ldconfig", "/usr/sbin/ldconfig"):
        done = processes.run([program, "-p"], environ, timeout=_LDCONFIG_TIMEOUT)
        if done.status == 0:
            return tuple(map(Path, re.findall(r"=> (/\S+)$", done.output, re.MULTILINE)))
    return ()


def driver_folders(library_path: Iterable[Path], cache: Iterable[Path]) -> tuple[Path, ...]:
    """Return the folders of LD_LIBRARY_PATH that alone lead to NVIDIA's driver, each once.

    On GKE and NixOS the dynamic linker's cache does not know it. A toolkit's ``stubs`` folder does
    not count: its ``libcuda.so`` is for linking, and a program that loads it finds no GPU.
    """
    known = {path.parent.resolve() for path in cache if path.name == _DRIVER}
    here = [folder for folder in library_path if _is_file(folder / _DRIVER)]
    real = [folder for folder in here if (folder / _DRIVER).resolve().parent.name != "stubs"]
    return tuple(dict.fromkeys(folder for folder in real if folder.resolve() not in known))


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - Path's raises where a folder may not be searched


def packages(sonames: Iterable[str]) -> tuple[str, ...]:
    """Return the packages on PyPI that bring these libraries: for ``libcublas.so.12`` its wheel."""
    found: dict[str, None] = {}
    for matched in filter(None, map(_FILE.fullmatch, sonames)):
        suffix = f"-cu{matched['major']}" if matched["major"] in _SUFFIXED else ""
        found[_PACKAGE[matched["stem"]] + suffix] = None
    return tuple(found)


def read_needs(runtime: Path) -> tuple[str, ...]:
    """Find the CUDA libraries that a foreign archive's own libraries need; it has no manifest.

    A soname lies in the file between two zero bytes, in the dynamic string table; one that the
    runtime brings along itself is not needed.
    """
    found: set[str] = set()
    for path in sorted(runtime.glob("*.so*")):
        with (
            contextlib.suppress(OSError, ValueError),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            found.update(name.decode("ascii") for name in _NEEDED.findall(data))
    return tuple(sorted(name for name in found if not (runtime / name).exists()))


def split_needs(
    needs: Iterable[str], libraries: Sequence[Library]
) -> tuple[tuple[Library, ...], tuple[str, ...]]:
    """Pair what an artifact needs with what there is: the libraries to take, the names missing.

    Needs that are not CUDA toolkit libraries are not looked for: ``libcuda.so.1`` comes with the
    driver, and the rest is the operating system's. cuBLAS and its cuBLASLt are of one version or
    not taken (``unpaired`` says which), and first: no other folder may come before theirs.
    """
    known = [need for need in needs if _FILE.fullmatch(need)]
    wanted = tuple(dict.fromkeys(name for need in known for name in (need, _partner(need))))
    pairs = {need: _pair(need, libraries) for need in wanted}
    taken = [library for pair in pairs.values() for library in pair or ()]
    refused = {name for need in wanted if pairs[need] == () for name in (need, _partner(need))}
    for need in wanted:
        if need not in refused and all(one.soname != need for one in taken):
            taken += _first(need, libraries, taken)
    got = {library.soname for library in taken}
    return tuple(taken), tuple(need for need in wanted if need not in got)


def unpaired(needs: Iterable[str], libraries: Sequence[Library]) -> str:
    """Say which of these libraries exist but cannot be taken, because their versions differ."""

    def described(soname: str) -> str:
        found = [one for one in libraries if one.soname == soname]
        places = [f"{one.version or 'version unknown'} in {one.folder}" for one in found]
        return f"{soname} ({', '.join(places)})"

    return ", ".join(
        f"{described(need)} and {described(_partner(need))} are of different versions"
        for need in needs
        if _pair(need, libraries) == ()
    )


def _partner(soname: str) -> str:
    """Return the cuBLASLt that a cuBLAS needs, which the server does not name; else the same."""
    return soname.replace("libcublas.", "libcublasLt.")


def _pair(soname: str, libraries: Sequence[Library]) -> tuple[Library, ...] | None:
    """Take a cuBLAS and the cuBLASLt of its folder, else of its version.

    Nothing (empty) where no two belong together; None where there is no such pair at all.
    """
    first = [one for one in libraries if one.soname == soname]
    second = [one for one in libraries if one.soname == _partner(soname) != soname]
    for one in first:
        for other in sorted(second, key=lambda found: found.folder != one.folder):
            if one.folder == other.folder or (one.version and one.version == other.version):
                return one, other
    return () if first and second else None


def _first(need: str, libraries: Iterable[Library], taken: Sequence[Library]) -> list[Library]:
    """Take the first, but none whose folder would hide a library that the linker has to find."""
    linked = {one.soname for one in taken if one.origin == "ldconfig"}
    hiding = {one.folder for one in libraries if one.soname in linked and one.origin != "ldconfig"}
    found = [one for one in libraries if one.soname == need]
    return sorted(found, key=lambda one: one.folder in hiding)[:1]


def folders(libraries: Iterable[Library]) -> tuple[Path, ...]:
    """Return the folders for LD_LIBRARY_PATH: each once, none that the linker searches anyway."""
    return tuple(dict.fromkeys(one.folder for one in libraries if one.origin != "ldconfig"))
