"""Read what a binary contains and needs. ``python -m farm.elf FILE…`` prints it as JSON.

``inspect`` reads one file, ``merge`` sums up a package, ``check`` compares it with what was asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from farm import elf_file, fatbin
from farm.elf_file import ElfFile
from farm.errors import FarmError, InspectError, PackError, UsageError
from llama_loader.errors import tell

if TYPE_CHECKING:
    from farm.tarball.build_record import LineRecord

_CODE_SECTIONS: Final = frozenset({"nv_fatbin", "nv_relfatbin"})
"""``.nv_fatbin`` for whole programs, ``__nv_relfatbin`` for relocatable device code."""
_REGISTRATION: Final = ".nvFatBinSegment"
"""Tells the CUDA runtime where the containers are."""

_VERSION_NEED: Final = re.compile(
    r"(?P<family>GLIBC|GLIBCXX)_(?P<version>[0-9]{1,9}(?:\.[0-9]{1,9})*)"
)
_GLIBC_MARKS: Final = {"GLIBC_ABI_DT_RELR": "2.36"}
"""Version needs without a number, and the first glibc that has them (release notes of 2.36)."""

_SYSTEM: Final = re.compile(
    r"lib(?:c|m|dl|pthread|rt|util)\.so\.[0-9]+|libstdc\+\+\.so\.6|libgcc_s\.so\.1"
    r"|ld-linux-[a-z0-9-]+\.so\.[0-9]+"
)
"""glibc, libstdc++ and libgcc: their versions are those in ``platform``."""
_ALLOWED: Final = re.compile(rf"(?:{_SYSTEM.pattern}|libgomp\.so\.1)")
_DRIVER: Final = "libcuda.so.1"
_TURNED_BY_GGML: Final = re.compile("12[0-9]")
MOST_BINARIES: Final = 200
"""The facts of each, up to half a MB, are kept until all are merged. The largest release has
fewer than 60; llama.cpp's own archives have all of its tools."""
_CUDA_LIBRARIES: Final = ("libcudart", "libcublas", "libcublasLt")


@dataclass(frozen=True)
class Inspection:
    """The content and the needs of one binary.

    Attributes:
        file: the file's name, without folders.
        machine: what it runs on, e.g. ``x86_64``.
        sass, ptx: architectures of its machine code and of its PTX, e.g. ``("90",)``.
        code: the same in more detail.
        glibc, glibcxx: highest ``GLIBC_``/``GLIBCXX_`` version need, None where there is none.
        marks: version needs of glibc that have no number, e.g. ``GLIBC_PRIVATE``.
        needs: ``DT_NEEDED`` in order.
        soname, runpath, rpath: ``DT_SONAME``, ``DT_RUNPATH``, ``DT_RPATH``, None where absent.
    """

    file: str
    machine: str
    code: fatbin.Contents
    glibc: str | None
    glibcxx: str | None
    marks: tuple[str, ...]
    needs: tuple[str, ...]
    soname: str | None
    runpath: str | None
    rpath: str | None

    @property
    def sass(self) -> tuple[str, ...]:
        """Architectures whose machine code it holds."""
        return self.code.sass

    @property
    def ptx(self) -> tuple[str, ...]:
        """Architectures whose PTX it holds."""
        return self.code.ptx

    def as_json(self) -> dict[str, object]:
        """Return what ``python -m farm.elf`` prints; a contract (docs/manifest.md)."""
        return {
            "file": self.file,
            "machine": self.machine,
            "sass": self.sass,
            "ptx": self.ptx,
            "other_code": self.code.other,
            "partial_code": self.code.partial,
            "cuda_objects": self.code.containers,
            "glibc": self.glibc,
            "glibcxx": self.glibcxx,
            "needs": self.needs,
            "soname": self.soname,
            "runpath": self.runpath,
            "rpath": self.rpath,
        }


@dataclass(frozen=True)
class Merged:
    """The content and the needs of all binaries of a package.

    Attributes:
        machines: what they run on; one, where all is well.
        sass, ptx, glibc, glibcxx: as in ``Inspection``, over all files.
        needs: libraries that the host must have, in order; those that are in the package and
            glibc's, libstdc++'s and libgcc's own are left out.
    """

    machines: tuple[str, ...]
    sass: tuple[str, ...]
    ptx: tuple[str, ...]
    glibc: str | None
    glibcxx: str | None
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """The requested content of the binaries: exactly this code, and no need beyond the line's."""

    sass: AbstractSet[str]
    ptx: AbstractSet[str]
    line: LineRecord


def inspect(path: Path) -> Inspection:
    """Inspect one program, shared library or object file.

    Raises:
        UsageError: ``FILE_MISSING``: there is no such file, or it cannot be read.
        InspectError: it is no ELF file, or it is damaged.
    """
    if path.exists() and not path.is_file():
        raise UsageError("FILE_MISSING", path=path)
    try:
        with path.open("rb") as stream:
            # as text that JSON can hold, also where the name is not UTF-8
            name = path.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            return inspect_stream(stream, name)
    except OSError as error:
        why = error.strerror or error
        raise UsageError("FILE_MISSING/unreadable", path=path, strerror=why) from error


def inspect_stream(stream: BinaryIO, name: str) -> Inspection:
    """Inspect a seekable stream as ``inspect`` does; ``name`` is the file's."""
    elf = ElfFile.open(stream, name)
    dynamic = list(elf.dynamic())
    versions = set(elf.version_needs())
    numbered = {version for version in versions if _VERSION_NEED.fullmatch(version)}
    return Inspection(
        file=name,
        machine=elf.machine,
        code=_code(elf),
        glibc=_highest(_numbered(versions, "GLIBC")),
        glibcxx=_highest(_numbered(versions, "GLIBCXX")),
        marks=tuple(sorted(v for v in versions - numbered if v.startswith("GLIBC_"))),
        needs=tuple(value for tag, value in dynamic if tag == elf_file.DT_NEEDED),
        soname=_one(elf, dynamic, elf_file.DT_SONAME),
        runpath=_one(elf, dynamic, elf_file.DT_RUNPATH),
        rpath=_one(elf, dynamic, elf_file.DT_RPATH),
    )


def require_few(found: Sequence[Inspection], what: str) -> None:
    """Refuse more binaries than ``MOST_BINARIES``, or more code than one may have in all of them.

    Raises:
        PackError: ``ARCHIVE_UNSOUND``.
    """
    if len(found) > MOST_BINARIES or sum(one.code.pieces for one in found) > fatbin.MOST_READS:
        code = f"{fatbin.MOST_READS} pieces of CUDA code"
        most = f"more than {MOST_BINARIES} programs and libraries, or {code}"
        raise PackError("ARCHIVE_UNSOUND/most", what=what, most=most)


def merge(inspections: Sequence[Inspection]) -> Merged:
    """Sum up the binaries of one package; a file is known by its ``file`` name."""
    inside = {inspection.file for inspection in inspections}
    needed = {need for inspection in inspections for need in inspection.needs}
    return Merged(
        machines=tuple(sorted({i.machine for i in inspections})),
        sass=fatbin.sort_archs(arch for i in inspections for arch in i.sass),
        ptx=fatbin.sort_archs(arch for i in inspections for arch in i.ptx),
        glibc=_highest(i.glibc for i in inspections if i.glibc),
        glibcxx=_highest(i.glibcxx for i in inspections if i.glibcxx),
        needs=tuple(sorted(n for n in needed - inside if not _SYSTEM.fullmatch(n))),
    )


def check(inspections: Sequence[Inspection], asked: Asked) -> None:
    """Refuse a package whose binaries are not what their set and line say.

    Raises:
        InspectError: ``ARCH_MISSING``, ``ARCH_PARTIAL``, ``CODE_NOT_ASKED``, ``GLIBC_TOO_NEW``,
            ``RUNPATH_NOT_ORIGIN``, ``LIBRARY_NOT_ALLOWED``, ``DRIVER_SHIPPED`` or
            ``MACHINE_DIFFERS``.
    """
    for inspection in inspections:
        if inspection.rpath is not None or inspection.runpath not in (None, "$ORIGIN"):
            kind = "RUNPATH" if inspection.rpath is None else "RPATH"
            value = inspection.runpath if inspection.rpath is None else inspection.rpath
            raise InspectError("RUNPATH_NOT_ORIGIN", file=inspection.file, kind=kind, value=value)
        check_line(inspection, asked.line)
    merged = merge(inspections)
    _check_libraries(inspections, merged, asked.line.toolkit)
    _check_code("machine code (SASS)", merged.sass, asked.sass)
    _check_code("PTX", merged.ptx, asked.ptx)
    for file, code in ((inspection.file, inspection.code) for inspection in inspections):
        if code.gaps:
            gaps = ", ".join(f"{gap.code} is missing in {gap.lacking}" for gap in code.gaps)
            objects = code.containers + code.empty
            raise InspectError("ARCH_PARTIAL", file=file, objects=objects, gaps=gaps)
        if code.other:
            raise InspectError("CODE_NOT_ASKED/whole", file=file, other=", ".join(code.other))


def version_key(version: str) -> tuple[int, ...]:
    """Return the key by which dotted versions are compared."""
    return tuple(int(part) for part in version.split("."))


def _code(elf: ElfFile) -> fatbin.Contents:
    sections = [s for s in elf.sections if s.name.lstrip("._") in _CODE_SECTIONS]
    registration = [s for s in elf.sections if s.name == _REGISTRATION]
    for section in sections:
        if section.type == elf_file.SHT_NOBITS:
            raise InspectError("CODE_STRIPPED", what=elf.what)
        if section.offset + section.size > elf.size:
            raise elf.corrupt(f"section {section.name} runs past the end of the file")
    if sum(section.size for section in (*sections, *registration)) > elf.size:
        raise elf.corrupt("its sections of CUDA code overlap")
    if (size := sum(section.size for section in registration)) > fatbin.MOST_REGISTRATION:
        raise elf.corrupt(f"{_REGISTRATION} has {size} bytes, more than any has")
    registered = fatbin.read_registration(b"".join(map(elf.contents, registration)))
    spans = [(section.offset, section.size) for section in sections]
    found = fatbin.read(elf.stream, spans, what=elf.what, links=registered.links)
    if found.containers + found.empty < registered.containers:
        raise elf.corrupt(
            f"{_REGISTRATION} registers {registered.containers} CUDA objects; "
            f"{found.containers + found.empty} are there"
        )
    return found


def _numbered(versions: Iterable[str], family: str) -> list[str]:
    matches = [_VERSION_NEED.fullmatch(version) for version in versions]
    found = [m["version"] for m in matches if m and m["family"] == family]
    marks = [_GLIBC_MARKS[v] for v in versions if family == "GLIBC" and v in _GLIBC_MARKS]
    return found + marks


def _highest(versions: Iterable[str]) -> str | None:
    return max(versions, key=version_key, default=None)


def _one(elf: ElfFile, dynamic: list[tuple[int, str]], tag: int) -> str | None:
    values = [value for found, value in dynamic if found == tag]
    if len(values) > 1:
        # The linker writes one; glibc takes the last where there are more, other tools the first.
        raise elf.corrupt(f"{len(values)} dynamic entries with tag {tag}: {', '.join(values)}")
    return values[0] if values else None


def check_line(inspection: Inspection, line: LineRecord) -> None:
    """Refuse a binary for another machine or a newer glibc than its line promises.

    Raises:
        InspectError: ``MACHINE_DIFFERS`` or ``GLIBC_TOO_NEW``.
    """
    if inspection.machine != line.machine:
        raise InspectError("MACHINE_DIFFERS", found=inspection, needs=line.machine)
    unknown = [mark for mark in inspection.marks if mark not in _GLIBC_MARKS]
    if unknown:
        raise InspectError("GLIBC_TOO_NEW", file=inspection.file, unknown=unknown[0])
    if inspection.glibc and version_key(inspection.glibc) > version_key(line.glibc):
        raise InspectError("GLIBC_TOO_NEW/line", found=inspection, promised=line.glibc)


def _check_libraries(
    inspections: Sequence[Inspection], merged: Merged, toolkit: str | None
) -> None:
    shipped = [i.file for i in inspections if i.file.startswith("libcuda.so")]
    if shipped:
        raise InspectError("DRIVER_SHIPPED", shipped=shipped[0])
    major = toolkit.split(".")[0] if toolkit else ""
    cuda = {_DRIVER, *(f"{name}.so.{major}" for name in _CUDA_LIBRARIES)} if toolkit else set()
    refused = [one for one in merged.needs if not (_ALLOWED.fullmatch(one) or one in cuda)]
    if refused:
        by = ", ".join(i.file for i in inspections if refused[0] in i.needs)
        raise InspectError("LIBRARY_NOT_ALLOWED", by=by, refused=refused[0])


def _check_code(kind: str, held: tuple[str, ...], asked: AbstractSet[str]) -> None:
    # ggml-cuda's CMakeLists.txt makes 12Xa of a plain 12X
    turned = {arch for arch in asked if arch not in held and _TURNED_BY_GGML.fullmatch(arch)}
    answers = {arch: f"{arch}a" if arch in turned else arch for arch in asked}
    missing = [arch for arch in fatbin.sort_archs(asked) if answers[arch] not in held]
    if missing:
        raise InspectError("ARCH_MISSING", kind=kind, missing=", ".join(missing), held=_list(held))
    extra = [arch for arch in held if arch not in answers.values()]
    if extra:
        told = _list(tuple(asked))
        raise InspectError("CODE_NOT_ASKED", kind=kind, extra=", ".join(extra), asked=told)


def _list(archs: tuple[str, ...]) -> str:
    return ", ".join(fatbin.sort_archs(archs)) or "none"


def main(arguments: Sequence[str]) -> int:
    """Print what each file holds and needs; return the exit status."""
    try:
        if not arguments or any(argument.startswith("-") for argument in arguments):
            raise UsageError("USAGE")
        found = [inspect(Path(argument)).as_json() for argument in arguments]
    except FarmError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_status
    text = msgspec.json.encode(found[0] if len(found) == 1 else found)
    tell(sys.stdout, msgspec.json.format(text, indent=2).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
