"""Verified chunks that outlive their process: what is kept, what is believed, what is swept."""

from __future__ import annotations

import errno
import os
import random
import stat
import time
from pathlib import Path

import pytest

from llama_loader import partial
from llama_loader.events import Event, Note
from llama_loader.partial import Partial, chunk_length, is_chunk
from tests.rigs.downloads import described

SIZE, COUNT = 1000, 4
DATA = random.Random(11).randbytes(SIZE * (COUNT - 1) + 17)
PARTS = [DATA[at : at + SIZE] for at in range(0, len(DATA), SIZE)]
ARTIFACT = described(DATA, SIZE)
ONE = described(b"12345", 9, chunks=("0" * 64,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "partial"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def the_file(folder: Path) -> Path:
    return folder / ARTIFACT.sha256


def test_nothing_is_made_before_a_chunk_is_kept(folder: Path) -> None:
    with Partial(folder, ARTIFACT) as here:
        assert not here.has(0)
        assert here.get(0) is None
    assert not folder.exists()


def test_each_chunk_has_its_place_in_any_order_and_the_next_process_finds_them(
    folder: Path,
) -> None:
    with Partial(folder, ARTIFACT) as here:
        for at in (3, 0, 2):
            assert here.keep(at, PARTS[at])
            assert here.has(at)
            assert here.get(at) == PARTS[at]
        assert not here.has(1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(the_file(folder).stat().st_mode) == 0o600
    assert the_file(folder).read_bytes() == DATA.replace(PARTS[1], bytes(SIZE))
    with Partial(folder, ARTIFACT) as here:
        assert [here.get(at) for at in range(COUNT)] == [PARTS[0], None, PARTS[2], PARTS[3]]


def test_where_chunks_begin_and_how_long_they_are() -> None:
    assert [chunk_length(ARTIFACT, at) for at in range(COUNT)] == [1000, 1000, 1000, 17]


def test_a_chunk_is_right_in_its_own_place_only() -> None:
    assert is_chunk(ARTIFACT, 1, PARTS[1])
    assert not is_chunk(ARTIFACT, 0, PARTS[1])
    assert not is_chunk(ARTIFACT, 1, PARTS[1][:-1])


def test_it_is_let_go_of_at_the_end(folder: Path) -> None:
    with Partial(folder, ARTIFACT) as here:
        here.keep(0, PARTS[0])
        handles = open_files()
    assert open_files() == handles - 1
    assert not here.has(0)
    assert not here.keep(1, PARTS[1])
    assert the_file(folder).stat().st_size == SIZE


def test_what_is_discarded_is_gone_and_stays_so(folder: Path) -> None:
    with Partial(folder, ARTIFACT) as here:
        here.keep(0, PARTS[0])
        here.discard()
        assert not here.has(0)
        assert here.get(0) is None
        assert not here.keep(0, PARTS[0])
        assert list(folder.iterdir()) == []
        here.discard()  # twice is once


@pytest.mark.parametrize("at", range(COUNT))
def test_a_chunk_that_changed_meanwhile_is_neither_found_nor_handed_over(
    folder: Path, at: int
) -> None:
    with Partial(folder, ARTIFACT) as here:
        for index, part in enumerate(PARTS):
            here.keep(index, part)
        with the_file(folder).open("r+b") as stream:
            stream.seek(at * SIZE)
            stream.write(b"\x00\x01")
        assert here.get(at) is None
        assert not here.has(at)
    with Partial(folder, ARTIFACT) as here:
        assert [index for index in range(COUNT) if here.has(index)] == [
            index for index in range(COUNT) if index != at
        ]


def test_an_artifact_of_one_chunk_is_kept_whole_or_not_at_all(folder: Path) -> None:
    with Partial(folder, ONE) as here:
        assert not here.keep(0, b"12345")
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["folder", "link", "fifo", "loop"])
def test_what_is_no_file_of_ours_is_replaced(folder: Path, tmp_path: Path, kind: str) -> None:
    folder.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"precious")
    if kind == "folder":
        the_file(folder).mkdir()
    elif kind == "fifo":
        os.mkfifo(the_file(folder))
    else:
        the_file(folder).symlink_to(elsewhere if kind == "link" else the_file(folder))
    events: list[Event] = []
    with Partial(folder, ARTIFACT, events.append) as here:
        assert not any(here.has(at) for at in range(COUNT))
        kept = here.keep(1, PARTS[1])
    assert elsewhere.read_bytes() == b"precious"
    if kind == "folder":  # not removed: nobody knows whose it is
        assert not kept
        (note,) = events
        assert isinstance(note, Note)
    else:
        assert kept
        assert events == []
        assert the_file(folder).read_bytes() == bytes(SIZE) + PARTS[1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_costs_no_more_than_resuming(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    events: list[Event] = []
    with Partial(folder, ARTIFACT, events.append) as here:
        here.keep(0, PARTS[0])

        def full(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "pwrite", full)
        assert not here.keep(1, PARTS[1])
        monkeypatch.undo()
        assert not here.keep(2, PARTS[2])  # for good, and said once
        assert not here.has(0)
        assert list(folder.iterdir()) == []
    (note,) = events
    assert isinstance(note, Note)
    assert os.strerror(code) in note.message


def test_a_write_that_stops_half_way_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: whole(handle, data[:300], at))
    with Partial(folder, ARTIFACT) as here:
        assert here.keep(2, PARTS[2])
        assert here.get(2) == PARTS[2]


def test_a_disk_that_does_not_read_has_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Partial(folder, ARTIFACT) as here:
        here.keep(0, PARTS[0])

        def broken(*_: object) -> bytes:
            raise OSError(errno.EIO, "broken")

        monkeypatch.setattr(os, "pread", broken)
        assert here.get(0) is None
        assert not here.has(0)


@pytest.mark.parametrize(("age", "stays"), [(0.99, True), (1.01, False)])
def test_what_nobody_went_on_with_is_swept(folder: Path, age: float, stays: bool) -> None:
    folder.mkdir()
    left = folder / ("0" * 64)
    left.write_bytes(b"x")
    old(left, age)
    partial.sweep(folder)
    assert left.exists() is stays


@pytest.mark.parametrize("name", ["thesis.odt", "0" * 63, "0" * 65, "G" * 64, "0" * 64 + "~"])
def test_what_the_loader_did_not_name_is_not_swept(folder: Path, name: str) -> None:
    folder.mkdir()
    left = folder / name
    left.write_bytes(b"precious")
    old(left, 99)
    partial.sweep(folder)
    assert left.read_bytes() == b"precious"


def test_a_folder_is_not_swept(folder: Path) -> None:
    left = folder / ("0" * 64)
    left.mkdir(parents=True)
    (left / "inside").write_bytes(b"precious")
    old(left, 99)
    partial.sweep(folder)
    assert (left / "inside").read_bytes() == b"precious"


def test_a_link_is_swept_itself_and_what_it_names_stays(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    (tmp_path / "precious").mkdir()
    link = folder / ("0" * 64)
    link.symlink_to(tmp_path / "precious")
    os.utime(link, (1, 1), follow_symlinks=False)
    partial.sweep(folder)
    assert not link.is_symlink()
    assert (tmp_path / "precious").is_dir()


def test_a_folder_that_is_a_link_is_not_swept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    left = tmp_path / "elsewhere" / ("0" * 64)
    left.write_bytes(b"precious")
    old(left, 99)
    folder.symlink_to(tmp_path / "elsewhere")
    partial.sweep(folder)
    assert left.read_bytes() == b"precious"


def old(path: Path, age: float) -> None:
    then = time.time() - age * partial.STALE_SECONDS
    os.utime(path, (then, then))


def test_nothing_to_sweep(folder: Path) -> None:
    partial.sweep(folder)
    assert not folder.exists()
