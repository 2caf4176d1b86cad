"""From the environment to a page that is served. Whatever is set wrongly, there is a page."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from llama_loader import settings
from llama_loader.errors import LoaderError
from translator import page
from translator.engine import Engine
from translator.refusing import RefusingEngine

if TYPE_CHECKING:
    from translator.session import Engine as AnyEngine


def app() -> page.Page:
    """Read the settings and build the page; on ZeroGPU this also decorates the entry point."""
    try:
        found = settings.load()
        return page.Page(Engine(found), found)
    except LoaderError as error:
        sys.stderr.write(f"{error.render()}\n")
        refusing: AnyEngine = RefusingEngine(error)
        return page.Page(refusing, None)


def run(made: page.Page, **options: Any) -> None:
    """Prepare in the background and serve the page until the process is ended."""
    made.engine.begin()
    try:
        made.launch(**options)
    finally:
        made.engine.close()
