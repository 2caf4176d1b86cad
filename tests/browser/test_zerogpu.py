"""The same page on ZeroGPU: the real ``spaces`` package, a real worker, an imitated device API."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import space
from playwright.sync_api import Page, expect
from zerogpu import Emulator, Queued

pytestmark = [pytest.mark.browser, pytest.mark.docker, pytest.mark.model]

SOURCE, TARGET = "#source textarea", "#target textarea"


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator() as started:
        yield started


@pytest.fixture(scope="module")
def url(
    emulator: Emulator, cpu: dict[str, str], home: Path, real_model: Path, space_packages: None
) -> Iterator[str]:
    del space_packages
    few = {"max_new_tokens": "20", "n_ctx": "512", "gguf_path": str(real_model)}
    with space.serving(home, **cpu, **few, **emulator.environment) as served:
        yield served.url


def test_a_worker_answers_and_the_page_says_what_it_runs(
    url: str, emulator: Emulator, visit: Callable[..., Page]
) -> None:
    page = visit(url)
    page.wait_for_selector(".pill.ready")
    emulator.script(Queued(pings=2))
    page.locator(SOURCE).fill("猫が好きです。")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".status.done")
    expect(page.locator(TARGET)).not_to_have_value("")
    page.locator("#owners").click()
    page.wait_for_selector(".last_calls dd:has-text('tok')")
    assert "tokens/s" in page.locator("#colophon").inner_text()
    assert len(emulator.seen("/schedule")) == 1
