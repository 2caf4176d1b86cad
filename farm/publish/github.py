"""GitHub Releases, through the REST API: one release a tag, a channel is a release of its own.

https://docs.github.com/en/rest/releases. A release is a draft until every asset was read back. A
channel is the release ``channel-NAME``: its ``manifest.json`` is replaced, everything else stays.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, urljoin

import msgspec
import requests

from farm.errors import PublishError, UsageError
from farm.inputs import packages
from farm.publish import places, publishing
from farm.publish.places import SIGNATURE, Destination, Signed, endpoint, token
from farm.publish.publishing import Known, Plan
from farm.release import MANIFEST

_NEXT: Final = ".next"
"""The end of the name of an asset that will replace another one."""
T = TypeVar("T")
_TIMEOUT: Final = (10.0, 300.0)
_TRIES: Final = 4
_LONGEST_WAIT: Final = 900.0
"""Seconds. A rate limit that ends later than that is an error."""
_LIMITED, _BROKEN = frozenset({403, 429}), frozenset({500, 502, 503, 504})
_GONE, _EXISTS, _TOO_MANY = 404, 422, 429
_UNTOLD: Final = 60.0
"""Seconds to wait where GitHub does not say how long."""


class _UnansweredError(PublishError):
    """GitHub did not answer; ``pause``: the seconds to wait by its answer, or None.

    GitHub may have carried the request out.
    """

    def __init__(self, method: str, url: str, why: str, pause: float | None = None) -> None:
        super().__init__("GITHUB_UNREACHABLE", method=method, url=packages.shown(url), why=why)
        self.pause = pause


class Asset(msgspec.Struct, frozen=True):
    """A file of a release, as GitHub describes it."""

    id: int
    name: str
    state: str
    size: int
    digest: str | None = None


class Release(msgspec.Struct, frozen=True):
    """A release or a draft, as GitHub describes it."""

    id: int
    tag_name: str
    draft: bool
    upload_url: str
    assets: tuple[Asset, ...]
    immutable: bool = False


class Repository(msgspec.Struct, frozen=True):
    """A repository, as GitHub describes it."""

    full_name: str
    private: bool = False


class _Setting(msgspec.Struct, frozen=True):
    enabled: bool


class Api:
    """One repository. ``GITHUB_TOKEN`` must be allowed to write its contents.

    Raises:
        PublishError: by every method: GitHub refuses, cannot be reached, or answers with something
            else than its API.
    """

    def __init__(
        self,
        repository: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        found = token("GITHUB_TOKEN")
        if found is None:
            raise UsageError("TOKEN_MISSING/github")
        root = endpoint("GITHUB_API_URL", "https://api.github.com")
        self._root = f"{root}/repos/{repository}"
        own = urljoin(root, "/")
        self._own = (own, own.replace("//api.", "//uploads.", 1))
        self._sleep, self._now, self._patience = sleep, now, _LONGEST_WAIT
        self._session = packages.session(0)
        self._session.headers["Authorization"] = f"Bearer {found}"
        self._session.headers["X-GitHub-Api-Version"] = "2022-11-28"

    def call(self, method: str, path: str, **options: Any) -> None:
        """Make a request whose answer has no content to read."""
        self._patiently(partial(self._once, method, self._root + path, **options)).close()

    def get(self, path: str, kind: type[T]) -> T:
        """Ask for one thing."""
        with self._patiently(partial(self._once, "GET", self._root + path)) as answer:
            return places.understood(kind, answer)

    def create(
        self, path: str, body: Mapping[str, Any], find: Callable[[], Release | None]
    ) -> Release:
        """Create a release, which must not be created twice.

        A request whose answer was lost may have been carried out, so ``find`` is called before the
        request is repeated.
        """

        def make() -> Release:
            with self._once("POST", self._root + path, json=body) as answer:
                return places.understood(Release, answer)

        return self._patiently(make, find)

    def pages(self, path: str, kind: type[T]) -> Iterator[T]:
        """List something to its end, page by page."""

        def ask(url: str) -> requests.Response:
            return self._patiently(partial(self._once, "GET", url))

        return places.listed(kind, f"{self._root}{path}?per_page=100", ask, *self._own)

    @contextmanager
    def asset(self, asset: Asset) -> Iterator[Iterator[bytes]]:
        """Download an asset, also one of a draft."""
        url = f"{self._root}/releases/assets/{asset.id}"
        headers = {"Accept": "application/octet-stream", "Accept-Encoding": "identity"}
        ask = partial(self._once, "GET", url, headers=headers, stream=True)
        with self._patiently(ask) as answer:
            yield _content(answer)

    def upload(self, release: Release, name: str, content: Path | bytes) -> None:
        """Upload an asset; remove an unfinished one of its name first."""
        url = places.require_own(release.upload_url.partition("{")[0], *self._own)
        headers = {"Content-Type": "application/octet-stream"}

        def send() -> None:
            for asset in self.pages(f"/releases/{release.id}/assets", Asset):
                unfinished = asset.state != "uploaded" or name.endswith(".next")
                if asset.name == name and unfinished:
                    self.call("DELETE", f"/releases/assets/{asset.id}")
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as data:
                self._once("POST", url, params={"name": name}, headers=headers, data=data).close()

        self._patiently(send)

    def _patiently(self, ask: Callable[[], T], find: Callable[[], T | None] = lambda: None) -> T:
        """Repeat a request until GitHub answers; before each repetition, look for its result."""
        for attempt in range(_TRIES):
            try:
                return ask()
            except _UnansweredError as error:
                if attempt == _TRIES - 1:
                    raise
                self._patience -= error.pause or 0.0
                self._sleep(2.0**attempt if error.pause is None else error.pause)
            found = find()
            if found is not None:
                return found
        raise AssertionError("unreachable: the last try returns or raises")

    def _once(self, method: str, url: str, **options: Any) -> requests.Response:
        """Make one request.

        https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api
        """
        headers = {"Accept": "application/vnd.github+json", **options.pop("headers", {})}
        try:
            answer = self._session.request(
                method, url, headers=headers, timeout=_TIMEOUT, **options
            )
        except requests.RequestException as error:
            raise _UnansweredError(method, url, packages.cause(error)) from error
        if answer.status_code in _BROKEN:
            answer.close()
            raise _UnansweredError(method, url, f"status {answer.status_code}")
        pause = self._limit(answer) if answer.status_code in _LIMITED else None
        if pause is None:
            _require_success(method, url, answer)
            return answer
        answer.close()
        if pause > self._patience:
            raise PublishError("GITHUB_LIMIT", url=packages.shown(url), minutes=pause / 60)
        raise _UnansweredError(method, url, "its rate limit did not end", pause)

    def _limit(self, answer: requests.Response) -> float | None:
        """Return the seconds until a limit ends; None for another refusal."""
        after = _number(answer.headers.get("Retry-After"))
        if after is not None:
            return after
        if answer.headers.get("X-RateLimit-Remaining") == "0":
            reset = _number(answer.headers.get("X-RateLimit-Reset"))
            return _UNTOLD if reset is None else max(reset - self._now() + 1, 0.0)
        told = answer.status_code == _TOO_MANY or "rate limit" in answer.text.lower()
        return _UNTOLD if told else None


def _number(text: str | None) -> float | None:
    return float(text) if text and len(text) < 16 and text.isascii() and text.isdigit() else None  # noqa: PLR2004


def _content(answer: requests.Response) -> Iterator[bytes]:
    try:
        yield from packages.pieces(answer)
    except requests.RequestException as error:
        raise _UnansweredError("GET", answer.url, packages.cause(error)) from error


def _require_success(method: str, url: str, answer: requests.Response) -> None:
    if answer.ok or (method, answer.status_code) == ("DELETE", _GONE):
        return  # a second removal, after the first answer was lost, finds nothing
    try:
        told = str(answer.json().get("message", ""))
    except (ValueError, AttributeError, RecursionError):
        told = answer.text
    finally:
        answer.close()
    raise PublishError(
        "GITHUB_REFUSED/exists" if answer.status_code == _EXISTS else "GITHUB_REFUSED",
        method=method,
        url=packages.shown(url),
        status=answer.status_code,
        told=told[:200],
    )


class GitHub(Destination):
    """See ``Destination``."""

    channel_folder = "channel-"

    def __init__(self, repository: str) -> None:
        self.where = f"github:{repository}"
        self.project = self._repository = repository
        self._api = Api(repository)
        ours = os.environ.get("GITHUB_REPOSITORY") == repository
        self._commit = os.environ.get("GITHUB_SHA") if ours else None  # what a workflow checked out
        self._server = os.environ.get("GITHUB_SERVER_URL", "https://github.com").rstrip("/")

    def require_there(self) -> None:
        """Ask for the repository."""
        self._api.get("", Repository)

    def require_writable(self) -> None:
        """Ask whether a workflow can store its attestations; the token is there.

        Raises:
            PublishError: ``ATTESTATION_UNAVAILABLE``: the repository is private, and no request
                reports whether its plan allows it; ``FARM_ATTEST_PRIVATE=1`` states that it does.
        """
        private = self._api.get("", Repository).private
        attests = os.environ.get("GITHUB_ACTIONS") == "true"  # release.yml does, after the build
        if private and attests and os.environ.get("FARM_ATTEST_PRIVATE") != "1":
            raise PublishError("ATTESTATION_UNAVAILABLE", where=self.where)

    def present(self, release: str) -> Mapping[str, Known]:
        """Return the uploaded assets of a release or its draft."""
        found = self._release(release)
        return {} if found is None else self._present(found)

    def publish(self, plan: Plan, tell: Callable[[str], None]) -> None:
        """Make a draft, upload the assets, compare them, and publish the draft."""
        release = self._release(plan.release) or self._create(plan.release, draft=True)
        # another publisher may have begun, or finished, since the plan was made
        plan = publishing.plan(plan.release, self.where, plan.parts, self._present(release))
        replaced = {part.name for part in plan.new} if release.draft else set()
        for asset in self._assets(release):
            if asset.name in replaced:  # of a publication that was cut off: never visible
                self._api.call("DELETE", f"/releases/assets/{asset.id}")
        for part in plan.new:
            tell(str(part))
            self._api.upload(release, part.name, part.path)
        ids = {asset.name: asset for asset in self._assets(release)}
        for part in plan.parts:
            if part.name not in ids:
                raise PublishError("READ_BACK_DIFFERS/lost", where=self.where, name=part.name)
            with self._api.asset(ids[part.name]) as content:
                publishing.compare(part, content)
        if release.draft:
            self._api.call("PATCH", f"/releases/{release.id}", json={"draft": False})

    def read(self, folder: str, name: str) -> Iterator[bytes]:
        """Download an asset of a published release."""
        for asset in self._published(folder):
            if asset.name == name:
                with self._api.asset(asset) as content:
                    yield from content
                return
        raise self.not_published(folder, name)

    def names(self, folder: str) -> tuple[str, ...]:
        """List the assets of a published release."""
        return tuple(asset.name for asset in self._published(folder))

    def folders(self) -> tuple[str, ...]:
        """Return the tags of published releases, oldest first."""
        found = [
            one.tag_name
            for one in self._api.pages("/releases", Release)
            if not one.draft and any(self.shows(one.tag_name, asset.name) for asset in one.assets)
        ]
        return tuple(reversed(found))

    def download_url(self, folder: str, name: str) -> str:
        """Return the public URL of an asset."""
        return f"{self.artifact_base(folder)}{name}"

    def artifact_base(self, release: str) -> str:
        """Return the public URL of a release's assets: a channel's own lie elsewhere."""
        return f"{self._server}/{self._repository}/releases/download/{quote(release)}/"

    def put_channel(self, channel: str, serial: int, signed: Signed) -> None:
        """Upload everything under other names first: a file is missing for two requests only."""
        tag = self.channel_folder + channel
        release = self._release(tag)
        if release is None and not self._freezes():
            release = self._create(tag, draft=False)
        if release is None or release.immutable:
            raise PublishError("CHANNEL_IMMUTABLE", tag=tag, where=self.where)
        there = {asset.name: asset for asset in self._assets(release)}
        if f"{serial}.json" in there:
            raise self.moved(channel, serial)
        stale = there.get(f"{serial}.json.minisig")
        if stale is not None:  # of a promotion that was cut off before its manifest
            self._api.call("DELETE", f"/releases/assets/{stale.id}")
        pair = {SIGNATURE: signed.signature, MANIFEST: signed.manifest}
        for name, data in pair.items():
            self._api.upload(release, name.replace("manifest", str(serial)), data)
        for name, data in pair.items():
            self._api.upload(release, name + _NEXT, data)
        ids = {asset.name: asset for asset in self._assets(release)}
        for name in pair:
            if name in ids:
                self._api.call("DELETE", f"/releases/assets/{ids[name].id}")
            path = f"/releases/assets/{ids[name + _NEXT].id}"
            self._api.call("PATCH", path, json={"name": name})

    def _present(self, release: Release) -> dict[str, Known]:
        visible = not release.draft
        return {one.name: self._known(one, visible=visible) for one in self._assets(release)}

    def _freezes(self) -> bool:
        """Ask whether the repository has immutable releases; False where the token may not ask."""
        try:
            return self._api.get("/immutable-releases", _Setting).enabled
        except PublishError as error:
            if error.code != "GITHUB_REFUSED":
                raise
            return False

    def _release(self, tag: str) -> Release | None:
        """Return the published release of a tag, else its oldest draft.

        Drafts are only found by listing, and there may be several of one tag.
        """
        found = (one for one in self._api.pages("/releases", Release) if one.tag_name == tag)
        return min(found, key=lambda one: (one.draft, one.id), default=None)

    def _create(self, tag: str, *, draft: bool) -> Release:
        """Make a release; use the existing one if the answer was lost or another was faster.

        GitHub allows a second draft of a tag, so the farm looks for one and deletes its own.
        """
        body = {"tag_name": tag, "name": tag, "draft": draft, "prerelease": not draft}
        if self._commit is not None:  # without it GitHub tags the default branch of that moment
            body["target_commitish"] = self._commit
        made = self._api.create("/releases", body, lambda: self._release(tag))
        first = self._release(tag) or made
        if first.id != made.id and made.draft:
            self._api.call("DELETE", f"/releases/{made.id}")
        return first

    def _assets(self, release: Release) -> list[Asset]:
        """Return the complete assets: an upload that was cut off has the state ``starter``."""
        found = self._api.pages(f"/releases/{release.id}/assets", Asset)
        return [asset for asset in found if asset.state == "uploaded"]

    def _published(self, tag: str) -> list[Asset]:
        """Return the complete assets of a published release; none if there is no such release."""
        release = self._release(tag)
        return [] if release is None or release.draft else self._assets(release)

    def _known(self, asset: Asset, *, visible: bool) -> Known:
        """Use GitHub's own digest, else read the asset: assets from before 2025-06 have none."""
        algorithm, _, told = (asset.digest or "").partition(":")
        if algorithm == "sha256":
            return Known(asset.size, told, visible)
        with self._api.asset(asset) as content:
            return publishing.hashed(content, asset.size, visible=visible)
