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
_TARGETS: Final = {
    "x86_64": frozenset({"x86_64-linux"}),
    "aarch64": frozenset({"aarch64-linux", "sbsa-linux"}),
}
"""Folders under a toolkit's ``targets`` that are for a machine; others are for cross compiling."""
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
    machine: str = "x86_64",
) -> tuple[Library, ...]:
    """List what is there, in the order in which it is taken: the person's choice first.

    Args:
        library_path: folders of LD_LIBRARY_PATH.
        cache: files that the dynamic linker's cache knows (``linker_cache``).
        python_path: folders that may hold an ``nvidia`` folder of wheels.
        root: where the toolkits are looked for.
        machine: what this machine is called, such as ``x86_64``.
    """
    wheels = [lib for entry in python_path for lib in sorted(entry.glob("nvidia/*/lib"))]
    kits = [lib for pattern in _TOOLKITS for lib in sorted(root.glob(pattern), reverse=True)]
    toolkits = [lib for lib in kits if _is_for(machine, lib.resolve())]
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


def _is_for(machine: str, folder: Path) -> bool:
    """Whether a toolkit's folder holds libraries for this machine, as far as its path says so."""
    target = folder.parent
    return target.parent.name != "targets" or target.name in _TARGETS.get(
        machine, {f"{machine}-linux"}
    )


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
    driver, and the rest is the operating system's. cuBLAS and its cuBLASLt are of one version or
    not taken (``unpaired`` says which), and first: no other folder may come before theirs.
    """
    wanted = _with_pulled_in(needs)
    taken: list[Library] = []
    mismatched: set[str] = set()
    for one, other in _pairs(wanted):
        pair = _pair(one, other, libraries)
        taken += pair
        mismatched |= {one, other} if not pair and _both(one, other, libraries) else set()
    got = {library.soname for library in taken} | mismatched
    rest = [_first(need, libraries, taken) for need in wanted if need not in got]
    taken += [library for library in rest if library]
    there = {library.soname for library in taken}
    return tuple(taken), tuple(need for need in wanted if need not in there)


def unpaired(needs: Iterable[str], libraries: Sequence[Library]) -> str:
    """Say which libraries are here and cannot be taken, because they are of two versions."""
    said = [
        f"{one} ({_described(one, libraries)}) and {other} ({_described(other, libraries)})"
        " are of different versions"
        for one, other in _pairs(tuple(needs))
        if _both(one, other, libraries) and not _pair(one, other, libraries)
    ]
    return ", ".join(said)


def _described(soname: str, libraries: Iterable[Library]) -> str:
    return ", ".join(
        f"{one.version or 'version unknown'} in {one.folder}"
        for one in libraries
        if one.soname == soname
    )


def _pairs(wanted: Sequence[str]) -> list[tuple[str, str]]:
    """Return each cuBLAS that is wanted, with its cuBLASLt."""
    found = [(need, _partner(need)) for need in wanted]
    return [(need, partner) for need, partner in found if partner and partner in wanted]


def _both(one: str, other: str, libraries: Iterable[Library]) -> bool:
    return {one, other} <= {library.soname for library in libraries}


def _pair(one: str, other: str, libraries: Sequence[Library]) -> tuple[Library, ...]:
    """Take the first two of one folder or of one known version; nothing where there is none."""
    for library in (found for found in libraries if found.soname == one):
        partners = [
            found for found in libraries if found.soname == other and _match(library, found)
        ]
        if partners:
            return library, min(partners, key=lambda found: found.folder != library.folder)
    return ()


def _match(one: Library, other: Library) -> bool:
    return one.folder == other.folder or (one.version is not None and one.version == other.version)


def _first(need: str, libraries: Iterable[Library], taken: Sequence[Library]) -> Library | None:
    """Return the first, but none whose folder would hide a library that the linker has to find."""
    found = [one for one in libraries if one.soname == need]
    linked = {one.soname for one in taken if one.origin == "ldconfig"}
    hiding = {one.folder for one in libraries if one.soname in linked and one.origin != "ldconfig"}
    clear = [one for one in found if one.folder not in hiding]
    return next(iter([*clear, *found]), None)


def _with_pulled_in(needs: Iterable[str]) -> tuple[str, ...]:
    known = [need for need in needs if _FILE.fullmatch(need)]
    both = [name for need in known for name in (need, _partner(need)) if name]
    return tuple(dict.fromkeys(both))


def _partner(soname: str) -> str | None:
    """Return what a library pulls in: ``libcublas.so.12`` → ``libcublasLt.so.12``."""
    matched = _FILE.fullmatch(soname)
    pulled = _PULLED_IN.get(matched["stem"]) if matched else None
    return f"lib{pulled}.so.{matched['major']}" if matched and pulled else None


def folders(libraries: Iterable[Library]) -> tuple[Path, ...]:
    """Return the folders for LD_LIBRARY_PATH: each once, none that the linker searches anyway."""
    return tuple(dict.fromkeys(one.folder for one in libraries if one.origin != "ldconfig"))


def packages(sonames: Iterable[str]) -> tuple[str, ...]:
    """Return the packages on PyPI that bring these libraries, each once."""
    found = (pip_package(soname) for soname in sonames)
    return tuple(dict.fromkeys(package for package in found if package))
