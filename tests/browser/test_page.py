"""The page in a real browser, as a person uses it."""

import itertools
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect
from space import Space

pytestmark = [pytest.mark.browser, pytest.mark.docker, pytest.mark.model]

SOURCE, TARGET = "#source textarea", "#target textarea"
SENTENCE = "The train leaves at nine, and the tickets are on the table."
WATCH = """() => {
    const area = document.querySelector("#target textarea");
    window.seen = [];
    const look = () => {
        if (window.seen.at(-1) !== area.value) window.seen.push(area.value);
        requestAnimationFrame(look);
    };
    look();
}"""


@pytest.fixture
def page(app: Space, visit: Callable[..., Page]) -> Page:
    opened = visit(app.url)
    opened.wait_for_selector(".pill.ready")
    return opened


def test_a_translation_streams_and_ends_and_what_ran_is_said(page: Page) -> None:
    page.evaluate(WATCH)
    page.locator(SOURCE).fill(SENTENCE)
    page.get_by_role("button", name="Translate").click()
    page.wait_for_selector(".status.done")
    seen = [text for text in page.evaluate("window.seen") if text]
    assert len(seen) >= 3
    assert all(later.startswith(one[:1]) for one, later in itertools.pairwise(seen))
    assert "tokens/s" in page.locator("#status").inner_text()
    page.locator("#owners").click()
    page.wait_for_selector(".last_calls dd:has-text('tok')")
    shown = page.locator("#colophon").inner_text()
    for part in ("verified", "CPU", "SmolLM2-135M-Instruct.Q4_1.gguf", "tokens/s", "first token"):
        assert part in shown
    expect(page.locator(".pill")).to_have_text("Ready · verified")


def test_the_counter_counts_and_a_text_too_long_is_a_sentence(page: Page) -> None:
    page.locator(SOURCE).fill("猫" * 300)
    expect(page.locator("#count")).to_have_text("300 / 300")
    page.locator(SOURCE).fill("猫" * 301)
    expect(page.locator("#count.over")).to_have_text("301 / 300")
    page.locator("#go").click()
    expect(page.locator(".status.failed")).to_contain_text("301 characters, 300 are allowed")
    expect(page.locator("#stop")).to_be_disabled()


def test_copy_puts_the_translation_on_the_clipboard(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(SOURCE).fill(SENTENCE)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".status.done")
    page.locator("#copy").click()
    page.wait_for_selector("#copy.copied")
    answer = page.locator(TARGET).input_value()
    assert page.evaluate("navigator.clipboard.readText()") == answer


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    expect(page.locator(SOURCE)).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".status.done")
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]')?.id ?? ''"))
    for name in ("swap", "copy", "go"):
        assert name in reached
    page.locator("#swap").focus()
    page.keyboard.press("Enter")
    expect(page.locator(TARGET)).to_have_value("Hello")
