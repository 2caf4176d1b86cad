"""ZeroGPU's device API, imitated on loopback: enough for the real ``spaces`` package.

The package asks it for a GPU, forks a worker, reports the worker's process and gives the GPU back.
Like the real one it decides whether an idle worker may be used again, lets callers queue, refuses
for reasons of quota, and ends the processes of calls that take too long. Every request is kept.

From a test: ``with Emulator() as emulator: emulator.script(Quota())``. From another process, such
as a browser test's: ``POST /_script`` with ``[{"answer": "quota", "left": 10}]``, ``GET
/_requests``. As a program, for people without ZeroGPU:

    python -m tests.rigs.zerogpu [--slots N] [--patience 1] -- python spaces/app.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from typing import Any

from tests.rigs import http_served

PING_EVERY = 0.2
"""Seconds between two events of a queue; the real one takes some more."""


@dataclass(frozen=True)
class Grant:
    """A GPU at once, where one is free; ``fresh``: with a new worker, whatever there is."""

    fresh: bool = False


@dataclass(frozen=True)
class Queued:
    """A GPU after ``pings`` events. ``fails``: none in the end; ``cut``: the connection breaks."""

    pings: int = 3
    fails: bool = False
    cut: bool = False
    reason: str = "node"


@dataclass(frozen=True)
class Quota:
    """429: ``left`` seconds of quota, more in ``wait`` seconds; below 0 the duration is illegal."""

    left: int = 10
    wait: int = 3600
    result: str = "quota-exceeded"


ILLEGAL_DURATION = Quota(left=0, wait=-1, result="illegal-duration")


@dataclass(frozen=True)
class Refused:
    """Any other status: 503 no GPU, 401 expired token, 500 trouble."""

    status: int = 503


@dataclass(frozen=True)
class NoSuchToken:
    """A grant whose token is not known any more when the GPU is given back: 404."""


@dataclass(frozen=True)
class Garbage:
    """A grant that is not JSON."""


Answer = Grant | Queued | Quota | Refused | NoSuchToken | Garbage
_NAMES: dict[str, type[Any]] = {
    "grant": Grant,
    "queued": Queued,
    "quota": Quota,
    "refused": Refused,
    "no-such-token": NoSuchToken,
    "garbage": Garbage,
}


@dataclass(frozen=True)
class Request:
    """One request: ``path``, its query parameters and headers, when it came."""

    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    when: float


@dataclass
class Slot:
    """One GPU: the call that has it, and the worker that was let in."""

    index: int
    nvidia_uuid: str
    token: str | None = None
    task: str | None = None
    pid: int | None = None
    since: float = 0.0
    watch: threading.Timer | None = None


class Emulator:
    """The API's state, and its server in a thread of this process.

    Args:
        slots: GPUs that this Space may have at a time.
        patience: end the worker of a call that takes longer than so many times what it asked for;
            None for never.
        port: 0 for a free one.
        quota: GPU seconds that the visitor has left; None for no end of them.
        uuids: of this machine's GPUs, where it has some: what a worker gets to see.
    """

    def __init__(
        self,
        *,
        slots: int = 1,
        patience: float | None = None,
        port: int = 0,
        quota: float | None = None,
        uuids: Sequence[str] = (),
    ) -> None:
        self.requests: list[Request] = []
        self._script: deque[Answer] = deque()
        imagined = (f"GPU-{uuid.uuid4()}" for _ in range(slots))
        names = islice(chain(uuids, imagined), slots)
        self._slots = [Slot(index, name) for index, name in enumerate(names)]
        self.patience = patience
        self.quota = quota
        self._forgotten: set[str] = set()
        self._changed = threading.Condition()
        self._port, self._ends = port, contextlib.ExitStack()
        self.url = ""
        """The value of SPACES_ZERO_DEVICE_API_URL."""

    def __enter__(self) -> Emulator:  # noqa: PYI034 - Self is of Python 3.11
        served = http_served.serving(self._answer, port=self._port)
        self.url = self._ends.enter_context(served)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()
        for slot in self._slots:
            _cancel(slot)

    @property
    def environment(self) -> dict[str, str]:
        """What the real package needs to believe in it."""
        return {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": self.url}

    def script(self, *answers: Answer) -> None:
        """Set what the next calls of ``/schedule`` get; after that each is granted."""
        with self._changed:
            self._script.extend(answers)

    def seen(self, path: str) -> list[Request]:
        """The requests for a path, in order."""
        with self._changed:
            return [one for one in self.requests if one.path == path]

    def workers(self) -> list[int]:
        """The processes that were let in, each once, in order."""
        return list(dict.fromkeys(int(one.query["pid"]) for one in self.seen("/allow")))

    def await_free(self, timeout: float = 10.0) -> bool:
        """Wait until every GPU was given back."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(slot.token is None for slot in self._slots), timeout
            )

    def record(self, request: Request) -> None:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()

    def next_answer(self, query: Mapping[str, str]) -> Answer:
        with self._changed:
            if self.quota is not None and float(query["durationSeconds"]) > self.quota:
                return Quota(left=int(self.quota))
            return self._script.popleft() if self._script else Grant()

    def take(self, query: Mapping[str, str], answer: Answer) -> dict[str, Any] | None:
        """Give a free GPU away; None where all are taken."""
        with self._changed:
            task = query.get("taskId")
            free = [slot for slot in self._slots if slot.token is None]
            if not free:
                return None
            slot = min(free, key=lambda one: (one.task != task, one.index))
            idle = slot.task == task and slot.pid is not None and _lives(slot.pid)
            if isinstance(answer, Grant) and answer.fresh:
                idle = False
            if not idle and slot.pid is not None:
                _end(slot.pid, signal.SIGTERM)
                slot.pid = None
            slot.token, slot.task, slot.since = uuid.uuid4().hex, task, time.monotonic()
            if isinstance(answer, NoSuchToken):
                self._forgotten.add(slot.token)
            self._watch(slot, float(query.get("durationSeconds", "60")))
            return {
                "idle": idle,
                "nvidiaIndex": slot.index,
                "nvidiaUUID": slot.nvidia_uuid,
                "allowToken": slot.token,
            }

    def allow(self, query: Mapping[str, str]) -> int:
        with self._changed:
            slot = self._holder(query["allowToken"])
            if slot is None:
                return 404
            slot.pid = int(query["pid"])
            return 200

    def release(self, query: Mapping[str, str]) -> int:
        """Take a GPU back; a call that failed costs its worker the place."""
        with self._changed:
            slot = self._holder(query["allowToken"])
            if slot is None:
                return 404
            _cancel(slot)
            if query.get("fail") == "true" and slot.pid is not None:
                _end(slot.pid, signal.SIGTERM)
                slot.pid = None
            slot.token = None
            if self.quota is not None:
                self.quota -= time.monotonic() - slot.since
            self._changed.notify_all()
            return 404 if query["allowToken"] in self._forgotten else 200

    def _answer(self, asked: http_served.Request) -> http_served.Answer:
        if asked.path == "/_requests":
            return http_served.Answer(200, [asdict(one) for one in self.requests])
        if asked.path == "/_script":
            self.script(*(_NAMES[one.pop("answer")](**one) for one in asked.json()))
            return http_served.Answer(200, {})
        query = asked.query
        self.record(Request(asked.path, query, dict(asked.headers), time.time()))
        if asked.path == "/schedule":
            return self._schedule(query)
        if asked.path == "/queue-size":
            return http_served.Answer(200, 0.0)
        told: dict[str, Callable[[], int]] = {
            "/startup-report": lambda: 200,
            "/allow": lambda: self.allow(query),
            "/release": lambda: self.release(query),
        }
        return http_served.Answer(told.get(asked.path, lambda: 404)(), {})

    def _schedule(self, query: Mapping[str, str]) -> http_served.Answer:
        answer = self.next_answer(query)
        if isinstance(answer, Refused):
            return http_served.Answer(answer.status, {"detail": "as scripted"})
        if isinstance(answer, Quota):
            headers = {"X-Approve-Result": answer.result, "X-Authenticated": "regular"}
            return http_served.Answer(429, {"left": answer.left, "wait": answer.wait}, {**headers})
        if isinstance(answer, Garbage):
            return http_served.Answer(200, b"<html>", {"Content-Type": "text/html"})
        granted = None if isinstance(answer, Queued) else self.take(query, answer)
        if granted is not None:
            return http_served.Answer(200, granted)
        wished = answer if isinstance(answer, Queued) else Queued(pings=1)
        headers = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}
        queued = self._events(query, wished)
        return http_served.Answer(200, queued, {**headers, "X-Queuing-Reason": wished.reason})

    def _events(self, query: Mapping[str, str], wished: Queued) -> Iterator[bytes]:
        """Let a caller wait, with an event now and then, each in a chunk of its own."""
        for pings in count(1):
            yield _chunk("event: ping\n\n")
            # the package takes what arrives together for one event: leave a gap before the next
            time.sleep(PING_EVERY)
            if wished.cut:
                return
            if pings < wished.pings:
                continue
            granted = None if wished.fails else self.take(query, wished)
            if granted is not None:
                yield _chunk(f"event: succeeded\ndata: {json.dumps(granted)}\n\n")
            elif wished.fails:
                yield _chunk("event: failed\n\n")
            else:
                continue
            yield b"0\r\n\r\n"
            return

    def _holder(self, token: str) -> Slot | None:
        return next((slot for slot in self._slots if slot.token == token), None)

    def _watch(self, slot: Slot, seconds: float) -> None:
        if self.patience is None:
            return
        slot.watch = threading.Timer(seconds * self.patience, self._too_long, (slot, slot.token))
        slot.watch.daemon = True
        slot.watch.start()

    def _too_long(self, slot: Slot, token: str | None) -> None:
        with self._changed:
            if slot.token == token and slot.pid is not None:
                _end(slot.pid, signal.SIGKILL)
                slot.pid = None


def _cancel(slot: Slot) -> None:
    if slot.watch is not None:
        slot.watch.cancel()
        slot.watch = None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _end(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _chunk(text: str) -> bytes:
    data = text.encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def main() -> int:
    """Run a program under the emulator; its exit status is ours."""
    parser = argparse.ArgumentParser(prog="python -m tests.rigs.zerogpu")
    parser.add_argument("--slots", type=int, default=1, help="GPUs at a time (1)")
    parser.add_argument("--patience", type=float, help="end calls after so many times their wish")
    parser.add_argument("--port", type=int, default=0, help="of the device API (a free one)")
    parser.add_argument("program", nargs="+", metavar="PROGRAM", help="after --")
    options = parser.parse_args()
    with Emulator(slots=options.slots, patience=options.patience, port=options.port) as emulator:
        sys.stderr.write(f"device API {emulator.url}\n")
        process = subprocess.Popen(options.program, env={**os.environ, **emulator.environment})
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # a terminal has sent it to the program too
                continue


if __name__ == "__main__":
    sys.exit(main())
