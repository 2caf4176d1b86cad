"""A package index on loopback that can be told to misbehave; counts what it is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

from tests.rigs import http_served
from tests.rigs.http_served import Answer, Request


class PackageIndex:
    """Serves ``/simple/<project>/`` as JSON (PEP 691) and the files of each project."""

    def __init__(self) -> None:
        self.projects: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.instead: dict[str, bytes] = {}  # of a file's bytes
        self.announced: dict[str, int] = {}
        self.refusals = 0  # so many requests are answered with 503 first
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
        with http_served.serving(self._answer) as address:
            self.url = f"{address}/simple/"
            yield self

    def _answer(self, asked: Request) -> Answer:
        self.asked.append(asked.path)
        if self.refusals:
            self.refusals -= 1
            return Answer(503)
        kind, name = asked.path.strip("/").split("/")
        if kind == "simple" and name in self.projects:
            content_type = {"Content-Type": "application/vnd.pypi.simple.v1+json"}
            return Answer(200, self.page(name), content_type)
        content = self.file(name) if kind == "files" else None
        if content is None:
            return Answer(404)
        return Answer(200, content, {"Content-Length": str(self.announced.get(name, len(content)))})
