"""The sets of a run, on one host or several, and how they look: a live table, or plain lines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Final, Self

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from farm.kept import Journal
from farm.terminal import schedule
from farm.terminal.report import PLAIN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from farm.plan import BuildPlan, Step
    from farm.terminal.report import BuildReport

WAITING: Final = "waiting"
BUILT: Final = "built"
FAILED: Final = "failed"
BEFORE: Final = "built before"
"""By an earlier run."""
_STYLES: Final = {BUILT: "green", BEFORE: "green", FAILED: "red", WAITING: "dim"}
_SLOW: Final = 2.0
"""A set is slow that has more than this many times its usual length left."""
_LEAST: Final = 5.0
"""Seconds that count as usual at least: of sets that take a moment nothing can be told."""
_HEADS: Final = 2
"""Lines above the sets: of the whole run, and the columns' names."""
_STEP: Final = len("configure")
_FIGURE: Final = len("470/470")
_MINUTE: Final = 60


@dataclass
class Row:
    """One set: where it is built and how far it is. ``expected`` is in seconds, None: not known."""

    key: str
    expected: float | None
    host: str = ""
    state: str = WAITING
    count: tuple[int, int] | None = None
    pace: schedule.Pace | None = None
    began: float | None = None
    ended: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is neither built nor given up."""
        return self.state not in {BUILT, FAILED, BEFORE}

    def left(self, now: float) -> float | None:
        """Estimate its seconds left: by ninja's counter, else by what was recorded."""
        if self.began is None or self.ended is not None:
            return self.expected if self.ended is None else 0.0
        left = self.pace.left(self.count[1], now) if self.pace and self.count else None
        if left is None and self.expected is not None:
            left = max(self.expected - (now - self.began), 0.0)
        return left

    def whole(self, now: float) -> float | None:
        """Estimate its seconds from begin to end."""
        left = self.left(now)
        if left is None or self.began is None:
            return left
        return (self.ended or now) - self.began + left


@dataclass
class Fleet:
    """The live table of a run. A context manager: the terminal is restored on every exit.

    Args:
        report: the run's.
        expected: seconds by set, in the order in which the sets are built; None: not known, and
            nothing is estimated until ninja counts.
        many: whether there are several hosts, and so a column for them.
    """

    report: BuildReport
    expected: Mapping[str, float | None]
    clock: Callable[[], float] = time.monotonic
    hosts: int = 1
    many: bool = True
    _due: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {key: Row(key, seconds) for key, seconds in self.expected.items()}
        self._began = self.clock()
        self._over = False
        self._live = Live(
            console=self.report.console, get_renderable=self._fitted, refresh_per_second=2
        )

    @classmethod
    def of(
        cls, plans: Iterable[BuildPlan], report: BuildReport, state: Path, *, many: bool
    ) -> Self:
        """Expect what the journal of a checkout has recorded; many hosts build the longest first.

        A set of which nothing is recorded counts as the median of the others.
        """
        journal = Journal(state / "journal")
        keys = [plan.key for plan in plans]
        known = {key: took for key in keys if (took := journal.seconds(key)) is not None}
        if not known:
            return cls(report, dict.fromkeys(keys), many=many)
        expected = schedule.expected(keys, known)
        order = schedule.longest_first(expected) if many else keys
        return cls(report, {key: expected[key] for key in order}, many=many)

    def __enter__(self) -> Self:
        """Start the table, where one can be drawn."""
        if self.report.is_live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the last table standing, whole: nothing is drawn over it any more."""
        self._over = True
        self._live.stop()

    def say(self, line: str) -> None:
        """Show one line that stays, above the table."""
        self.report.say(line)

    def begin(self, key: str, host: str) -> None:
        """A set has been handed to a host."""
        row = self.rows[key]
        began = self.clock() if row.began is None else row.began  # else a second host has it, too
        row.host, row.state, row.count, row.began = host, "starting", None, began
        if self.many:
            self._plain(f"{key}: to {host}")

    def before(self, key: str) -> None:
        """A set was built by an earlier run."""
        self.rows[key].state = BEFORE

    def wait(self, key: str, why: str) -> None:
        """A set waits for a host again."""
        row = self.rows[key]
        row.host, row.state, row.count, row.began = "", WAITING, None, None
        self.say(f"{key}: {why}")

    def end(self, key: str, state: str) -> None:
        """A set is ``BUILT`` or has ``FAILED``."""
        row = self.rows[key]
        row.state, row.ended = state, self.clock()
        took = row.ended - (row.began if row.began is not None else row.ended)
        self._plain(f"{key}: {state}{self._on(row)} in {_span(took)}{self._rest()}")

    def step(self, key: str, name: str, jobs: int = 1) -> None:
        """A set's step has begun, with so many compilers at a time."""
        row, now = self.rows[key], self.clock()
        row.state, row.count, row.pace = name, None, schedule.Pace(now, jobs)
        self._due[key] = now + PLAIN_SECONDS
        self._plain(f"{key} {name}{self._on(row)} …")
        self._show()

    def counted(self, key: str, done: int, total: int) -> None:
        """Ninja's counter of a set."""
        row, now = self.rows[key], self.clock()
        row.count = (done, total)
        if row.pace is not None:
            row.pace.take(done, now)
        if done == total:
            self._show()
        if now >= self._due.get(key, now) or done == total:
            self._due[key] = now + PLAIN_SECONDS
            self._plain(f"{key} {row.state} [{done}/{total}]{self._on(row)}{self._rest()}")

    def left(self) -> float | None:
        """Estimate the seconds until the last set is done, None where nothing tells."""
        now = self.clock()
        lasting = [row for row in self.rows.values() if row.state not in {FAILED, BEFORE}]
        told = [seconds for row in lasting if (seconds := row.whole(now)) is not None]
        if not told:
            return None
        usual = median(told)  # for sets of which nothing is known
        lefts = {row.key: usual if (left := row.left(now)) is None else left
                 for row in lasting if row.is_open}  # fmt: skip
        running = [left for key, left in lefts.items() if self.rows[key].began is not None]
        waiting = [left for key, left in lefts.items() if self.rows[key].began is None]
        idle = [0.0] * max(self.hosts - len(running), 0)
        return schedule.finish(waiting, [*running, *idle] or [0.0])

    def is_slow(self, key: str) -> bool:
        """Whether another host would be done sooner, were it handed the set now.

        Compared with what was recorded of the set, else with the sets that this run has built.
        """
        row, now = self.rows[key], self.clock()
        built = [took for one in self.rows.values()
                 if one.state == BUILT and (took := one.whole(now)) is not None]  # fmt: skip
        usual = row.expected if row.expected is not None or not built else median(built)
        if usual is None or row.began is None:
            return False
        usual = max(usual, _LEAST)
        return (row.left(now) or 0.0) > _SLOW * usual or now - row.began > (_SLOW + 1) * usual

    def table(self, height: int | None = None) -> Group:
        """Return what a terminal of this height shows: where not all fit, what runs or failed."""
        rows = list(self.rows.values())
        if height is not None and len(rows) + _HEADS > height:
            running = [row for row in rows if row.is_open and row.began is not None]
            rows = [row for row in rows if row in running or row.state == FAILED]
        table = Table(box=None)
        for name in ("set", *(("host",) if self.many else ()), "step"):
            # as wide as its longest word: the table does not move from step to step
            least = _STEP if name == "step" else None
            table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=least)
        for name in ("ninja", "passed", "left"):
            table.add_column(name, no_wrap=True, justify="right", min_width=_FIGURE)
        for row in rows:
            table.add_row(*self._cells(row), style=_STYLES.get(row.state, ""))
        return Group(Text(self._title(), no_wrap=True, overflow="ellipsis"), table)

    def _cells(self, row: Row) -> tuple[str, ...]:
        now = self.clock()
        left = row.left(now) if row.is_open and row.began is not None else None
        return (
            row.key,
            *((row.host,) if self.many else ()),
            row.state,
            f"{row.count[0]}/{row.count[1]}" if row.count else "",
            _span((row.ended or now) - row.began) if row.began is not None else "",
            _span(left) if left is not None else "",
        )

    def _fitted(self) -> Group:
        return self.table(None if self._over else self.report.console.height)

    def _title(self) -> str:
        done = sum(not row.is_open for row in self.rows.values())
        hosts = f", {self.hosts} host{'s' if self.hosts != 1 else ''}" if self.many else ""
        passed = f"{_span(self.clock() - self._began)} passed"
        return f"{done} of {len(self.rows)} sets{hosts}, {passed}{self._rest()}"

    def _rest(self) -> str:
        """Return the estimate in words, nothing where all is done or nothing tells."""
        left = self.left() if any(row.is_open for row in self.rows.values()) else None
        return f", about {_span(left)} left" if left is not None else ""

    def _on(self, row: Row) -> str:
        return f" on {row.host}" if self.many else ""

    def _show(self) -> None:
        """Show what has changed now: no step is too short to be seen."""
        if self._live.is_started:
            self._live.refresh()

    def _plain(self, line: str) -> None:
        if not self.report.is_live:
            self.say(line)


@dataclass(frozen=True)
class SetReporter:
    """A reporter for one set of a table."""

    fleet: Fleet
    key: str

    def step(self, plan: BuildPlan, step: Step) -> None:
        """Show that a step has begun."""
        del plan
        jobs = step.argv[step.argv.index("-j") + 1] if "-j" in step.argv else "1"
        self.fleet.step(self.key, step.name, int(jobs))

    def count(self, done: int, total: int) -> None:
        """Show ninja's counter."""
        self.fleet.counted(self.key, done, total)

    def note(self, line: str) -> None:
        """Show one coded line above the table."""
        self.fleet.say(line)


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), _MINUTE)
    hours, minutes = divmod(minutes, _MINUTE)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
