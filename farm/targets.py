"""Rows of ``build/targets.toml`` → frozen lines, architecture sets and groups.

Reads only the file that it is given. It refuses every combination that cannot be built, before
anything starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec
import tomllib
from msgspec import Meta

from farm import MACHINE, PROJECT_ROOT
from farm.errors import UsageError, remark
from farm.tarball.archive import FORMATS
from llama_loader.manifest import CUDA_RUNTIME

TARGETS_FILE: Final = PROJECT_ROOT / "build" / "targets.toml"
DEFAULT_LINE: Final = "cu128"
_OF_AARCH64: Final = 121
"""The GB10, which no computer with an x86-64 processor has."""

_Row = TypeVar("_Row")
_IMAGE_TOOLKIT: Final = re.compile(r"(?:^|/)cuda:([0-9]{1,4}\.[0-9]{1,4})(?:\.[0-9]+)*-")
"""The toolkit's version in the tag of NVIDIA's images, ``nvidia/cuda:12.4.1-devel-ubuntu22.04``."""
_LINE_NAME: Final = re.compile(r"cu([0-9]{2})([0-9]{1,2})")
_ARCH: Final = re.compile(r"(?P<number>[0-9]{2,3})(?P<suffix>[af]?)(?P<kind>-real|-virtual)?")

Version = Annotated[str, Meta(pattern=r"\A[0-9]{1,4}(\.[0-9]{1,4})+\Z")]
Release = Annotated[str, Meta(pattern=r"\A[0-9]{1,4}\.[0-9]{1,4}\Z")]


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One toolkit on one devel image. ``oldest``/``newest`` are compute capabilities times ten.

    ``codes`` are those between them that its nvcc lists, where it was asked.
    ``image`` is empty for a line that is not in the table: ``--image`` or a local toolkit then
    brings the compiler. ``glibc`` and ``glibcxx`` are the newest that its binaries may need.
    """

    image: str
    glibc: Version
    glibcxx: Version
    toolkit: Release | None = None
    min_driver: Version | None = None
    oldest: int = 0
    newest: int = 0
    codes: tuple[int, ...] = ()
    name: str = ""
    machine: str = MACHINE

    @property
    def span(self) -> str:
        """The architectures that it can build, for messages."""
        return ", ".join(map(str, sorted(self.codes))) or f"{self.oldest} to {self.newest}"

    @property
    def is_cuda(self) -> bool:
        """Whether binaries of this line hold CUDA code."""
        return self.toolkit is not None

    def accepts_toolkit(self, version: str) -> bool:
        """Whether a toolkit of this ``major.minor`` can build this line."""
        return self.toolkit == ".".join(version.split(".")[:2])


class Arch(msgspec.Struct, frozen=True, order=True):
    """One entry of CMAKE_CUDA_ARCHITECTURES: which code it makes for which architecture."""

    number: int
    suffix: str
    sass: bool
    ptx: bool

    @property
    def name(self) -> str:
        """The architecture without its dot, e.g. ``90`` or ``120a``."""
        return f"{self.number}{self.suffix}"


class ArchSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The architectures of one build. ``archs`` is passed to CMake unchanged; empty for the CPU."""

    name: str
    archs: str
    format: str = "tar.zst"

    @property
    def parsed(self) -> tuple[Arch, ...]:
        """The entries of ``archs``, in order."""
        return parse_archs(self.archs) if self.archs else ()

    @property
    def sass(self) -> frozenset[str]:
        """Architectures whose machine code the binaries must hold."""
        return frozenset(arch.name for arch in self.parsed if arch.sass)

    @property
    def ptx(self) -> frozenset[str]:
        """Architectures whose PTX the binaries must hold."""
        return frozenset(arch.name for arch in self.parsed if arch.ptx)


class CudaMajor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """NVIDIA's data on one major version of CUDA; ``targets.toml`` names the sources.

    ``newest`` has pairs of a minor version and the newest compute capability from then on;
    ``checked`` is the newest minor version that the row was compared with.
    """

    min_driver: Version
    oldest: int
    newest: tuple[tuple[int, int], ...]
    checked: int


class Targets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a person can name; ``release``: the sets of each line in a release."""

    lines: dict[str, Line]
    sets: dict[str, ArchSet]
    groups: dict[str, tuple[str, ...]]
    cuda: dict[str, CudaMajor]
    release: dict[str, tuple[str, ...]] = {}

    def line(self, name: str) -> Line:
        """Return the line called ``name``, of the table or of any other toolkit (``cu126``).

        Raises:
            UsageError: no line and no toolkit can have that name.
        """
        match = _LINE_NAME.fullmatch(name)
        if name not in self.lines and match and match[1] in self.cuda:
            return self._line_of(f"{match[1]}.{match[2]}")
        return _look_up("line", name, self.lines, others=("any cu12N or cu13N with its --image",))

    def line_of_toolkit(self, version: str, *, what: str) -> Line:
        """Return the line of a toolkit; ``what`` contains the toolkit, for the error.

        Raises:
            UsageError: the farm does not build for its major version.
        """
        for line in self.lines.values():
            if line.toolkit == version:
                return line
        if version.split(".", maxsplit=1)[0] not in self.cuda:
            raise UsageError(
                "LINE_OF_IMAGE_UNKNOWN", what=what, version=version, cuda=" and ".join(self.cuda)
            )
        return self._line_of(version)

    def unchecked(self, line: Line) -> str | None:
        """Return a note if the minor version is newer than the table, else None."""
        major, minor = line.toolkit.split(".") if line.toolkit else ("", "0")
        row = self.cuda.get(major)
        if row is None or int(minor) <= row.checked:
            return None
        archs = "its own nvcc lists" if line.codes else f"CUDA {major}.{row.checked} has"
        return remark("CUDA_MINOR_UNCHECKED", line=line, major=major, row=row, archs=archs)

    def _line_of(self, version: str) -> Line:
        major, minor = version.split(".")
        promise = self.lines[DEFAULT_LINE]
        return _with_cuda(
            Line("", promise.glibc, promise.glibcxx, version, name=f"cu{major}{minor}"), self.cuda
        )

    def line_of_image(self, image: str | None) -> Line | None:
        """Return the line of a devel image by its tag; None if the tag does not tell.

        Raises:
            UsageError: the tag names a CUDA that the farm does not build for.
        """
        version = _IMAGE_TOOLKIT.search(image or "")
        return self.line_of_toolkit(version[1], what=str(image)) if version else None

    def release_rows(self) -> tuple[dict[str, str], ...]:
        """Return one row for each tarball of a release: ``line``, ``set``, and the verb for it."""
        rows = []
        for line, name in ((line, name) for line, names in self.release.items() for name in names):
            verb = CUDA_RUNTIME
            if name != CUDA_RUNTIME:
                verb = "build-cuda" if self.sets[name].archs else "build-cpu"
            rows.append({"line": line, "set": name, "verb": verb})
        return tuple(rows)

    def resolve(self, name: str) -> tuple[ArchSet, ...]:
        """Return the sets that ``name`` (a set, or a group of sets) means.

        Raises:
            UsageError: neither a set nor a group is called so.
        """
        if name in self.groups:
            return tuple(self.sets[member] for member in self.groups[name])
        return (_look_up("arch set", name, self.sets, others=self.groups),)

    def custom(self, archs: str) -> ArchSet:
        """Return the set of ``--archs``: the table's own, else one named after the list.

        Raises:
            UsageError: ``archs`` cannot be parsed.
        """
        parsed = parse_archs(archs)
        listed = ";".join(entry.strip() for entry in archs.split(";") if entry.strip())
        for known in self.sets.values():
            if known.archs == listed:
                return known
        kinds = {(True, True): "", (True, False): "real", (False, True): "virtual"}
        names = [(arch.name, kinds[arch.sass, arch.ptx]) for arch in parsed]
        if len(names) > 1:
            return ArchSet("sm" + "-".join(map("".join, names)), listed, "tar.gz")
        ((name, kind),) = names
        return ArchSet(f"sm{name}" + {"": "-ptx", "virtual": "-virtual"}.get(kind, ""), listed)


def load(path: Path = TARGETS_FILE) -> Targets:
    """Read ``targets.toml``.

    Raises:
        UsageError: the file is missing or malformed; names the key.
    """
    try:
        where = path.name
        tree = tomllib.loads(path.read_text("utf-8"))
        for table, kind in (("lines", Line), ("sets", ArchSet)):
            for name, row in tree[table].items():
                where = f"{path.name}: {table}.{name}"
                tree[table][name] = msgspec.convert({**row, "name": name}, kind)
        where = path.name
        told = msgspec.convert(tree, Targets)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UsageError("TARGETS_INVALID", name=where, error=error) from error
    lines = {name: _with_cuda(line, told.cuda) for name, line in told.lines.items()}
    targets = msgspec.structs.replace(told, lines=lines)
    _check_rows(targets, path.name)
    return targets


def parse_archs(text: str) -> tuple[Arch, ...]:
    """Parse what ``CMAKE_CUDA_ARCHITECTURES`` takes: ``80;90-real;120a-real;75-virtual``.

    Raises:
        UsageError: an entry is not an architecture, or there is none; names the entry.
    """
    entries = [entry.strip() for entry in text.split(";") if entry.strip()]
    if not entries:
        raise UsageError("ARCHS_INVALID/empty")
    found = []
    for entry in entries:
        match = _ARCH.fullmatch(entry)
        if match is None:
            raise UsageError("ARCHS_INVALID", text=text, entry=entry)
        number, suffix, kind = match.groups()
        found.append(Arch(int(number), suffix, sass=kind != "-virtual", ptx=kind != "-real"))
    return tuple(found)


def check_buildable(line: Line, arch_set: ArchSet) -> None:
    """Refuse a set that the line's nvcc has no code generator for.

    Raises:
        UsageError: names the architecture, the line, and what it can build.
    """
    if not arch_set.archs:
        return
    if not line.is_cuda:
        raise UsageError("LINE_HAS_NO_CUDA", line=line.name, arch_set=arch_set.name)
    for arch in arch_set.parsed:
        if arch.number not in (line.codes or range(line.oldest, line.newest + 1)):
            raise UsageError("ARCH_NOT_IN_LINE", line=line, arch=arch.name)


def _with_cuda(line: Line, cuda: Mapping[str, CudaMajor]) -> Line:
    """Add the driver and the architectures, which the toolkit's major version decides."""
    if line.toolkit is None:
        return line
    major, minor = line.toolkit.split(".")
    row = cuda.get(major)
    newest = [newest for since, newest in row.newest if since <= int(minor)] if row else []
    if row is None or not newest:
        raise UsageError("TARGETS_INVALID/table", name=line.name, major=major)
    return msgspec.structs.replace(
        line, min_driver=row.min_driver, oldest=row.oldest, newest=max(newest)
    )


def _look_up(kind: str, name: str, rows: Mapping[str, _Row], *, others: Iterable[str] = ()) -> _Row:
    if name in rows:
        return rows[name]
    raise UsageError(
        f"{kind.upper().replace(' ', '_')}_UNKNOWN",
        f"there is no {kind} {name!r}",
        hint=f"there is {', '.join([*rows, *others])} (invoke targets says what each is)",
    )


def _check_rows(targets: Targets, file: str) -> None:
    for name, row in targets.sets.items():
        if row.format not in FORMATS:
            raise UsageError("TARGETS_INVALID/format", file=file, name=name, formats=FORMATS)
        try:
            parsed = row.parsed
        except UsageError as error:
            raise UsageError(
                "TARGETS_INVALID/archs", file=file, row=row, hint=error.hint
            ) from error
        if _OF_AARCH64 in (arch.number for arch in parsed):
            raise UsageError("TARGETS_INVALID/machine", file=file, row=row)
    for name, members in targets.groups.items():
        _require_sets(targets, members, f"{file}: groups.{name}")
    for name, members in targets.release.items():
        where = f"{file}: release.{name}"
        if name not in targets.lines:
            raise UsageError("TARGETS_INVALID/line", where=where)
        sets = [member for member in members if member != CUDA_RUNTIME]
        _require_sets(targets, sets, where)
        for member in sets:
            check_buildable(targets.lines[name], targets.sets[member])


def _require_sets(targets: Targets, names: Iterable[str], where: str) -> None:
    unknown = [name for name in names if name not in targets.sets]
    if unknown:
        raise UsageError("TARGETS_INVALID/set", where=where, unknown=unknown[0])
