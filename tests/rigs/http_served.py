"""An HTTP server of a test on loopback: one function answers every request."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Request:
    """Method, path without its query, the query's first values, headers and body."""

    method: str
    path: str
    query: dict[str, str]
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """Status, headers (None for one that is not sent), and bytes or what becomes JSON, or None.

    An iterator's pieces are sent as they come; it is closed when the client goes away.
    """

    status: int
    body: Any = None
    headers: dict[str, str | None] = field(default_factory=dict)

    def content(self) -> bytes:
        if self.body is None:
            return b""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class _Handler(BaseHTTPRequestHandler):
    answer: Callable[[Request], Answer | None]

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that was killed, or left
            super().handle()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        told = self.answer(
            Request(self.command, unquote(parts.path), query, self.headers, self._body())
        )
        if told is None:
            self.close_connection = True
            return
        if isinstance(told.body, Iterator):
            self._stream(told)
            return
        content = told.content()
        self.send_response(told.status)
        kind = "x/y" if isinstance(told.body, bytes) else "application/json"
        length = str(len(content))
        headers = {"Content-Type": kind, "Content-Length": length, **told.headers}
        self._send_headers(headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _stream(self, told: Answer) -> None:
        self.send_response(told.status)
        self._send_headers(told.headers)
        with closing(told.body), suppress(OSError):
            for piece in told.body:
                self.wfile.write(piece)
                self.wfile.flush()

    def _send_headers(self, headers: dict[str, str | None]) -> None:
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815 - its names

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(answer: Callable[[Request], Answer | None], host: str = "127.0.0.1") -> Iterator[str]:
    """Serve until the context is left; None closes a connection without an answer."""

    handler = type("Handler", (_Handler,), {"answer": staticmethod(answer)})
    server = ThreadingHTTPServer((host, 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def sending(first: bytes, piece: bytes = b"") -> Iterator[tuple[int, list[bytes]]]:
    """Send any bytes to each client, then a piece every 20 ms for as long as it stays.

    Gives the port, and a list that fills with what the clients sent first.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    seen: list[bytes] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(ConnectionError):
                    seen.append(connection.recv(65536))
                    connection.sendall(first)
                    while piece:
                        connection.sendall(piece)
                        time.sleep(0.02)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
