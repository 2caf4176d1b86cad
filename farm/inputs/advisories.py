"""Known holes of llama.cpp: what must not be published. Data: build/advisories.toml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Protocol

import msgspec
import tomllib
from msgspec import Meta

from farm import PROJECT_ROOT
from farm.errors import PublishError

if TYPE_CHECKING:
    from pathlib import Path

FILE: Final = PROJECT_ROOT / "build" / "advisories.toml"


class Advisory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One hole; builds from ``fixed_in`` on do not have it."""

    id: str
    summary: str
    fixed_in: Annotated[int, Meta(ge=1)]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    advisory: tuple[Advisory, ...]


class Numbered(Protocol):
    """A source of llama.cpp, before its build or in a manifest."""

    @property
    def build(self) -> int:
        """llama.cpp's build number."""


def load(path: Path = FILE) -> tuple[Advisory, ...]:
    """Read the advisories.

    Raises:
        PublishError: the file is malformed.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), _File).advisory
    except (OSError, ValueError) as error:
        raise PublishError("ADVISORIES_INVALID", f"{path.name}: {error}") from error


def of(source: Numbered, known: tuple[Advisory, ...]) -> tuple[Advisory, ...]:
    """Return the holes that a build of llama.cpp has."""
    return tuple(one for one in known if source.build < one.fixed_in)


def require_none(source: Numbered) -> None:
    """Refuse a build with a known hole.

    Raises:
        PublishError: ``KNOWN_ADVISORY``: names the holes and the first build without them.
    """
    found = of(source, load())
    if found:
        names = ", ".join(f"{one.id} ({one.summary})" for one in found)
        hint = f"build b{max(one.fixed_in for one in found)} or newer"
        if source.build == 0:
            hint += ". b0 means that the source told no number: build with --assume-build N"
        raise PublishError("KNOWN_ADVISORY", f"llama.cpp b{source.build} has {names}", hint=hint)
