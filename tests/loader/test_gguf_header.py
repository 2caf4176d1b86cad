"""What a GGUF header says, and headers that ask for much work or memory."""

import os
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import pytest

from llama_loader import gguf_header


def written(path: Path, template: str | None) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_token_list(["a", "b"])
    writer.add_block_count(7)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_context_length(128)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("template", ["{{ messages }}", "訳" * 300, None])
def test_the_template_is_read_as_it_is(tmp_path: Path, template: str | None) -> None:
    whole = written(tmp_path / "m.gguf", template)
    assert gguf_header.chat_template(whole) == template
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 20, whole.stat().st_size // 2):
        cut.write_bytes(whole.read_bytes()[:length])
        assert gguf_header.chat_template(cut) is None
    assert gguf_header.chat_template(tmp_path / "nowhere.gguf") is None


def raw(path: Path, *pairs: bytes, size: int = 0) -> Path:
    """Write a header of such keys and values; the file is sparse up to ``size`` bytes."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs))
    with path.open("r+b") as file:
        file.truncate(max(size, path.stat().st_size))
    return path


def pair(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


BLOCKS = pair(b"llama.block_count", 4, struct.pack("<I", 7))
GIB = 1 << 30


@pytest.mark.parametrize(
    "bad",
    [
        pair(b"x", 9, struct.pack("<IQ", 4, 1 << 28)),  # whole numbers
        pair(b"x", 9, struct.pack("<IQ", 12, 1 << 27)),  # floats
        pair(b"x", 9, struct.pack("<IQ", 8, 1 << 28)),  # empty texts, as many as there are zeros
        pair(b"x", 9, struct.pack("<IQ", 8, 1 << 20)) + pair(b"", 9, struct.pack("<IQ", 8, 9)),
        pair(b"x", 9, struct.pack("<IQ", 4, 1 << 63)),
        pair(b"x", 9, struct.pack("<IQ", 9, 1 << 28)),  # arrays
        pair(b"x", 8, struct.pack("<Q", GIB)),
        pair(b"x", 8, struct.pack("<Q", (1 << 64) - 1)),
        struct.pack("<Q", GIB),  # a name of a gibibyte
        pair(b"tokenizer.chat_template", 8, struct.pack("<Q", GIB)),
        b"".join(pair(b"%c" % one + bytes(3 << 20), 0, b"1") for one in range(65, 70)),
    ],
)
def test_header_that_claims_much_is_read_in_little_time_and_memory(
    tmp_path: Path, bad: bytes
) -> None:
    path = raw(tmp_path / "m.gguf", bad, *[b"\0" * 12] * 9_000, size=2 * GIB + 4096)
    tracemalloc.start()
    started = time.process_time()
    gguf_header.measure(path, 4096)
    assert gguf_header.chat_template(path) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert time.process_time() - started < 10


def test_what_follows_a_long_array_is_read(tmp_path: Path) -> None:
    scores = pair(b"tokenizer.ggml.scores", 9, struct.pack("<IQ", 4, 300_000) + bytes(1_200_000))
    heads = pair(b"llama.attention.head_count_kv", 9, struct.pack("<IQ3I", 4, 3, 2, 8, 4))
    widths = [
        pair(f"llama.attention.{name}_length".encode(), 4, struct.pack("<I", 64))
        for name in ("key", "value")
    ]
    path = raw(tmp_path / "m.gguf", scores, heads, *widths, BLOCKS)
    assert gguf_header.measure(path, 10) == path.stat().st_size + 10 * 7 * 8 * 128 * 2


@pytest.mark.parametrize(("size", "is_read"), [(60 << 20, True), (70 << 20, False)])
def test_keys_of_more_bytes_than_any_model_has_are_no_header(
    tmp_path: Path, size: int, *, is_read: bool
) -> None:
    numbers = pair(b"x", 9, struct.pack("<IQ", 0, size))
    (path := tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + numbers)
    os.truncate(path, size + 100)
    assert bool(gguf_header.read(path)) == is_read


@pytest.mark.parametrize("size", [1_300_000, 1_000])
def test_array_beyond_the_end_of_the_file_is_no_header(tmp_path: Path, size: int) -> None:
    scores = pair(b"x", 9, struct.pack("<IQ", 4, 400_000))
    assert gguf_header.measure(raw(tmp_path / "m.gguf", scores, BLOCKS, size=size), 1) is None


def test_parts_of_a_model_follow_from_its_name() -> None:
    assert list(gguf_header.parts("m.gguf")) == ["m.gguf"]
    assert gguf_header.part("sub/m.gguf") == (1, 1)
    assert gguf_header.part("sub/m-00002-of-00003.gguf") == (2, 3)
    assert list(gguf_header.parts("sub/m-00001-of-00002.gguf")) == [
        "sub/m-00001-of-00002.gguf",
        "sub/m-00002-of-00002.gguf",
    ]


def test_long_name_of_a_file_is_looked_through_at_once() -> None:
    started = time.process_time()
    assert gguf_header.of_quantisation(["-Q4_K_M" * 150_000, "a-Q4_K_M.gguf"], "q4_k_m")
    assert time.process_time() - started < 10
