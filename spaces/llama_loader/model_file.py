"""Refuses files that are no model: by name, parts, header, size or digest.

Only llama-server can tell whether it supports the architecture. Errors are ``SettingError``, and
``IntegrityError`` for a file whose bytes are not those of its digest.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from llama_loader import gguf_header
from llama_loader.errors import IntegrityError, SettingError

_BLOCK: Final = 4 * 1024 * 1024
ETAG_OF_LARGE: Final = re.compile("[0-9a-f]{64}")
"""The Hub's name for the bytes of a large file: their sha256."""
_MAX_PARTS: Final = 1000
"""Maximum parts of a model: each costs a request; the largest models have some 50."""
_PIECE: Final = re.compile(r"\.gguf[.-](part|split)", re.IGNORECASE)
"""Names of files that are cut anywhere, such as ``m.gguf.part1of2`` and ``m.gguf-split-a``."""


def require_usable(path: Path) -> None:
    """Refuse what llama-server cannot serve, by its name, its parts and its header."""
    with _reading(path):
        if not path.is_file():  # nor a FIFO, whose reader would wait for ever
            of_size = path.name in {"4b", "12b", "27b"}
            name = "MODEL_MISSING/size" if of_size else "MODEL_MISSING"
            raise SettingError("MODEL_MISSING/folder" if path.is_dir() else name, path=path)
        if missing := [one.name for one in gguf_header.files(path) if not one.is_file()]:
            told = ", ".join([*missing[:9], "…"][: len(missing)])
            raise SettingError("MODEL_INCOMPLETE", path=path, missing=told)
        require_first(path.name, str(path))
    ends = [_whole(one).end for one in gguf_header.files(path)]
    header = _whole(path)
    kind = header.texts.get("type", "model")
    architecture = header.texts.get("architecture", "without an architecture")
    if architecture == "clip" or kind == "mmproj":
        kind = "multimodal projector (mmproj)"
    elif kind == "model" and architecture in {"controlvector", "without an architecture"}:
        kind = architecture
    elif kind == "model" and not any(ends):
        kind = "vocabulary, without tensors"
    if kind != "model":  # or an adapter, an imatrix
        name = "MODEL_PROJECTOR" if "mmproj" in kind else "MODEL_KIND"
        raise SettingError(name, path=path, kind=kind[:80])
    declared = header.numbers.get("count", 0)  # split.count
    if declared not in {0, gguf_header.part(path.name)[1]}:
        raise SettingError("MODEL_PART", path=path, declared=declared)


def _whole(path: Path) -> gguf_header.Header:
    """Return the header of a part of a model; refuse one that ends before its tensors do."""
    header = gguf_header.read(path)
    with _reading(path), path.open("rb") as file:
        head, size = file.read(16), path.stat().st_size
    if header is None:
        if gguf_header.is_cut(path):
            raise SettingError("MODEL_INCOMPLETE/header", path=path.resolve(), size=size)
        raise SettingError("MODEL_NOT_GGUF", path=path, head=head)
    if size < header.end:
        raise SettingError("MODEL_INCOMPLETE/cut", path=path.resolve(), size=size, end=header.end)
    return header


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingError("MODEL_NOT_READABLE", path=path, why=error.strerror) from error


def require_first(name: str, label: str) -> None:
    """Refuse a file that is not the first of some parts; ``label`` is what messages call it."""
    number, count = gguf_header.part(name)
    if count > _MAX_PARTS:
        raise SettingError("MODEL_PART/many", label=label, count=count, most=_MAX_PARTS)
    if 1 < number <= count:
        first = next(gguf_header.parts(name))
        raise SettingError("MODEL_PART/nth", label=label, number=number, count=count, first=first)
    if number != 1 or not count or _PIECE.search(name):
        raise SettingError("MODEL_PART/later", label=label)


def require_as_named(path: Path) -> None:
    """Verify a model of the Hub's cache by its name: a link to the ETag, a large file's sha256.

    A file that Xet downloaded lies behind a second link; the name at its end is another digest.
    """
    for part in gguf_header.files(path):
        etag = part.readlink().name if part.is_symlink() else ""
        if ETAG_OF_LARGE.fullmatch(etag):
            require_digest(part.resolve(), etag, "MODEL_SHA256_MISMATCH/name")


def require_digest(path: Path, sha256: str, name: str = "MODEL_SHA256_MISMATCH") -> None:
    """Hash a file; ``name`` is the error's sentence, which names the source of the sha256."""
    digest = hashlib.sha256()
    with _reading(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise IntegrityError(name, path=path, digest=digest.hexdigest(), sha256=sha256)
