"""A Hugging Face Hub on loopback that takes commits: enough for the real client to publish to.

Repositories of models and Spaces, large files through the LFS protocol, commits, tags, variables.
It counts what was sent, and can refuse a request, to cut a publication off half-way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.rigs import http_served
from tests.rigs.http_served import Answer, Request

TOKEN = "hf_t0ken"
MODELS = frozenset(
    f"mradermacher/translategemma-{size}-it-i1-GGUF/translategemma-{size}-it.i1-Q4_K_M.gguf"
    for size in ("4b", "12b", "27b")
)
"""Models of others that this Hub has."""
LARGE = 1 << 16
"""Bytes from which on a file goes through LFS."""


@dataclass
class Repository:
    """One repository; ``commits`` are whole trees, the first one empty."""

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    tags: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    volumes: list[dict[str, Any]] = field(default_factory=list)

    def commit_of(self, revision: str) -> int:
        oids = [oid(number) for number in range(len(self.commits))]
        revision = self.tags.get(revision, revision)
        if revision == "main":
            return len(oids) - 1
        return oids.index(revision) if revision in oids else -1


@dataclass
class Hub:
    """What it holds, what it was asked, and what it refuses."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    refuse: str = ""  # a pattern of ``METHOD path``: answered with 500
    role: str = "write"  # what the account's token may do
    cut_at: int = 0  # the change from now on that is answered with 500 too
    cut_after: bool = False  # it is carried out before
    sent: list[str] = field(default_factory=list)  # large files that were uploaded
    calls: list[str] = field(default_factory=list)
    url: str = ""
    host: str = ""  # where Spaces run; the Hub's own way of naming them without it
    private: bool = False  # its Spaces are
    stages: list[dict[str, Any]] = field(default_factory=list)  # of a Space; the last stays

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, str, Any]:
        """Return status, error code and body."""
        call = f"{method} {path}"
        self.calls.append(call)
        self.cut_at -= method not in {"GET", "HEAD"}
        cut = self.cut_at == 0 and method not in {"GET", "HEAD"}
        if (self.refuse and re.search(self.refuse, call)) or (cut and not self.cut_after):
            return 500, "", {"error": "out of order"}
        told = self._told(call, body)
        return (500, "", {"error": "the answer was lost"}) if cut else told

    def _told(self, call: str, body: bytes) -> tuple[int, str, Any]:
        for pattern, handler in _ROUTES.items():
            matched = re.fullmatch(pattern, call)
            if matched:
                told = handler(self, body, **matched.groupdict())
                return told if isinstance(told, tuple) else (200, "", told)
        return 404, "EntryNotFound", {}

    @contextmanager
    def serve(self) -> Iterator[Hub]:
        """Serve until the context is left; ``url`` is set."""
        with http_served.serving(self._handle) as self.url:
            yield self

    def _handle(self, asked: Request) -> Answer:
        reads = asked.method in {"GET", "HEAD"} or "/lfs/" in asked.path
        reads &= "whoami" not in asked.path
        if reads or asked.headers.get("Authorization") == f"Bearer {TOKEN}":
            status, code, told = self.answer(asked.method, asked.path, asked.body)
        else:
            status, code, told = 401, "RepoNotFound", {"error": "Invalid credentials"}
        headers = {"Content-Type": "application/json"}
        if "/resolve/" in asked.path and status == 200:
            digest = hashlib.sha256(told).hexdigest()
            headers |= {"X-Repo-Commit": code, "ETag": f'"{digest}"'}
        elif code:
            headers["X-Error-Code"] = code
        return Answer(status, told, headers)


def oid(number: int) -> str:
    return f"{number:040x}"


def _create(hub: Hub, body: bytes) -> Any:
    asked = json.loads(body)
    name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
    status = 409 if name in hub.repositories else 200
    hub.repositories.setdefault(name, Repository(hardware=asked.get("hardware", "")))
    prefix = "spaces/" if asked.get("type") == "space" else ""
    return status, "", {"url": f"{hub.url}/{prefix}{name}", "id": name}


def _preupload(_hub: Hub, body: bytes, **_: str) -> Any:
    def of(one: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if one["size"] >= LARGE else "regular"
        return {"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    return {"files": [of(one) for one in json.loads(body)["files"]]}


def _batch(hub: Hub, body: bytes, **_: str) -> Any:
    objects = []
    for one in json.loads(body)["objects"]:
        answer = {"oid": one["oid"], "size": one["size"]}
        if one["oid"] not in hub.large:
            answer["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
        objects.append(answer)
    return {"transfer": "basic", "objects": objects}


def _put_large(hub: Hub, body: bytes, sha: str) -> Any:
    if hashlib.sha256(body).hexdigest() != sha:
        return 400, "", {}
    hub.large[sha] = body
    hub.sent.append(sha)
    return b""


def _commit(hub: Hub, body: bytes, repo: str, **_: str) -> Any:
    repository = hub.repositories[repo]
    tree, newest = dict(repository.commits[-1]), oid(len(repository.commits) - 1)
    for entry in map(json.loads, body.splitlines()):
        key, value = entry["key"], entry["value"]
        if key == "header" and value.get("parentCommit", newest) != newest:
            return 412, "", {"error": "A commit has happened since. Please refresh"}
        if key == "file":
            tree[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in hub.large:
                return 400, "", {"error": "LFS file is missing"}
            tree[value["path"]] = hub.large[value["oid"]]
        elif key == "deletedFile":
            del tree[value["path"]]
    repository.commits.append(tree)
    made = oid(len(repository.commits) - 1)
    return {"commitUrl": f"{hub.url}/{repo}/commit/{made}", "commitOid": made}


def _tree(hub: Hub, _body: bytes, repo: str, revision: str, folder: str | None = None) -> Any:
    if repo not in hub.repositories:
        return 404, "RepoNotFound", {}
    repository = hub.repositories[repo]
    files = repository.commits[repository.commit_of(revision)]
    prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
    below = [_file(path, files[path]) for path in files if path.startswith(prefix)]
    return below if below or not prefix else (404, "EntryNotFound", {})  # as asked: recursive


def _file(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if len(content) >= LARGE:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry


def _refs(hub: Hub, _body: bytes, repo: str) -> Any:
    tags = [
        {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
        for name, commit in hub.repositories[repo].tags.items()
    ]
    return {"branches": [], "converts": [], "tags": tags}


def _tag(hub: Hub, body: bytes, repo: str, revision: str) -> Any:
    repository, name = hub.repositories[repo], json.loads(body)["tag"]
    if name in repository.tags:
        return 409, "", {}
    repository.tags[name] = oid(repository.commit_of(revision))
    return b""


def _info(hub: Hub, _body: bytes, repo: str) -> Any:
    if repo not in hub.repositories:
        return 404, "RepoNotFound", {}
    sha = oid(len(hub.repositories[repo].commits) - 1)
    told = {"id": repo, "sha": sha, "tags": [], "siblings": [], "private": hub.private}
    if "/api/spaces/" in hub.calls[-1]:
        told["host"] = hub.host or f"https://{repo.replace('/', '-')}.hf.space"
    return told


def _resolve(hub: Hub, _body: bytes, repo: str, revision: str, path: str) -> Any:
    if f"{repo}/{path}" in MODELS:
        return 200, oid(0), b"GGUF"
    repository = hub.repositories.get(repo)
    if repository is None:
        return 404, "RepoNotFound", b""
    number = repository.commit_of(revision)
    if number < 0:
        return 404, "RevisionNotFound", b""
    content = repository.commits[number].get(path)
    return (404, "EntryNotFound", b"") if content is None else (200, oid(number), content)


def _variable(hub: Hub, body: bytes, repo: str) -> Any:
    asked = json.loads(body)
    hub.repositories[repo].variables[asked["key"]] = asked["value"]
    return {asked["key"]: {"value": asked["value"]}}


def _variables(hub: Hub, body: bytes, repo: str) -> Any:
    told = {name: {"value": value} for name, value in hub.repositories[repo].variables.items()}
    if body:
        del hub.repositories[repo].variables[json.loads(body)["key"]]
    return told


def _runtime(hub: Hub, _body: bytes, repo: str) -> Any:
    stage = hub.stages.pop(0) if len(hub.stages) > 1 else {"stage": "RUNNING", **_last(hub.stages)}
    repository = hub.repositories[repo]
    hardware = {"current": None, "requested": repository.hardware or None}
    return {"hardware": hardware, "volumes": repository.volumes, **stage}


def _last(stages: list[dict[str, Any]]) -> dict[str, Any]:
    return stages[-1] if stages else {}


def _volumes(hub: Hub, body: bytes, repo: str) -> Any:
    hub.repositories[repo].volumes = json.loads(body)["volumes"]
    return {}


def _hardware(hub: Hub, body: bytes, repo: str) -> Any:
    hub.repositories[repo].hardware = json.loads(body)["flavor"]
    return {"stage": "BUILDING", "hardware": {"current": None, "requested": None}}


def _in_bucket(hub: Hub, body: bytes, repo: str) -> Any:
    there = hub.repositories[repo].commits[-1].keys() & json.loads(body)["paths"]
    return [{"type": "file", "path": path, "size": 1, "xetHash": ""} for path in there]


def _who(hub: Hub, _body: bytes) -> Any:
    return {"type": "user", "name": "me", "auth": {"accessToken": {"role": hub.role}}}


_KIND = "/api/(?:models|spaces)/"
_REPO = "(?P<repo>[^/]+/[^/]+)"
_REVISION = "(?P<revision>[^/]+)"
_ROUTES: dict[str, Any] = {
    "GET /api/whoami-v2": _who,
    "POST /api/repos/create": _create,
    "POST /api/validate-yaml": lambda *_: {"errors": [], "warnings": []},
    f"POST {_KIND}{_REPO}/preupload/{_REVISION}": _preupload,
    r"POST /(?:spaces/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch": _batch,
    "PUT /lfs/(?P<sha>[0-9a-f]{64})": _put_large,
    f"POST {_KIND}{_REPO}/commit/{_REVISION}": _commit,
    f"GET {_KIND}{_REPO}/tree/{_REVISION}(?P<folder>/.*)?": _tree,
    f"GET {_KIND}{_REPO}/refs": _refs,
    f"POST {_KIND}{_REPO}/tag/{_REVISION}": _tag,
    f"GET {_KIND}{_REPO}(?:/revision/main)?": _info,
    f"POST /api/buckets/{_REPO}/paths-info": _in_bucket,
    f"POST {_KIND}{_REPO}/variables": _variable,
    f"(?:GET|DELETE) {_KIND}{_REPO}/variables": _variables,
    f"GET {_KIND}{_REPO}/runtime": _runtime,
    f"PUT {_KIND}{_REPO}/volumes": _volumes,
    f"POST {_KIND}{_REPO}/hardware": _hardware,
    f"(?:GET|HEAD) /(?:spaces/)?{_REPO}/resolve/{_REVISION}/(?P<path>.+)": _resolve,
}
