"""A file is the old one or the new one, and a disk that is full is one line."""

import errno
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from farm import durable


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_bytes_and_mode(tmp_path: Path) -> None:
    place = tmp_path / "file"
    for content, mode in ((b"one", 0o600), (b"two", 0o644)):
        durable.replace(place, content, mode)
        assert place.read_bytes() == content
        assert place.stat().st_mode & 0o777 == mode
    assert names(tmp_path) == ["file"]


def test_file_that_grows_after_it_was_opened_is_read_to_the_end_that_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the folder makes it a TiB, of which the disk has nothing."""
    file, opening, content = tmp_path / "file", durable.open_regular, b"content" * 99999

    def opened_and_grown(*arguments: Any, **options: Any) -> BinaryIO:
        stream = opening(*arguments, **options)
        os.truncate(file, 1 << 40)
        return stream

    monkeypatch.setattr(durable, "open_regular", opened_and_grown)
    file.write_bytes(content)
    assert durable.sha256(file) == hashlib.sha256(content).hexdigest()
    with pytest.raises(OSError, match="larger than"):
        durable.sha256(file, most=1 << 30)


def test_link_in_the_place_of_a_temporary_file_costs_no_person_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the folder is faster than the farm."""
    (tmp_path / "letter").write_bytes(b"letter")
    make = tempfile.mkstemp

    def made_and_replaced(*arguments: Any, **options: Any) -> tuple[int, str]:
        handle, name = make(*arguments, **options)
        Path(name).unlink()
        Path(name).symlink_to(tmp_path / "letter")
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", made_and_replaced)
    durable.replace(tmp_path / "file", b"new")
    assert (tmp_path / "letter").read_bytes() == b"letter"


def test_a_full_disk_leaves_the_old_file_and_no_other(full: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        durable.replace(full / "file", bytes(64 << 10))
    assert caught.value.errno == errno.ENOSPC
    assert (full / "file").read_bytes() == b"old"
    assert names(full) == ["file", "other"]


def test_whoever_fails_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def write() -> None:
        with durable.replacing(tmp_path / "file") as stream:
            stream.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]
