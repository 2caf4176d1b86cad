"""Requests to GitHub's REST API: pages, rate limits, uploads. Knows nothing of releases of ours."""

from __future__ import annotations

import io
import os
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import requests

from farm.errors import PublishError, UsageError
from farm.publish.destination import token
from farm.publish.parts import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

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
    """GitHub did not answer; ``pause`` are the seconds that it asks to wait, None if it does not.

    The request may have been carried out all the same.
    """

    def __init__(self, method: str, url: str, why: str, pause: float | None = None) -> None:
        super().__init__(
            "GITHUB_UNREACHABLE",
            f"{method} {_shown(url)}: {why}",
            hint="nothing visible changed; publishing again sends only what is missing",
        )
        self.pause = pause


class Api:
    """One repository. ``GITHUB_TOKEN`` must be allowed to write its contents."""

    def __init__(
        self,
        repository: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        found = token("GITHUB_TOKEN")
        if found is None:
            raise UsageError(
                "TOKEN_MISSING",
                "GITHUB_TOKEN is not set",
                hint="a token that may write the contents of the repository",
            )
        root = os.environ.get("GITHUB_API_URL", "https://api.github.com").rstrip("/")
        self._root = f"{root}/repos/{repository}"
        self._sleep, self._now = sleep, now
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {found}"
        self._session.headers["X-GitHub-Api-Version"] = "2022-11-28"

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Make a request; returns the JSON of the answer, None where it has none.

        Raises:
            PublishError: GitHub refuses, or cannot be reached.
        """
        url = self._root + path
        with self._patiently(lambda: self._once(method, url, **options)) as answer:
            return answer.json() if answer.content else None

    def create(
        self, path: str, body: Mapping[str, Any], find: Callable[[], dict[str, Any] | None]
    ) -> dict[str, Any]:
        """Make something that must not be made twice.

        A request whose answer was lost may have been carried out: ``find`` is asked before it is
        made again.

        Raises:
            PublishError: GitHub refuses, or cannot be reached.
        """

        def make() -> dict[str, Any]:
            with self._once("POST", self._root + path, json=body) as answer:
                made: dict[str, Any] = answer.json()
                return made

        return self._patiently(make, find)

    def pages(self, path: str) -> Iterator[dict[str, Any]]:
        """List something to its end, page by page."""
        url: str | None = f"{self._root}{path}?per_page=100"
        while url:
            with self._patiently(partial(self._once, "GET", url)) as answer:
                yield from answer.json()
                url = answer.links.get("next", {}).get("url")

    @contextmanager
    def asset(self, asset: Mapping[str, Any]) -> Iterator[Iterator[bytes]]:
        """Download an asset, also one of a draft."""
        url = f"{self._root}/releases/assets/{asset['id']}"
        headers = {"Accept": "application/octet-stream", "Accept-Encoding": "identity"}
        ask = partial(self._once, "GET", url, headers=headers, stream=True)
        with self._patiently(ask) as answer:
            yield _content(answer)

    def upload(self, release: Mapping[str, Any], name: str, content: Path | bytes) -> None:
        """Upload an asset; what an earlier try left unfinished under its name goes first."""
        url = str(release["upload_url"]).partition("{")[0]
        headers = {"Content-Type": "application/octet-stream"}

        def send() -> None:
            for asset in self.pages(f"/releases/{release['id']}/assets"):
                unfinished = asset["state"] != "uploaded" or name.endswith(".next")
                if asset["name"] == name and unfinished:
                    self.call("DELETE", f"/releases/assets/{asset['id']}")
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as data:
                self._once("POST", url, params={"name": name}, headers=headers, data=data).close()

        self._patiently(send)

    def _patiently(self, ask: Callable[[], T], find: Callable[[], T | None] = lambda: None) -> T:
        """Ask until GitHub answers; before it is asked again, look for what was done."""
        for attempt in range(_TRIES):
            try:
                return ask()
            except _UnansweredError as error:
                if attempt == _TRIES - 1:
                    raise
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
            raise _UnansweredError(method, url, str(error)) from error
        if answer.status_code in _BROKEN:
            answer.close()
            raise _UnansweredError(method, url, f"status {answer.status_code}")
        pause = self._limit(answer) if answer.status_code in _LIMITED else None
        if pause is None:
            _require_success(method, url, answer)
            return answer
        answer.close()
        if pause > _LONGEST_WAIT:
            raise PublishError(
                "GITHUB_LIMIT",
                f"{_shown(url)}: GitHub's rate limit ends in {pause / 60:.0f} minutes",
                hint="publishing again then goes on with what is missing",
            )
        raise _UnansweredError(method, url, "its rate limit did not end", pause)

    def _limit(self, answer: requests.Response) -> float | None:
        """Return the seconds until a limit ends; None where it is another refusal."""
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
        yield from answer.iter_content(BLOCK)
    except requests.RequestException as error:
        raise _UnansweredError("GET", answer.url, str(error)) from error


def _require_success(method: str, url: str, answer: requests.Response) -> None:
    if answer.ok or (method, answer.status_code) == ("DELETE", _GONE):
        return  # what is removed a second time, because the first answer was lost, is gone
    try:
        told = answer.json().get("message", "")
    except (ValueError, AttributeError):
        told = answer.text[:200]
    finally:
        answer.close()
    raise PublishError(
        "GITHUB_REFUSED",
        f"{method} {_shown(url)}: status {answer.status_code}: {told}",
        hint="does the repository exist, and may GITHUB_TOKEN write its contents?"
        if answer.status_code != _EXISTS
        else "publishing again goes on with what is missing",
    )


def _shown(url: str) -> str:
    """Return a URL without its query: signed URLs carry secrets there."""
    return url.partition("?")[0]
