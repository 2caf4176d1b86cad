"""The part of GitHub's REST API that proposes a file, over real HTTP on loopback."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.rigs import http_served
from tests.rigs.http_served import Answer, Request

TOKEN = "t0ken"


@dataclass
class GitHub:
    """One repository, ``owner/name``; ``branches`` are the files of each.

    Attributes:
        refuse: method and path that are answered with 403, to stop half-way.
        calls: method and path of every request, in order.
    """

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    pulls: list[dict[str, str]] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    caches: list[dict[str, Any]] = field(default_factory=list)
    refuse: str = ""
    url: str = ""

    def answer(
        self, method: str, target: str, query: dict[str, str], body: dict[str, Any]
    ) -> tuple[int, Any]:
        path = target.removeprefix("/repos/owner/name")
        self.calls.append(f"{method} {path}")
        if self.refuse == f"{method} {path}":
            return 403, {"message": "Resource not accessible by integration"}
        if path.startswith("/actions/caches"):
            return self._caches(path, query)
        if path.startswith("/contents/"):
            return self._contents(method, path.removeprefix("/contents/"), query, body)
        calls = {
            "GET ": lambda: (200, {"default_branch": "main"}),
            "GET /git/ref/heads/main": lambda: (200, {"object": {"sha": "5" * 40}}),
            "GET /git/matching-refs": lambda: (200, self._refs(target.rpartition("/")[2])),
            "POST /git/refs": lambda: self._branch(body["ref"].removeprefix("refs/heads/")),
            "GET /pulls": lambda: (200, self._pulls_of(query["head"].partition(":")[2])),
            "POST /pulls": lambda: self._pull(body),
        }
        path = path if not path.startswith("/git/matching-refs/") else "/git/matching-refs"
        return calls.get(f"{method} {path}", lambda: (404, {"message": "Not Found"}))()

    def _caches(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        if number := path.removeprefix("/actions/caches").removeprefix("/"):
            self.caches = [one for one in self.caches if one["id"] != int(number)]
            return 204, None
        found = [one for one in self.caches if one["key"].startswith(query["key"])]
        size = int(query["per_page"])
        begin = (int(query["page"]) - 1) * size
        told = {"total_count": len(found), "actions_caches": found[begin : begin + size]}
        return 200, told

    def _refs(self, prefix: str) -> list[dict[str, str]]:
        return [{"ref": f"refs/heads/{name}"} for name in self.branches if name.startswith(prefix)]

    def _branch(self, name: str) -> tuple[int, Any]:
        if name in self.branches:
            return 422, {"message": "Reference already exists"}
        self.branches[name] = dict(self.branches["main"])
        return 201, {"ref": name}

    def _pulls_of(self, head: str) -> list[dict[str, str]]:
        return [one for one in self.pulls if one["head"] == head]

    def _pull(self, body: dict[str, str]) -> tuple[int, Any]:
        self.pulls.append({**body, "html_url": f"https://github.test/pull/{len(self.pulls) + 1}"})
        return 201, self.pulls[-1]

    def _contents(
        self, method: str, name: str, query: dict[str, str], body: dict[str, Any]
    ) -> tuple[int, Any]:
        files = self.branches[query.get("ref") or body["branch"]]
        there = files.get(name)
        sha = hashlib.sha1(there or b"", usedforsecurity=False).hexdigest()
        if method == "GET":
            if there is None:
                return 404, {"message": "Not Found"}
            # as GitHub does it, with a line break every 60 characters
            text = base64.b64encode(there).decode()
            lines = "\n".join(text[at : at + 60] for at in range(0, len(text), 60))
            return 200, {"sha": sha, "content": lines}
        if there is not None and body.get("sha") != sha:
            return 409, {"message": f"{name} does not match {sha}"}
        files[name] = base64.b64decode(body["content"])
        self.commits.append(body["message"])
        return 200, {"commit": {"message": body["message"]}}

    @contextmanager
    def serve(self) -> Iterator[GitHub]:
        """Serve until the context is left; ``url`` is set."""
        with http_served.serving(self._handle) as self.url:
            yield self

    def _handle(self, asked: Request) -> Answer:
        if asked.headers.get("Authorization") != f"Bearer {TOKEN}":
            return Answer(401, {"message": "Bad credentials"})
        return Answer(*self.answer(asked.method, asked.path, asked.query, asked.json()))
