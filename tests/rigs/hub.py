"""A Hugging Face Hub of one repository, on loopback: enough for the real client to download.

Paths ``/OWNER/NAME/resolve/REVISION/FILE``, by HEAD and GET, with the headers that
huggingface_hub reads (``X-Repo-Commit``, ``ETag``, ``X-Error-Code``).
"""

import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

COMMIT = "c" * 40
XET_TOKEN = "/api/xet-read-token"


@dataclass
class Hub:
    """What it holds, and what it was asked.

    Attributes:
        xet: the address of its Xet storage; none where it is empty.
        bodies: the paths whose content was asked for.
    """

    repo: str = "me/model"
    files: dict[str, bytes] = field(default_factory=dict)
    token: str | None = None
    url: str = ""
    tokens_seen: set[str | None] = field(default_factory=set)
    xet: str = ""
    bodies: list[str] = field(default_factory=list)

    def judge(self, path: str, authorization: str | None) -> tuple[int, str, bytes]:
        """Return status, error code and body for a request."""
        self.tokens_seen.add(authorization)
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

    def tree(self) -> bytes:
        """Return the list of all files."""
        entry = {"type": "file", "oid": COMMIT}
        listed = [{**entry, "path": name, "size": len(it)} for name, it in self.files.items()]
        return json.dumps(listed).encode()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it; its ``url`` is set."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            if path == XET_TOKEN:
                self.send_response(200)
                self.send_header("X-Xet-Cas-Url", hub.xet)
                self.send_header("X-Xet-Access-Token", "xet")
                self.send_header("X-Xet-Token-Expiration", str(int(time.time()) + 3600))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if path.startswith(f"/api/models/{hub.repo}/tree/"):
                body = hub.tree()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            status, code, body = hub.judge(path, self.headers["Authorization"])
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            if hub.xet and not code:
                self.send_header("X-Xet-Hash", "a" * 64)
                self.send_header("Link", f'<{hub.url}{XET_TOKEN}>; rel="xet-auth"')
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if self.command == "GET":
                hub.bodies.append(path)
                self.wfile.write(body)

        do_GET = answer  # noqa: N815 - the name in the base
        do_HEAD = answer  # noqa: N815 - the name in the base

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
