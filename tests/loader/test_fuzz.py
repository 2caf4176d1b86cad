"""A few changed samples for every parser of bytes from outside; benchmarks/fuzz.py has 100,000."""

import contextlib
from pathlib import Path
from random import Random

import pytest

from llama_loader.errors import LoaderError
from tests.rigs.fuzz_targets import TARGETS

INPUTS = 40
FOUND = (
    ("hub", b"HTTP/1.1 307 OK\r\nLocation: " + b"a" * 70_000 + b"\r\n\r\n"),
    ("stream", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx"),
    ("kernel's files", b"0::/a\0b\f"),
    ("kernel's files", b"0::" + b"/a" * 9000 + b"\fMemTotal: " + b"1" * 5000 + b" kB\f"),
    ("nvidia-smi", b"RTX PRO 1 " * 100_000 + b", x, 1, 580.1, GPU-1"),
    ("ldconfig", b"libcuda.so.1 => /a\0b"),
)
"""What was an untyped error, or took minutes, once."""


@pytest.mark.parametrize("name", TARGETS)
def test_changed_sample_is_read_or_refused_in_the_loaders_words(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    for index in range(INPUTS):
        data = target.make(Random(f"0 {name} {index}"))
        with contextlib.suppress(LoaderError):
            target.read(data, tmp_path)


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_was_found_once_is_read_or_refused(name: str, data: bytes, tmp_path: Path) -> None:
    with contextlib.suppress(LoaderError):
        TARGETS[name].read(data, tmp_path)
