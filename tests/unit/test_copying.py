"""A file of which nobody says beforehand how large it is."""

from __future__ import annotations

import hashlib
import io

import pytest

from llama_loader.copying import Copy
from llama_loader.errors import IntegrityError
from llama_loader.events import Downloading, Event
from llama_loader.patience import RangeError
from llama_loader.web import Body


def body(
    data: bytes, start: int = 0, total: int | None = None, asked: list[int] | None = None
) -> Body:
    rest = data

    def read(size: int) -> bytes:
        nonlocal rest
        if asked is not None:
            asked.append(size)
        piece, rest = rest[: min(size, 4)], rest[min(size, 4) :]
        return piece

    return Body(start, total, '"one"', None, read)


def copied() -> tuple[Copy, io.BytesIO]:
    target = io.BytesIO()
    return Copy(target), target


def test_it_is_written_hashed_and_told_piece_by_piece() -> None:
    copy, target = copied()
    events: list[Event] = []
    copy.take(body(b"0123456789", total=10), "u", 100, events.append)
    assert target.getvalue() == b"0123456789"
    assert copy.digest.hexdigest() == hashlib.sha256(b"0123456789").hexdigest()
    assert (copy.size, copy.total, copy.validator) == (10, 10, '"one"')
    assert events == [Downloading("u", done, 10) for done in (4, 8, 10)]


def test_it_goes_on_where_it_ended() -> None:
    copy, target = copied()
    copy.take(body(b"0123", total=10), "u", 100, lambda _: None)
    copy.take(body(b"456789", start=4, total=10), "u", 100, lambda _: None)
    assert target.getvalue() == b"0123456789"
    assert copy.digest.hexdigest() == hashlib.sha256(b"0123456789").hexdigest()


@pytest.mark.parametrize("start", [0, 3, 5])
def test_any_other_beginning_is_a_new_one(start: int) -> None:
    copy, target = copied()
    copy.take(body(b"01234567", total=10), "u", 100, lambda _: None)
    copy.take(body(b"abc", start=start), "u", 100, lambda _: None)
    assert target.getvalue() == b"abc"
    assert (copy.size, copy.total) == (3, None)
    assert copy.digest.hexdigest() == hashlib.sha256(b"abc").hexdigest()


def test_a_part_of_a_file_of_another_size_is_another_files() -> None:
    copy, _ = copied()
    copy.take(body(b"0123", total=10), "u", 100, lambda _: None)
    with pytest.raises(RangeError, match="the file changed in the middle"):
        copy.take(body(b"4567", start=4, total=11), "u", 100, lambda _: None)
    copy.take(body(b"456789", start=4), "u", 100, lambda _: None)  # nobody says how large
    assert copy.size == 10


def test_a_file_of_exactly_the_limit_is_taken_and_no_byte_more_is_asked_for() -> None:
    copy, _ = copied()
    asked: list[int] = []
    copy.take(body(b"01234567", asked=asked), "u", 8, lambda _: None)
    assert copy.size == 8
    assert asked == [9, 5, 1]


def test_a_file_that_is_larger_is_refused() -> None:
    copy, target = copied()
    with pytest.raises(IntegrityError) as caught:
        copy.take(body(b"012345678"), "u", 8, lambda _: None)
    assert caught.value.code == "FILE_TOO_LARGE"
    assert caught.value.message == "u is larger than 8 bytes"
    assert len(target.getvalue()) == 8
