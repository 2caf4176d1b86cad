"""The manifest's one definition: read here; the farm writes it, and its JSON schema, from this.

The contract is docs/manifest.md. Values that a later release may add (a new ``backend``, a new
``format``) are accepted here and passed over by ``select`` with a reason, so that an old loader
keeps working.

Python's ``json`` takes the last of two equal keys, reads ``NaN`` and ``1e999`` and keeps lone
surrogates. Two readers of such a text can disagree about it, which is how a checked manifest
becomes a different one. Here each of them, like any other malformed value, is an ``IntegrityError``
that names the JSON path (``$.artifacts[0].size``). So is an artifact that has no mirror left.
"""

import json
import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import urljoin, urlsplit

import msgspec
from msgspec import Meta

from llama_loader.errors import IntegrityError

SCHEMA_VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
"""A manifest of 40 artifacts with 40 files each is about 300 kB. Parsed, a hostile one takes 25
times its size of memory."""
_MAX_DEPTH: Final = 64
"""Deepest nesting accepted; a manifest has 5 levels."""
MAX_MEMBERS: Final = 20_000
"""Files and folders of an archive."""
MAX_PARTS: Final = 32
"""Names in a path; releases have three. All its folders are looked at for each member and link."""
LLAMA_SERVER: Final = "llama-server"
"""The ``kind`` of an artifact that can be started; what an artifact without the field is."""
CUDA_RUNTIME: Final = "cuda-runtime"
"""The ``kind`` of NVIDIA's libraries for hosts that have none; there is nothing to start in it."""

_PART = r"(?!\.{1,2}(?:/|\Z))[^/\\\x00-\x1f\x7f]+"
_HEX64: Final = r"\A[0-9a-f]{64}\Z"
_NAME: Final = rf"\A{_PART}\Z"
_PATH: Final = rf"\A{_PART}(?:/{_PART}){{0,{MAX_PARTS - 1}}}\Z"
_VERSION: Final = r"\A[0-9]+(?:\.[0-9]+)*\Z"
_ARCH: Final = r"\A[0-9]{2,3}[af]?\Z"
_COMMIT: Final = r"\A[0-9a-f]{40}([0-9a-f]{24})?(-dirty)?\Z"
_Parsed = TypeVar("_Parsed")
_EXPLAINED: Final = {
    _HEX64: "must be 64 lower-case hexadecimal digits",
    _NAME: "must be a plain file name",
    _PATH: f"must be a relative path of at most {MAX_PARTS} names, none of them '.' or '..'",
    _VERSION: "must be a version such as 2.34",
    _ARCH: "must be a compute capability without its dot, such as 90 or 120a",
    _COMMIT: "must be a commit of 40 or 64 hexadecimal digits, perhaps with -dirty behind it",
}

Sha256 = Annotated[str, Meta(pattern=_HEX64)]
Name = Annotated[str, Meta(pattern=_NAME, max_length=255)]
RelativePath = Annotated[str, Meta(pattern=_PATH, max_length=1024)]
Version = Annotated[str, Meta(pattern=_VERSION, max_length=32)]
Arch = Annotated[str, Meta(pattern=_ARCH)]
Text = Annotated[str, Meta(min_length=1, max_length=1024)]
ByteCount = Annotated[int, Meta(ge=0, le=1 << 40)]
Moment = Annotated[datetime, Meta(tz=True)]


class _Frozen(msgspec.Struct, frozen=True, kw_only=True):
    """Immutable, by keyword only; unknown fields are ignored when parsed."""


class Patch(_Frozen, frozen=True, kw_only=True):
    """A change that the farm made to llama.cpp; the digest is of what it inserts and adds."""

    name: Name
    sha256: Sha256


class Source(_Frozen, frozen=True, kw_only=True, omit_defaults=True):
    """Where the llama.cpp came from. ``sha256`` is the archive's, null for a git ref or folder.

    ``build_assumed``: the builder gave the build number, because the source had none.
    ``patches`` were applied to the source, in this order; a reader ignores those it does not know.
    """

    project: Text
    version: Text | None
    build: Annotated[int, Meta(ge=0)]
    commit: Annotated[str, Meta(pattern=_COMMIT)] | None
    origin: Text
    sha256: Sha256 | None
    build_assumed: bool = False
    patches: Annotated[tuple[Patch, ...], Meta(max_length=100)] = ()


class Cuda(_Frozen, frozen=True, kw_only=True):
    """What the CUDA code holds: machine code (``sass``) and code for the driver's JIT (``ptx``)."""

    toolkit: Version
    min_driver: Version
    sass: tuple[Arch, ...]
    ptx: tuple[Arch, ...]


class Platform(_Frozen, frozen=True, kw_only=True):
    """The oldest glibc and libstdc++ (GLIBCXX) that the binaries' version needs allow."""

    system: Text
    machine: Text
    glibc: Version
    glibcxx: Version | None


class FileEntry(_Frozen, frozen=True, kw_only=True, omit_defaults=True):
    """One regular file of the archive; ``size`` in bytes, mode 0755 or 0644 by ``executable``.

    A file larger than the artifact's ``piece_size`` also has ``chunks``, the digests of its pieces
    of that size: an installed file of 150 MB is hashed on all cores before every start.
    """

    path: RelativePath
    size: ByteCount
    sha256: Sha256
    executable: bool
    chunks: tuple[Sha256, ...] = ()


class Sbom(_Frozen, frozen=True, kw_only=True):
    """The CycloneDX document of an artifact."""

    url: Text
    sha256: Sha256


class Artifact(_Frozen, frozen=True, kw_only=True, omit_defaults=True):
    """One tarball. ``chunks[i]`` digests bytes ``[i*chunk_size, (i+1)*chunk_size)``.

    The pieces of its files have ``file_chunk_size`` bytes, ``chunk_size`` where that is not given.
    ``kind`` is ``llama-server`` (not written) or ``cuda-runtime``; a reader passes over others.
    ``provides`` names the libraries that a ``cuda-runtime`` brings, all in one folder of it.
    """

    name: Name
    urls: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=100)]
    format: Text
    size: Annotated[int, Meta(ge=1, le=1 << 40)]
    sha256: Sha256
    chunk_size: Annotated[int, Meta(ge=1, le=1 << 23)]  # a chunk is held in memory
    chunks: tuple[Sha256, ...]
    unpacked_size: ByteCount
    backend: Text
    cuda: Cuda | None
    platform: Platform
    needs: Annotated[tuple[Name, ...], Meta(max_length=100)]
    files: Annotated[tuple[FileEntry, ...], Meta(min_length=1, max_length=10_000)]
    # A factory, because omit_defaults leaves those in: releases have always had "sbom": null.
    sbom: Sbom | None = msgspec.field(default_factory=lambda: None)
    kind: Text = LLAMA_SERVER
    provides: Annotated[tuple[Name, ...], Meta(max_length=100)] = ()
    file_chunk_size: Annotated[int, Meta(ge=0, le=1 << 30)] = 0

    def __post_init__(self) -> None:  # what no single field can say
        if len(self.chunks) != -(-self.size // self.chunk_size):
            raise ValueError("chunks: their number does not follow from size and chunk_size")
        for entry in self.files:
            if entry.chunks and len(entry.chunks) != -(-entry.size // self.piece_size):
                raise ValueError(f"files: the chunks of {entry.path} do not follow from its size")
        paths, folders = {entry.path for entry in self.files}, self.folders
        if len(self.files) + len(folders) > MAX_MEMBERS:
            raise ValueError(f"files: they and their folders are more than {MAX_MEMBERS}")
        if paths & folders:
            raise ValueError(f"files: {min(paths & folders)!r} is a file and a folder")
        if sum(entry.size for entry in self.files) != self.unpacked_size:
            raise ValueError("unpacked_size: is not the sum of the files' sizes")
        if len({entry.path.casefold() for entry in self.files}) != len(self.files):
            raise ValueError("files: two paths are equal or differ in case only")
        if (self.cuda is None) == (self.backend == "cuda"):
            raise ValueError("cuda: must be given for backend 'cuda' and for no other")
        if self.kind == CUDA_RUNTIME and len(self._library_folders) != 1:
            raise ValueError("provides: must name files that are all in one folder")

    @property
    def folders(self) -> set[str]:
        """All folders on the way to the files."""
        found = set[str]()
        for entry in self.files:
            path = entry.path
            while (path := path.rpartition("/")[0]) and path not in found:
                found.add(path)
        return found

    @property
    def piece_size(self) -> int:
        """Bytes of the pieces whose digests a file may have."""
        return self.file_chunk_size or self.chunk_size

    @property
    def library_folder(self) -> str:
        """The folder (relative, ``.`` at the top) with what a ``cuda-runtime`` provides."""
        return self._library_folders[0].rstrip("/") or "."

    @property
    def _library_folders(self) -> list[str]:
        """Every folder (with its slash) that holds all that is provided."""
        paths = {entry.path for entry in self.files}
        first = self.provides[0] if self.provides else None
        folders = [path.removesuffix(first) for path in paths if first == path.rpartition("/")[2]]
        return [one for one in folders if paths.issuperset(one + name for name in self.provides)]

    def resolved_urls(self, manifest_url: str) -> tuple[str, ...]:
        """Return ``urls`` in order, relative ones resolved against the manifest's own URL.

        Those that are nearer to this machine than the manifest itself are left out: a manifest of
        another machine must not choose which services and files of this one are requested.
        """

        def nearness(url: str) -> int:  # http is for loopback alone
            return {"file": 2, "http": 1}.get(url.partition(":")[0].lower(), 0)

        resolved = [resolve(manifest_url, url) for url in self.urls]
        allowed = tuple(url for url in resolved if nearness(url) <= nearness(manifest_url))
        if not allowed:
            raise IntegrityError("MIRROR_REFUSED", artifact=self.name, mirror=resolved[0][:200])
        return allowed


class Manifest(_Frozen, frozen=True, kw_only=True):
    """A release. ``serial`` only ever grows along a channel; times carry their zone."""

    schema_version: Annotated[int, Meta(ge=1)]
    release: Name
    serial: Annotated[int, Meta(ge=0, le=2**53 - 1)]
    created: Moment
    expires: Moment | None
    source: Source
    artifacts: Annotated[tuple[Artifact, ...], Meta(max_length=1000)]

    def __post_init__(self) -> None:
        if len({artifact.name for artifact in self.artifacts}) != len(self.artifacts):
            raise ValueError("artifacts: two have the same name")


def parse(data: bytes, *, what: str = "manifest") -> Manifest:
    """Parse a manifest of at most ``MAX_MANIFEST_BYTES``; errors call it ``what``."""
    tree = strict_json(data, what=what, max_bytes=MAX_MANIFEST_BYTES)
    if not isinstance(tree, dict):
        raise IntegrityError("MANIFEST_INVALID", what=what, problem="$: must be a JSON object")
    version = tree.get("schema_version")
    if type(version) is int and version != SCHEMA_VERSION:
        raise IntegrityError(
            "MANIFEST_SCHEMA_UNKNOWN", what=what, version=version, schema_version=SCHEMA_VERSION
        )
    return convert(tree, Manifest, what=what, code="MANIFEST_INVALID")


def strict_json(data: bytes, *, what: str, max_bytes: int) -> Any:
    """Parse UTF-8 JSON of at most ``max_bytes``; errors call it ``what`` (``manifest https://…``)."""
    if len(data) > max_bytes:
        raise IntegrityError("JSON_TOO_LARGE", what=what, size=len(data), max_bytes=max_bytes)
    try:
        tree = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=lambda name: _Rejected(f"{name} is not a number in JSON"),
            parse_float=_finite,
        )
    except RecursionError:
        raise IntegrityError("JSON_TOO_DEEP", what=what) from None
    except UnicodeDecodeError as error:
        raise IntegrityError("JSON_NOT_UTF8", what=what, error=error) from error
    except ValueError as error:
        raise IntegrityError("JSON_MALFORMED", what=what, error=error) from error
    _reject(tree, "$", what, 0)
    return tree


def convert(tree: object, kind: type[_Parsed], *, what: str, code: str) -> _Parsed:
    """Turn a parsed JSON tree into a frozen ``kind``."""
    try:
        return msgspec.convert(tree, kind, strict=True)
    except msgspec.ValidationError as error:
        # the JSON path first, and no regular expression
        sentence, _, path = str(error).partition(" - at ")
        match = re.search(r"matching regex '(.*)'", sentence)
        pattern = match[1].replace("\\\\", "\\") if match else ""
        told = f"{path.strip('`') or '$'}: {_EXPLAINED.get(pattern, sentence)}"
        raise IntegrityError(code, what=what, problem=told) from error


def dump(value: object) -> bytes:
    """Return a manifest (or a part of one) as published: indented UTF-8 JSON, a final newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def resolve(manifest_url: str, url: str) -> str:
    """Resolve ``url`` against the manifest's URL; also for ``file:`` and ``hf:``.

    A URL that is malformed stays as it is; the download passes over such a mirror.
    """
    try:
        parts = urlsplit(manifest_url)
        if urlsplit(url).scheme or parts.scheme in {"http", "https", "file"}:
            return urljoin(manifest_url, url)
        # urljoin leaves schemes that it does not know (hf:) alone: join as if it were https.
        joined = urljoin(manifest_url.replace(f"{parts.scheme}:", "https:", 1), url)
    except ValueError:
        return url
    return joined.replace("https:", f"{parts.scheme}:", 1)


@dataclass
class _Rejected:
    """Marks a place in the parsed tree where the text has something that is refused."""

    problem: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = _Rejected("the key stands here twice") if key in found else value
    return found


def _finite(text: str) -> float | _Rejected:
    number = float(text)
    return number if math.isfinite(number) else _Rejected(f"{text} is not a finite number")


def _reject(value: object, path: str, what: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise IntegrityError("JSON_TOO_DEEP/path", what=what, max_depth=_MAX_DEPTH, path=path[:80])
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        value = _Rejected("holds a lone surrogate")
    if isinstance(value, _Rejected):
        raise IntegrityError("JSON_AMBIGUOUS", what=what, path=path, problem=value.problem)
    if isinstance(value, dict):
        for key, item in value.items():
            _reject(key, path, what, depth)
            _reject(item, f"{path}.{key[:80]}", what, depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _reject(item, f"{path}[{index}]", what, depth + 1)
