"""From pressing the button to the first character on the page, against llama-server itself.

One app, one llama-server. Turn by turn a new text of the same length goes through a real Chromium
(from the click to the frame in which the right page is no longer empty) and straight to the
server (from the request to the first words). Prints JSON; ``--out`` keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from playwright.sync_api import sync_playwright

from llama_loader import settings
from llama_loader.server import free_port
from llama_space import Engine, request, shared_server
from translator import detection, prompt, session
from translator.page import Page

if TYPE_CHECKING:
    from collections.abc import Mapping

    from playwright.sync_api import Page as Tab

    from llama_loader.client import Client
    from llama_loader.settings import Settings
    from llama_loader.supervisor import Supervisor

SHARE: Final = 1.1
CONSTANT: Final = 0.150
"""The promise: at most this share of the direct time, and these seconds more."""
_PRESS: Final = """() => new Promise(done => {
    const area = document.querySelector("#target textarea");
    const begun = performance.now();
    document.getElementById("go").click();
    const look = () => {
        if (area.value !== "") done((performance.now() - begun) / 1000);
        else requestAnimationFrame(look);
    };
    look();
})"""


def text(number: int) -> str:
    """Return a text of its own for each turn, so that no cache knows more than its beginning."""
    return f"Parcel {number:04d} left the harbour at noon and arrives on the third day."


def on_the_page(tab: Tab, number: int) -> float:
    """Return the seconds from the click to the first character."""
    tab.get_by_role("button", name="Clear").click()
    tab.wait_for_function("document.querySelector('#target textarea').value === ''")
    tab.locator("#source textarea").fill(text(number))
    took = float(tab.evaluate(_PRESS))
    tab.wait_for_selector(".status.done")
    return took


def direct(client: Client, found: Settings, number: int) -> float:
    """Return the seconds from the request to the first words."""
    pair = detection.pair("auto", "ja", text(number))
    asked: Any = request.chat(*prompt.ask("chat", text(number), pair), found)
    began = time.perf_counter()
    stream = iter(client.chat(asked.asked, **asked.options))
    first = next(time.perf_counter() for piece in stream if piece.text)
    for _ in stream:
        pass
    return first - began


def without_the_page(engine: Engine, found: Settings, number: int) -> float:
    """Return the seconds that the same takes without browser and gradio."""
    began = time.perf_counter()
    updates = session.translate(engine, found, session.Job(text(number), "auto", "ja"))
    first = next(time.perf_counter() for one in updates if isinstance(one, session.Answer))
    for _ in updates:
        pass
    return first - began


def measure(found: Settings, turns: int) -> dict[str, Any]:
    """Start everything, take turns, and return what came out."""
    engine = Engine()
    port = free_port()
    page = Page(engine, found)
    page.launch(prevent_thread_lock=True, server_port=port, quiet=True)
    try:
        return _measured(f"http://127.0.0.1:{port}", engine, found, turns)
    finally:
        engine.close()


def _measured(url: str, engine: Engine, found: Settings, turns: int) -> dict[str, Any]:
    program = shutil.which("chromium") or "chromium"
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        tab = browser.new_page()
        tab.goto(url)
        tab.wait_for_selector(".pill.ready", timeout=120_000)
        client = _supervisor().server.client()
        on_the_page(tab, 0), direct(client, found, 1)
        before = os.getloadavg()[0]
        times = [
            (
                on_the_page(tab, 3 * turn),
                direct(client, found, 3 * turn + 1),
                without_the_page(engine, found, 3 * turn + 2),
            )
            for turn in range(1, turns + 1)
        ]
        load = (before, os.getloadavg()[0])
        browser.close()
    page, server, inside = (list(column) for column in zip(*times, strict=True))
    machine = {"load": load, "cpus": os.cpu_count()}
    return {**summary(page, server), "without_page_median": _median(inside), **machine}


def _supervisor() -> Supervisor:
    shared = shared_server._shared  # noqa: SLF001 - the very server that the page talks to
    if shared is None:
        raise AssertionError("the page is ready, so there is a server")
    return shared.start.result()


def _median(seconds: list[float]) -> float:
    return round(statistics.median(seconds), 4)


def summary(page: list[float], server: list[float]) -> dict[str, Any]:
    """Return medians in seconds, and whether the promise is kept."""
    ours, theirs = statistics.median(page), statistics.median(server)
    allowed = SHARE * theirs + CONSTANT
    return {
        "turns": len(page),
        "page_median": round(ours, 4),
        "direct_median": round(theirs, 4),
        "allowed": round(allowed, 4),
        "kept": ours <= allowed,
        "page": [round(one, 4) for one in page],
        "direct": [round(one, 4) for one in server],
    }


def main(argv: list[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Measure with the settings of the environment; 1 where the promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    result = measure(settings.load(environ=environ), options.turns)
    shown = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(f"{shown}\n")
    print(shown)
    return 0 if result["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
