"""Serve a release folder over HTTP on loopback, with ranges, to try a release and for tests.

It serves plain files below one folder to this machine only. It is no server for an open network.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import threading
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import BinaryIO, Final, Self
from urllib.parse import unquote

from farm import durable
from farm.errors import FarmError, UsageError

HOST: Final = "127.0.0.1"
_NAMES: Final = frozenset({HOST, "localhost"})
_RANGE: Final = re.compile(r"bytes=([0-9]{1,19})-([0-9]{0,19})", re.ASCII)
"""From a byte on: how the loader and curl resume. RFC 9110 lets a server ignore other ranges."""
_TYPES: Final = {".json": "application/json", ".txt": "text/plain; charset=utf-8"}
_FIRST: Final = "manifest.json"
_BLOCK: Final = 1 << 18
_IDLE_S: Final = 30.0
"""How long a connection may be silent, in seconds."""


class ReleaseServer:
    """Serves a folder from threads of its own while the context lasts; ``url`` ends in a slash.

    Raises:
        UsageError: ``FOLDER_MISSING``: it is no folder.
        FarmError: ``PORT_IN_USE``, ``PORT_REFUSED``.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        if not folder.is_dir():
            raise UsageError("FOLDER_MISSING", folder=folder)
        try:
            self._server = _Server((HOST, port), partial(_Handler, folder=folder.resolve()))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise FarmError("PORT_IN_USE", port=port) from error
            raise FarmError("PORT_REFUSED", port=port, strerror=error.strerror or error) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.port: int = self._server.server_address[1]
        self.url = f"http://{HOST}:{self.port}/"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait(self) -> None:
        """Return when another thread ends the server; a signal interrupts it."""
        self._thread.join()


def serve_forever(folder: Path, port: int) -> None:
    """Serve ``folder`` until SIGINT; ``port`` 0 takes a free one. Prints the manifest's URL.

    Raises:
        UsageError: ``FOLDER_MISSING``; ``RELEASE_MISSING``: it holds neither a release nor a place.
        FarmError: ``PORT_IN_USE``, ``PORT_REFUSED``.
    """
    with ReleaseServer(folder, port) as server:
        first = _FIRST if (folder / _FIRST).is_file() else ""
        homes = [one for one in (folder, folder / "channels") if one.is_dir()]
        below = (home / name / _FIRST for home in homes for name in durable.names(home))
        if not first and not any(one.is_file() for one in below):
            why = os.strerror(errno.ENOENT)
            raise UsageError(
                "RELEASE_MISSING", folder=folder, place=folder.absolute(), strerror=why
            )
        print(f"serving {folder} at {server.url}{first}", flush=True)
        with suppress(KeyboardInterrupt):
            server.wait()


class _Server(ThreadingTCPServer):
    """A server that binds without the DNS query for this machine's name that http.server makes."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing about a client that disconnected; show any other error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    protocol_version = "HTTP/1.1"
    server_version = "llama-server-farm"
    sys_version = ""
    timeout = _IDLE_S

    def __init__(self, *arguments: object, folder: Path) -> None:
        self._folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def parse_request(self) -> bool:
        """Parse at most 64 KiB of headers; http.server reads 6.5 MB, and makes 40 MB of them."""
        stream, head, most = self.rfile, bytearray(), 1 << 16
        while len(head) < most and (line := stream.readline(most)) not in (b"\r\n", b"\n", b""):
            head += line
        self.rfile = io.BytesIO(head)
        found = super().parse_request()
        self.rfile = stream
        if found and len(head) >= most:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        return found and len(head) < most

    def do_GET(self) -> None:
        """Send a file, or the requested range of it; for HEAD, the headers alone.

        A page whose name leads to this machine (DNS rebinding) names another host.
        """
        if self.headers.get("Host", HOST).partition(":")[0].lower() not in _NAMES:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        if self.path == "/" and (self._folder / _FIRST).is_file():
            self._head(HTTPStatus.FOUND, {"Location": f"/{_FIRST}", "Content-Length": "0"})
            return
        stream = _opened(self._folder, self.path)
        if stream is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        # The client may disconnect at any time; that is no error of the server.
        with stream, suppress(ConnectionError, TimeoutError):
            self._send(stream)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing: only the verb prints on the terminal."""

    def _send(self, stream: BinaryIO) -> None:
        status, place = os.fstat(stream.fileno()), durable.opened(stream.fileno()).readlink()
        # a strong validator, which differs for another file of the same name
        tag = f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'
        total = stream.seek(0, 2)
        wanted = self._range(tag)
        first, last = wanted or (0, total)
        size = min(last + 1, total) - first
        if wanted and size <= 0:
            refused = {"Content-Range": f"bytes */{total}", "Content-Length": "0"}
            self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, refused)
            return
        told = {
            "Content-Type": _TYPES.get(place.suffix, "application/octet-stream"),
            "Content-Length": str(size),
            "Accept-Ranges": "bytes",
            "ETag": tag,
        }
        if wanted:
            told["Content-Range"] = f"bytes {first}-{first + size - 1}/{total}"
        self._head(HTTPStatus.PARTIAL_CONTENT if wanted else HTTPStatus.OK, told)
        if self.command != "HEAD":
            stream.seek(first)
            while size > 0 and (block := stream.read(min(_BLOCK, size))):
                self.wfile.write(block)
                size -= len(block)
            # A file that became shorter meanwhile: the length was promised, so cut the connection.
            self.close_connection = self.close_connection or size > 0

    def _range(self, tag: str) -> tuple[int, int] | None:
        """Return the first and last byte of the range; None if the whole file is requested."""
        match = _RANGE.fullmatch(self.headers.get("Range", "").strip())
        condition = self.headers.get("If-Range")
        if match is None or (condition is not None and condition.strip() != tag):
            return None
        first, last = int(match[1]), int(match[2] or sys.maxsize)
        return (first, last) if first <= last else None

    def _head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _opened(folder: Path, target: str) -> BinaryIO | None:
    """Open the regular file below ``folder`` (resolved) that a request's target names, if any."""
    path_part = target.partition("#")[0].partition("?")[0]
    parts = [part for part in unquote(path_part).split("/") if part]
    if any(part in (".", "..") or "\0" in part or "\\" in part for part in parts):
        return None
    try:
        stream = durable.open_regular(folder.joinpath(*parts))
    except OSError:
        return None
    if durable.opened(stream.fileno()).readlink().is_relative_to(folder):  # no link led out
        return stream
    stream.close()
    return None
