"""Tarballs made by hand, good and bad, and the manifest entries that describe them."""

import gzip
import hashlib
import io
import lzma
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backports import zstd

from llama_loader.manifest import Artifact, FileEntry, Manifest, Platform, Source, dump

SCRIPT = b"#!/bin/sh\necho hello\n"


@dataclass(frozen=True)
class Entry:
    """A member of a tarball."""

    path: str
    data: bytes = b""
    mode: int = 0o644
    kind: bytes = tarfile.REGTYPE
    target: str = ""
    pax: dict[str, str] = field(default_factory=dict)


SERVER = Entry("runtime/llama-server", SCRIPT, 0o755)
LIBRARY = Entry("runtime/libllama.so.0", bytes(range(256)) * 8)
GOOD = (SERVER, LIBRARY, Entry("runtime/licenses/MIT", b"do what you like\n"), Entry("runtime/no"))


def link(path: str, target: str, *, hard: bool = False) -> Entry:
    kind = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
    return Entry(path, kind=kind, target=target, mode=0o777)


def tar(entries: Iterable[Entry], style: int = tarfile.PAX_FORMAT) -> bytes:
    """Pack entries as they are, whatever they are."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.path)
            info.size, info.mode, info.type = len(entry.data), entry.mode, entry.kind
            info.linkname, info.pax_headers = entry.target, dict(entry.pax)
            archive.addfile(info, io.BytesIO(entry.data))
    return buffer.getvalue()


def wheel_of(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def compress(data: bytes, form: str = "tar.gz") -> bytes:
    if form == "tar.gz":
        return gzip.compress(data, 1, mtime=0)
    small = {"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 16}  # clearing more takes 8 ms
    return lzma.compress(data, filters=[small]) if form == "tar.xz" else zstd.compress(data, 1)


def chunk_digests(data: bytes, size: int) -> tuple[str, ...]:
    return tuple(
        hashlib.sha256(data[at : at + size]).hexdigest() for at in range(0, len(data), size)
    )


def file_entry(entry: Entry, chunk_size: int = 65536) -> FileEntry:
    return FileEntry(
        path=entry.path,
        size=len(entry.data),
        sha256=hashlib.sha256(entry.data).hexdigest(),
        executable=entry.mode == 0o755,
        chunks=chunk_digests(entry.data, chunk_size) if len(entry.data) > chunk_size else (),
    )


def describe(
    packed: bytes,
    entries: Iterable[Entry] = GOOD,
    form: str = "tar.gz",
    chunk_size: int = 65536,
    **fields: Any,
) -> Artifact:
    """Return the manifest's entry for a packed archive that should hold ``entries``."""
    files = tuple(file_entry(entry, chunk_size) for entry in entries)
    artifact = Artifact(
        name=f"llama-server-b1-cpu-cpu-linux-x86_64.{form}",
        urls=(f"llama-server-b1-cpu-cpu-linux-x86_64.{form}",),
        format=form,
        size=len(packed),
        sha256=hashlib.sha256(packed).hexdigest(),
        chunk_size=chunk_size,
        chunks=chunk_digests(packed, chunk_size),
        unpacked_size=sum(entry.size for entry in files),
        backend="cpu",
        cuda=None,
        platform=Platform(system="linux", machine="x86_64", glibc="2.34", glibcxx=None),
        needs=(),
        files=files,
    )
    changed = {name: getattr(artifact, name) for name in artifact.__struct_fields__} | fields
    return Artifact(**changed)


def release(
    entries: Iterable[Entry] = GOOD, form: str = "tar.gz", **fields: Any
) -> tuple[bytes, Artifact]:
    """Pack entries; returns the archive and its description."""
    entries = tuple(entries)
    packed = compress(tar(entries), form)
    return packed, describe(packed, entries, form, **fields)


def manifest(*artifacts: Artifact, **fields: Any) -> bytes:
    """Return a manifest's bytes."""
    source = Source(
        project="llama.cpp", version=None, build=1, commit=None, origin="x", sha256=None
    )
    words: dict[str, Any] = {
        "schema_version": 1,
        "release": "b1-1",
        "serial": 1,
        "created": "2026-10-10T15:54:57Z",
        "expires": None,
        "source": source,
        "artifacts": artifacts,
    }
    return dump(Manifest(**(words | fields)))


def renamed(entry: Entry, path: str) -> Entry:
    return replace(entry, path=path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """What the files below a folder hold, by their paths in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if not path.is_dir()
    }
