"""Verified chunks that outlive their process: what is kept, what is believed, what is swept."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import stat
import time
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llama_loader import partial
from llama_loader.disk import STALE_SECONDS, Folder
from llama_loader.events import Event, Note, Sink, ignore
from llama_loader.partial import Partial, chunk_length, is_chunk
from tests.rigs.downloads import described

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_loader.manifest import Artifact

SIZE, COUNT = 1000, 4
DATA = random.Random(11).randbytes(SIZE * (COUNT - 1) + 17)
PARTS = [DATA[at : at + SIZE] for at in range(0, len(DATA), SIZE)]
ARTIFACT = described(DATA, SIZE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "partial"
    made.mkdir(mode=0o700)
    return made


@contextmanager
def kept(folder: Path, artifact: Artifact = ARTIFACT, sink: Sink = ignore) -> Iterator[Partial]:
    with Folder.open(folder) as opened, closing(Partial(opened, artifact, sink)) as here:
        yield here


def sweep(folder: Path) -> None:
    with Folder.open(folder) as opened:
        partial.sweep(opened)


def the_file(folder: Path) -> Path:
    return folder / ARTIFACT.sha256


def test_the_next_process_finds_what_was_kept(folder: Path) -> None:
    with kept(folder) as here:
        for index, part in enumerate(PARTS[:3]):
            here.keep(index, part)
            assert here.get(index) == part
        assert here.get(3) is None
    assert stat.S_IMODE(the_file(folder).stat().st_mode) == 0o600
    assert the_file(folder).read_bytes() == DATA[: 3 * SIZE]
    with kept(folder) as here:
        assert [here.get(at) for at in range(COUNT)] == [*PARTS[:3], None]
        here.keep(3, PARTS[3])
    assert the_file(folder).read_bytes() == DATA


def test_two_processes_that_keep_the_same_chunks_do_not_disturb_each_other(folder: Path) -> None:
    with kept(folder) as one, kept(folder) as other:
        for index, part in enumerate(PARTS):
            one.keep(index, part)
            other.keep(index, part)
        assert [other.get(at) for at in range(COUNT)] == PARTS
    assert the_file(folder).read_bytes() == DATA


def test_where_chunks_begin_and_how_long_they_are() -> None:
    assert [chunk_length(ARTIFACT, at) for at in range(COUNT)] == [1000, 1000, 1000, 17]


def test_a_chunk_is_right_in_its_own_place_only() -> None:
    assert is_chunk(ARTIFACT, 1, PARTS[1])
    assert not is_chunk(ARTIFACT, 0, PARTS[1])
    assert not is_chunk(ARTIFACT, 1, PARTS[1][:-1])


def test_nothing_is_read_or_kept_once_it_is_closed(folder: Path) -> None:
    """Its folder's descriptor is closed then, and its number may be another file's."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with kept(folder) as here:
        here.keep(0, PARTS[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert here.get(0) is None
    here.keep(1, PARTS[1])
    assert the_file(folder).read_bytes() == PARTS[0]


def test_what_is_discarded_is_gone_and_stays_so(folder: Path) -> None:
    with kept(folder) as here:
        here.keep(0, PARTS[0])
        here.discard()
        assert here.get(0) is None
        here.keep(0, PARTS[0])
        assert list(folder.iterdir()) == []
        here.discard()  # twice is once


@pytest.mark.parametrize("at", range(COUNT))
def test_a_chunk_that_changed_meanwhile_is_not_handed_over(folder: Path, at: int) -> None:
    with kept(folder) as here:
        for index, part in enumerate(PARTS):
            here.keep(index, part)
        with the_file(folder).open("r+b") as stream:
            stream.seek(at * SIZE)
            stream.write(b"\x00\x01")
        found = [here.get(index) for index in range(COUNT)]
    assert found == [*PARTS[:at], None, *PARTS[at + 1 :]]


@pytest.mark.parametrize("kind", ["folder", "link", "hard link", "fifo", "loop"])
def test_what_is_no_file_of_ours_is_replaced(folder: Path, tmp_path: Path, kind: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"precious")
    if kind == "folder":
        the_file(folder).mkdir()
    elif kind == "fifo":
        os.mkfifo(the_file(folder))
    elif kind == "hard link":
        the_file(folder).hardlink_to(elsewhere)
    else:
        the_file(folder).symlink_to(elsewhere if kind == "link" else the_file(folder))
    events: list[Event] = []
    with kept(folder, sink=events.append) as here:
        assert [here.get(at) for at in range(COUNT)] == [None] * COUNT
        here.keep(0, PARTS[0])
        found = here.get(0)
    assert elsewhere.read_bytes() == b"precious"
    if kind == "folder":  # not removed: nobody knows whose it is
        assert found is None
        (note,) = events
        assert isinstance(note, Note)
    else:
        assert found == PARTS[0]
        assert events == []
        assert the_file(folder).read_bytes() == PARTS[0]


def test_a_disk_that_is_full_costs_no_more_than_resuming(folder: Path) -> None:
    events: list[Event] = []
    with kept(folder, sink=events.append) as here:
        here.keep(0, PARTS[0])
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE + 300, usual[1]))
            here.keep(1, PARTS[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
            signal.signal(signal.SIGXFSZ, ignored)
        here.keep(2, PARTS[2])  # for good, and said once
        assert here.get(0) is None
        assert list(folder.iterdir()) == []
    (note,) = events
    assert isinstance(note, Note)
    assert os.strerror(errno.EFBIG) in note.message


def test_a_disk_that_does_not_read_has_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(folder) as here:
        here.keep(0, PARTS[0])

        class Broken(BytesIO):
            def read(self, *_: object) -> bytes:
                raise OSError(errno.EIO, "broken")

        with monkeypatch.context() as changed:
            changed.setattr(here, "_file", Broken())
            assert here.get(0) is None


@pytest.mark.parametrize(("age", "stays"), [(0.99, True), (1.01, False)])
def test_what_nobody_went_on_with_is_swept(folder: Path, age: float, stays: bool) -> None:
    left = folder / ("0" * 64)
    left.write_bytes(b"x")
    old(left, age)
    sweep(folder)
    assert left.exists() is stays


@pytest.mark.parametrize("name", ["thesis.odt", "0" * 63, "0" * 65, "G" * 64, "0" * 64 + "~"])
def test_what_the_loader_did_not_name_is_not_swept(folder: Path, name: str) -> None:
    left = folder / name
    left.write_bytes(b"precious")
    old(left, 99)
    sweep(folder)
    assert left.read_bytes() == b"precious"


def test_a_folder_is_not_swept(folder: Path) -> None:
    left = folder / ("0" * 64)
    left.mkdir()
    (left / "inside").write_bytes(b"precious")
    old(left, 99)
    sweep(folder)
    assert (left / "inside").read_bytes() == b"precious"


def test_a_link_is_swept_itself_and_what_it_names_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    link = folder / ("0" * 64)
    link.symlink_to(tmp_path / "precious")
    os.utime(link, (1, 1), follow_symlinks=False)
    sweep(folder)
    assert not link.is_symlink()
    assert (tmp_path / "precious").is_dir()


def old(path: Path, age: float) -> None:
    then = time.time() - age * STALE_SECONDS
    os.utime(path, (then, then))
