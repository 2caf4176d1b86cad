"""Read a GGUF header: how much memory model and context take, and the chat template.

Only integers and two texts are kept; everything else is skipped, in bounded time and memory.
"""

import math
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

COMPUTE_MARGIN: Final = 512 * 1024**2
"""Bytes for compute buffers and the CUDA context, on each device that is used; llama.cpp measures
300 to 500 MiB for 27B."""

ALL_LAYERS: Final = 999
"""The number of GPU layers that means "every layer"; more than any model has."""
_SCALARS: Final = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""GGUF value types (ggml/include/gguf.h) by number, as struct formats; 8 text, 9 array."""
_TEXT: Final = 8
_ARRAY: Final = 9
_TEXTS: Final = ("general.architecture", "general.type", "tokenizer.chat_template")
_MAX_KEYS: Final = 10_000
_MAX_KEYS_BYTES: Final = 64 << 20
"""Of all keys and their values; vocabularies of 260,000 words take some 15 MB."""
_MAX_TENSORS: Final = 65_536
"""The largest models have some thousands."""
_MAX_DIMENSIONS: Final = 4
"""GGML_MAX_DIMS (ggml/include/ggml.h)."""
_ALIGNMENT: Final = 32
"""Bytes, where a header has no ``general.alignment``."""
_MAX_TEXT: Final = 4 << 20
"""Bytes of all names and kept texts together; the largest chat templates have some 30 kB."""
_MAX_TEXTS: Final = 1 << 20
"""Texts in all arrays: each is a step. The largest vocabularies with merges have some 800,000."""
_READ: Final = 1 << 20
"""Bytes that are read at a time, at most, where texts are skipped."""
_TYPICAL: Final = 64
"""Bytes that are read for each text: an array of few needs no megabyte."""
_MAX_LAYERS: Final = 4096
"""Numbers of an array that has one for each layer; longer arrays are of tokens."""
_BLOCKS: Final = {
    1: {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2},
    32: {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 9: 36, 20: 18, 39: 17},
    64: {40: 36, 42: 18},
    128: {41: 18},
    256: {
        10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 15: 292, 16: 66, 17: 74, 18: 98,
        19: 50, 21: 110, 22: 82, 23: 136, 29: 56, 34: 54, 35: 66,
    },
}  # fmt: skip
"""Bytes of each ggml type's block, by the values in it and the type's number (ggml-common.h)."""
_F16: Final = 2
"""Bytes of one cached value in the default cache type."""
_SPLIT: Final = re.compile(r"-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf\Z")


class Header(NamedTuple):
    """A header's values, by their keys without the first word: ``block_count``, ``architecture``.

    ``end``: where in the file the tensors' data end, in bytes, or, where the last one is of a type
    that is newer than this table of types, where it begins; 0 without tensors. ``keys``: where in
    the file its keys end, in bytes.
    """

    numbers: dict[str, int]
    texts: dict[str, str]
    end: int
    keys: int


def read(path: Path) -> Header | None:
    """Read a header, once for each state of the file; None if it cannot be read as GGUF."""
    try:
        status = path.stat()
        return _read(path, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError, EOFError, struct.error, OverflowError):
        return None


def without_tensors(path: Path) -> bytes:
    """Return the keys alone of a file that ``read`` can read, as a GGUF file of one part."""
    header = read(path)
    with path.open("rb") as file:
        data = file.read(header.keys if header else 0)
    return (data[:8] + bytes(8) + data[16:]).replace(b"split.count", b"split.whole", 1)


def is_cut(path: Path) -> bool:
    """Return whether a file that cannot be read as GGUF begins as one, and ends in its header."""
    with suppress(OSError, ValueError, OverflowError):
        try:
            _read(path)
        except (EOFError, struct.error):
            return True
    return False


@lru_cache(maxsize=2)
def _read(path: Path, *_state: int) -> Header:
    with path.open("rb") as file:
        return _Reader(file).header()


def measure(path: Path, n_ctx: int) -> int | None:
    """Return the bytes of a model's parts and key/value cache, which devices share.

    ``n_ctx`` is the tokens of the cache, 0 for as many as the model was trained for. It is counted
    as if every layer attended to everything: Gemma's sliding windows need less, so the figure errs
    to the safe side. None if the file cannot be read as GGUF.
    """
    header = read(path)
    if header is None:
        return None
    known = header.numbers.get
    heads = known("attention.head_count", 0)
    width = known("embedding_length", 0) // heads if heads else 0
    each = known("attention.key_length", width) + known("attention.value_length", width)
    values = known("block_count", 0) * known("attention.head_count_kv", heads) * each
    with suppress(OSError):
        size = sum(file.stat().st_size for file in files(path))
        return size + (n_ctx or known("context_length", 0)) * values * _F16
    return None


def chat_template(path: Path) -> str | None:
    """Return the chat template that a model carries; None if it has none: a base model.

    llama-server cannot tell: without one it takes ChatML and shows that as the model's own.
    """
    header = read(path)
    return header.texts.get("chat_template") if header else None


def part(name: str) -> tuple[int, int]:
    """Return which part of how many a file is by its name; (1, 1) for a model in one file."""
    split = _SPLIT.search(name)
    return (int(split["number"]), int(split["count"])) if split else (1, 1)


def parts(name: str) -> Iterator[str]:
    """Yield the names of all parts of a model, in order."""
    split = _SPLIT.search(name)
    if split is None:
        yield name
        return
    for number in range(1, int(split["count"]) + 1):
        yield f"{name[: split.start()]}-{number:05d}-of-{split['count']}.gguf"


def of_quantisation(names: Iterable[str], wanted: str) -> list[str]:
    """Return the files that ``OWNER/REPO:QUANTISATION`` may mean, the one that it means first."""
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(wanted)}(?=[-./])", re.IGNORECASE)
    fitting = (
        name
        for name in names
        if (low := name.lower()).endswith(".gguf") and "mmproj" not in low
        if pattern.search(name) and part(name)[0] == 1
    )
    return sorted(fitting, key=lambda name: (len(name), name))


def files(path: Path) -> list[Path]:
    """Return the files of a model by the path of one of them: all parts, in order."""
    return [path.with_name(name) for name in parts(path.name)]


class _Reader:
    """Reads key after key. Sizes in a header are claims: no memory or time is spent on them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._texts = 0
        self._room = _MAX_TEXT

    def header(self) -> Header:
        if self._file.read(4) != b"GGUF":
            raise ValueError("no GGUF")
        version, tensors, count = self._unpack("<IQQ")
        if version not in (2, 3) or count > _MAX_KEYS:
            raise ValueError("of an unknown version")
        numbers: dict[str, int] = {}
        texts: dict[str, str] = {}
        for _ in range(count):
            name, kind = self._text(), self._unpack("<I")[0]
            key = name.partition(".")[2]
            if kind == _TEXT and name in _TEXTS:
                texts[key] = self._text()
            elif (number := self._number(kind)) is not None:
                numbers[key] = number
        if (keys := self._file.tell()) > _MAX_KEYS_BYTES:
            raise ValueError("keys that are too long")
        end = self._end(tensors, numbers.get("alignment") or _ALIGNMENT)
        return Header(numbers, texts, end, keys)

    def _end(self, count: int, alignment: int) -> int:
        if count > _MAX_TENSORS:
            raise ValueError("too many tensors")
        last = 0
        for _ in range(count):
            self._text()
            (dimensions,) = self._unpack("<I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError("too many dimensions")
            *shape, kind, offset = self._unpack(f"<{dimensions}QIQ")
            known = [(values, sizes[kind]) for values, sizes in _BLOCKS.items() if kind in sizes]
            values, size = known[0] if known else (1, 0)
            last = max(last, offset + math.prod(shape) // values * size)
        end = self._file.tell()
        return end + -end % alignment + last if count else 0

    def _number(self, kind: int) -> int | None:
        """Return a whole number, or the largest of an array with one for each layer; else None."""
        count = 1
        if kind == _ARRAY:
            kind, count = self._unpack("<IQ")
        if kind == _TEXT:
            self._texts += count
            if self._texts > _MAX_TEXTS:
                raise ValueError("too many texts")
            self._skip_texts(count)
            return None
        if kind not in _SCALARS:
            raise ValueError("a GGUF value type that is not known")
        if not 0 < count <= _MAX_LAYERS:
            # beyond the end of the file the next read fails
            self._file.seek(count * struct.calcsize(f"<{_SCALARS[kind]}"), 1)
            return None
        values = self._unpack(f"<{count}{_SCALARS[kind]}")
        return max(values) if type(values[0]) is int else None

    def _skip_texts(self, count: int) -> None:
        """Skip one text or hundreds of thousands, before every start: a block is read at a time."""
        length, block, at, last = struct.Struct("<Q").unpack_from, b"", 0, -1
        for _ in range(count):
            if at > last:
                self._file.seek(at - len(block), 1)
                block, at = self._file.read(min(_READ, count * _TYPICAL)), 0
                last = len(block) - 8
            (size,) = length(block, at)
            at += 8 + size
        self._file.seek(at - len(block), 1)

    def _text(self) -> str:
        (length,) = self._unpack("<Q")
        self._room -= length
        if self._room < 0:
            raise ValueError("texts that are too long")
        return self._exactly(length).decode("utf-8", "replace")

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self._exactly(struct.calcsize(layout)))

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise EOFError
        return data
