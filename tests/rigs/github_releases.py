"""GitHub's releases on loopback: the REST API as it is documented, its limits included.

https://docs.github.com/en/rest/releases. Drafts are only found by listing, lists come in pages,
an upload that is cut off leaves a ``starter`` asset, a second asset of a name is refused, a tag may
have several drafts and one published release, assets come from another host by a redirect, and the
public download address knows published releases only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.rigs import http_served
from tests.rigs.http_served import Answer, Request

TOKEN = "gh_t0ken"
REPOSITORY = "owner/name"


@dataclass
class Asset:
    """One file of a release."""

    id: int
    name: str
    content: bytes
    state: str = "uploaded"


@dataclass
class Release:
    """One tag."""

    id: int
    tag: str
    draft: bool
    prerelease: bool
    assets: list[Asset] = field(default_factory=list)
    commit: str | None = None
    immutable: bool = False


@dataclass
class GitHub:
    """One repository."""

    releases: list[Release] = field(default_factory=list)
    page: int = 2  # entries of a list's page
    limited: int = 0  # so many requests are answered with ``limit`` first
    limit: Answer = field(default_factory=lambda: Answer(429, {}, {"Retry-After": "0"}))
    limited_uploads: int = 0  # so many uploads are, each with the whole body read
    cut_at: int = 0  # the change from now on whose connection is closed without an answer
    cut_after: bool = False  # it is carried out before
    tokens_elsewhere: list[str] = field(default_factory=list)  # at the redirects' host
    break_upload_of: str = ""  # the upload that is cut off, once, and stays as ``starter``
    immutable: bool = False  # what is published from now on never changes
    may_ask: bool = True  # the token may ask whether releases are immutable
    digests: bool = True  # assets have one, as they do since June 2025
    uploads: list[str] = field(default_factory=list)  # what was uploaded whole, in order
    calls: list[str] = field(default_factory=list)
    url: str = ""
    _ids: int = 0

    def release(self, tag: str) -> Release:
        (found,) = (one for one in self.releases if one.tag == tag)
        return found

    @contextmanager
    def serve(self) -> Iterator[GitHub]:
        """Serve until the context is left; ``url`` is set."""
        with http_served.serving(self._handle, "0.0.0.0") as self.url:  # 127.0.0.2 has the bytes
            yield self

    def _handle(self, asked: Request) -> Answer | None:
        if self.is_limited(asked.path):
            return self.limit
        if asked.path.startswith("/blobs/"):
            self.tokens_elsewhere += asked.headers.get_all("Authorization") or []
        public = asked.path.startswith((f"/{REPOSITORY}/", "/blobs/"))
        if not public and asked.headers.get("Authorization") != f"Bearer {TOKEN}":
            return Answer(401, {"message": "Bad credentials"})
        self.cut_at -= asked.method != "GET"
        cut = asked.method != "GET" and self.cut_at == 0
        if cut and not self.cut_after:
            return None
        answer = self.answer(asked.method, asked.path, asked.query, asked.body)
        return None if cut else answer

    def is_limited(self, path: str) -> bool:
        """Count a request that is answered with the limit."""
        if path.startswith("/uploads/") and self.limited_uploads:
            self.limited_uploads -= 1
            return True
        self.limited -= 1
        return self.limited >= 0

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> Answer:
        self.calls.append(f"{method} {path}")
        for pattern, handler in _ROUTES.items():
            matched = re.fullmatch(pattern, f"{method} {path}")
            if matched:
                with suppress(StopIteration):
                    return handler(self, query, body, **matched.groupdict())
        return Answer(404, {"message": "Not Found"})

    def by_id(self, number: str) -> Release:
        return next(one for one in self.releases if one.id == int(number))

    def asset(self, number: str) -> tuple[Release, Asset]:
        pairs = ((release, asset) for release in self.releases for asset in release.assets)
        return next((release, asset) for release, asset in pairs if asset.id == int(number))

    def json_of(self, release: Release) -> dict[str, Any]:
        return {
            "id": release.id,
            "tag_name": release.tag,
            "draft": release.draft,
            "prerelease": release.prerelease,
            "immutable": release.immutable,
            "upload_url": f"{self.url}/uploads/{release.id}/assets{{?name,label}}",
            "assets": [self.asset_json(one) for one in release.assets],
        }

    def asset_json(self, asset: Asset) -> dict[str, Any]:
        digest = f"sha256:{hashlib.sha256(asset.content).hexdigest()}" if self.digests else None
        size = len(asset.content)
        return {
            "id": asset.id, "name": asset.name, "size": size, "state": asset.state,
            "digest": digest,
        }  # fmt: skip


def _paged(github: GitHub, items: list[Any], path: str, query: dict[str, str]) -> Answer:
    number = int(query.get("page", "1"))
    begin = (number - 1) * github.page
    headers: dict[str, str | None] = {}
    if begin + github.page < len(items):
        url = f"{github.url}/repos/{REPOSITORY}{path}?per_page=100&page={number + 1}"
        headers["Link"] = f'<{url}>; rel="next"'
    return Answer(200, items[begin : begin + github.page], headers)


def _list(github: GitHub, query: dict[str, str], _body: bytes) -> Answer:
    newest_first = [github.json_of(one) for one in reversed(github.releases)]
    return _paged(github, newest_first, "/releases", query)


def _create(github: GitHub, _query: dict[str, str], body: bytes) -> Answer:
    asked = json.loads(body)
    made = Release(
        github.next_id(), asked["tag_name"], asked["draft"], asked.get("prerelease", False)
    )
    made.commit = asked.get("target_commitish")
    made.immutable = github.immutable and not made.draft
    github.releases.append(made)
    return Answer(201, github.json_of(made))


def _change(github: GitHub, _query: dict[str, str], body: bytes, number: str) -> Answer:
    release = github.by_id(number)
    draft = json.loads(body).get("draft", release.draft)
    others = [one for one in github.releases if one.tag == release.tag and one is not release]
    if not draft and any(not one.draft for one in others):
        return Answer(422, {"message": "Validation Failed: tag_name already_exists"})
    release.immutable |= github.immutable and release.draft and not draft
    release.draft = draft
    return Answer(200, github.json_of(release))


def _remove(github: GitHub, _query: dict[str, str], _body: bytes, number: str) -> Answer:
    github.releases.remove(github.by_id(number))
    return Answer(204)


def _immutable(github: GitHub, _query: dict[str, str], _body: bytes) -> Answer:
    told = Answer(200, {"enabled": github.immutable, "enforced_by_owner": False})
    return told if github.may_ask else Answer(403, {"message": "Resource not accessible"})


def _assets(github: GitHub, query: dict[str, str], _body: bytes, number: str) -> Answer:
    assets = [github.asset_json(one) for one in github.by_id(number).assets]
    return _paged(github, assets, f"/releases/{number}/assets", query)


def _upload(github: GitHub, query: dict[str, str], body: bytes, number: str) -> Answer:
    release, name = github.by_id(number), query["name"]
    if release.immutable:
        return Answer(422, {"message": "Cannot upload assets to an immutable release."})
    if any(one.name == name for one in release.assets):
        return Answer(422, {"message": "Validation Failed: already_exists"})
    if name == github.break_upload_of:
        github.break_upload_of = ""
        release.assets.append(Asset(github.next_id(), name, body[: len(body) // 2], "starter"))
        return Answer(502, {"message": "Server Error"})
    release.assets.append(Asset(github.next_id(), name, body))
    github.uploads.append(name)
    return Answer(201, github.asset_json(release.assets[-1]))


def _download(github: GitHub, _query: dict[str, str], _body: bytes, number: str) -> Answer:
    return _elsewhere(github, github.asset(number)[1])


def _elsewhere(github: GitHub, asset: Asset) -> Answer:
    """Lead to the host that has the bytes, by an address that is a secret for a while."""
    host = github.url.replace("127.0.0.1", "127.0.0.2")
    return Answer(302, None, {"Location": f"{host}/blobs/{asset.id}?signature=s3cret"})


def _blob(github: GitHub, query: dict[str, str], _body: bytes, number: str) -> Answer:
    if query != {"signature": "s3cret"}:
        raise StopIteration
    return Answer(200, github.asset(number)[1].content)


def _rename(github: GitHub, _query: dict[str, str], body: bytes, number: str) -> Answer:
    release, asset = github.asset(number)
    name = json.loads(body)["name"]
    if any(one.name == name for one in release.assets if one is not asset):
        return Answer(422, {"message": "Validation Failed: already_exists"})
    asset.name = name
    return Answer(200, github.asset_json(asset))


def _delete(github: GitHub, _query: dict[str, str], _body: bytes, number: str) -> Answer:
    release, asset = github.asset(number)
    release.assets.remove(asset)
    return Answer(204)


def _public(github: GitHub, _query: dict[str, str], _body: bytes, tag: str, name: str) -> Answer:
    seen = [one for one in github.releases if one.tag == tag and not one.draft]
    whole = (asset for one in seen for asset in one.assets if asset.state == "uploaded")
    return _elsewhere(github, next(asset for asset in whole if asset.name == name))


_ROUTES: dict[str, Callable[..., Answer]] = {
    f"GET /repos/{REPOSITORY}": lambda *_: Answer(200, {"full_name": REPOSITORY}),
    f"GET /repos/{REPOSITORY}/immutable-releases": _immutable,
    f"DELETE /repos/{REPOSITORY}/releases/(?P<number>[0-9]+)": _remove,
    "GET /blobs/(?P<number>[0-9]+)": _blob,
    f"GET /repos/{REPOSITORY}/releases": _list,
    f"POST /repos/{REPOSITORY}/releases": _create,
    f"PATCH /repos/{REPOSITORY}/releases/(?P<number>[0-9]+)": _change,
    f"GET /repos/{REPOSITORY}/releases/(?P<number>[0-9]+)/assets": _assets,
    "POST /uploads/(?P<number>[0-9]+)/assets": _upload,
    f"GET /repos/{REPOSITORY}/releases/assets/(?P<number>[0-9]+)": _download,
    f"PATCH /repos/{REPOSITORY}/releases/assets/(?P<number>[0-9]+)": _rename,
    f"DELETE /repos/{REPOSITORY}/releases/assets/(?P<number>[0-9]+)": _delete,
    f"GET /{REPOSITORY}/releases/download/(?P<tag>[^/]+)/(?P<name>[^/]+)": _public,
}
