"""More visitors than may translate at once: each page says where one stands, in its language."""

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from gradio_client import Client
from gradio_client.client import Job
from held_process import Held
from playwright.sync_api import Page, expect

from translator import page as page_module

pytestmark = [pytest.mark.browser]


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
