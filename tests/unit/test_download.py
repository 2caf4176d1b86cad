"""Which bytes are asked for, of whom, over how many connections: by a shelf that keeps count.

What real servers do with such questions is in ``test_fetch`` and ``test_resume``.
"""

from __future__ import annotations

import hashlib
import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import pytest

from llama_loader.chunks import Wanted
from llama_loader.download import Download, best
from llama_loader.errors import IntegrityError, LoaderError, NetworkError
from llama_loader.mirrors import Mirrors
from llama_loader.patience import AttemptError, Deadline, Patience
from llama_loader.sources import Sources
from llama_loader.together import Pace
from llama_loader.web import Body

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llama_loader.mirrors import Mirror

CHUNK = 100
PATIENCE = Patience(attempts=3)


@dataclass(frozen=True)
class Always(Pace):
    """More connections for whatever asks; writes down what it was asked about."""

    lefts: list[int] = field(default_factory=list)

    def calls_for_more(self, rate: float, left: int) -> bool:
        self.lefts.append(left)
        return rate > 0


class Never(Always):
    """One connection, whatever it is asked about."""

    def calls_for_more(self, rate: float, left: int) -> bool:
        self.lefts.append(left)
        return rate < 0


class Shelf(Sources):
    """Has one file; writes down every range that it is asked for."""

    def __init__(self, data: bytes, trouble: Callable[[int | None], None] | None = None):
        super().__init__(offline=False, token=None, endpoint=None, patience=PATIENCE)
        self.data = data
        self.asked: list[tuple[int, int | None]] = []
        self.whole_only = False
        self.total: int | None = len(data)
        self.local = False
        self.says_ranges = True
        self._trouble = trouble
        self._lock = Lock()

    @contextmanager
    def opened(
        self, mirror: Mirror, start: int, deadline: Deadline, *, end: int | None = None
    ) -> Iterator[Body]:
        assert deadline.remaining() > 0
        with self._lock:
            self.asked.append((start, end))
        if self._trouble is not None:
            self._trouble(end)
        first = start if mirror.ranges and not self.whole_only else 0
        rest = memoryview(self.data)[first : None if self.whole_only else end]

        def read(size: int) -> bytes:
            nonlocal rest
            piece, rest = rest[:size], rest[size:]
            return bytes(piece)

        yield Body(
            first, self.total, None, None, read, ranges=self.says_ranges, is_local=self.local
        )


class Kept(dict[int, bytes]):
    """A keeper in memory."""

    def has(self, index: int) -> bool:
        return index in self

    def keep(self, index: int, data: bytes) -> bool:
        self[index] = data
        return True


def made(count: int, last: int = CHUNK) -> tuple[bytes, Wanted]:
    data = random.Random(count).randbytes((count - 1) * CHUNK + last)
    parts = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    digests = tuple(hashlib.sha256(part).hexdigest() for part in parts)
    return data, Wanted("a", len(data), hashlib.sha256(data).hexdigest(), CHUNK, digests)


def got(
    shelf: Shelf, wanted: Wanted, keeper: Kept | None = None, pace: Pace | None = None
) -> bytes:
    pace = pace or Never()
    download = Download(
        wanted,
        ["https://shelf.invalid/a"],
        sources=shelf,
        patience=PATIENCE,
        pace=pace,
        sleep=lambda _: None,
        keeper=keeper,
    )
    return b"".join(download.chunks())


def part(shelf_range: tuple[int, int | None]) -> int | None:
    """The chunk that a request is for; None for one that asks for more."""
    start, end = shelf_range
    return start // CHUNK if end is not None and end - start <= CHUNK else None


@pytest.mark.parametrize("keeper", [None, Kept()])
def test_one_question_where_nothing_is_here(keeper: Kept | None) -> None:
    data, wanted = made(5, last=7)
    shelf = Shelf(data)
    assert got(shelf, wanted, keeper) == data
    assert shelf.asked == [(0, None)]


@pytest.mark.parametrize(
    ("here", "asked"),
    [
        ([0], [(100, None)]),
        ([2], [(0, 200), (300, None)]),
        ([1, 2], [(0, 100), (300, None)]),
        ([5], [(0, 500)]),
        ([0, 5], [(100, 500)]),
        ([0, 1, 2, 3, 4, 5], []),
    ],
)
def test_only_what_is_not_here_is_asked_for(
    here: list[int], asked: list[tuple[int, int | None]]
) -> None:
    data, wanted = made(6, last=40)
    shelf = Shelf(data)
    keeper = Kept({at: data[at * CHUNK : (at + 1) * CHUNK] for at in here})
    assert got(shelf, wanted, keeper) == data
    assert shelf.asked == asked


def test_what_comes_is_kept_but_not_what_lies_on_this_machine() -> None:
    data, wanted = made(3)
    for local, kept in ((False, {0, 1, 2}), (True, set())):
        shelf, keeper = Shelf(data), Kept()
        shelf.local = local
        assert got(shelf, wanted, keeper) == data
        assert set(keeper) == kept


def test_the_rest_is_judged_by_what_is_behind_the_chunk_that_came() -> None:
    data, wanted = made(4, last=30)
    pace = Never()
    got(Shelf(data), wanted, Kept(), pace)
    assert pace.lefts == [230, 130]  # of two chunks or more; the last one is nobody's to share


@pytest.mark.parametrize(("count", "together"), [(2, False), (3, True)])
def test_several_connections_need_two_chunks_for_them(count: int, together: bool) -> None:
    data, wanted = made(count)
    shelf = Shelf(data)
    assert got(shelf, wanted, Kept(), Always()) == data
    assert shelf.asked[0] == (0, None)
    assert sorted(map(str, map(part, shelf.asked[1:]))) == (["1", "2"] if together else [])


def test_several_connections_ask_for_what_is_missing_each_chunk_once() -> None:
    data, wanted = made(8)
    shelf, keeper = Shelf(data), Kept({3: data[3 * CHUNK : 4 * CHUNK]})
    assert got(shelf, wanted, keeper, Always()) == data
    assert shelf.asked[0] == (0, 300)
    assert sorted(at for at in map(part, shelf.asked[1:]) if at is not None) == [1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("why", ["nobody keeps", "no parts"])
def test_one_connection_where_several_cannot_be(why: str) -> None:
    data, wanted = made(5)
    shelf, pace = Shelf(data), Always()
    shelf.says_ranges = why != "no parts"
    assert got(shelf, wanted, None if why == "nobody keeps" else Kept(), pace) == data
    assert shelf.asked == [(0, None)]
    assert pace.lefts == []


def test_after_several_failed_it_is_one_for_good() -> None:
    data, wanted = made(12)

    def busy(end: int | None) -> None:
        if end is not None:
            raise AttemptError("one connection only")

    shelf, pace = Shelf(data, busy), Always()
    assert got(shelf, wanted, Kept(), pace) == data
    alone = [asked for asked in shelf.asked if asked[1] is None]
    assert alone == [(0, None), (100, None)]
    assert len(pace.lefts) == 1


def test_a_part_that_comes_as_the_whole_is_no_part() -> None:
    """It is not compared with the part's digest: nothing is wrong with these bytes."""
    data, wanted = made(6)
    shelf = Shelf(data)

    def after_the_first(end: int | None) -> None:
        shelf.whole_only = end is not None

    shelf._trouble = after_the_first
    assert got(shelf, wanted, Kept(), Always()) == data


@pytest.mark.parametrize("total", [None, 301, 299])
def test_a_file_that_is_longer_is_not_begun(total: int | None) -> None:
    data, wanted = made(3)
    shelf = Shelf(data + b"x")
    shelf.total = total
    with pytest.raises(IntegrityError) as caught:
        got(shelf, wanted, keeper := Kept())
    assert caught.value.code == "FILE_TOO_LARGE"
    begun = total != 301
    assert set(keeper) == ({0, 1} if begun else set())


@pytest.mark.parametrize(("remaining", "waits"), [(7.0, True), (6.9, False)])
def test_a_wait_that_fits_into_the_time_left_is_made(remaining: float, waits: bool) -> None:
    class Left(Deadline):
        def remaining(self) -> float:
            return remaining

    mirrors, waited = Mirrors("a", ["https://one.invalid/a"], PATIENCE), []
    mirrors.failed(mirrors.best(), AttemptError("busy", wait=7.0))
    if waits:
        assert best(mirrors, Left(1.0), waited.append).url == "https://one.invalid/a"
    else:
        with pytest.raises(NetworkError, match="busy"):
            best(mirrors, Left(1.0), waited.append)
    assert waited == ([7.0] if waits else [])


def test_nobody_waits_for_a_mirror_that_has_not_failed() -> None:
    mirrors, waited = Mirrors("a", ["https://one.invalid/a"], PATIENCE), []
    mirrors.best().wait = 9.0
    best(mirrors, Deadline(1.0), waited.append)
    assert waited == []


def test_a_whole_that_is_not_what_its_chunks_promise_is_not_handed_over() -> None:
    data, wanted = made(2)
    lying = Wanted("a", len(data), "0" * 64, CHUNK, wanted.chunks)
    handed = Download(
        lying,
        ["https://shelf.invalid/a"],
        sources=Shelf(data),
        patience=PATIENCE,
        pace=Never(),
        sleep=lambda _: None,
        keeper=None,
    ).chunks()
    assert next(handed) == data[:CHUNK]
    with pytest.raises(LoaderError, match="every chunk is right, but the whole"):
        next(handed)
