"""A small reader of ELF files: sections, dynamic entries and version needs, nothing else.

Why not pyelftools: it trusts counts and links, so that a small damaged file can keep it busy for
hours, and it fails with a dozen kinds of exception (docs/decisions/0010-own-elf-reader.md). Here
every length is checked against the file, every walk has a bound, and there is one error. The unit
tests compare both readers on real files.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple

from farm.errors import InspectError

# Names and numbers: System V ABI, chapters 4 and 5; LSB, "Symbol Versioning".
SHT_DYNAMIC: Final = 6
SHT_NOBITS: Final = 8
SHT_GNU_VERNEED: Final = 0x6FFF_FFFE
DT_NULL, DT_NEEDED, DT_SONAME, DT_RPATH, DT_RUNPATH = 0, 1, 14, 15, 29
_SHN_XINDEX: Final = 0xFFFF
_MACHINES: Final = {62: "x86_64", 183: "aarch64"}

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_DYNAMIC: Final = struct.Struct("<qQ")
_VERNEED: Final = struct.Struct("<HHIII")
_VERNAUX: Final = struct.Struct("<IHHII")

_MAX_TABLE: Final = 64 << 20
"""Bytes of one table that are read into memory; the largest seen (libtorch's strings) has 60 MB."""
_MAX_NAME: Final = 4096
_MAX_SECTIONS: Final = 512 << 10
"""Bytes of the names of all sections."""
_MAX_NAMES: Final = 64 << 10
"""Bytes of the names of all dynamic entries, and of those of all version needs."""
_NAMED: Final = 64
"""Bytes that a name counts more than it has: many entries can have an empty one."""


class Section(NamedTuple):
    """One section: where it lies in the file (bytes) and which other it refers to."""

    name: str
    type: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True)
class ElfFile:
    """A file with a valid header and section table. The caller closes the stream.

    Raises:
        InspectError: ``ELF_CORRUPT``, by every method: what it reads contradicts itself.
    """

    stream: BinaryIO
    size: int
    what: str
    machine: str
    sections: tuple[Section, ...]

    @classmethod
    def open(cls, stream: BinaryIO, what: str) -> ElfFile:
        """Read the header and the section table of a seekable stream.

        Raises:
            InspectError: ``NOT_ELF``, ``ELF_UNSUPPORTED`` (32-bit, big-endian), ``ELF_CORRUPT``
                or ``ELF_NO_SECTIONS``.
        """
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        header = stream.read(_HEADER.size)
        if header[:4] != b"\x7fELF":
            raise InspectError("NOT_ELF", what=what)
        if len(header) < _HEADER.size:
            raise InspectError("ELF_CORRUPT/header", what=what)
        if header[4:6] != b"\x02\x01":
            raise InspectError("ELF_UNSUPPORTED", what=what)
        bare = cls(stream, size, what, "", ())
        _, _, machine, _, _, _, at, _, _, _, _, entry, count, names = _HEADER.unpack(header)
        if at == 0:
            raise InspectError("ELF_NO_SECTIONS", what=what)
        if entry != _SECTION.size:
            raise bare.corrupt(f"section headers of {entry} bytes")
        first = _SECTION.unpack(bare.take(at, _SECTION.size))
        # Counts that do not fit into 16 bits are in the first section header.
        count = count or first[5]
        names = first[6] if names == _SHN_XINDEX else names
        table = bare.take(at, count * _SECTION.size)
        called = _MACHINES.get(machine, f"machine-{machine}")
        return cls(stream, size, what, called, _named(bare, table, names))

    def dynamic(self) -> Iterator[tuple[int, str]]:
        """Yield the dynamic entries that are names: tag and string, in order."""
        section = self._only(SHT_DYNAMIC)
        if section is None:
            return
        strings = self._strings(section)
        data = self.contents(section)
        whole = len(data) - len(data) % _DYNAMIC.size
        for tag, value in _DYNAMIC.iter_unpack(memoryview(data)[:whole]):  # no copy of 64 MiB
            if tag == DT_NULL:
                return
            if tag in (DT_NEEDED, DT_SONAME, DT_RPATH, DT_RUNPATH):
                yield tag, strings.at(value)

    def version_needs(self) -> Iterator[str]:
        """Yield the symbol versions that other libraries must define, such as ``GLIBC_2.34``."""
        section = self._only(SHT_GNU_VERNEED)
        if section is None:
            return
        strings = self._strings(section)
        data = self.contents(section)
        left = len(data) // _VERNAUX.size
        for at, row in self._chain(_VERNEED, data, 0, next_field=4):
            for _, need in self._chain(_VERNAUX, data, at + row[3], next_field=4):
                left -= 1
                if left < 0:
                    raise self.corrupt("version needs are used twice")
                yield strings.at(need[3])

    def contents(self, section: Section) -> bytes:
        """Return a section's bytes (``take``)."""
        return b"" if section.type == SHT_NOBITS else self.take(section.offset, section.size)

    def take(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes at ``offset`` of the file; more than any real table is an error."""
        if size > _MAX_TABLE or offset + size > self.size:
            raise self.corrupt(f"{size} bytes at {offset} are not in the file ({self.size} bytes)")
        self.stream.seek(offset)
        data = self.stream.read(size)
        if len(data) != size:
            raise self.corrupt(f"the file ended while it was read, at byte {offset + len(data)}")
        return data

    def corrupt(self, problem: str) -> InspectError:
        """Return the error for a file that contradicts itself."""
        return InspectError("ELF_CORRUPT", what=self.what, problem=problem)

    def _only(self, kind: int) -> Section | None:
        found = [section for section in self.sections if section.type == kind]
        if len(found) > 1:
            raise self.corrupt(f"{len(found)} sections of type {kind:#x}")
        return found[0] if found else None

    def _strings(self, section: Section) -> _Strings:
        if section.link >= len(self.sections):
            raise self.corrupt(f"{section.name} refers to section {section.link}")
        return _Strings(self, self.contents(self.sections[section.link]), _MAX_NAMES)

    def _chain(
        self, row: struct.Struct, data: bytes, offset: int, *, next_field: int
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield rows, each of which gives the distance to the next; only forward, so it ends."""
        while data:
            if offset + row.size > len(data):
                raise self.corrupt(f"version needs point at {offset} of {len(data)} bytes")
            fields = row.unpack_from(data, offset)
            yield offset, fields
            step = fields[next_field]
            if step == 0:
                return
            if step < row.size:
                raise self.corrupt("version needs overlap")
            offset += step


@dataclass
class _Strings:
    """A string table, of which ``left`` bytes may be read as names."""

    file: ElfFile
    data: bytes
    left: int

    def at(self, offset: int) -> str:
        end = self.data.find(b"\0", offset, offset + _MAX_NAME) if offset < len(self.data) else -1
        if end < 0:
            raise self.file.corrupt(f"there is no name at {offset} of a string table")
        self.left -= end - offset + _NAMED
        if self.left < 0:
            raise self.file.corrupt("it has more names, or longer ones, than any file has")
        try:
            return self.data[offset:end].decode("utf-8")
        except UnicodeDecodeError:
            raise self.file.corrupt(f"the name at {offset} of a string table is not text") from None


def _named(bare: ElfFile, table: bytes, names: int) -> tuple[Section, ...]:
    count = len(table) // _SECTION.size
    if names >= count:
        raise bare.corrupt(f"section names are said to be in section {names} of {count}")
    at = _section("", _SECTION.unpack_from(table, names * _SECTION.size))
    strings = _Strings(bare, bare.contents(at), _MAX_SECTIONS)
    return tuple(_section(strings.at(row[0]), row) for row in _SECTION.iter_unpack(table))


def _section(name: str, row: tuple[int, ...]) -> Section:
    return Section(name, row[1], row[4], row[5], row[6])
