"""Reads ``.nv_fatbin``: which CUDA code a binary holds. Pure; no CUDA tool is needed.

A section is a row of containers, one for each CUDA object, each 8-aligned::

    +0  u32 magic 0xBA55ED50   +4  u16 version   +6  u16 header bytes   +8  u64 payload bytes

and a container's payload is a row of entries::

    +0  u16 kind   +4  u32 header bytes   +8  u64 payload bytes   +16 u32 compressed bytes
    +28 u32 architecture   +40 u64 flags   +56 u64 uncompressed bytes

NVIDIA does not document the format. It was learned from the output of nvcc 13.0 and compared with
what cuobjdump lists, and with libraries of CUDA 11, 12.0, 12.4 and 12.8 (docs/fatbin.md). Payloads
are skipped: a section of any size needs little memory, and compressed entries no decompressor.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple

from farm.errors import InspectError

MAGIC: Final = 0xBA55ED50
CONTAINER_VERSION: Final = 1
KIND_PTX: Final = 1
KIND_SASS: Final = 2
_KINDS: Final = {KIND_PTX: "ptx", KIND_SASS: "sass"}
FLAG_ARCH_SPECIFIC: Final = 0x10_0000
"""``90a``, ``120a``: compiled for one architecture's own instructions."""
FLAG_FAMILY_SPECIFIC: Final = 0x20_0000
"""``100f``: compiled for what a family of architectures shares."""

ALIGNMENT: Final = 8
_CONTAINER: Final = struct.Struct("<IHHQ")
_ENTRY: Final = struct.Struct("<HHIQ12xI8xQ")
_ENTRY_BYTES: Final = 64
"""The shortest entry header seen; longer ones carry options and a file name."""
_BLOCK: Final = 1 << 16
MOST_READS: Final = 200_000
"""Headers and paddings that are read of a file; cuBLASLt 13.10 has 10,942, of 2,638 containers."""
MOST_REGISTRATION: Final = 8 << 20
"""Bytes of ``.nvFatBinSegment``, 24 for each container; cuBLASLt has 2,638 containers."""
_MOST_CODES: Final = 1_000
_WRAPPER: Final = struct.Struct("<II16x")
"""An entry of ``.nvFatBinSegment``, one for each container: magic, version, two addresses."""
_WRAPPER_MAGIC: Final = 0x466243B1
_WRAPPER_OF_A_LINK: Final = 2
"""The version in a device link's entry; an object's is 1 (seen with nvcc 12.4 and 13.0)."""
_ARCHS: Final = range(10, 1000)
"""Compute capability times ten. Anything else means that this is no entry header."""


@dataclass(frozen=True)
class FatbinEntry:
    """One piece of code: its ``kind``, and its ``arch`` (``90``, ``120a``)."""

    kind: int
    arch: str


@dataclass(frozen=True)
class Registered:
    """The ``containers`` registered with the CUDA runtime, and how many device ``links`` made."""

    containers: int = 0
    links: int = 0


class Gap(NamedTuple):
    """Code that some objects hold and others lack, as ``sass 90``, and how many lack it."""

    code: str
    lacking: int


@dataclass(frozen=True)
class Contents:
    """What the containers of one binary hold together.

    Attributes:
        sass: architectures with machine code in any container, in order.
        ptx: architectures with PTX in any container, in order.
        other: entries of neither kind (8: LTO code), as ``kind 8 for 90``.
        gaps: code that some containers hold and others lack. A device link's container never
            has PTX, and nothing at all where only PTX was linked: that is no gap.
        containers: how many hold code.
        empty: how many hold none: a device link of PTX leaves one.
        pieces: containers and entries.
        entries: how many there are of each kind and architecture, as ``("sass 90", 144)``;
            cuobjdump lists a line for each.
    """

    sass: tuple[str, ...] = ()
    ptx: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()
    containers: int = 0
    empty: int = 0
    pieces: int = 0
    entries: tuple[tuple[str, int], ...] = ()

    @property
    def partial(self) -> tuple[str, ...]:
        """Code that some containers hold and others lack, as ``sass 90``."""
        return tuple(gap.code for gap in self.gaps)


def read(
    stream: BinaryIO, sections: Iterable[tuple[int, int]], *, what: str, links: int = 0
) -> Contents:
    """Read a seekable binary's sections, which are given as offset and size in bytes.

    ``links`` of its containers were made by device links (``Registered.links``).

    Raises:
        InspectError: ``FATBIN_CORRUPT``; names ``what`` and the offset in the section.
    """
    reads = iter(range(MOST_READS))
    spans = [_Section(stream, start, size, what, reads) for start, size in sections]
    found = _summarize((entries for span in spans for entries in _containers(span)), links)
    if len(found.entries) > _MOST_CODES:
        raise spans[0].corrupt(0, f"{len(found.entries)} kinds of code, more than any has")
    return found


def read_registration(data: bytes) -> Registered:
    """Read ``.nvFatBinSegment``, a section of its own, which remains if the code is lost."""
    whole = len(data) - len(data) % _WRAPPER.size
    of_a_link = (_WRAPPER_MAGIC, _WRAPPER_OF_A_LINK)
    return Registered(
        containers=-(-len(data) // _WRAPPER.size),
        links=sum(row == of_a_link for row in _WRAPPER.iter_unpack(data[:whole])),
    )


def _summarize(found: Iterable[tuple[FatbinEntry, ...]], links: int) -> Contents:
    """Sum containers up, one by one: there may be many."""
    entries, holding, kinds = Counter[FatbinEntry](), Counter[FatbinEntry](), Counter[int]()
    count = empty = 0
    for one in found:
        entries.update(one)
        holding.update(set(one))
        kinds.update({entry.kind for entry in one})
        count += 1
        empty += not one

    def archs(kind: int) -> tuple[str, ...]:
        return sort_archs(entry.arch for entry in entries if entry.kind == kind)

    def gaps(kind: int, excused: int) -> Iterator[Gap]:
        """Yield what some containers lack; ``excused`` containers may be empty."""
        owing = count - min(excused, count - kinds[kind])
        for entry in (FatbinEntry(kind, arch) for arch in archs(kind)):
            if lacking := owing - holding[entry]:
                yield Gap(_code_name(entry), lacking)

    return Contents(
        sass=archs(KIND_SASS),
        ptx=archs(KIND_PTX),
        other=tuple(sorted(f"kind {e.kind} for {e.arch}" for e in entries if e.kind not in _KINDS)),
        gaps=(*gaps(KIND_SASS, min(links, empty)), *gaps(KIND_PTX, links)),
        containers=count - empty,
        empty=empty,
        pieces=count + entries.total(),
        entries=tuple(sorted((_code_name(entry), times) for entry, times in entries.items())),
    )


def _code_name(entry: FatbinEntry) -> str:
    return f"{_KINDS.get(entry.kind, f'kind {entry.kind}')} {entry.arch}"


def sort_archs(archs: Iterable[str]) -> tuple[str, ...]:
    """Return architectures by number, then suffix: 75, 90, 90a, 120a."""
    return tuple(sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch)))


@dataclass(frozen=True)
class _Section:
    """A part of a stream: every read is checked against its size.

    The file's sections share ``reads``, which end.
    """

    stream: BinaryIO
    start: int
    size: int
    what: str
    reads: Iterator[int]

    def take(self, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            raise self.corrupt(offset, f"{size} bytes are needed, {self.size - offset} are left")
        if next(self.reads, None) is None:
            raise self.corrupt(offset, f"more than {MOST_READS} containers and entries")
        self.stream.seek(self.start + offset)
        data = self.stream.read(size)
        if len(data) != size:
            raise self.corrupt(offset, "the file ends inside the section")
        return data

    def corrupt(self, offset: int, problem: str) -> InspectError:
        return InspectError("FATBIN_CORRUPT", what=self.what, offset=offset, problem=problem)


def _containers(section: _Section) -> Iterator[tuple[FatbinEntry, ...]]:
    offset = _skip_padding(section, 0)
    while offset < section.size:
        magic, version, header, payload = _CONTAINER.unpack(section.take(offset, _CONTAINER.size))
        if magic != MAGIC:
            raise section.corrupt(offset, f"no container starts here (magic {magic:#010x})")
        if version != CONTAINER_VERSION or header < _CONTAINER.size:
            raise section.corrupt(offset, f"container version {version}, header {header} bytes")
        end = offset + header + payload
        if end > section.size:
            raise section.corrupt(offset, f"container of {payload} bytes runs past the section")
        yield tuple(_entries(section, offset + header, end))
        offset = _skip_padding(section, end)


def _entries(section: _Section, offset: int, end: int) -> Iterator[FatbinEntry]:
    # A header is at least 64 bytes, so that every turn moves on by as much.
    while offset < end:
        if end - offset < _ENTRY_BYTES:
            raise section.corrupt(offset, f"{end - offset} bytes are left, no room for an entry")
        kind, _, header, payload, arch, flags = _ENTRY.unpack(section.take(offset, _ENTRY.size))
        if header < _ENTRY_BYTES or header + payload > end - offset:
            raise section.corrupt(offset, f"entry of {header} + {payload} bytes does not fit")
        if arch not in _ARCHS:
            raise section.corrupt(offset, f"entry for architecture {arch}")
        suffix = "f" if flags & FLAG_FAMILY_SPECIFIC else ""
        suffix = "a" if flags & FLAG_ARCH_SPECIFIC else suffix
        yield FatbinEntry(kind, f"{arch}{suffix}")
        offset += header + payload


def _skip_padding(section: _Section, offset: int) -> int:
    """Return where the next container starts: linkers put zeros between and after them."""
    offset += -offset % ALIGNMENT
    size = ALIGNMENT  # most often there is none
    while offset < section.size:
        block = section.take(offset, min(size, section.size - offset))
        rest = block.lstrip(b"\0")
        if rest:
            skipped = len(block) - len(rest)
            return offset + skipped - skipped % ALIGNMENT
        offset += len(block)
        size = _BLOCK
    return section.size
