"""More visitors than may translate at once: each page says where one stands, in its language."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from contextlib import closing
from typing import IO, TYPE_CHECKING

import pytest
from gradio_client import Client
from playwright.sync_api import expect
from verbs import PROJECT

from llama_loader.server import free_port
from translator import page as page_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gradio_client.client import Job
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser]


class Held:
    """The page of rigs/held_page.py, in a process of its own."""

    def __init__(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._running = 0
        self._process = subprocess.Popen(
            [sys.executable, str(PROJECT / "tests/rigs/held_page.py"), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,))
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._running += line.strip() == "begun"
            self._lines.put(line.strip())

    def await_line(self, wanted: str) -> None:
        while self._lines.get(timeout=90) != wanted:
            pass

    def begun(self) -> int:
        """How many answers began since they were last counted."""
        return sum(self._lines.get() == "begun" for _ in range(self._lines.qsize()))

    def let_go(self, count: int | None = None) -> None:
        """Have so many answers end, or all that began and were not let go yet."""
        count = self._running if count is None else count
        self._running -= count
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.terminate()
        self._process.communicate()
        self._reader.join()


@pytest.fixture
def served() -> Iterator[Held]:
    held = Held()
    try:
        held.await_line("serving")
        yield held
    finally:
        held.end()


@pytest.fixture
def taken(served: Held) -> Iterator[list[Job]]:
    """Every place is taken by a program; they end where the test ends."""
    with closing(Client(served.url, verbose=False)) as client:
        jobs = []
        for _ in range(page_module.CONCURRENCY):
            jobs.append(client.submit("猫", "en", api_name="/translate"))
            served.await_line("begun")
        yield jobs
        served.let_go()
        for job in jobs:
            assert job.result(60) == "A cat"


def asking(visit: Callable[..., Page], url: str, locale: str = "en-GB") -> Page:
    page = visit(url, locale=locale)
    page.wait_for_selector(".pill.ready")
    page.locator("#source textarea").fill("猫")
    page.locator("#go").click()
    page.wait_for_selector(".status.waiting")
    return page


def test_each_visitor_reads_the_place_and_moves_up(
    served: Held, taken: list[Job], visit: Callable[..., Page]
) -> None:
    first = asking(visit, served.url)
    expect(first.locator("#status")).to_contain_text("In line, number 1.")
    second = asking(visit, served.url, "ja-JP")
    expect(second.locator("#status")).to_contain_text("順番待ち 2 番目です。")
    assert served.begun() == 0
    served.let_go(1)
    expect(first.locator("#target textarea")).to_have_value("A cat")
    expect(second.locator("#status")).to_contain_text("順番待ち 1 番目です。")
    assert served.begun() == 1
    served.let_go(len(taken))
    first.wait_for_selector(".status.done")
    expect(second.locator("#target textarea")).to_have_value("A cat")
    served.let_go(1)
    second.wait_for_selector(".status.done")


def test_who_stops_or_leaves_gives_the_place_up(
    served: Held, taken: list[Job], visit: Callable[..., Page]
) -> None:
    stops, leaves, stays = (asking(visit, served.url) for _ in range(3))
    expect(stays.locator("#status")).to_contain_text("number 3.")
    stops.keyboard.press("Escape")
    stops.wait_for_selector(".status.stopped")
    expect(stays.locator("#status")).to_contain_text("number 2.")
    leaves.close()
    expect(stays.locator("#status")).to_contain_text("number 1.")
    assert served.begun() == 0
    assert not any(job.done() for job in taken)
    stays.keyboard.press("Escape")
    stays.wait_for_selector(".status.stopped")
