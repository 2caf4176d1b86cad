"""axe-core, which audits pages for accessibility, finds nothing in any state of the page."""

from collections.abc import Callable

import pytest
from axe_playwright_python import sync_playwright as axe
from held_process import Held
from playwright.sync_api import Page

pytestmark = [pytest.mark.browser]

SOURCE, TARGET = "#source textarea", "#target textarea"
REST = 500
"""Milliseconds after which lists have opened."""


def empty(page: Page, served: Held) -> None:
    del page, served


def list_open(page: Page, served: Held) -> None:
    del served
    page.locator("#target_language input").click()
    page.keyboard.type("a")
    page.wait_for_timeout(REST)


def running(page: Page, served: Held) -> None:
    page.locator(SOURCE).fill("猫")
    page.locator("#go").click()
    served.await_line("begun")
    page.wait_for_selector(".status.working")


def done(page: Page, served: Held) -> None:
    running(page, served)
    served.let_go(1)
    page.wait_for_selector(".status.done")


def refused(page: Page, served: Held) -> None:
    del served
    page.locator("#go").click()
    page.wait_for_selector(".status.failed")


def backstage(page: Page, served: Held) -> None:
    del served
    page.locator("#owners").click()
    page.locator("#examine").click()
    page.wait_for_selector("#report textarea")


def failed(page: Page, served: Held) -> None:
    served.be("failed")
    page.wait_for_selector("#failure .failure")


def unpinned(page: Page, served: Held) -> None:
    served.be("unpinned")
    page.reload()
    page.wait_for_selector(".pill.unverified")
    page.locator("#owners").click()


def preparing(page: Page, served: Held) -> None:
    served.be("preparing")
    page.wait_for_selector(".pill.preparing")


AT_REST = """document.getAnimations().every(
    one => one.playState !== "running" || one.effect.getComputedTiming().endTime === Infinity)"""
"""In a transition a colour is none of the design's: axe found a button half faded in."""
STATES = (empty, list_open, running, done, refused, backstage, failed, unpinned, preparing)


@pytest.mark.parametrize(("locale", "width"), [("en-GB", 1280), ("ja-JP", 390)])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_axe_finds_nothing_in_light_and_dark(
    resting: Held,
    visit: Callable[..., Page],
    state: Callable[[Page, Held], None],
    locale: str,
    width: int,
) -> None:
    resting.be("ready")
    resting.begun()
    page = visit(f"{resting.url}/?__theme=light", locale=locale, width=width, height=844)
    page.wait_for_selector("html.settled")
    state(page, resting)
    found = {theme: audited(page, theme) for theme in ("light", "dark")}
    assert found == {"light": {}, "dark": {}}


def audited(page: Page, theme: str) -> dict[str, list[str]]:
    """Return what axe finds: the elements of each rule that is broken."""
    page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
    page.wait_for_function(AT_REST)
    found = axe.Axe().run(page).response["violations"]
    return {one["id"]: [node["html"][:160] for node in one["nodes"]] for one in found}
