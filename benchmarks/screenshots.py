"""Pictures of the real page in a real Chromium: light, dark, narrow, an error, the doctor.

``--more`` makes those too that no document shows, to be looked at: while it prepares, in line, and
errors and the doctor on a narrow phone and in Japanese.

Runs the app with the variables that are set, as the Space does (docs/settings.md):
``YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL``, ``YAKULINGO_SPACES_GGUF_PATH`` …
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from PIL import Image
from playwright.sync_api import sync_playwright

from llama_loader import settings
from llama_loader.doctor import Examination
from llama_loader.errors import SettingError
from llama_loader.events import Downloading, Note, Resolving
from llama_loader.server import free_port
from llama_space import Engine, Progress, Status
from translator.page import Page
from translator.start import RefusingEngine

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

    from llama_space.values import Item
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

MORE: Final = (
    Shot("more-doctor-narrow-dark", "dark", "ja-JP", 360, 740, doctor=True, whole=True),
    Shot("more-light-narrow", width=360, height=740, whole=True),
)
_PREPARING: Final = Status(
    "preparing",
    release="b11549-1",
    progress=(
        Progress("prepare", Resolving("https://huggingface.co/me/releases/resolve/main/m.json")),
        Progress(
            "prepare",
            Downloading("translategemma-27b-it.i1-Q4_K_M.gguf", 3_210_000_000, 16_500_000_000),
        ),
    ),
    elapsed=48.0,
    timeline=(("resolve", 0.4), ("fetch", 2.1), ("verify", 0.1), ("unpack", 0.6)),
    notes=(
        Note(
            "MANIFEST_NOT_PINNED",
            f"manifest https://hub/m.json is not pinned; its sha256 is {'ab' * 32}",
            f"set YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_SHA256={'ab' * 32}",
        ),
    ),
)


class Still:
    """An engine that stays in one state, and never answers."""

    def __init__(self, state: Status) -> None:
        self._state = state

    def retry(self) -> None:
        """Do nothing."""

    close = retry

    def status(self) -> Status:
        """Return the state."""
        return self._state

    def events(self, asked: object, **options: object) -> Generator[Item, None, None]:
        """Wait for ever."""
        del asked, options
        while True:
            yield Progress("waiting", seconds=3)
            time.sleep(0.2)

    def doctor(self) -> Examination:
        """Return an empty report."""
        return Examination()


@contextmanager
def served(engine: AnyEngine, found: settings.Settings | None) -> Iterator[str]:
    """Serve a page; gives its URL."""
    page, port = Page(engine, found), free_port()
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


def prepared(browser: Browser, shots: Iterable[Shot], to: Path) -> None:
    """Pictures of the real engine with an answer, or with the doctor's."""
    engine = Engine()
    with served(engine, engine.settings) as url:
        for shot in shots:
            tab = opened(browser, url, shot)
            translated(tab, shot)
            keep(tab, shot, to)


def failed(browser: Browser, shots: Iterable[Shot], to: Path) -> None:
    """Pictures of a setting that cannot be read."""
    with served(refused(), None) as url:
        for shot in shots:
            tab = opened(browser, url, shot)
            tab.wait_for_selector("#failure .failure")
            for summary in tab.locator("#failure summary").all():
                summary.click()
            keep(tab, shot, to)


def preparing(browser: Browser, found: settings.Settings, to: Path) -> None:
    """Pictures of an engine that is not ready yet."""
    with served(Still(_PREPARING), found) as url:
        for shot in (
            Shot("more-preparing", height=1000),
            Shot("more-preparing-narrow-ja", "dark", "ja-JP", 360, 740, whole=True),
        ):
            tab = opened(browser, url, shot)
            tab.wait_for_selector(".pill.preparing")
            tab.wait_for_selector(".progress li")
            keep(tab, shot, to)


def in_line(browser: Browser, found: settings.Settings, to: Path) -> None:
    """The picture of a visitor behind three others."""
    shots = [Shot(f"more-line-{number}", locale="ja-JP") for number in range(1, 5)]
    with served(Still(replace(_PREPARING, phase="ready", server_pid=1)), found) as url:
        tabs = [opened(browser, url, shot) for shot in shots]
        for tab in tabs:
            tab.wait_for_selector(".pill.ready")
            tab.locator("#source textarea").fill(_TEXT)
            tab.locator("#go").click()
            tab.wait_for_selector(".status")
        tabs[-1].wait_for_selector(".status.waiting")
        keep(tabs[-1], shots[-1], to)
        for tab in tabs[:-1]:
            tab.close()


def main(argv: list[str] | None = None) -> int:
    """Make all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--more", action="store_true", help="those too that no document shows")
    options = parser.parse_args(argv)
    folder, found = options.out, settings.load()
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    program = shutil.which("chromium") or "chromium"
    broken = Shot("page-error", height=820)
    narrow = Shot("more-error-narrow-ja", "light", "ja-JP", 360, 740, whole=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        failed(browser, (broken, narrow) if options.more else (broken,), folder)
        if options.more:
            preparing(browser, found, folder)
            in_line(browser, found, folder)
        prepared(browser, (*SHOTS, *MORE) if options.more else SHOTS, folder)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
