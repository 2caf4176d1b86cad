"""Lists and panels that lie on the page: they hide what is below them, and can be read."""

from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO

import pytest
from held_process import Held
from PIL import Image, ImageChops
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser]

LEAST = 4.5
"""WCAG 2.2, success criterion 1.4.3 (AA), for letters of any size."""
LINES = r"""popup => {
    const found = [], frame = popup.getBoundingClientRect();
    const walker = document.createTreeWalker(popup, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const range = document.createRange();
        range.selectNodeContents(walker.currentNode);
        for (const { x, y, width, height } of range.getClientRects()) {
            const above = document.elementFromPoint(x + width / 2, y + height / 2);
            const seen = above?.closest?.("li, button, p, pre, span, code, h2, h3, div");
            const style = getComputedStyle(walker.currentNode.parentElement);
            if (style.visibility === "visible" && seen?.contains(walker.currentNode)
                && width > 4 && y > Math.max(0, frame.top)
                && y + height < Math.min(innerHeight, frame.bottom)
                && /[\p{L}\p{N}]/u.test(walker.currentNode.textContent))
                found.push([walker.currentNode.textContent.trim(), x, y, width, height]);
        }
    }
    return found;
}"""
SLOW = 400
"""Milliseconds after which gradio's lists and panels have come to rest."""
POPUPS = {
    "from": ("#source_language input", "#source_language .options"),
    "to": ("#target_language input", "#target_language .options"),
    "programs": ("footer button >> nth=0", ".api-docs-wrap"),
}


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, resting: Held, visit: Callable[..., Page]) -> Page:
    return visit(f"{resting.url}/?__theme={request.param}", scale=2)


def opened(page: Page, popup: str) -> Image.Image:
    button, panel = POPUPS[popup]
    page.locator(button).click()
    page.locator(panel).wait_for()
    page.wait_for_timeout(SLOW)
    page.mouse.move(1, 1)
    page.locator(panel).evaluate("panel => panel.querySelector('ul')?.scrollTo(0, 0)")
    return Image.open(BytesIO(page.screenshot(animations="disabled"))).convert("RGB")


def luminance(colour: tuple[int, int, int]) -> float:
    red, green, blue = (
        one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4
        for one in (part / 255 for part in colour)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def contrasts(page: Page, picture: Image.Image, popup: str) -> Iterator[tuple[str, float]]:
    """For each line: how far the strongest pixel of its letters is from the most frequent one."""
    for text, *rectangle in page.locator(POPUPS[popup][1]).evaluate(LINES):
        x, y, width, height = (round(2 * value) for value in rectangle)
        part = picture.crop((x, y, x + width, y + height)).tobytes()
        pixels = zip(part[::3], part[1::3], part[2::3], strict=True)
        (ground, _), *others = Counter(pixels).most_common()
        yield text, max((contrast(colour, ground) for colour, _ in others), default=1.0)


@pytest.mark.parametrize("popup", POPUPS)
def test_text_in_open_popup_stands_out_by_its_pixels(page: Page, popup: str) -> None:
    picture = opened(page, popup)
    found = dict(contrasts(page, picture, popup))
    assert len(found) >= 5
    assert {text: value for text, value in found.items() if value < LEAST} == {}


@pytest.mark.parametrize("popup", ["from", "to"])
def test_nothing_below_an_open_list_shines_through(page: Page, popup: str) -> None:
    over_nothing = opened(page, popup)
    page.keyboard.press("Escape")
    for name in ("source", "target"):
        area = page.locator(f"#{name} textarea")
        area.evaluate("(area, text) => { area.value = text; }", "It rained until noon. " * 60)
    over_text = opened(page, popup)
    box = page.locator(POPUPS[popup][1]).bounding_box()
    assert box is not None
    left, top = 2 * (box["x"] + 4), 2 * (box["y"] + 4)
    inside = (left, top, left + 2 * (box["width"] - 8), top + 2 * (box["height"] - 8))
    parts = [picture.crop(inside) for picture in (over_nothing, over_text)]
    assert over_nothing.tobytes() != over_text.tobytes()
    assert ImageChops.difference(*parts).getbbox() is None


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("zh", ["简体中文 · Chinese (Simplified)", "繁體中文 · Chinese (Traditional)"]),
        ("pt-pt", ["Português (Portugal) · Portuguese (Portugal)"]),
        ("german", ["Deutsch · German"]),
        ("ドイツ", ["Deutsch · German"]),
        ("espanol", ["Español · Spanish"]),
        ("한국", ["한국어 · Korean"]),
        ("العرب", ["العربية · Arabic", "العربية (مصر) · Arabic (Egypt)"]),
    ],
)
@pytest.mark.parametrize("name", ["source_language", "target_language"])
def test_what_is_typed_into_a_list_replaces_and_finds(
    resting: Held, visit: Callable[..., Page], name: str, typed: str, found: list[str]
) -> None:
    page = visit(resting.url)
    box = page.locator(f"#{name} input")
    box.click()
    page.keyboard.type(typed)
    expect(box).to_have_value(typed)
    assert page.locator(f"#{name} .options li:visible").all_inner_texts() == found
    page.keyboard.press("Enter")
    expect(box).to_have_value(found[0])


def test_a_code_goes_before_names_that_have_its_letters(
    resting: Held, visit: Callable[..., Page]
) -> None:
    page = visit(resting.url)
    page.locator("#target_language input").click()
    page.keyboard.type("de")
    expect(page.locator("#target_language .options li:visible")).to_have_count(2)
    page.keyboard.press("Enter")
    expect(page.locator("#target_language input")).to_have_value("Deutsch · German")


def test_a_name_that_no_language_has_is_said_and_changes_nothing(
    resting: Held, visit: Callable[..., Page]
) -> None:
    page = visit(resting.url)
    box = page.locator("#target_language input")
    box.click()
    page.keyboard.type("klingon")
    expect(page.locator("#target_language .options li:visible")).to_have_count(0)
    said = page.locator("#target_language .options ul").get_attribute("data-none")
    assert said == "No language has this name."
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(box).to_have_value("English")


def test_arrows_move_through_what_was_found(resting: Held, visit: Callable[..., Page]) -> None:
    page = visit(resting.url)
    page.locator("#target_language input").click()
    page.keyboard.type("zh")
    page.keyboard.press("ArrowDown")
    chosen = page.locator("#target_language input").get_attribute("aria-activedescendant")
    assert chosen is not None
    expect(page.locator(f"[id='{chosen}']")).to_contain_text("Traditional")
    page.keyboard.press("Enter")
    expect(page.locator("#target_language input")).to_have_value("繁體中文 · Chinese (Traditional)")
