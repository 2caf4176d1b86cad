"""What a person sees of a build: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from farm.plan import BuildPlan, Step

PLAIN_SECONDS: Final = 15.0
"""Between two plain progress lines: a CI log of an hour's build stays readable."""


class BuildReport:
    """Reports the builds of one run. A context manager: the terminal is restored on every exit."""

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True)
        self._clock = clock
        self._plain_due = 0.0
        self._label = ""
        self._counted = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, visible=False)

    def __enter__(self) -> Self:
        """Start the live bar, if there is a terminal."""
        self._bar.start()
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
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def activity(self, text: str) -> None:
        """Show what is being done, for as long as nothing else is shown; terminals only."""
        self._bar.update(self._task, description=text[:60], completed=0, total=None, visible=True)

    def note(self, line: str) -> None:
        """Show one coded line, such as ``note[NO_CCACHE]: …``."""
        self.say(line)

    def step(self, plan: BuildPlan, step: Step) -> None:
        """Begin a step."""
        self._label = f"{plan.key} {step.name}"
        self._counted = 0
        self._plain_due = self._clock()
        self._bar.update(
            self._task, description=self._label, completed=0, total=None, visible=step.counts
        )
        if not self.console.is_terminal:
            self.say(f"{self._label} …")

    def count(self, done: int, total: int) -> None:
        """Show ninja's counter: at every edge on a terminal, every 15 seconds elsewhere."""
        self._bar.update(self._task, completed=done, total=total)
        if self.console.is_terminal:
            return
        now = self._clock()
        if now >= self._plain_due or (done == total and self._counted != total):
            self.say(f"{self._label} [{done}/{total}]")
            self._plain_due = now + PLAIN_SECONDS
        self._counted = done
