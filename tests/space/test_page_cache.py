"""The page cache of this machine, with real evictions."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import comes

from llama_loader import settings
from llama_space import page_cache
from llama_space.values import Ready

MIB = 1 << 20
FEW = 6
"""Pieces."""


@pytest.fixture
def model(tmp_path: Path) -> list[Path]:
    """A model in two files, of which the second ends within a piece and a page."""
    files = [tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2)]
    files[0].write_bytes(os.urandom(66 * MIB))
    files[1].write_bytes(os.urandom(3 * MIB + 5))
    return files


def ready(files: list[Path], size: int = 69 * MIB + 5) -> Ready:
    return Ready(settings.load(environ={}), None, files[0], size)


def drop(path: Path, start: int = 0) -> None:
    """Have the kernel drop a file's pages from its cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # what is not written yet cannot be dropped
        os.posix_fadvise(handle, start, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def gone(path: Path) -> int:
    """Count the pieces of a file that lack a page; the kernel may drop a few at any moment."""
    return len(list(page_cache.lacking(path)))


def test_model_that_is_cut_short_while_it_is_looked_at_does_not_end_the_keeper(
    model: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    look = page_cache.lacking

    def cut_short(path: Path) -> Iterator[int]:
        looking = look(path)
        yield next(looking)
        os.truncate(path, MIB)
        yield from looking

    drop(model[0])
    monkeypatch.setattr(page_cache, "lacking", cut_short)
    assert page_cache.fill(ready(model), again=True) == 0
    assert model[0].stat().st_size == MIB


def test_only_what_was_dropped_is_lacking_and_read_again(model: list[Path]) -> None:
    page_cache.fill(ready(model))
    assert sum(map(gone, model)) <= FEW
    drop(model[0], 64 * MIB)
    drop(model[1])
    assert {64 * MIB, 65 * MIB} <= {*page_cache.lacking(model[0])}
    assert [*page_cache.lacking(model[1])] == [0, MIB, 2 * MIB, 3 * MIB]
    assert 5 * MIB + 5 <= page_cache.fill(ready(model), again=True) <= (5 + FEW) * MIB + 5
    drop(model[0])
    assert gone(model[0]) == 66
    assert page_cache.fill(ready(model)) == 69 * MIB + 5
    assert gone(model[0]) <= FEW


def test_dropped_pages_come_back_while_the_app_idles_by_a_thread_that_others_come_before(
    model: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page_cache, "EVERY", 0.05)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    over = threading.Event()
    keeper = threading.Thread(target=page_cache.keep, args=(ready(model), over))
    keeper.start()
    try:
        for _ in range(2):
            drop(model[0])
            assert comes(lambda: gone(model[0]) <= FEW)
        assert os.getpriority(os.PRIO_PROCESS, keeper.native_id or 0) == 19
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    finally:
        over.set()
        keeper.join()
    assert "of the model again" in capfd.readouterr().err


@pytest.mark.parametrize("memory", [0, 69 * MIB])
def test_nothing_is_read_that_memory_has_no_room_for(
    model: list[Path], memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(model[0])
    monkeypatch.setattr(page_cache.cgroups, "memory", lambda: memory)
    assert page_cache.fill(ready(model)) == 0
    assert gone(model[0]) == 66


def test_a_file_that_is_gone_ends_nothing(model: list[Path]) -> None:
    model[1].unlink()
    drop(model[0])
    page_cache.fill(ready(model))
    assert gone(model[0]) <= FEW
