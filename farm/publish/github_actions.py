"""What workflows do in their own repository: propose changed pins, and remove older caches.

A pull request is made through the REST API: nothing is pushed, and no credential is written to the
disk. Running it again continues where it stopped: a branch, a commit or a pull request that is
there already is used as it is.
"""

from __future__ import annotations

import base64
import hashlib
import os
from typing import TYPE_CHECKING, Final

import msgspec

from farm import PROJECT_ROOT, source
from farm.errors import UsageError
from farm.inputs import patches, pins
from farm.publish.github_api import Api

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farm.inputs.pins import SourcePin
    from farm.update_pins import Step, Update

REPOSITORY: Final = "GITHUB_REPOSITORY"
"""``OWNER/NAME``, as on every runner; ``GITHUB_TOKEN`` and ``GITHUB_API_URL`` are the API's."""
_PAGE: Final = 100
_SHOWN: Final = 40
"""How many differing files, or changed pins of a kind, stand in a pull request's text."""


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


def propose_pins(
    name: str, api: Api, update: Update, *, remote: str = source.GIT_REMOTE
) -> tuple[str, str]:
    """Propose what an update changed in ``build/pins.toml``; returns the branch and the address.

    The text lists every change. For a newer llama.cpp it also says in what the pinned archive
    differs from llama.cpp's own tag, so that a person can look at just that before it is merged.

    Raises:
        SourceError: llama.cpp's repository or the package index cannot be reached.
        PublishError: GitHub refused, or cannot be reached.
    """
    if update.newer is None:
        text = update.steps[-1].text.encode()
        branch = f"pins-{hashlib.sha256(text).hexdigest()[:12]}"
        title = f"Change pins: {', '.join(step.title for step in update.steps)}"
        body = "llama.cpp stays as it is, so the weekly run builds nothing of it.\n"
    else:
        branch, title = f"llama.cpp-b{update.newer}", f"Build llama.cpp b{update.newer}"
        body = _compared(pins.load().source, remote)
    changes = "".join(
        f"\n**{step.title}**\n{_listed(step.changes, code=False)}\n" for step in update.steps
    )
    written = "`build/pins.toml` as `invoke update-pins` wrote it, a commit for each kind."
    body = f"{written}\n{changes}\n{body}"
    return branch, _propose(name, api, branch, title, body, update.steps)


def _propose(name: str, api: Api, branch: str, title: str, body: str, steps: Sequence[Step]) -> str:
    """Put the steps on a branch, a commit each, and ask for it to be merged."""
    base = api.call("GET", "")["default_branch"]
    reference = f"refs/heads/{branch}"
    there = api.call("GET", f"/git/matching-refs/heads/{branch}")
    if reference not in {one["ref"] for one in there}:
        head = api.call("GET", f"/git/ref/heads/{base}")["object"]["sha"]
        api.call("POST", "/git/refs", json={"ref": reference, "sha": head})
    _put(api, branch, steps)
    query = {"head": f"{name.partition('/')[0]}:{branch}", "state": "open"}
    open_ones = api.call("GET", "/pulls", params=query)
    if open_ones:
        return str(open_ones[0]["html_url"])
    asked = {"title": title, "body": body, "head": branch, "base": base}
    return str(api.call("POST", "/pulls", json=asked)["html_url"])


def _compared(pin: SourcePin, remote: str) -> str:
    tag = source.from_ref(f"b{pin.build}", remote=remote)
    tree = source.from_archive(pin).tree
    differing = source.differences(tree, tag.tree)
    misfits = [error.message for error in patches.misfits(tree).values()]
    patched = "Every patch of `build/patches` fits it."
    if misfits:
        listed = _listed(misfits, code=False)
        patched = f"It is built without the patches that do not fit it:\n{listed}"
    return (
        f"llama.cpp b{pin.build} ({pin.llama_version}) comes from {pin.filename}, sha256 "
        f"`{pin.sha256}`. {patched}\n\n"
        f"Compared with llama.cpp's own tag b{pin.build} ({tag.commit}): {len(differing)} files of "
        f"the archive are not as there.\n{_listed(differing)}"
    )


def _listed(names: Sequence[str], *, code: bool = True) -> str:
    mark = "`" if code else ""
    shown = "".join(f"\n- {mark}{name}{mark}" for name in names[:_SHOWN])
    return shown + (f"\n- and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")


def _put(api: Api, branch: str, steps: Sequence[Step]) -> None:
    """Commit the steps that are not on the branch yet."""
    path = f"/contents/{pins.PINS_FILE.relative_to(PROJECT_ROOT).as_posix()}"
    texts = [step.text.encode() for step in steps]
    present, sha = _there(api, path, branch)
    for step in steps[texts.index(present) + 1 if present in texts else 0 :]:
        encoded = base64.b64encode(step.text.encode()).decode()
        change = {"message": step.title, "content": encoded, "branch": branch, "sha": sha}
        api.call("PUT", path, json=change)
        _, sha = _there(api, path, branch)


def _there(api: Api, path: str, branch: str) -> tuple[bytes, str]:
    """Return what a branch has of a file, and the number that a change of it must name."""
    there = api.call("GET", path, params={"ref": branch})
    return base64.b64decode(there["content"]), str(there["sha"])


class _Cache(msgspec.Struct, frozen=True):
    """A cache, as GitHub's REST API has it; ``created_at`` sorts as a text."""

    id: int
    key: str
    ref: str
    created_at: str
    size_in_bytes: int

    @property
    def kind(self) -> tuple[str, str]:
        """What all caches of one job have in common: a key ends with the run's number."""
        return self.ref, self.key.rpartition("-")[0]


class _Page(msgspec.Struct, frozen=True):
    actions_caches: list[_Cache]


def prune(prefix: str) -> Iterator[str]:
    """Remove the caches whose keys begin with ``prefix``, but the newest of each kind.

    Each run of a workflow adds a cache under a key of its own, and GitHub keeps 10 GB in all. What
    is over that it removes by its own order, and with it caches that a workflow still wants.

    Gives a line for each that was removed, and one for what stays.

    Raises:
        UsageError: ``GITHUB_REPOSITORY`` or ``GITHUB_TOKEN`` is not set.
        PublishError: GitHub refuses, or cannot be reached.
    """
    api = Api(repository())
    newest: dict[tuple[str, str], _Cache] = {}
    for entry in sorted(_caches(api, prefix), key=lambda one: one.created_at, reverse=True):
        if newest.setdefault(entry.kind, entry) is not entry:
            api.call("DELETE", f"/actions/caches/{entry.id}")
            yield f"removed {entry.key}: {entry.size_in_bytes / 1e6:.1f} MB"
    total = sum(entry.size_in_bytes for entry in newest.values())
    yield f"{len(newest)} caches stay: {total / 1e6:.1f} MB"


def _caches(api: Api, prefix: str) -> list[_Cache]:
    found: list[_Cache] = []
    number = 1
    while True:
        asked = {"key": prefix, "per_page": _PAGE, "page": number}
        told = msgspec.convert(api.call("GET", "/actions/caches", params=asked), _Page)
        found += told.actions_caches
        if len(told.actions_caches) < _PAGE:
            return found
        number += 1
