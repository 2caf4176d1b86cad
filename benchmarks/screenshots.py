"""Pictures of the real page in a real Chromium, and one contact sheet of all its states.

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
from typing import TYPE_CHECKING, Any, Final, Literal

from PIL import Image
from playwright.sync_api import sync_playwright

from llama_loader import settings
from llama_loader.doctor import Examination
from llama_loader.errors import SettingError
from llama_loader.events import Downloading, Note
from llama_loader.server import free_port
from llama_space import Engine, Figures, Piece, Progress, Status
from translator.page import Page, RefusingEngine

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

    from llama_space.request import Work
    from llama_space.values import Item, Waiting

_COLUMNS, _COLUMN, _GAP = 5, 560, 16
"""Of the contact sheet: how many columns, and pixels of a column and between pictures."""
_COLOURS: Final = 256
"""A palette is enough for a page, and a third of the bytes."""
_TEXT: Final = "今日は朝から雨が降っています。傘を忘れないでください。"
Scheme = Literal["light", "dark"]


@dataclass(frozen=True)
class Shot:
    """One picture: its name, the window, and what is done before.

    Attributes:
        steps: names of ``STEPS``, in order.
        whole: the whole page, not only what the window shows.
        document: a document shows it, so it is kept beside the contact sheet.
    """

    name: str
    scheme: Scheme = "light"
    locale: str = "en-GB"
    width: int = 1280
    height: int = 900
    steps: tuple[str, ...] = ()
    whole: bool = False
    document: bool = False


ANSWERED: Final = (
    Shot("page-light", height=1080, steps=("translate",), document=True),
    Shot("page-dark", "dark", "ja-JP", height=1080, steps=("translate",), document=True),
    Shot("page-narrow", "light", "ja-JP", 390, 844, ("translate",), whole=True, document=True),
    Shot("page-doctor", steps=("translate", "doctor"), whole=True, document=True),
    Shot("doctor-narrow", "dark", "ja-JP", 390, 844, ("translate", "doctor"), whole=True),
    Shot("arabic", "light", "ja-JP", 768, 1024, ("arabic", "translate")),
    Shot("long", "dark", steps=("long",)),
    Shot("refused", steps=("refused",)),
)
STANDING: Final = (
    Shot("empty"),
    Shot("list", steps=("list",)),
    Shot("list-narrow", "dark", "ja-JP", 390, 844, ("list",)),
    Shot("programs", steps=("programs",)),
    Shot("programs-dark", "dark", "ja-JP", 768, 1024, ("programs",)),
    Shot("working", steps=("ask",)),
    Shot("working-narrow", "dark", "ja-JP", 390, 844, ("arabic", "ask")),
    Shot("lost", steps=("lost",)),
    Shot("lost-narrow", "dark", "ja-JP", 390, 844, ("lost",)),
)
LENT: Final = (
    Shot("gpu-seconds", steps=("translate", "owners"), whole=True),
    Shot("gpu-seconds-narrow", "dark", "ja-JP", 390, 844, ("translate", "owners"), whole=True),
)
QUEUED: Final = (
    Shot("queued", "dark", steps=("ask",)),
    Shot("queued-narrow", "light", "ja-JP", 390, 844, ("ask",)),
)
UNPINNED: Final = (Shot("unpinned", steps=("owners",), whole=True),)
COMING: Final = (
    Shot("preparing", height=1000, steps=("owners",)),
    Shot("preparing-narrow", "dark", "ja-JP", 390, 844, ("owners",), whole=True),
)
BROKEN: Final = (
    Shot("page-error", height=820, document=True),
    Shot("error-narrow", "dark", "ja-JP", 390, 844, whole=True),
)
_PREPARING: Final = Status(
    "preparing",
    release="b11549-1",
    progress=(
        Progress(
            "prepare",
            Downloading("https://huggingface.co/me/releases/resolve/main/m.json", 0, None),
        ),
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


_CALLS: Final = (
    Figures(0, 1.9, 6.2, 141, warm=False, tokens_per_second=61.0, reserved=22, used=4.8),
    Figures(0, 0.3, 1.4, 38, warm=True, tokens_per_second=63.0, reserved=15, used=1.2, left=64),
)
_RUNNING: Final[dict[str, Any]] = {
    "finished": False,
    "tokens": 9,
    "tokens_per_second": 63.0,
    "reason": "",
}


class Still(Engine):
    """An engine that stays in one state, and never answers, unless it has figures of an answer."""

    def __init__(self, state: Status, *answered: Figures, stage: Waiting = "waiting") -> None:
        self._state = state
        self._answered = answered
        self._stage: Waiting = stage

    def retry(self) -> None:
        """Do nothing."""

    close = retry

    def status(self) -> Status:
        """Return the state."""
        return self._state

    def events(self, asked: object, **options: object) -> Generator[Item, None, None]:
        """Wait for ever, or answer."""
        del asked, options
        while not self._answered:
            yield Progress(self._stage, seconds=3)
            time.sleep(0.2)
        yield Piece("It has been raining since this morning.", **_RUNNING)
        yield Piece("", **{**_RUNNING, "finished": True, "reason": "stop"})

    def together(self, work: Work, texts: object) -> Generator[Any, None, None]:
        """Do the work, and tell the figures."""
        del texts
        yield from work(self.events, lambda: True)
        yield from self._answered

    def doctor(self) -> Examination:
        """Return an empty report."""
        return Examination()


@contextmanager
def served(engine: Engine, found: settings.Settings) -> Iterator[str]:
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
    tab.wait_for_selector("html.settled")
    tab.wait_for_selector(".pill:not(.preparing)" if shot not in COMING else ".pill.preparing")
    return tab


def _asked(tab: Tab, text: str) -> None:
    tab.locator("#source textarea").fill(text)
    tab.keyboard.press("Control+Enter")


def _translate(tab: Tab) -> None:
    _asked(tab, _TEXT)
    tab.wait_for_selector(".status.done")


def _ask(tab: Tab) -> None:
    _asked(tab, _TEXT)
    tab.wait_for_selector(".status.working")


def _refused(tab: Tab) -> None:
    tab.locator("#go").click()
    tab.wait_for_selector(".status.failed")


def _long(tab: Tab) -> None:
    _asked(tab, _TEXT * 550)
    tab.wait_for_selector(".status.working")
    tab.wait_for_timeout(3000)


def _arabic(tab: Tab) -> None:
    tab.locator("#target_language input").click()
    tab.keyboard.type("arabic")
    tab.keyboard.press("Enter")


def _list(tab: Tab) -> None:
    tab.locator("#target_language input").click()
    tab.keyboard.type("a")
    tab.wait_for_timeout(500)


def _programs(tab: Tab) -> None:
    tab.set_viewport_size({"width": max(tab.evaluate("innerWidth"), 768), "height": 900})
    tab.locator("footer button").first.click()
    tab.wait_for_timeout(1500)


def _owners(tab: Tab) -> None:
    tab.locator("#owners").click()


def _doctor(tab: Tab) -> None:
    tab.locator("#owners").click()
    tab.wait_for_selector("figure .answer")
    tab.locator("#examine").click()
    tab.wait_for_selector("#report textarea")


def _lost(tab: Tab) -> None:
    tab.locator("#source textarea").fill(_TEXT)
    tab.route("**/state", lambda route: route.abort())
    tab.wait_for_selector("#lost:not([hidden])")


STEPS: Final = {
    "translate": _translate,
    "ask": _ask,
    "refused": _refused,
    "long": _long,
    "arabic": _arabic,
    "list": _list,
    "programs": _programs,
    "owners": _owners,
    "doctor": _doctor,
    "lost": _lost,
}


def taken(browser: Browser, url: str, shots: Iterable[Shot], to: Path) -> Iterator[Image.Image]:
    """Open the page for each picture, do its steps, and yield the picture."""
    for shot in shots:
        tab = opened(browser, url, shot)
        for step in shot.steps:
            STEPS[step](tab)
        tab.mouse.move(2, 2)
        content = tab.screenshot(full_page=shot.whole, animations="disabled")
        tab.close()
        picture = Image.open(BytesIO(content)).convert("RGB")
        if shot.document:
            keep(picture, to / f"{shot.name}.png")
        yield picture


def keep(picture: Image.Image, path: Path) -> None:
    """Write a picture, with a palette."""
    small = picture.quantize(_COLOURS, kmeans=1, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    sys.stdout.write(f"{path} {path.stat().st_size // 1000} kB\n")


def sheet(pictures: Iterable[Image.Image]) -> Image.Image:
    """Put all pictures onto one, in columns of which the shortest gets the next picture."""
    columns: list[list[Image.Image]] = [[] for _ in range(_COLUMNS)]
    heights = [_GAP] * _COLUMNS
    for picture in pictures:
        share = _COLUMN / max(picture.width, _COLUMN)
        small = picture.resize((round(picture.width * share), round(picture.height * share)))
        at = heights.index(min(heights))
        columns[at].append(small)
        heights[at] += small.height + _GAP
    made = Image.new("RGB", (_COLUMNS * (_COLUMN + _GAP) + _GAP, max(heights)), "#8a8f98")
    for at, column in enumerate(columns):
        down = _GAP
        for small in column:
            made.paste(small, (_GAP + at * (_COLUMN + _GAP), down))
            down += small.height + _GAP
    return made


def refused() -> RefusingEngine:
    """An engine for a setting that a person got wrong."""
    try:
        settings.load(environ={"YAKULINGO_SPACES_LLAMA_DEVICE": "the first one"})
    except SettingError as error:
        return RefusingEngine(error)
    raise AssertionError("that is no device")


def pictures(browser: Browser, to: Path) -> Iterator[Image.Image]:
    """Take all pictures: of the real engine with answers, and of engines that stand still."""
    found, real = settings.load(), Engine()
    ready = replace(_PREPARING, phase="ready", verified=True, server_pid=1, warm=True, notes=())
    lent = replace(ready, calls=_CALLS, gpu_seconds_reserved=37.0, gpu_seconds_used=6.0)
    states: tuple[tuple[Engine, settings.Settings, tuple[Shot, ...]], ...] = (
        (real, real.settings, ANSWERED),
        (Still(ready), found, STANDING),
        (Still(lent, _CALLS[1]), found, LENT),
        (Still(lent, stage="queue"), found, QUEUED),
        (Still(replace(ready, verified=False, notes=_PREPARING.notes)), found, UNPINNED),
        (Still(_PREPARING), found, COMING),
        (refused(), found, BROKEN),
    )
    for engine, set_, shots in states:
        with served(engine, set_) as url:
            yield from taken(browser, url, shots, to)


def main(argv: list[str] | None = None) -> int:
    """Make all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    folder = parser.parse_args(argv).out
    os.environ.setdefault("SPACE_ID", "owner/translator")  # an error links to its settings
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    program = shutil.which("chromium") or "chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        keep(sheet(pictures(browser, folder)), folder / "page-states.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
