"""A real HTTP server on loopback that misbehaves on demand, and counts what it was asked for.

with FaultServer() as server:
    url = server.put("/file", data)
    server.fail("/file", cut(after=1000), status(503))   # the first two requests; then it heals
    server.fail("/file", drip(64, every=0.1), always=True)
"""

from __future__ import annotations

import contextlib
import gzip
import io
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = Callable[["Answer"], None]

ENOUGH = 64 << 20
"""Bytes of an endless body, should nobody hang up."""


@dataclass
class Request:
    """What was asked, the bytes of body that left for it, and whether that is all of them."""

    path: str
    headers: dict[str, str]
    sent: int = 0
    answered: threading.Event = field(default_factory=threading.Event)


@dataclass
class File:
    """What lies behind a path, and the faults of the requests to come."""

    data: bytes
    etag: str | None = None
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None


class FaultServer:
    """Serves files with Range and If-Range."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.requests: list[Request] = []
        self._files: dict[str, File] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.port = self._server.server_address[1]
        self.url = f"{scheme}://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultServer:  # noqa: PYI034 - Self is of Python 3.11
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, path: str, data: bytes, *, etag: str | None = None) -> str:
        """Serve ``data``; returns the URL."""
        self._files[path] = File(data, etag)
        return self.url + path

    def fail(self, path: str, *faults: Fault, always: bool = False) -> None:
        """Have the next requests for a path fail, one fault each; or all of them."""
        file = self._files.setdefault(path, File(b""))
        if always:
            (file.always,) = faults
        else:
            file.faults.extend(faults)

    def file(self, path: str) -> File | None:
        return self._files.get(path)

    def sent(self, path: str) -> int:
        """Bytes of body that left for a path, when every answer has come to its end.

        Who reads the last byte is ahead of the thread that counts it.
        """
        asked = self.asked(path)
        assert all(request.answered.wait(30) for request in asked), f"{path}: still being answered"
        return sum(request.sent for request in asked)

    def asked(self, path: str) -> list[Request]:
        """The requests for a path."""
        return [request for request in self.requests if request.path == path]


class Answer:
    """What a fault works with: the request, the file, and the connection."""

    def __init__(self, handler: BaseHTTPRequestHandler, file: File, request: Request) -> None:
        self.handler = handler
        self.file = file
        self.request = request
        self.data = file.data
        self.total = len(file.data)
        self.start = 0
        self.end = self.total
        self.etag = file.etag

    def heed_range(self) -> None:
        """Do what Range and If-Range ask for."""
        wanted = self.request.headers.get("range", "")
        condition = self.request.headers.get("if-range")
        if wanted.startswith("bytes=") and condition in (None, self.etag):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            self.start = int(first)
            self.end = min(int(last) + 1, self.total) if last else self.total

    def head(self, status: int = 0, length: int | None = -1, **headers: str) -> None:
        """Send the status line and the headers; a length of -1 is the right one."""
        partial = self.start > 0 or self.end < self.total
        self.handler.send_response(status or (206 if partial else 200))
        if length is not None:
            right = self.end - self.start
            self.handler.send_header("Content-Length", str(right if length < 0 else length))
        if self.etag:
            self.handler.send_header("ETag", self.etag)
        if partial and "Content_Range" not in headers:
            last = f"{self.start}-{self.end - 1}/{self.total}"
            self.handler.send_header("Content-Range", f"bytes {last}")
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Connection", "close")
        self.handler.end_headers()

    def send(self, data: bytes) -> None:
        """Send a piece of the body."""
        for at in range(0, len(data), 16384):
            self.handler.wfile.write(data[at : at + 16384])
            self.request.sent += len(data[at : at + 16384])

    def rest(self) -> bytes:
        return self.data[self.start : self.end]


def healthy(answer: Answer) -> None:
    """Send what was asked for."""
    answer.heed_range()
    if answer.start >= answer.total > 0:
        answer.start = 0
        answer.head(416, 0)
        return
    answer.head()
    answer.send(answer.rest())


def cut(after: int) -> Fault:
    """Close the connection when the file's first ``after`` bytes are sent."""

    def fault(answer: Answer) -> None:
        answer.heed_range()
        answer.head()
        answer.send(answer.data[answer.start : after])

    return fault


def status(code: int, **headers: str) -> Fault:
    """Answer with another status."""
    return lambda answer: answer.head(code, 0, **headers)


def ignores_range(answer: Answer) -> None:
    """Send all of it, whatever is asked for."""
    answer.head()
    answer.send(answer.data)


def content_range(value: str, shift: int = 0) -> Fault:
    """Answer 206 with this Content-Range, and bytes from elsewhere."""

    def fault(answer: Answer) -> None:
        answer.heed_range()
        answer.start = max(answer.start + shift, 0)
        answer.head(206, Content_Range=value)
        answer.send(answer.rest())

    return fault


def body(data: bytes, code: int = 200, *, chunked: bool = False, **headers: str) -> Fault:
    """Send other bytes, as if they were all there is."""

    def fault(answer: Answer) -> None:
        if chunked:
            answer.head(code, None, Transfer_Encoding="chunked", **headers)
            answer.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
        else:
            answer.head(code, len(data), **headers)
            answer.send(data)

    return fault


def endless(answer: Answer) -> None:
    """Send the file, and then go on."""
    answer.heed_range()
    answer.head(length=None)
    answer.send(answer.rest())
    while answer.request.sent < ENOUGH:
        answer.send(bytes(1 << 16))


def flipped(at: int) -> Fault:
    """Send the file with one bit turned."""

    def fault(answer: Answer) -> None:
        changed = bytearray(answer.data)
        changed[at] ^= 1
        answer.data = bytes(changed)
        healthy(answer)

    return fault


def drip(count: int, every: float) -> Fault:
    """Send ``count`` bytes every so many seconds."""

    def fault(answer: Answer) -> None:
        answer.heed_range()
        answer.head()
        rest = answer.rest()
        for at in range(0, len(rest), count):
            answer.send(rest[at : at + count])
            time.sleep(every)

    return fault


def drips_head(count: int, every: float, code: int = 200, **headers: str) -> Fault:
    """Send status line and headers ``count`` bytes at a time, then the body at once."""

    def fault(answer: Answer) -> None:
        handler = answer.handler
        kept, handler.wfile = handler.wfile, io.BytesIO()
        answer.heed_range()
        answer.head(code, -1, **headers)
        head, handler.wfile = handler.wfile.getvalue(), kept
        for at in range(0, len(head), count):
            handler.wfile.write(head[at : at + count])
            time.sleep(every)
        answer.send(answer.rest())

    return fault


def repeats(piece: bytes, every: float = 0.0, *, behind: bytes = b"") -> Fault:
    """Send ``behind`` as it is, and then a piece of a head, chunk or trailer again and again."""

    def fault(answer: Answer) -> None:
        answer.handler.wfile.write(behind)
        while answer.request.sent < ENOUGH:
            answer.handler.wfile.write(piece)
            answer.request.sent += len(piece)
            time.sleep(every)

    return fault


def shaped(rate: float, *, ranges: bool = True) -> Fault:
    """Send so many bytes a second; all of them if Range is ignored."""

    def fault(answer: Answer) -> None:
        if ranges:
            answer.heed_range()
        answer.head()
        began, sent = time.monotonic(), 0
        for at in range(answer.start, answer.end, 16384):
            piece = answer.data[at : min(at + 16384, answer.end)]
            answer.send(piece)
            sent += len(piece)
            time.sleep(max(0.0, began + sent / rate - time.monotonic()))

    return fault


def stalls(after: int) -> Fault:
    """Send the file's first ``after`` bytes, and then nothing until the other end hangs up."""

    def fault(answer: Answer) -> None:
        answer.heed_range()
        answer.head()
        answer.send(answer.data[answer.start : after])
        answer.handler.connection.settimeout(30)
        answer.handler.connection.recv(1)

    return fault


def silent(seconds: float) -> Fault:
    """Accept, and say nothing."""
    return lambda answer: time.sleep(seconds)  # noqa: ARG005 - a fault takes its answer


def redirect(location: str, code: int = 302) -> Fault:
    """Send elsewhere."""
    return status(code, Location=location)


def encoded(answer: Answer) -> None:
    """Compress it on the way, although it was asked for as it is."""
    data = gzip.compress(answer.data)
    answer.head(200, len(data), Content_Encoding="gzip")
    answer.send(data)


def _handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.path.partition("?")[0], headers)
            server.requests.append(request)
            self.close_connection = True
            file = server.file(request.path)
            if file is None:
                file = File(b"", always=status(404))
            fault = file.faults.pop(0) if file.faults else file.always or healthy
            try:
                with contextlib.suppress(ConnectionError, TimeoutError, ssl.SSLError):
                    fault(Answer(self, file, request))
            finally:
                request.answered.set()

        do_CONNECT = do_HEAD = do_GET  # noqa: N815 - http.server's names

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    return Handler


def make_certificate(folder: Path, *names: str) -> Path:
    """Make a key and a certificate that signs itself, in one PEM file (by ``openssl``)."""
    place = folder / "certificate.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-subj", f"/CN={names[0]}", "-addext", f"subjectAltName={','.join(names[1:])}",
            "-keyout", folder / "key.pem", "-out", place,
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    place.write_text(place.read_text() + (folder / "key.pem").read_text())
    return place
