"""Files that are GGUF, and no model that can be served."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from llama_loader import model, self_test
from tests.loader.test_model import refused

if TYPE_CHECKING:
    from pathlib import Path


def gguf(*pairs: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


def text(key: str, value: str) -> bytes:
    name, content = key.encode(), value.encode()
    length = struct.pack("<IQ", 8, len(content))
    return struct.pack("<Q", len(name)) + name + length + content


def number(key: str, value: int) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IH", 2, value)


LLAMA = text("general.architecture", "llama")


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (gguf(text("general.type", "imatrix")), "MODEL_KIND", "(imatrix)"),
        (gguf(LLAMA, text("general.type", "adapter")), "MODEL_KIND", "(adapter)"),
        (gguf(LLAMA, text("general.type", "mmproj")), "MODEL_PROJECTOR", "(mmproj)"),
        (gguf(LLAMA, number("split.no", 0), number("split.count", 3)), "MODEL_PART", "of the 3"),
        (gguf(number("split.no", 1), number("split.count", 3)), "MODEL_PART", "by another name"),
    ],
)
def test_gguf_file_that_is_no_whole_model_is_refused_by_what_it_says_of_itself(
    tmp_path: Path, data: bytes, code: str, words: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    error = refused(tmp_path / "m.gguf")
    assert error.code == code
    assert words in error.message


@pytest.mark.parametrize("data", [self_test.MODEL.read_bytes(), gguf(LLAMA), gguf()])
def test_gguf_file_that_says_nothing_else_is_taken_for_a_model(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    model.require_usable(tmp_path / "m.gguf")
    whole = gguf(LLAMA, text("general.type", "model"), number("split.count", 1))
    (tmp_path / "m.gguf").write_bytes(whole)
    model.require_usable(tmp_path / "m.gguf")
    for name in ("p-00001-of-00002.gguf", "p-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(gguf(LLAMA, number("split.count", 2)))
    model.require_usable(tmp_path / "p-00001-of-00002.gguf")
