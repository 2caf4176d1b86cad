"""A small HTTP storage as ccache wants it: GET, HEAD, PUT and DELETE of whole objects, in memory.

With ``token`` it refuses whoever does not bring it; with ``refuse`` it answers 503 to everything.
"""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


class ObjectStorage:
    """Listens on loopback. ``asked`` has every request, as ``(method, path, status)``."""

    def __init__(self, token: str | None = None) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, int]] = []
        self.token = token
        self.refuse = False
        self.write_only = False
        storage = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                storage.answer(self)

            do_HEAD = do_PUT = do_DELETE = do_GET  # noqa: N815 - http.server's names

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, folder: str = "objects", **attributes: str) -> str:
        """Return the address in ccache's words: ``http://…/|name=value``."""
        extra = "".join(f"|{name}={value}" for name, value in attributes.items())
        return f"http://127.0.0.1:{self.port}/{folder}/{extra}"

    def count(self, method: str, status: int) -> int:
        """Return how many requests of a kind got this answer."""
        return sum((how, what) == (method, status) for how, _, what in self.asked)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        sent = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        status, body = self._decide(request, sent)
        self.asked.append((request.command, request.path, status))
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def _decide(self, request: BaseHTTPRequestHandler, sent: bytes) -> tuple[int, bytes]:
        if self.refuse:
            return 503, b"not now\n"
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return 401, b"who are you?\n"
        if request.command == "PUT":
            self.objects[request.path] = sent
            return 201, b""
        if request.path not in self.objects or (self.write_only and request.command == "GET"):
            return 404, b""
        if request.command == "DELETE":
            del self.objects[request.path]
            return 204, b""
        return 200, self.objects[request.path]
