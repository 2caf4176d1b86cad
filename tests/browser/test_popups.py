"""Lists and panels that lie on the page: whatever is below them does not shine through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from held_process import Held
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser]

SURFACE = "element => getComputedStyle(element).backgroundColor"


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, served: Held, visit: Callable[..., Page]) -> Page:
    opened = visit(f"{served.url}/?__theme={request.param}")
    opened.locator("#source textarea").fill("It rained until noon. " * 30)
    return opened


def is_opaque(popup: Locator) -> bool:
    colour: str = popup.evaluate(SURFACE)
    return colour.startswith("rgb(")


@pytest.mark.parametrize("name", ["source_language", "target_language"])
def test_language_list_is_opaque(page: Page, name: str) -> None:
    page.locator(f"#{name} input").click()
    assert is_opaque(page.locator(".options:visible"))


def test_panel_of_the_interface_for_programs_is_opaque(page: Page) -> None:
    page.locator("footer").get_by_role("button", name="API").click()
    assert is_opaque(page.locator(".api-docs-wrap"))
