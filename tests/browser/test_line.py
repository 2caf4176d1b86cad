"""More visitors than may translate at once: each page says where one stands, in its language."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from gradio_client import Client
from playwright.sync_api import expect

from llama_loader import settings, sockets
from translator import page as page_module
from translator.page import Page as OurPage
from translator.values import Ask, Item, Piece, Progress, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gradio_client.client import Job
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser]

BEAT = 0.05


class Held:
    """An engine whose answers end when they are let go: no model is as punctual."""

    def __init__(self) -> None:
        self._over = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.running = 0

    def begin(self) -> None: ...

    def retry(self) -> None: ...

    def close(self) -> None: ...

    def doctor(self) -> str:
        return ""

    def state(self) -> State:
        return State("ready", server_pid=1)

    def let_go(self, count: int = 1) -> None:
        self._over.release(count)

    def stream(self, ask: Ask) -> Iterator[Item]:
        del ask
        self.running += 1
        self.begun.release()
        try:
            yield Piece("A cat", finished=False, tokens=1, tokens_per_second=1.0, reason="")
            while not self._over.acquire(timeout=BEAT):
                yield Progress("waiting", "waiting for words (1 s)")
            yield Piece("", finished=True, tokens=2, tokens_per_second=1.0, reason="stop")
        finally:
            self.running -= 1


@pytest.fixture
def engine() -> Held:
    return Held()


@pytest.fixture
def url(engine: Held) -> Iterator[str]:
    port = sockets.free_port()
    served = OurPage(engine, settings.load(environ={}))
    served.launch(prevent_thread_lock=True, server_port=port, quiet=True)
    yield f"http://127.0.0.1:{port}"
    served.demo.close()


@pytest.fixture
def taken(url: str, engine: Held) -> Iterator[list[Job]]:
    """Every place is taken by a program; they end where the test ends."""
    with closing(Client(url, verbose=False)) as client:
        jobs = [
            client.submit("猫", "en", api_name="/translate") for _ in range(page_module.CONCURRENCY)
        ]
        for _ in jobs:
            assert engine.begun.acquire(timeout=30)
        yield jobs
        engine.let_go(100)
        for job in jobs:
            job.result(30)


def asking(visit: Callable[..., Page], url: str, locale: str) -> Page:
    page = visit(url, locale=locale)
    page.wait_for_selector(".pill.ready")
    page.locator("#source textarea").fill("猫")
    page.locator("#go").click()
    return page


def test_each_visitor_reads_the_place_and_moves_up(
    url: str, engine: Held, taken: list[Job], visit: Callable[..., Page]
) -> None:
    first = asking(visit, url, "en-GB")
    expect(first.locator("#status")).to_contain_text("In line, number 1.")
    second = asking(visit, url, "ja-JP")
    expect(second.locator("#status")).to_contain_text("順番待ち 2 番目です。")
    assert engine.running == len(taken)
    engine.let_go()
    expect(first.locator("#target textarea")).to_have_value("A cat")
    expect(second.locator("#status")).to_contain_text("順番待ち 1 番目です。")
    engine.let_go(100)
    second.wait_for_selector(".status.done")


def test_who_stops_or_leaves_gives_the_place_up(
    url: str, engine: Held, taken: list[Job], visit: Callable[..., Page]
) -> None:
    stops, leaves, stays = (asking(visit, url, "en-GB") for _ in range(3))
    expect(stays.locator("#status")).to_contain_text("number 3.")
    stops.keyboard.press("Escape")
    stops.wait_for_selector(".status.stopped")
    expect(stays.locator("#status")).to_contain_text("number 2.")
    leaves.close()
    expect(stays.locator("#status")).to_contain_text("number 1.")
    assert engine.running == len(taken)
