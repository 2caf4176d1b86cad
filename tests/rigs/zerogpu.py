"""ZeroGPU's device API, imitated on loopback: enough for the real ``spaces`` package.

The package asks it for a GPU, forks a worker, reports the worker's process and gives the GPU back.
Like the real one it decides whether an idle worker may be used again, lets callers queue, and
refuses for reasons of quota. Every request is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
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


@dataclass(frozen=True)
class Request:
    """One request: ``path``, its query parameters and headers, when it came."""

    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    when: float


@dataclass
class Slot:
    """The GPU: the call that has it, and the worker that was let in."""

    nvidia_uuid: str
    token: str | None = None
    task: str | None = None
    pid: int | None = None
    since: float = 0.0


class Emulator:
    """The API's state, and its server in a thread of this process."""

    def __init__(self, *, uuids: Sequence[str] = ()) -> None:
        self.requests: list[Request] = []
        self._script: deque[Answer] = deque()
        self._slot = Slot(next(iter(uuids), f"GPU-{uuid.uuid4()}"))
        self.quota: float | None = None  # GPU seconds that the visitor has left
        self._forgotten: set[str] = set()
        self._changed = threading.Condition()
        self._ends = contextlib.ExitStack()
        self.url = ""
        """The value of SPACES_ZERO_DEVICE_API_URL."""

    def __enter__(self) -> Emulator:  # noqa: PYI034 - Self is of Python 3.11
        self.url = self._ends.enter_context(http_served.serving(self._answer))
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    @property
    def environment(self) -> dict[str, str]:
        """The settings that the real package needs to accept it."""
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
        """Wait until the GPU was given back."""
        with self._changed:
            return self._changed.wait_for(lambda: self._slot.token is None, timeout)

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
        """Give the GPU away; None where it is taken."""
        with self._changed:
            task, slot = query.get("taskId"), self._slot
            if slot.token is not None:
                return None
            idle = slot.task == task and slot.pid is not None and _lives(slot.pid)
            if isinstance(answer, Grant) and answer.fresh:
                idle = False
            if not idle and slot.pid is not None:
                _end(slot.pid, signal.SIGTERM)
                slot.pid = None
            slot.token, slot.task, slot.since = uuid.uuid4().hex, task, time.monotonic()
            if isinstance(answer, NoSuchToken):
                self._forgotten.add(slot.token)
            return {
                "idle": idle,
                "nvidiaIndex": 0,
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
            if query.get("fail") == "true" and slot.pid is not None:
                _end(slot.pid, signal.SIGTERM)
                slot.pid = None
            slot.token = None
            if self.quota is not None:
                self.quota -= time.monotonic() - slot.since
            self._changed.notify_all()
            return 404 if query["allowToken"] in self._forgotten else 200

    def _answer(self, asked: http_served.Request) -> http_served.Answer:
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
        return self._slot if self._slot.token == token else None


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
