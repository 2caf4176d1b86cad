"""Which files are whole models, and those that are refused before anything is started."""

import os
import struct
import tracemalloc
from pathlib import Path

import pytest

from llama_loader import model, model_file, self_test
from llama_loader.errors import SettingError
from tests.loader.test_model import TINY, reason, refused
from tests.rigs.releases import settings

MMPROJ = b"GGUF" + struct.pack("<IQQQ20sIQ4s", 3, 0, 1, 20, b"general.architecture", 8, 4, b"clip")


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("page.gguf", b"<!doctype html><html>", "MODEL_NOT_GGUF"),
        ("empty.gguf", b"", "MODEL_NOT_GGUF"),
        ("begun.gguf", TINY[:4], "MODEL_INCOMPLETE"),
        ("cut.gguf", TINY[:100], "MODEL_INCOMPLETE"),
        ("words.gguf", TINY[:4000], "MODEL_INCOMPLETE"),
        ("half.gguf", TINY[: len(TINY) // 2], "MODEL_INCOMPLETE"),
        ("end.gguf", TINY[:-1], "MODEL_INCOMPLETE"),
        ("old.gguf", b"GGUF\1" + TINY[5:], "MODEL_NOT_GGUF"),
        ("m-00001-of-00003.gguf", TINY, "MODEL_INCOMPLETE"),
        ("m-00002-of-00003.gguf", TINY, "MODEL_INCOMPLETE"),
        ("m-00001-of-00000.gguf", TINY, "MODEL_PART"),
        ("m.gguf.part1of2", TINY, "MODEL_PART"),
        ("m.gguf-split-a", TINY, "MODEL_PART"),
        ("mmproj.gguf", MMPROJ, "MODEL_PROJECTOR"),
        ("none.gguf", None, "MODEL_MISSING"),
        ("4b", None, "MODEL_MISSING"),
        ("folder", None, "MODEL_MISSING"),
    ],
)
def test_what_is_no_whole_model_is_refused_before_anything_is_started(
    tmp_path: Path, name: str, data: bytes | None, code: str
) -> None:
    """A piece of a model on the Hub too, before anything is fetched."""
    if data is not None:
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    error = refused(tmp_path / name)
    assert error.code == code
    assert ("--hf REPO FILE" in error.hint) is (name in {"none.gguf", "4b"})
    assert ("name the .gguf file in it" in error.hint) is (name == "folder")
    assert ("invoke space --model" in error.hint) is (name == "4b")
    if code == "MODEL_PART" or "-00002-" in name:
        told = reason(settings(GGUF_FILENAME=name))
        assert (told.code, told.exit_status) == ("MODEL_PART", 2)
        assert name in told.message
        assert ("joined to one file" if code == "MODEL_PART" else "m-00001-of-00003") in told.hint
    if "-of-00003" in name:
        (tmp_path / "m-00003-of-00003.gguf").write_bytes(TINY)
        other = "m-00002-of-00003.gguf" if "-00001-" in name else "m-00001-of-00003.gguf"
        assert refused(tmp_path / name).message.endswith(f"missing: {other}")


def test_model_of_more_parts_than_any_has_is_refused_before_anything_is_asked() -> None:
    told = reason(settings(GGUF_FILENAME="m-00001-of-99999.gguf"))
    assert (told.code, told.exit_status) == ("MODEL_PART", 2)
    assert "would be a model of 99999 parts" in told.message
    assert reason(settings(GGUF_FILENAME="m-00001-of-01000.gguf")).code == "OFFLINE"


def test_later_part_is_refused_with_all_parts_beside_it(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(TINY)
    model_file.require_usable(tmp_path / "m-00001-of-00002.gguf")
    told = refused(tmp_path / "m-00002-of-00002.gguf")
    assert told.message.endswith("m-00002-of-00002.gguf is part 2 of 2 of a model")
    assert told.hint == "name the first part, m-00001-of-00002.gguf"
    second = tmp_path / "m-00002-of-00002.gguf"
    for data, words in (
        (TINY[: len(TINY) // 2], "its tensors end at byte 252352"),
        (b"<html>", "is no GGUF file"),
    ):
        second.write_bytes(data)
        with pytest.raises(SettingError, match=f"{second}.*{words}"):
            model_file.require_usable(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "FIFO by a link"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    """Whoever opens a FIFO waits for its writer."""
    path = tmp_path / "m.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "fifo").rename(path) if kind == "FIFO" else path.symlink_to("fifo")
    assert refused(path).code == "MODEL_MISSING"
    wanted = settings(GGUF_PATH=str(path), GGUF_SHA256="0" * 64)
    with pytest.raises(SettingError):
        model.get(wanted)


def gguf(*pairs: bytes, tensors: int = 1) -> bytes:
    """Return a file whose tensors are of a type that is not known, and take no byte."""
    tensor = struct.pack("<Q1sIIQ", 1, b"t", 0, 999, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs)) + b"".join(pairs)
    return header + tensor * tensors + bytes(32)


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
        (gguf(LLAMA, text("general.type", "model"), tensors=0), "MODEL_KIND", "vocabulary"),
        (gguf(text("general.architecture", "controlvector")), "MODEL_KIND", "(controlvector)"),
        (gguf(), "MODEL_KIND", "without an architecture"),
        (gguf(LLAMA, number("split.no", 0), number("split.count", 3)), "MODEL_PART", "of the 3"),
    ],
)
def test_gguf_file_that_is_no_whole_model_is_refused_by_what_it_says_of_itself(
    tmp_path: Path, data: bytes, code: str, words: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    error = refused(tmp_path / "m.gguf")
    assert error.code == code
    assert words in error.message


def test_parts_of_a_model_take_the_memory_of_two(tmp_path: Path) -> None:
    template = text("tokenizer.chat_template", "\U0001f600" + "x" * ((4 << 20) - 200))
    for number_of in range(1, 9):
        (tmp_path / f"m-0000{number_of}-of-00008.gguf").write_bytes(gguf(LLAMA, template))
    tracemalloc.start()
    model_file.require_usable(tmp_path / "m-00001-of-00008.gguf")
    assert tracemalloc.get_traced_memory()[1] < 96 << 20  # a header in memory has 16 MiB
    tracemalloc.stop()


@pytest.mark.parametrize("data", [self_test.MODEL.read_bytes(), gguf(LLAMA)])
def test_gguf_file_that_says_nothing_else_is_taken_for_a_model(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    model_file.require_usable(tmp_path / "m.gguf")
    whole = gguf(LLAMA, text("general.type", "model"), number("split.count", 1))
    (tmp_path / "m.gguf").write_bytes(whole)
    model_file.require_usable(tmp_path / "m.gguf")
    for part in (0, 1):  # llama-gguf-split can put a header alone into the first part
        data = gguf(LLAMA, number("split.count", 2), tensors=part)
        (tmp_path / f"p-0000{part + 1}-of-00002.gguf").write_bytes(data)
    model_file.require_usable(tmp_path / "p-00001-of-00002.gguf")
