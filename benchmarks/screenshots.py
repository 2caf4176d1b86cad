"""Pictures of the real page in a real Chromium, and one contact sheet of all its states.

Each state is shown in light with an English interface and in dark with a Japanese one, at three
widths. Runs the app with the variables that are set, as the Space does (docs/settings.md):
``YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL``, ``YAKULINGO_SPACES_GGUF_PATH`` …
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import requests
from PIL import Image, ImageDraw
from playwright.sync_api import Page as Tab
from playwright.sync_api import TimeoutError as TookTooLong
from playwright.sync_api import sync_playwright

from llama_loader import settings
from llama_loader.doctor import Examination
from llama_loader.errors import SettingError
from llama_loader.events import Downloading, Note
from llama_loader.server import free_port
from llama_space import Engine, Failure, Figures, Piece, Progress, Status
from llama_space.request import Work
from llama_space.values import Item, Waiting
from translator.detection import detect
from translator.page import CONCURRENCY, Page

Scheme = Literal["light", "dark"]
LOOKS: Final[tuple[tuple[Scheme, str], ...]] = (("light", "en-GB"), ("dark", "ja-JP"))
WIDTHS: Final = ((1280, 900), (768, 900), (390, 844))
_OPENS, _ANSWERS_IN = 60_000, 300_000
"""Milliseconds, on a busy machine: until the page has opened, and until a real model has answered.
"""
_SHARE, _GAP, _TITLE = 4, 10, 14
"""Of the contact sheet: the pictures' share, and pixels between them and for the name of a row."""
_MOST: Final = 600_000
"""Bytes of the contact sheet."""
_COLOURS: Final = 256
"""A palette is enough for a page, and a third of the bytes."""
_SAMPLES: Final = {
    "en": "It has been raining since this morning, so please do not forget your umbrella. ",
    "ja": "今日は朝から雨が降っています。傘を忘れないでください。",
    "ar": "تمطر السماء منذ صباح اليوم، فلا تنس مظلتك من فضلك. ",
}
_ANSWERS: Final = {"en": "ar", "ja": "en", "ar": "ja"}
"""Which language each of them becomes."""
_SETTLED: Final = (
    "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
)
"""The page has been laid out anew, and painted."""


@dataclass(frozen=True)
class Shown:
    """A state of the page: its name, what is done before, and whether the whole page is shown.

    Attributes:
        steps: names of ``STEPS``, in order.
        query: of the page's address.
        again: its popup is opened anew at each width.
        written: how many characters of which sample are translated.
    """

    name: str
    steps: tuple[str, ...] = ()
    query: str = "?text=&from=auto&to=en"
    whole: bool = False
    again: bool = False
    written: tuple[str, int] = ("ja", 27)


DONE: Final = Shown("done", ("translate",))
"""What the documents show."""
DOCTOR: Final = Shown("doctor", ("translate", "doctor"), whole=True)
"""Of the real engine."""
STANDING: Final = (
    Shown("empty"),
    Shown("from", ("from",), again=True),
    Shown("to", ("to",), again=True),
    Shown("no such language", ("unknown",), again=True),
    Shown("programs", ("programs",), again=True),
    Shown("programs in Python", ("programs", "python"), again=True),
    Shown("nothing to translate", ("refused",)),
    Shown("too long", ("refused",), written=("ja", 20_001)),
    Shown("wrong file", ("file",)),
    Shown("working", ("ask",)),
    Shown("stopped", ("ask", "stop")),
    Shown("lost", ("lost",)),
)
LENT: Final = (
    *(
        Shown(
            f"{one}, {length:,}",
            ("translate",),
            f"?text=&from={one}&to={to}",
            written=(one, length),
        )
        for one, to in _ANSWERS.items()
        for length in (10, 500, 15_000)
    ),
    Shown("GPU seconds", ("translate", "owners"), whole=True),
)
_PREPARING: Final = Status(
    "preparing",
    release="b11549-1",
    progress=Progress(
        "prepare",
        Downloading("translategemma-27b-it.i1-Q4_K_M.gguf", 3_210_000_000, 16_500_000_000),
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


class Scene(NamedTuple):
    """What an engine plays, and the states of the page that show it.

    Attributes:
        answered: figures of each answer; without any, none ever comes.
        stage: what is waited for then.
    """

    state: Status
    shown: tuple[Shown, ...]
    answered: tuple[Figures, ...] = ()
    stage: Waiting = "waiting"


class Player(Engine):
    """Plays one scene after another: one page has them all, and a browser loads it once."""

    def __init__(self) -> None:
        self._scene, self._played = Scene(Status("ready"), ()), 0

    def play(self, scene: Scene) -> None:
        """Begin a scene; what is still asked in the one before ends."""
        self._scene, self._played = scene, self._played + 1

    def retry(self) -> None:
        """Do nothing."""

    close = retry

    def status(self) -> Status:
        """Return the scene's state."""
        return self._scene.state

    def events(self, asked: Any, **options: object) -> Generator[Item, None, None]:
        """Wait until the scene is over, or answer with as many characters in another language."""
        del options
        scene, number = self._scene, self._played
        while not scene.answered:
            yield Progress(scene.stage, seconds=3)
            time.sleep(0.2)
            if number != self._played:
                return
        text = str(asked[-1]["content"]).rpartition("\n\n")[2]
        other = _ANSWERS[detect(text).code[:2]]
        yield Piece(_sample(other, max(len(text), len(_SAMPLES[other]))), **_RUNNING)
        yield Piece("", **{**_RUNNING, "finished": True, "reason": "stop"})

    def together(self, work: Work, texts: object) -> Generator[Any, None, None]:
        """Do the work, and tell the figures."""
        del texts
        yield from work(self.events, lambda: True)
        yield from self._scene.answered

    def doctor(self) -> Examination:
        """Return an empty report."""
        return Examination()


def _sample(language: str, length: int) -> str:
    return (_SAMPLES[language] * (length // 20 + 1))[:length].strip()


def serve(engine: Engine, found: settings.Settings) -> str:
    """Serve a page until this program ends; return its URL."""
    port = free_port()
    Page(engine, found).launch(prevent_thread_lock=True, server_port=port, quiet=True)
    return f"http://127.0.0.1:{port}"


def _translate(tab: Tab, shown: Shown) -> None:
    _ask(tab, shown)
    tab.wait_for_selector(".status.done", timeout=_ANSWERS_IN)


def _ask(tab: Tab, shown: Shown) -> None:
    tab.locator("#source textarea").fill(_sample(*shown.written))
    tab.keyboard.press("Control+Enter")
    tab.wait_for_selector(".status")


def _stop(tab: Tab, _: Shown) -> None:
    tab.locator("#stop").click()
    tab.wait_for_selector(".status.stopped")


def _refused(tab: Tab, shown: Shown) -> None:
    if shown.name == "too long":
        tab.locator("#source textarea").fill(_SAMPLES["ja"] * 750)
    tab.locator("#go").click()
    tab.wait_for_selector(".status.failed")


def _file(tab: Tab, _: Shown) -> None:
    with tab.expect_file_chooser() as chosen:
        tab.locator("#open_file").click()
    chosen.value.set_files({"name": "film.mp4", "mimeType": "video/mp4", "buffer": b"film"})
    tab.wait_for_selector(".status.failed")


def _list(box: str, typed: str) -> Any:
    def opened(tab: Tab, _: Shown) -> None:
        tab.keyboard.press("Escape")
        tab.locator(f"#{box} input").click()
        tab.keyboard.type(typed)
        tab.wait_for_selector(f"#{box} .options li[hidden]", state="attached")

    return opened


def _programs(tab: Tab, _: Shown) -> None:
    if not tab.locator(".api-docs-wrap").count():
        tab.locator("footer button").first.click()
        tab.wait_for_selector(".api-docs-wrap .snippet")


def _python(tab: Tab, _: Shown) -> None:
    tab.locator(".api-docs-wrap .snippet", has_text="Python").first.click()
    tab.wait_for_selector(".api-docs-wrap .snippet.current-lang:has-text('Python')")


def _owners(tab: Tab, _: Shown) -> None:
    tab.locator("#owners").click()


def _doctor(tab: Tab, shown: Shown) -> None:
    _owners(tab, shown)
    tab.wait_for_selector(".last_calls dd:has-text('tok')")
    tab.locator("#examine").click()
    tab.wait_for_selector("#report textarea", timeout=_ANSWERS_IN)


def _line(tab: Tab, shown: Shown) -> None:
    """Have programs take every turn."""
    for _ in range(CONCURRENCY):
        asked = {"data": ["Good morning.", "ja", "auto"]}
        requests.post(f"{tab.url}gradio_api/call/translate", json=asked, timeout=30)
    _ask(tab, shown)
    tab.wait_for_selector(".status.waiting")


def _lost(tab: Tab, shown: Shown) -> None:
    tab.locator("#source textarea").fill(_sample(*shown.written))
    tab.route("**/state", lambda route: route.abort())
    tab.wait_for_selector("#lost:not([hidden])")


STEPS: Final = {
    "translate": _translate,
    "ask": _ask,
    "stop": _stop,
    "refused": _refused,
    "file": _file,
    "from": _list("source_language", "a"),
    "to": _list("target_language", "ar"),
    "unknown": _list("target_language", "klingon"),
    "programs": _programs,
    "python": _python,
    "owners": _owners,
    "doctor": _doctor,
    "line": _line,
    "lost": _lost,
}


def _visit(tab: Tab, address: str) -> None:
    """Open the page; a browser that a busy machine has starved is asked again."""
    tab.unroute("**/state")
    for _ in range(3):
        tab.goto(address)
        try:
            tab.wait_for_selector("html.settled", timeout=_OPENS)
            tab.wait_for_selector("#pill .pill", timeout=_OPENS)
        except TookTooLong:
            sys.stderr.write(f"{address} did not open in {_OPENS // 1000} s\n")
        else:
            return
    raise TookTooLong(address)


def taken(tab: Tab, url: str, shown: Shown) -> Iterator[tuple[int, Image.Image]]:
    """Open the page, do the steps, and yield a picture at each width."""
    tab.set_viewport_size({"width": WIDTHS[0][0], "height": WIDTHS[0][1]})
    _visit(tab, f"{url}/{shown.query}")
    for width, height in WIDTHS:
        tab.set_viewport_size({"width": width, "height": height})
        for step in shown.steps if shown.again or width == WIDTHS[0][0] else ():
            STEPS[step](tab, shown)
        tab.mouse.move(2, 2)
        tab.evaluate(_SETTLED)
        content = tab.screenshot(full_page=shown.whole, animations="disabled")
        yield width, Image.open(BytesIO(content)).convert("RGB")


def sheet(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Put the pictures of each state into a row under its name, one column beside another."""
    small = {
        name: [one.resize((one.width // _SHARE, one.height // _SHARE)) for one in row]
        for name, row in rows.items()
    }
    widest = max(sum(one.width + _GAP for one in row) for row in small.values()) + _GAP
    heights = [max(one.height for one in row) + _GAP + _TITLE for row in small.values()]
    made = Image.new("RGB", (widest, sum(heights) + _GAP), "#8a8f98")
    down, write = _GAP, ImageDraw.Draw(made).text
    for (name, row), height in zip(small.items(), heights, strict=True):
        write((_GAP, down - 2), name, "#000000")
        across = _GAP
        for one in row:
            made.paste(one, (across, down + _TITLE))
            across += one.width + _GAP
        down += height
    return made


def _broken() -> Failure:
    """Return what the page says of a setting that a person got wrong."""
    try:
        settings.load(environ={"YAKULINGO_SPACES_LLAMA_DEVICE": "the first one"})
    except SettingError as error:
        return Failure.of(error)
    raise AssertionError("that is no device")


def scenes() -> tuple[Scene, ...]:
    """Return what the engine plays."""
    ready = replace(_PREPARING, phase="ready", verified=True, server_pid=1, warm=True, notes=())
    lent = replace(ready, calls=_CALLS, gpu_seconds_reserved=37.0, gpu_seconds_used=6.0)
    full = Failure("DISK_FULL", "no room is left for the model", "choose a larger disk", 6)
    amber = replace(ready, verified=False, digest="ab" * 32, notes=_PREPARING.notes)
    return (
        Scene(ready, (DONE,), (replace(_CALLS[1], reserved=0, left=None),)),
        Scene(ready, STANDING),
        Scene(ready, (Shown("in line", ("line",)),)),
        Scene(lent, LENT, _CALLS[1:]),
        Scene(lent, (Shown("waiting for a GPU", ("ask",)),), stage="queue"),
        Scene(replace(ready, warm=False), (Shown("asleep"),)),
        Scene(amber, (Shown("unpinned", ("owners",), whole=True),)),
        Scene(_PREPARING, (Shown("preparing", ("owners",), whole=True),)),
        Scene(Status("failed", failure=full), (Shown("failed"),)),
        Scene(Status("failed", failure=_broken()), (Shown("broken", whole=True),)),
    )


def states(player: Player, played: str, real: str) -> Iterator[tuple[str, Shown]]:
    """Yield each state and the URL that shows it: of the player's page, then of the real one."""
    for scene in scenes():
        player.play(scene)
        yield from ((played, one) for one in scene.shown)
    yield real, DOCTOR


def pictures(each: Path | None) -> dict[str, list[Image.Image]]:
    """Take all pictures, by state; keep each one where a folder is given."""
    rows: dict[str, list[Image.Image]] = {}
    engine, player = Engine(), Player()
    urls = serve(player, engine.settings), serve(engine, engine.settings)
    program = shutil.which("chromium") or "chromium"
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright, closing(engine):
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        for scheme, locale in LOOKS:
            tab = browser.new_page(color_scheme=scheme, locale=locale)
            tab.set_default_timeout(_OPENS)
            for url, shown in states(player, *urls):
                for width, picture in taken(tab, url, shown):
                    rows.setdefault(shown.name, []).append(picture)
                    if each:
                        picture.save(each / f"{shown.name}-{scheme}-{width}.png")
            tab.close()
        browser.close()
    return rows


def main(argv: list[str] | None = None) -> int:
    """Make all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--each", type=Path, help="a folder for every picture in its full size")
    asked = parser.parse_args(argv)
    os.environ.setdefault("SPACE_ID", "owner/translator")  # an error links to its settings
    # a small model may find no end
    os.environ.setdefault("YAKULINGO_SPACES_MAX_NEW_TOKENS", "40")
    rows = pictures(asked.each)
    one = rows[DONE.name][0].quantize(_COLOURS, kmeans=1, dither=Image.Dither.NONE)
    one.save(asked.out / "page-light.png", optimize=True)
    made, path = sheet(rows), asked.out / "page-states.webp"
    for quality in range(80, 0, -10):
        made.save(path, quality=quality, method=6)
        if path.stat().st_size <= _MOST:
            break
    sys.stdout.write(f"{path} {made.width} x {made.height}, {path.stat().st_size // 1000} kB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
