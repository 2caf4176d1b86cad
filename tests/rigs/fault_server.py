"""A loopback HTTP server that misbehaves as it is told, and remembers what it was asked.

Each path has a script: a list of faults, one for each request, the last one for all that follow.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


@dataclass(frozen=True)
class Fault:
    """What one answer does wrong; the default does nothing wrong.

    Attributes:
        status: answered instead of 200 or 206.
        headers: added, or replacing the server's own.
        cut: bytes of the body after which the connection is closed.
        ignore_range: answer 200 and the whole file.
        body: sent instead of the file's bytes.
        flip: position in the file of a byte whose lowest bit is wrong.
        drip: seconds before each 1,000 bytes.
        endless: go on sending after the end.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    ignore_range: bool = False
    body: bytes | None = None
    flip: int | None = None
    drip: float = 0.0
    endless: bool = False


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]

    @property
    def first_byte(self) -> int:
        """Where its range begins, 0 without one."""
        wanted = self.headers.get("Range", "bytes=0-")
        return int(wanted.removeprefix("bytes=").rstrip("-"))


class FaultServer:
    """Serves ``files`` from a thread; ``script`` says what goes wrong for which path."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.script: dict[str, list[Fault]] = {}
        self.asked: list[Asked] = []
        self.sent = 0
        server = self
        self._http = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": server})
        )
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def next_fault(self, path: str) -> Fault:
        """Take the fault for this request; the last one of a script stays."""
        script = self.script.get(path, [Fault()])
        return script.pop(0) if len(script) > 1 else script[0]


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the base
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer with the file and its fault."""
        asked = Asked(self.path, dict(self.headers.items()))
        self.owner.asked.append(asked)
        fault = self.owner.next_fault(self.path)
        content = self.owner.files.get(self.path)
        if content is None and fault.body is None and fault.status is None:
            self.send_error(404)
            return
        body, status, headers = self._answer(asked, fault, content or b"")
        self.send_response(fault.status or status)
        for name, value in {**headers, **fault.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._send(body, fault)

    def _answer(
        self, asked: Asked, fault: Fault, content: bytes
    ) -> tuple[bytes, int, dict[str, str]]:
        if fault.flip is not None:
            changed = bytearray(content)
            changed[fault.flip] ^= 1
            content = bytes(changed)
        if fault.body is not None:
            return fault.body, 200, {"Content-Length": str(len(fault.body))}
        start = asked.first_byte
        if "Range" not in asked.headers or fault.ignore_range:
            length = {} if fault.endless else {"Content-Length": str(len(content))}
            return content, 200, length
        part = content[start:]
        return (
            part,
            206,
            {
                "Content-Length": str(len(part)),
                "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
            },
        )

    def _send(self, body: bytes, fault: Fault) -> None:
        if fault.cut is not None:
            body = body[: fault.cut]
        step = 1000 if fault.drip else 1 << 16
        for at in range(0, len(body), step):
            if fault.drip:
                time.sleep(fault.drip)
            self.wfile.write(body[at : at + step])
            self.owner.sent += len(body[at : at + step])
        while fault.endless:
            self.wfile.write(b"\0" * 65536)
