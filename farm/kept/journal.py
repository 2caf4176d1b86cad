"""What has been finished of every set: small files in ``.farm/journal``, one for each plan's key.

Written so that a file is the old one or the new one at every moment, power cuts included. An entry
belongs to one plan's digest; of another plan's entry only the time that it took is used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from farm import durable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from farm.execute import Reporter
    from farm.plan import BuildPlan, Step

COUNT_SECONDS: Final = 5.0
"""Between two writings of ninja's counter."""


class Entry(msgspec.Struct, frozen=True):
    """What is known of one plan.

    Attributes:
        plan: the plan's digest (``plan_digest.digest``).
        steps: finished steps and their seconds.
        running: the step that had begun last, None when all were finished.
        count: ninja's counter in that step.
        tree: the kept tree's digest, None until there is one.
        tarballs: sha256 by file name.
        seconds: how long the whole build took, this plan's or an earlier one's of the same key.
    """

    plan: str
    steps: dict[str, float] = {}
    running: str | None = None
    count: tuple[int, int] | None = None
    tree: str | None = None
    tarballs: dict[str, str] = {}
    seconds: float | None = None
    schema_version: int = 1


@dataclass(frozen=True)
class Journal:
    """The entries of one checkout. ``folder`` is made when something is written."""

    folder: Path

    def read(self, key: str, plan: str) -> Entry:
        """Return what is known of a plan; an entry that cannot be read counts as none."""
        entry = self._stored(key)
        if entry is None:
            return Entry(plan)
        return entry if entry.plan == plan else Entry(plan, seconds=entry.seconds)

    def seconds(self, key: str) -> float | None:
        """Return how long the last build under this key took, None where none has finished."""
        entry = self._stored(key)
        return entry.seconds if entry else None

    def write(self, key: str, entry: Entry) -> None:
        """Replace an entry; it is on the disk when this returns.

        Raises:
            PackError: ``WRITE_FAILED``: the disk is full, or this user may not write.
        """
        content = msgspec.json.format(msgspec.json.encode(entry), indent=2)
        with durable.writing(self._file(key)):
            self.folder.mkdir(parents=True, exist_ok=True)
            durable.replace(self._file(key), content)

    def _stored(self, key: str) -> Entry | None:
        try:
            return msgspec.json.decode(self._file(key).read_bytes(), type=Entry)
        except (FileNotFoundError, UnicodeDecodeError, msgspec.DecodeError):
            return None

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"


class Recording:
    """A reporter that writes the journal and hands everything on.

    Of the entry it is given it takes over how long the plan took: a run begins with its first step
    again, so that nothing of it has finished, and what was running has ended somehow.
    """

    def __init__(
        self,
        reporter: Reporter,
        journal: Journal,
        entry: Entry,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reporter = reporter
        self._journal = journal
        self._clock = clock
        self._begun = clock()
        self._due = self._begun
        self.entry = Entry(entry.plan, seconds=entry.seconds)

    def step(self, plan: BuildPlan, step: Step) -> None:
        """Record that a step has begun, and so that the one before it is finished."""
        now = self._clock()
        done = dict(self.entry.steps)
        if self.entry.running is not None:
            done[self.entry.running] = round(now - self._begun, 3)
        self._begun, self._due, self._key = now, now + COUNT_SECONDS, plan.key
        self._write(steps=done, running=step.name, count=None)
        self._reporter.step(plan, step)

    def count(self, done: int, total: int) -> None:
        """Record ninja's counter, every five seconds."""
        now = self._clock()
        if now >= self._due:
            self._due = now + COUNT_SECONDS
            self._write(count=(done, total))
        self._reporter.count(done, total)

    def note(self, line: str) -> None:
        """Hand a line on."""
        self._reporter.note(line)

    def _write(self, **changes: object) -> None:
        self.entry = msgspec.structs.replace(self.entry, **changes)
        self._journal.write(self._key, self.entry)
