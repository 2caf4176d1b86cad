"""An engine for settings that cannot be read: the page stands, and says which one and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_loader import doctor, settings
from llama_loader.errors import without_secrets
from llama_loader.events import ignore
from translator.values import Failure, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_loader.errors import LoaderError
    from translator.values import Ask, Item


class RefusingEngine:
    """Fails with what was wrong at the start; a setting only changes with a restart."""

    def __init__(self, error: LoaderError) -> None:
        message, hint = without_secrets(error.message), without_secrets(error.hint)
        self._failure = Failure(error.code, message, hint, error.exit_status)

    def begin(self) -> None:
        """Do nothing."""

    def retry(self) -> None:
        """Do nothing: the environment is read once."""

    def close(self) -> None:
        """Do nothing."""

    def state(self) -> State:
        """Return the failure."""
        return State("failed", failure=self._failure)

    def stream(self, ask: Ask) -> Iterator[Item]:
        """Yield the failure."""
        del ask
        yield self._failure

    def doctor(self) -> str:
        """Return the doctor's page: it takes unreadable settings as a finding."""
        return doctor.examine(settings.load, sink=ignore).as_text()
