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
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

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
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Emulator:  # noqa: PYI034 - Self is of Python 3.11
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for slot in self._slots:
            _cancel(slot)

    @property
    def url(self) -> str:
        """The value of SPACES_ZERO_DEVICE_API_URL."""
        return f"http://127.0.0.1:{self._server.server_port}"

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


class _Handler(http.server.BaseHTTPRequestHandler):
    emulator: Emulator
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a worker that was killed, a visitor who left
            super().handle()

    def do_GET(self) -> None:
        path, _ = self._recorded()
        if path == "/queue-size":
            self._json(200, 0.0)
        elif path == "/_requests":
            self._json(200, [asdict(one) for one in self.emulator.requests])
        else:
            self._json(404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, query = self._recorded()
        if path == "/startup-report":
            self._json(200, {})
        elif path == "/schedule":
            self._schedule(query)
        elif path == "/allow":
            self._json(self.emulator.allow(query), {})
        elif path == "/release":
            self._json(self.emulator.release(query), {})
        elif path == "/_script":
            wanted = [_NAMES[one.pop("answer")](**one) for one in json.loads(body)]
            self.emulator.script(*wanted)
            self._json(200, {})
        else:
            self._json(404, {})

    def _recorded(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        if not url.path.startswith("/_"):
            self.emulator.record(Request(url.path, query, dict(self.headers), time.time()))
        return url.path, query

    def _schedule(self, query: Mapping[str, str]) -> None:
        answer = self.emulator.next_answer(query)
        if isinstance(answer, Refused):
            self._json(answer.status, {"detail": "as scripted"})
        elif isinstance(answer, Quota):
            headers = {"X-Approve-Result": answer.result, "X-Authenticated": "regular"}
            self._json(429, {"left": answer.left, "wait": answer.wait}, **headers)
        elif isinstance(answer, Garbage):
            self._send(200, b"<html>", "text/html")
        else:
            granted = None if isinstance(answer, Queued) else self.emulator.take(query, answer)
            if granted is not None:
                self._json(200, granted)
            else:
                self._queue(query, answer)

    def _queue(self, query: Mapping[str, str], answer: Answer) -> None:
        """Let a caller wait, with an event now and then, each in a chunk of its own."""
        wished = answer if isinstance(answer, Queued) else Queued(pings=1)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("X-Queuing-Reason", wished.reason)
        self.end_headers()
        try:
            self._events(query, wished)
        except ConnectionError:  # the caller went away
            self.close_connection = True

    def _events(self, query: Mapping[str, str], wished: Queued) -> None:
        pings = 0
        while True:
            self._chunk("event: ping\n\n")
            # the package takes what arrives together for one event: leave a gap before the next
            time.sleep(PING_EVERY)
            pings += 1
            if wished.cut:
                self.close_connection = True
                return
            if pings < wished.pings:
                continue
            if wished.fails:
                self._chunk("event: failed\n\n")
                break
            granted = self.emulator.take(query, wished)
            if granted is not None:
                self._chunk(f"event: succeeded\ndata: {json.dumps(granted)}\n\n")
                break
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, status: int, document: object, **headers: str) -> None:
        self._send(status, json.dumps(document).encode(), "application/json", headers)

    def _send(
        self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _handler(emulator: Emulator) -> Callable[..., http.server.BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"emulator": emulator})


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
