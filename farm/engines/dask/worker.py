"""What runs on a host of the cluster: one build, which tells the client how far it is."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from distributed import get_worker
from distributed.core import Status
from distributed.versions import get_versions, required_packages

from farm.cluster import remote_build

if TYPE_CHECKING:
    from collections.abc import Callable

    from farm.cluster.remote_build import Failure, Job, Outcome
    from farm.plan import BuildPlan, Step
    from farm.request import BuildRequest

TOPIC: Final = "llama-farm"
_COUNT_SECONDS: Final = 1.0


class AbandonedError(BaseException):
    """Nobody waits for this build any more: ends it like Ctrl-C."""


class _Telling:
    """A reporter on a worker: tells the client, and ends a build that nobody waits for."""

    def __init__(self, key: str) -> None:
        self._worker = get_worker()
        self._task = self._worker.get_current_task()
        self._key = key
        self._due = 0.0

    def step(self, plan: BuildPlan, step: Step) -> None:
        """Tell that a step has begun."""
        del plan
        self._tell(what="step", name=step.name)

    def count(self, done: int, total: int) -> None:
        """Tell ninja's counter, once a second."""
        now = time.monotonic()
        if now >= self._due or done == total:
            self._due = now + _COUNT_SECONDS
            self._tell(what="count", done=done, total=total)

    def note(self, line: str) -> None:
        """Tell a coded line of a host."""
        self._tell(what="note", line=line)

    def check(self) -> None:
        """Ask whether somebody waits for this build.

        Raises:
            AbandonedError: the client gave it up or is gone, or this worker is being ended.
        """
        task = self._worker.state.tasks.get(self._task)
        if task is None or task.state == "cancelled" or self._worker.status is not Status.running:
            raise AbandonedError

    def _tell(self, **what: object) -> None:
        self.check()
        where = place(self._worker.address)
        self._worker.log_event(TOPIC, {"key": self._key, "where": where, **what})


def work(job: Job) -> Outcome:
    """Build a set here."""
    telling = _Telling(job.plan.key)
    return remote_build.build(job, telling, telling.check)


@dataclass(frozen=True)
class Introduction:
    """What a host says of itself: what it compiles with, or why it cannot, and Dask's packages."""

    compilers: str | Failure
    packages: dict[str, str | None]


def introduce(request: BuildRequest, plan: BuildPlan, farm: str) -> Introduction:
    """Answer the first question to this host."""
    return Introduction(remote_build.compilers(request, plan, farm), packages())


def packages() -> dict[str, str | None]:
    """Return the version of each package that Dask's protocol depends on, in this process."""
    told = get_versions()["packages"]
    return {name: told.get(name) for name in required_packages}


async def aside(function: Callable[..., Any], *args: object) -> Any:
    """Run a function in a thread, for what may take long: the worker's own loop goes on."""
    return await asyncio.to_thread(function, *args)


def place(worker: str) -> str:
    """Return a worker's address without its protocol."""
    return worker.rpartition("://")[2]
