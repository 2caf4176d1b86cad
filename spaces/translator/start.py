"""From the environment to a page that is served. Whatever is set wrongly, there is a page."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from llama_loader import doctor, settings
from llama_loader.errors import LoaderError
from llama_loader.events import ignore
from llama_space import Engine, Failure, Status
from translator import page

if TYPE_CHECKING:
    from collections.abc import Generator

    from llama_loader.doctor import Examination
    from llama_space.values import Item


class RefusingEngine:
    """Stands for an engine whose settings cannot be read: the page shows which one and why."""

    def __init__(self, error: LoaderError) -> None:
        self._failure = Failure.of(error)

    def retry(self) -> None:
        """Do nothing: a setting only changes with a restart."""

    def close(self) -> None:
        """Do nothing."""

    def status(self) -> Status:
        """Return the failure."""
        return Status("failed", failure=self._failure)

    def events(self, asked: object, **options: Any) -> Generator[Item, None, None]:
        """Yield the failure."""
        del asked, options
        yield self._failure

    def doctor(self) -> Examination:
        """Return the doctor's report: it takes settings that cannot be read as a finding."""
        return doctor.examine(settings.load, sink=ignore)


def app() -> page.Page:
    """Read the settings and build the page; on ZeroGPU this also decorates the entry point."""
    try:
        engine = Engine()
        return page.Page(engine, engine.settings)
    except LoaderError as error:
        sys.stderr.write(f"{error.render()}\n")
        return page.Page(RefusingEngine(error), None)


def run(made: page.Page, **options: Any) -> None:
    """Serve the page until the process is ended."""
    try:
        made.launch(**options)
    finally:
        made.engine.close()
