"""Tarballs in a folder → a release: manifest, its JSON schema, ``SHA256SUMS``.

A release folder can be served, mirrored or opened as ``file://`` as it is. Everything that the
manifest says of a tarball is read from the tarball.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from farm import archive, build_record, cuda_runtime, elf, targets
from farm.errors import PackError, UsageError
from farm.pack import BUILD_RECORD, LICENCES, Inventory, PackRequest, pack, read_inventory
from farm.plan import SOURCE_DATE_EPOCH, artifact_name
from llama_loader import manifest as schema
from llama_loader.manifest import Manifest

if TYPE_CHECKING:
    from farm.build_record import BuildRecord
    from llama_loader.manifest import Artifact

MANIFEST: Final = "manifest.json"
SCHEMA: Final = "manifest.schema.json"
SUMS: Final = "SHA256SUMS"


def pack_tree(tree: Path, out: Path, archive_format: str) -> Path:
    """Pack a kept tree (``bin/``, ``licenses/``, ``BUILD.json``) into a tarball in ``out``.

    Raises:
        UsageError: ``tree`` is not a kept tree, or the format is unknown.
        PackError: the disk is full, or a program is missing.
        InspectError: a binary is not what its set and line say.
    """
    archive.require_format(archive_format)
    try:
        build_json = (tree / BUILD_RECORD).read_bytes()
    except OSError as error:
        raise UsageError(
            "TREE_MISSING",
            f"{tree} is not a built tree: {error.strerror}: {BUILD_RECORD}",
            hint="builds leave theirs in .farm/trees/NAME",
        ) from error
    record = build_record.decode(build_json, what=str(tree))
    asked = _asked(record)
    _make_folder(out)
    name = artifact_name(record.source.build, record.line.name, record.arch_set, archive_format)
    pack(
        PackRequest(
            tree=tree / "bin",
            out=out / name,
            format=archive_format,
            line=record.line,
            sass=asked.sass,
            ptx=asked.ptx,
            licences={path.name: path.read_bytes() for path in (tree / LICENCES).iterdir()},
            build_json=build_json,
            mtime=SOURCE_DATE_EPOCH,
        )
    )
    return out / name


def write(out: Path, *, release: str | None = None, serial: int | None = None) -> Manifest:
    """Write the manifest and what stands beside it for all tarballs in a folder; manifest last.

    Args:
        out: the folder; tarballs of CUDA's libraries come after the servers'.
        release: the release's name; kept from the manifest there, else ``b<build>-1``.
        serial: its serial; kept from the manifest there, else 1.

    Raises:
        UsageError: the folder has no tarballs of llama-server.
        PackError: the tarballs are of different sources, or one is not ours.
        InspectError: a tarball's binaries are not what its ``BUILD.json`` says.
    """
    tarballs = _tarballs(out)
    servers = [_server(path) for path in tarballs if not cuda_runtime.is_one(path.name)]
    libraries = [cuda_runtime.read(path) for path in tarballs if cuda_runtime.is_one(path.name)]
    source = _one_source([record for record, _ in servers])
    before = load(out) if (out / MANIFEST).is_file() else None
    written = Manifest(
        schema_version=schema.SCHEMA_VERSION,
        release=release or (before.release if before else f"b{source.build}-1"),
        serial=serial or (before.serial if before else 1),
        created=_now(),
        expires=None,
        source=schema.Source(**msgspec.structs.asdict(source)),
        artifacts=(*(artifact for _, artifact in servers), *libraries),
    )
    content = schema.dump(written)
    schema.parse(content, what=MANIFEST)
    _replace(out / SCHEMA, json.dumps(schema.json_schema(), indent=2).encode() + b"\n")
    _replace(out / SUMS, _sums(written, content))
    _replace(out / MANIFEST, content)
    return written


def load(folder: Path) -> Manifest:
    """Read a release folder's manifest.

    Raises:
        UsageError: there is none.
        IntegrityError: it is malformed.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise UsageError(
            "RELEASE_MISSING",
            f"{folder} is not a release folder: {error.strerror}: {MANIFEST}",
            hint="invoke build-cuda or invoke build-cpu makes one",
        ) from error
    return schema.parse(data, what=str(folder / MANIFEST))


def verify(folder: Path) -> tuple[str, ...]:
    """Read every artifact again and compare it with the manifest and ``SHA256SUMS``.

    Returns:
        The artifacts' names.

    Raises:
        PackError: ``RELEASE_MISMATCH``: names the artifact and the field that differs.
    """
    manifest = load(folder)
    for listed in manifest.artifacts:
        _compare(listed, _read(folder / listed.name))
    unlisted = {path.name for path in _tarballs(folder)} - {a.name for a in manifest.artifacts}
    if unlisted:
        raise PackError("RELEASE_MISMATCH", f"{min(unlisted)} is not in the manifest")
    sums = _sums(manifest, (folder / MANIFEST).read_bytes())
    try:
        found = (folder / SUMS).read_bytes()
    except OSError as error:
        raise PackError("RELEASE_MISMATCH", f"{folder / SUMS}: {error.strerror}") from error
    if found != sums:
        raise PackError("RELEASE_MISMATCH", f"{folder / SUMS} does not match the manifest")
    return tuple(artifact.name for artifact in manifest.artifacts)


def _read(path: Path) -> Artifact:
    """Read a tarball of any kind again."""
    return cuda_runtime.read(path) if cuda_runtime.is_one(path.name) else _server(path)[1]


def _server(path: Path) -> tuple[BuildRecord, Artifact]:
    """Read a server's tarball: its record, and the entry that its bytes make."""
    inventory = read_inventory(path)
    record = _record(inventory)
    inventory.require_name(_packed_as(inventory, record))
    elf.check(inventory.inspections, _asked(record))
    return record, inventory.artifact(record.line)


def _compare(listed: Artifact, found: Artifact) -> None:
    for field in ("size", "sha256", "chunk_size", "chunks", "unpacked_size", "backend", "cuda",
                  "platform", "needs", "files", "format", "kind", "provides"):  # fmt: skip
        if getattr(listed, field) != getattr(found, field):
            raise PackError(
                "RELEASE_MISMATCH",
                f"{listed.name}: {field} is {getattr(listed, field)!r:.80} in the manifest, but "
                f"{getattr(found, field)!r:.80} in the tarball",
                hint="invoke manifest writes the manifest again from the tarballs",
            )


def _asked(record: BuildRecord) -> elf.Asked:
    arch_set = targets.ArchSet(record.arch_set, record.archs)
    return elf.Asked(arch_set.sass, arch_set.ptx, record.line)


def _tarballs(out: Path) -> list[Path]:
    found = sorted(
        path for archive_format in archive.FORMATS for path in out.glob(f"*.{archive_format}")
    )
    if all(cuda_runtime.is_one(path.name) for path in found):
        raise UsageError(
            "RELEASE_EMPTY",
            f"{out} holds no tarballs of llama-server",
            hint="invoke build-cuda or invoke build-cpu makes them",
        )
    return found


def _record(inventory: Inventory) -> BuildRecord:
    if not inventory.build_json:
        raise PackError(
            "BUILD_RECORD_MISSING", f"{inventory.name}: has no {BUILD_RECORD}, so it is not ours"
        )
    return build_record.decode(inventory.build_json, what=inventory.name)


def _packed_as(inventory: Inventory, record: BuildRecord) -> str:
    return artifact_name(record.source.build, record.line.name, record.arch_set, inventory.format)


def _one_source(records: list[BuildRecord]) -> build_record.SourceRecord:
    sources = {record.source for record in records}
    if len(sources) > 1:
        builds = ", ".join(sorted(f"b{source.build} ({source.origin})" for source in sources))
        raise PackError(
            "SOURCES_MIXED",
            f"the tarballs are of different sources: {builds}",
            hint="one folder holds one release; build into another one with --out",
        )
    return records[0].source


def _sums(manifest: Manifest, content: bytes) -> bytes:
    lines = [f"{artifact.sha256}  {artifact.name}" for artifact in manifest.artifacts]
    lines.append(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}")
    return "".join(f"{line}\n" for line in lines).encode()


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PackError("OUT_NOT_WRITABLE", f"{folder}: {error.strerror}") from error


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is the old one or the new one at every moment."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        raise PackError("WRITE_FAILED", f"{path}: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)
