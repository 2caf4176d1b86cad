"""A built tree → a deterministic tarball (docs/manifest.md), and a tarball → its manifest entry.

A tarball contains ``llama-server``, ``llama-cli`` and the programs of ``--also``, ggml's plugins,
and the libraries of the tree that these need; each library once, as a real file under the name that
the system's loader needs. Everything else that CMake left is not packed.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Final, cast

from farm import durable, elf
from farm.elf import Inspection
from farm.errors import InspectError, PackError
from farm.plan import SOURCE_DATE_EPOCH, TARGETS
from farm.tarball import archive, build_record
from farm.tarball.archive import Chunking, Digests, TarMember
from farm.tarball.build_record import LineRecord
from llama_loader.manifest import (
    LLAMA_SERVER,
    Artifact,
    Cuda,
    FileEntry,
    Platform,
)

ROOT: Final = "runtime"
PROGRAMS: Final = TARGETS
"""What every tarball holds."""
ALSO: Final = ("llama-bench", "llama-quantize", "rpc-server")
"""What ``--also`` takes: programs of llama.cpp that a tarball can hold beside the server."""
RPC_SERVER: Final = "ggml-rpc-server"
"""How llama.cpp names the program ``rpc-server`` since 2026."""
SHIPPED: Final = (*ALSO, RPC_SERVER)
PLUGINS: Final = ("libggml-cpu-*.so", "libggml-cpu.so", "libggml-cuda.so", "libggml-rpc.so")
"""ggml looks for these names at run time; nothing needs them, so no ELF file names them."""
BUILD_RECORD: Final = "BUILD.json"
RECORD_PATH: Final = f"{ROOT}/{BUILD_RECORD}"
LICENCES: Final = "licenses"
ELF_MAGIC: Final = b"\x7fELF"
_IN_MEMORY: Final = 8 << 20
"""Bytes of one member that are kept in memory; larger ones go to a temporary file."""
_LARGEST: Final = 2 << 30
"""Bytes of one member: what a reader may write to look into it. A linker makes no larger library of
code that is compiled as usual (x86-64 psABI, "Architectural Constraints")."""
FREE_SPACE: Final = "name folders with more space with --out and TMPDIR, where the disk is full"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Packed:
    """A tarball as this run wrote or compared it."""

    path: Path
    sha256: str
    size: int

    def copy(self, place: Path) -> None:
        """Write it to another place; its folder is made.

        Raises:
            PackError: ``WRITE_FAILED``.
        """
        with durable.writing(place), self.path.open("rb") as stream:
            place.parent.mkdir(parents=True, exist_ok=True)
            with durable.replacing(place, archive.FILE_MODE) as copy:
                shutil.copyfileobj(stream, copy)


def place(path: Path, make: Callable[[IO[bytes]], Artifact]) -> Packed:
    """Write a tarball, which appears complete and read back or not at all.

    ``make`` writes it to a file that has no name yet, and reads it back.

    Raises:
        FarmError: of ``make``; ``FOLDER_NOT_OWN``; ``WRITE_FAILED``.
    """
    with durable.writing(path, hint=FREE_SPACE):
        durable.require_own_out(path.parent, make=0o777)
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(path, archive.FILE_MODE) as raw:
            made = make(raw)
    return Packed(path, made.sha256, made.size)


@dataclass(frozen=True)
class Inventory:
    """The content of a tarball, read from its bytes.

    Attributes:
        name, format: the file's name, and the format that follows from it.
        digests: of the tarball.
        files: its members, in order.
        inspections: of its programs and libraries.
        build_json: the bytes of its record (``BUILD.json``), empty where it has none.
        chunking: how it was cut for the digests.
    """

    name: str
    format: str
    digests: Digests
    files: tuple[FileEntry, ...]
    inspections: tuple[Inspection, ...]
    build_json: bytes
    chunking: Chunking

    def artifact(self, line: LineRecord) -> Artifact:
        """Return a server's entry; only ``toolkit`` and ``min_driver`` come from ``line``.

        Raises:
            InspectError: ``CODE_NOT_ASKED``: CUDA code in a line without a toolkit;
                ``NO_BINARIES``: nothing in it is a program for one kind of machine.
        """
        merged = elf.merge(self.inspections)
        if not (merged.sass or merged.ptx):
            return self.entry(None)
        toolkit, driver = line.toolkit, line.min_driver
        if toolkit is None or driver is None:
            raise InspectError("CODE_NOT_ASKED/line", name=self.name)
        return self.entry(
            Cuda(toolkit=toolkit, min_driver=driver, sass=merged.sass, ptx=merged.ptx)
        )

    def entry(
        self, cuda: Cuda | None, *, kind: str = LLAMA_SERVER, provides: tuple[str, ...] = ()
    ) -> Artifact:
        """Return the manifest's entry, the rest of it read from the tarball.

        Raises:
            InspectError: ``NO_BINARIES``: nothing in it is a program for one kind of machine.
        """
        merged = elf.merge(self.inspections)
        if len(merged.machines) != 1 or merged.glibc is None:
            raise InspectError("NO_BINARIES", name=self.name)
        return Artifact(
            name=self.name,
            urls=(self.name,),
            format=self.format,
            size=self.digests.size,
            sha256=self.digests.sha256,
            chunk_size=self.chunking.archive,
            chunks=self.digests.chunks,
            file_chunk_size=self.chunking.files,
            unpacked_size=sum(entry.size for entry in self.files),
            backend="cuda" if cuda else "cpu",
            cuda=cuda,
            platform=Platform(
                system="linux",
                machine=merged.machines[0],
                glibc=merged.glibc,
                glibcxx=merged.glibcxx,
            ),
            needs=merged.needs,
            files=self.files,
            kind=kind,
            provides=provides,
        )

    def require_name(self, packed_as: str) -> None:
        """Refuse a tarball that was renamed after it was packed.

        Raises:
            PackError: ``TARBALL_RENAMED``.
        """
        if self.name != packed_as:
            raise PackError("TARBALL_RENAMED", name=self.name, packed_as=packed_as)


def pack(
    tree: Path,
    out: Path,
    *,
    asked: elf.Asked,
    licences: Mapping[str, bytes],
    build_json: bytes,
    programs: tuple[str, ...] = PROGRAMS,
) -> Packed:
    """Check the binaries of a build's ``bin`` folder, and write the tarball as ``place`` does.

    ``asked`` is the requested code, and what the line promises; anything else is refused.
    ``licences`` are texts by file name, ``programs`` are to be started.

    Raises:
        PackError: a program is missing, a link leads out of the tree, the disk is full.
        InspectError: a binary is not what its set and line say (``elf.check``).
    """
    chosen = select(tree, programs)
    # under their names in the package
    inspections = tuple(replace(elf.inspect(path), file=name) for name, path in chosen.items())
    elf.check(inspections, asked)
    texts = {f"{LICENCES}/{name}": text for name, text in licences.items()}
    texts[BUILD_RECORD] = build_json

    def make(raw: IO[bytes]) -> Artifact:
        write(raw, archive.format_of(out.name), chosen, texts, programs)
        raw.flush()
        inventory = read_inventory(durable.opened(raw.fileno()), name=out.name)
        return inventory.artifact(asked.line)

    return place(out, make)


def select(tree: Path, programs: tuple[str, ...] = PROGRAMS) -> dict[str, Path]:
    """Return what is shipped from a ``bin`` folder: the name in the package → the real file.

    Raises:
        PackError: ``PROGRAM_MISSING``, ``LINK_OUTSIDE``, or ``TREE_MISSING``.
        InspectError: a program or library is damaged.
    """
    present = _present(tree)
    missing = [name for name in programs if name not in present]
    if missing:
        raise PackError("PROGRAM_MISSING", tree=tree, missing=missing[0])
    chosen: dict[str, Path] = {}
    _follow(programs, present, chosen)
    plugins = [n for n in sorted(present) if any(fnmatchcase(n, pattern) for pattern in PLUGINS)]
    # In a build without GGML_BACKEND_DL the plugins are libraries that the server needs: those
    # are there by now, under their sonames.
    _follow([n for n in plugins if present[n] not in chosen.values()], present, chosen)
    return dict(sorted(chosen.items()))


def read_inventory(
    path: Path,
    *,
    name: str | None = None,
    record_path: str = RECORD_PATH,
    chunking: Chunking = Chunking(),  # noqa: B008 - it is frozen
    most: int = archive.MAX_BYTES,
) -> Inventory:
    """Read a tarball again, streaming it: its digests, its files, what its binaries hold.

    ``name`` is what it is called, where that is not ``path``'s name. ``record_path`` is the member
    that records what it was made of, in the one folder that contains everything. ``most`` are the
    bytes that it may have.

    Raises:
        PackError: it cannot be read, is larger or damaged, or holds what no release may (links,
            other modes, two names that differ in case only).
        InspectError: a binary in it is damaged.
    """
    called = name or path.name
    archive_format = archive.format_of(called)
    files: list[FileEntry] = []
    inspections: list[Inspection] = []
    record = b""
    try:
        with durable.open_regular(path, most=most) as raw:
            digests = archive.hash_file(raw, chunking.archive)
            raw.seek(0)
            root = record_path.partition("/")[0]
            for member in archive.members(raw, archive_format, what=called, root=root):
                entry, inspection, data = _examine(member, called, record_path, chunking.files)
                files.append(entry)
                inspections += [inspection] if inspection else []
                record = record or data
                elf.require_few(inspections, called)
    except archive.DAMAGE as error:
        raise PackError("ARCHIVE_DAMAGED/pack", called=called, error=error) from error
    except OSError as error:
        if error.errno in _FULL:
            full = f"{tempfile.gettempdir()}: {error.strerror}"
            raise PackError("WRITE_FAILED", full, hint=FREE_SPACE) from error
        why = error.strerror or error
        raise PackError("TARBALL_UNREADABLE", path=called, strerror=why) from error
    return Inventory(
        name=called,
        format=archive_format,
        digests=digests,
        files=tuple(files),
        inspections=tuple(inspections),
        build_json=record,
        chunking=chunking,
    )


def _examine(
    member: TarMember, what: str, record: str, chunk_size: int
) -> tuple[FileEntry, Inspection | None, bytes]:
    """Return a member's entry, what it holds and needs where it is ELF, and ``record``'s bytes."""
    is_record = member.path == record
    if member.size > (build_record.LARGEST if is_record else _LARGEST):
        raise PackError("ARCHIVE_UNSOUND/size", what=what, path=member.path, size=member.size)
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as copy:
        hasher, block = archive.ChunkHasher(chunk_size), member.stream.read(archive.BLOCK)
        is_elf = block.startswith(ELF_MAGIC)
        while block:
            hasher.update(block)
            if is_elf or is_record:
                copy.write(block)
            block = member.stream.read(archive.BLOCK)
        digests = hasher.digests()
        executable = member.mode == archive.PROGRAM_MODE
        entry = FileEntry(
            path=member.path,
            size=member.size,
            sha256=digests.sha256,
            executable=executable,
            chunks=digests.chunks if member.size > chunk_size else (),
        )
        copy.seek(0)
        if is_elf:
            stream = cast("BinaryIO", copy)
            return entry, elf.inspect_stream(stream, PurePosixPath(member.path).name), b""
        if executable:
            raise PackError("ARCHIVE_UNSOUND/program", what=what, path=member.path)
        return entry, None, copy.read()


def _present(tree: Path) -> dict[str, Path]:
    """Return every name of each file in the folder: its own, its links', its soname."""
    root = tree.resolve()
    try:
        named = {path.name: durable.followed(path) for path in sorted(tree.iterdir())}
    except OSError as error:
        raise PackError("TREE_MISSING", tree=tree, strerror=error.strerror or error) from error
    outside = [n for n, real in named.items() if not (real and real.is_relative_to(root))]
    if outside:
        raise PackError("LINK_OUTSIDE", link=tree / outside[0])
    files = {name: real for name, real in named.items() if real and real.is_file()}
    libraries = {real for name, real in files.items() if ".so" in name and is_elf(real)}
    sonames = {elf.inspect(real).soname: real for real in sorted(libraries)}
    return {name: real for name, real in sonames.items() if name} | files


def _follow(names: Iterable[str], present: Mapping[str, Path], chosen: dict[str, Path]) -> None:
    """Add names, and whatever they need that is present, to ``chosen``."""
    waiting = deque(names)
    while waiting:
        name = waiting.popleft()
        if name in present and name not in chosen:
            chosen[name] = present[name]
            waiting.extend(elf.inspect(present[name]).needs)


def is_elf(path: Path) -> bool:
    """Return whether a regular file begins as ELF files do."""
    with path.open("rb") as stream:
        return stream.read(len(ELF_MAGIC)) == ELF_MAGIC


def write(
    raw: IO[bytes],
    archive_format: str,
    files: Mapping[str, Path],
    texts: Mapping[str, bytes],
    programs: tuple[str, ...],
    *,
    level: int = archive.ZSTD_LEVEL,
) -> None:
    """Write an archive of files and texts by name; ``programs`` are to be started."""

    def members() -> Iterator[TarMember]:
        # Sorted, so that the CPU variants, which resemble one another, lie in one window.
        for name in sorted([*files, *texts]):
            path = f"{ROOT}/{name}"
            if name in texts:
                text = texts[name]
                yield TarMember(path, len(text), archive.FILE_MODE, io.BytesIO(text))
                continue
            mode = archive.PROGRAM_MODE if name in programs else archive.FILE_MODE
            with files[name].open("rb") as stream:
                yield TarMember(path, os.fstat(stream.fileno()).st_size, mode, stream)

    archive.write(raw, archive_format, members(), SOURCE_DATE_EPOCH, level=level)
