"""Tarballs in a folder → a release: manifest, SBOMs, JSON schema, ``SHA256SUMS``.

A release folder can be served, mirrored or opened as ``file://`` without changes. Everything in the
manifest about a tarball is read from the tarball.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from farm import cuda_runtime, durable, elf, run_lock, targets
from farm.errors import PackError, UsageError, remark
from farm.inputs import patches
from farm.pack import (
    BUILD_RECORD,
    LICENCES,
    PROGRAMS,
    ROOT,
    SHIPPED,
    Packed,
    pack,
    read_inventory,
)
from farm.plan import artifact_name
from farm.tarball import archive, build_record, sbom
from farm.tarball.archive import Chunking
from farm.tarball.build_record import BuildRecord
from farm.tarball.parts import Part
from llama_loader import manifest as schema
from llama_loader.errors import IntegrityError
from llama_loader.manifest import Artifact, Manifest

MANIFEST: Final = "manifest.json"
SCHEMA: Final = "manifest.schema.json"
SUMS: Final = "SHA256SUMS"
_OF_SCHEMA: Final = ("$schema", "title")
MAX_BYTES: Final = 32 << 30
"""Bytes of all tarballs of a release, which ``invoke verify`` downloads to a temporary folder."""
_LEAST_PIECE: Final = 1 << 16
"""Bytes of a file's pieces; their digests are kept. Of one byte each, a GiB has 100 GB of them."""
_AGAIN: Final = (
    "of a release that you fetched: fetch it again, and ask its publisher; of your own: invoke"
    " manifest writes manifest and SBOMs again from the tarballs"
)


def pack_tree(tree: Path, out: Path, archive_format: str) -> Packed:
    """Pack a kept tree (``bin/``, ``licenses/``, ``BUILD.json``) into a tarball in ``out``.

    Raises:
        UsageError: ``tree`` is not a kept tree, or the format is unknown.
        PackError: the disk is full, or a program is missing.
        InspectError: a binary is not what its set and line say.
    """
    archive.require_format(archive_format)
    durable.require_own_out(tree)
    try:
        build_json = durable.read_small(tree / BUILD_RECORD, follow=False)
        with durable.held(tree / LICENCES) as folder:
            names = durable.names(folder)
            licences = {name: durable.read_small(folder / name, follow=False) for name in names}
    except OSError as error:
        raise UsageError(
            "TREE_MISSING/record",
            tree=tree,
            strerror=error.strerror,
            name=Path(str(error.filename)).name,
        ) from error
    record = build_record.decode(build_json, what=str(tree))
    return pack(
        tree / "bin",
        out / _name(record, archive_format),
        asked=_asked(record),
        licences=licences,
        build_json=build_json,
        programs=(*PROGRAMS, *(name for name in record.targets if name in SHIPPED)),
    )


def write(out: Path, *, release: str | None = None, serial: int | None = None) -> Manifest:
    """Write the manifest and the files beside it for all tarballs in a folder; the manifest last.

    Without ``release`` or ``serial`` it is that of the folder's manifest, else ``b<build>-1`` and
    1.

    Raises:
        UsageError: the folder has no tarballs of llama-server.
        PackError: the tarballs are of different sources, or one is not ours.
        BuildError: ``FOLDER_NOT_OWN``; ``FOLDER_LOCKED``: another run writes it for too long.
        InspectError: a tarball's binaries differ from its ``BUILD.json``.
    """
    durable.require_own_out(out)
    tarballs(out)  # without one there is nothing to wait for
    with run_lock.turn(out, "manifest"):
        found = [read(path) for path in tarballs(out)]
        found.sort(key=lambda one: one.source is None)
        source, *others = dict.fromkeys(one.source for one in found if one.source)
        if others:
            builds = ", ".join(sorted(map(build_record.shown, (source, *others))))
            raise PackError("SOURCES_MIXED", builds=builds)
        before = None
        if (out / MANIFEST).is_file():
            before = schema.parse(_bytes(out / MANIFEST), what=str(out / MANIFEST))
        written = Manifest(
            schema_version=schema.SCHEMA_VERSION,
            release=release or (before.release if before else f"b{source.build}-1"),
            serial=serial or (before.serial if before else 1),
            created=datetime.now(timezone.utc).replace(microsecond=0),
            expires=None,
            source=source,
            artifacts=tuple(one.artifact for one in found),
        )
        published = json.dumps(json_schema(), indent=2).encode() + b"\n"
        if before and msgspec.structs.replace(written, created=before.created) == before:
            # the same release again has the same bytes, so it may be published again
            written = before
            published = _bytes(out / SCHEMA) if (out / SCHEMA).is_file() else published
        content = schema.dump(written)
        schema.parse(content, what=MANIFEST)
        require_whole(written, MANIFEST)
        files = {sbom.name_of(one.artifact.name): one.sbom for one in found}
        files |= {SCHEMA: published, SUMS: sums(digests(written, content, published))}
        # the manifest last: a reader that sees it also sees the others
        for name, text in {**files, MANIFEST: content}.items():
            with durable.writing(out / name):
                durable.replace(out / name, text, 0o644)
    return written


def json_schema() -> dict[str, Any]:
    """Return the manifest's JSON Schema (2020-12), published as ``manifest.schema.json``."""
    text = msgspec.json.encode(msgspec.json.schema(Manifest))
    # JSON Schema's regular expressions are ECMAScript's, which has no \A and \Z
    found = msgspec.json.decode(text.replace(rb"\\A", b"^").replace(rb"\\Z", b"$"))
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, "title": "llama-server release manifest", **found}


def load(folder: Path) -> Manifest:
    """Read a release folder's manifest.

    Raises:
        UsageError: the folder has none.
        IntegrityError: the manifest is malformed.
    """
    return schema.parse(content(folder), what=str(folder / MANIFEST))


def content(folder: Path) -> bytes:
    """Return the bytes of a release folder's manifest, or raise ``RELEASE_MISSING``."""
    try:
        return durable.read_small(folder / MANIFEST, follow=False)
    except NotADirectoryError as error:
        raise UsageError("RELEASE_MISSING/file", file=folder, folder=folder.parent) from error
    except OSError as error:
        place, why = folder.absolute(), error.strerror
        if not folder.is_dir():
            raise UsageError("RELEASE_MISSING/absent", place=place) from error
        if first := next(folder.glob(f"*/{MANIFEST}"), None):
            raise UsageError("RELEASE_MISSING/place", place=place, first=first.parent) from error
        raise UsageError("RELEASE_MISSING", folder=folder, place=place, strerror=why) from error


def verify(
    folder: Path, note: Callable[[str], None] = print, read_before: bytes | None = None
) -> tuple[str, ...]:
    """Read every artifact again and compare everything beside it with its content.

    That is the manifest, the SBOMs, ``SHA256SUMS``, and, in each tarball, the record of its build
    and the licences of everything that the record names. Opens no connection. ``note`` takes one
    line about a fact that an old tarball does not record; ``read_before`` are the manifest's bytes,
    where they were read already. Returns the artifacts' names.

    Raises:
        PackError: ``RELEASE_MISMATCH``, ``SBOM_MISSING`` or ``LICENCE_MISSING``: names the
            artifact and what differs.
    """
    listing = content(folder) if read_before is None else read_before
    manifest = schema.parse(listing, what=str(folder / MANIFEST))
    require_whole(manifest, (folder.resolve() / MANIFEST).as_uri())
    for listed in manifest.artifacts:
        verify_artifact(folder, manifest, listed, note)
    unlisted = {path.name for path in tarballs(folder)} - {a.name for a in manifest.artifacts}
    if unlisted:
        raise _mismatch(f"{min(unlisted)} is not in the manifest")
    described = _bytes(folder / SCHEMA)
    _check_schema(described, note)
    beside = sums(digests(manifest, listing, described))
    if _bytes(folder / SUMS) != beside:
        raise _mismatch(f"{folder / SUMS} does not match the manifest")
    return tuple(artifact.name for artifact in manifest.artifacts)


def _check_schema(described: bytes, note: Callable[[str], None]) -> None:
    """Refuse what is no schema of a manifest; another farm's may differ from this one's."""
    found, own = _json(described), json_schema()
    if found == own:
        return
    named = {key: found.get(key) for key in _OF_SCHEMA} if isinstance(found, dict) else {}
    if named != {key: own[key] for key in _OF_SCHEMA}:
        raise _mismatch(f"{SCHEMA} is no schema of a release manifest")
    note(remark("SCHEMA_ANOTHER", schema=SCHEMA))


def verify_artifact(
    folder: Path, manifest: Manifest, listed: Artifact, note: Callable[[str], None]
) -> None:
    """Read one artifact again: its bytes, its SBOM, its record and its licences.

    Raises:
        PackError: as ``verify``.
        InspectError: its binaries differ from its record.
    """
    chunking = Chunking(listed.chunk_size, max(listed.piece_size, _LEAST_PIECE))
    tarball = folder / listed.name
    if tarball.is_file() and (size := tarball.stat().st_size) != listed.size:
        raise _differs(listed, "size", listed.size, size)
    # when it is opened, its name may lead to another one
    found = read(tarball, chunking, most=min(listed.size, archive.MAX_BYTES))
    for field in ("size", "sha256", "chunk_size", "chunks", "unpacked_size", "backend", "cuda",
                  "platform", "needs", "files", "format", "kind", "provides"):  # fmt: skip
        said, there = getattr(listed, field), getattr(found.artifact, field)
        if said != there:
            raise _differs(listed, field, said, there)
    _check_sbom(folder, listed, found)
    if found.source and found.source != manifest.source:
        source = build_record.shown(found.source)
        raise _mismatch(f"{listed.name}: was built from {source}, not the manifest's source")
    _check_licences(found, note)
    if found.variants:
        note(remark("FEW_CPU_VARIANTS", name=listed.name, variants=found.variants))


def require_whole(manifest: Manifest, url: str) -> None:
    """Refuse a manifest whose files are not those of a release, before any of them is touched.

    Raises:
        UsageError: ``CHANNEL_NOT_RELEASE``: a channel's; the release that it names has the files to
            check, and its own manifest is in the hint.
        PackError: ``RELEASE_MISMATCH``: a name that no release has, or more bytes than one has.
    """
    if sum(max(one.size, one.unpacked_size) for one in manifest.artifacts) > MAX_BYTES:
        raise _mismatch(f"{url}: its tarballs have, or unpack to, more than {MAX_BYTES} bytes")
    named = Counter(artifact.name for artifact in manifest.artifacts)
    for artifact in manifest.artifacts:
        if not is_tarball(artifact.name) or named[artifact.name] > 1:
            raise _mismatch(f"{artifact.name}: is no tarball's name, or is listed twice")
        if artifact.urls[0] != artifact.name:
            own = schema.resolve(artifact.resolved_urls(url)[0], MANIFEST)
            raise UsageError("CHANNEL_NOT_RELEASE", url=url, release=manifest.release, own=own)
        if artifact.sbom and artifact.sbom.url != sbom.name_of(artifact.name):
            raise _mismatch(f"{artifact.name}: its SBOM is not {sbom.name_of(artifact.name)}")


def _differs(listed: Artifact, field: str, said: object, there: object) -> PackError:
    differs = f"{said!r:.80} in the manifest, but {there!r:.80} in the tarball"
    return _mismatch(f"{listed.name}: {field} is {differs}")


def _check_sbom(folder: Path, listed: Artifact, found: Found) -> None:
    if listed.sbom is None:
        raise PackError("SBOM_MISSING", name=listed.name)
    content = _bytes(folder / listed.sbom.url)
    if listed.sbom != _listed_sbom(listed, content):
        named = f"its SBOM {listed.sbom.url} is not the file that the manifest names"
        raise _mismatch(f"{listed.name}: {named}")
    # As data: another version of the library may write the same document in other bytes.
    if content != found.sbom and _json(content) != json.loads(found.sbom):
        raise _mismatch(f"{listed.sbom.url}: does not say what the tarball holds")


def _check_licences(found: Found, note: Callable[[str], None]) -> None:
    """Refuse a part without its licence's text in the tarball; ``cuda_runtime`` checks its own."""
    name = found.artifact.name
    if found.parts is None:
        note(remark("PARTS_UNKNOWN", name=name))
        return
    packed = {entry.path for entry in found.artifact.files}
    for part in found.parts:
        wanted = {f"{ROOT}/{LICENCES}/{file}" for file in part.licence_files}
        if part.licence is None or not wanted or not wanted <= packed:
            raise PackError("LICENCE_MISSING", name=name, part=part.name, path=part.path)


def _json(document: bytes) -> object:
    """Parse foreign JSON of at most 1 MiB, else return None: parsing takes up to 60 times that."""
    try:
        return schema.strict_json(document, what="", max_bytes=1 << 20)
    except IntegrityError:
        return None


def _bytes(path: Path) -> bytes:
    try:
        return durable.read_small(path, follow=False)
    except OSError as error:
        raise _mismatch(f"{path.name}: {error.strerror}") from error


def _mismatch(problem: str) -> PackError:
    return PackError("RELEASE_MISMATCH", problem, hint=_AGAIN)


@dataclass(frozen=True)
class Found:
    """Facts from a tarball's bytes: its entry (SBOM included), its SBOM, its record's source."""

    artifact: Artifact
    sbom: bytes = b""
    source: schema.Source | None = None
    parts: tuple[Part, ...] | None = ()
    variants: str = ""
    """The CPU variants in it, if it was built with only some of them."""


def read(
    path: Path,
    chunking: Chunking = Chunking(),  # noqa: B008 - it is frozen
    *,
    most: int = archive.MAX_BYTES,
) -> Found:
    """Read a tarball of any kind and of ``most`` bytes, with the requested chunk sizes.

    Raises:
        PackError: it cannot be read, or is not ours.
        InspectError: its binaries differ from its record.
    """
    if cuda_runtime.is_one(path.name):
        entry, wheels = cuda_runtime.read_with_record(path, chunking=chunking, most=most)
        return _described(Found(entry), partial(sbom.of_cuda_runtime, entry, wheels))
    inventory = read_inventory(path, chunking=chunking, most=most)
    if not inventory.build_json:
        raise PackError("BUILD_RECORD_MISSING/ours", name=path.name)
    record = build_record.decode(inventory.build_json, what=path.name)
    inventory.require_name(_name(record, inventory.format))
    elf.check(inventory.inspections, _asked(record))
    entry = inventory.artifact(record.line)
    variants = record.defined.get(patches.CPU_VARIANTS, "")
    found = Found(entry, b"", record.source, record.parts, variants)
    return _described(found, partial(sbom.of_server, entry, record))


def _described(found: Found, describe: Callable[[], bytes]) -> Found:
    """Add the SBOM; the library refuses values that a record may have."""
    entry = found.artifact
    try:
        document = describe()
    except sbom.INVALID as error:
        raise PackError("BUILD_RECORD_INVALID", name=entry.name, error=error) from error
    listed = msgspec.structs.replace(entry, sbom=_listed_sbom(entry, document))
    return replace(found, artifact=listed, sbom=document)


def _listed_sbom(artifact: Artifact, document: bytes) -> schema.Sbom:
    digest = hashlib.sha256(document).hexdigest()
    return schema.Sbom(url=sbom.name_of(artifact.name), sha256=digest)


def digests(manifest: Manifest, content: bytes, published_schema: bytes) -> dict[str, str]:
    """Return each sha256: of tarballs, SBOMs, and the schema and the manifest, given as bytes."""
    found = {artifact.name: artifact.sha256 for artifact in manifest.artifacts}
    found |= {one.sbom.url: one.sbom.sha256 for one in manifest.artifacts if one.sbom}
    for name, data in ((SCHEMA, published_schema), (MANIFEST, content)):
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def sums(found: Mapping[str, str]) -> bytes:
    """Return ``SHA256SUMS`` of ``digests``."""
    return "".join(f"{digest}  {name}\n" for name, digest in found.items()).encode()


def _asked(record: BuildRecord) -> elf.Asked:
    arch_set = targets.ArchSet(record.arch_set, record.archs)
    return elf.Asked(arch_set.sass, arch_set.ptx, record.line)


def tarballs(out: Path) -> list[Path]:
    """Return the tarballs in a folder, or raise ``RELEASE_EMPTY``: none is a llama-server."""
    found = [*filter(is_tarball, durable.names(out))] if out.is_dir() else []
    if all(map(cuda_runtime.is_one, found)):
        raise UsageError("RELEASE_EMPTY", out=out)
    return [out / name for name in found]


def is_tarball(name: str) -> bool:
    """Whether a file's name is one that ``write`` takes for a tarball of the release."""
    return name.endswith(tuple(f".{one}" for one in archive.FORMATS))


def record_of(path: Path) -> BuildRecord:
    """Read a tarball's ``BUILD.json``, which is its first file, and nothing after it.

    Raises:
        PackError: it is damaged, or not ours.
    """
    wanted = f"{ROOT}/{BUILD_RECORD}"
    try:
        with durable.open_regular(path) as raw:
            found = archive.members(raw, archive.format_of(path.name), what=path.name)
            for member in islice(found, 1):
                if member.path == wanted:
                    content = member.stream.read(build_record.LARGEST + 1)
                    return build_record.decode(content, what=path.name)
    except (*archive.DAMAGE, OSError) as error:
        raise PackError("ARCHIVE_DAMAGED", name=path.name, error=error) from error
    raise PackError("BUILD_RECORD_MISSING", name=path.name)


def _name(record: BuildRecord, archive_format: str) -> str:
    return artifact_name(record.source.build, record.line, record.arch_set, archive_format)
