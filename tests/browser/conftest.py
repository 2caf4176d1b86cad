"""A real headless Chromium, and the real app with a real CPU llama-server and a real model."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import space
from held_process import Held
from needs import must_or_skip
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright
from space import Space

_PATIENCE = 60_000
"""Milliseconds, for a busy machine; a test of a promise in seconds names them itself."""
expect.set_options(timeout=_PATIENCE)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The distribution's Chromium; root has no sandbox to put it into."""
    # Debian's name first; GitHub's Ubuntu has the last one
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        must_or_skip("no Chromium: apt-get install chromium fonts-noto-cjk")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="session")
def cpu(real_manifest: str) -> dict[str, str]:
    """Variables for the cpu release."""
    return space.pinned(real_manifest)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all apps: the release is installed once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def app(cpu: dict[str, str], home: Path, real_model: Path) -> Iterator[Space]:
    """The app on SmolLM2, with room for a short answer."""
    limits = {"max_chars": "300", "max_new_tokens": "40", "n_ctx": "1024"}
    with space.serving(home, **cpu, **limits, gguf_path=str(real_model)) as served:
        yield served


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page in a fresh context; what it throws is a failure of the test."""
    thrown: list[str] = []
    contexts = []

    def open_(
        url: str, *, locale: str = "en-GB", width: int = 1280, height: int = 900, scale: int = 1
    ) -> Page:
        size: ViewportSize = {"width": width, "height": height}
        context = browser.new_context(locale=locale, viewport=size, device_scale_factor=scale)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: thrown.append(str(error)))
        page.set_default_timeout(_PATIENCE)
        page.goto(url)
        if url != "about:blank":
            page.wait_for_selector(".pill")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not thrown


def held() -> Iterator[Held]:
    started = Held()
    try:
        started.await_line("serving")
        yield started
    finally:
        started.end()


served = pytest.fixture(held, name="served")
"""A page of a test's own: the test says how answers go on."""

resting = pytest.fixture(held, name="resting", scope="session")
"""One page for all tests that ask nothing of it."""
