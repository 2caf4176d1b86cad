"""One changed file → a pull request on GitHub, through its REST API.

Nothing is pushed and no credential is written to the disk. Running it again continues where it
stopped: a branch, a commit or a pull request that is there already is used as it is.
"""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING, Final

from farm import PROJECT_ROOT, source
from farm.errors import UsageError
from farm.inputs import pins

if TYPE_CHECKING:
    from pathlib import Path

    from farm.publish.github_api import Api

REPOSITORY: Final = "GITHUB_REPOSITORY"
"""``OWNER/NAME``, as on every runner; ``GITHUB_TOKEN`` and ``GITHUB_API_URL`` are the API's."""
_SHOWN: Final = 40
"""How many differing files stand in a pull request's text."""


def repository() -> str:
    """Return the repository that this runs for.

    Raises:
        UsageError: ``GITHUB_REPOSITORY`` does not say.
    """
    name = os.environ.get(REPOSITORY, "")
    if not name:
        raise UsageError(
            "VARIABLE_MISSING", f"{REPOSITORY} is not set", hint="OWNER/NAME; see docs/ci.md"
        )
    return name


def propose(name: str, api: Api, file: Path, *, branch: str, title: str, body: str) -> str:
    """Put a file of this checkout on a branch and ask for it to be merged.

    Args:
        name: the repository, ``OWNER/NAME``.
        api: the API of it.
        file: a file that the repository has already.
        branch: made from the default branch where it is not there.
        title: of the commit and of the pull request.
        body: the pull request's text.

    Returns:
        The pull request's address.

    Raises:
        PublishError: GitHub refused, or cannot be reached.
    """
    base = api.call("GET", "")["default_branch"]
    reference = f"refs/heads/{branch}"
    there = api.call("GET", f"/git/matching-refs/heads/{branch}")
    if reference not in {one["ref"] for one in there}:
        head = api.call("GET", f"/git/ref/heads/{base}")["object"]["sha"]
        api.call("POST", "/git/refs", json={"ref": reference, "sha": head})
    _put(api, file, branch, title)
    query = {"head": f"{name.partition('/')[0]}:{branch}", "state": "open"}
    open_ones = api.call("GET", "/pulls", params=query)
    if open_ones:
        return str(open_ones[0]["html_url"])
    asked = {"title": title, "body": body, "head": branch, "base": base}
    return str(api.call("POST", "/pulls", json=asked)["html_url"])


def propose_pins(name: str, api: Api, *, remote: str = source.GIT_REMOTE) -> tuple[str, str]:
    """Propose ``build/pins.toml`` as it is now; returns the branch and the address.

    The text says in what the pinned archive differs from llama.cpp's own tag, so that a person
    can look at just that before it is merged.

    Raises:
        SourceError: llama.cpp's repository or the package index cannot be reached.
        PublishError: GitHub refused, or cannot be reached.
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
    return branch, propose(name, api, pins.PINS_FILE, branch=branch, title=title, body=body)


def _listed(names: tuple[str, ...]) -> str:
    shown = "".join(f"\n- `{name}`" for name in names[:_SHOWN])
    return shown + (f"\n- and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")


def _put(api: Api, file: Path, branch: str, message: str) -> None:
    path = f"/contents/{file.relative_to(PROJECT_ROOT).as_posix()}"
    content = file.read_bytes()
    there = api.call("GET", path, params={"ref": branch})
    if base64.b64decode(there["content"]) == content:
        return
    encoded = base64.b64encode(content).decode()
    change = {"message": message, "content": encoded, "branch": branch, "sha": there["sha"]}
    api.call("PUT", path, json=change)
