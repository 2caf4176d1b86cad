"""GitHub's caches of Actions: of each kind of key the newest stays, the others go.

A cache's entry is never replaced: each run of a workflow adds one under a key of its own, and
GitHub keeps 10 GB in all. What is over that it removes by its own order, and with it caches that a
workflow still wants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from farm.publish import pull_request
from farm.publish.github_api import Api

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAGE: Final = 100


class _Entry(msgspec.Struct, frozen=True):
    """A cache's entry, as GitHub's REST API has it; ``created_at`` sorts as a text."""

    id: int
    key: str
    ref: str
    created_at: str
    size_in_bytes: int

    @property
    def kind(self) -> tuple[str, str]:
        """What all runs' entries of one job have in common: a key ends with the run's number."""
        return self.ref, self.key.rpartition("-")[0]


class _Page(msgspec.Struct, frozen=True):
    actions_caches: list[_Entry]


def prune(prefix: str) -> Iterator[str]:
    """Remove the entries whose keys begin with ``prefix``, but the newest of each kind.

    Gives a line for each that was removed, and one for what stays.

    Raises:
        UsageError: ``GITHUB_REPOSITORY`` or ``GITHUB_TOKEN`` is not set.
        PublishError: GitHub refuses, or cannot be reached.
    """
    api = Api(pull_request.repository())
    newest: dict[tuple[str, str], _Entry] = {}
    for entry in sorted(_entries(api, prefix), key=lambda one: one.created_at, reverse=True):
        if newest.setdefault(entry.kind, entry) is not entry:
            api.call("DELETE", f"/actions/caches/{entry.id}")
            yield f"removed {entry.key}: {entry.size_in_bytes / 1e6:.1f} MB"
    total = sum(entry.size_in_bytes for entry in newest.values())
    yield f"{len(newest)} caches stay: {total / 1e6:.1f} MB"


def _entries(api: Api, prefix: str) -> list[_Entry]:
    found: list[_Entry] = []
    number = 1
    while True:
        asked = {"key": prefix, "per_page": _PAGE, "page": number}
        told = msgspec.convert(api.call("GET", "/actions/caches", params=asked), _Page)
        found += told.actions_caches
        if len(told.actions_caches) < _PAGE:
            return found
        number += 1
