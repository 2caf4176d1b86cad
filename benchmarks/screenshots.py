"""Pictures of the real page in a real Chromium: light, dark, narrow, an error, the doctor.

Runs the app with the variables that are set, as the Space does (docs/settings.md):
``YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL``, ``YAKULINGO_SPACES_GGUF_PATH`` …
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from PIL import Image
from playwright.sync_api import sync_playwright

from llama_loader import settings, sockets
from llama_loader.errors import SettingError
from translator.engine import Engine
from translator.page import Page
from translator.refusing import RefusingEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

    from translator.session import Engine as AnyEngine

_COLOURS: Final = 256
"""A palette is enough for a page, and a third of the bytes."""
_TEXT: Final = "今日は朝から雨が降っています。傘を忘れないでください。"
Scheme = Literal["light", "dark"]


@dataclass(frozen=True)
class Shot:
    """One picture: its name, the window, and what is done before."""

    name: str
    scheme: Scheme = "light"
    locale: str = "en-GB"
    width: int = 1280
    height: int = 900
    doctor: bool = False
    whole: bool = False


SHOTS: Final = (
    Shot("page-light", height=1080),
    Shot("page-dark", "dark", "ja-JP", height=1080),
    Shot("page-narrow", locale="ja-JP", width=390, height=844, whole=True),
    Shot("page-doctor", doctor=True, whole=True),
)


@contextmanager
def served(engine: AnyEngine, found: settings.Settings | None) -> Iterator[str]:
    """Serve a page; gives its URL."""
    page, port = Page(engine, found), sockets.free_port()
    engine.begin()
    page.launch(prevent_thread_lock=True, server_port=port, quiet=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        engine.close()


def opened(browser: Browser, url: str, shot: Shot) -> Tab:
    """Open the page in a window of that size, language and scheme."""
    size = {"width": shot.width, "height": shot.height}
    tab = browser.new_page(viewport=size, color_scheme=shot.scheme, locale=shot.locale)  # type: ignore[arg-type]
    tab.set_default_timeout(120_000)
    tab.goto(url)
    return tab


def translated(tab: Tab, shot: Shot) -> None:
    """Translate, and have the doctor look where the picture is of that."""
    tab.wait_for_selector(".pill.ready")
    tab.locator("#source textarea").fill(_TEXT)
    tab.keyboard.press("Control+Enter")
    tab.wait_for_selector(".status.done")
    tab.wait_for_selector("figure .answer")
    if shot.doctor:
        tab.locator("#examine").click()
        tab.wait_for_selector("#report textarea")


def keep(tab: Tab, shot: Shot, folder: Path) -> None:
    """Write the picture, with a palette."""
    tab.mouse.move(2, 2)
    tab.evaluate("document.activeElement?.blur()")
    picture = Image.open(BytesIO(tab.screenshot(full_page=shot.whole, animations="disabled")))
    small = picture.convert("RGB").quantize(_COLOURS, kmeans=1, dither=Image.Dither.NONE)
    path = folder / f"{shot.name}.png"
    small.save(path, optimize=True)
    sys.stdout.write(f"{path} {path.stat().st_size // 1000} kB\n")
    tab.close()


def refused() -> RefusingEngine:
    """An engine for a setting that a person got wrong."""
    try:
        settings.load(environ={"YAKULINGO_SPACES_LLAMA_DEVICE": "the first one"})
    except SettingError as error:
        return RefusingEngine(error)
    raise AssertionError("that is no device")


def main(argv: list[str] | None = None) -> int:
    """Make all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    folder = parser.parse_args(argv).out
    found = settings.load()
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    program = shutil.which("chromium") or "chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        with served(Engine(found), found) as url:
            for shot in SHOTS:
                tab = opened(browser, url, shot)
                translated(tab, shot)
                keep(tab, shot, folder)
        broken = Shot("page-error", height=820)
        with served(refused(), None) as url:
            tab = opened(browser, url, broken)
            tab.wait_for_selector("#failure .failure")
            keep(tab, broken, folder)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
