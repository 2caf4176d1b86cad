"""A package index on loopback that can be told to misbehave; counts what it is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class PackageIndex:
    """Serves ``/simple/<project>/`` as JSON (PEP 691) and the files of each project.

    Attributes:
        asked: every path, in order.
        instead: what to send for a file in place of its bytes.
        refusals: how many requests are answered with 503 before one is served.
    """

    def __init__(self) -> None:
        self.projects: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.instead: dict[str, bytes] = {}
        self.announced: dict[str, int] = {}
        self.refusals = 0
        self.url = ""

    def add(self, project: str, filename: str, content: bytes) -> dict[str, object]:
        """Publish a file; returns what its pin says of it."""
        self.projects.setdefault(project, {})[filename] = content
        return {
            "package": project,
            "filename": filename,
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    def page(self, project: str) -> bytes:
        """Return a project's page."""
        files = [
            {
                "filename": name,
                "url": f"/files/{name}",
                "size": len(content),
                "hashes": {"sha256": hashlib.sha256(content).hexdigest()},
            }
            for name, content in self.projects[project].items()
        ]
        meta = {"api-version": "1.1"}
        return json.dumps({"meta": meta, "name": project, "versions": [], "files": files}).encode()

    def file(self, name: str) -> bytes | None:
        """Return what is sent for a file, None where there is no such file."""
        for files in self.projects.values():
            if name in files:
                return self.instead.get(name, files[name])
        return None

    @contextmanager
    def serve(self) -> Iterator[PackageIndex]:
        """Answer until closed; ``url`` is then the index's address."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}/simple/"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append(self.path)
                if index.refusals:
                    index.refusals -= 1
                    self.send_error(503)
                    return
                kind, name = self.path.strip("/").split("/")
                if kind == "simple" and name in index.projects:
                    self._send(index.page(name), "application/vnd.pypi.simple.v1+json")
                elif kind == "files" and index.file(name) is not None:
                    self._send(index.file(name) or b"", "application/octet-stream", name)
                else:
                    self.send_error(404)

            def _send(self, content: bytes, kind: str, name: str = "") -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(index.announced.get(name, len(content))))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        return Handler
