"""Which language the page translates into: a chosen one stays, another may turn round."""

from collections.abc import Callable

import pytest
from held_process import Held
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser]

ENGLISH = "The train leaves at nine, and the tickets are on the table."
GERMAN = "Der Zug fährt um neun, und die Karten liegen auf dem Tisch."


def press(page: Page, served: Held, text: str) -> str:
    """Translate a text to its end, and return the status line."""
    page.locator("#source textarea").fill(text)
    page.locator("#go").click()
    page.wait_for_selector(".status.working")
    served.let_go(1)
    page.wait_for_selector(".status.done")
    return page.locator("#status").inner_text()


def test_target_that_nobody_chose_turns_and_a_chosen_one_stays(
    served: Held, visit: Callable[..., Page]
) -> None:
    page = visit(served.url)
    page.wait_for_selector(".pill.ready")
    into = page.locator("#target_language input")
    assert "Deutsch → English" in press(page, served, GERMAN)
    assert "English → 日本語" in press(page, served, ENGLISH)
    expect(into).to_have_value("日本語 · Japanese")
    into.click()
    page.locator("#target_language li", has_text="Français · French").click()
    assert "English → Français" in press(page, served, ENGLISH)
    expect(into).to_have_value("Français · French")
    into.click()
    page.locator("#target_language li", has_text="English").first.click()
    page.locator("#go").click()
    expect(page.locator(".status.failed")).to_contain_text("English")
    expect(into).to_have_value("English")
