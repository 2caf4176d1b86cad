"""The output of a run: lines that stay, and on a terminal a row for each set.

rich draws the rows and estimates the time that is left. A file gets plain lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any, Final, Self

from rich.console import Console, RenderableType
from rich.progress import Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from farm.errors import shown

PLAIN_SECONDS: Final = 15.0
"""Between two plain progress lines: a CI log of an hour's build stays readable."""
BUILT: Final = "built"
FAILED: Final = "failed"
BEFORE: Final = "built before"
"""The state of a set that an earlier run built."""
_STYLES: Final = {BUILT: "green", BEFORE: "green", FAILED: "red"}
_SLOW: Final = 2.0
"""A set counts as slow if more than this many times its usual seconds are left."""
_LEAST: Final = 5.0
"""The lowest usual seconds of a set: for shorter ones no estimate is possible."""
_MINUTE: Final = 60
_TELLING: Final = 60.0
"""Seconds that rich estimates the rest from: hits of a compiler cache are forgotten after that."""


class _Words(TextColumn):
    """Words of a row as they are, a set's last state in its colour."""

    def render(self, task: Task) -> Text:
        """Return the words of a row."""
        text = super().render(task)
        text.stylize(_STYLES.get(text.plain, ""))
        return text


class _Rows(Progress):
    """Rows with a title above them."""

    title = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the title, where there is one, and the rows."""
        if self.title:
            yield Text(self.title, no_wrap=True, overflow="ellipsis")
        yield from super().get_renderables()


class BuildReport:
    """The output of one run. A context manager: the terminal is restored on every exit."""

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True)
        narrow = Column(no_wrap=True, overflow="ellipsis")
        self.rows = _Rows(
            *(_Words(f"{{task.fields[{name}]}}", markup=False, table_column=narrow)
              for name in ("key", "host", "step", "counter")),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            get_time=clock,
            speed_estimate_period=_TELLING,
            disable=not self.is_live,
        )  # fmt: skip
        self._activity = self.row("", visible=False)

    @property
    def is_live(self) -> bool:
        """Whether rows can be drawn again: a dumb terminal gets plain lines, as a file does."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def __enter__(self) -> Self:
        """Draw nothing yet."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the terminal as it was."""
        self.rows.stop()

    def row(self, key: str, *, visible: bool) -> Task:
        """Add a row; its time runs once it is started."""
        words: dict[str, Any] = {"key": key, "host": "", "step": "", "counter": ""}
        number = self.rows.add_task("", start=False, total=None, visible=visible, **words)
        return next(task for task in self.rows.tasks if task.id == number)

    def say(self, line: str) -> None:
        """Print one line that stays, with unprintable characters escaped."""
        whole = not self.is_live  # a terminal gets its lines broken between words
        self.console.print(shown(line), markup=False, highlight=False, soft_wrap=whole)

    def activity(self, text: str) -> None:
        """Show the current activity until a set is built; terminals only."""
        self.rows.start()
        self.rows.start_task(self._activity.id)
        self.rows.update(self._activity.id, key=shown(text[:60]), visible=True)

    def settle(self) -> None:
        """Stop showing an activity."""
        self.rows.update(self._activity.id, visible=False)


class Fleet:
    """The rows of a run's sets. A context manager.

    ``expected`` are the seconds by set, in the order in which the sets are built; None: unknown, so
    no estimate is shown until ninja counts. ``many``: several hosts must be named.
    """

    def __init__(
        self, report: BuildReport, expected: Mapping[str, float | None], *, many: bool = True
    ) -> None:
        self.report, self.expected, self.many = report, dict(expected), many
        self.hosts = 1
        self.took: dict[str, float] = {}
        """Seconds of each set that this run has built."""
        fits = len(self.expected) + 1 < report.console.height
        self._sets = {key: report.row(key, visible=fits) for key in self.expected}
        self._open = dict.fromkeys(self.expected)
        self._due: dict[str, float] = {}
        self._shows_all = fits
        for key in self.expected:
            self._update(key, step="waiting")

    @classmethod
    def longest_first(cls, report: BuildReport, recorded: Mapping[str, float | None]) -> Self:
        """Return the sets by their recorded seconds, longest first; equal ones stay in order.

        A set without recorded seconds counts as the median of the others.
        """
        known = [seconds for seconds in recorded.values() if seconds is not None]
        if not known:
            return cls(report, recorded)
        expected = {key: seconds or median(known) for key, seconds in recorded.items()}
        order = sorted(expected, key=lambda key: -expected[key])
        return cls(report, {key: expected[key] for key in order})

    def __enter__(self) -> Self:
        """Draw the rows, if the terminal allows it."""
        self.report.settle()
        self.report.rows.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Draw the rows for the last time and leave them on the terminal."""
        for task in self._sets.values():
            self.report.rows.update(task.id, visible=True)
        self.report.rows.stop()
        for task in self._sets.values():
            self.report.rows.remove_task(task.id)
        self.report.rows.title = ""

    def say(self, line: str) -> None:
        """Show one line that stays, above the rows."""
        self.report.say(line)

    def begin(self, key: str, host: str) -> None:
        """Show that a set was handed to a host; a second one may get it, too."""
        self.report.rows.start_task(self._sets[key].id)
        self._update(key, host=host if self.many else "", step="starting", counter="")
        if self.many:
            self._plain(f"{key}: to {host}")

    def before(self, key: str) -> None:
        """Show that an earlier run built a set."""
        self._close(key, BEFORE)

    def wait(self, key: str, why: str) -> None:
        """Show that a set waits for a host again."""
        self.report.rows.reset(self._sets[key].id, start=False)
        self._update(key, host="", step="waiting", counter="")
        self.say(f"{key}: {why}")

    def end(self, key: str, state: str) -> None:
        """Show that a set is ``BUILT`` or has ``FAILED``."""
        task = self._sets[key]
        self.report.rows.stop_task(task.id)
        took = task.elapsed or 0.0
        if state == BUILT:
            self.took[key] = took
        self._close(key, state)
        self._plain(f"{key}: {state}{self._on(key)} in {_span(took)}{self._rest()}")

    def hear(self, key: str, what: str, *values: Any) -> None:
        """Show an event of a set's build (``execute.Reporter``)."""
        if what == "note":
            self.say(f"{key}: {values[0]}" if self.many else values[0])
        elif what == "count":
            self.counted(key, *values)
        else:
            self.step(key, *values)

    def step(self, key: str, name: str) -> None:
        """Show that a set's step has begun."""
        self._due[key] = self._sets[key].get_time() + PLAIN_SECONDS
        self._update(key, step=name, counter="")
        self._plain(f"{key} {name}{self._on(key)} …")
        self.report.rows.refresh()  # no step is too short to be seen

    def counted(self, key: str, done: int, total: int) -> None:
        """Show ninja's counter of a set."""
        task = self._sets[key]
        self.report.rows.update(task.id, completed=done, total=total)
        self._update(key, counter=f"{done}/{total}")
        if done == total:
            self.report.rows.refresh()
        if (now := task.get_time()) >= self._due.get(key, now) or done == total:
            self._due[key] = now + PLAIN_SECONDS
            step = task.fields["step"]
            self._plain(f"{key} {step} [{done}/{total}]{self._on(key)}{self._rest()}")

    def left(self) -> float | None:
        """Estimate the seconds until the last set is done; None if nothing is known.

        No schedule is shorter than its longest set, or than the sum of all sets divided by the
        number of hosts; longest first comes close to that.
        """
        known = [*self.took.values(), *(one for one in self.expected.values() if one is not None)]
        told = {key: self._left(key) for key in self._open}
        known += [one for one in told.values() if one is not None]
        if not known or not told:
            return None
        usual = median(known)
        lefts = [usual if one is None else one for one in told.values()]
        return max(*lefts, sum(lefts) / self.hosts)

    def is_slow(self, key: str) -> bool:
        """Whether another host that gets the set now would finish it sooner.

        The comparison is with the set's recorded seconds, else with the sets built in this run.
        """
        usual = self.expected[key]
        if usual is None and self.took:
            usual = median(self.took.values())
        passed = self._sets[key].elapsed
        if usual is None or passed is None:
            return False
        usual = max(usual, _LEAST)
        return (self._left(key) or 0.0) > _SLOW * usual or passed > (_SLOW + 1) * usual

    def _left(self, key: str) -> float | None:
        """Estimate a set's remaining seconds by ninja's counter, else by the recorded seconds."""
        task, expected = self._sets[key], self.expected[key]
        if task.finished or task.time_remaining is not None:
            return task.time_remaining or 0.0
        return None if expected is None else max(expected - (task.elapsed or 0.0), 0.0)

    def _close(self, key: str, state: str) -> None:
        self._open.pop(key, None)
        self._update(key, step=state)

    def _update(self, key: str, **words: Any) -> None:
        """Change a set's row and the row of the whole run; a low terminal shows running sets."""
        task = self._sets[key]
        visible = self._shows_all or (task.started and key in self._open)
        self.report.rows.update(task.id, visible=visible, **words)
        done = len(self.expected) - len(self._open)
        hosts = f", {self.hosts} host{'s' if self.hosts != 1 else ''}" if self.many else ""
        self.report.rows.title = f"{done} of {len(self.expected)} sets{hosts}{self._rest()}"

    def _rest(self) -> str:
        """Return the estimate in words; empty if everything is done or nothing is known."""
        left = self.left()
        return f", about {_span(left)} left" if left and left >= 1 else ""

    def _on(self, key: str) -> str:
        return f" on {self._sets[key].fields['host']}" if self.many else ""

    def _plain(self, line: str) -> None:
        if not self.report.is_live:
            self.say(line)


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), _MINUTE)
    hours, minutes = divmod(minutes, _MINUTE)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
