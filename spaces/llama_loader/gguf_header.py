"""What a GGUF header says: how much memory model and context take, and the chat template.

Only what is needed is read: a few integers of the metadata, and one text. A file that cannot be
read so is not an error here; llama-server will say what is wrong with it in its own words.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MAGIC: Final = b"GGUF"
_SCALARS: Final = {
    # GGUF value types (ggml/include/gguf.h) by number, as struct formats; 8 text, 9 array
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TEXT: Final = 8
_TEMPLATE: Final = "tokenizer.chat_template"
_ARRAY: Final = 9
_MAX_KEYS: Final = 10_000
_MAX_SKIP: Final = 1 << 30
"""No array of a real header is longer than this many bytes."""
COMPUTE_MARGIN: Final = 512 * 1024**2
"""Bytes for compute buffers and the CUDA context, on each device that is used; llama.cpp measures
300 to 500 MiB for 27B."""
_F16: Final = 2
"""Bytes of one cached value in the default cache type."""
_SPLIT: Final = re.compile(r"-00001-of-([0-9]{5})\.gguf\Z")


@dataclass(frozen=True)
class ModelSize:
    """Bytes: ``file`` of all parts, ``context`` of the key/value cache (an upper bound)."""

    file: int
    context: int

    @property
    def needed(self) -> int:
        """Bytes of memory to hold all of it on one device."""
        return self.stored + COMPUTE_MARGIN

    @property
    def stored(self) -> int:
        """Bytes that are shared out among the devices, however many there are."""
        return self.file + self.context


def measure(path: Path, n_ctx: int) -> ModelSize | None:
    """Size a model for ``n_ctx`` tokens, 0 for as many as it was trained for.

    None where the file cannot be read as GGUF.

    The cache is counted as if every layer attended to everything: Gemma's sliding windows need
    less, so the figure errs to the safe side.
    """
    try:
        with path.open("rb") as file:
            metadata = _metadata(file)
        size = sum(part.stat().st_size for part in _parts(path))
    except (OSError, ValueError, struct.error, OverflowError):
        return None
    return ModelSize(size, _cache(metadata, n_ctx or metadata.get("context_length", 0)))


def chat_template(path: Path) -> str | None:
    """Return the chat template that a model carries; None where it has none: a base model.

    llama-server cannot tell: without one it takes ChatML and shows that as the model's own.
    """
    try:
        with path.open("rb") as file:
            for name in _names(file):
                kind = struct.unpack("<I", _exactly(file, 4))[0]
                if name == _TEMPLATE and kind == _TEXT:
                    return _text(file).decode("utf-8", "replace")
                _value(file, kind)
    except (OSError, ValueError, struct.error, OverflowError):
        return None
    return None


def _parts(path: Path) -> list[Path]:
    split = _SPLIT.search(path.name)
    if not split:
        return [path]
    stem, count = path.name[: split.start()], int(split[1])
    return [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def _cache(metadata: dict[str, int], n_ctx: int) -> int:
    layers = metadata.get("block_count", 0)
    heads = metadata.get("attention.head_count", 0)
    width = metadata.get("embedding_length", 0) // heads if heads else 0
    kv_heads = metadata.get("attention.head_count_kv", heads)
    key = metadata.get("attention.key_length", width)
    value = metadata.get("attention.value_length", width)
    return n_ctx * layers * kv_heads * (key + value) * _F16


def _metadata(file: BinaryIO) -> dict[str, int]:
    """Return the architecture's whole numbers, without its prefix (``llama.block_count``)."""
    found: dict[str, int] = {}
    for name in _names(file):
        value = _value(file, struct.unpack("<I", _exactly(file, 4))[0])
        if value is not None:
            found[name.partition(".")[2]] = value
    return found


def _names(file: BinaryIO) -> Iterator[str]:
    """Yield each key's name; who takes one reads its value before the next."""
    if file.read(4) != _MAGIC:
        raise ValueError("not GGUF")
    version, _tensors, keys = struct.unpack("<IQQ", _exactly(file, 20))
    if not 2 <= version <= 3 or keys > _MAX_KEYS:  # noqa: PLR2004 - the versions there are
        raise ValueError("a GGUF version that is not known")
    for _ in range(keys):
        yield _text(file).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> int | None:
    """Read or skip one value; the largest where a whole-number array gives one for each layer."""
    if kind == _TEXT:
        _skip_text(file)
        return None
    if kind == _ARRAY:
        return _array(file)
    layout = _SCALARS.get(kind)
    if layout is None:
        raise ValueError("a GGUF value type that is not known")
    value = struct.unpack(layout, _exactly(file, struct.calcsize(layout)))[0]
    return value if type(value) is int else None


def _array(file: BinaryIO) -> int | None:
    kind, count = struct.unpack("<IQ", _exactly(file, 12))
    if kind == _TEXT:
        if count > _MAX_SKIP:
            raise ValueError("an array that is too long")
        for _ in range(count):
            _skip_text(file)
        return None
    layout = _SCALARS.get(kind)
    if layout is None or count * struct.calcsize(layout) > _MAX_SKIP:
        raise ValueError("an array that is not known or too long")
    data = _exactly(file, count * struct.calcsize(layout))
    values = struct.unpack(f"<{count}{layout[1:]}", data)
    return max(values) if values and type(values[0]) is int else None


def _text(file: BinaryIO) -> bytes:
    return _exactly(file, _length(file))


def _skip_text(file: BinaryIO) -> None:
    file.seek(_length(file), 1)


def _length(file: BinaryIO) -> int:
    length: int = struct.unpack("<Q", _exactly(file, 8))[0]
    if length > _MAX_SKIP:
        raise ValueError("a text that is too long")
    return length


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError("the file ends within its header")
    return data
