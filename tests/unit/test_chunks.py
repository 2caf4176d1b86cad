"""What an artifact's bytes must be, chunk by chunk."""

from __future__ import annotations

import hashlib
import random

import pytest

from llama_loader import chunks
from llama_loader.chunks import Wanted
from llama_loader.errors import IntegrityError
from llama_loader.mirrors import WrongBytesError
from llama_loader.patience import AttemptError
from llama_loader.web import Body

SIZE = 1000
BEGINNINGS = {"tar.gz": b"\x1f\x8b", "tar.xz": b"\xfd7zXZ\x00", "tar.zst": b"\x28\xb5\x2f\xfd"}


def made(form: str = "", count: int = 3, last: int = 7, size: int = SIZE) -> tuple[bytes, Wanted]:
    noise = random.Random(form).randbytes((count - 1) * size + last)
    data = (BEGINNINGS.get(form, b"") + noise)[: len(noise)]
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    digests = tuple(hashlib.sha256(part).hexdigest() for part in parts)
    whole = hashlib.sha256(data).hexdigest()
    return data, Wanted("a", len(data), whole, size, digests, form)


def body(data: bytes, asked: list[int] | None = None, at_most: int = 1 << 30) -> Body:
    def read(size: int) -> bytes:
        nonlocal data
        assert size > 0
        if asked is not None:
            asked.append(size)
        piece, data = data[: min(size, at_most)], data[min(size, at_most) :]
        return piece

    return Body(0, None, None, None, read)


def test_where_chunks_begin_and_how_long_they_are() -> None:
    _, wanted = made()
    assert wanted.last == 2
    assert [wanted.start(at) for at in range(3)] == [0, 1000, 2000]
    assert [wanted.length(at) for at in range(3)] == [1000, 1000, 7]


def test_a_chunk_is_right_in_its_own_place_only() -> None:
    data, wanted = made()
    assert wanted.is_right(1, data[1000:2000])
    assert wanted.is_right(1, bytearray(data[1000:2000]))
    assert not wanted.is_right(0, data[1000:2000])
    assert not wanted.is_right(1, data[1000:1999])


@pytest.mark.parametrize("at_most", [1, 999, 1000, 1 << 30])
def test_chunks_are_read_one_after_another_and_not_a_byte_further(at_most: int) -> None:
    data, wanted = made()
    stands = body(data + b"more", at_most=at_most)
    assert b"".join(chunks.read(stands, wanted, at) for at in range(3)) == data
    assert stands.read(10)[:1] == b"m"


def test_a_large_chunk_is_asked_for_in_pieces() -> None:
    data, wanted = made(count=1, last=2 * chunks.PIECE + 5, size=4 * chunks.PIECE)
    asked: list[int] = []
    assert chunks.read(body(data, asked), wanted, 0) == data
    assert asked == [chunks.PIECE, chunks.PIECE, 5]


def test_other_bytes_are_wrong_and_say_where() -> None:
    data, wanted = made()
    with pytest.raises(WrongBytesError, match="the 7 bytes from 2000 on are wrong") as caught:
        chunks.read(body(b"x" * 7), wanted, 2)
    assert caught.value.code == "CHUNK_MISMATCH"
    assert data[2000:] != b"x" * 7


@pytest.mark.parametrize("form", ["", *BEGINNINGS])
@pytest.mark.parametrize("index", [0, 1])
def test_a_body_that_ends_early_was_cut(form: str, index: int) -> None:
    data, wanted = made(form)
    start = index * SIZE
    with pytest.raises(AttemptError, match=f"ended after {start + 500} of 2007 bytes") as caught:
        chunks.read(body(data[start : start + 500]), wanted, index)
    assert not isinstance(caught.value, WrongBytesError)


def test_nothing_at_all_was_cut_too() -> None:
    _, wanted = made("tar.zst")
    with pytest.raises(AttemptError, match="ended after 0 of 2007 bytes") as caught:
        chunks.read(body(b""), wanted, 0)
    assert not isinstance(caught.value, WrongBytesError)


@pytest.mark.parametrize("form", list(BEGINNINGS))
def test_a_short_body_that_begins_otherwise_is_another_file(form: str) -> None:
    _, wanted = made(form)
    with pytest.raises(WrongBytesError, match=f"12 bytes that are no {form} came") as caught:
        chunks.read(body(b"<html>login>"), wanted, 0)
    assert caught.value.code == "NOT_THE_FILE"


def test_a_short_body_further_on_may_begin_as_it_likes() -> None:
    _, wanted = made("tar.zst")
    with pytest.raises(AttemptError, match="ended after 1006") as caught:
        chunks.read(body(b"<html>"), wanted, 1)
    assert not isinstance(caught.value, WrongBytesError)


@pytest.mark.parametrize("at_most", [3, 1 << 30])
def test_what_is_here_already_is_read_over(at_most: int) -> None:
    stands = body(b"0123456789abcdef", at_most=at_most)
    chunks.skip(stands, 10)
    assert stands.read(3) == b"abc"


def test_nothing_is_read_over_where_nothing_is_here() -> None:
    asked: list[int] = []
    chunks.skip(body(b"abc", asked), 0)
    assert asked == []


def test_a_body_that_ends_before_what_is_here() -> None:
    with pytest.raises(AttemptError, match="ended before what is here already"):
        chunks.skip(body(b"abc"), 4)


@pytest.mark.parametrize(("size", "words"), [(None, "it is longer,"), (9, "it is 9 bytes long,")])
def test_too_large(size: int | None, words: str) -> None:
    error = chunks.too_large(made()[1], size)
    assert error.code == "FILE_TOO_LARGE"
    assert str(error) == f"{words} and must be 2007 bytes"


def test_a_whole_is_what_it_must_be_or_the_manifest_contradicts_itself() -> None:
    _, wanted = made()
    chunks.require_whole(wanted, wanted.sha256)
    with pytest.raises(IntegrityError) as caught:
        chunks.require_whole(wanted, "f" * 64)
    assert caught.value.code == "SHA256_MISMATCH"
    assert "has sha256 ffff" in caught.value.message
    assert "contradicts itself" in caught.value.hint
