"""Two builds of one thing → what differs, down to the ELF section, with what is known to cause it.

Reads files, changes none. The order of the findings is that of the names, so two runs over the
same files say the same.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import msgspec

from farm.binaries.elf_file import SHT_NOBITS, ElfFile, Section
from farm.errors import InspectError, PackError
from farm.pack import BUILD_RECORD, ROOT
from farm.reproduce.differing_bytes import Differing, compare
from farm.tarball import archive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_CAUSES: Final = {
    ".note.gnu.build-id": "the linker's digest of the rest of the file: it follows from what else "
    "differs",
    ".symtab": "symbols' names and places; stripping removes them",
    ".strtab": "symbols' names, with nvcc's temporary files (tmpxft_<process>) among them; "
    "stripping removes them",
    ".comment": "the compiler's version",
    ".nv_fatbin": "machine code or PTX of the GPU",
    ".debug_str": "debug information, which has the build's folders",
    ".debug_line_str": "debug information, which has the build's folders",
}
"""Section → what is known to differ there. Measured: docs/reproducible.md."""
_JSON_SHOWN: Final = 8
_VALUE_SHOWN: Final = 60


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same.

    Attributes:
        path: the file, relative to what was compared.
        what: where in it, and how it differs.
        cause: what is known to make such a difference, empty where nothing is.
    """

    path: str
    what: str
    cause: str = ""

    def render(self) -> str:
        """Return one line."""
        return f"{self.path}: {self.what}" + (f" ({self.cause})" if self.cause else "")


@dataclass(frozen=True)
class _Packed:
    """A tarball, unpacked: its members' headers in order."""

    folder: Path
    headers: tuple[tuple[str, int, int], ...]


def compare_trees(first: Path, second: Path) -> tuple[Difference, ...]:
    """Compare two folders: names, links, modes, bytes.

    Raises:
        OSError: a file cannot be read.
    """
    ours, theirs = _files(first), _files(second)
    found: list[Difference] = []
    for name in sorted({*ours, *theirs}):
        if name in ours and name in theirs:
            found += _compare_entries(name, ours[name], theirs[name])
        else:
            found.append(
                Difference(name, f"only the {'first' if name in ours else 'second'} has it")
            )
    return tuple(found)


def compare_tarballs(first: Path, second: Path) -> tuple[Difference, ...]:
    """Compare two release tarballs: members, their order, modes and times, then their bytes.

    Raises:
        PackError: one of them is damaged, or holds what no release may.
        OSError: a file cannot be read.
    """
    if compare(first, second) is None:
        return ()
    with tempfile.TemporaryDirectory(prefix="llama-farm-compare-") as scratch:
        one, other = (
            _unpack(tarball, Path(scratch) / name)
            for tarball, name in ((first, "first"), (second, "second"))
        )
        found = (*_compare_headers(one, other), *compare_trees(one.folder, other.folder))
    if found:
        return found
    return (
        Difference(
            second.name,
            "the same members in other compressed bytes",
            "the compressor: another version of zstd or zlib, or another level",
        ),
    )


def compare_files(name: str, first: Path, second: Path) -> tuple[Difference, ...]:
    """Compare two files' bytes: by sections where both are ELF, by fields where it is the record.

    Args:
        name: what to call them.
        first: one file.
        second: the other.

    Raises:
        OSError: one cannot be read.
    """
    whole = compare(first, second)
    if whole is None:
        return ()
    if name.rpartition("/")[2] == BUILD_RECORD:
        fields = _compare_json(first.read_bytes(), second.read_bytes())
        if fields is not None:
            return tuple(Difference(name, field, "of the build's record") for field in fields)
    try:
        return _compare_elf(name, first, second) or (
            Difference(name, f"outside of all sections, {whole.render()}"),
        )
    except InspectError:
        return (Difference(name, whole.render(), whole.cause),)


def _files(folder: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(folder)): path
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _compare_entries(name: str, first: Path, second: Path) -> Iterator[Difference]:
    if first.is_symlink() or second.is_symlink():
        targets = [str(path.readlink()) if path.is_symlink() else "" for path in (first, second)]
        if targets[0] != targets[1]:
            shown = " / ".join(f"link to {target}" if target else "file" for target in targets)
            yield Difference(name, f"is not the same kind of thing, or leads elsewhere: {shown}")
        return
    modes = [path.stat().st_mode & 0o7777 for path in (first, second)]
    if modes[0] != modes[1]:
        yield Difference(name, f"mode {modes[0]:04o} / {modes[1]:04o}")
    yield from compare_files(name, first, second)


def _compare_elf(name: str, first: Path, second: Path) -> tuple[Difference, ...]:
    """Compare section by section.

    Raises:
        InspectError: one of them is not ELF, or damaged.
    """
    with ExitStack() as open_files:
        streams = [open_files.enter_context(path.open("rb")) for path in (first, second)]
        ours, theirs = (_sections(ElfFile.open(stream, name)) for stream in streams)
        found = []
        for key in sorted({*ours, *theirs}):
            one, other = ours.get(key), theirs.get(key)
            if one is None or other is None:
                which = "first" if other is None else "second"
                found.append(Difference(name, f"only the {which} has section {key[0]}"))
                continue
            differing = _compare_sections(streams[0], one, streams[1], other)
            if differing is not None:
                cause = differing.cause or _cause(key[0])
                found.append(Difference(name, f"section {key[0]}, {differing.render()}", cause))
        return tuple(found)


def _sections(elf: ElfFile) -> dict[tuple[str, int], Section]:
    """Return sections by name; object files have several of one name, told apart by a number."""
    seen: Counter[str] = Counter()
    found = {}
    for section in elf.sections:
        found[section.name, seen[section.name]] = section
        seen[section.name] += 1
    return found


def _compare_sections(
    first: BinaryIO, one: Section, second: BinaryIO, other: Section
) -> Differing | None:
    sizes = [0 if s.type == SHT_NOBITS else s.size for s in (one, other)]
    return compare(
        (first, one.offset, sizes[0]),
        (second, other.offset, sizes[1]),
    )


def _cause(section: str) -> str:
    if section.startswith(".rela"):
        return "relocations: they follow from what else differs"
    return _CAUSES.get(section, "")


def _unpack(tarball: Path, folder: Path) -> _Packed:
    """Unpack a release's tarball; its members are checked as everywhere (``archive.members``)."""
    headers = []
    try:
        with tarball.open("rb") as raw:
            archive_format = archive.format_of(tarball.name)
            for member in archive.members(raw, archive_format, what=tarball.name, root=ROOT):
                headers.append((member.path, member.mode, member.mtime))
                place = folder / member.path
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as out:
                    while block := member.stream.read(archive.BLOCK):
                        out.write(block)
                place.chmod(member.mode)
    except archive.DAMAGE as error:
        raise PackError("ARCHIVE_DAMAGED", f"{tarball.name}: {error}") from error
    return _Packed(folder, tuple(headers))


def _compare_headers(first: _Packed, second: _Packed) -> Iterator[Difference]:
    """Compare what a folder does not show: the members' order and times. Modes are in the files."""
    names = [[path for path, _, _ in packed.headers] for packed in (first, second)]
    if sorted(names[0]) == sorted(names[1]) and names[0] != names[1]:
        pairs = enumerate(zip_longest(*names))
        number, (one, other) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        yield Difference(
            str(other), f"members in another order: number {number + 1} is {one} / {other}"
        )
    times = [{path: time for path, _, time in packed.headers} for packed in (first, second)]
    for path in sorted(times[0].keys() & times[1].keys()):
        if times[0][path] != times[1][path]:
            yield Difference(path, f"time {times[0][path]} / {times[1][path]} in the archive")


def _compare_json(first: bytes, second: bytes) -> list[str] | None:
    """Name the fields that differ; None where one of them is no JSON, or they say the same."""
    try:
        ours, theirs = (dict(_leaves(msgspec.json.decode(data))) for data in (first, second))
    except msgspec.DecodeError:
        return None
    paths = [path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)]
    found = [f"{path} is {_shown(ours, path)} / {_shown(theirs, path)}" for path in paths]
    if len(found) > _JSON_SHOWN:
        found = [*found[:_JSON_SHOWN], f"and {len(found) - _JSON_SHOWN} fields more"]
    return found or None


def _leaves(value: object, path: str = "$") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{number}]")
    else:
        yield path, value


def _shown(leaves: Mapping[str, Any], path: str) -> str:
    return f"{leaves[path]!r:.{_VALUE_SHOWN}}" if path in leaves else "not there"
