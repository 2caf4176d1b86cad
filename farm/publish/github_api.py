"""Requests to GitHub's REST API: pages, rate limits, uploads. Knows nothing of releases of ours."""

from __future__ import annotations

import io
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import requests

from farm.errors import PublishError, UsageError
from farm.publish.parts import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

_TIMEOUT: Final = (10.0, 300.0)
_TRIES: Final = 4
_LONGEST_WAIT: Final = 900.0
"""Seconds. A rate limit that ends later than that is an error."""
_LIMITED, _BROKEN = frozenset({403, 429}), frozenset({500, 502, 503, 504})
_EXISTS, _TOO_MANY = 422, 429
_UNTOLD: Final = 60.0
"""Seconds to wait where GitHub does not say how long."""


class Api:
    """One repository. ``GITHUB_TOKEN`` must be allowed to write its contents."""

    def __init__(
        self,
        repository: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        token = os.environ.get("GITHUB_TOKEN", "")
        if not token:
            raise UsageError(
                "TOKEN_MISSING",
                "GITHUB_TOKEN is not set",
                hint="a token that may write the contents of the repository",
            )
        root = os.environ.get("GITHUB_API_URL", "https://api.github.com").rstrip("/")
        self._root = f"{root}/repos/{repository}"
        self._sleep, self._now = sleep, now
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {token}"
        self._session.headers["X-GitHub-Api-Version"] = "2022-11-28"

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Make a request; returns the JSON of the answer, None where it has none.

        Raises:
            PublishError: GitHub refuses, or cannot be reached.
        """
        with self._answer(method, self._root + path, **options) as answer:
            return answer.json() if answer.content else None

    def pages(self, path: str) -> Iterator[dict[str, Any]]:
        """List something to its end, page by page."""
        url: str | None = f"{self._root}{path}?per_page=100"
        while url:
            with self._answer("GET", url) as answer:
                yield from answer.json()
                url = answer.links.get("next", {}).get("url")

    @contextmanager
    def asset(self, asset: Mapping[str, Any]) -> Iterator[Iterator[bytes]]:
        """Download an asset, also one of a draft."""
        url = f"{self._root}/releases/assets/{asset['id']}"
        headers = {"Accept": "application/octet-stream", "Accept-Encoding": "identity"}
        with self._answer("GET", url, headers=headers, stream=True) as answer:
            yield _content(answer)

    def upload(self, release: Mapping[str, Any], name: str, content: Path | bytes) -> None:
        """Upload an asset; what an earlier try left unfinished under its name goes first."""
        url = str(release["upload_url"]).partition("{")[0]
        for attempt in range(_TRIES):
            self._remove_unfinished(release, name)
            try:
                self._send(url, name, content)
            except PublishError as error:
                if error.code != "GITHUB_UNREACHABLE" or attempt == _TRIES - 1:
                    raise
                self._sleep(2.0**attempt)
            else:
                return

    def _send(self, url: str, name: str, content: Path | bytes) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as data:
            self._answer(
                "POST", url, tries=1, params={"name": name}, headers=headers, data=data
            ).close()

    def _remove_unfinished(self, release: Mapping[str, Any], name: str) -> None:
        for asset in self.pages(f"/releases/{release['id']}/assets"):
            unfinished = asset["state"] != "uploaded" or name.endswith(".next")
            if asset["name"] == name and unfinished:
                self.call("DELETE", f"/releases/assets/{asset['id']}")

    def _answer(
        self, method: str, url: str, *, tries: int = _TRIES, **options: Any
    ) -> requests.Response:
        """Ask until there is an answer that is none of a limit or of a broken server."""
        headers = {"Accept": "application/vnd.github+json", **options.pop("headers", {})}
        for attempt in range(tries):
            last = attempt == tries - 1
            try:
                answer = self._session.request(
                    method, url, headers=headers, timeout=_TIMEOUT, **options
                )
            except requests.RequestException as error:
                if last:
                    raise _unreachable(method, url, str(error)) from error
                self._sleep(2.0**attempt)
                continue
            pause = self._pause(answer, attempt)
            if pause is None:
                _require_success(method, url, answer)
                return answer
            answer.close()
            self._sleep(pause)
            if last:
                raise _unreachable(method, url, f"status {answer.status_code}")
        raise AssertionError("unreachable: the last try returns or raises")

    def _pause(self, answer: requests.Response, attempt: int) -> float | None:
        """Return the seconds to wait before asking again; None where the answer stands.

        https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api
        """
        if answer.status_code in _BROKEN:
            return 2.0**attempt
        if answer.status_code not in _LIMITED:
            return None
        if answer.headers.get("Retry-After", "").isdigit():
            pause = float(answer.headers["Retry-After"])
        elif answer.headers.get("X-RateLimit-Remaining") == "0":
            pause = float(answer.headers.get("X-RateLimit-Reset", "0")) - self._now() + 1
        elif answer.status_code == _TOO_MANY:
            pause = _UNTOLD
        else:  # not allowed at all
            return None
        return max(pause, 0.0) if pause <= _LONGEST_WAIT else None


def _content(answer: requests.Response) -> Iterator[bytes]:
    try:
        yield from answer.iter_content(BLOCK)
    except requests.RequestException as error:
        raise _unreachable("GET", answer.url, str(error)) from error


def _require_success(method: str, url: str, answer: requests.Response) -> None:
    if answer.ok:
        return
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


def _unreachable(method: str, url: str, why: str) -> PublishError:
    return PublishError(
        "GITHUB_UNREACHABLE",
        f"{method} {_shown(url)}: {why}",
        hint="nothing visible changed; publishing again sends only what is missing",
    )


def _shown(url: str) -> str:
    """Return a URL without its query: signed URLs carry secrets there."""
    return url.partition("?")[0]
