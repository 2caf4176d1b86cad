"""What a visitor can rely on: no text is lost, the layout does not jump, and every event shows."""

from collections.abc import Callable, Iterator

import pytest
from held_process import Held
from playwright.sync_api import Page, expect

from translator import languages, texts

pytestmark = [pytest.mark.browser]

SOURCE, TARGET = "#source textarea", "#target textarea"
WORDS = texts.every()["en"]
SEEN_WITHIN = 5_000
"""Milliseconds in which the page must have seen that a process has ended."""
SHIFTS = """window.shifted = 0;
new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
}).observe({ type: "layout-shift", buffered: true });"""
FETCHED = """() => performance.getEntries()
    .filter((one) => ["navigation", "resource"].includes(one.entryType))
    .map((one) => [one.name, one.decodedBodySize])"""
LISTEN = """() => {
    window.heard = [];
    const live = "[role=status], [role=alert], [aria-live=polite], [aria-live=assertive]";
    new MutationObserver((changes) => {
        for (const { target, addedNodes } of changes) {
            const near = target.nodeType === Node.TEXT_NODE ? target.parentElement : target;
            const added = [...addedNodes].find((node) => node.matches?.(live));
            const said = (near.closest(live) ?? added)?.textContent;
            if (said && said !== window.heard.at(-1)) window.heard.push(said);
        }
    }).observe(document.body, { childList: true, subtree: true, characterData: true });
}"""


@pytest.fixture
def served(resting: Held) -> Held:
    """The one page of all tests; what an earlier test left is forgotten."""
    resting.be("ready")
    resting.begun()
    return resting


@pytest.fixture
def page(served: Held, visit: Callable[..., Page]) -> Page:
    return settled(visit(served.url))


def settled(page: Page) -> Page:
    page.wait_for_selector("html.settled")
    return page


def translate(page: Page, served: Held, text: str) -> None:
    """Press, let the answer end, and wait for the end."""
    page.locator(SOURCE).fill(text)
    page.locator("#go").click()
    served.await_line("begun")
    served.let_go(1)
    page.wait_for_selector(".status.done")


def choose(page: Page, name: str, typed: str) -> None:
    page.locator(f"#{name} input").click()
    page.keyboard.type(typed)
    page.keyboard.press("Enter")


def test_a_press_during_a_stream_stops_it_and_begins_the_new_one(page: Page, served: Held) -> None:
    page.locator(SOURCE).fill("猫")
    page.locator("#go").click()
    served.await_line("begun")
    expect(page.locator(TARGET)).to_have_value("A cat")
    page.locator(SOURCE).fill("猫と犬")
    page.keyboard.press("Control+Enter")
    served.await_line("begun")
    served.let_go(1)
    page.wait_for_selector(".status.done")
    expect(page.locator("#stop")).to_be_disabled()


def test_clear_stops_and_what_was_cleared_does_not_come_back(page: Page, served: Held) -> None:
    page.locator(SOURCE).fill("猫")
    page.locator("#go").click()
    expect(page.locator(TARGET)).to_have_value("A cat")
    page.locator("#clear").click()
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator(".status")).to_have_count(0)
    for text in (SOURCE, TARGET):
        expect(page.locator(text)).to_have_value("")
    assert served.begun() == 1


def test_an_example_is_translated(page: Page, served: Held) -> None:
    page.locator("button.example").first.click()
    served.await_line("begun")
    expect(page.locator(SOURCE)).to_have_value("吾輩は猫である。名前はまだ無い。")
    expect(page.locator("#count")).to_contain_text("16 / ")
    expect(page.locator(TARGET)).to_have_value("A cat")


def test_text_languages_and_result_survive_a_reload(page: Page, served: Held) -> None:
    choose(page, "target_language", "german")
    translate(page, served, "猫")
    page.reload()
    settled(page)
    expect(page.locator(SOURCE)).to_have_value("猫")
    expect(page.locator(TARGET)).to_have_value("A cat")
    expect(page.locator("#target_language input")).to_have_value("Deutsch · German")


@pytest.mark.parametrize("damaged", ["{", '{"from": "klingon", "to": 7}', "[]", "null"])
def test_what_was_kept_and_cannot_be_read_is_left_out(page: Page, damaged: str) -> None:
    page.evaluate("text => { localStorage.translator = text; }", damaged)
    page.add_init_script(
        "addEventListener('pagehide', (event) => event.stopImmediatePropagation())"
    )
    page.reload()
    settled(page)
    expect(page.locator("#target_language input")).to_have_value("English")
    expect(page.locator("#source_language input")).to_have_value("Detect language")


@pytest.mark.parametrize(
    ("asked", "source", "target"),
    [
        ("from=de&to=pt-BR", "Deutsch · German", "Português (Brasil) · Portuguese (Brazil)"),
        ("from=German&to=zh-CN", "Deutsch · German", "简体中文 · Chinese (Simplified)"),
        ("to=日本語", "Detect language", "日本語 · Japanese"),
        ("from=klingon&to=klingon", "Detect language", "English"),
    ],
)
def test_a_link_fills_the_page_and_translates_nothing(
    served: Held, visit: Callable[..., Page], asked: str, source: str, target: str
) -> None:
    page = settled(visit(f"{served.url}/?text=Guten%20Tag%0A2&{asked}"))
    expect(page.locator(SOURCE)).to_have_value("Guten Tag\n2")
    expect(page.locator("#source_language input")).to_have_value(source)
    expect(page.locator("#target_language input")).to_have_value(target)
    assert "text=" not in page.url
    assert served.begun() == 0


def test_the_page_s_own_link_opens_the_same_text_and_languages(
    page: Page, served: Held, visit: Callable[..., Page]
) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    choose(page, "target_language", "arabic")
    page.locator(SOURCE).fill("50 % & mehr? #1")
    page.locator("#link").click()
    page.wait_for_selector("#link.copied")
    other = settled(visit(page.evaluate("navigator.clipboard.readText()")))
    expect(other.locator(SOURCE)).to_have_value("50 % & mehr? #1")
    expect(other.locator("#target_language input")).to_have_value("العربية · Arabic")
    assert served.begun() == 0


def test_an_app_that_ends_is_seen_in_words_and_its_restart_brings_the_text_back(
    visit: Callable[..., Page],
) -> None:
    served = Held()
    served.await_line("serving")
    page = settled(visit(served.url))
    page.locator(SOURCE).fill("猫")
    page.locator("#go").click()
    expect(page.locator(TARGET)).to_have_value("A cat")
    served.end()
    expect(page.locator("#lost")).to_have_text(WORDS["lost"], timeout=SEEN_WITHIN)
    expect(page.locator("#lost")).to_be_visible()
    page.wait_for_timeout(2000)  # by now gradio has put a sentence of its own on top
    on_top = "line => line.contains(document.elementFromPoint(innerWidth / 2, 20))"
    assert page.locator("#lost").evaluate(on_top)
    expect(page.locator(".toast-wrap")).to_be_hidden()
    again = Held(served.port)
    try:
        again.await_line("serving")
        expect(page.locator("#lost")).to_be_hidden()
        page.wait_for_selector(".pill.ready")
        expect(page.locator(SOURCE)).to_have_value("猫")
        expect(page.locator(TARGET)).to_have_value("A cat")
        page.locator("#go").click()
        again.await_line("begun")
    finally:
        again.end()


def test_a_server_that_ends_is_seen_in_words_and_so_is_its_return(page: Page, served: Held) -> None:
    served.be("ended")
    expect(page.locator(".pill")).to_contain_text(WORDS["asleep"], timeout=SEEN_WITHIN)
    served.be("ready")
    expect(page.locator(".pill")).not_to_contain_text(WORDS["asleep"], timeout=SEEN_WITHIN)


def test_a_digest_that_nothing_pins_is_amber_and_not_called_verified(
    page: Page, served: Held
) -> None:
    expect(page.locator(".pill")).to_have_text(f"Ready · {WORDS['verified']}")
    green = page.locator(".pill .dot").evaluate("dot => getComputedStyle(dot).backgroundColor")
    served.be("unpinned")
    page.wait_for_timeout(SEEN_WITHIN)
    page.reload()
    settled(page)
    expect(page.locator(".pill")).to_have_text("Ready · digests match, not pinned")
    amber = page.locator(".pill .dot").evaluate("dot => getComputedStyle(dot).backgroundColor")
    assert green == "rgb(37, 111, 79)"
    assert amber == "rgb(122, 82, 0)"


def test_a_translation_is_announced_when_it_begins_and_when_it_is_done(
    page: Page, served: Held
) -> None:
    page.locator(SOURCE).fill("猫")
    page.evaluate(LISTEN)
    page.locator("#go").click()
    expect(page.locator(TARGET)).to_have_value("A cat")
    page.wait_for_timeout(1500)
    served.let_go(1)
    page.wait_for_selector(".status.done")
    page.wait_for_timeout(500)
    assert page.evaluate("window.heard") == [WORDS["working"], WORDS["done"]]


def test_the_result_can_be_focused_and_selected_but_not_changed(page: Page, served: Held) -> None:
    translate(page, served, "猫")
    page.locator("#target_language input").focus()
    page.keyboard.press("Escape")
    page.locator(TARGET).focus()
    expect(page.locator(TARGET)).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.type("x")
    expect(page.locator(TARGET)).to_have_value("A cat")
    selected = "document.activeElement.selectionEnd - document.activeElement.selectionStart"
    assert page.evaluate(selected) == len("A cat")


def test_both_texts_say_their_language_and_direction(page: Page, served: Held) -> None:
    assert page.evaluate("document.documentElement.lang") == "en"
    choose(page, "target_language", "arabic")
    translate(page, served, "猫が好きです。")
    expect(page.locator(TARGET)).to_have_attribute("lang", "ar-SA")
    expect(page.locator(TARGET)).to_have_attribute("dir", "rtl")
    expect(page.locator(SOURCE)).to_have_attribute("lang", "ja")
    expect(page.locator(SOURCE)).to_have_attribute("dir", "ltr")
    expect(page.locator("#source_language")).to_have_attribute("data-heard", "Japanese · detected")
    page.get_by_role("button", name="Swap the two pages").click()
    expect(page.locator(SOURCE)).to_have_value("A cat")
    expect(page.locator(TARGET)).to_have_value("猫が好きです。")
    expect(page.locator(SOURCE)).to_have_attribute("dir", "rtl")
    expect(page.locator(TARGET)).to_have_attribute("lang", "ja")
    expect(page.locator("#target_language input")).to_have_value("日本語 · Japanese")


@pytest.mark.parametrize("locale", ["ja-JP", "de-DE"])
def test_the_whole_interface_is_in_one_language_and_says_which(
    resting: Held, visit: Callable[..., Page], locale: str
) -> None:
    page = settled(visit(resting.url, locale=locale))
    ours = "ja" if locale == "ja-JP" else "en"
    words = texts.every()[ours]
    assert page.evaluate("document.documentElement.lang") == ours
    page.locator("#owners").click()
    shown = page.locator("body").inner_text()
    for name in ("subtitle", "translate", "ready", "owners", "colophon", "examine", "clear"):
        assert words[name] in shown
    expect(page.locator("#source_language input")).to_have_value(words["detect"])
    page.locator("#target_language input").click()
    german = page.locator("#target_language .options li", has_text="Deutsch")
    expect(german).to_contain_text(languages.shown("de", ours))


def test_the_name_is_painted_before_gradio_s_programs_have_arrived(
    served: Held, visit: Callable[..., Page]
) -> None:
    page = visit("about:blank")
    page.route("**/assets/*.js", lambda route: route.abort())
    page.goto(served.url)
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
    painted = "getComputedStyle(document.body, '::after').content"
    assert page.evaluate(painted) == f'"{WORDS["title"]}"'


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_jumps_and_the_button_is_in_reach(
    served: Held, visit: Callable[..., Page], width: int
) -> None:
    page = visit("about:blank", width=width, height=844)
    page.add_init_script(SHIFTS)
    page.goto(served.url)
    settled(page)
    page.locator(SOURCE).click()
    page.locator(SOURCE).fill("猫が好きです。" * 8)
    if width < 400:
        page.set_viewport_size({"width": width, "height": 430})  # a keyboard takes the rest
    go = page.locator("#go")
    expect(go).to_be_in_viewport(ratio=1)
    middle = "go => { const { x, y, width, height } = go.getBoundingClientRect();"
    middle += " return go.contains(document.elementFromPoint(x + width / 2, y + height / 2)); }"
    assert go.evaluate(middle)
    go.click()
    served.await_line("begun")
    served.let_go(1)
    expect(page.locator(".status.done")).to_be_in_viewport(ratio=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.shifted") < 0.1
    page.locator("#owners").click()  # the last of the page: nothing lies on it
    left, right = page.locator("#left").bounding_box(), page.locator("#right").bounding_box()
    assert left
    assert right
    assert width > 400 or right["y"] >= left["y"] + left["height"] - 1  # below each other


def test_a_file_is_translated_and_given_back_with_its_numbers_and_times(
    page: Page, served: Held
) -> None:
    cue = "1\n00:00:01,000 --> 00:00:02,500\n{}\n"
    film = cue.format("猫").encode()
    with page.expect_file_chooser() as chosen:
        page.locator("#open_file").click()
    with page.expect_download() as saved:
        chosen.value.set_files({"name": "film.srt", "mimeType": "text/plain", "buffer": film})
        served.await_line("begun")
        expect(page.locator("#stop")).to_be_enabled()
        served.let_go(1)
    assert saved.value.suggested_filename == "film.en.srt"
    assert saved.value.path().read_text() == cue.format("A cat")


def test_a_file_that_cannot_be_translated_is_a_sentence(page: Page, served: Held) -> None:
    with page.expect_file_chooser() as chosen:
        page.locator("#open_file").click()
    chosen.value.set_files({"name": "long.txt", "mimeType": "text/plain", "buffer": b"x" * 200_000})
    expect(page.locator(".status.failed")).to_contain_text(WORDS["file_too_large"])
    assert served.begun() == 0


def test_a_file_that_is_dropped_is_translated(page: Page, served: Held) -> None:
    carried = page.evaluate_handle(
        "() => { const carried = new DataTransfer();"
        " carried.items.add(new File(['Guten Tag'], 'letter.md')); return carried; }"
    )
    page.dispatch_event("#source", "dragover", {"dataTransfer": carried})
    expect(page.locator("#left.over")).to_be_visible()
    with page.expect_download() as saved:
        page.dispatch_event("#source", "drop", {"dataTransfer": carried})
        served.await_line("begun")
        served.let_go(1)
    assert saved.value.suggested_filename == "letter.en.md"
    expect(page.locator("#left.over")).to_have_count(0)


def test_the_result_can_be_saved(page: Page, served: Held) -> None:
    translate(page, served, "猫")
    with page.expect_download() as saved:
        page.locator("#save").click()
    assert saved.value.path().read_text() == "A cat"


def test_typing_asks_the_server_for_nothing(page: Page) -> None:
    page.locator(SOURCE).fill("Es regnet. " * 1800)
    page.wait_for_timeout(1000)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.locator(SOURCE).click()
    page.keyboard.type("Und morgen auch.")
    page.wait_for_timeout(1000)
    assert [url for url in asked if not url.endswith("/state")] == []


def test_nothing_comes_from_elsewhere_and_the_page_s_own_part_is_small(
    resting: Held, visit: Callable[..., Page]
) -> None:
    page = visit("about:blank")
    page.goto(resting.url)
    settled(page)
    page.wait_for_timeout(1000)
    found = page.evaluate(FETCHED)
    assert {url for url, _ in found if not url.startswith(resting.url)} == set()
    own = [size for url, size in found if "/assets/" not in url and "/static/" not in url]
    assert sum(own) < 400_000


@pytest.fixture(params=["", "/translate"])
def behind(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Held, str]]:
    """A page and its address: as it is, and as a proxy that gives it a path needs it."""
    monkeypatch.setenv("GRADIO_ROOT_PATH", request.param)
    served = Held()
    try:
        served.await_line("serving")
        yield served, served.url + request.param
    finally:
        served.end()


def test_the_guard_lets_through_whatever_the_page_asks_for(
    behind: tuple[Held, str], visit: Callable[..., Page]
) -> None:
    """In both languages; the panel about the API is part of the page."""
    served, url = behind
    answered: list[tuple[int, str]] = []
    for locale in ("en-GB", "ja-JP"):
        page = visit("about:blank", locale=locale)
        page.on("response", lambda told: answered.append((told.status, told.url)))
        page.goto(f"{url}/")
        settled(page).locator(SOURCE).fill("猫")
        page.locator("#go").click()
        served.await_line("begun")
        served.let_go(1)
        page.wait_for_selector(".status.done")
        page.locator("button.show-api").click()
        expect(page.get_by_text("Guess which language").first).to_be_visible()
    for path in ("favicon.ico", "manifest.json", "gradio_api/openapi.json"):
        page.request.get(f"{url}/{path}", fail_on_status_code=True)
    assert any("/theme.css" in asked for _, asked in answered)
    refused = {asked.removeprefix(url) for status, asked in answered if status >= 400}
    assert refused <= {"/monitoring/summary"}  # how often others asked: no visitor's business


def test_a_failure_is_the_owner_s_business_and_visitors_read_a_sentence(
    page: Page, served: Held
) -> None:
    served.be("failed")
    expect(page.locator("#failure .lead")).to_have_text(WORDS["fault"], timeout=SEEN_WITHIN)
    expect(page.locator("#failure .owner")).to_contain_text("YAKULINGO_SPACES_ALLOW_CPU=1")
    served.be("ready")
    expect(page.locator("#failure .failure")).to_have_count(0, timeout=SEEN_WITHIN)


def test_what_is_running_and_the_doctor_are_folded_away_under_one_line(page: Page) -> None:
    for hidden in ("#colophon", "#doctor", "#examine"):
        expect(page.locator(hidden)).to_be_hidden()
    owners = page.locator("#owners")
    expect(owners).to_have_attribute("aria-expanded", "false")
    owners.click()
    expect(owners).to_have_attribute("aria-expanded", "true")
    expect(page.locator("#colophon")).to_be_visible()
    owners.click()
    expect(page.locator("#colophon")).to_be_hidden()
    page.locator(".pill").click()
    expect(page.locator("#examine")).to_be_visible()
