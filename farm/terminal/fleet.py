"""The sets of a run, on one host or several, and how they look: a live table, or plain lines."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Final, Self

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from farm.terminal import schedule
from farm.terminal.report import PLAIN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

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
_KINDS: Final = ("running", FAILED, WAITING, "done")
"""The order in which sets get the room that a terminal has."""
_HEADS: Final = 2
"""Lines above the sets: of the whole run, and the columns' names."""
_NARROW: Final = 100
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

    @property
    def kind(self) -> str:
        """One of ``_KINDS``."""
        if self.is_open:
            return WAITING if self.state == WAITING else "running"
        return FAILED if self.state == FAILED else "done"

    def whole(self, now: float) -> float | None:
        """Estimate its seconds from begin to end: by ninja's counter, else by what was recorded."""
        if self.began is None:
            return self.expected
        passed = (self.ended or now) - self.began
        if self.ended is not None:
            return passed
        left = self.pace.left(self.count[1], now) if self.pace and self.count else None
        if left is not None:
            return passed + left
        return max(self.expected, passed) if self.expected is not None else None

    def left(self, now: float) -> float | None:
        """Estimate its seconds left, None where nothing tells."""
        whole = self.whole(now)
        if whole is None or self.began is None:
            return whole
        return max(whole - (now - self.began), 0.0)


@dataclass
class Fleet:
    """The live table of a run. A context manager: the terminal is restored on every exit.

    Args:
        report: the run's.
        expected: seconds by set, in the order in which the sets are built.
        known: whether any of them was recorded; else nothing is estimated until ninja counts.
        many: whether there are several hosts, and so a column for them.
    """

    report: BuildReport
    expected: Mapping[str, float]
    clock: Callable[[], float] = time.monotonic
    rows: dict[str, Row] = field(default_factory=dict)
    hosts: int = 1
    known: bool = True
    many: bool = True
    _due: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {
            key: Row(key, seconds if self.known else None) for key, seconds in self.expected.items()
        }
        self._began = self.clock()
        self._over = False
        self._live = Live(
            console=self.report.console,
            get_renderable=self._fitted,
            refresh_per_second=2,
            transient=False,
        )

    def __enter__(self) -> Self:
        """Start the table, where one can be drawn."""
        if self.report.is_live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last table standing, whole: nothing is drawn over it any more."""
        self._over = True
        if self._live.is_started:
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
        row = self.rows[key]
        row.count = (done, total)
        now = self.clock()
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
        open_rows = [row for row in self.rows.values() if row.is_open]
        lasting = [row for row in self.rows.values() if row.state not in {FAILED, BEFORE}]
        told = [seconds for row in lasting if (seconds := row.whole(now)) is not None]
        if not told:
            return None
        usual = median(told)  # for sets of which nothing is known
        running = [_or(row.left(now), usual) for row in open_rows if row.began is not None]
        waiting = [_or(row.expected, usual) for row in open_rows if row.began is None]
        idle = [0.0] * max(self.hosts - len(running), 0)
        return schedule.finish(waiting, [*running, *idle] or [0.0])

    def is_slow(self, key: str) -> bool:
        """Whether another host would be done sooner, were it handed the set now.

        Compared with what was recorded of the set, else with the sets that this run has built.
        """
        row, now = self.rows[key], self.clock()
        done = [other.whole(now) for other in self.rows.values() if other.state == BUILT]
        usual = row.expected if row.expected is not None else _middle(done)
        if usual is None or row.began is None:
            return False
        usual = max(usual, _LEAST)
        return _or(row.left(now), 0.0) > _SLOW * usual or now - row.began > (_SLOW + 1) * usual

    def table(self, width: int, height: int | None = None) -> Group:
        """Return what a terminal of this size shows; every set has one line where there is room.

        Where there is not, what runs and what has failed is shown first; the sets that wait or
        are done and find no room are counted in one line.
        """
        shown = self._shown(height)
        wide = width >= _NARROW
        table = self._columns(wide=wide)
        for row in shown:
            table.add_row(*self._cells(row, wide=wide), style=_STYLES.get(row.state, ""))
        title = Text(self._title(), no_wrap=True, overflow="ellipsis")
        hidden = Counter(row.kind for row in self.rows.values() if row not in shown)
        return Group(title, table, *([_folded(hidden)] if hidden else []))

    def _shown(self, height: int | None) -> list[Row]:
        rows = list(self.rows.values())
        if height is None or len(rows) <= height - _HEADS:
            return rows
        room = max(height - _HEADS - 1, 1)
        first = sorted(rows, key=lambda row: _KINDS.index(row.kind))[:room]
        return [row for row in rows if row in first]

    def _columns(self, *, wide: bool) -> Table:
        table = Table(box=None)
        for name in ("set", *(("host",) if self.many else ()), "step"):
            # as wide as its longest word: the table does not move from step to step
            least = _STEP if name == "step" else None
            table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=least)
        for name in ("ninja", "passed", *(("left",) if wide else ())):
            table.add_column(name, no_wrap=True, justify="right", min_width=_FIGURE)
        return table

    def _cells(self, row: Row, *, wide: bool) -> tuple[str, ...]:
        now = self.clock()
        left = row.left(now) if row.is_open and row.began is not None else None
        return (
            row.key,
            *((row.host,) if self.many else ()),
            row.state,
            f"{row.count[0]}/{row.count[1]}" if row.count else "",
            _span((row.ended or now) - row.began) if row.began is not None else "",
            *((_span(left) if left is not None else "",) if wide else ()),
        )

    def _fitted(self) -> Group:
        console = self.report.console
        return self.table(console.width, None if self._over else console.height)

    def _title(self) -> str:
        done = sum(not row.is_open for row in self.rows.values())
        hosts = f", {self.hosts} host{'s' if self.hosts != 1 else ''}" if self.many else ""
        passed = f"{_span(self._passed)} passed"
        return f"{done} of {len(self.rows)} sets{hosts}, {passed}{self._rest()}"

    def _rest(self) -> str:
        """Return the estimate in words, nothing where all is done or nothing tells."""
        left = self.left() if any(row.is_open for row in self.rows.values()) else None
        return f", about {_span(left)} left" if left is not None else ""

    def _on(self, row: Row) -> str:
        return f" on {row.host}" if self.many else ""

    @property
    def _passed(self) -> float:
        return self.clock() - self._began

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


def _folded(hidden: Counter[str]) -> Text:
    """Return the line for sets that find no room on the terminal."""
    told = ", ".join(f"{hidden[kind]} more {kind}" for kind in _KINDS if hidden[kind])
    return Text(f" {told}", style="dim", no_wrap=True, overflow="ellipsis")


def _middle(seconds: Sequence[float | None]) -> float | None:
    known = [one for one in seconds if one is not None]
    return median(known) if known else None


def _or(seconds: float | None, usual: float) -> float:
    return usual if seconds is None else seconds


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), _MINUTE)
    hours, minutes = divmod(minutes, _MINUTE)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
