"""The engine behind the page: prepares runtime and model, streams answers, says what is running."""

from __future__ import annotations

from typing import TYPE_CHECKING

from translator.values import Ask, Call, Failure, Item, Phase, Piece, Progress, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_loader.settings import Settings

__all__ = ["Ask", "Call", "Engine", "Failure", "Item", "Phase", "Piece", "Progress", "State"]


class Engine:
    """One for each app. ``stream`` is what a page calls; everything else says how things stand."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def begin(self) -> None:
        """Begin to get everything ready that needs no GPU; returns at once."""
        raise NotImplementedError

    def state(self) -> State:
        """Return what is known now."""
        raise NotImplementedError

    def retry(self) -> None:
        """Prepare again after a failure; nothing where it is under way or done."""
        raise NotImplementedError

    def stream(self, ask: Ask) -> Iterator[Item]:
        """Stream an answer. The page calls this in the app's process, on ZeroGPU too: the engine
        waits for the preparation, then has the decorated function of ``zerogpu`` run in a worker.

        Closing the iterator stops the generation. ``gr.Error`` of the ``spaces`` package (quota,
        illegal duration) is let through: only it knows the words and the links.
        """
        raise NotImplementedError

    def duration(self, ask: Ask) -> int:
        """Return the seconds of GPU time to ask ZeroGPU for."""
        raise NotImplementedError

    def doctor(self) -> str:
        """Return the doctor's page as text, without secrets. Takes seconds: not for a UI thread."""
        raise NotImplementedError

    def close(self) -> None:
        """End the server; safe to call twice."""
        raise NotImplementedError
