"""The sets of a run on several hosts, and how they look: a live table, or plain lines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from rich.live import Live
from rich.table import Table

from farm import schedule
from farm.report import PLAIN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from farm.report import BuildReport

WAITING: Final = "waiting"
_STYLES: Final = {"built": "green", "failed": "red", WAITING: "dim"}
_NARROW: Final = 100
_MINUTE: Final = 60


@dataclass
class Row:
    """One set: where it is built and how far it is. ``expected`` is in seconds."""

    key: str
    expected: float
    host: str = ""
    state: str = WAITING
    count: tuple[int, int] | None = None
    began: float | None = None
    ended: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is neither built nor given up."""
        return self.state not in {"built", "failed"}

    def left(self, now: float) -> float:
        """Estimate its seconds left, by what was recorded or by ninja's counter."""
        if self.began is None:
            return self.expected
        passed = now - self.began
        if self.count is not None and self.count[0]:
            return passed * (self.count[1] - self.count[0]) / self.count[0]
        return max(self.expected - passed, 0.0)


@dataclass
class Fleet:
    """The live table of a run. A context manager: the terminal is restored on every exit."""

    report: BuildReport
    expected: Mapping[str, float]
    clock: Callable[[], float] = time.monotonic
    rows: dict[str, Row] = field(default_factory=dict)
    hosts: int = 1
    _due: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {
            key: Row(key, self.expected[key]) for key in schedule.longest_first(self.expected)
        }
        console = self.report.console
        self._began = self.clock()
        self._live = Live(
            console=console,
            get_renderable=lambda: self.table(console.width),
            refresh_per_second=2,
            transient=False,
        )

    def __enter__(self) -> Self:
        """Start the table, if there is a terminal."""
        if self.report.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last table standing."""
        if self.report.console.is_terminal:
            self._live.stop()

    def say(self, line: str) -> None:
        """Show one line that stays, above the table."""
        self.report.say(line)

    def begin(self, key: str, host: str) -> None:
        """A set has been handed to a host."""
        row = self.rows[key]
        row.host, row.state, row.count, row.began = host, "starting", None, self.clock()
        self._plain(f"{key}: to {host}")

    def wait(self, key: str, why: str) -> None:
        """A set waits for a host again."""
        row = self.rows[key]
        row.host, row.state, row.count, row.began = "", WAITING, None, None
        self.say(f"{key}: {why}")

    def end(self, key: str, state: str) -> None:
        """A set is ``built`` or has ``failed``."""
        row = self.rows[key]
        row.state, row.ended = state, self.clock()
        took = row.ended - (row.began if row.began is not None else row.ended)
        self._plain(f"{key}: {state} on {row.host} in {_span(took)}")

    def step(self, key: str, name: str) -> None:
        """A set's step has begun."""
        row = self.rows[key]
        row.state, row.count = name, None
        self._due[key] = self.clock() + PLAIN_SECONDS
        self._plain(f"{key} {name} on {row.host} …")

    def counted(self, key: str, done: int, total: int) -> None:
        """Ninja's counter of a set."""
        row = self.rows[key]
        row.count = (done, total)
        now = self.clock()
        if now >= self._due.get(key, now):
            self._due[key] = now + PLAIN_SECONDS
            self._plain(f"{key} {row.state} [{done}/{total}] on {row.host}")

    def left(self) -> float:
        """Estimate the seconds until the last set is done."""
        now = self.clock()
        running = [row.left(now) for row in self.rows.values() if row.is_open and row.host]
        idle = [0.0] * max(self.hosts - len(running), 0)
        waiting = [row.expected for row in self.rows.values() if row.state == WAITING]
        return schedule.finish(waiting, [*running, *idle] or [0.0])

    def table(self, width: int) -> Table:
        """Return the table for a terminal of this width; every set has one line."""
        wide = width >= _NARROW
        table = Table(box=None, title_justify="left", title=self._title(), title_style="")
        for name in ("set", "host", "step", "ninja", "passed", *(("left",) if wide else ())):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        now = self.clock()
        for row in self.rows.values():
            cells = [
                row.key,
                row.host,
                row.state,
                f"{row.count[0]}/{row.count[1]}" if row.count else "",
                _span((row.ended or now) - row.began) if row.began is not None else "",
            ]
            left = _span(row.left(now)) if row.is_open and row.began is not None else ""
            table.add_row(*cells, *((left,) if wide else ()), style=_STYLES.get(row.state, ""))
        return table

    def _title(self) -> str:
        done = sum(not row.is_open for row in self.rows.values())
        said = f"{done} of {len(self.rows)} sets, {self.hosts} hosts, {_span(self._passed)} passed"
        return f"{said}, about {_span(self.left())} left" if done < len(self.rows) else said

    @property
    def _passed(self) -> float:
        return self.clock() - self._began

    def _plain(self, line: str) -> None:
        if not self.report.console.is_terminal:
            self.say(line)


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), _MINUTE)
    hours, minutes = divmod(minutes, _MINUTE)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
