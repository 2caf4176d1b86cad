"""What a person sees: lines that stay, and on a terminal what is being done at the moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from types import TracebackType

PLAIN_SECONDS: Final = 15.0
"""Between two plain progress lines: a CI log of an hour's build stays readable."""


class BuildReport:
    """Speaks for one run. A context manager: the terminal is restored on every exit."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.is_live,
        )
        self._task = self._bar.add_task("", total=None, visible=False)

    @property
    def is_live(self) -> bool:
        """Whether lines can be drawn again: a dumb terminal gets them like a file does."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def __enter__(self) -> Self:
        """Nothing is live yet: a table of sets may be, and two lives disturb one another."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def say(self, line: str) -> None:
        """Show one line that stays."""
        whole = not self.is_live  # a terminal gets its lines broken between words
        self.console.print(line, markup=False, highlight=False, soft_wrap=whole)

    def activity(self, text: str) -> None:
        """Show what is being done, for as long as nothing else is shown; terminals only."""
        self._bar.start()
        self._bar.update(self._task, description=text[:60], completed=0, total=None, visible=True)

    def note(self, line: str) -> None:
        """Show one coded line, such as ``note[NO_CCACHE]: …``."""
        self.say(line)
