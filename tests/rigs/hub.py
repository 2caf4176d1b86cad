"""A Hugging Face Hub of one repository, on loopback: enough for the real client to download.

Paths ``/OWNER/NAME/resolve/REVISION/FILE``, by HEAD and GET, with the headers that
huggingface_hub reads (``X-Repo-Commit``, ``ETag``, ``X-Error-Code``).
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event

from tests.rigs import http_served
from tests.rigs.http_served import Answer, Request

COMMIT = "c" * 40
XET_TOKEN = "/api/xet-read-token"
HARNESSES = "/api/agent-harnesses"
GUESSES = {"standardEnvVars": [], "harnesses": {"guessed": {"envVars": {"PATH": "*"}}}}
"""A Hub's list of variables: its client tells it in a header which of them is set so."""


@dataclass
class Hub:
    """What it holds, and what it was asked."""

    repo: str = "me/model"
    files: dict[str, bytes] = field(default_factory=dict)
    token: str | None = None
    url: str = ""
    tokens_seen: set[str | None] = field(default_factory=set)
    xet: str = ""  # the address of its Xet storage
    bodies: list[str] = field(default_factory=list)  # paths whose content was asked for
    ranges: list[str | None] = field(default_factory=list)  # of each such request
    changed: dict[str, str | None] = field(default_factory=dict)  # headers; None: not sent
    listed: object = None  # the answer for the list of files, if it is not the true one
    count: int = 0  # requests for files, by HEAD and GET
    halt: int | None = None  # after so many bytes of a file no more come, until ``resumed``
    resumed: Event = field(default_factory=Event)

    def judge(self, path: str, authorization: str | None) -> tuple[int, str, bytes]:
        """Return status, error code and body for a request."""
        self.tokens_seen.add(authorization)
        self.count += 1
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo != self.repo:
            return 404, "RepoNotFound", b""
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401 if authorization is None else 403, "GatedRepo", b""
        if revision not in {"main", COMMIT}:
            return 404, "RevisionNotFound", b""
        if name not in self.files:
            return 404, "EntryNotFound", b""
        return 200, "", self.files[name]

    def answer(self, asked: Request) -> Answer:
        """Answer a request: for Xet's token, the list of all files, or a file."""
        if asked.path == HARNESSES:
            self.tokens_seen.add(HARNESSES)
            return Answer(200, GUESSES)
        if asked.path == XET_TOKEN:
            expires = str(int(time.time()) + 3600)
            names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
            return Answer(200, None, dict(zip(names, (self.xet, "xet", expires), strict=True)))
        if asked.path.startswith(f"/api/models/{self.repo}") and "/resolve/" not in asked.path:
            named = [{"rfilename": name} for name in self.files]
            return Answer(200, self.listed or {"id": self.repo, "siblings": named})
        status, code, body = self.judge(asked.path, asked.headers["Authorization"])
        headers: dict[str, str | None] = {"X-Repo-Commit": COMMIT}
        headers |= {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if code:
            headers["X-Error-Code"] = code
        elif self.xet:
            headers["X-Xet-Hash"] = "a" * 64
            headers["Link"] = f'<{self.url}{XET_TOKEN}>; rel="xet-auth"'
        headers |= self.changed
        if asked.method == "GET" and "/resolve/" in asked.path:
            self.bodies.append(asked.path)
            self.ranges.append(asked.headers["Range"])
            if self.halt is not None:
                return Answer(status, self._halting(body), headers)
            if asked.headers["Range"] and status == 200:
                start = int(asked.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                return Answer(206, body[start:], headers)
        return Answer(status, body, headers)

    def _halting(self, body: bytes) -> Iterator[bytes]:
        yield body[: self.halt]
        self.resumed.wait()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it; its ``url`` is set."""
    with http_served.serving(hub.answer) as hub.url:
        yield hub
