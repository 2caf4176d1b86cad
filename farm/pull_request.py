"""One changed file → a pull request on GitHub, through its REST API.

Nothing is pushed and no credential is written to the disk. Running it again continues where it
stopped: a branch, a commit or a pull request that is there already is used as it is.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import requests

from farm import PROJECT_ROOT, packages, pins, source
from farm.errors import FarmError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

API: Final = "https://api.github.com"
"""What ``GITHUB_API_URL`` replaces, as on every runner."""
_VERSION: Final = "2022-11-28"
_TIMEOUT: Final = (10.0, 60.0)
_EXISTS: Final = 422
_MISSING: Final = 404
_SHOWN: Final = 40
"""How many differing files stand in a pull request's text."""


@dataclass(frozen=True)
class Repository:
    """A repository on GitHub, and who speaks. The token is in no message.

    Attributes:
        name: ``OWNER/NAME``.
        token: what may write contents and pull requests.
        api: the API's address.
    """

    name: str
    token: str
    api: str = API

    def __repr__(self) -> str:
        return f"Repository({self.name!r}, api={self.api!r})"

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> Repository:
        """Take ``GITHUB_REPOSITORY``, ``GITHUB_TOKEN`` and ``GITHUB_API_URL``.

        Raises:
            UsageError: one is missing; names it.
        """
        given = os.environ if environment is None else environment
        for name in ("GITHUB_REPOSITORY", "GITHUB_TOKEN"):
            if not given.get(name):
                raise UsageError("VARIABLE_MISSING", f"{name} is not set", hint="see docs/ci.md")
        return cls(
            given["GITHUB_REPOSITORY"], given["GITHUB_TOKEN"], given.get("GITHUB_API_URL") or API
        )

    def call(self, method: str, path: str, *, allow: tuple[int, ...] = (), **options: Any) -> Any:
        """Call the API below ``/repos/OWNER/NAME``.

        Returns:
            The JSON answer, None where its status is in ``allow``.

        Raises:
            FarmError: ``GITHUB_REFUSED``: names what was asked, and what GitHub said.
        """
        headers = {
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {self.token}",
            "X-GitHub-Api-Version": _VERSION,
        }
        url = f"{self.api}/repos/{self.name}{path}"
        try:
            with packages.session() as web:
                answer = web.request(method, url, headers=headers, timeout=_TIMEOUT, **options)
            if answer.status_code in allow:
                return None
            if not answer.ok:
                raise FarmError("GITHUB_REFUSED", f"{method} {path}: {_said(answer)}")
            return answer.json()
        except requests.RequestException as error:
            raise FarmError("GITHUB_UNREACHABLE", f"{method} {path}: {error}") from error


def propose(repository: Repository, file: Path, *, branch: str, title: str, body: str) -> str:
    """Put a file of this checkout on a branch and ask for it to be merged.

    Returns:
        The pull request's address.

    Raises:
        FarmError: GitHub refused, or cannot be reached.
    """
    name = file.relative_to(PROJECT_ROOT).as_posix()
    base = repository.call("GET", "")["default_branch"]
    head = repository.call("GET", f"/git/ref/heads/{base}")["object"]["sha"]
    reference = {"ref": f"refs/heads/{branch}", "sha": head}
    repository.call("POST", "/git/refs", json=reference, allow=(_EXISTS,))
    _put(repository, name, file.read_bytes(), branch, title)
    owner = repository.name.partition("/")[0]
    query = {"head": f"{owner}:{branch}", "state": "open"}
    there = repository.call("GET", "/pulls", params=query)
    if there:
        return str(there[0]["html_url"])
    asked = {"title": title, "body": body, "head": branch, "base": base}
    return str(repository.call("POST", "/pulls", json=asked)["html_url"])


def propose_pins(repository: Repository, *, remote: str = source.GIT_REMOTE) -> tuple[str, str]:
    """Propose ``build/pins.toml`` as it is now; returns the branch and the address.

    The text says in what the pinned archive differs from llama.cpp's own tag, so that a person
    can look at just that before it is merged.

    Raises:
        SourceError: llama.cpp's repository or the package index cannot be reached.
        FarmError: GitHub refused, or cannot be reached.
    """
    pin = pins.load().source
    branch, title = f"llama.cpp-b{pin.build}", f"Build llama.cpp b{pin.build}"
    tag = source.from_ref(f"b{pin.build}", remote=remote)
    differing = source.differences(source.from_archive(pin).tree, tag.tree)
    body = (
        f"`build/pins.toml` as `invoke update-pins --newest` wrote it: llama.cpp b{pin.build} "
        f"({pin.llama_version}) from {pin.filename}, sha256 `{pin.sha256}`.\n\n"
        f"Compared with llama.cpp's own tag b{pin.build} ({tag.commit}): {len(differing)} files of "
        f"the archive are not as there.\n{_listed(differing)}"
    )
    return branch, propose(repository, pins.PINS_FILE, branch=branch, title=title, body=body)


def _listed(names: tuple[str, ...]) -> str:
    shown = "".join(f"\n- `{name}`" for name in names[:_SHOWN])
    return shown + (f"\n- and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")


def _put(repository: Repository, name: str, content: bytes, branch: str, message: str) -> None:
    there = repository.call("GET", f"/contents/{name}", params={"ref": branch}, allow=(_MISSING,))
    if there is not None and base64.b64decode(there["content"]) == content:
        return
    change = {
        "message": message,
        "content": base64.b64encode(content).decode(),
        "branch": branch,
        **({"sha": there["sha"]} if there is not None else {}),
    }
    repository.call("PUT", f"/contents/{name}", json=change)


def _said(answer: requests.Response) -> str:
    """Return GitHub's own sentence, which names no secret."""
    try:
        return f"{answer.status_code} {answer.json()['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.reason}"
